"""A file that one process at a time may hold: who writes to a place, and a refusal for everyone else."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable


class InUse(BeitJaxError):
    """Another process holds a lock."""


@contextmanager
def exclusive(path: Path, guarded: Path, *, remove: bool) -> Iterator[str]:
    """Locks a file and yields what it says of its holder: process, host and time.

    The kernel drops the lock when its process ends, so a killed process blocks nobody.

    Args:
        path: the lock file, which is created where it is missing.
        guarded: the file or directory that the lock protects, for messages.
        remove: remove the lock file at the end. Otherwise it stays, empty: where other hosts look for it by its name,
            its name must not move from one file to another.

    Raises:
        InUse: another process holds the lock, naming its number, its host and since when.
        BeitJaxError: the lock file cannot be created; the file system has no locks.
    """
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise BeitJaxError(f"{path}: cannot be created ({error.strerror}); choose another place") from None
    with file:
        if not _lock(file.fileno(), path):
            file.seek(0)
            owner = printable(file.read(500).decode(errors="replace")) or "another process"
            raise InUse(f"{guarded}: in use by {owner}; wait for it or choose another name")
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        try:
            file.truncate(0)
            file.write(owner.encode())
            os.fsync(file.fileno())  # over a network, other hosts see what was flushed
            yield owner
        finally:
            if remove:
                path.unlink(missing_ok=True)
            else:
                file.truncate(0)


def _lock(descriptor: int, path: Path) -> bool:
    """Takes the lock; False if another process holds it.

    Raises:
        BeitJaxError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The earlier holder may have removed the file after we opened it. A lock on a removed file guards nothing.
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        raise BeitJaxError(f"{path}: cannot be locked ({error.strerror}); choose another file system") from None
