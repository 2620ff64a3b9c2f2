"""A kernel with low-rank factors, as a value that multiplies.

A model is built with an `AdaptedKernel` where it has the array of a kernel. It passes through `jax.jit`, `jax.lax.scan`
over stacked blocks, `jax.vmap` and `jax.checkpoint` as any pytree does, and the models' code is that of plain kernels:
`adaptable` decorates the products whose kernel may be one.

    LoRA (arXiv:2106.09685)   y = x W + s (x A) B
    DoRA (arXiv:2402.09353)   y = (m / n) (x W + s (x A) B),   n the norms of W + s A B, without a gradient

The biases are added as ever; DoRA does not scale them. ``x W`` is computed and rounded as without an adapter. The rest
is float32, and rounded once, with the sum: in bfloat16 a kernel would lose what a few steps of training change. Dropout
is of ``x`` in the added terms alone. Source: peft 0.21, `LoraLayer` and `DoraLinearVariant`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from operator import methodcaller
from types import EllipsisType
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

Product = Callable[[Array, Array, Array], Array]
"""``x @ kernel + bias`` over all axes of the inputs, in the dtype that the layer returns."""

# The products with factors are small, and take what the device has of float32.
_product = partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """What adapts a kernel, or one of the kernels that are stacked in it: float32.

    Attributes:
        a: [*inputs, rank].
        b: [rank, *outputs].
        magnitude: [*outputs], DoRA's m; None for LoRA.
        key: of dropout; None: nothing is dropped.
    """

    a: Float[Array, "*both"]
    b: Float[Array, "*both"]
    magnitude: Float[Array, "*outputs"] | None = None
    key: Key[Array, "*layers"] | None = None

    def delta(self, scale: float) -> Float[Array, "*both"]:
        """``s A B``, [*inputs, *outputs]."""
        return scale * _product(self.a, self.b, 1)

    def merged(self, kernel: Float[Array, "*both"], scale: float) -> Float[Array, "*both"]:
        """The kernel that multiplies as the kernel with these factors does, float32."""
        changed = kernel + self.delta(scale)
        return changed if self.magnitude is None else self.magnitude / norms(changed, self.a.ndim - 1) * changed


def norms(kernel: Float[Array, "*both"], inputs: int) -> Float[Array, "*outputs"]:
    """The norm of every output's weights; the first axes, so many, are those of the inputs."""
    return jnp.sqrt(jnp.square(kernel).sum(axis=tuple(range(inputs))))


