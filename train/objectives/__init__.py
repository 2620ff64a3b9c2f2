"""Objectives: the things that a run can learn. Each is one file, and one line in `OBJECTIVES`.

An objective's file holds its options, its recipe (the groups of options that it reads, and their rules), its input, its
loss, the network that it keeps beside the parameters, its evaluation, its results, and what it costs. `objective` is
the interface. `labelled`, `unlabelled` and `hidden_patches` are kinds of input. `outputs` has what the outputs of a
classifier may be, `class_weights` what each class weighs. `codebook` and `teachers` are parts of the training of
tokenizers. May import: the library, and every room of training below; no recipes, no loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .objective import Objective

OBJECTIVES = {
    "classification": "Classification",
    "linear_probe": "Probe",
    "segmentation": "Segmentation",
    "masked_tokens": "MaskedTokens",
    "data2vec": "Data2vec",
    "vqkd": "Vqkd",
    "dvae": "Dvae",
}
"""The module of every objective, which is its name, and its class there."""


def objective_of(recipe: "Recipe") -> "type[Objective[Any]]":
    """The objective of a recipe, imported when it is first asked for."""
    module = import_module(f"{__name__}.{recipe.objective}")
    kind: type[Objective[Any]] = getattr(module, OBJECTIVES[recipe.objective])
    return kind
