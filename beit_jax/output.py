"""Outputs appear whole or not at all: they are written beside their place, and renamed when complete."""

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beit_jax.errors import BeitJaxError

_OWNER = "owner"


@contextmanager
def new_directory(destination: Path, *, overwrite: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """A directory to write into, which becomes `destination` when the block ends without an exception.

    Whatever ends the block otherwise (errors, Ctrl-C, SystemExit) leaves neither it nor anything under `destination`.
    What a killed process left behind is removed by the next call for the same destination.

    Args:
        overwrite: replace an existing directory, which stays whole until the new one is complete.
        need_bytes: refuse at once if the disk has less free.

    Raises:
        BeitJaxError: the destination exists, its parent is missing or read-only, the disk is (or becomes) full, or
            another process is writing to the same destination.
    """
    check_destination(destination, overwrite=overwrite)
    _check_space(destination.parent, need_bytes)
    partial = _claim(destination)
    try:
        yield partial
        (partial / _OWNER).unlink()
        _replace(partial, destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BeitJaxError(
                f"{destination}: the disk is full; nothing was kept, free space and run again"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Refuses, before any work is done, what `new_directory` would refuse at its end."""
    if destination.exists() or destination.is_symlink():
        if not overwrite:
            raise BeitJaxError(f"{destination}: already exists; pass --overwrite to replace it, or choose another name")
        if not destination.is_dir() or destination.is_symlink():
            raise BeitJaxError(
                f"{destination}: expected a directory to replace, found a file or a link; remove it first"
            )
    parent = destination.parent
    if not parent.is_dir():
        raise BeitJaxError(f"{destination}: the directory {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise BeitJaxError(f"{destination}: the directory {parent} is not writable")


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A file to write, renamed to `destination` (replacing what is there) when the block ends without an exception."""
    if destination.is_dir():
        raise BeitJaxError(f"{destination}: expected a file name, found a directory")
    if not destination.parent.is_dir() or not os.access(destination.parent, os.W_OK):
        raise BeitJaxError(f"{destination}: the directory {destination.parent} does not exist or is not writable")
    partial = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    try:
        yield partial
        os.replace(partial, destination)
    finally:
        partial.unlink(missing_ok=True)


def _check_space(directory: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise BeitJaxError(f"{directory}: {need_bytes:,} bytes are needed, {free:,} are free; free space and run again")


def _claim(destination: Path) -> Path:
    """Makes ``.NAME.partial`` beside the destination; mkdir is atomic, so it is the lock as well."""
    partial = destination.parent / f".{destination.name}.partial"
    try:
        partial.mkdir()
    except FileExistsError:
        host, pid = _owner(partial)
        if host != socket.gethostname() or _is_alive(pid):
            raise BeitJaxError(
                f"{destination}: process {pid} on {host} is writing it; wait for it, or remove {partial}"
            ) from None
        shutil.rmtree(partial)
        partial.mkdir()
    (partial / _OWNER).write_text(f"{socket.gethostname()} {os.getpid()}")
    return partial


def _owner(partial: Path) -> tuple[str, int]:
    try:
        host, pid = (partial / _OWNER).read_text().split()
        return host, int(pid)
    except (OSError, ValueError):
        # Killed between mkdir and the note, or just before the rename: nobody can say who; treat it as left behind.
        return socket.gethostname(), -1


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _replace(partial: Path, destination: Path) -> None:
    """Renames `partial` to `destination`; an existing one is moved away first and deleted last."""
    if not destination.exists():
        partial.rename(destination)
        return
    old = destination.parent / f".{destination.name}.old-{os.getpid()}"
    destination.rename(old)
    try:
        partial.rename(destination)
    except OSError:
        old.rename(destination)
        raise
    shutil.rmtree(old)
