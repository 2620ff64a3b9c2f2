"""The forms that one CPU computes faster, and the one condition under which they are computed.

The other modules hold the textbook form of each function, and name its one-CPU form where they define it:

    @for_one_cpu(gelu_with_derivative)
    def gelu(x): ...

Both forms have the same values and gradients up to rounding (tests/models/test_one_cpu.py). A one-CPU form takes the
textbook form first, to apply it to pieces, and then the arguments of the textbook form.

What counts is the device that a program is compiled for, not the machine that traces it. A mesh names its devices.
Without one, both forms are traced, and the compiler is given one of them (`jax.lax.platform_dependent`): so
``jax.export(..., platforms=("tpu",))`` on a CPU contains the textbook forms alone.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from math import isqrt, prod
from typing import Any, Concatenate, ParamSpec, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float

from beit_jax.adapters.kernel import AdaptedKernel
from beit_jax.kernels.cpu import calls
from beit_jax.kernels.cpu.calls import PositionBias

P = ParamSpec("P")
R = TypeVar("R")

CACHE = 16 * 2**20
"""Bytes of attention scores up to which one CPU computes them all at once: about as much as its caches hold."""

_SAID: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Functions traced within are traced for a platform ("cpu", "tpu", "cuda"), whatever they are compiled for later.

    For programs that are traced and never compiled. A function under `jax.jit` must be new: JAX keeps its first trace.
    """
    before = _SAID.set(platform)
    try:
        yield
    finally:
        _SAID.reset(before)


def on_one_cpu() -> bool | None:
    """Whether a function is traced for one CPU; None if that is known only when it is compiled.

    The fast forms of one CPU would move what several devices share out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return False
    device = None if mesh.empty else mesh.abstract_device
    platform = _SAID.get() if device is None else device.platform
    return None if platform is None else platform == "cpu"


def for_one_cpu(form: Callable[Concatenate[Callable[P, R], P], R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a textbook form: a function compiled for one CPU computes `form` instead."""

    def decorate(textbook: Callable[P, R]) -> Callable[P, R]:
        @wraps(textbook)
        def chosen(*arguments: P.args, **options: P.kwargs) -> R:
            def on_cpu() -> R:
                with traced_for("cpu"):  # so that functions called within are not traced in both forms again
                    return form(textbook, *arguments, **options)

            def elsewhere() -> R:
                with traced_for("other"):
                    return textbook(*arguments, **options)

            known = on_one_cpu()
            if known is None:
                return jax.lax.platform_dependent(cpu=on_cpu, default=elsewhere)
            return form(textbook, *arguments, **options) if known else textbook(*arguments, **options)

        return chosen

    return decorate


# --- Attention (beit_jax.models.attention) ----------------------------------------------------------------------------


def attend_in_pieces(
    textbook: Callable[..., tuple[Array, Array | None]],
    qkv: Float[Array, "b n 3 heads e"],
    bias: PositionBias | Float[Array, "shards heads n n"] | None,
    drop: Callable[[Array], Array] | None = None,
    *,
    output_attentions: bool = False,
) -> tuple[Float[Array, "b n heads e"], Float[Array, "b heads n n"] | None]:
    """`attention.attend` by the kernel, which reads the tables of the bias; else of the largest pieces whose scores fit
    into the cache: all samples, one sample, or one head.

    The scores are written and read several times, which is slow in main memory. Dropout draws for all samples at once,
    so attention with dropout is computed in one piece, and so are weights that are returned, and scores of a size that
    is symbolic (`jax.export`).
    """
    batch, tokens, _, heads, _ = qkv.shape
    whole = drop is not None or output_attentions
    if not whole and _has_kernel(bias, qkv):
        return calls.attention(qkv, bias), None
    written = bias.written if isinstance(bias, PositionBias) else bias
    scores = jnp.dtype(jnp.float32).itemsize * heads * tokens**2  # of one sample
    if whole or export.is_symbolic_dim(batch * scores) or batch * scores <= CACHE:
        return textbook(qkv, written, drop, output_attentions=output_attentions)
    return _attend_by_pieces(textbook, qkv, written), None


def _has_kernel(bias: PositionBias | Array | None, qkv: Array) -> TypeGuard[PositionBias | None]:
    """Whether the kernel computes it: heads are not too wide, and a bias is that of one shard, with its table."""
    tables = []
    if bias is not None:
        if not isinstance(bias, PositionBias) or len(bias.tables) != 1:
            return False
        tables.append(bias.tables)
    heads, width = qkv.shape[3:]
    return width <= calls.WIDEST_HEAD and calls.computes(qkv, *tables, widths=[heads * width])


