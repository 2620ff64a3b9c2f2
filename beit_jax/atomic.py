"""Outputs that appear whole or not at all: each is written beside its destination, and renamed when it is complete.

Nothing is removed or replaced that this library did not write: a directory is replaced only if it is of the kind of
output that takes its place (`Contents`), and whatever else is found in it is refused or kept.
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable
from beit_jax.lock import exclusive


@dataclass(frozen=True)
class Contents:
    """A kind of output directory, by which an earlier output is told from what belongs to a person.

    Attributes:
        name: what such a directory holds, for messages: "native checkpoint".
        files: patterns of the names of its files, which lie in it flat. Nothing else belongs to it.
        written: True for a directory that this library wrote.

    What people and their systems put beside any output (`_COMPANIONS`) is neither: it moves into the new directory.
    """

    name: str
    files: tuple[str, ...]
    written: Callable[[Path], bool]

    def others(self, directory: Path) -> list[Path]:
        """What is in a directory and not of this kind, sorted by name."""
        return sorted(entry for entry in directory.iterdir() if not self._owns(entry))

    def strangers(self, directory: Path) -> list[Path]:
        """Those of the others that would make another thing of a new output, and are for a person to move."""
        return _but_companions(self.others(directory))

    def _owns(self, entry: Path) -> bool:
        return _matches(entry.name, self.files) and not (os.path.isdir(entry) and not os.path.islink(entry))


# Hidden files are .git, .gitattributes, .DS_Store; a README is a model card.
_COMPANIONS = (".*", "README*", "LICENSE*", "Thumbs.db", "desktop.ini")


def _but_companions(entries: Iterable[Path]) -> list[Path]:
    return [entry for entry in entries if not _matches(entry.name, _COMPANIONS)]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def new_directory(
    destination: Path,
    *,
    overwrite: bool = False,
    contents: Contents | None = None,
    keep_others: bool = False,
    source: Path | None = None,
    need_bytes: int = 0,
) -> Iterator[Path]:
    """Yields a directory to write into. It becomes `destination` when the block ends without an exception.

    If the block ends with any exception (an error, Ctrl-C, SystemExit), the new directory is removed, and `destination`
    is as it was. If the process is killed, the next call for the same destination removes what was left.

    Args:
        overwrite: replace an existing directory, which stays whole until the new one is complete.
        contents: the kind of the new directory. Only an earlier one of this kind is replaced, or a directory that
            is empty but for a README and hidden files (a fresh clone).
        keep_others: all that is in the old directory and not of this kind moves into the new one. Otherwise a README
            and hidden files do, and the rest is refused.
        source: what the block reads, as in `check_destination`.
        need_bytes: refuse at once if the disk has less free space.

    Raises:
        BeitJaxError: the destination exists, or holds something else than `contents` or the source; its parent is
            missing or read-only; its name is too long; the disk is full, or becomes full; another process is writing to
            the same destination.
    """

    def check() -> None:
        check_destination(destination, overwrite=overwrite, contents=contents, keep_others=keep_others, source=source)

    check_place(destination)
    partial, lock = _sibling(destination, "partial"), _sibling(destination, "lock")
    interrupted = os.path.lexists(lock)  # a process that ends by itself removes its lock last
    with explained(destination), exclusive(lock, destination, remove=True):
        if not interrupted:
            _refuse_strangers(destination)
        _restore(destination, contents)
        check()
        _check_space(destination.parent, need_bytes)
        try:
            partial.mkdir()
            yield partial
            check()  # again: another program may have made the destination, or put something into it, meanwhile
            if destination.exists():
                destination.rename(_sibling(destination, "old"))
            partial.rename(destination)
        finally:
            _restore(destination, contents)


def check_destination(
    destination: Path,
    *,
    overwrite: bool,
    contents: Contents | None = None,
    keep_others: bool = False,
    source: Path | None = None,
) -> None:
    """Refuses a destination that `new_directory` would refuse, before any work is done.

    Args:
        contents, keep_others: as in `new_directory`.
        source: a file or directory that the work reads, and that must not be replaced by its result.

    Raises:
        BeitJaxError: as `new_directory`.
    """
    check_place(destination)
    if not os.path.lexists(destination):
        return
    name = printable(destination)
    if not overwrite:
        raise BeitJaxError(f"{name}: already exists; pass --overwrite to replace it, or choose another name")
    if not destination.is_dir() or destination.is_symlink() or destination.is_mount():
        raise BeitJaxError(
            f"{name}: expected a directory to replace, found a file, a link or a mount point; choose another name"
        )
    if source is not None and any(_is_in(path, destination) for path in _read_from(source)):
        raise BeitJaxError(f"{name}: holds the source itself, which --overwrite never replaces; choose another name")
    entries = destination.iterdir() if contents is None else _but_companions(destination.iterdir())
    if any(entries):
        _check_contents(destination, contents, keep_others)


def _check_contents(destination: Path, contents: Contents | None, keep_others: bool) -> None:
    """Refuses to replace a directory that is not of this kind."""
    name, kind = printable(destination), "output" if contents is None else contents.name
    if contents is None or not (contents.written(destination) or keep_others):
        raise BeitJaxError(
            f"{name}: holds no {kind} that bears beit-jax's marks, and --overwrite replaces nothing else; choose "
            "another name, or remove it yourself if nothing in it is needed"
        )
    strangers = contents.strangers(destination)
    if strangers and not keep_others:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise BeitJaxError(
            f"{name}: holds {printable(strangers[0].name)}{more}, which --overwrite would delete and which is not of "
            f"the earlier {kind}; move it away or choose another name"
        )


def _read_from(source: Path) -> Iterator[Path]:
    """The source and, if it is a directory, its entries: they may be links to anywhere."""
    yield source
    if os.path.isdir(source):
        yield from Path(source).iterdir()


def _is_in(path: Path, directory: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


@contextmanager
def new_file(destination: Path, *, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yields the path of a file to write. It replaces `destination` when the block ends without an exception.

    Args:
        inputs: files that the work reads, none of which its result replaces.

    Raises:
        BeitJaxError: as `check_file`; or the disk becomes full.
    """
    check_file(destination, inputs=inputs)
    partial = _sibling(destination, f"partial-{os.getpid()}")
    with explained(destination):
        try:
            yield partial
            os.replace(partial, destination)
        finally:
            partial.unlink(missing_ok=True)


