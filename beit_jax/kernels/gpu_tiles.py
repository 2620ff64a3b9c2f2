"""Attention on a GPU, by tiles: scores and weights stay in registers, a tile of 64 queries and 64 keys at a time.

The way there is that of arXiv:2205.14135 (algorithm 1), with a bias that all samples share. It keeps a number of each
row, the logarithm of the sum of its exponentials, by which the way back computes weights again, tile by tile
(appendix B there). The gradient of the bias is a kernel of its own: a program has one tile of the bias and goes through
the samples, so what is summed over samples stays in registers, and the sum does not depend on the order of programs.

Queries, keys and values are read where the projection wrote them. Rows beyond the last token are masked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

TILE = 64
PROGRAMS = 1024
"""Programs that keep the multiprocessors of a large card busy: about eight each."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a call, as one card sees them.

    Attributes:
        shards: biases, each of ``batch / shards`` samples in a row.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    shards: int

    @property
    def tiles(self) -> int:
        """Along the tokens."""
        return -(-self.tokens // TILE)

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)

    def products(self, count: int) -> dict[str, str]:
        """What a kernel says of itself to `train.costs`: FLOPs of so many products of matrices for every head."""
        return {"flops": str(2 * count * self.batch * self.heads * self.tokens**2 * self.width)}

    @property
    def chunks(self) -> int:
        """Into so many parts the samples of a shard are divided for the gradient of the bias: fills the card."""
        each, programs = self.batch // self.shards, self.tiles**2 * self.heads * self.shards
        parts = (count for count in range(1, each + 1) if each % count == 0)
        return next((count for count in parts if count * programs >= PROGRAMS), each)


def shape_of(qkv: Float[Array, "b n 3 heads e"], shards: int) -> Shape:
    """The sizes of these arrays, with so many biases."""
    batch, tokens, _, heads, width = qkv.shape
    return Shape(batch, tokens, heads, width, shards)


def forward(
    qkv: Float[Array, "b n 3 heads e"], bias: Float[Array, "shards heads n n"] | None, *, interpret: bool
) -> tuple[Float[Array, "b n heads e"], Float[Array, "b heads n"]]:
    """The averages, in the dtype of `qkv`, and of every row the logarithm of the sum of its exponentials, float32."""
    shape = shape_of(qkv, 1 if bias is None else len(bias))
    biases = [] if bias is None else [bias]
    batch, tokens, _, heads, width = qkv.shape
    averages, logs = _call(
        _forward,
        shape,
        interpret,
        2,
        grid=(shape.tiles, heads, batch),
        inputs=[_qkv(shape), *(_bias(shape) for _ in biases)],
        outputs=[_tokens(shape), _rows(shape)],
        made=[
            jax.ShapeDtypeStruct((batch, tokens, heads, width), qkv.dtype),
            jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        ],
    )(qkv, *biases)
    return averages, logs


