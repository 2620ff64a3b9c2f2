"""PyTorch checkpoints to Flax parameters and back, and the proof that both compute the same.

>>> from beit_jax import convert
>>> from beit_jax.hub import resolve
>>> convert.convert(resolve("microsoft/beit-base-patch16-224"), Path("beit-base"))

A checkpoint's files are read by `checkpoint`, recognised by `identify`, its names mapped by `tables`, the import
planned and run by `importer`, changed on the way by `beit_jax.models.adapt`, PyTorch checkpoints written by `exporter`, and
the two implementations compared by `parity`. Names are imported when first used.
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
