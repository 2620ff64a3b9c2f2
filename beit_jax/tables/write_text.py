"""Tables as text: JSON lines, and CSV as RFC 4180 has it, both in UTF-8."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from jaxtyping import Float32

from beit_jax.tables.schema import ERROR, IMAGE, VALUES, Parts, Schema, refuse, utf8

_ZERO: Final = re.compile(" -0(?= )")
WIDEST: Final = 16384
"""Values of a row of CSV: spreadsheets have as many columns."""


def write_jsonl(path: Path, schema: Schema, parts: Parts) -> int:
    """Writes an object for every image, one a line; values as lists, nested as their shape. Returns the rows."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for part in parts():
            for place, row in enumerate(part.rows):
                text = json.dumps({**row, IMAGE: utf8(row[IMAGE])}, ensure_ascii=False)
                if part.values is not None and row.get(ERROR) is None:
                    text = f'{text[:-1]}, "{VALUES}": {_nested(part.values[place])}}}'
                file.write(text + "\n")
            count += len(part)
    return count


def _nested(values: Float32[np.ndarray, "*shape"]) -> str:
    if values.ndim == 1:
        return f"[{', '.join(numbers(values))}]"
    return f"[{', '.join(map(_nested, values))}]"


def numbers(values: Float32[np.ndarray, " n"]) -> list[str]:
    """The text of float32 values, from which the same values are read: nine digits, or NaN, Infinity, -Infinity."""
    if np.isfinite(values).all():
        text = " %.9g" * len(values) % tuple(values.tolist()) + " "
        return _ZERO.sub(" -0.0", text).split()  # for JSON, -0 would be a whole number, which has no sign
    return [json.dumps(value) if not np.isfinite(value) or value == 0 else f"{value:.9g}" for value in values.tolist()]


def check_csv(name: str, schema: Schema) -> None:
    """Refuses rows of more values than programs that read CSV have columns.

    Raises:
        BeitJaxError: says how many there are.
    """
    if schema.width > WIDEST:
        raise refuse(name, f"{schema.width:,} values an image, CSV has at most {WIDEST:,} columns", ".parquet or .npz")


class _Lines:
    """Ends lines by LF alone. Python's writer ends them by CR and LF: only then it quotes a name that holds a CR."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


def write_csv(path: Path, schema: Schema, parts: Parts) -> int:
    """Writes a row for every image, or one for every entry of its list, with the entry's rank from 1.

    Returns:
        The number of images.
    """
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(_Lines(file))
        writer.writerow(_head(schema))
        for part in parts():
            for place, row in enumerate(part.rows):
                values = None if part.values is None or row.get(ERROR) is not None else part.values[place]
                writer.writerows(_lines(schema, row, values))
            count += len(part)
    return count


def _head(schema: Schema) -> list[str]:
    names = [IMAGE]
    for name, column in schema.columns.items():
        names += [name] if isinstance(column, str) else ["rank", *column]
    names += [f"f{place}" for place in range(schema.width)]
    return names + [ERROR] * schema.errors


def _lines(schema: Schema, row: Mapping[str, Any], values: Float32[np.ndarray, "*shape"] | None) -> Iterator[list[Any]]:
    start = [utf8(row[IMAGE])]
    cells = numbers(values.ravel()) if values is not None else [""] * schema.width
    end = [row.get(ERROR) or ""] * schema.errors
    listed = [name for name, column in schema.columns.items() if not isinstance(column, str)]
    entries = row.get(listed[0], ()) if listed else ()
    for rank, entry in enumerate(entries, 1):
        yield [*start, *_cells(schema, row, rank, entry), *cells, *end]
    if not entries:
        yield [*start, *_cells(schema, row, None, {}), *cells, *end]


def _cells(schema: Schema, row: Mapping[str, Any], rank: int | None, entry: Mapping[str, Any]) -> Iterator[Any]:
    for name, column in schema.columns.items():
        if isinstance(column, str):
            yield row.get(name, "")
        else:
            yield "" if rank is None else rank
            yield from (entry.get(key, "") for key in column)