def backward(
    qkv: Float[Array, "b n 3 heads e"],
    bias: Float[Array, "shards heads n n"] | None,
    averages: Float[Array, "b n heads e"],
    logs: Float[Array, "b heads n"],
    upstream: Float[Array, "b n heads e"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "b n 3 heads e"], Float[Array, "shards heads n n"] | None]:
    """The gradients of `qkv`, in its dtype, and of the bias, float32, from that of the averages."""
    shape = shape_of(qkv, 1 if bias is None else len(bias))
    biases = [] if bias is None else [bias]
    means = jnp.einsum(
        "bnhe,bnhe->bhn", averages.astype(jnp.float32), upstream.astype(jnp.float32), precision="highest"
    )
    (gradient,) = _call(
        _backward,
        shape,
        interpret,
        8,
        grid=(shape.tiles, shape.heads, shape.batch),
        inputs=[_qkv(shape), _tokens(shape), _rows(shape), _rows(shape), *(_bias(shape) for _ in biases)],
        outputs=[_qkv(shape)],
        made=[jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)],
    )(qkv, upstream, logs, means, *biases)
    if bias is None:
        return gradient, None
    parts, each = shape.shards * shape.chunks, shape.batch // shape.shards // shape.chunks
    square = (parts, shape.heads, shape.tokens, shape.tokens)
    (sums,) = _call(
        _bias_backward,
        shape,
        interpret,
        2,
        grid=(shape.tiles**2, shape.heads, parts),
        inputs=[
            pl.BlockSpec((each, shape.tokens, 3, None, shape.width), lambda _, head, part: (part, 0, 0, head, 0)),
            pl.BlockSpec((each, shape.tokens, None, shape.width), lambda _, head, part: (part, 0, head, 0)),
            pl.BlockSpec((each, None, shape.tokens), lambda _, head, part: (part, head, 0)),
            pl.BlockSpec((each, None, shape.tokens), lambda _, head, part: (part, head, 0)),
            pl.BlockSpec(
                (None, None, shape.tokens, shape.tokens), lambda _, head, part: (part // shape.chunks, head, 0, 0)
            ),
        ],
        outputs=[pl.BlockSpec((None, None, shape.tokens, shape.tokens), lambda _, head, part: (part, head, 0, 0))],
        made=[jax.ShapeDtypeStruct(square, jnp.float32)],
    )(qkv, upstream, logs, means, bias)
    return gradient, sums.reshape(shape.shards, shape.chunks, *square[1:]).sum(axis=1)


def _call(
    kernel: Callable[..., None],
    shape: Shape,
    interpret: bool,
    products: int,
    *,
    grid: tuple[int, ...],
    inputs: list[pl.BlockSpec],
    outputs: list[pl.BlockSpec],
    made: list[jax.ShapeDtypeStruct],
) -> Callable[..., Any]:
    return pl.pallas_call(
        partial(kernel, shape=shape),
        grid=grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=made,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        metadata=shape.products(products),
        interpret=interpret,
        name=f"attention_tiles{kernel.__name__}",
    )


def _qkv(shape: Shape) -> pl.BlockSpec:
    """Queries, keys and values of one head of one sample."""
    return pl.BlockSpec((None, shape.tokens, 3, None, shape.width), lambda _, head, sample: (sample, 0, 0, head, 0))


def _tokens(shape: Shape) -> pl.BlockSpec:
    return pl.BlockSpec((None, shape.tokens, None, shape.width), lambda _, head, sample: (sample, 0, head, 0))


def _rows(shape: Shape) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, shape.tokens), lambda _, head, sample: (sample, head, 0))


