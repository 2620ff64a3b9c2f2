"""A table of features in a file: what every format gives, block by block, so that no table has to fit into memory."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from beit_jax.errors import BeitJaxError, printable

METADATA: Final = "beit_jax"
"""Where a table says what made it: the key of a schema's metadata, or the name of an array."""

ADVICE: Final = "beit-jax features SOURCE IMAGE... -o NAME.parquet writes one"
NUMBERS: Final = ("float16", "float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a table.

    Attributes:
        features: [rows, d] float32; read-only where they lie in a mapped file.
        names: gives the name of every row. It is called only where names are needed, because making text of them costs
            more than the features do.
    """

    features: Float[np.ndarray, "rows d"]
    names: Callable[[], Sequence[str]]

    def __len__(self) -> int:
        return len(self.features)

    def part(self, start: int, stop: int) -> "Block":
        """Some of the rows."""
        return Block(self.features[start:stop], lambda: self.names()[start:stop])


class FeatureTable(ABC):
    """The features of images in a file, one row an image. Rows of images that could not be read are not there.

    Attributes:
        path: the file, or the folder of files.
        width: numbers in a row.
        metadata: what the table says of the model that made it; empty where the format or its writer says nothing.
        count: the number of rows; None where only reading to the end tells.
    """

    path: Path
    width: int
    metadata: Mapping[str, Any]
    count: int | None = None

    @abstractmethod
    def parts(self, rows: int, values: bool = True) -> Iterator[Block]:
        """Yields all rows in order, in blocks as the file has them, each of any length.

        Args:
            rows: about as many as a block should have, where the format leaves a choice.
            values: False where names and counts of rows are enough: the features may then be of width 0.
        """

    def blocks(self, rows: int) -> Iterator[Block]:
        """Yields all rows in order, in blocks of exactly `rows`, but for the last one, which is not empty.

        Raises:
            BeitJaxError: a row is not of the table's form; names it.
        """
        waiting: list[Block] = []
        for part in self.parts(rows):
            start = 0
            while start < len(part):
                taken = part.part(start, min(len(part), start + rows - sum(map(len, waiting))))
                waiting.append(taken)
                start += len(taken)
                if sum(map(len, waiting)) == rows:
                    yield _joined(waiting)
                    waiting = []
        if waiting:
            yield _joined(waiting)

    def names(self, wanted: Sequence[int]) -> dict[int, str]:
        """The names of some rows, by their numbers: only these are made text of."""
        ordered, found, start = np.unique(np.asarray(wanted, np.int64)), dict[int, str](), 0
        if not ordered.size:
            return found
        for part in self.parts(1 << 14, values=False):
            inside = ordered[np.searchsorted(ordered, start) : np.searchsorted(ordered, start + len(part))]
            if inside.size:
                names = part.names()
                found |= {int(row): str(names[int(row) - start]) for row in inside}
            start += len(part)
            if start > ordered[-1]:
                break
        return found


def _joined(blocks: Sequence[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    parts = tuple(blocks)
    return Block(
        np.concatenate([part.features for part in parts]),
        lambda: list(chain.from_iterable(part.names() for part in parts)),
    )


def parsed_metadata(text: str | bytes | None, path: Path) -> dict[str, Any]:
    """What a table says of its model, from JSON; empty where nothing is said.

    Raises:
        BeitJaxError: it is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BeitJaxError(
            f"{printable(path)}: its metadata {METADATA} are no JSON object; write the table again, or leave them out"
        )
    return found


def not_features(path: Path, expected: str, found: str) -> BeitJaxError:
    """The error for a file that is no table of features."""
    return BeitJaxError(f"{printable(path)}: no table of features: expected {expected}, found {found}; {ADVICE}")


def rows_of(features: Any, path: Path) -> Float[np.ndarray, "rows d"]:
    """Features of images as rows of float32: those of tokens one after the other.

    Raises:
        BeitJaxError: they are no numbers, or no rows.
    """
    array = np.asanyarray(features)
    if array.ndim < 2 or array.dtype.name not in NUMBERS:
        raise not_features(path, "features [images, numbers] of floats", f"{list(array.shape)} {array.dtype.name}")
    return array.reshape(len(array), int(np.prod(array.shape[1:]))).astype(np.float32, copy=False)
