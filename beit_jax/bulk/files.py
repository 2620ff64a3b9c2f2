"""Image files: named one by one, in folders, or by a pattern."""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from beit_jax.bulk.images import FileImage, Names, Stamp, Stored, stamp_of
from beit_jax.errors import BeitJaxError, printable

MOST_NAMES: Final = 1_000_000  # that braces may stand for


class Files:
    """Image files, a `Source`."""

    def __init__(self) -> None:
        self._names = Names()

    def append(self, name: str) -> None:
        """Adds a file at the end."""
        self._names.append(name)

    def __len__(self) -> int:
        return len(self._names)

    def images(self, start: int, stop: int) -> Iterator[Stored]:
        return (FileImage(self._names[place]) for place in range(start, stop))

    def facts(self, start: int, stop: int) -> Iterator[tuple[str, Stamp]]:
        for place in range(start, stop):
            name = self._names[place]
            yield name, stamp_of(name)

    def names(self) -> Iterator[str]:
        return iter(self._names)

    paths = names


def expanded(pattern: str) -> list[str]:
    """What a name stands for that the shell did not expand: braces as WebDataset has them, then a pattern.

    ``{000..010}`` counts, with leading zeros; ``{a,b}`` lists; ``**`` is any number of folders. A file or folder that
    has the name itself is meant itself. What a pattern finds is sorted; below ``**`` only files are meant.

    Raises:
        BeitJaxError: a pattern finds nothing, or braces stand for too many names.
    """
    if os.path.lexists(pattern) or not re.search(r"[*?\[{]", pattern):
        return [pattern]
    found: list[str] = []
    for name in _braces(pattern):
        if os.path.lexists(name) or not glob.has_magic(name):
            found.append(name)
            continue
        matches = glob.iglob(name, recursive=True)
        kept = [match for match in matches if "**" not in name or not os.path.isdir(match)]
        if not kept:
            raise BeitJaxError(f"{printable(Path(pattern))}: nothing has such a name; check the pattern and the folder")
        found += sorted(kept, key=lambda match: Path(match).parts)
    return found


def _braces(pattern: str) -> list[str]:
    """All names that braces stand for, in order."""
    parts: list[list[str]] = []
    count = 1
    for text, inside in re.findall(r"([^{]+)|\{([^{}]*)\}", pattern):
        choices = [text] if text else _choices(inside)
        count *= len(choices)
        if count > MOST_NAMES:
            raise BeitJaxError(
                f"{printable(pattern)}: stands for more than {MOST_NAMES:,} names; give a folder or a list"
            )
        parts.append(choices)
    return ["".join(combination) for combination in itertools.product(*parts)]


def _choices(inside: str) -> list[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if counted is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = int(counted[1]), int(counted[2])
    if abs(last - first) >= MOST_NAMES:
        raise BeitJaxError(
            f"{{{printable(inside)}}}: stands for more than {MOST_NAMES:,} names; give a folder or a list"
        )
    width = max(len(counted[1]), len(counted[2])) if counted[1].startswith("0") or counted[2].startswith("0") else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
