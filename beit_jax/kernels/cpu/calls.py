"""Functions of JAX that one CPU computes by the kernels: primitives, with all that JAX asks of one.

A primitive has a plain form, of XLA's operations. That is computed where the kernels are not: on other devices, for
several devices, under `jax.vmap`, and in a program that is exported, which another machine will run. Derivatives of
products are products; all others have a primitive for the way back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from math import pi, prod, sqrt
from operator import itemgetter
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

if TYPE_CHECKING:
    from jax.extend.core import Primitive

SMALLEST = 192
"""The width of products from which the kernels are computed: for less, none is compiled."""

SMALLEST_OFTEN = 64
"""That width in a program that runs thousands of times, see `computed_often`."""

WIDEST_HEAD = 768
"""The width of a head up to which the kernel computes attention: a query's numbers are one stretch of its products."""

Product = Callable[[Array, Array, Array], Array]
"""``x @ kernel + bias``, see `beit_jax.adapters.kernel.Product`."""


@dataclass(frozen=True)
class Offer:
    """What a library of kernels says of itself, see `library`.

    Attributes:
        available: whether functions are computed by the kernels.
        may_be_exported: whether a program that is exported may call them.
        target: what XLA calls a function, by its name.
        columns: how many columns a panel of a packed kernel has.
    """

    available: Callable[[], bool]
    may_be_exported: Callable[[], bool]
    target: Callable[[str], str]
    columns: Callable[[], int]


_OFFERED: list[Offer] = []
_OFTEN: ContextVar[bool] = ContextVar("often", default=False)


@contextmanager
def computed_often() -> Iterator[None]:
    """A step of training, traced within, runs so often that compiling for longer is worth it: kernels for small models
    too, and loops over blocks written out (`beit_jax.models.one_cpu.unrolls`)."""
    before = _OFTEN.set(True)
    try:
        yield
    finally:
        _OFTEN.reset(before)


def is_computed_often() -> bool:
    """Whether what is traced is within `computed_often`."""
    return _OFTEN.get()


def offer(kernels: Offer) -> None:
    """Computes by these kernels from now on. Programs for accelerators need none, and look for no compiler."""
    _OFFERED[:] = [kernels]


def computes(*arrays: Array | np.ndarray, widths: Sequence[Any] = ()) -> bool:
    """Whether the kernels can compute these arrays: float32 of known shape, of products so wide."""
    sizes = [size for array in arrays for size in array.shape] + list(widths)
    if any(export.is_symbolic_dim(size) or size == 0 for size in sizes):
        return False
    smallest = min(SMALLEST, SMALLEST_OFTEN) if is_computed_often() else SMALLEST
    fits = all(array.dtype == jnp.float32 for array in arrays) and all(width >= smallest for width in widths)
    return fits and _parts() is not None and any(kernels.available() for kernels in _OFFERED)


@lru_cache
def _parts() -> Any:
    """What primitives are made of, of which JAX promises nothing; None where it has them no more: XLA's forms remain.

    JAX's public calls of foreign functions would be in exported programs too, which another machine runs.
    """
    try:
        from jax.extend.core import Primitive
        from jax.interpreters import ad, batching, mlir
    except ImportError:
        return None
    return Primitive, ad, batching, mlir


