"""The rows of a table file: CSV, tab-separated values, or JSON lines. Every error names the file and the row."""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from beit_jax.choices import nearest
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import DuplicateKeyError, parse_json, read_json_array, read_text

METADATA: Final = ("metadata.csv", "metadata.jsonl")
"""The names that the table of a folder of images has. Source: Hugging Face's ``imagefolder``."""
SUFFIXES: Final = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_ADVICE: Final = "give a table in UTF-8 with a row for every image"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        number: as programs for tables count: the row with the columns' names is 1. Of JSON, the line or the object.
        cells: by name of the column: text, or a value of JSON. What a row of JSON does not have is None.
    """

    table: Path
    number: int
    cells: Mapping[str, Any]

    def error(self, column: str, complaint: str) -> BeitJaxError:
        """An error that names the row and the column."""
        return BeitJaxError(f"{printable(self.table)}: row {self.number}, column {printable(column, 60)}: {complaint}")

    def text(self, column: str) -> str:
        """The cell as text without blanks at its ends; empty for nothing.

        Raises:
            BeitJaxError: the cell holds a list or an object.
        """
        value = self.cells[column]
        if value is None:
            return ""
        if isinstance(value, list | dict):
            raise self.error(column, f"expected one value, found {printable(json.dumps(value), 60)}")
        return str(value).strip()


@dataclass(frozen=True)
class Table:
    """A table that was read."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def column(self, name: str, option: str) -> str:
        """The name, if there is such a column.

        Raises:
            BeitJaxError: there is none; names those that there are.
        """
        if name in self.columns:
            return name
        near = nearest(name, self.columns)
        hint = f"; did you mean {printable(near)}?" if near else ""
        raise BeitJaxError(
            f"{option} {printable(name, 60)}: {printable(self.path)} has the columns {_listed(self.columns)}{hint}"
        )

    def known(self, names: Sequence[str]) -> str | None:
        """The first of these names that is a column's, small or capital; None where none is."""
        plain = {column.strip().lower(): column for column in self.columns}
        return next((plain[name] for name in names if name in plain), None)


def table_file(path: Path) -> Path | None:
    """The table that a path names: the file itself, or a folder's `METADATA`. None where it names none.

    Raises:
        BeitJaxError: a folder with two such tables; a file that is no table.
    """
    if path.is_dir():
        found = [path / name for name in METADATA if (path / name).is_file()]
        if len(found) > 1:
            raise BeitJaxError(f"{printable(path)}: expected {' or '.join(METADATA)}, found both; name one of them")
        return found[0] if found else None
    if not path.is_file():
        return None
    if path.suffix.lower() not in SUFFIXES:
        raise BeitJaxError(f"{printable(path)}: expected a table ({', '.join(SUFFIXES)}); write it as one of these")
    return path


def read_table(path: Path) -> Table:
    """Reads a table.

    Of a file of separated values, the first row names the columns. Values are separated by tabs in ``.tsv``; in
    ``.csv`` by commas, or by semicolons or tabs where the first row has no comma. JSON lines are objects, a column for
    every key; ``.json`` is an array of objects.

    Raises:
        BeitJaxError: the file cannot be read, is no UTF-8, or holds no table; a row with more or fewer cells than there
            are columns; a column's name that stands twice; no rows.
    """
    separated = path.suffix.lower() in (".csv", ".tsv")
    columns, rows = _separated(path) if separated else _json(path)
    if not rows:
        raise BeitJaxError(f"{printable(path)}: no rows; {_ADVICE}")
    return Table(path, columns, rows)


def _separated(path: Path) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    text = read_text(path, advice=_ADVICE).removeprefix("\ufeff")
    header = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else next((each for each in ",;\t" if each in header), ",")
    lines = _lines(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), path)
    columns: tuple[str, ...] = tuple(name.strip() for name in next(lines, (0, []))[1])
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise BeitJaxError(f"{printable(path)}: two columns are called {printable(twice, 60)}; rename one")
    rows = []
    for number, cells in lines:
        if len(cells) != len(columns):
            raise BeitJaxError(
                f"{printable(path)}: row {number}: {len(cells)} cells, but the first row names {len(columns)} columns "
                f"({_listed(columns)}); quote a cell that holds {delimiter!r}"
            )
        rows.append(Row(path, number, dict(zip(columns, cells, strict=True))))
    return columns, tuple(rows)


def _lines(reader: Iterator[list[str]], path: Path) -> Iterator[tuple[int, list[str]]]:
    """The numbers and cells of all rows that are not empty."""
    number = 0
    while True:
        number += 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BeitJaxError(f"{printable(path)}: row {number}: {printable(error)}; {_ADVICE}") from None
        if any(cells):
            yield number, cells


def _json(path: Path) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    if path.suffix.lower() == ".json":
        found = list(enumerate(read_json_array(path, advice=_ADVICE), start=1))
    else:
        lines = read_text(path, advice=_ADVICE).removeprefix("\ufeff").split("\n")
        found = [(number, _parsed(line, path, number)) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, content in found:
        if not isinstance(content, dict):
            raise BeitJaxError(f'{printable(path)}: row {number}: expected {{"name of a column": value}}; {_ADVICE}')
    columns = tuple(dict.fromkeys(key for _, content in found for key in content))
    nothing: dict[str, Any] = dict.fromkeys(columns)
    return columns, tuple(Row(path, number, nothing | content) for number, content in found)


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return parse_json(line.encode())
    except DuplicateKeyError as error:
        raise BeitJaxError(f"{printable(path)}: row {number}: the key {printable(error)} stands twice") from None
    except (ValueError, RecursionError) as error:
        raise BeitJaxError(f"{printable(path)}: row {number}: not JSON ({printable(error)}); {_ADVICE}") from None


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(printable(name, 60) or "''" for name in columns[:20])
    return shown + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")


def real_path(path: Path) -> str:
    """The path by which two rows of one image are known as such."""
    return os.path.normpath(os.path.abspath(path))
