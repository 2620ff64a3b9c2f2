"""The elements of a block in the forms of TPUs and GPUs, which move fewer bytes. The compilers find none of them.

Products are fast there, and memory is slow beside them. What the way back needs is therefore kept once, and as it is
read: behind the bias that was added, not before it. Under the policies of `models.interface.REMAT` it bears a name.

All forms have the values and gradients of the textbook up to rounding. Gradients go backward only.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from beit_jax.errors import environment_choice

from .mesh import HEAD_AXIS, KEPT, TPU_SWITCH, Target

ACCELERATORS = Target("tpu", "gpu", "cuda")
for_accelerators, interpreted = ACCELERATORS.computes, ACCELERATORS.interpreted

T = TypeVar("T")

SUBLANES = 8
"""Rows of a product that the unit for products of a TPU takes at a time."""


def named(_: Callable[..., Any], x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """`x`, which a policy of rematerialisation may keep."""
    return checkpoint_name(x, KEPT)


@for_accelerators(named)
def kept(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """`x`; of it the way back of a block computes the rest again."""
    return x


def _barred(_: Callable[..., Any], ready: Array, needed: Array) -> tuple[Array, Array]:
    ready, needed = jax.lax.optimization_barrier((ready, needed))
    return ready, needed


@for_accelerators(_barred)
def in_order(
    ready: Float[Array, "b height width c"], needed: Int[Array, "b patches"]
) -> tuple[Float[Array, "b height width c"], Int[Array, "b patches"]]:
    """Both, of which the second is computed before anything reads the first: so that what it takes of memory is free
    again. The compilers' schedules mix two networks, and hold the largest arrays of both at once."""
    return ready, needed


# --- Layer scale ------------------------------------------------------------------------------------------------------


