"""The activation functions, by their names in configurations (`beit_jax.config.Activation`)."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
from jaxtyping import Array, Float

from beit_jax.models.one_cpu import for_one_cpu, gelu_with_derivative


@for_one_cpu(gelu_with_derivative)
def gelu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """``x * cdf(x)``, with cdf the distribution function of the standard normal distribution (arXiv:1606.08415).

    The cdf is exact, by erf, as in torch; JAX's own default approximates it by tanh.
    """
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
