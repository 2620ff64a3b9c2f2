"""What a user names, in order: files, folders, patterns, lists, archives, data sets."""

import bisect
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from beit_jax.bulk.archives import Archive, is_archive
from beit_jax.bulk.files import Files, expanded
from beit_jax.bulk.images import Source, Stamp, Stored
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import is_address
from beit_jax.images.listing import SUFFIXES, walk

DATASET: Final = "dataset_info.json"
TFDS: Final = "tfds:"


@dataclass(frozen=True)
class Listing:
    """All images of a task, in the order of its table. Names are held compactly, pixels never."""

    sources: tuple[Source, ...]

    @property
    def starts(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.sources), initial=0))

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def images(self, start: int, stop: int) -> Iterator[Stored]:
        """The images of these places."""
        for source, first, last in self._ranges(start, stop):
            yield from source.images(first, last)

    def facts(self, start: int, stop: int) -> Iterator[tuple[str, Stamp]]:
        """The names and stamps of the images of these places."""
        for source, first, last in self._ranges(start, stop):
            yield from source.facts(first, last)

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
        starts = self.starts
        for number in range(bisect.bisect_right(starts, start) - 1, len(self.sources)):
            first, last = max(start, starts[number]), min(stop, starts[number + 1])
            if first >= stop:
                return
            if first < last:
                yield self.sources[number], first - starts[number], last - starts[number]

    def digest(self, start: int, stop: int) -> str:
        """A digest of the names and stamps of the images of these places."""
        found = xxhash.xxh3_128()
        for name, stamp in self.facts(start, stop):
            found.update(os.fsencode(name) + b"\0" + repr(stamp).encode() + b"\n")
        return found.hexdigest()

    def names_digest(self) -> str:
        """A digest of all names in their order."""
        found = xxhash.xxh3_128()
        for source in self.sources:
            for name in source.names():
                found.update(os.fsencode(name) + b"\0")
        return found.hexdigest()

    def paths(self) -> Iterator[Path]:
        """The files that are read."""
        for source in self.sources:
            yield from map(Path, source.paths())


def list_images(
    inputs: Iterable[str | os.PathLike[str]], *, members: Sequence[str] = (), leave_out: Iterable[Path] = ()
) -> Listing:
    """Lists the images that a user names.

    Args:
        inputs: image files, folders, patterns that the shell did not expand, ``@list.txt`` or ``-`` (a path in every
            line), tar archives, prepared data sets (``DIR#SPLIT``), names of TFDS (``tfds:NAME#SPLIT``).
        members: endings of images in archives; see `Archive`.
        leave_out: files and folders of outputs, which are no images even if they lie in a folder that is named.

    Raises:
        BeitJaxError: nothing is there, or it is an address; names the input.
    """
    found = _Lister(tuple(members), frozenset(os.path.realpath(path) for path in leave_out))
    for name in inputs:
        text = os.fspath(name)
        if text in ("", "@"):  # which pathlib takes for the folder of the process
            raise BeitJaxError(
                f"images: found the empty name {text!r}, expected a file or a folder; is a variable unset?"
            )
        if text == "-":
            found.add_list(sys.stdin.buffer, "", "standard input")
        elif text.startswith("@") and not os.path.lexists(text):
            found.add_list_file(text[1:])
        elif text.startswith(TFDS) or os.path.isfile(os.path.join(text.partition("#")[0], DATASET)):
            found.add_dataset(text)
        else:
            _refuse_address(text)
            for each in expanded(text):
                found.add(each)
    if not found.sources:
        raise BeitJaxError("no images given; name at least one file or folder")
    if members and not any(isinstance(source, Archive) for source in found.sources):
        raise BeitJaxError(
            f"members {printable(', '.join(members))}: say which images of an archive are meant, and none of the "
            "images is in an archive; leave them out"
        )
    return Listing(tuple(found.sources))


class _Lister:
    def __init__(self, members: tuple[str, ...], left_out: frozenset[str]) -> None:
        self.sources: list[Source] = []
        self._members, self._left_out = members, left_out
        self._open: list[str] = []  # the lists that are read now, each of which names the next one

    def add(self, name: str) -> None:
        """Adds what one name names."""
        path = str(Path(name))
        folder, _, split = path.rpartition("#")
        if split and not os.path.lexists(path) and os.path.isfile(os.path.join(folder, DATASET)):
            self.add_dataset(path)
        elif os.path.isdir(path):
            if os.path.isfile(os.path.join(path, DATASET)):
                self.add_dataset(path)
            else:
                self._add_folder(path)
        elif is_archive(path):
            self.sources.append(Archive(path, self._members))
        elif path.lower().endswith(".txt") and os.path.isfile(path):
            self.add_list_file(path)
        else:
            self._file(path)

    def _file(self, path: str) -> None:
        if not self.sources or not isinstance(self.sources[-1], Files):
            self.sources.append(Files())
        files = self.sources[-1]
        assert isinstance(files, Files)
        files.append(path)

    def _add_folder(self, folder: str) -> None:
        before = len(self.sources)
        count = 0
        for path in walk(folder, SUFFIXES, self._left_out):
            self._file(path)
            count += 1
        if count:
            return
        for path in walk(folder, frozenset({".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz"}), self._left_out):
            if is_archive(path):
                self.sources.append(Archive(path, self._members))
        if len(self.sources) == before:
            expected = ", ".join(sorted(SUFFIXES))
            raise BeitJaxError(f"{printable(Path(folder))}: no images in this folder; expected {expected}, or archives")

    def add_list_file(self, path: str) -> None:
        """Adds what the lines of a file name, relative to the folder of the file."""
        real = os.path.realpath(path)
        if real in self._open:
            raise BeitJaxError(f"{printable(Path(path))}: names itself, or a list that names it; remove that line")
        self._open.append(real)
        try:
            with open(path, "rb") as file:
                self.add_list(file, os.path.dirname(path), printable(Path(path)))
        except OSError as error:
            raise BeitJaxError(
                f"{printable(Path(path))}: cannot be read ({error.strerror}); give a list of paths"
            ) from None
        self._open.pop()

    def add_list(self, lines: Iterable[bytes], folder: str, name: str) -> None:
        """Adds what lines name."""
        count = 0
        for line in lines:
            if not line.strip():
                continue
            if b"\0" in line:
                raise BeitJaxError(f"{name}: expected a path in every line, found a zero byte; is it a text file?")
            text = os.path.join(folder, os.fsdecode(line.rstrip(b"\r\n")))
            if b"://" in line:  # lists may have millions of lines
                _refuse_address(os.fsdecode(line.strip()))
            if os.path.splitext(text)[1].lower() in SUFFIXES:
                self._file(str(Path(text)))
            else:
                self.add(text)
            count += 1
        if not count:
            raise BeitJaxError(f"{name}: expected a path in every line, found none")

    def add_dataset(self, name: str) -> None:
        """Adds a split of a data set."""
        from beit_jax.bulk.records import open_records

        self.sources.append(open_records(name))


def _refuse_address(name: str) -> None:
    """Refuses what lies elsewhere: nothing is fetched."""
    if is_address(name):
        raise BeitJaxError(f"{printable(name)}: expected a file or a folder, found an address; download it first")
