"""Kernels of a model's blocks in the layout that products of a CPU read, for forward passes alone.

A product reads a kernel as panels of some columns. Laid out like that once, kernels are read straight from memory, one
panel after the other, and are not copied in every forward pass (benchmarks/RESULTS.md, "Kernels packed once").
"""

import re
from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from beit_jax.kernels.cpu import library
from beit_jax.kernels.cpu.calls import Packed
from beit_jax.tree import flatten

if TYPE_CHECKING:
    from beit_jax.models.build import Model

_KERNEL = re.compile(r"(.*/)?blocks/.*kernel")


def pack(model: "Model") -> "Model":
    """Lays out the kernels of a model's blocks as this machine's CPU reads them fastest, in place.

    >>> model, processor = beit_jax.from_pretrained("./beit-base")
    >>> model = beit_jax.pack(model)
    >>> forward = jax.jit(lambda model, pixels: model(pixels).logits)

    Outputs agree with those of before up to rounding. The model is for forward passes on this machine from then on:
    it has gradients, but training it is slow. `save_pretrained` writes it as before. Nothing is changed where nothing
    would be faster: on GPUs, TPUs and several devices, of products in bfloat16, of small models, and where kernels
    cannot be built (`beit_jax.kernels.cpu.library`).

    Args:
        model: with parameters of float32.

    Returns:
        The same model.
    """
    from flax import nnx  # not at the top: `program_cache` packs parameters without Flax and models

    from beit_jax.models.encoder import BeitModel

    encoder = model if isinstance(model, BeitModel) else model.beit
    if jnp.dtype(encoder.embeddings.dtype) != jnp.float32:
        return model
    sizes = {
        name: leaf.nbytes
        for name, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()
        if _is_kernel(name, leaf)
    }
    # One after the other, the largest first: each takes the memory of the one before it.
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        variable = attrgetter(name.replace("/", "."))(model)
        variable.set_value(jax.block_until_ready(_packed(name, variable[...])))
    return model


def packed(params: Mapping[str, Array]) -> dict[str, Any]:
    """Flat parameters of a model, with the kernels of its blocks as `pack` lays them out."""
    library.offer()  # where no model was imported, nobody has
    return {name: _packed(name, leaf) if _is_kernel(name, leaf) else leaf for name, leaf in params.items()}


def unpacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that were packed, as arrays."""
    return {name: leaf.unpacked() if isinstance(leaf, Packed) else leaf for name, leaf in params.items()}


def _is_kernel(name: str, leaf: Any) -> bool:
    """Whether it is the kernels of blocks, as an array on one CPU; within `jax.jit` they have no values to lay out."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not _KERNEL.fullmatch(name):
        return False
    return [device.platform for device in leaf.devices()] == ["cpu"]


def _packed(name: str, leaf: Array) -> Packed | Array:
    return Packed.of(leaf, inputs=2 if name.endswith("/out_kernel") else 1)  # heads and their width
