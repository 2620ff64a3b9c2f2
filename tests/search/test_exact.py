"""The nearest rows against a plain search in float64, for every metric, size of blocks and kind of owner."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.neighbors import NearestNeighbors

from beit_jax.errors import BeitJaxError
from beit_jax.search import exact
from beit_jax.search.exact import METRICS, Candidates, Metric, array_blocks, nearest

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((150, 12)).astype(np.float32) + 3  # far from the origin, where products cancel
QUERIES = np.concatenate([RNG.standard_normal((17, 12)).astype(np.float32) + 3, ROWS[[5, 149]]])


def plain(queries: np.ndarray, rows: np.ndarray, metric: Metric) -> np.ndarray:
    """What is small for near rows, in float64."""
    q, r = queries.astype(np.float64), rows.astype(np.float64)
    if metric == "euclidean":
        return np.linalg.norm(q[:, None] - r, axis=-1)
    if metric == "dot":
        return -q @ r.T
    return -(q @ r.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(r, axis=1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_ROWS", 32)
    monkeypatch.setattr(exact, "QUERY_ROWS", 8)
    monkeypatch.setattr(exact, "_SPARE", 2)


@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_are_those_of_a_plain_search(metric: Metric, small_blocks: None) -> None:
    found = nearest(QUERIES, array_blocks(ROWS), 7, metric=metric)
    distances = plain(QUERIES, ROWS, metric)
    order = np.argsort(distances, axis=1, kind="stable")[:, :7]
    assert found.rows.dtype == np.int32 and np.array_equal(found.rows, order)
    expected = np.take_along_axis(distances, order, axis=1) * (1 if metric == "euclidean" else -1)
    assert_allclose(found.scores, expected, rtol=1e-6, atol=1e-6)
    if metric != "dot":  # a row found again: of no distance, and not of some rounding's
        assert found.rows[-2:, 0].tolist() == [5, 149]
        assert found.scores[-2:, 0].tolist() == [0 if metric == "euclidean" else 1] * 2


def test_the_nearest_are_scikit_learns(small_blocks: None) -> None:
    theirs = NearestNeighbors(n_neighbors=4, metric="euclidean", algorithm="brute").fit(ROWS)
    assert np.array_equal(
        nearest(QUERIES, array_blocks(ROWS), 4, metric="euclidean").rows, theirs.kneighbors(QUERIES)[1]
    )


@pytest.mark.parametrize("metric", METRICS)
def test_no_row_is_a_neighbour_of_its_owner(metric: Metric, small_blocks: None) -> None:
    own = np.arange(150, dtype=np.int32)
    found = nearest(ROWS, array_blocks(ROWS, leave_one_out=True), 3, metric=metric, own=own)
    distances = plain(ROWS, ROWS, metric)
    np.fill_diagonal(distances, np.inf)
    assert np.array_equal(found.rows, np.argsort(distances, axis=1, kind="stable")[:, :3])
    twice = [Candidates(ROWS[:32], np.full(32, 1, np.int32)), Candidates(ROWS[32:40], np.full(8, 2, np.int32))]
    rows = nearest(QUERIES[:3], twice, 40, metric=metric, own=np.array([1, 2, 3], np.int32)).rows
    assert [sorted(row[row >= 0]) for row in rows.tolist() and rows] == [[*range(32, 40)], [*range(32)], [*range(40)]]


def test_equal_rows_come_in_their_order_and_few_rows_leave_places_empty(small_blocks: None) -> None:
    rows = np.array([[1, 0], [2, 0], [0, 0], [0, 5], [4, 0]], np.float32)
    found = nearest(np.array([[3.0, 0], [0, 0]], np.float32), array_blocks(rows), 7)
    assert found.rows.tolist() == [[0, 1, 4, 2, 3, -1, -1], [0, 1, 2, 3, 4, -1, -1]]
    assert found.scores[0].tolist() == [1, 1, 1, 0, 0, -np.inf, -np.inf] and not found.scores[1, :5].any()
    far = nearest(np.zeros((1, 2), np.float32), array_blocks(rows[:1]), 2, metric="euclidean")
    assert far.scores.tolist() == [[1, np.inf]]
    assert nearest(np.zeros((0, 2), np.float32), array_blocks(rows), 2).rows.shape == (0, 2)
    assert nearest(rows, array_blocks(rows[:0]), 2).rows.tolist() == [[-1, -1]] * 5
    large = nearest(np.array([[3e30, 0]], np.float32), array_blocks(rows * np.float32(1e-30)), 1)
    assert large.scores.tolist() == [[1]]


def test_rows_that_cannot_be_compared_are_named(small_blocks: None) -> None:
    rows = ROWS.copy()
    rows[70, 3] = np.nan
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("row 70: its features are not finite; leave it out", (QUERIES, array_blocks(rows), 3)),
        ("query 1: its features are not finite", (rows[69:71], array_blocks(ROWS), 3)),
        ("rows of 12 numbers, those of the queries have 5", (QUERIES[:, :5], array_blocks(ROWS), 3)),
    ]
    for message, arguments in cases:
        with pytest.raises(BeitJaxError, match=message):
            nearest(*arguments)
    rows[70, 3] = 1e30  # its square is beyond float32
    for metric in ("dot", "euclidean"):
        with pytest.raises(BeitJaxError, match=f"row 70: .*, or too large for the metric {metric}"):
            nearest(QUERIES, array_blocks(rows), 3, metric=metric)
        with pytest.raises(BeitJaxError, match=f"queries: numbers too large for the metric {metric}"):
            nearest(rows, array_blocks(ROWS), 3, metric=metric)
