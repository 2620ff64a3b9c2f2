"""Low-rank adapters of a model: which kernels have factors, what these are called and how they start, and their merger.

A projection of every block has a matrix A and a matrix B, with DoRA a vector m too, stacked over the blocks as the
kernels are. The factors of ``beit/blocks/mlp/fc1/kernel`` are ``beit/blocks/mlp/adapter/fc1/lora_a``, ``lora_b`` and
``magnitude``. Query, key and value, which are one kernel here, have factors each. Source: peft 0.21, `LoraConfig`.
"""

import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from beit_jax.adapters.kernel import AdaptedKernel, Factors, norms
from beit_jax.errors import BeitJaxError, printable
from beit_jax.tree import Nested, flatten, unflatten

A, B, MAGNITUDE = "lora_a", "lora_b", "magnitude"


@dataclass(frozen=True)
class Projection:
    """A linear map of a block.

    Attributes:
        kernel: its kernel, by its name within the block.
        inputs: axes of the kernel that are inputs.
        part: its place among the parts of the kernel; None where the kernel has no others.
    """

    kernel: str
    inputs: int = 1
    part: int | None = None


PROJECTIONS: Mapping[str, Projection] = {
    "q": Projection("attention/qkv_kernel", part=0),
    "k": Projection("attention/qkv_kernel", part=1),
    "v": Projection("attention/qkv_kernel", part=2),
    "out": Projection("attention/out_kernel", inputs=2),
    "fc1": Projection("mlp/fc1/kernel"),
    "fc2": Projection("mlp/fc2/kernel"),
}
"""What may be adapted."""

TOGETHER: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v")}
"""Short names of several projections."""

ALSO: Mapping[str, str] = {
    "norms": r"(.*/)?(norm1|norm2|norm|pooler_norm)/(scale|bias)",
    "positions": r"(.*/)?(shared_)?bias_table",
    "embeddings": r"(.*/)?embeddings/\w+",
}
"""What may be trained whole beside the factors and the head: names, and patterns of the parameters."""

_BLOCKS = r"((?:beit/)?blocks/)"
_HEAD = re.compile(r"(?!beit/).*")
_FACTOR = re.compile(rf"{_BLOCKS}(\w+)/adapter/(\w+)/({A}|{B}|{MAGNITUDE})")
FACTORS = rf".*/adapter/\w+/({A}|{B}|{MAGNITUDE})"
"""A pattern of the names of all factors."""


@dataclass(frozen=True)
class Adapter:
    """How a model is adapted.

    Attributes:
        targets: keys of `PROJECTIONS`, in their order.
        alpha: the product of the factors is scaled by ``alpha / rank``.
        rslora: scale by ``alpha / sqrt(rank)`` instead (arXiv:2312.03732).
        dropout: rate of dropout of what the factors are multiplied with.
        dora: learn the norms of the weights apart from their directions (arXiv:2402.09353).
        also: keys of `ALSO`.
    """

    rank: int
    targets: tuple[str, ...]
    alpha: float = 8.0
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    also: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    def learns_whole(self, name: str) -> bool:
        """True for a parameter that is trained itself: of the head, or of what is trained `also`."""
        return bool(_HEAD.fullmatch(name)) or any(re.fullmatch(ALSO[key], name) for key in self.also)


def targets_of(text: str, option: str = "--adapter.targets") -> tuple[str, ...]:
    """The projections that ``qkv,out`` names, in the order of `PROJECTIONS`.

    Raises:
        BeitJaxError: no such projection, or none.
    """
    return _named(text, {**{name: (name,) for name in PROJECTIONS}, **TOGETHER}, tuple(PROJECTIONS), option)


def also_of(text: str, option: str = "--adapter.train-also") -> tuple[str, ...]:
    """The keys of `ALSO` that ``norms,positions`` names.

    Raises:
        BeitJaxError: no such key.
    """
    return _named(text, {name: (name,) for name in ALSO}, tuple(ALSO), option)


def _named(text: str, known: Mapping[str, tuple[str, ...]], order: tuple[str, ...], option: str) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            expected = f"names among {', '.join(known)}, with commas between"
            raise BeitJaxError(f"{option}: expected {expected}, found {printable(word)}")
    found = {name for word in words for name in known[word]}
    return tuple(name for name in order if name in found)


# --- Names and shapes -------------------------------------------------------------------------------------------------


