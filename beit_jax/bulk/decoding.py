"""Batches of prepared images, in order: made ahead by worker processes, or by a thread of this one.

Pixels of one size travel in memory that all processes share.
"""

import mmap
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float32

from beit_jax.bulk.images import Stored
from beit_jax.bulk.pictures import quickly
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bands import decode
from beit_jax.images.processor import ImageProcessor

PART: Final = 16  # images that a worker prepares at a time
FEW: Final = 64  # images for which no process is started
MANY: Final = 1000  # images for which faster libraries are loaded
AHEAD: Final = 2  # parts that wait for every worker

Prepared = Float32[np.ndarray, "h w c"] | str
"""The pixel values of an image, or one line that says why it cannot be read."""


@dataclass(frozen=True)
class Batch:
    """Prepared images of consecutive places.

    Attributes:
        names: of the images.
        pixels: [size, h, w, c] float32; rows of images that cannot be read, and rows after the last, are zeros. The
            memory is used again when the second batch after this one is asked for.
        errors: for every image one line, or None.
    """

    names: Sequence[str]
    pixels: Float32[np.ndarray, "size h w c"]
    errors: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.names)


def default_workers(images: int) -> int:
    """The number of worker processes by default: none for few images; else half of the cores, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if images <= FEW else min(16, cores // 2)


@dataclass(frozen=True)
class Preparing:
    """How images become pixel values. It travels to the workers.

    Attributes:
        quick: there are enough images that faster libraries than Pillow are worth being loaded.
    """

    processor: ImageProcessor
    quick: bool = False

    def one(self, image: Stored) -> Prepared:
        """The pixel values of an image, or why there are none."""
        name, processor = printable(Path(image.name)), self.processor
        try:
            data = image.read()
            if self.quick and (values := quickly(data, processor, name)) is not None:
                return values
            picture = decode(data, name, processor.num_channels, select=processor.bands)
            return replace(processor, bands=None).one(picture, name)
        except BeitJaxError as error:
            return str(error)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(h, w, c) of the pixel values; None where every image may have another size."""
        processor = self.processor
        size = processor.crop or (processor.resize if isinstance(processor.resize, tuple) else None)
        return None if size is None else (*size, processor.num_channels)


def batches(
    processor: ImageProcessor, groups: Iterable[Sequence[Stored]], *, size: int, workers: int, quick: bool = False
) -> Iterator[Batch]:
    """Yields a batch for every group of images, in order.

    Args:
        groups: at most `size` images each.
        workers: processes that prepare images; 0: a thread of this one.
        quick: as in `Preparing`.

    Raises:
        BeitJaxError: from iterating: images of a batch differ in size; a worker ended.
    """
    preparing = Preparing(processor, quick)
    each = min(size, PART) if workers else size
    slots = -(-max(1, AHEAD * workers) * each // size) + 2
    with (
        _shared(preparing.shape, slots * size, workers) as memory,
        _pool(preparing, workers, memory) as (pool, work),
    ):
        rows = None if memory is None else memory.mapped()
        waiting: deque[tuple[Sequence[str], list[Future[list[Prepared | None]]], np.ndarray | None]] = deque()
        for slot, group in enumerate(groups):
            first = slot % slots * size
            futures = [
                pool.submit(work, group[start : start + each], first + start) for start in range(0, len(group), each)
            ]
            waiting.append(
                ([image.name for image in group], futures, None if rows is None else rows[first : first + size])
            )
            if len(waiting) > slots - 2:
                yield _batch(*waiting.popleft(), size, preparing.shape)
        while waiting:
            yield _batch(*waiting.popleft(), size, preparing.shape)


def _batch(
    names: Sequence[str],
    futures: Sequence[Future[list[Prepared | None]]],
    pixels: np.ndarray | None,
    size: int,
    shape: tuple[int, int, int] | None,
) -> Batch:
    try:
        found = [prepared for future in futures for prepared in future.result()]
    except BrokenProcessPool:
        raise BeitJaxError(
            "a process that prepares images ended; check the memory, or run with --workers 0, then run again"
        ) from None
    arrays = [prepared for prepared in found if isinstance(prepared, np.ndarray)]
    shapes = sorted({array.shape[:2] for array in arrays})
    if len(shapes) > 1:
        sizes = ", ".join(f"{height}x{width}" for height, width in shapes[:4])
        raise BeitJaxError(f"images: expected all of one size, found {sizes}; resize or crop them")
    if pixels is None:
        pixels = np.empty((size, *(arrays[0].shape if arrays else shape or (1, 1, 1))), np.float32)
    for place, prepared in enumerate(found):
        if prepared is not None:
            pixels[place] = 0 if isinstance(prepared, str) else prepared
    pixels[len(found) :] = 0
    return Batch(names, pixels, [prepared if isinstance(prepared, str) else None for prepared in found])


# --- Memory that processes share --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Memory:
    """Where rows of pixel values lie, [rows, h, w, c] float32: in a file of memory of that process."""

    process: int
    file: int
    shape: tuple[int, ...]

    def mapped(self) -> Float32[np.ndarray, "rows h w c"] | None:
        """The rows; None where this process may not have them."""
        try:
            file = os.open(f"/proc/{self.process}/fd/{self.file}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return np.frombuffer(mmap.mmap(file, 4 * prod(self.shape)), np.float32).reshape(self.shape)
        finally:
            os.close(file)


@contextmanager
def _shared(shape: tuple[int, int, int] | None, rows: int, workers: int) -> Iterator[_Memory | None]:
    """Memory for that many images; None where there are no workers, or where the system has none to share by /proc."""
    if shape is None or not workers or not hasattr(os, "memfd_create") or not os.path.isdir("/proc/self/fd"):
        yield None
        return
    file = os.memfd_create("beit-jax")  # it has no name, so a process that is killed leaves nothing behind
    try:
        os.ftruncate(file, 4 * rows * prod(shape))
        yield _Memory(os.getpid(), file, (rows, *shape))
    finally:
        os.close(file)


# --- Workers ----------------------------------------------------------------------------------------------------------

_work: "_Work | None" = None  # of this process, if it is a worker


@dataclass(frozen=True)
class _Work:
    preparing: Preparing
    rows: Float32[np.ndarray, "rows h w c"] | None

    def __call__(self, images: Sequence[Stored], row: int) -> list[Prepared | None]:
        """Prepares images, from this row of the shared memory on: None stands for what is there."""
        found: list[Prepared | None] = []
        for place, image in enumerate(images, row):
            prepared: Prepared | None = self.preparing.one(image)
            if self.rows is not None and isinstance(prepared, np.ndarray):
                self.rows[place] = prepared
                prepared = None
            found.append(prepared)
        return found


@contextmanager
def _pool(preparing: Preparing, workers: int, memory: _Memory | None) -> Iterator[tuple[Executor, Any]]:
    """Who prepares, and the function that does."""
    if workers:
        pool: Executor = ProcessPoolExecutor(workers, get_context("spawn"), _start, (preparing, memory))
        work: Any = _prepare
    else:
        pool, work = ThreadPoolExecutor(1), _Work(preparing, None)
    try:
        yield pool, work
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(preparing: Preparing, memory: _Memory | None) -> None:
    """Starts a worker: it leaves signals to the parent, and ends as soon as the parent has ended."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = _Work(preparing, None if memory is None else memory.mapped())


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare(images: Sequence[Stored], row: int) -> list[Prepared | None]:
    assert _work is not None
    return _work(images, row)