def with_scaled_kernels(textbook: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """`layers.Block`, whose layer scales are multiplied into the last kernel of each branch.

        gamma * (x @ kernel + bias) = x @ (gamma * kernel) + gamma * bias

    The kernel's gradient then holds what gamma's is made of: the branch's output, as large as the residual stream, is
    neither kept nor read again. Dropout between commutes with the scale. Kernels with adapters stay as they are.
    """
    block, *rest = arguments
    if not hasattr(block, "gamma_1"):
        return textbook(*arguments, **options)
    block = jax.tree.map(lambda leaf: leaf, block)  # another module; the caller's keeps its parameters
    last = (block.attention, "out_kernel", "out_bias", "gamma_1"), (block.mlp.fc2, "kernel", "bias", "gamma_2")
    for layer, kernel, bias, gamma in last:
        scale = getattr(block, gamma)[...].astype(jnp.float32)
        plain = getattr(layer, kernel)[...]
        if isinstance(plain, jax.Array):
            setattr(layer, kernel, nnx.Param(scale * plain.astype(jnp.float32)))
            setattr(layer, bias, nnx.Param(scale * getattr(layer, bias)[...].astype(jnp.float32)))
            setattr(block, gamma, nnx.Param(jnp.ones_like(scale)))
    return textbook(block, *rest, **options)


# --- LayerNorm --------------------------------------------------------------------------------------------------------


def normalized_with_derivative(
    _: Callable[..., Any], x: Float[Array, "*dims d"], scale: Float[Array, " d"], bias: Float[Array, " d"], eps: float
) -> Float[Array, "*dims d"]:
    """`elementary.normalized`, of which nothing is kept but `x` and two numbers of each row. The derivative that JAX
    finds goes through the rows more often."""
    return _normalized(eps, x, scale, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalized(eps: float, x: Array, scale: Array, bias: Array) -> Array:
    return _normalized_forward(eps, x, scale, bias)[0]


def _normalized_forward(eps: float, x: Array, scale: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    exact = x.astype(jnp.float32)
    mean = exact.mean(axis=-1)
    rate = jax.lax.rsqrt(jnp.square(exact - mean[..., None]).mean(axis=-1) + eps)
    mean, rate = checkpoint_name(mean, KEPT), checkpoint_name(rate, KEPT)
    return (exact - mean[..., None]) * rate[..., None] * scale + bias, (x, mean, rate, scale, bias)


def _normalized_backward(eps: float, saved: tuple[Array, ...], upstream: Array) -> tuple[Array, Array, Array]:
    x, mean, rate, scale, bias = saved
    unit = (x.astype(jnp.float32) - mean[..., None]) * rate[..., None]
    above = tuple(range(x.ndim - 1))
    scaled = upstream * scale
    along, total = (scaled * unit).mean(axis=-1, keepdims=True), scaled.mean(axis=-1, keepdims=True)
    change = rate[..., None] * (scaled - total - unit * along)
    of_scale, of_bias = (upstream * unit).sum(axis=above), upstream.sum(axis=above)
    return change.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_normalized.defvjp(_normalized_forward, _normalized_backward)


# --- Products ---------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def laid(inputs: int, matrix: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
    """The matrix of a kernel with so many axes of inputs, row by row; its gradient as the product makes it.

    Parameters of several axes may lie otherwise. The compiler would then copy what the kernels of attention read and
    write, which has a row for every token, to suit the matrix or its gradient, which are small.
    """
    return with_layout_constraint(matrix, Layout((0, 1)))


def _laid_backward(inputs: int, _: None, gradient: Array) -> tuple[Array]:
    # Of several axes to one: attention's heads are those of the inputs.
    return (with_layout_constraint(gradient, Layout((1, 0) if inputs > 1 else (0, 1))),)


laid.defvjp(lambda inputs, matrix: (laid(inputs, matrix), None), _laid_backward)


@jax.custom_vjp
def plus(x: Float[Array, "b n d"], bias: Float[Array, " d"]) -> Float[Array, "b n d"]:
    """``x + bias``; in bfloat16 the bias's gradient is a product with ones, which is faster than a sum of rows.

    Of one row of ones, or of ones that it knows, the compiler would make that sum again.
    """
    return x + bias


def _plus_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return x + bias, None


def _plus_backward(_: None, upstream: Array) -> tuple[Array, Array]:
    if upstream.dtype != jnp.bfloat16:
        return upstream, upstream.sum(axis=(0, 1))
    ones = jax.lax.optimization_barrier(jnp.ones((SUBLANES, *upstream.shape[:2]), upstream.dtype))
    sums = jnp.einsum("rbn,bnd->rd", ones, upstream, preferred_element_type=jnp.float32)
    return upstream, sums[0].astype(upstream.dtype)


plus.defvjp(_plus_forward, _plus_backward)


def project_side_by_side(
    textbook: Callable[..., Array],
    x: Float[Array, "b n *inputs"],
    kernel: Float[Array, "*both"],
    bias: Float[Array, "*outputs"],
) -> Float[Array, "b n *outputs"]:
    """`elementary.project` with one axis of inputs and one of outputs: so the heads of a token lie side by side in
    memory, as the kernels of attention read and write them. For several axes the compiler puts tokens innermost.

    Where a mesh splits heads, queries, keys and values are three axes of parts, which no single axis can be.
    """
    inputs = x.ndim - 2
    if kernel.ndim == 2 or environment_choice(TPU_SWITCH, "rows", "xla") == "xla":
        return textbook(x, kernel, bias)
    if kernel.ndim > inputs + 1 and jax.sharding.get_abstract_mesh().shape.get(HEAD_AXIS, 1) > 1:
        return textbook(x, kernel, bias)
    width = prod(kernel.shape[:inputs])
    flat, matrix = x.reshape(*x.shape[:2], width), kernel.reshape(width, -1)
    made = plus(jnp.tensordot(flat, laid(inputs, matrix), 1, preferred_element_type=bias.dtype), bias.ravel())
    # Of one axis to several: queries, keys and values, which the way back of attention reads.
    return (made if bias.ndim == 1 else kept(made)).reshape(*x.shape[:2], *bias.shape)