def kernels(names: Collection[str], targets: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """The adapted projections of a model: a target, the flat name of its kernel, and what precedes its factors' names.

    Args:
        names: flat names of the model's parameters.
    """
    for target in targets:
        kernel = PROJECTIONS[target].kernel
        for name in sorted(names):
            if match := re.fullmatch(_BLOCKS + re.escape(kernel), name):
                yield target, name, f"{match[1]}{kernel.partition('/')[0]}/adapter/{target}"


def factor_shapes(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of every factor by its flat name.

    Args:
        shapes: of the model's parameters.
    """
    result: dict[str, tuple[int, ...]] = {}
    for target, kernel, prefix in kernels(shapes, adapter.targets):
        layers, inputs, outputs = _axes(target, shapes[kernel])
        result[f"{prefix}/{A}"] = (layers, *inputs, adapter.rank)
        result[f"{prefix}/{B}"] = (layers, adapter.rank, *outputs)
        if adapter.dora:
            result[f"{prefix}/{MAGNITUDE}"] = (layers, *outputs)
    return result


def _axes(target: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Layers, inputs and outputs of a projection, from the shape of its stacked kernel."""
    projection = PROJECTIONS[target]
    after = 1 + projection.inputs
    return shape[0], shape[1:after], shape[after + (projection.part is not None) :]


def without_factors(params: Nested) -> tuple[Nested, dict[str, Any]]:
    """The parameters that are no factors, nested, and the factors by their flat names."""
    flat = flatten(params)
    factors = {name: leaf for name, leaf in flat.items() if _FACTOR.fullmatch(name)}
    return unflatten({name: leaf for name, leaf in flat.items() if name not in factors}), factors


# --- Values -----------------------------------------------------------------------------------------------------------


def initial_factors(adapter: Adapter, params: Nested, key: Key[Array, ""]) -> dict[str, Array]:
    """The factors with which training starts: they change nothing. By flat name, float32; traceable.

    A is uniform within ``1 / sqrt(inputs)``, whatever the rank: torch's kaiming_uniform_ of a = sqrt(5). B is zero, and
    m the norms of the weights. A factor depends on `key` and its own name only.

    Args:
        params: of the model, nested: arrays or, under `jax.eval_shape`, their shapes.
    """
    flat = flatten(params)
    shapes = factor_shapes(adapter, {name: leaf.shape for name, leaf in flat.items()})
    result: dict[str, Array] = {}
    for target, kernel, prefix in kernels(flat, adapter.targets):
        name = f"{prefix}/{A}"
        bound = 1.0 / sqrt(prod(shapes[name][1:-1]))
        own = jax.random.fold_in(key, zlib.crc32(name.removeprefix("beit/").encode()))
        result[name] = jax.random.uniform(own, shapes[name], jnp.float32, -bound, bound)
        result[f"{prefix}/{B}"] = jnp.zeros(shapes[f"{prefix}/{B}"], jnp.float32)
        if adapter.dora:
            inputs, part = PROJECTIONS[target].inputs, _part(target, flat[kernel])
            result[f"{prefix}/{MAGNITUDE}"] = jax.vmap(lambda one, axes=inputs: norms(one, axes))(part)
    return result


def _part(target: str, kernel: Array) -> Array:
    """A projection's own kernel, [layers, *inputs, *outputs]."""
    projection = PROJECTIONS[target]
    return kernel if projection.part is None else jnp.take(kernel, projection.part, axis=1 + projection.inputs)


def adapted(adapter: Adapter, params: Nested, key: Key[Array, ""] | None = None) -> Nested:
    """What a model is built with to multiply with its factors: kernels that have some become an `AdaptedKernel`.

    Args:
        params: the model's parameters and the factors, nested.
        key: of dropout; None: nothing is dropped.
    """
    base, factors = without_factors(params)
    flat, keyed = flatten(base), key if adapter.dropout else None
    for name, parts in _factors(adapter, flat, factors, keyed).items():
        flat[name] = AdaptedKernel(flat[name], parts, adapter.scale, adapter.dropout)
    return unflatten(flat)


def merged(adapter: Adapter, params: Nested) -> Nested:
    """The parameters, float32, of the plain model that computes what the adapted one does.

    ``W + s A B``, with DoRA ``(m / n) (W + s A B)``: one rounding, as peft's `merge_and_unload`.
    """

    def merge(kernel: Array, factors: Factors) -> Array:
        return factors.merged(kernel, adapter.scale)

    base, factors = without_factors(params)
    flat = flatten(base)
    for name, parts in _factors(adapter, flat, factors, None).items():
        axis = 1 + next(projection.inputs for projection in PROJECTIONS.values() if name.endswith(projection.kernel))
        pieces = jnp.unstack(flat[name], axis=axis) if len(parts) > 1 else (flat[name],)
        both = zip(pieces, parts, strict=True)
        changed = [piece if part is None else jax.vmap(merge)(piece, part) for piece, part in both]
        flat[name] = jnp.stack(changed, axis=axis) if len(parts) > 1 else changed[0]
    return unflatten(flat)


def _factors(
    adapter: Adapter, flat: Mapping[str, Any], factors: Mapping[str, Any], key: Key[Array, ""] | None
) -> dict[str, tuple[Factors | None, ...]]:
    """The factors of every adapted kernel by its flat name, in the order of the kernel's parts."""
    result: dict[str, tuple[Factors | None, ...]] = {}
    for place, (target, kernel, prefix) in enumerate(kernels(flat, adapter.targets)):
        part = PROJECTIONS[target].part
        own = Factors(factors[f"{prefix}/{A}"], factors[f"{prefix}/{B}"], factors.get(f"{prefix}/{MAGNITUDE}"))
        if key is not None:  # every projection of every block drops for itself
            own = replace(own, key=jax.random.split(jax.random.fold_in(key, place), len(own.a)))
        if part is None:
            result[kernel] = (own,)
            continue
        parts = list(result.get(kernel, (None,) * flat[kernel].shape[1 + PROJECTIONS[target].inputs]))
        parts[part] = own
        result[kernel] = tuple(parts)
    return result
