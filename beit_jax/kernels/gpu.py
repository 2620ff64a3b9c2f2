"""Attention of GPUs by the kernels of `gpu_tiles`: where they are computed, and on a mesh by which device.

The textbook form is decorated by `for_gpus(attend_by_tiles)`. As for TPUs, what counts is the device that a mesh names;
without a mesh the textbook form is computed.

The kernels were compiled for cards and interpreted on a CPU; nobody has run them on a card yet. They are written for
JAX's Triton backend, which JAX says it will remove. Where it is gone, or the environment variable
BEIT_JAX_GPU_ATTENTION is "xla", the textbook form is computed.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from beit_jax.errors import environment_choice

from .mesh import AVERAGES, Split, Target, split_of

SWITCH = "BEIT_JAX_GPU_ATTENTION"
OLDEST = 80
"""The compute capability, times ten, from which on cards multiply bfloat16."""
WIDTHS = (16, 32, 64, 128)
"""Numbers of a head: tiles are powers of two, and as wide as the units for products or wider."""

GPUS = Target("gpu", "cuda")
for_gpus, interpreted = GPUS.computes, GPUS.interpreted


def attend_by_tiles(
    textbook: Callable[..., tuple[Array, Array | None]],
    qkv: Float[Array, "b n 3 heads e"],
    bias: Float[Array, "shards heads n n"] | None,
    drop: Callable[[Array], Array] | None = None,
    *,
    output_attentions: bool = False,
) -> tuple[Float[Array, "b n heads e"], Float[Array, "b heads n n"] | None]:
    """`attention.attend` by kernels, whose scores never leave a multiprocessor.

    The textbook form is computed instead where weights are dropped or returned, which takes them all at once; where a
    size is symbolic (`jax.export`); where the mesh does not divide the batch, or is of another mode than Auto; in
    float32, whose products the kernels would shorten; for heads of another width than `WIDTHS`; and on cards older than
    `OLDEST`.

    Gradients go backward only: there is no forward mode (`jax.jvp`), nor a second derivative.

    Raises:
        BeitJaxError: the environment variable says neither "tiles" nor "xla".
    """
    suits = drop is None and not output_attentions and _suits(qkv)
    split = split_of(qkv, bias, interpret=GPUS.interpret) if suits else None
    if split is None:
        return textbook(qkv, bias, drop, output_attentions=output_attentions)
    if bias is not None and len(bias) < split.shards:
        bias = jnp.broadcast_to(bias, (split.shards, *bias.shape[1:]))
    return _tiles(split, qkv, bias), None


def _suits(qkv: Array) -> bool:
    chosen = environment_choice(SWITCH, "tiles", "xla") == "tiles"
    if GPUS.interpret:
        return True
    short = jnp.dtype(qkv.dtype).itemsize == 2 and qkv.shape[-1] in WIDTHS
    return chosen and short and _capability() >= OLDEST


def _capability() -> int:
    """The compute capability, times ten, of the card that is compiled for; 0 where JAX's Triton does not know it."""
    try:
        triton = importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return 0
    try:
        if hasattr(triton, "get_gpu_info"):
            return int(triton.get_gpu_info().compute_capability)
        return int(jax.local_devices(backend="gpu")[0].compute_capability.replace(".", ""))  # before jax 0.11
    except (ValueError, RuntimeError):
        return 0


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiles(
    split: Split, qkv: Float[Array, "b n 3 heads e"], bias: Float[Array, "shards heads n n"] | None
) -> Float[Array, "b n heads e"]:
    """The averages of every token."""
    return _made(split, qkv, bias)[0]


def _made(split: Split, qkv: Array, bias: Array | None) -> tuple[Array, Array]:
    from . import gpu_tiles

    def local(qkv: Array, *biases: Array) -> tuple[Array, Array]:
        return gpu_tiles.forward(qkv, biases[0] if biases else None, interpret=split.interpret)

    biases = [] if bias is None else [bias]
    averages, logs = split.over_devices(local, "qB"[: 1 + len(biases)], "ar")(qkv, *biases)
    return checkpoint_name(averages, AVERAGES), checkpoint_name(logs, AVERAGES)


def _tiles_forward(split: Split, qkv: Array, bias: Array | None) -> tuple[Array, tuple[Any, ...]]:
    averages, logs = _made(split, qkv, bias)
    return averages, (qkv, bias, averages, logs)


def _tiles_backward(split: Split, kept: tuple[Any, ...], upstream: Array) -> tuple[Array, Array | None]:
    from . import gpu_tiles

    qkv, bias, averages, logs = kept
    biases = [] if bias is None else [bias]

    def local(qkv: Array, averages: Array, logs: Array, upstream: Array, *biases: Array) -> tuple[Array, ...]:
        given = biases[0] if biases else None
        gradient, sums = gpu_tiles.backward(qkv, given, averages, logs, upstream, interpret=split.interpret)
        return (gradient,) if sums is None else (gradient, sums)

    kinds = "qaraB"[: 4 + len(biases)], "qB"[: 1 + len(biases)]
    gradient, *sums = split.over_devices(local, *kinds)(qkv, averages, logs, upstream, *biases)
    return gradient, sums[0].astype(bias.dtype) if sums else None


_tiles.defvjp(_tiles_forward, _tiles_backward)