def _bias(shape: Shape) -> pl.BlockSpec:
    """The bias of one head, the same for all samples of a shard."""
    each = shape.batch // shape.shards
    return pl.BlockSpec((None, None, shape.tokens, shape.tokens), lambda _, head, sample: (sample // each, head, 0, 0))


def _forward(qkv: Any, *refs: Any, shape: Shape) -> None:
    biases, (averages, logs) = refs[:-2], refs[-2:]
    at = pl.program_id(0)
    query = _scaled(_part(qkv, at, 0, shape), shape)

    def tile(over: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        joined, highest, total = carry
        scores = _scores(query, _part(qkv, over, 1, shape), biases, at, over, shape)
        higher = jnp.maximum(highest, scores.max(axis=1))
        exponentials, fade = jnp.exp(scores - higher[:, None]), jnp.exp(highest - higher)
        value = _part(qkv, over, 2, shape)
        joined = joined * fade[:, None] + triton.dot(exponentials.astype(value.dtype), value)
        return joined, higher, total * fade + exponentials.sum(axis=1)

    nothing = jnp.zeros((TILE, shape.width), jnp.float32), jnp.full((TILE,), -1e30), jnp.zeros((TILE,))
    joined, highest, total = jax.lax.fori_loop(0, shape.tiles, tile, nothing)
    rows, valid = pl.ds(at * TILE, TILE), _valid(at, shape)
    triton.store(averages.at[rows], (joined / total[:, None]).astype(averages.dtype), mask=valid[:, None])
    triton.store(logs.at[rows], highest + jnp.log(total), mask=valid)


def _backward(qkv: Any, upstream: Any, logs: Any, means: Any, *refs: Any, shape: Shape) -> None:
    biases, gradient = refs[:-1], refs[-1]
    at = pl.program_id(0)
    rows, valid = pl.ds(at * TILE, TILE), _valid(at, shape)
    empty = jnp.zeros((TILE, shape.width), jnp.float32)

    def weights(query: Array, key: Array, above: Any, over: Any) -> Array:
        return jnp.exp(_scores(query, key, biases, above, over, shape) - _numbers(logs, above, shape)[:, None])

    def change(weight: Array, given: Array, value: Array, above: Any) -> Array:
        """The gradient of the scores."""
        return weight * (triton.dot(given, value.T) - _numbers(means, above, shape)[:, None])

    key, value = _part(qkv, at, 1, shape), _part(qkv, at, 2, shape)

    def of_keys(above: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        keys, values = carry
        query, given = _scaled(_part(qkv, above, 0, shape), shape), _rows_of(upstream, above, shape)
        weight = weights(query, key, above, at)
        moved = change(weight, given, value, above).astype(query.dtype)
        # Weights as two numbers: the textbook form rounds exponentials, of which a row's largest is 1, and so exact.
        short = weight.astype(given.dtype)
        rest = (weight - short.astype(jnp.float32)).astype(given.dtype)
        values = values + triton.dot(short.T, given) + triton.dot(rest.T, given)
        return keys + triton.dot(moved.T, query), values

    keys, values = jax.lax.fori_loop(0, shape.tiles, of_keys, (empty, empty))
    query, given = _scaled(_part(qkv, at, 0, shape), shape), _rows_of(upstream, at, shape)

    def of_queries(over: Any, queries: Array) -> Array:
        key, value = _part(qkv, over, 1, shape), _part(qkv, over, 2, shape)
        moved = change(weights(query, key, at, over), given, value, at)
        return queries + triton.dot(moved.astype(key.dtype), key)

    queries = jax.lax.fori_loop(0, shape.tiles, of_queries, empty) * shape.scale
    for part, made in enumerate((queries, keys, values)):
        numbers = made.astype(gradient.dtype).reshape(TILE, 1, shape.width)
        triton.store(gradient.at[rows, pl.ds(part, 1)], numbers, mask=valid[:, None, None])


def _bias_backward(qkv: Any, upstream: Any, logs: Any, means: Any, bias: Any, sums: Any, *, shape: Shape) -> None:
    above, over = pl.program_id(0) // shape.tiles, pl.program_id(0) % shape.tiles

    def sample(index: Any, summed: Array) -> Array:
        query, key, value = (_part(qkv, tile, part, shape, index) for part, tile in enumerate((above, over, over)))
        given = _rows_of(upstream, above, shape, index)
        scores = _scores(_scaled(query, shape), key, (bias,), above, over, shape)
        weight = jnp.exp(scores - _numbers(logs, above, shape, index)[:, None])
        mean = _numbers(means, above, shape, index)
        return summed + weight * (triton.dot(given, value.T) - mean[:, None])

    each = shape.batch // shape.shards // shape.chunks
    summed = jax.lax.fori_loop(0, each, sample, jnp.zeros((TILE, TILE), jnp.float32))
    mask = _valid(above, shape)[:, None] & _valid(over, shape)[None]
    triton.store(sums.at[pl.ds(above * TILE, TILE), pl.ds(over * TILE, TILE)], summed, mask=mask)


def _valid(tile: Any, shape: Shape) -> Array:
    """Which rows of a tile are tokens."""
    return tile * TILE + jnp.arange(TILE) < shape.tokens


def _part(qkv: Any, tile: Any, part: int, shape: Shape, *sample: Any) -> Array:
    """A tile of queries (part 0), keys (1) or values (2); zero beyond the last token."""
    rows = qkv.at[(*sample, pl.ds(tile * TILE, TILE), pl.ds(part, 1))]
    return triton.load(rows, mask=_valid(tile, shape)[:, None, None], other=0.0).reshape(TILE, shape.width)


def _rows_of(tokens: Any, tile: Any, shape: Shape, *sample: Any) -> Array:
    return triton.load(tokens.at[(*sample, pl.ds(tile * TILE, TILE))], mask=_valid(tile, shape)[:, None], other=0.0)


def _numbers(rows: Any, tile: Any, shape: Shape, *sample: Any) -> Array:
    return triton.load(rows.at[(*sample, pl.ds(tile * TILE, TILE))], mask=_valid(tile, shape), other=0.0)


def _scaled(query: Array, shape: Shape) -> Array:
    return query * jnp.asarray(shape.scale, query.dtype)


def _scores(query: Array, key: Array, biases: tuple[Any, ...], above: Any, over: Any, shape: Shape) -> Array:
    """A tile of scores; of keys beyond the last token so low that their weight is zero."""
    scores = triton.dot(query, key.T)
    for bias in biases:
        places = bias.at[pl.ds(above * TILE, TILE), pl.ds(over * TILE, TILE)]
        mask = _valid(above, shape)[:, None] & _valid(over, shape)[None]
        scores += triton.load(places, mask=mask, other=0.0)
    return jnp.where(_valid(over, shape)[None], scores, -1e30)