@lru_cache
def _primitive(
    call: str,
    plain: Callable[..., Any],
    read: Callable[[Sequence[Any]], Sequence[Any]] | None = tuple,
    several: bool = False,
    in_place: int = 0,
) -> "Primitive":
    """A primitive whose results have the shapes and the dtypes of its plain form's.

    Args:
        call: the function of the library. What the plain form takes by name are its attributes.
        read: which of the arguments the function reads; None: the library has none.
        several: whether it has several results, in a tuple.
        in_place: how many results the function writes where the arguments of the same numbers lie.
    """
    make, ad, batching, mlir = _parts()
    primitive: Primitive = make(f"beit_{call}")
    primitive.multiple_results = several

    @lru_cache
    def compiled(names: tuple[str, ...], values: tuple[Any, ...]) -> Callable[..., Array]:
        return jax.jit(partial(primitive.bind, **dict(zip(names, values, strict=True))))

    def alone(*arguments: Any, **options: Any) -> Any:
        with jax.disable_jit(False):  # it has no other form than the compiled one
            return compiled(tuple(options), tuple(options.values()))(*arguments)

    def kernel(context: Any, *operands: Any, **options: Any) -> Any:
        assert read is not None
        module = context.module_context
        devices = getattr(module.axis_context, "num_devices", 1) or 1
        exported = module.lowering_parameters.for_export
        for kernels in _OFFERED:
            if devices == 1 and kernels.available() and (kernels.may_be_exported() or not exported):
                narrowed = context.replace(avals_in=read(context.avals_in))
                lowering = jax.ffi.ffi_lowering(
                    kernels.target(call), operand_output_aliases={i: i for i in range(in_place)}
                )
                return lowering(narrowed, *read(operands), **options)
        return lowered(context, *operands, **options)

    def shape(*arguments: Any, **options: Any) -> Any:
        found = jax.eval_shape(
            partial(plain, **options), *(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in arguments)
        )
        return jax.tree.map(lambda one: jax.core.ShapedArray(one.shape, one.dtype), found)

    def batched(arguments: Any, axes: Any, **options: Any) -> Any:
        found = jax.vmap(partial(plain, **options), axes)(*arguments)
        return found, jax.tree.map(lambda _: 0, found)

    def derivative(primals: Any, tangents: Any, **options: Any) -> Any:
        given = [ad.instantiate_zeros(tangent) for tangent in tangents]
        return jax.jvp(partial(plain, **options), tuple(primals), tuple(given))

    lowered = mlir.lower_fun(plain, multiple_results=several)
    primitive.def_impl(alone)
    primitive.def_abstract_eval(shape)
    mlir.register_lowering(primitive, lowered)
    if read is not None:
        mlir.register_lowering(primitive, kernel, platform="cpu")
    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = derivative
    return primitive


@lru_cache
def _with_way_back(
    call: str,
    plain: Callable[..., Array],
    read: Callable[[Sequence[Any]], Sequence[Any]] = tuple,
    read_back: Callable[[Sequence[Any]], Sequence[Any]] = tuple,
    inputs: int = 1,
) -> "Primitive":
    """A primitive whose gradients the library computes, by the function of the same name and ``_back``.

    That takes the arguments, and then the gradient of the result. It returns gradients of the first arguments, so many
    as `inputs` at most; the others have none.

    Args:
        read_back: which of the arguments of the way back the function reads.
    """
    _, ad, _, _ = _parts()

    def plain_change(*arguments: Array, of: tuple[int, ...], **options: Any) -> Array:
        primals, changes = arguments[: -len(of)], arguments[-len(of) :]

        def result(*changed: Array) -> Array:
            given = dict(zip(of, changed, strict=True))
            return plain(*(given.get(i, one) for i, one in enumerate(primals)), **options)

        return jax.jvp(result, [primals[i] for i in of], list(changes))[1]

    def plain_back(*arguments: Array, **options: Any) -> tuple[Array, ...]:
        *primals, gradient = arguments
        return jax.vjp(lambda *given: plain(*given, *primals[inputs:], **options), *primals[:inputs])[1](gradient)

    primitive = _primitive(call, plain, read)
    change = _primitive(f"{call}_change", plain_change, None)
    back = _primitive(f"{call}_back", plain_back, read_back, several=True)

    def derivative(primals: Any, tangents: Any, **options: Any) -> Any:
        value = primitive.bind(*primals, **options)
        changes = {i: one for i, one in enumerate(tangents[:inputs]) if not isinstance(one, ad.Zero)}
        if not changes:  # of arguments that have no gradients
            return value, jnp.zeros_like(value)
        return value, change.bind(*primals, *changes.values(), of=tuple(changes), **options)

    def transposed(cotangent: Any, *arguments: Any, of: tuple[int, ...], **options: Any) -> Any:
        if isinstance(cotangent, ad.Zero):
            return [None] * len(arguments)
        primals = arguments[: -len(of)]
        found = back.bind(*primals, cotangent, **options)
        return [*(None for _ in primals), *(found[i] for i in of)]

    ad.primitive_jvps[primitive] = derivative
    ad.primitive_transposes[change] = transposed
    return primitive


