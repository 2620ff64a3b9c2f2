"""Files in which people name their classes: lists, tables and JSON of names, and of colours."""

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import parse_json, read_text

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

MOST_NUMBER: Final = 65535
_NUMBER_COLUMNS: Final = ("id", "idx", "index", "number", "value", "class", "label_id", "class_id", "train_id")
_NAME_COLUMNS: Final = ("name", "label", "class_name", "label_name", "category")
_NUMBERED: Final = re.compile(r"\s*(\d{1,9})(?:\s*([:=])\s*|\s+)(\S.*)")
_HEX: Final = re.compile(r"#?([0-9a-fA-F]{6})")


def read_names(path: Path, first: int = 0) -> dict[int, str]:
    """Class names by number, in one of these forms:

    - text: a name in each line, from the number `first` on
    - lines of number and name, such as ``3: tree``, or ``3 tree`` where the numbers grow by one from 0 or 1
    - CSV with commas, semicolons or tabs: number and name, in columns that a first line may name
    - JSON: a list of names; numbers to names ("id2label", which may lie in a config.json); names to numbers

    Raises:
        BeitJaxError: the file is missing, none of these, or has a number or a name twice.
    """
    text = _text(path)
    pairs = (_json_names if path.suffix.lower() == ".json" else _table_names)(path, text, first)
    for number, name in pairs:
        if not name or not name.isprintable():
            raise BeitJaxError(f"{printable(path)}: class {number} has no printable name; give it one")
        if not 0 <= number <= MOST_NUMBER:
            raise BeitJaxError(f"{printable(path)}: class number {number}, expected 0 to {MOST_NUMBER}; correct it")
    for kind, values in zip(("number", "name"), zip(*pairs, strict=True), strict=False):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise BeitJaxError(f"{printable(path)}: the {kind} {printable(str(twice[0]))} stands twice; keep one")
    return dict(sorted(pairs))


def read_colours(path: Path) -> list[tuple[Colour, str]]:
    """Colours and class names, in the order of the file. Colours of one name are one class.

    A line holds three numbers before or after a name, separated by commas, colons, tabs or blanks; a first line may
    name the columns. JSON holds names to ``[r, g, b]`` or ``"#rrggbb"``.

    Raises:
        BeitJaxError: the file is missing or has a line of another kind, or a colour twice.
    """
    text = _text(path)
    if path.suffix.lower() == ".json":
        pairs = _json_colours(path, text)
    else:
        lines = [line for line in enumerate(text.splitlines(), start=1) if line[1].strip() and line[1][:1] != "#"]
        found = [(number, line, _colour_line(line)) for number, line in lines]
        if found and found[0][2] is None and not re.search(r"\d", found[0][1]):
            del found[0]  # names of columns
        pairs = []
        for number, line, pair in found:
            if pair is None:
                raise BeitJaxError(
                    f"{printable(path)}: line {number}: expected a name and three numbers from 0 to 255, found "
                    f"{printable(line, 60)}; write it as NAME,R,G,B"
                )
            pairs.append(pair)
    colours = [colour for colour, _ in pairs]
    twice = [colour for colour in dict.fromkeys(colours) if colours.count(colour) > 1]
    if twice:
        raise BeitJaxError(f"{printable(path)}: the colour {twice[0]} stands twice; keep one")
    if not pairs:
        raise BeitJaxError(f"{printable(path)}: no colours; write a line NAME,R,G,B for each class")
    return pairs


def _text(path: Path) -> str:
    text = read_text(path, advice="give a file of class names")
    return text.removeprefix("\ufeff")


def _json(path: Path, text: str) -> Any:
    try:
        return parse_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise BeitJaxError(f"{printable(path)}: not JSON ({printable(error)}); correct it") from None


def _json_names(path: Path, text: str, first: int) -> list[tuple[int, str]]:
    content = _json(path, text)
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):
        content = content["id2label"]
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return list(enumerate(content, start=first))
    if isinstance(content, dict) and content:
        if all(isinstance(name, str) and _integer(key) is not None for key, name in content.items()):
            return [(int(key), name) for key, name in content.items()]
        if all(isinstance(number, int) and not isinstance(number, bool) for number in content.values()):
            return [(number, name) for name, number in content.items()]
    raise BeitJaxError(
        f'{printable(path)}: expected a list of names, or an object of numbers and names ({{"0": "name"}}); correct it'
    )


