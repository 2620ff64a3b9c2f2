"""PyTorch checkpoints to Flax parameters and back, and the proof that both compute the same.

>>> from beit_jax import convert
>>> from beit_jax.hub import resolve
>>> convert.convert(resolve("microsoft/beit-base-patch16-224"), Path("beit-base"))

The way of a checkpoint: `files` opens it, with `pickles` for what torch pickled; `identify` finds its format among the
pages of `formats`, and `images` how its images are prepared; `validation` compares its tensors with the model;
`importer` plans and runs the import by a reader of leaves, `reading`, and `beit_jax.models.adapt` changes sizes.
`adapters` reads and writes PEFT's files. `exporter` is the way back. `parity` compares both implementations, for which
`reference` builds transformers' model. `tokenizers` converts tokenizers, `options` holds what a user may ask for,
`labels` the head among it, `training_folders` finds the model in what a training leaves, and `provenance` is the record
of where weights came from.

May import: the ground of `beit_jax`, its images, weights, adapters, models and tokenizers. `pickles` comes first, then
`strangers`, `files`, `formats`, `adapters`, and the modules here. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter import export, to_torch
    from .importer import Plan, convert, load, plan
    from .options import Options

_HOME = {
    "Options": "options",
    "Plan": "importer",
    "convert": "importer",
    "export": "exporter",
    "load": "importer",
    "plan": "importer",
    "to_torch": "exporter",
}

__all__ = ["Options", "Plan", "convert", "export", "load", "plan", "to_torch"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
