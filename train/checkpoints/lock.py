"""One writer per directory."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable

LOCK = "lock"


@contextmanager
def directory_lock(directory: Path) -> Iterator[str]:
    """Keeps other processes out of an existing directory; yields what its lock file says of this one.

    The kernel drops the lock with its process: the file of a killed one blocks nobody. It stays when the lock is
    released: removing it would let two processes lock two files of the same name.

    Raises:
        BeitJaxError: another process holds the lock, naming its number, its host and when it began; or the file system
            has no locks.
    """
    path = directory / LOCK
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise BeitJaxError(f"{path}: cannot be created ({error.strerror}); choose another directory") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = printable(file.read().decode(errors="replace")) or "another process"
            raise BeitJaxError(f"{directory}: in use by {owner}; wait for it or choose another directory") from None
        except OSError as error:
            raise BeitJaxError(f"{path}: cannot be locked ({error.strerror}); choose another file system") from None
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        owner = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        file.truncate(0)
        file.write(owner.encode())
        os.fsync(file.fileno())  # over a network, other hosts see what was flushed
        try:
            yield owner
        finally:
            file.truncate(0)
