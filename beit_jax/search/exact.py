"""The nearest rows of any number of rows, exactly: a block of them is on the device at a time.

A product of matrices finds more candidates in every block than are wanted, and what is kept of them is decided by the
differences themselves. So rounding in the product, which cancels for close rows, moves no row past another, and the
distance of a row from itself is 0.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beit_jax.errors import BeitJaxError

Metric = Literal["cosine", "dot", "euclidean"]
METRICS: Final[tuple[Metric, ...]] = ("cosine", "dot", "euclidean")

BLOCK_ROWS, QUERY_ROWS = 16384, 1024  # similarities of so many rows and queries are in memory at a time: 64 MB
_BLOCK_BYTES: Final = 1 << 26
_SPARE: Final = 16  # candidates of a block beyond those wanted
_NOBODY: Final = -1  # the owner of a row that is no query's own
_NOTHING: Final = -2  # the number of a query that owns no row


class Candidates(NamedTuple):
    """Consecutive rows among which neighbours are looked for.

    Attributes:
        features: [rows, d] float.
        owners: [rows] int32: a query's own rows are those with its own number, and are no neighbours of it; None: no
            row is anybody's.
    """

    features: Float[np.ndarray, "rows d"]
    owners: Int[np.ndarray, " rows"] | None = None


class Nearest(NamedTuple):
    """The nearest rows of every query, the nearest first.

    Attributes:
        rows: int32, by their place among all candidates; -1 where there are fewer than k.
        scores: float32: cosine of the angle, inner product, or distance, as the metric is; the distance of no row is
            inf, and its similarity is -inf.
    """

    rows: Int[np.ndarray, "queries k"]
    scores: Float[np.ndarray, "queries k"]


def block_rows(width: int) -> int:
    """How many rows of so many numbers a block should have."""
    return max(1, min(BLOCK_ROWS, _BLOCK_BYTES // (4 * max(1, width))))


def array_blocks(features: Float[np.ndarray, "n d"], *, leave_one_out: bool = False) -> Iterator[Candidates]:
    """The rows of an array as candidates.

    Args:
        leave_one_out: every row is its own, by its number.
    """
    size = block_rows(features.shape[1])
    for start in range(0, len(features), size):
        part = features[start : start + size]
        yield Candidates(part, np.arange(start, start + len(part), dtype=np.int32) if leave_one_out else None)


def nearest(
    queries: Float[np.ndarray, "queries d"],
    candidates: Iterable[Candidates],
    k: int,
    *,
    metric: Metric = "cosine",
    own: Int[np.ndarray, " queries"] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Nearest:
    """The k nearest candidates of every query. Of equally near ones the first counts.

    Sums are float32. A row of zeros has the cosine 0 with every other.

    Args:
        candidates: all of the same size, but for the last, which may be smaller.
        own: the number of every query by which its own rows are known (`Candidates.owners`).
        advance: called with the number of rows after every block.

    Raises:
        BeitJaxError: a candidate or a query has numbers that are not finite or too large for the metric, another width
            than the others, or there are more candidates than int32 can count.
    """
    wrong = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if wrong.size:
        raise BeitJaxError(f"query {wrong[0]}: its features are not finite; leave it out")
    count, width = queries.shape
    if metric != "cosine" and queries.size and np.abs(queries).max() > _largest(width):
        most = f"{_largest(width):.2g}"
        raise BeitJaxError(f"queries: numbers too large for the metric {metric}, expected at most {most}; take cosine")
    size = max(1, min(QUERY_ROWS, count, (4 * _BLOCK_BYTES) // (4 * max(1, width) * (k + _SPARE))))
    center = queries.mean(axis=0, dtype=np.float64).astype(np.float32) if count else np.zeros(width, np.float32)
    numbers = np.full(count, _NOTHING, np.int32) if own is None else own
    chunks = [
        (
            _prepared(_padded(queries[start : start + size], size), center, metric=metric),
            jnp.asarray(_padded(numbers[start : start + size].astype(np.int32), size)),
        )
        for start in range(0, count, size)
    ]
    best = [(jnp.full((size, k), -jnp.inf), jnp.full((size, k), -1, jnp.int32)) for _ in chunks]
    start, rows, checks = 0, 0, list[tuple[int, Array]]()
    for features, owners in candidates:
        if features.shape[1] != width:
            raise BeitJaxError(f"rows of {features.shape[1]} numbers, those of the queries have {width}")
        rows = rows or 1 << (len(features) - 1).bit_length()
        if start + rows >= np.iinfo(np.int32).max:
            raise BeitJaxError(f"more than {np.iinfo(np.int32).max:,} rows; split the table")
        owned = np.full(len(features), _NOBODY, np.int32) if owners is None else owners
        block = _prepared(_padded(np.asarray(features, np.float32), rows), center, metric=metric)
        whose = jnp.asarray(_padded(owned.astype(np.int32), rows))
        best = [
            _nearer(found, chunk, numbers, block, whose, len(features), start, metric=metric)
            for found, (chunk, numbers) in zip(best, chunks, strict=True)
        ]
        checks.append((start, block.first_wrong))
        if len(checks) > 1:  # a block later, so that the device does not wait for the next one to be read
            _check(*checks.pop(0), metric)
        start += len(features)
        advance(len(features))
    for check in checks:
        _check(*check, metric)
    if not chunks:
        return Nearest(np.empty((0, k), np.int32), np.empty((0, k), np.float32))
    scores = np.concatenate([np.asarray(found[0]) for found in best])[:count]
    return Nearest(
        np.concatenate([np.asarray(found[1]) for found in best])[:count], -scores if metric == "euclidean" else scores
    )


class _Prepared(NamedTuple):
    """Rows as they are compared, of length 1 for the cosine."""

    rows: Float[Array, "n d"]
    centered: Float[Array, "n d"]  # as they are multiplied: for distances with the queries' mean as the origin
    halves: Float[Array, " n"]  # half the squares of these lengths
    first_wrong: Int[Array, ""]  # the first row that is not finite or too large for the metric; -1 if none is


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array


def _check(start: int, first_wrong: Array, metric: Metric) -> None:
    found = int(first_wrong)
    if found >= 0:
        large = "" if metric == "cosine" else f", or too large for the metric {metric}"
        raise BeitJaxError(f"row {start + found}: its features are not finite{large}; leave it out")


def _largest(width: int) -> float:
    """The largest number whose products and squared distances float32 holds for rows of so many."""
    return float(np.sqrt(np.finfo(np.float32).max / (4 * max(1, width))))


def _unit(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Scales every row to length 1. A row of zeros stays one."""
    largest = jnp.abs(features).max(axis=1, keepdims=True)  # divided by first: squares of large numbers would overflow
    scaled = features / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled / jnp.where(norm > 0, norm, 1.0)