def check_file(destination: Path, *, inputs: Iterable[Path] = ()) -> None:
    """Refuses a file that `new_file` would refuse, before any work is done.

    Raises:
        BeitJaxError: the destination is no regular file, a broken link, or one of the inputs; its name is too long; its
            parent is missing or read-only.
    """
    name = printable(destination)
    if os.path.isdir(destination):
        raise BeitJaxError(f"{name}: expected a file name, found a directory")
    check_place(destination)
    if not os.path.lexists(destination):
        return
    if not os.path.isfile(destination):
        raise BeitJaxError(f"{name}: expected a file name, found a broken link, a device or a pipe; choose another")
    for path in inputs:
        if os.path.exists(path) and os.path.samefile(path, destination):
            raise BeitJaxError(f"{name}: is an input itself, which the result would replace; choose another name")


def check_place(destination: Path) -> None:
    """Refuses a name that cannot be made: in this directory, of this length.

    Raises:
        BeitJaxError: there is no such directory, it is not writable, or the name is too long.
    """
    name, parent = printable(destination), destination.parent
    if destination.name in ("", ".."):
        raise BeitJaxError(f"{name}: expected the name of something to create, found an existing directory")
    if "\0" in str(destination):
        raise BeitJaxError(f"{name}: no name of a file, it holds a zero byte; choose another")
    place = printable(parent)
    try:
        mode = os.stat(parent).st_mode
        longest = os.pathconf(parent, "PC_NAME_MAX")
    except FileNotFoundError:
        raise BeitJaxError(f"{name}: the directory {place} does not exist; create it first") from None
    except NotADirectoryError:
        raise BeitJaxError(f"{name}: {place} lies in a file, not in a directory; choose another place") from None
    except OSError as error:
        raise BeitJaxError(f"{name}: {place} cannot be used ({error.strerror}); choose another place") from None
    if not stat.S_ISDIR(mode):
        raise BeitJaxError(f"{name}: {place} is a file, not a directory; choose another place")
    if not os.access(parent, os.W_OK):
        raise BeitJaxError(f"{name}: the directory {place} is not writable")
    length = len(os.fsencode(destination.name))
    if length > longest:
        raise BeitJaxError(
            f"{printable(destination.name)}: cannot be created, the name is too long: {length} bytes, expected at most "
            f"{longest}"
        )


