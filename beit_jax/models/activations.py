"""Activation functions by their names in configurations."""

from collections.abc import Callable, Mapping
from functools import partial
from math import pi, sqrt

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from beit_jax.models.partition import on_one_cpu


def gelu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """``x * cdf(x)``, cdf the standard normal distribution's, by erf as torch does it (arXiv:1606.08415); JAX's own
    function defaults to tanh.

    One CPU has the derivative written out, which with what is computed again takes four passes through memory; left
    to itself, XLA makes six. Accelerators merge them.
    """
    return _gelu(x) if on_one_cpu() else jax.nn.gelu(x, approximate=False)


@jax.custom_jvp
def _gelu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    exact = x.astype(jnp.float32)
    return (exact * _cdf(exact)).astype(x.dtype)


@_gelu.defjvp
def _derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    exact = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * exact * exact) / sqrt(2 * pi)
    return _gelu(x), tangent * (_cdf(exact) + exact * density).astype(x.dtype)


def _cdf(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    return 0.5 + 0.5 * jax.lax.erf(x * sqrt(0.5))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
