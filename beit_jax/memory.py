"""Memory: glibc's allocator, told to keep what is freed, and Python's collector, told to leave alone what stays."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

# <malloc.h>. A trimming threshold of -1 is the largest there is: nothing at the top of the heap is given back.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS: Final = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28))
_USERS: Final = ("MALLOC_", "GLIBC_TUNABLES")  # beginnings of the variables by which people set the same


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Lets this process keep the memory that it frees, so that the next call of a compiled program finds it.

    On a CPU, XLA allocates the temporaries of a program when it starts and frees them when it ends. glibc returns
    blocks of that size to the system, and every call pays for their pages again: a step of training BEiT-B on eight
    images makes 315,000 page faults. Afterwards the process stays as large as it was at most.

    To be called before JAX computes anything: all threads have to share one arena of the heap, because glibc maps large
    blocks of the others, and a thread keeps the arena that it began with. `beit-jax` calls it.

    Source: mallopt(3) of the Linux manual pages.

    Args:
        environment: where variables that begin with MALLOC_ or GLIBC_TUNABLES say that the user decides.

    Returns:
        Whether the allocator was told: False if the user decides, or if it is not glibc's.
    """
    if any(name.startswith(_USERS) for name in environment):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS)


@contextmanager
def imports() -> Iterator[None]:
    """For a block that imports JAX first: its objects live as long as the process, and none is looked at in vain.

    Python's collector of cycles would go through all of them several times while they become more, 0.07 s. What is
    there when the block ends is left alone from then on. A process that has imported JAX already goes on as it was.
    """
    if "jax" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_objects() -> None:
    """For a process that ends: Python need not look through all objects once more, 0.2 s of them JAX's and Flax's.

    Triton, which torch imports, would report its own as leaked.
    """
    if "triton" not in sys.modules:
        gc.freeze()
