"""A table of features as an index: the images whose features are nearest to those of others."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os.path import abspath
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from beit_jax.errors import BeitJaxError, printable
from beit_jax.search import exact
from beit_jax.search.exact import Candidates, Metric, nearest
from beit_jax.tables.features import Block, FeatureTable
from beit_jax.tables.reading import open_features
from beit_jax.tables.schema import utf8

QUERIES = 16384  # for so many the index is read once
Excluding = Literal["nobody", "row", "name"]


@dataclass(frozen=True)
class Neighbour:
    """An image of an index.

    Attributes:
        row: its number among the rows of the index.
        image: its name there.
        score: the cosine of the angle between both, their inner product, or their distance, as the metric is.
    """

    row: int
    image: str
    score: float


def neighbours(
    index: FeatureTable | str | Path,
    features: Float[np.ndarray, "queries d"],
    *,
    top: int = 5,
    metric: Metric = "cosine",
) -> list[list[Neighbour]]:
    """The nearest images of an index for every row of features, the nearest first.

    The search is exact: every row of the index is compared. The index streams, whatever its size.

    >>> found = neighbours("photos.parquet", beit_jax.features(model, processor, ["cat.jpg"]))

    Args:
        index: a table of features, or its path, as `open_features` takes it.
        top: the number of neighbours; fewer are found where the index has fewer rows.

    Raises:
        BeitJaxError: the index cannot be read, or its rows have another width; a number is not finite.
    """
    table = index if isinstance(index, FeatureTable) else open_features(index)
    block = Block(np.asarray(features, np.float32), lambda: [str(place) for place in range(len(features))])
    return [found for _, found in search(table, [block], top=top, metric=metric)]


def search(
    index: FeatureTable,
    queries: Iterable[Block],
    *,
    top: int,
    metric: Metric = "cosine",
    excluding: Excluding = "nobody",
    advance: Callable[[int], None] = lambda rows: None,
) -> Iterator[tuple[str, list[Neighbour]]]:
    """Yields the name of every query and its neighbours, in the order of the queries, which may be any number.

    Args:
        queries: read in turn; for some thousands of them the index is read once.
        excluding: who is no neighbour of a query: with "row" the row of its own number, where the queries are the rows
            of the index; with "name" all rows with the name of the query, as a path.
        advance: called with the number of rows after every block of the index.

    Raises:
        BeitJaxError: as `neighbours`.
    """
    before = 0
    for block in _grouped(queries, max(1, QUERIES * exact.block_rows(index.width) // exact.BLOCK_ROWS)):
        if block.features.shape[1] != index.width:
            raise BeitJaxError(
                f"{printable(index.path)}: rows of {index.width} numbers, found queries of {block.features.shape[1]}; "
                "take the model and the pooling that made the index"
            )
        names, owners = block.names(), _Owners(excluding, block, before)
        try:
            found = nearest(
                block.features, owners.candidates(index), top, metric=metric, own=owners.own, advance=advance
            )
        except BeitJaxError as error:
            path = printable(index.path)  # what reading the index raises begins with it
            raise (error if str(error).startswith(path) else BeitJaxError(f"{path}: {error}")) from None
        images = index.names(found.rows[found.rows >= 0].tolist())
        for name, rows, scores in zip(names, found.rows.tolist(), found.scores.tolist(), strict=True):
            kept = [(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
            yield name, [Neighbour(row, images[row], score) for row, score in kept]
        before += len(block)


def _grouped(blocks: Iterable[Block], most: int) -> Iterator[Block]:
    """The same rows, in blocks of at most so many."""
    for block in blocks:
        for start in range(0, len(block), most):
            yield block.part(start, min(len(block), start + most))


def _known(name: str) -> str:
    """The path by which an image is known: as tables hold names, which are no others than UTF-8 in most formats."""
    return abspath(utf8(name))


class _Owners:
    """Which rows of an index are a query's own."""

    def __init__(self, excluding: Excluding, queries: Block, before: int):
        self._excluding, self._numbers = excluding, dict[str, int]()
        self.own: np.ndarray | None = None
        if excluding == "row":
            self.own = np.arange(before, before + len(queries), dtype=np.int32)
        elif excluding == "name":
            own = [self._numbers.setdefault(_known(name), len(self._numbers)) for name in queries.names()]
            self.own = np.array(own, np.int32)

    def candidates(self, index: FeatureTable) -> Iterator[Candidates]:
        """The blocks of an index, with whose rows they are."""
        start = 0
        for block in index.blocks(exact.block_rows(index.width)):
            yield Candidates(block.features, self._owners(block, start))
            start += len(block)

    def _owners(self, block: Block, start: int) -> np.ndarray | None:
        if self._excluding == "row":
            return np.arange(start, start + len(block), dtype=np.int32)
        if self._excluding == "name":
            return np.array([self._numbers.get(_known(name), -1) for name in block.names()], np.int32)
        return None