class Multiplier(Protocol):
    """A value that a model has where it has the array of a kernel, and that multiplies itself."""

    def times(self, product: Product, x: Float[Array, "*axes"], bias: Float[Array, "*outputs"]) -> Array:
        """``x @ kernel + bias``, in the dtype that `product` of arrays returns."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedKernel(Multiplier):
    """A kernel with factors.

    Attributes:
        kernel: [*inputs, *outputs] or, of several parts, [*inputs, parts, *outputs], float32.
        parts: the factors of every part, None of parts that are not adapted; of a kernel without parts, one.
        scale: what the factors' product is multiplied by.
        dropout: rate of dropout, for factors that have a key.
        cast: the kernel in the dtype that `astype` was asked for.
    """

    kernel: Float[Array, "*both"]
    parts: tuple[Factors | None, ...]
    scale: float = field(metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})
    cast: Float[Array, "*both"] | None = None

    def __getitem__(self, index: EllipsisType) -> Self:
        """Itself: a variable's value is read by ``variable[...]``."""
        return self

    def astype(self, dtype: DTypeLike) -> Self:
        """The kernel that is multiplied in another dtype. Factors and norms stay float32."""
        return replace(self, cast=self.kernel.astype(dtype))

    def times(self, product: Product, x: Float[Array, "*axes"], bias: Float[Array, "*outputs"]) -> Array:
        """``x @ kernel + bias``, in the dtype that `product` returns."""
        kernel = self.kernel if self.cast is None else self.cast
        base = product(x, kernel, bias)
        if len(self.parts) == 1:
            return self._adapted(0, x, base, kernel, self.kernel, bias)
        inputs = next(factors.a.ndim - 1 for factors in self.parts if factors is not None)
        outputs = [
            self._adapted(i, x, *pieces)
            for i, pieces in enumerate(
                zip(
                    jnp.unstack(base, axis=x.ndim - inputs),
                    jnp.unstack(kernel, axis=inputs),
                    jnp.unstack(self.kernel, axis=inputs),
                    jnp.unstack(bias),
                    strict=True,
                )
            )
        ]
        return jnp.stack(outputs, axis=x.ndim - inputs)

    def _adapted(self, part: int, x: Array, base: Array, kernel: Array, wide: Array, bias: Array) -> Array:
        """One part of the outputs, with what its factors add."""
        factors = self.parts[part]
        if factors is None:
            return base
        # Computed again on the way back rather than kept: what is kept are `x` and `base`, as without an adapter.
        again = partial(jax.checkpoint, prevent_cse=False)
        magnitude = factors.magnitude
        if magnitude is None:
            added = again(lambda x, factors: self._low_rank(self._dropped(x, factors), factors))(x, factors)
            return (base + added).astype(base.dtype)

        def norm(factors: Factors) -> Array:
            return norms(wide + factors.delta(self.scale), factors.a.ndim - 1)

        def scaled(x: Array, base: Array, factors: Factors, magnitude: Array, norm: Array) -> Array:
            share = magnitude / norm
            dropped = self._dropped(x, factors)
            if dropped is x:
                plain = base.astype(jnp.float32) - bias
            else:
                plain = jnp.tensordot(dropped, kernel, factors.a.ndim - 1, preferred_element_type=jnp.float32)
            added = (share - 1.0) * plain + share * self._low_rank(dropped, factors)
            return (base + added).astype(base.dtype)

        constant = jax.lax.stop_gradient(again(norm)(jax.lax.stop_gradient(factors)))
        return again(scaled)(x, base, factors, magnitude, constant)

    def _low_rank(self, x: Array, factors: Factors) -> Array:
        inner = _product(x.astype(jnp.float32), factors.a, factors.a.ndim - 1)
        return self.scale * _product(inner, factors.b, 1)

    def _dropped(self, x: Array, factors: Factors) -> Array:
        if factors.key is None:
            return x
        keep = jax.random.bernoulli(factors.key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep, x.astype(jnp.float32) / (1.0 - self.dropout), 0.0).astype(x.dtype)


def casting(dtype: DTypeLike) -> Callable[[Any], Any]:
    """The function that casts an array, or the kernel of an `AdaptedKernel`."""
    return methodcaller("astype", dtype)


def adaptable(product: Product) -> Callable[[Array, Any, Array], Array]:
    """Decorates a product of a layer: its kernel may be a `Multiplier`."""

    @wraps(product)
    def multiplied(x: Array, kernel: Any, bias: Array) -> Array:
        return product(x, kernel, bias) if isinstance(kernel, jax.Array) else kernel.times(product, x, bias)

    return multiplied


class Linear(nnx.Linear):
    """`nnx.Linear` with bias, whose kernel may be an `AdaptedKernel`."""

    def __call__(self, inputs: Float[Array, "*axes"], out_sharding: Any = None) -> Float[Array, "*axes"]:
        kernel: Any = self.kernel[...]
        if not isinstance(kernel, AdaptedKernel):
            return super().__call__(inputs, out_sharding)
        assert self.bias is not None

        def product(x: Array, kernel: Array, bias: Array) -> Array:
            return jnp.dot(x, kernel, preferred_element_type=self.preferred_element_type) + bias

        cast = casting(inputs.dtype if self.dtype is None else self.dtype)
        return cast(kernel).times(product, cast(inputs), cast(self.bias[...]))