def _attend_by_pieces(
    textbook: Callable[..., Any], qkv: Float[Array, "b n 3 heads e"], bias: Float[Array, "shards heads n n"] | None
) -> Float[Array, "b n heads e"]:
    """One sample at a time or, where the scores of one are larger than the cache, one head."""
    scores = jnp.dtype(jnp.float32).itemsize * qkv.shape[3] * qkv.shape[1] ** 2
    if scores <= CACHE:
        return jax.lax.map(lambda one: textbook(one[None], bias)[0][0], qkv)
    biases = None if bias is None else bias[0]

    def sample(qkv: Float[Array, "n 3 heads e"]) -> Float[Array, "n heads e"]:
        def head(piece: tuple[Array, Array | None]) -> Array:
            qkv, bias = piece
            return textbook(qkv[None, :, :, None], None if bias is None else bias[None, None])[0][0, :, 0]

        return jnp.moveaxis(jax.lax.map(head, (jnp.moveaxis(qkv, 2, 0), biases)), 0, 1)

    return jax.lax.map(sample, qkv)


def separated_by_a_split(
    _: Callable[..., Any], qkv: Float[Array, "b n 3 heads e"]
) -> tuple[Float[Array, "b heads n e"], Float[Array, "b heads n e"], Float[Array, "b heads n e"]]:
    """`attention.separated`, by a split, whose gradient joins three pieces. The gradient of an index adds up three
    arrays of the whole size; TPUs fuse that sum and are faster with it."""
    query, key, value = jnp.split(jnp.einsum("bnkhe->kbhne", qkv), 3)
    return query[0], key[0], value[0]


def repeated_with_looped_sum(
    textbook: Callable[..., Array], bias: Float[Array, "shards heads n n"], batch: int
) -> Float[Array, "b heads n n"]:
    """`attention.of_every_sample`, whose gradient sums over samples by a loop: thirty times as fast as XLA's sum over
    the outermost axis on a CPU."""
    return _repeated(textbook, bias, batch) if len(bias) == 1 else textbook(bias, batch)


@partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def _repeated(textbook: Callable[..., Array], bias: Array, batch: int) -> Array:
    return textbook(bias, batch)


