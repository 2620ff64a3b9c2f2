"""Outputs that appear whole or not at all: each is written beside its destination, and renamed when it is complete."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable
from beit_jax.lock import exclusive


@dataclass(frozen=True)
class Contents:
    """A kind of output directory. A directory that holds anything else is never replaced.

    Attributes:
        name: what such a directory holds, for messages: "model".
        files: names of files; a directory of this kind has at least one of them.
    """

    name: str
    files: tuple[str, ...]


@contextmanager
def new_directory(
    destination: Path, *, overwrite: bool = False, contents: Contents | None = None, need_bytes: int = 0
) -> Iterator[Path]:
    """Yields a directory to write into. It becomes `destination` when the block ends without an exception.

    If the block ends with any exception (an error, Ctrl-C, SystemExit), the new directory is removed, and `destination`
    is as it was. If the process is killed, the next call for the same destination removes what was left.

    Args:
        overwrite: replace an existing directory, which stays whole until the new one is complete.
        contents: replace only an empty directory or one of this kind.
        need_bytes: refuse at once if the disk has less free space.

    Raises:
        BeitJaxError: the destination exists or holds something else than `contents`; its parent is missing or
            read-only; the disk is full, or becomes full; another process is writing to the same destination.
    """
    _check_parent(destination)
    partial, old = _sibling(destination, "partial"), _sibling(destination, "old")
    lock = exclusive(_sibling(destination, "lock"), destination, remove=True)
    with _full_disk_explained(destination), lock:
        _restore(destination)
        check_destination(destination, overwrite=overwrite, contents=contents)
        _check_space(destination.parent, need_bytes)
        try:
            partial.mkdir()
            yield partial
            # Again: another program may have made the destination meanwhile.
            check_destination(destination, overwrite=overwrite, contents=contents)
            if destination.exists():
                destination.rename(old)
            partial.rename(destination)
        finally:
            _restore(destination)


def check_destination(
    destination: Path, *, overwrite: bool, contents: Contents | None = None, source: Path | None = None
) -> None:
    """Refuses a destination that `new_directory` would refuse, before any work is done.

    Args:
        contents: as in `new_directory`.
        source: a file or directory that the work reads, and that must not be replaced by its result.

    Raises:
        BeitJaxError: as `new_directory`; or the destination holds the source.
    """
    _check_parent(destination)
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise BeitJaxError(f"{destination}: already exists; pass --overwrite to replace it, or choose another name")
    if not destination.is_dir() or destination.is_symlink() or destination.is_mount():
        raise BeitJaxError(
            f"{destination}: expected a directory to replace, found a file, a link or a mount point; "
            "choose another name"
        )
    if contents is not None:
        check_contents(destination, contents, source)


def check_contents(destination: Path, contents: Contents, source: Path | None = None) -> None:
    """Refuses to replace a directory that is neither empty nor of this kind, or that holds the source.

    Raises:
        BeitJaxError: naming the directory.
    """
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not any((destination / name).exists() for name in contents.files):
        raise BeitJaxError(f"{printable(destination)}: holds no {contents.name}; --overwrite replaces nothing else")
    if source is not None and source.resolve().is_relative_to(destination.resolve()):
        raise BeitJaxError(f"{printable(destination)}: holds the source itself; choose another name")


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """Yields the path of a file to write. It replaces `destination` when the block ends without an exception.

    Raises:
        BeitJaxError: the destination is a directory, its parent is missing or read-only, or the disk becomes full.
    """
    if destination.is_dir():
        raise BeitJaxError(f"{destination}: expected a file name, found a directory")
    _check_parent(destination)
    partial = _sibling(destination, f"partial-{os.getpid()}")
    with _full_disk_explained(destination):
        try:
            yield partial
            os.replace(partial, destination)
        finally:
            partial.unlink(missing_ok=True)


def _check_parent(destination: Path) -> None:
    if destination.name in ("", ".."):
        raise BeitJaxError(f"{destination}: expected the name of something to create, found an existing directory")
    parent = destination.parent
    if not parent.is_dir():
        raise BeitJaxError(f"{destination}: the directory {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise BeitJaxError(f"{destination}: the directory {parent} is not writable")


def _check_space(directory: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise BeitJaxError(f"{directory}: {need_bytes:,} bytes are needed, {free:,} are free; free space and run again")


@contextmanager
def _full_disk_explained(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BeitJaxError(f"{destination}: the disk is full; nothing was kept, free space and run again") from error


def _sibling(destination: Path, suffix: str) -> Path:
    return destination.with_name(f".{destination.name}.{suffix}")


def _restore(destination: Path) -> None:
    """Moves an old output back if no new one took its place, and removes what is not the output."""
    partial, old = _sibling(destination, "partial"), _sibling(destination, "old")
    if old.exists() and not destination.exists():
        old.rename(destination)
    for rest in (partial, old):
        try:
            if rest.exists():
                shutil.rmtree(rest)
        except OSError as error:
            raise BeitJaxError(f"{rest}: left over and cannot be removed ({error.strerror}); remove it") from error