# --- GELU -------------------------------------------------------------------------------------------------------------


@jax.custom_jvp
def gelu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """``x * cdf(x)``, with the derivative written out: four passes through memory instead of six."""
    exact = x.astype(jnp.float32)
    return (exact * _cdf(exact)).astype(x.dtype)


@gelu.defjvp
def _gelu_derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    exact = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * exact * exact) / sqrt(2 * pi)
    return gelu(x), tangent * (_cdf(exact) + exact * density).astype(x.dtype)


def _cdf(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The distribution function of the standard normal distribution."""
    return 0.5 + 0.5 * jax.lax.erf(x * sqrt(0.5))


def gelu_by_kernel(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """`gelu` in one pass through memory, and its gradient in another."""
    return _with_way_back("gelu", gelu).bind(x)


# --- Products ---------------------------------------------------------------------------------------------------------


def _plain_affine(rows: Array, matrix: Array, *more: Array, end: str) -> Array:
    *layer, bias = more
    if layer:
        number, *own = layer
        matrix = own[0] if own else jax.lax.dynamic_index_in_dim(matrix, number, keepdims=False)
    if matrix.ndim == 3:
        matrix = _unpacked(matrix, len(bias))
    value = jnp.dot(rows, matrix) + bias
    return gelu(value) if end == "gelu" else value


def affine(
    rows: Float[Array, "m k"], matrix: Float[Array, "*axes"], *more: Array, end: str = "bias"
) -> Float[Array, "m n"]:
    """``rows @ matrix + bias``.

    Args:
        matrix: one [k, n]; those of several layers [layers, k, n]; or these packed, [layers, panels, k, columns].
        more: the number of the layer, an int32, where they are several; then, to have gradients, the layer's own matrix
            or its own panels, which the kernel does not read; then the bias, [n].
        end: "gelu" for GELU of it.
    """
    return _affine().bind(rows, matrix, *more, end=end)


@lru_cache
def _affine() -> "Primitive":
    _, ad, _, _ = _parts()
    primitive = _primitive("affine", _plain_affine, _without_own_matrix)
    of_plain_form = ad.primitive_jvps[primitive]

    def derivative(primals: Any, tangents: Any, *, end: str) -> Any:
        if len(primals) == 4 or primals[1].ndim == 4:  # without a matrix of its own, or packed: for forward passes
            return of_plain_form(primals, tangents, end=end)
        if end == "gelu":
            made, change = derivative(primals, tangents, end="bias")
            return jax.jvp(gelu_by_kernel, (made,), (change,))
        value = affine(*primals)
        rows, *matrices, _ = primals
        several = len(matrices) > 1
        terms: tuple[Callable[[Array], Array], ...] = (
            lambda rows: _product_with_layer(rows, *matrices) if several else product(rows, matrices[0]),
            lambda matrix: product(rows, matrix),
            lambda bias: jnp.broadcast_to(bias, value.shape),
        )
        of = (tangents[0], *tangents[-2:])
        changes = [term(one) for term, one in zip(terms, of, strict=True) if not isinstance(one, ad.Zero)]
        return value, sum(changes[1:], changes[0])

    ad.primitive_jvps[primitive] = derivative
    return primitive


def _without_own_matrix(operands: Sequence[Any]) -> tuple[Any, ...]:
    return (*operands[:3], operands[4]) if len(operands) > 4 else tuple(operands)


def _plain_product(a: Array, b: Array, turn_a: bool, turn_b: bool) -> Array:
    return jnp.dot(a.T if turn_a else a, b.T if turn_b else b)


def product(
    a: Float[Array, "*a"], b: Float[Array, "*b"], turn_a: bool = False, turn_b: bool = False
) -> Float[Array, "m n"]:
    """``a @ b``; of a matrix that is turned, the transpose. Its derivatives are products too.

    Args:
        a: [m, k], or [k, m] to be turned.
        b: [k, n], or [n, k] to be turned.
    """
    return _product().bind(a, b, turn_a=turn_a, turn_b=turn_b)


@lru_cache
def _product() -> "Primitive":
    _, ad, _, _ = _parts()
    primitive = _primitive("product", _plain_product)

    def of_a(cotangent: Array, a: Any, b: Array, *, turn_a: bool, turn_b: bool) -> Array:
        return product(b, cotangent, turn_b, True) if turn_a else product(cotangent, b, False, not turn_b)

    def of_b(cotangent: Array, a: Array, b: Any, *, turn_a: bool, turn_b: bool) -> Array:
        return product(cotangent, a, True, turn_a) if turn_b else product(a, cotangent, not turn_a, False)

    ad.defbilinear(primitive, of_a, of_b)
    return primitive


def _plain_product_with_layer(
    a: Array, _matrices: Array, _number: Array, own: Array, turn_a: bool, turn_b: bool
) -> Array:
    return _plain_product(a, own, turn_a, turn_b)


def _product_with_layer(
    a: Float[Array, "m _"],
    matrices: Float[Array, "layers k n"],
    number: Int[Array, ""],
    own: Float[Array, "k n"],
    turn_b: bool = False,
) -> Float[Array, "m _"]:
    """`product` with the matrix of a layer, whose gradient is that of its `own`, which the kernel does not read."""
    return _layer_product().bind(a, matrices, number, own, turn_a=False, turn_b=turn_b)


@lru_cache
def _layer_product() -> "Primitive":
    _, ad, _, _ = _parts()
    primitive = _primitive("product", _plain_product_with_layer, itemgetter(slice(3)))

    def derivative(primals: Any, tangents: Any, *, turn_a: bool, turn_b: bool) -> Any:
        (a, matrices, number, own), (of_a, *_, of_own) = primals, tangents
        terms: tuple[Callable[[Array], Array], ...] = (
            lambda one: _product_with_layer(one, matrices, number, own, turn_b),
            lambda one: product(a, one, turn_a, turn_b),
        )
        changes = [term(one) for term, one in zip(terms, (of_a, of_own), strict=True) if not isinstance(one, ad.Zero)]
        return _product_with_layer(a, matrices, number, own, turn_b), sum(changes[1:], changes[0])

    def transposed(
        cotangent: Array, _: Any, matrices: Array, number: Array, own: Array, *, turn_a: bool, turn_b: bool
    ) -> Any:
        return _product_with_layer(cotangent, matrices, number, own, not turn_b), None, None, None

    ad.primitive_jvps[primitive] = derivative
    ad.primitive_transposes[primitive] = transposed
    return primitive


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacked:
    """The kernel of one of several layers, which stays where it lies: a slice of them all would be a copy.

    It is a `beit_jax.adapters.kernel.Multiplier`.

    Attributes:
        kernels: [layers, *inputs, *outputs].
        number: of the layer.
        own: the kernel again, if it has a gradient: it is what plain forms read, and no kernel of the processor.
    """

    kernels: Float[Array, "layers *both"]
    number: Int[Array, ""]
    own: Float[Array, "*both"] | None = None

    def __getitem__(self, index: EllipsisType) -> Self:
        """Itself: a variable's value is read by ``variable[...]``."""
        return self

    def astype(self, dtype: DTypeLike) -> Any:
        """Itself in its own dtype; an array in another."""
        return self if jnp.dtype(dtype) == self.kernels.dtype else self.sliced().astype(dtype)

    @property
    def owned(self) -> tuple[Float[Array, "*both"], ...]:
        """What has the kernel's gradient, as `affine` takes it: nothing where there is none."""
        return () if self.own is None else (self.own,)

    def sliced(self) -> Float[Array, "*both"]:
        """The kernel as an array."""
        if self.own is not None:
            return self.own
        return jax.lax.dynamic_index_in_dim(self.kernels, self.number, keepdims=False)

    def times(
        self, product: Product, x: Float[Array, "b n *inputs"], bias: Float[Array, "*outputs"], end: str = "bias"
    ) -> Array:
        """``x @ kernel + bias``, and GELU of it for the `end` "gelu"; `product` of the slice where none computes it."""
        width = prod(x.shape[2:])
        rows, matrices = x.reshape(-1, width), self.kernels.reshape(len(self.kernels), width, -1)
        if not computes(rows, matrices, bias, widths=matrices.shape[1:]):
            return product(x, self.sliced(), bias)
        own = (one.reshape(matrices.shape[1:]) for one in self.owned)
        return affine(rows, matrices, self.number, *own, bias.ravel(), end=end).reshape(*x.shape[:2], *bias.shape)


def _plain_packing(matrices: Array, columns: int) -> Array:
    layers, k, n = matrices.shape
    padded = jnp.pad(matrices, [(0, 0), (0, 0), (0, -n % columns)])
    return jnp.swapaxes(padded.reshape(layers, k, -1, columns), 1, 2)


@partial(jax.jit, static_argnums=(1, 2))
def _packing(kernels: Float[Array, "layers *both"], k: int, columns: int) -> Float[Array, "layers panels k columns"]:
    matrices = kernels.reshape(len(kernels), k, -1)  # compiled, it is no copy
    return _primitive("packing", _plain_packing).bind(matrices, columns=columns)


def _unpacked(panels: Float[Array, "*layers panels k columns"], n: int) -> Float[Array, "*layers k n"]:
    rows = jnp.swapaxes(panels, -3, -2)
    return rows.reshape(*rows.shape[:-2], -1)[..., :n]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """The kernels of several layers as products of this processor read them: panels of columns, one behind the other.

    It is a `beit_jax.adapters.kernel.Multiplier`.

    Attributes:
        panels: [layers, panels, k, columns], the last ones filled up with zeros; of one layer within a loop over them.
        inputs, outputs: the axes of one kernel, whose sizes multiply to k and to the number of columns.
    """

    panels: Float[Array, "*layers panels k columns"] | Stacked
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, kernels: Float[Array, "layers *both"], inputs: int) -> "Packed | Array":
        """The kernels, packed; themselves where products of this processor have no kernels to read them.

        Args:
            inputs: how many of their axes are inputs.
        """
        ins, outs = kernels.shape[1 : 1 + inputs], kernels.shape[1 + inputs :]
        if not computes(kernels, widths=(prod(ins), prod(outs))):
            return kernels
        return cls(_packing(kernels, prod(ins), _OFFERED[0].columns()), ins, outs)

    def __getitem__(self, index: EllipsisType) -> Self:
        """Itself: a variable's value is read by ``variable[...]``."""
        return self

    def astype(self, dtype: DTypeLike) -> Any:
        """Itself in float32; an array in another dtype."""
        return self if jnp.dtype(dtype) == jnp.float32 else self.unpacked().astype(dtype)

    def unpacked(self) -> Float[Array, "*layers_and_both"]:
        """The kernels as an array."""
        panels = self.panels.sliced() if isinstance(self.panels, Stacked) else self.panels
        return _unpacked(panels, prod(self.outputs)).reshape(*panels.shape[:-3], *self.inputs, *self.outputs)

    def times(
        self, product: Product, x: Float[Array, "b n *inputs"], bias: Float[Array, "*outputs"], end: str = "bias"
    ) -> Array:
        """``x @ kernel + bias`` of one layer, as `Stacked.times`."""
        rows, panels = x.reshape(-1, prod(self.inputs)), self.panels
        several = panels if isinstance(panels, Stacked) else Stacked(panels[None], jnp.int32(0))
        if not computes(rows, several.kernels, bias, widths=(prod(self.inputs), prod(self.outputs))):
            return product(x, self.unpacked(), bias)
        layer = several.kernels, several.number, *several.owned
        return affine(rows, *layer, bias.ravel(), end=end).reshape(*x.shape[:2], *bias.shape)