@_repeated.defjvp
def _repeated_derivative(
    textbook: Callable[..., Array], batch: int, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (bias,), (tangent,) = primals, tangents
    return _repeated(textbook, bias, batch), jax.lax.map(lambda _: tangent[0], jnp.arange(batch))


# --- Projections (beit_jax.models.elementary) -------------------------------------------------------------------------


def of_two_matrices(project: Callable[..., Array]) -> Callable[..., Array]:
    """Decorates `elementary.project`: where the kernel is a matrix, no form is chosen by platform.

    The kernels' product chooses by itself when it is compiled, and without it all forms are one. Of two forms that are
    both traced, the way back would keep two copies of every kernel.
    """

    @wraps(project)
    def chosen(x: Array, kernel: Array, bias: Array) -> Array:
        if kernel.ndim != 2:
            return project(x, kernel, bias)
        rows = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x
        if on_one_cpu() is not False and calls.computes(rows, kernel, bias, widths=kernel.shape):
            return calls.affine(rows, kernel, bias).reshape(*x.shape[:-1], *bias.shape)
        return jnp.tensordot(x, kernel, 1, preferred_element_type=bias.dtype) + bias

    return chosen


def project_by_matrices(
    _: Callable[..., Any], x: Float[Array, "b n *inputs"], kernel: Float[Array, "*both"], bias: Float[Array, "*outputs"]
) -> Float[Array, "b n *outputs"]:
    """`elementary.project` as a product of two matrices: for products over several axes, XLA copies the kernel and the
    gradients into other layouts first."""
    width = prod(kernel.shape[: x.ndim - 2])
    rows, matrix, added = x.reshape(-1, width), kernel.reshape(width, -1), bias.ravel()
    if calls.computes(rows, matrix, added, widths=matrix.shape):
        made = calls.affine(rows, matrix, added)
    else:
        made = jnp.dot(rows, matrix, preferred_element_type=bias.dtype) + added
    return made.reshape(*x.shape[:2], *bias.shape)


# --- Blocks (beit_jax.models.interface) -------------------------------------------------------------------------------

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def unrolls(x: Float[Array, "b n d"], remat: str, *, scores: bool) -> bool:
    """Whether a loop over blocks is best written out, block by block: in a step of training on one CPU.

    A loop fills arrays of all blocks with zeros, and copies what the way back reads to them, and back. Without it, what
    is computed twice the compiler computes once, and keeps. So "block" stays a loop, and "dots" too where scores of
    attention would be kept, which are quadratic in the tokens: kernels have none.

    Args:
        x: what the first block reads.
        remat: see `beit_jax.models.interface.REMAT`.
        scores: whether attention has scores, as it has without the kernels; False where they may compute it.
    """
    if not on_one_cpu() or not calls.is_computed_often() or remat == "block":
        return False
    return remat == "none" or (not scores and calls.computes(x, widths=x.shape[-1:]))


def scan_blocks(
    step: Step, carry: Any, layers: tuple[Any, ...], shared: Any, *, unrolled: bool = False
) -> tuple[Any, Any]:
    """`jax.lax.scan`. On one CPU the kernels of the blocks stay where they lie, and products read them there; slices
    are a copy of all parameters in every pass.

    Of two loops that are both differentiated, both keep what their way back reads. So where it is known only later what
    the program is compiled for, derivatives are those of `jax.lax.scan`. And `jax.lax.scan` is what computes steps with
    random numbers there, which are for training, and steps that read arrays which are none of their arguments, whose
    derivatives would be lost.

    Args:
        layers: the blocks first.
        shared: what every step reads.
        unrolled: whether the loop is written out, see `unrolls`.
    """
    in_slices: Callable[..., tuple[Any, Any]] = _written_out if unrolled else _scan_slices
    if any(isinstance(one, AdaptedKernel) for one in jax.tree.leaves(layers[0], is_leaf=_is_adapted)):
        return in_slices(step, carry, layers, shared)
    if on_one_cpu():
        return _scan_numbers(in_slices, step, carry, layers, shared)
    around = [cell.cell_contents for cell in inspect.unwrap(step).__closure__ or ()]
    if any(isinstance(one, jax.Array) for one in jax.tree.leaves(around)) or any(
        jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(layers)
    ):
        return in_slices(step, carry, layers, shared)
    return _scan_in_place(step, carry, layers, shared)


def _is_adapted(value: Any) -> bool:
    return isinstance(value, AdaptedKernel)


def _scan_slices(step: Step, carry: Any, layers: tuple[Any, ...], shared: Any) -> tuple[Any, Any]:
    return jax.lax.scan(lambda carry, layer: step(carry, layer, shared), carry, layers)


def _written_out(step: Step, carry: Any, layers: tuple[Any, ...], shared: Any) -> tuple[Any, Any]:
    leaves, structure = jax.tree.flatten(layers)
    block, outputs = jax.jit(step), []  # which is traced once
    for own in zip(*map(calls.unstacked, leaves), strict=True):
        carry, output = block(carry, jax.tree.unflatten(structure, own), shared)
        outputs.append(output)
    return carry, jax.tree.map(lambda *rows: jnp.stack(rows), *outputs)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scan_in_place(step: Step, carry: Any, layers: tuple[Any, ...], shared: Any) -> tuple[Any, Any]:
    return _scan(step, carry, layers, shared)


@_scan_in_place.defjvp
def _scan_derivative(step: Step, primals: Any, tangents: Any) -> Any:
    return jax.jvp(partial(_scan_slices, step), primals, tangents)


def _scan_numbers(
    textbook: Callable[..., tuple[Any, Any]], step: Step, carry: Any, layers: tuple[Any, ...], shared: Any
) -> tuple[Any, Any]:
    """The loop over the numbers of the layers.

    Gradients of the stacks would be arrays as large as all kernels for every block, so they are those of slices. Where
    no product reads these, compilers leave them out.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(layers)
    leaves = [leaf for _, leaf in paths]
    kernel = ["kernel" in jax.tree_util.keystr(path) and leaf.ndim > 2 for path, leaf in paths]
    kernels = [leaf for leaf, is_kernel in zip(leaves, kernel, strict=True) if is_kernel]
    if not kernels or not calls.computes(*kernels, widths=[isqrt(prod(one.shape[1:])) for one in kernels]):
        return textbook(step, carry, layers, shared)
    stacks = [
        jax.lax.stop_gradient(leaf) if is_kernel else None for leaf, is_kernel in zip(leaves, kernel, strict=True)
    ]

    def numbered(carry: Any, layer: tuple[Array, list[Array]], shared: Any) -> tuple[Any, Any]:
        number, own = layer
        found = [
            leaf if stack is None else calls.Stacked(stack, number, leaf)
            for stack, leaf in zip(stacks, own, strict=True)
        ]
        return step(carry, jax.tree.unflatten(structure, found), shared)

    return textbook(numbered, carry, (jnp.arange(len(kernels[0]), dtype=jnp.int32), leaves), shared)


_scan = for_one_cpu(_scan_numbers)(_scan_slices)


# --- LayerNorm (beit_jax.models.elementary) --------------------------------------------------------------------------


def in_one_pass(textbook: Callable[..., Array]) -> Callable[..., Array]:
    """Decorates LayerNorm: the kernel reads every number once, XLA goes through memory four times.

    It is computed where the platform is said, as loops over blocks do for their forward passes (`scan_blocks`). Of two
    forms that are both traced, the way back would keep what each of them needs.
    """

    @wraps(textbook)
    def chosen(x: Array, scale: Array, bias: Array, eps: float) -> Array:
        if not on_one_cpu() or not calls.computes(x, scale, bias, widths=scale.shape):
            return textbook(x, scale, bias, eps)
        return calls.normalized(x.reshape(-1, x.shape[-1]), scale, bias, eps).reshape(x.shape)

    return chosen


# --- GELU (beit_jax.models.elementary) -------------------------------------------------------------------------------


def gelu_with_derivative(_: Callable[..., Any], x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """`activations.gelu` with its derivative written out, which takes four passes through memory. The derivative that
    JAX finds takes six; TPUs fuse them. GPUs, which fuse none across the error function, compute this form too. The
    kernel takes two on a CPU."""
    if x.ndim and on_one_cpu() and calls.computes(x, widths=x.shape[-1:]):
        return calls.gelu_by_kernel(x)
    return calls.gelu(x)
