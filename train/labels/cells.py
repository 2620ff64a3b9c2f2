"""The cells of a table: a class, several classes, 0 or 1, a number. Every error names the row and the column."""

import ast
import json
import math
from typing import Any

import numpy as np
from jaxtyping import Float32

from beit_jax.errors import printable

from .rows import Row

Raw = int | tuple[int, ...] | Float32[np.ndarray, " values"]
"""What a table says about an image: the number of its class, the numbers of its classes, or its values."""
_YES, _NO = ("1", "1.0", "true"), ("0", "0.0", "false")


def one_label(row: Row, column: str) -> str:
    """The class in a cell.

    Raises:
        BeitJaxError: the cell is empty, or holds a list.
    """
    label = row.text(column)
    if not label:
        raise row.error(column, "empty; write the class, or leave the row out")
    return label


def listed(cell: object) -> list[Any] | None:
    """The list that a cell is or that its text spells, in JSON or as Python prints lists; None where it is none."""
    if not isinstance(cell, str):
        return cell if isinstance(cell, list) else None
    text = cell.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):  # pandas writes lists as Python prints them; nothing is run
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) else None
    return None


def several_labels(row: Row, column: str, separator: str, *, empty: bool) -> list[str]:
    """The classes in a cell, each once.

    Args:
        separator: between them; "" where cells are lists.
        empty: an empty cell means no class.

    Raises:
        BeitJaxError: the cell is empty, but for an empty list; it holds a list of something else than names.
    """
    names = listed(row.cells[column])
    if names is not None:
        return list(dict.fromkeys(_name(row, column, item) for item in names))
    text = row.text(column)
    pieces = [piece.strip() for piece in (text.split(separator) if separator else [text])]
    labels = list(dict.fromkeys(piece for piece in pieces if piece))
    if not labels and not empty:
        raise row.error(column, "empty; write [] for an image of no class, or give --allow-unlabelled")
    return labels


def _name(row: Row, column: str, item: Any) -> str:
    name = "" if isinstance(item, list | dict) or item is None else str(item).strip()
    if not name:
        raise row.error(column, f"expected a list of names, found {printable(json.dumps(item), 60)} in it")
    return name


def flag(row: Row, column: str) -> bool:
    """0 or 1.

    Raises:
        BeitJaxError: the cell holds neither.
    """
    text = row.text(column).lower()
    if text not in _YES + _NO:
        raise row.error(column, f"expected 0 or 1, found {printable(text, 60) if text else 'nothing'}")
    return text in _YES


def number(row: Row, column: str) -> float:
    """A finite number that float32 can hold.

    Raises:
        BeitJaxError: the cell is empty, or holds none.
    """
    cell, text = row.cells[column], row.text(column)
    if not text:
        raise row.error(column, "empty; write the number, or leave the row out")
    try:
        value = math.nan if isinstance(cell, bool) or "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= float(np.finfo(np.float32).max):
        advice = "; write it with a point and without other marks, such as 1234.5" if "," in text else ""
        raise row.error(column, f"expected a number, found {printable(text, 60)}{advice}")
    return value
