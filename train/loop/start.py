"""A run in one call, for Python: what ``beit-jax train`` does with its words.

>>> from beit_jax import train
>>> train.run("digits_finetune", "./digits", "./run", options={"optim.epochs": 1}).scores
"""

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import jax

from beit_jax.errors import BeitJaxError, printable
from beit_jax.inference.reading import load_any
from beit_jax.inference.saving import save_adapters
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
from beit_jax.weights.native import NativeCheckpoint

from ..recipe import Recipe, Resume
from ..recipes import recipe_named
from . import run as loop
from .plan import make_plan

Place = str | os.PathLike[str]
"""A path."""


def run(
    recipe: str | Recipe,
    data: Place,
    out: Place,
    *,
    init: Place | NativeCheckpoint | None = None,
    tokenizer: Place | TokenizerCheckpoint | None = None,
    decoder: Place | TokenizerCheckpoint | None = None,
    stored_tokens: Place | None = None,
    teacher: Place | NativeCheckpoint | None = None,
    options: Mapping[str, Any] | None = None,
    resume: Resume = "auto",
    quiet: bool = False,
) -> loop.Outcome:
    """Trains by a recipe, or goes on with the run in `out`; the model is then ``out/model``.

    Args:
        recipe: a name of `beit-jax train --help`, or a recipe.
        data: prepared data, a directory.
        init, teacher: models: a native checkpoint, read or not, whatever `beit_jax.load` reads, a hub name too.
        tokenizer, decoder, stored_tokens: native, read or not, as `beit-jax train` has them.
        options: changes of the recipe, see `recipe_with`.
        resume: "auto": continue what `out` holds, or begin; "must": continue only; "never": begin only.
        quiet: show nothing.

    Returns:
        The last scores, times, and the directories of the models.

    Raises:
        BeitJaxError: as `make_plan` and `loop.train`.
    """
    changed = recipe_with(recipe, options or {})
    outcome = loop.train(
        make_plan(  # which nothing else keeps, see `Program.begun`
            changed,
            Path(data),
            init=_model(init),
            tokenizer=_path(tokenizer),
            decoder=_path(decoder),
            stored_tokens=None if stored_tokens is None else Path(stored_tokens),
            teacher=_model(teacher),
        ),
        Path(out),
        resume=resume,
        quiet=quiet,
    )
    if jax.process_index() > 0:
        return outcome
    adapters = save_adapters(outcome.models, lambda line: None if quiet else print(line, file=sys.stderr))
    return replace(outcome, models=(*outcome.models, *adapters))


def recipe_with(recipe: str | Recipe, options: Mapping[str, Any]) -> Recipe:
    """A recipe with other options, checked.

    Args:
        recipe: its name, or a recipe.
        options: values by the names that the command line gives them: ``{"optim.lr": 1e-3, "model.drop-path": 0.2}``.

    Raises:
        BeitJaxError: no such recipe or option, or a value that the option cannot have.
    """
    found = recipe_named(recipe) if isinstance(recipe, str) else recipe
    kinds = found.group_types()
    known = {f"{group}.{entry.name}": (group, entry.name) for group, kind in kinds.items() for entry in fields(kind)}
    groups = found.groups()
    for name, value in options.items():
        spelled = name.removeprefix("--").replace("-", "_")
        if spelled not in known:
            near = difflib.get_close_matches(spelled, known, n=1, cutoff=0.0)[0].replace("_", "-")
            raise BeitJaxError(f"--{printable(name)}: no option of {found.name or 'the recipe'}; the nearest is {near}")
        group, field = known[spelled]
        hint = get_type_hints(kinds[group], include_extras=True)[field]
        plain = tuple(value) if isinstance(value, list) else value
        if not _fits(plain, hint):
            raise BeitJaxError(f"--{spelled.replace('_', '-')}: expected {_described(hint)}, found {printable(value)}")
        groups[group] = replace(groups[group], **{field: plain})
    changed = replace(found, **groups)
    changed.check()
    return changed


def _model(source: Place | NativeCheckpoint | None) -> NativeCheckpoint | None:
    return load_any(source) if isinstance(source, str | os.PathLike) else source


def _path(source: Place | TokenizerCheckpoint | None) -> Path | TokenizerCheckpoint | None:
    return Path(source) if isinstance(source, str | os.PathLike) else source


def _fits(value: object, hint: Any) -> bool:
    """True if a value is of a type, as type hints of options say it; an integer is a float too, and True is neither."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _described(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return "several of " + _described(arguments[0]) if arguments[-1] is ... else f"{len(arguments)} values"
    return "nothing" if hint is type(None) else str(getattr(hint, "__name__", hint))
