"""Training: recipes, data, objectives, one sharded loop, and evaluation. Reads and writes native checkpoints.

`recipe` is what every run has, `adapting` what a run with an adapter has; its rooms, from the ground up, are costs,
distributed, checkpoints, augmentation, data, evaluation, initial, step, objectives, recipes, loop and forecast. Needs
``pip install 'beit-jax[train]'``.

>>> from beit_jax import train
>>> train.run("digits_finetune", "./digits", "./run", options={"optim.epochs": 1}).scores

In Python `run` trains, `recipe_with` changes a recipe, `RECIPES` names all, `prepare` and its companions write data,
and `evaluate` scores a classifier. A name is imported when it is first used.

May import: the library (`beit_jax`), never `beit_jax.convert`: training reads native checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.prepare import prepare, prepare_digits, prepare_segmentation, prepare_table
    from .evaluation.labelled import evaluate_directory as evaluate
    from .loop.start import recipe_with, run
    from .recipes import RECIPES

_HOME = {
    "RECIPES": ("recipes", "RECIPES"),
    "evaluate": ("evaluation.labelled", "evaluate_directory"),
    "prepare": ("data.prepare", "prepare"),
    "prepare_digits": ("data.prepare", "prepare_digits"),
    "prepare_segmentation": ("data.prepare", "prepare_segmentation"),
    "prepare_table": ("data.prepare", "prepare_table"),
    "recipe_with": ("loop.start", "recipe_with"),
    "run": ("loop.start", "run"),
}

__all__ = [
    "RECIPES",
    "evaluate",
    "prepare",
    "prepare_digits",
    "prepare_segmentation",
    "prepare_table",
    "recipe_with",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value