# --- Stacks of layers -------------------------------------------------------------------------------------------------


def _plain_unstacked(stack: Array) -> list[Array]:
    return [row[0] for row in jax.lax.split(stack, [1] * len(stack))]


def _plain_stacked(*rows: Array) -> Array:
    return jnp.stack(rows)


def unstacked(stack: Shaped[Array, "rows *dims"]) -> Sequence[Shaped[Array, "*dims"]]:
    """The rows along the first axis. The kernel stacks their gradients by all threads, XLA by one."""
    if not computes(stack):
        return _plain_unstacked(stack)
    rows: Sequence[Array] = _unstacked().bind(stack)
    return rows


@lru_cache
def _unstacked() -> "Primitive":
    _, ad, _, _ = _parts()
    primitive = _primitive("unstacked", _plain_unstacked, None, several=True)
    back = _primitive("stacked", _plain_stacked)

    def derivative(primals: Any, tangents: Any) -> Any:
        return primitive.bind(*primals), primitive.bind(*map(ad.instantiate_zeros, tangents))

    def transposed(cotangents: Sequence[Any], _: Any) -> Any:
        return [back.bind(*map(ad.instantiate_zeros, cotangents))]

    ad.primitive_jvps[primitive] = derivative
    ad.primitive_transposes[primitive] = transposed
    return primitive


