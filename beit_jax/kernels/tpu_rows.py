"""Attention on a TPU core: scores and weights stay in the core's memory (VMEM), and whole rows of them at once.

A grid step has one block of heads, which fills the 128 lanes of a register: two heads of 64, or one of 128. Blocks are
the outermost axis of the grid and samples an inner one, so the bias of a block is read once for all samples, and its
gradient is summed where it is. The kernels read queries, keys and values where the projection wrote them.

One head of several in a block is picked by a mask: where queries are zero outside of a head's lanes, the product with
the keys of all heads is that of this head. The product unit is 128 wide, so this costs nothing, and no lanes move.

The way back needs nothing but the inputs: a row of scores is there as a whole, so its largest value, its sum and the
mean of its gradients are computed again on the spot. Source of the formulas: arXiv:2205.14135, appendix B.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LANES, SUBLANES = 128, 8
ROWS = 256
"""Queries whose scores exist at a time: more would not fit into registers any better, and take VMEM."""
TOKENS = 2048
"""Tokens of a grid step, where samples are smaller: a step costs a third of a microsecond whatever it does."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a call, as one core sees them.

    Attributes:
        batch: samples.
        shards: biases, each of ``batch / shards`` samples in a row; also without a bias.
        width: numbers of a head, as the arrays have them: a divisor or a multiple of the lanes.
        scaled: numbers of a head before padding, by which scores are scaled.
        dtype: of queries, keys and values.
        biased: whether there is a bias.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    scaled: int
    dtype: DTypeLike
    shards: int = 1
    biased: bool = True

    @property
    def group(self) -> int:
        """Heads of a block."""
        return max(1, LANES // self.width)

    @property
    def lanes(self) -> int:
        """Numbers of a token in a block."""
        return self.group * self.width

    @property
    def blocks(self) -> int:
        return self.heads // self.group

    @property
    def samples(self) -> int:
        """Of a grid step: as many as divide a shard's and have no more than `TOKENS` tokens."""
        each = self.batch // self.shards
        return max(
            count for count in range(1, each + 1) if each % count == 0 and (count * self.tokens <= TOKENS or count == 1)
        )

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """First query and number of queries of every piece of about `ROWS`."""
        count = -(-self.tokens // ROWS)
        step = _up(-(-self.tokens // count), 2 * SUBLANES)
        return [(start, min(step, self.tokens - start)) for start in range(0, self.tokens, step)]

    @property
    def scale(self) -> float:
        return float(self.scaled**-0.5)

    @property
    def held(self) -> int:
        """Bytes of VMEM that the way back takes, which takes more than the way there; rounded up.

        Grid steps overlap, so blocks are there twice: of five arrays of tokens, of the bias and of its gradient.
        """
        tokens, size = _up(self.tokens, 2 * SUBLANES), jnp.dtype(self.dtype).itemsize
        wide = _up(self.tokens, LANES)
        block = self.samples * tokens * self.lanes * size
        bias = self.group * tokens * wide * 4 if self.biased else 0
        sums, scores = 8 * tokens * self.lanes * 4, 8 * self.pieces[0][1] * wide * 4
        return (2 * 5 + 2) * block + 2 * 2 * bias + sums + scores

    def cost(self, products: int, arrays: int) -> pl.CostEstimate:
        """What the compiler reckons with.

        Args:
            products: of matrices, for every head.
            arrays: of tokens, as large as the queries of all heads, that are read or written.
        """
        scores = self.batch * self.heads * self.tokens**2
        bias = (4 * self.shards * self.heads * self.tokens**2 * (1 if products == 2 else 2)) if self.biased else 0
        token = self.batch * self.tokens * self.heads * self.width * jnp.dtype(self.dtype).itemsize
        return pl.CostEstimate(
            flops=2 * products * scores * self.scaled, transcendentals=scores, bytes_accessed=arrays * token + bias
        )


def forward(
    qkv: Float[Array, "b n both"], bias: Float[Array, "shards heads n n"] | None, shape: Shape, *, interpret: bool
) -> Float[Array, "b n wide"]:
    """The averages, heads side by side, in the dtype of `qkv`.

    Args:
        qkv: queries of all heads, then keys, then values.
    """
    biases = [] if bias is None else [bias]
    return _call(
        _forward,
        shape,
        grid=(shape.blocks, shape.shards, shape.batch // shape.shards // shape.samples),
        inputs=[*(_tokens(shape, part) for part in range(3)), *(_bias(shape) for _ in biases)],
        outputs=[(_tokens(shape, 0), jax.ShapeDtypeStruct((*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype))],
        cost=shape.cost(2, 4),
        interpret=interpret,
    )(qkv, qkv, qkv, *biases)[0]


def backward(
    qkv: Float[Array, "b n both"],
    bias: Float[Array, "shards heads n n"] | None,
    upstream: Float[Array, "b n wide"],
    shape: Shape,
    *,
    interpret: bool,
) -> tuple[Float[Array, "b n both"], Float[Array, "shards heads n n"] | None]:
    """The gradients of `qkv`, in its dtype, and of the bias, float32, from that of the averages."""
    biases = [] if bias is None else [bias]
    scratch = (2, shape.samples, shape.tokens, shape.lanes)
    outputs = [(_part(shape), jax.ShapeDtypeStruct(qkv.shape, qkv.dtype))]
    outputs += [(_bias(shape), jax.ShapeDtypeStruct(bias.shape, jnp.float32)) for bias in biases]
    gradient, *sums = _call(
        _backward,
        shape,
        # A step's gradients of queries, keys and values leave it one after the other, into one array.
        grid=(shape.blocks, shape.shards, shape.batch // shape.shards // shape.samples, 3),
        inputs=[*(_tokens(shape, part) for part in range(3)), _tokens(shape, 0), *(_bias(shape) for _ in biases)],
        outputs=outputs,
        scratch=[pltpu.VMEM(scratch, qkv.dtype)],
        cost=shape.cost(5, 7),
        interpret=interpret,
    )(qkv, qkv, qkv, upstream, *biases)
    return gradient, sums[0] if sums else None


def _call(
    kernel: Callable[..., None],
    shape: Shape,
    *,
    grid: tuple[int, ...],
    inputs: list[pl.BlockSpec],
    outputs: list[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]],
    cost: pl.CostEstimate,
    interpret: bool,
    scratch: list[Any] | None = None,
) -> Callable[..., Any]:
    inner: list[Any] = ["arbitrary"] * (len(grid) - 1)
    return pl.pallas_call(
        partial(kernel, shape=shape),
        grid=grid,
        in_specs=inputs,
        out_specs=[spec for spec, _ in outputs],
        out_shape=[made for _, made in outputs],
        scratch_shapes=scratch or [],
        compiler_params=pltpu.CompilerParams(
            # Blocks of heads have nothing in common: a chip of two cores shares them out.
            dimension_semantics=("parallel", *inner),
            vmem_limit_bytes=max(16 * 2**20, shape.held),
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=f"attention_rows{kernel.__name__}",
    )


def _tokens(shape: Shape, part: int) -> pl.BlockSpec:
    """One block of heads of the queries (part 0), keys (1) or values (2)."""
    steps = shape.batch // shape.shards // shape.samples
    return pl.BlockSpec(
        (shape.samples, shape.tokens, shape.lanes),
        lambda block, shard, step, *_: (shard * steps + step, 0, part * shape.blocks + block),
    )


def _part(shape: Shape) -> pl.BlockSpec:
    """As `_tokens`, of the part that the innermost axis of the grid says."""
    steps = shape.batch // shape.shards // shape.samples
    return pl.BlockSpec(
        (shape.samples, shape.tokens, shape.lanes),
        lambda block, shard, step, part: (shard * steps + step, 0, part * shape.blocks + block),
    )


def _bias(shape: Shape) -> pl.BlockSpec:
    """The bias of one block of heads, the same for all samples of a shard."""
    return pl.BlockSpec((1, shape.group, shape.tokens, shape.tokens), lambda block, shard, *_: (shard, block, 0, 0))


def _forward(*refs: Any, shape: Shape) -> None:
    (queries, keys, values), biases, averages = refs[:3], refs[3:-1], refs[-1]

    def sample(index: Any, _: None) -> None:
        key, value = keys[index], values[index]
        for start, count in shape.pieces:
            rows = pl.ds(start, count)
            query = _scaled(queries[index, rows], shape)
            joined = jnp.zeros(query.shape, jnp.float32)
            for head in range(shape.group):
                exponentials = _exponentials(_only(query, head, shape), key, biases, (0, head, rows))
                total = exponentials.sum(axis=-1, keepdims=True)
                own = _product(exponentials.astype(shape.dtype), value, (1, 0)) / total
                joined = jnp.where(_lanes(own, head, shape), own, joined)
            averages[index, rows] = joined.astype(shape.dtype)

    jax.lax.fori_loop(0, shape.samples, sample, None)


def _backward(*refs: Any, shape: Shape) -> None:
    (queries, keys, values, upstream), biases, (gradient, *sums), kept = (
        refs[:4],
        refs[4 : 4 + shape.biased],
        refs[4 + shape.biased : -1],
        refs[-1],
    )
    step, part = pl.program_id(2), pl.program_id(3)

    @pl.when((step == 0) & (part == 0))
    def _() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    def sample(index: Any, _: None) -> None:
        key, value = keys[index], values[index]
        of_keys, of_values = (jnp.zeros(key.shape, jnp.float32) for _ in range(2))
        for start, count in shape.pieces:
            rows = pl.ds(start, count)
            query, above = _scaled(queries[index, rows], shape), upstream[index, rows]
            joined = jnp.zeros(query.shape, jnp.float32)
            for head in range(shape.group):
                own, given = _only(query, head, shape), _only(above.astype(jnp.float32), head, shape)
                exponentials = _exponentials(own, key, biases, (0, head, rows))
                weights = exponentials * (1 / exponentials.sum(axis=-1, keepdims=True))
                of_values += _product(weights.astype(shape.dtype), given, (0, 0))
                of_weights = _product(given, value, (1, 1))
                mean = (weights * of_weights).sum(axis=-1, keepdims=True)
                of_scores = weights * (of_weights - mean)
                for total in sums:
                    total[0, head, rows] += of_scores
                small = of_scores.astype(shape.dtype)
                of_keys += _product(small, own, (0, 0))
                joined = jnp.where(_lanes(joined, head, shape), _product(small, key, (1, 0)), joined)
            gradient[index, rows] = (joined * shape.scale).astype(shape.dtype)
        kept[0, index], kept[1, index] = of_keys.astype(shape.dtype), of_values.astype(shape.dtype)

    @pl.when(part == 0)
    def _() -> None:
        jax.lax.fori_loop(0, shape.samples, sample, None)

    @pl.when(part > 0)
    def _() -> None:
        gradient[...] = kept[part - 1]


def _scaled(query: Array, shape: Shape) -> Array:
    """The queries as the scores read them, rounded as the textbook rounds them; float32, in which lanes are chosen."""
    return (query.astype(jnp.float32) * shape.scale).astype(shape.dtype).astype(jnp.float32)


def _exponentials(query: Array, key: Array, biases: Sequence[Any], place: tuple[Any, ...]) -> Array:
    """Of the scores of one head, less the largest of each row."""
    scores = _product(query, key, (1, 1))
    for bias in biases:
        scores += bias[place].astype(jnp.float32)
    return jnp.exp(scores - scores.max(axis=-1, keepdims=True))


def _only(x: Array, head: int, shape: Shape) -> Array:
    """`x`, float32, with zeros outside of a head's lanes, in the dtype of products."""
    return (x if shape.group == 1 else jnp.where(_lanes(x, head, shape), x, 0.0)).astype(shape.dtype)


def _lanes(x: Array, head: int, shape: Shape) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) // shape.width == head


def _product(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """The product over an axis of each, accumulated in float32."""
    return jax.lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _up(size: int, unit: int) -> int:
    return size + -size % unit
