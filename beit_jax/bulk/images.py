"""Images of a listing: a name for the table, bytes, and what tells whether they changed. Small, for other processes."""

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import read_image_file

Stamp = tuple[int, ...]
"""Numbers that differ when the bytes behind a name do: size and time of a change."""


class Stored(Protocol):
    """An image that can be read. It travels to the process that decodes it."""

    @property
    def name(self) -> str:
        """As it stands in a table."""

    def read(self) -> bytes:
        """The bytes of its file.

        Raises:
            BeitJaxError: it cannot be read; names it.
        """


class Source(Protocol):
    """Some of the images of a listing, in order."""

    def __len__(self) -> int: ...

    def images(self, start: int, stop: int) -> Iterator[Stored]:
        """The images of these places."""

    def facts(self, start: int, stop: int) -> Iterator[tuple[str, Stamp]]:
        """Their names and stamps, for which no image is read."""

    def names(self) -> Iterator[str]:
        """The names of all, or what else tells them apart."""

    def paths(self) -> Iterator[str]:
        """The files that are read, none of which may be the output."""


@dataclass(frozen=True)
class FileImage:
    """An image file."""

    name: str

    def read(self) -> bytes:
        return read_image_file(self.name)


@dataclass(frozen=True)
class PartImage:
    """An image in a file of many: some of its bytes."""

    name: str
    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            file = _opened(self.path)
            data = os.pread(file.number, self.size, self.offset)
        except OSError as error:
            raise BeitJaxError(f"{printable(Path(self.name))}: cannot be read ({error.strerror})") from None
        if len(data) < self.size:
            raise BeitJaxError(f"{printable(Path(self.name))}: the archive is cut off there; copy it again")
        return data


class _Open:
    """A file that is open as long as somebody holds this."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@lru_cache(maxsize=32)
def _opened(path: str) -> _Open:
    """A file that stays open until 32 others are: a worker reads many images of few archives."""
    return _Open(path)


@dataclass(frozen=True)
class HeldImage:
    """An image whose bytes were read already, because their file can only be read from its beginning."""

    name: str
    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class NoImage:
    """What has the name of an image and is none, such as a link in an archive."""

    name: str
    why: str

    def read(self) -> bytes:
        raise BeitJaxError(f"{printable(Path(self.name))}: {self.why}")


class Names:
    """Many names in little memory: their bytes one after the other, and where each ends."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("Q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> str:
        start = self._ends[place - 1] if place else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[place]]))

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))


def stamp_of(path: str) -> Stamp:
    """Size and time of a file; (-1, 0) where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return (-1, 0)
    return (found.st_size, found.st_mtime_ns)