# --- LayerNorm --------------------------------------------------------------------------------------------------------


def _plain_normalized(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    deviation = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(deviation).mean(axis=-1, keepdims=True)
    return deviation * (jax.lax.rsqrt(variance + epsilon) * scale) + bias


def normalized(
    x: Float[Array, "rows d"], scale: Float[Array, "d"], bias: Float[Array, "d"], epsilon: float
) -> Float[Array, "rows d"]:
    """LayerNorm of every row, by the mean squared deviation."""
    primitive = _with_way_back("normalized", _plain_normalized, tuple, _without_bias, inputs=3)
    return primitive.bind(x, scale, bias, epsilon=float(epsilon))


def _without_bias(operands: Sequence[Any]) -> tuple[Any, ...]:
    x, scale, _, gradient = operands
    return x, scale, gradient


# --- Attention --------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PositionBias:
    """The bias that positions add to the scores of attention, once for every shard of the batch.

    Programs compute what they read: forms of attention that read the tables have the bias never written.

    Attributes:
        written: for every query and key.
        tables: what it was made of.
        grid: of the tables.
    """

    written: Float[Array, "shards heads n n"]
    tables: Float[Array, "shards m heads"]
    grid: tuple[int, int] = field(metadata={"static": True})

    def __add__(self, other: "PositionBias") -> "PositionBias":
        """The sum of two, of the same grid."""
        return PositionBias(self.written + other.written, self.tables + other.tables, self.grid)


def of_written_bias(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates forms of `beit_jax.models.attention.attend` that read a bias which is written out, and no tables."""

    @wraps(attend)
    def chosen(qkv: Array, bias: PositionBias | Array | None, *rest: Any, **options: Any) -> Any:
        return attend(qkv, bias.written if isinstance(bias, PositionBias) else bias, *rest, **options)

    return chosen


def _plain_attention(qkv: Array, bias: Array | None = None, *_tables: Array) -> Array:
    query, key, value = jnp.unstack(jnp.moveaxis(qkv, 3, 1), axis=3)
    scores = jnp.einsum("bhqe,bhke->bhqk", query * query.shape[-1] ** -0.5, key)
    weights = jax.nn.softmax(scores if bias is None else scores + bias)
    return jnp.einsum("bhqk,bhke->bqhe", weights, value)


def attention(qkv: Float[Array, "b n 3 heads e"], bias: PositionBias | None = None) -> Float[Array, "b n heads e"]:
    """``softmax(query @ key / sqrt(e) + bias) @ value`` of every head.

    The kernel reads the table of a bias, and the bias is not written out; derivatives are those of the written one.

    Args:
        bias: of one shard, for a class token and a grid of patches, see `beit_jax.models.attention.position_bias`.
    """
    if bias is None:
        return _attention().bind(qkv)
    (rows, columns), table = bias.grid, bias.tables[0]
    offsets = table[:-3].reshape(2 * rows - 1, 2 * columns - 1, -1)
    return _attention().bind(qkv, bias.written[0], offsets, table[-3:])


def _attention() -> "Primitive":
    return _with_way_back("attention", _plain_attention, _without_written_bias, _without_written_bias, inputs=2)


def _without_written_bias(operands: Sequence[Any]) -> tuple[Any, ...]:
    return (operands[0], *operands[2:]) if len(operands) > 2 else tuple(operands)


# --- AdamW ------------------------------------------------------------------------------------------------------------

SMALLEST_STEP = 2**14
"""How many numbers a parameter has from which the kernel moves it."""


def _plain_adamw(
    parameter: Array, mean: Array, square: Array, gradient: Array, rates: Array, numbers: Array,
    beta1: float, beta2: float, epsilon: float, decay: float,
) -> list[Array]:  # fmt: skip
    share, first, second, moves = numbers
    change = gradient * share
    new_mean = (1 - beta1) * change + beta1 * mean
    new_square = (1 - beta2) * jnp.square(change) + beta2 * square
    update = new_mean / first / (jnp.sqrt(new_square) / second + epsilon) + decay * parameter
    new, old = (parameter - rates * update, new_mean, new_square), (parameter, mean, square)
    return [jnp.where(moves > 0, *pair) for pair in zip(new, old, strict=True)]


def adamw(
    parameter: Float[Array, "*dims"],
    mean: Float[Array, "*dims"],
    square: Float[Array, "*dims"],
    gradient: Float[Array, "*dims"],
    rates: Float[Array, "..."],
    numbers: Float[Array, "4"],
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
) -> list[Array]:
    """A parameter and the moments of its gradient after a step of AdamW (arXiv:1711.05101).

    The kernel goes through memory once, and writes them where they were.

    Args:
        rates: learning rates: one, or of every row along the first axis, broadcastable to the parameter.
        numbers: what the gradient is multiplied by; the correction of the mean, and the root of that of the squares;
            and 1, or 0 for a step that changes nothing, not by a bit.
        decay: what the parameter is multiplied by and loses at its rate.
    """
    arrays = (parameter, mean, square, gradient, rates, numbers)
    if parameter.size < SMALLEST_STEP or not computes(*arrays):
        return _plain_adamw(*arrays, beta1, beta2, epsilon, decay)
    constants = {"beta1": beta1, "beta2": beta2, "epsilon": epsilon, "decay": decay}
    exact = {name: float(value) for name, value in constants.items()}  # the kernel takes no other numbers
    found: list[Array] = _primitive("adamw", _plain_adamw, several=True, in_place=3).bind(*arrays, **exact)
    return found


# --- What a way back keeps --------------------------------------------------------------------------------------------


def is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether what this primitive computes is kept for the way back: a policy of `jax.checkpoint`."""
    return primitive.name in ("beit_affine", "beit_attention")
