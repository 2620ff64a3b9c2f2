"""Outputs appear whole or not at all: they are written beside their place, and renamed when complete."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable


@contextmanager
def new_directory(destination: Path, *, overwrite: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """A directory to write into, which becomes `destination` when the block ends without an exception.

    Whatever ends the block otherwise (errors, Ctrl-C, SystemExit) leaves neither it nor anything under `destination`.
    What a killed process left behind is put right by the next call for the same destination.

    Args:
        overwrite: replace an existing directory, which stays whole until the new one is complete.
        need_bytes: refuse at once if the disk has less free.

    Raises:
        BeitJaxError: the destination exists, its parent is missing or read-only, the disk is (or becomes) full, or
            another process is writing to the same destination.
    """
    _check_place(destination)
    partial, old = _beside(destination, "partial"), _beside(destination, "old")
    with _full_disk_explained(destination), _locked(destination):
        _settle(destination)
        check_destination(destination, overwrite=overwrite)
        _check_space(destination.parent, need_bytes)
        try:
            partial.mkdir()
            yield partial
            check_destination(destination, overwrite=overwrite)  # anything may have appeared there meanwhile
            if destination.exists():
                destination.rename(old)
            partial.rename(destination)
        finally:
            _settle(destination)


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Refuses, before any work is done, what `new_directory` would refuse at its end."""
    _check_place(destination)
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise BeitJaxError(f"{destination}: already exists; pass --overwrite to replace it, or choose another name")
    if not destination.is_dir() or destination.is_symlink() or destination.is_mount():
        raise BeitJaxError(
            f"{destination}: expected a directory to replace, found a file, a link or a mount point; "
            "choose another name"
        )


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A file to write, renamed to `destination` (replacing what is there) when the block ends without an exception.

    Raises:
        BeitJaxError: the destination is a directory, its parent is missing or read-only, or the disk becomes full.
    """
    if destination.is_dir():
        raise BeitJaxError(f"{destination}: expected a file name, found a directory")
    _check_place(destination)
    partial = _beside(destination, f"partial-{os.getpid()}")
    with _full_disk_explained(destination):
        try:
            yield partial
            os.replace(partial, destination)
        finally:
            partial.unlink(missing_ok=True)


def _check_place(destination: Path) -> None:
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


def _beside(destination: Path, suffix: str) -> Path:
    return destination.with_name(f".{destination.name}.{suffix}")


@contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """Keeps other processes away. The kernel drops the lock with its process: a killed one blocks nobody."""
    path = _beside(destination, "lock")
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise BeitJaxError(f"{path}: cannot be created ({error.strerror}); choose another destination") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file between our open and our lock: then it guards nothing.
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError as error:
            raise BeitJaxError(f"{path}: cannot be locked ({error.strerror}); choose another file system") from None
        if not held:
            file.seek(0)
            owner = printable(file.read().decode(errors="replace")) or "another process"
            raise BeitJaxError(f"{destination}: {owner} is writing it; wait for it")
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)


def _settle(destination: Path) -> None:
    """Puts back an old output that was moved away for nothing, and removes what is not the output."""
    partial, old = _beside(destination, "partial"), _beside(destination, "old")
    if old.exists() and not destination.exists():
        old.rename(destination)
    for rest in (partial, old):
        try:
            if rest.exists():
                shutil.rmtree(rest)
        except OSError as error:
            raise BeitJaxError(f"{rest}: left over and cannot be removed ({error.strerror}); remove it") from error
