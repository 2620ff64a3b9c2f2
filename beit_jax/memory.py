"""Memory: glibc's allocator keeps freed memory, and Python's garbage collector skips objects that stay for good."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Final

# <malloc.h>. A trimming threshold of -1 is the largest there is: nothing at the top of the heap is given back.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS: Final = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28))
_USERS: Final = ("MALLOC_", "GLIBC_TUNABLES")  # beginnings of the variables by which people set the same
_kept = False  # whether this process keeps what it frees


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Makes this process keep the memory that it frees, so that the next call of a compiled program can reuse it.

    On a CPU, XLA allocates the temporaries of a program when the program starts, and frees them when it ends. glibc
    returns blocks of that size to the system, so every call pays for their pages again: a step of training BEiT-B on
    eight images makes 315,000 page faults. With this setting the process never becomes smaller.

    Call it before JAX computes anything. All threads must share one arena of the heap, because glibc maps the large
    blocks of other arenas separately, and a thread keeps its first arena. `beit-jax` calls this function.

    Source: mallopt(3) of the Linux manual pages.

    Args:
        environment: variables. If one begins with MALLOC_ or GLIBC_TUNABLES, the user's settings stay.

    Returns:
        True if the setting was made; False if the user has settings, or if the allocator is not glibc's.
    """
    if any(name.startswith(_USERS) for name in environment):
        return False
    global _kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    _kept = mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS)
    return _kept


class _Mallinfo(ctypes.Structure):
    """<malloc.h>, struct mallinfo2."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


class Heap:
    """The heap of a process that keeps freed memory, and allocates one large block again and again.

    glibc asks for some bytes more than an aligned block needs, cuts off those that are left, and gives them to others.
    So the place of a block that was freed is too small for the next one of its size. That one takes a new place, and so
    on, until nothing is cut off behind one at the end of the heap. Five times the memory was seen.

    Source: glibc 2.36 malloc/malloc.c, `_int_memalign`; mallinfo(3) and malloc_trim(3) of the Linux manual pages.
    """

    _LINE, _LEAST = 64, 32  # bytes: what blocks are aligned to, and of the smallest block

    def __init__(self) -> None:
        self._spacer: int | None = None
        self._largest = 0

    def settle(self) -> None:
        """Where the heap has grown, gives back the pages of its free places, and has the block fit at its end.

        Call it while the block is free. It does nothing without `keep_freed_memory`, or where glibc is older than 2.33.
        """
        libc = ctypes.CDLL(None)
        if not _kept or not hasattr(libc, "mallinfo2"):
            return
        libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, _Mallinfo
        if libc.mallinfo2().arena <= self._largest:
            return
        self._largest = libc.mallinfo2().arena
        libc.free(ctypes.c_void_p(self._spacer))
        libc.malloc_trim(ctypes.c_size_t(0))
        # If one place has most of what is free, half of that is taken: the block might fit there now and then. None of
        # it is touched.
        arena = libc.mallinfo2().arena
        self._spacer = libc.malloc(ctypes.c_size_t(_free_elsewhere(libc) // 2))
        if libc.mallinfo2().arena > arena:  # there is none: it lies at the end
            libc.free(ctypes.c_void_p(self._spacer))
            self._spacer = None
        end = libc.malloc(ctypes.c_size_t(_free_elsewhere(libc) + 2**20))  # no other place is so large
        if end is None:
            return
        # What stays of it has the end begin where a block of whole lines, and the header before it, need all that is
        # asked for.
        stays = -end % self._LINE
        stays += self._LINE if stays < self._LEAST else 0
        libc.realloc(ctypes.c_void_p(end), ctypes.c_size_t(stays - 8))
        libc.malloc_trim(ctypes.c_size_t(0))


def _free_elsewhere(libc: ctypes.CDLL) -> int:
    """Bytes of the heap that are free, but for those at its end."""
    info = libc.mallinfo2()
    return int(info.fordblks - info.keepcost)


@contextmanager
def imports() -> Iterator[None]:
    """Encloses the first import of JAX, and keeps Python's garbage collector away from the imported objects.

    These objects live as long as the process. The collector would go through all of them several times while they are
    created, which takes 0.07 s. It skips all objects that exist when the block ends. A process that has imported JAX
    before is left as it is.
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
    """Spares a process that ends a last garbage collection, which takes 0.2 s with the objects of JAX and Flax.

    It does nothing where torch has imported Triton, which would report its own objects as leaked.
    """
    if "triton" not in sys.modules:
        gc.freeze()
