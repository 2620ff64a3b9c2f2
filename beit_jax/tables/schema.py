"""What a table of images holds, whatever its format: columns, and parts of its rows."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

from beit_jax.errors import BeitJaxError, printable

Scalar: TypeAlias = Literal["text", "integer", "number"]
Column: TypeAlias = Scalar | Mapping[str, Scalar]
"""The values of a column: of one kind; or lists, every entry of which has these fields."""

IMAGE: Final = "image"
ERROR: Final = "error"
VALUES: Final = "features"


@dataclass(frozen=True)
class Schema:
    """The columns of a table.

    Attributes:
        columns: after the image's name, in order.
        shape: of the float32 values that every row has besides, in the column `VALUES`; None: it has no such column.
        errors: images that could not be read have rows, which say why in the last column, `ERROR`.
        metadata: what made the table, for JSON. It names no time and no place, so that a table made again is the same.
    """

    columns: Mapping[str, Column] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    errors: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The number of float32 values in a row."""
        return 0 if self.shape is None else prod(self.shape)

    @property
    def described(self) -> str:
        """The metadata as JSON."""
        return json.dumps(self.metadata, sort_keys=True)


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a table.

    Attributes:
        rows: a dictionary for each: ``image``, then either its columns or ``error``.
        values: [rows, ...] float32 where the table has values; zeros where a row has an error.
    """

    rows: Sequence[Mapping[str, Any]]
    values: Float32[np.ndarray, "rows ..."] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def kept(self) -> "Part":
        """The rows without an error."""
        places = [place for place, row in enumerate(self.rows) if row.get(ERROR) is None]
        if len(places) == len(self.rows):
            return self
        return Part([self.rows[place] for place in places], None if self.values is None else self.values[places])


Parts: TypeAlias = Callable[[], Iterator[Part]]
"""Reads a table from its beginning, as often as it is called."""


def utf8(name: str) -> str:
    """A name as tables hold it: UTF-8, which the names of files need not be. Other bytes are escaped: ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if not name.isascii() else name


def regrouped(parts: Iterator[Part], rows: int) -> Iterator[Part]:
    """The same rows in parts of at least `rows`, but for the last one."""
    waiting: list[Part] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= rows:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    values = [part.values for part in parts if part.values is not None]
    return Part([row for part in parts for row in part.rows], np.concatenate(values) if values else None)


def refuse(name: str, why: str, endings: str) -> BeitJaxError:
    """The error for a table that a format cannot hold."""
    return BeitJaxError(f"{printable(name)}: {why}; choose a name ending in {endings}")
