"""Kernels of a model's blocks in the layout that products of a CPU read, for forward passes alone.

A product reads a kernel as panels of some columns. Laid out like that once, kernels are read straight from memory, one
panel after the other, and are not copied in every forward pass (benchmarks/RESULTS.md, "Kernels packed once").
"""

import re
from collections.abc import Mapping
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from beit_jax.kernels.cpu import library
from beit_jax.kernels.cpu.calls import Packed, computes
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
    cannot be built (`beit_jax.kernels.cpu.library`). ``from_pretrained(..., packed=True)`` does the same while it
    reads, in less memory.

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


def packed(params: dict[str, np.ndarray]) -> dict[str, Any]:
    """Flat parameters of a model in float32, with the kernels of its blocks as `pack` lays them out.

    Args:
        params: of a checkpoint that nobody else uses. They are taken out, and kernels are laid out where they lie.
    """
    library.offer()  # where no model was imported, nobody has
    return {name: _taken(name, params.pop(name)) for name in list(params)}


def unpacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that were packed, as arrays."""
    return {name: leaf.unpacked() if isinstance(leaf, Packed) else leaf for name, leaf in params.items()}


def _is_kernel(name: str, leaf: Any) -> bool:
    """Whether it is the kernels of blocks, as an array on one CPU; within `jax.jit` they have no values to lay out."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not _KERNEL.fullmatch(name):
        return False
    return [device.platform for device in leaf.devices()] == ["cpu"]


def _taken(name: str, leaf: np.ndarray) -> Packed | Array:
    """An array of a checkpoint, as an array of JAX."""
    if not _KERNEL.fullmatch(name) or jax.default_backend() != "cpu":
        return jnp.asarray(leaf, jnp.float32)
    sides, inputs = leaf.shape[1:], _inputs(name)
    k, n = prod(sides[:inputs]), prod(sides[inputs:])
    if not _may_be_written(leaf) or not computes(leaf, widths=(k, n)) or n % library.columns():
        return _packed(name, jnp.asarray(leaf, jnp.float32))
    panels = library.pack_in_place(leaf.reshape(-1, k, n))
    return Packed(jnp.asarray(panels, jnp.float32), sides[:inputs], sides[inputs:])


def _may_be_written(leaf: np.ndarray) -> bool:
    """Whether panels may take its place: JAX copies arrays that are not aligned."""
    aligned = leaf.ctypes.data % library.ALIGNMENT == 0
    return aligned and leaf.dtype == np.float32 and leaf.flags.c_contiguous and leaf.flags.writeable


def _packed(name: str, leaf: Array) -> Packed | Array:
    return Packed.of(leaf, _inputs(name))


def _inputs(name: str) -> int:
    """How many axes of a block's kernel are inputs."""
    return 2 if name.endswith("/out_kernel") else 1  # heads and their width