def _table_names(path: Path, text: str, first: int) -> list[tuple[int, str]]:
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    columns = _columns(lines)
    if columns is None:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise BeitJaxError(
                    f"{printable(path)}: line {number} is empty, so the numbers are not clear; remove it"
                )
        if not lines:
            raise BeitJaxError(f"{printable(path)}: no names; write one in each line")
        return _numbered(lines) or [(number, line.strip()) for number, line in enumerate(lines, start=first)]
    rows, number_at, name_at = columns
    pairs = []
    for place, row in rows:
        found = _integer(row[number_at]) if max(number_at, name_at) < len(row) else None
        if found is None:
            raise BeitJaxError(
                f"{printable(path)}: line {place}: expected a number and a name, found "
                f"{printable(','.join(row), 60)}; correct it"
            )
        pairs.append((found, row[name_at].strip()))
    return pairs


def _numbered(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Numbers and names in lines such as ``3: tree`` or ``3 tree``; nothing where lines are names alone.

    Without a colon the numbers must grow by one, from 0 or 1: names may begin with a number, as "2 door car" does.
    """
    found = [_NUMBERED.fullmatch(line) for line in lines]
    pairs = [(int(match[1]), match[3].strip()) for match in found if match]
    if len(pairs) < len(lines) or len(pairs) < 2:
        return []
    colons = all(match is not None and match[2] for match in found)
    counted = [number for number, _ in pairs] in [list(range(n, n + len(pairs))) for n in (0, 1)]
    return pairs if colons or counted else []


def _columns(lines: Sequence[str]) -> tuple[list[tuple[int, list[str]]], int, int] | None:
    """The rows of a table with their lines, and the columns of the number and of the name; None: no table."""
    for delimiter in ",;\t":
        cells = csv.reader(lines, delimiter=delimiter)
        rows = [(line, row) for line, row in enumerate(cells, start=1) if any(map(str.strip, row))]
        if not rows or min(len(row) for _, row in rows) < 2:
            continue
        head = [cell.strip().lower().replace(" ", "_") for cell in rows[0][1]]
        number_at = next((head.index(name) for name in _NUMBER_COLUMNS if name in head), None)
        name_at = next((head.index(name) for name in _NAME_COLUMNS if name in head), None)
        if number_at is not None and name_at is not None:
            return rows[1:], number_at, name_at
        integers = [at for at in (0, 1) if all(_integer(row[at]) is not None for _, row in rows)]
        if len(integers) == 1 and all(len(row) == 2 for _, row in rows):
            return rows, integers[0], 1 - integers[0]
    return None


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*[+-]?\d{1,9}\s*", text) else None


def _json_colours(path: Path, text: str) -> list[tuple[Colour, str]]:
    content = _json(path, text)
    pairs = []
    for name, value in content.items() if isinstance(content, dict) else ():
        found = _HEX.fullmatch(value) if isinstance(value, str) else None
        if found:
            value = list(bytes.fromhex(found[1]))
        if not isinstance(value, list) or len(value) != 3 or not all(type(v) is int and 0 <= v < 256 for v in value):
            raise BeitJaxError(
                f'{printable(path)}: {printable(name)}: expected [r, g, b] or "#rrggbb", found '
                f"{printable(json.dumps(value), 60)}; correct it"
            )
        pairs.append(((value[0], value[1], value[2]), name.strip()))
    return pairs


def _colour_line(line: str) -> tuple[Colour, str] | None:
    parts = [part.strip(' "') for part in re.split(r"[,;:\t]", line)]
    while parts and not parts[-1]:
        parts.pop()
    if len(parts) < 4:
        parts = [part for part in re.split(r"[,;:\s]+", line.strip()) if part]
    for numbers, words in ((parts[:3], parts[3:]), (parts[-3:], parts[:-3])):
        values = [_integer(part) for part in numbers]
        if len(values) == 3 and words and all(value is not None and 0 <= value < 256 for value in values):
            red, green, blue = (int(part) for part in numbers)
            return (red, green, blue), " ".join(filter(None, words))
    return None
