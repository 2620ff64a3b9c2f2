"""Images in tar archives, as WebDataset lays them out: members named by a key and an ending, in any folders.

An archive is read through once before anything is computed: only its headers, unless it is compressed. Then an image
is read by its place, by whatever process decodes it. A compressed archive can only be read from its beginning, and is
read a second time.

Members that are no images (labels, texts, folders) are passed over. A link, a device or a sparse file with the name of
an image is an image that cannot be read.
"""

import itertools
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final

from beit_jax.bulk.images import HeldImage, Names, NoImage, PartImage, Stamp, Stored, stamp_of
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import MAX_FILE
from beit_jax.images.listing import SUFFIXES, is_foreign

PLAIN: Final = ".tar"
PACKED: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ARRAYS: Final = frozenset({".npy", ".npz"})
_DAMAGE: Final = (tarfile.TarError, EOFError, zlib.error, OverflowError, ValueError)
_LINK: Final = "a link or a sparse or special file in an archive, expected a regular file; write it as one"
_LARGE: Final = f"larger than {MAX_FILE:,} bytes"


def is_archive(name: str) -> bool:
    """True for the name of a tar archive."""
    return name.lower().endswith((PLAIN, *PACKED))


class Archive:
    """The images of a tar archive, a `Source`.

    Args:
        members: the endings of its images, each from the first dot of a name on (``left.jpg``) or its last part
            (``jpg``); by default those of all formats. Arrays (``.npy``) count where there are no pictures: beside
            pictures they are something else.

    Raises:
        BeitJaxError: no archive, a damaged or unfinished one, or one without images.
    """

    def __init__(self, path: str, members: Sequence[str] = ()) -> None:
        self._path, self._wanted = path, tuple(member.lower().lstrip(".") for member in members)
        self._packed = not path.lower().endswith(PLAIN)
        self._stamp = stamp_of(path)
        self._names, self._offsets, self._sizes = Names(), array("Q"), array("q")
        self._numbers = array("Q")  # of the members in the archive
        self._reading: tuple[int, Iterator[Stored]] | None = None
        kinds = [SUFFIXES - ARRAYS, ARRAYS] if not self._wanted else [frozenset[str]()]
        for kind in kinds:
            self._list(kind)
            if len(self._names):
                return
        expected = ", ".join(self._wanted or sorted(SUFFIXES))
        raise BeitJaxError(f"{printable(Path(path))}: no images in this archive; expected members ending in {expected}")

    def _list(self, kind: frozenset[str]) -> None:
        for number, member in enumerate(_members(self._path, self._packed)):
            if self._is_image(member, kind):
                usable = member.isreg() and not member.issparse()
                self._names.append(member.name)
                self._offsets.append(member.offset_data)
                self._sizes.append(member.size if usable else -1)
                self._numbers.append(number)

    def _is_image(self, member: tarfile.TarInfo, kind: frozenset[str]) -> bool:
        path = PurePosixPath(member.name)
        if member.isdir() or any(is_foreign(part) for part in path.parts if part not in (".", "..")):
            return False
        if self._wanted:
            _, _, ending = path.name.lower().partition(".")
            return ending in self._wanted or path.suffix.lower().lstrip(".") in self._wanted
        return path.suffix.lower() in kind

    def __len__(self) -> int:
        return len(self._names)

    def _name(self, place: int) -> str:
        return f"{self._path}/{self._names[place]}"

    def images(self, start: int, stop: int) -> Iterator[Stored]:
        if self._packed:
            yield from self._read_on(start, stop)
            return
        for place in range(start, stop):
            name, size = self._name(place), self._sizes[place]
            if 0 <= size <= MAX_FILE:
                yield PartImage(name, self._path, self._offsets[place], size)
            else:
                yield NoImage(name, _LINK if size < 0 else _LARGE)

    def _read_on(self, start: int, stop: int) -> Iterator[Stored]:
        """Reads a compressed archive on from where it stands, or again from its beginning if it stands behind."""
        if self._reading is None or self._reading[0] > start:
            self._reading = (start, self._read_through(start))
        place, images = self._reading
        yield from itertools.islice(images, start - place, stop - place)
        self._reading = (stop, images)

    def _read_through(self, start: int) -> Iterator[Stored]:
        place = start
        with _opened(self._path, packed=True) as archive:
            for number, member in enumerate(_each(archive)):
                if place == len(self):
                    return
                if number != self._numbers[place]:
                    continue
                name, size = self._name(place), self._sizes[place]
                file = archive.extractfile(member) if 0 <= size <= MAX_FILE else None
                place += 1
                yield NoImage(name, _LINK if size < 0 else _LARGE) if file is None else HeldImage(name, file.read())
        raise BeitJaxError(f"{printable(Path(self._path))}: changed while it was read; run again")

    def names(self) -> Iterator[str]:
        return (self._name(place) for place in range(len(self)))

    def facts(self, start: int, stop: int) -> Iterator[tuple[str, Stamp]]:
        for place in range(start, stop):
            yield self._name(place), (self._sizes[place], self._offsets[place], *self._stamp)

    def paths(self) -> Iterator[str]:
        yield self._path


@contextmanager
def _opened(path: str, *, packed: bool) -> Iterator[tarfile.TarFile]:
    """An archive, and one line about whatever is wrong with it."""
    name = printable(Path(path))
    if not os.path.isfile(path):
        raise BeitJaxError(f"{name}: no such file; give the path of an archive")
    try:
        with tarfile.open(path, "r|*" if packed else "r:", errors="surrogateescape") as archive:
            yield archive
    except BeitJaxError:
        raise
    except _DAMAGE as error:
        found = printable(f"{type(error).__name__}: {error}")
        raise BeitJaxError(
            f"{name}: no tar archive, or a damaged or unfinished one ({found}); write it again"
        ) from None
    except OSError as error:
        found = error.strerror or printable(error)
        raise BeitJaxError(f"{name}: cannot be read ({found}); check its permissions, or write it again") from None


def _members(path: str, packed: bool) -> Iterator[tarfile.TarInfo]:
    with _opened(path, packed=packed) as archive:
        yield from _each(archive)
        if not packed:
            _check_end(archive, path)


def _each(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in order. `tarfile` would keep all of them."""
    while (member := archive.next()) is not None:
        yield member
        archive.members.clear()  # type: ignore[attr-defined]


def _check_end(archive: tarfile.TarFile, path: str) -> None:
    """Refuses an archive without its end mark, which a writer that was stopped leaves, and what follows the mark."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)  # of the first block of zeros, as `tarfile` knows it
    rest = file.read(1024)
    if len(rest) < 512 or rest.strip(b"\0"):
        raise BeitJaxError(f"{printable(Path(path))}: an unfinished tar archive, it has no end mark; write it again")
    while block := file.read(1 << 16):
        if block.strip(b"\0"):
            raise BeitJaxError(
                f"{printable(Path(path))}: more follows the end of the archive, as of several joined by cat; keep them "
                "as files of their own"
            )
