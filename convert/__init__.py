"""PyTorch checkpoints to Flax parameters and back, and the proof that both compute the same.

>>> from beit_jax import convert
>>> from beit_jax.hub import resolve
>>> convert.convert(resolve("microsoft/beit-base-patch16-224"), Path("beit-base"))

A checkpoint's files are read by `checkpoint`, its names mapped by `tables`, the import planned and run by `importer`,
PyTorch tensors written by `exporter`, and the two implementations compared by `parity`.
"""

from .exporter import to_torch
from .importer import Plan, convert, load, plan

__all__ = ["Plan", "convert", "load", "plan", "to_torch"]