@partial(jax.jit, static_argnames="metric")
def _prepared(features: Float[Array, "n d"], center: Float[Array, " d"], *, metric: Metric) -> _Prepared:
    features = jnp.asarray(features, jnp.float32)
    largest = jnp.inf if metric == "cosine" else _largest(features.shape[1])
    finite = (jnp.isfinite(features) & (jnp.abs(features) <= largest)).all(axis=1)
    rows = _unit(features) if metric == "cosine" else features
    centered = rows - center if metric == "euclidean" else rows
    halves = jnp.square(centered).sum(axis=1) / 2
    return _Prepared(rows, centered, halves, jnp.where(finite.all(), -1, jnp.argmin(finite)))


@partial(jax.jit, static_argnames="metric")
def _nearer(
    best: tuple[Float[Array, "q k"], Int[Array, "q k"]],
    queries: _Prepared,
    own: Int[Array, " q"],
    block: _Prepared,
    owners: Int[Array, " n"],
    count: int | Array,
    start: int | Array,
    *,
    metric: Metric,
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """The nearest among those found so far and the first `count` rows of a block that begins at row `start`."""
    k, rows = best[0].shape[1], block.rows.shape[0]
    rough = jnp.matmul(queries.centered, block.centered.T, precision="highest")
    if metric == "euclidean":
        rough -= block.halves
    allowed = (jnp.arange(rows) < count) & (own[:, None] != owners)
    rough, places = jax.lax.top_k(jnp.where(allowed, rough, -jnp.inf), min(rows, k + _SPARE))
    scores = jnp.where(rough > -jnp.inf, _scores(queries, block, places, metric), -jnp.inf)
    numbers = jnp.where(rough > -jnp.inf, start + places, -1).astype(jnp.int32)
    scores, numbers = jnp.concatenate([best[0], scores], axis=1), jnp.concatenate([best[1], numbers], axis=1)
    order, numbers = jax.lax.sort((-scores, numbers), num_keys=2)
    return -order[:, :k], numbers[:, :k]


def _scores(queries: _Prepared, block: _Prepared, places: Int[Array, "q c"], metric: Metric) -> Float[Array, "q c"]:
    """What decides among the candidates of a block: larger is nearer."""
    rows, own = block.rows[places], queries.rows[:, None]
    if metric == "dot":
        return (own * rows).sum(axis=-1)
    squares = jnp.square(own - rows).sum(axis=-1)
    if metric == "euclidean":
        return -jnp.sqrt(squares)
    known = (queries.halves > 0)[:, None] & (block.halves > 0)[places]
    return jnp.where(known, 1.0 - squares / 2, 0.0)