def _check_space(directory: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise BeitJaxError(
            f"{printable(directory)}: {need_bytes:,} bytes are needed, {free:,} are free; free space and run again"
        )


_REASONS = {
    errno.ENOSPC: ("the disk is full", "free space and run again"),
    errno.EDQUOT: ("the disk is full for you (quota)", "free space and run again"),
    errno.EFBIG: ("a file may not become that large here", "see ulimit -f and the file system's limit"),
}
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENAMETOOLONG, errno.EIO)


@contextmanager
def explained(destination: Path, *, place: Path | None = None, left: str = "nothing was kept, ") -> Iterator[None]:
    """Makes one line of what the system says about writing. Errors of reading anything else pass.

    Args:
        destination: what is being written, for messages.
        place: the folder in which it is written; by default that of `destination`.
        left: what a full disk leaves, as the line says it.

    Raises:
        BeitJaxError: something in `place` cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        name = printable(destination)
        if error.errno in _REASONS:
            reason, way = _REASONS[error.errno]
            raise BeitJaxError(f"{name}: {reason}; {left}{way}") from error
        beside = error.filename is not None and _is_below(error.filename, place or destination.parent)
        if error.errno in _REFUSED and beside:
            raise BeitJaxError(f"{name}: cannot be written ({error.strerror}); choose another place") from error
        raise


def _is_below(name: str | bytes | int, directory: Path) -> bool:
    return not isinstance(name, int) and _is_in(Path(os.fsdecode(name)), directory)


_LONGEST_STEM = 100  # bytes, so that a sibling's name fits wherever its destination's does


def _sibling(destination: Path, suffix: str) -> Path:
    """A hidden name beside the destination, which only this destination has."""
    stem, name = destination.name, os.fsencode(destination.name)
    if len(name) > _LONGEST_STEM:
        stem = hashlib.sha256(name).hexdigest()[:32]
    return destination.with_name(f".{stem}.{suffix}")


def _remains(destination: Path) -> tuple[Path, Path]:
    """Where the new and the old output stand while one takes the place of the other."""
    return _sibling(destination, "partial"), _sibling(destination, "old")


def _refuse_strangers(destination: Path) -> None:
    """Refuses to remove files of such names that no interrupted call left, because none left its lock."""
    for path in _remains(destination):
        if os.path.lexists(path):
            raise BeitJaxError(
                f"{printable(path)}: expected nothing of this name, which is for unfinished outputs; "
                "move it away or remove it"
            )


def _restore(destination: Path, contents: Contents | None) -> None:
    """Moves an old output back if no new one took its place, and removes what is not the output."""
    partial, old = _remains(destination)
    if old.exists() and not destination.exists():
        old.rename(destination)
    try:
        if old.exists() and contents is not None:
            for entry in contents.others(old):
                _move_into(entry, destination)
        for rest in filter(Path.exists, (partial, old)):
            shutil.rmtree(rest)
    except OSError as error:
        left = printable(error.filename or partial)
        raise BeitJaxError(f"{left}: left over and cannot be removed ({error.strerror}); remove it") from error


def _move_into(entry: Path, directory: Path) -> None:
    """Moves what is not ours out of an old output."""
    if os.path.lexists(directory / entry.name):
        raise BeitJaxError(f"{printable(entry)}: not written by beit-jax, and its name is taken; move it away")
    entry.rename(directory / entry.name)
