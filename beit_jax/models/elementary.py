"""The elements of a block that have no formula of their own in BEiT: activations, LayerNorm, linear layers, dropout."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from beit_jax.adapters.kernel import Linear, adaptable
from beit_jax.kernels.cpu.calls import Packed, Stacked
from beit_jax.kernels.elements import for_accelerators, kept, normalized_with_derivative, project_side_by_side
from beit_jax.kernels.tpu import for_tpus
from beit_jax.models.one_cpu import (
    for_one_cpu,
    gelu_with_derivative,
    in_one_pass,
    of_two_matrices,
    project_by_matrices,
)


@for_one_cpu(gelu_with_derivative)
@for_accelerators(gelu_with_derivative)
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
"""The activation functions, by their names in configurations (`beit_jax.config.Activation`)."""


@adaptable
@of_two_matrices
@for_one_cpu(project_by_matrices)
@for_tpus(project_side_by_side)
def project(
    x: Float[Array, "b n *inputs"], kernel: Float[Array, "*both"], bias: Float[Array, "*outputs"]
) -> Float[Array, "b n *outputs"]:
    """``x @ kernel + bias`` over all axes of the inputs, in the dtype of `bias`; kernel: [*inputs, *outputs]. The heads
    stay an axis, by which devices share them out.
    """
    return jnp.tensordot(x, kernel, x.ndim - 2, preferred_element_type=bias.dtype) + bias


def expand(
    x: Float[Array, "b n d"], kernel: Any, bias: Float[Array, "wide"], activation: str
) -> Float[Array, "b n wide"]:
    """``activation(x @ kernel + bias)``; kernel: [d, wide], an `AdaptedKernel`, or one that stays where it lies,
    whose products may end in GELU."""
    if activation == "gelu" and isinstance(kernel, (Stacked, Packed)):
        return kernel.times(lambda x, kernel, bias: expand(x, kernel, bias, activation), x, bias, end="gelu")
    return ACTIVATIONS[activation](kept(project(x, kernel, bias)))


@runtime_checkable
class Widths(Protocol):
    """What the elements take of a `beit_jax.config.BeitConfig`, which this module need not import."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def embedding_size(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def initializer_range(self) -> float: ...


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm`, which TPUs and GPUs compute in a form of their own, and a CPU in another."""

    def __call__(
        self, x: Float[Array, "*dims d"], *, mask: Shaped[Array, "*dims d"] | None = None
    ) -> Float[Array, "*dims d"]:
        @in_one_pass
        @for_accelerators(normalized_with_derivative)
        def normalized(x: Any, scale: Any, bias: Any, eps: float) -> Any:
            return super(LayerNorm, self).__call__(x, mask=mask)

        assert self.scale is not None and self.bias is not None
        return normalized(x, self.scale[...], self.bias[...], self.epsilon)


def layer_norm(config: Widths, rngs: nnx.Rngs, width: int | None = None) -> LayerNorm:
    """LayerNorm over the hidden size or `width` in float32; the variance is the mean squared deviation, as in torch."""
    width, epsilon = width or config.hidden_size, config.layer_norm_eps
    return LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


def dense(
    config: Widths, inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs, result: DTypeLike | None = None
) -> nnx.Linear:
    """A linear layer that computes in `dtype` and returns the dtype `result` (by default `dtype`)."""
    normal = nnx.initializers.normal(config.initializer_range)
    return Linear(inputs, outputs, dtype=dtype, preferred_element_type=result, kernel_init=normal, rngs=rngs)


def bias_of(linear: nnx.Linear) -> Float[Array, "outputs"]:
    """The bias of a layer of `dense`, which all have."""
    assert linear.bias is not None
    return linear.bias[...]


def dropout(x: Array, rate: float | Array | None, key: Key[Array, ""] | None, *, per_sample: bool = False) -> Array:
    """Zeroes elements, or samples (stochastic depth, arXiv:1603.09382), with probability `rate`; scales the rest up.

    `x` has any shape; its first axis is the samples. `key` None means inference: nothing is dropped then, nor without a
    rate.
    """
    if key is None or rate is None or (isinstance(rate, float) and rate == 0.0):
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1) if per_sample else x.shape
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def drops(rate: float, key: Key[Array, ""] | None) -> bool:
    """Whether dropout with this rate and key drops anything."""
    return key is not None and rate > 0.0


def has_scores(dtype: DTypeLike, rate: float, key: Key[Array, ""] | None) -> bool:
    """Whether attention in this dtype, with such dropout of its weights, has scores that a way back may keep.

    The kernels of one CPU have none. They compute float32 without dropout.
    """
    return jnp.dtype(dtype) != jnp.float32 or drops(rate, key)


class EmbeddingHead(nnx.Module):
    """The embedding of an image: a linear map without bias, and its result divided by its Euclidean norm.

    Source: microsoft/unilm@768a3c8 beit3/modeling_finetune.py, `BEiT3ForRetrieval`; torch's `normalize` divides by
    1e-12 at least.
    """

    def __init__(self, config: Widths, *, dtype: DTypeLike, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(normal(rngs.params(), (config.hidden_size, config.embedding_size)))
        self.dtype = dtype

    def __call__(self, pooled: Float[Array, "b d"]) -> Float[Array, "b embedding"]:
        kernel = self.kernel[...].astype(self.dtype)
        found = jnp.dot(pooled.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return found / jnp.sqrt(jnp.maximum(jnp.square(found).sum(axis=-1, keepdims=True), 1e-24))
