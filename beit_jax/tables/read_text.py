"""Features as text, ``.csv`` and ``.jsonl``: for small tables and other programs. They are parsed at every pass."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.tables.features import Block, FeatureTable, not_features

_Row = tuple[str, np.ndarray | None]  # a name, and its features [d] where they are asked for


class TextTable(FeatureTable):
    """A table with a line for every image."""

    def __init__(self, path: Path):
        self.path, self.metadata = path, {}

    def rows(self, values: bool) -> Iterator[_Row]:
        """Yields the rows in order."""
        raise NotImplementedError

    def parts(self, rows: int, values: bool = True) -> Iterator[Block]:
        found = self.rows(values)
        while waiting := list(self._some(found, rows)):
            yield self._block(waiting)

    def _some(self, found: Iterator[_Row], count: int) -> Iterator[_Row]:
        try:
            yield from islice(found, count)
        except UnicodeDecodeError:
            raise BeitJaxError(f"{printable(self.path)}: no UTF-8 text; write the table again") from None
        except csv.Error as error:
            raise BeitJaxError(f"{printable(self.path)}: no CSV ({error}); write the table again") from None

    def _block(self, rows: Sequence[_Row]) -> Block:
        names = [name for name, _ in rows]
        features = [values for _, values in rows if values is not None]
        return Block(np.stack(features) if features else np.empty((len(rows), 0), np.float32), lambda: names)

    def _wrong(self, line: int, expected: str, found: object) -> BeitJaxError:
        return BeitJaxError(f"{printable(self.path)}: line {line}: expected {expected}, found {printable(found, 60)}")


class CsvTable(TextTable):
    """The columns image, f0, f1, ...; others are not read."""

    def __init__(self, path: Path):
        super().__init__(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = next(csv.reader(file), [])
        places = {name: place for place, name in enumerate(head)}
        self.width = next(number for number in range(len(head) + 1) if f"f{number}" not in places)
        if "image" not in places or not self.width:
            found = ", ".join(head[:4]) + (", ..." if len(head) > 4 else "")
            raise not_features(path, "the columns image, f0, f1, ...", printable(found or "nothing"))
        self._image, self._columns = places["image"], [places[f"f{number}"] for number in range(self.width)]
        self._length = len(head)
        first, last = self._columns[0], self._columns[-1] + 1
        self._slice = slice(first, last) if self._columns == list(range(first, last)) else None

    def rows(self, values: bool) -> Iterator[_Row]:
        """Yields the rows in order.

        Raises:
            BeitJaxError: a line has too many or too few cells, or one that is no number.
        """
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            next(reader)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != self._length:
                    raise self._wrong(reader.line_num, f"{self._length} cells", len(cells))
                if not cells[self._columns[0]]:
                    continue  # an image that could not be read
                yield cells[self._image], self._numbers(cells, reader.line_num) if values else None

    def _numbers(self, cells: Sequence[str], line: int) -> np.ndarray:
        numbers = cells[self._slice] if self._slice else [cells[place] for place in self._columns]
        try:
            return np.array(numbers, np.float32)
        except ValueError as error:
            raise self._wrong(line, "numbers", error) from None


class JsonLinesTable(TextTable):
    """A JSON object in every line: image and features, a list of numbers or of tokens' lists."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.width = 0
        _, features = next(self.rows(True), ("", None))
        if features is None:
            raise not_features(path, "lines with image and features", "none")
        self.width = len(features)

    def rows(self, values: bool) -> Iterator[_Row]:
        """Yields the rows in order.

        Raises:
            BeitJaxError: a line is no JSON object with a name and numbers, or has another number of them.
        """
        with self.path.open(encoding="utf-8") as file:
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    row: Any = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise self._wrong(line, "a JSON object", error) from None
                if not isinstance(row, dict) or not isinstance(row.get("image"), str):
                    raise not_features(self.path, f"image and features in line {line}", printable(text.strip(), 60))
                if row.get("features") is None and row.get("error") is not None:
                    continue  # an image that could not be read
                yield row["image"], self._numbers(row, line) if values else None

    def _numbers(self, row: dict[str, Any], line: int) -> np.ndarray:
        try:
            numbers = np.array(row["features"], np.float32).ravel()
        except (KeyError, ValueError, TypeError):
            keys = printable(", ".join(row), 60)
            raise not_features(self.path, f"numbers as features in line {line}", f"the keys {keys}") from None
        if not numbers.size or (self.width and len(numbers) != self.width):
            raise self._wrong(line, f"{self.width or 'some'} numbers", f"{len(numbers)}")
        return numbers
