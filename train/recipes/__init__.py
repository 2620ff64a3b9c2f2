"""The published runs, one function each: docstring = source, hardware and expected result; body = the numbers.

`beit-jax train NAME --data DIR --out DIR` carries one out; every number can be changed on the command line. Batch sizes
are global (GPUs x images x accumulation of the original). A new recipe is a function in one of these modules, or in its
objective's, and its name in ``RECIPES`` at the module's end. May import: `..objectives`, `..recipe`.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType

from beit_jax.errors import BeitJaxError, printable

from .. import objectives
from ..objectives import OBJECTIVES
from ..recipe import Recipe

MODULES = ("own", "finetuning", "segmentation", "pretraining", "tokenizers", "digits")
"""Modules of this package, whose ``RECIPES`` are listed in this order. An objective's module may have some, too."""


def _functions() -> Iterator[Callable[[], Recipe]]:
    for module in MODULES:
        yield from import_module(f"{__name__}.{module}").RECIPES
    for objective in OBJECTIVES:
        yield from getattr(import_module(f"{objectives.__name__}.{objective}"), "RECIPES", ())


_ONE_DEVICE = ("own", "digits")
"""Modules whose recipes are for one device: a slice of TPUs changes nothing of them."""
RECIPES: Mapping[str, Callable[[], Recipe]] = MappingProxyType({build.__name__: build for build in _functions()})


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        BeitJaxError: no such recipe; names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise BeitJaxError(
            f"no recipe is called {printable(name)}; the nearest is {near} (beit-jax train --help lists all)"
        )
    build = RECIPES[name]
    recipe = replace(build(), name=name)
    return recipe if build.__module__.rpartition(".")[2] in _ONE_DEVICE else recipe.for_tpus()
