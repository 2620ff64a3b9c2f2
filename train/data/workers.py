"""Batches made ahead of time, by a thread of this process or by worker processes."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Final

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from beit_jax.errors import BeitJaxError, printable

Batch = dict[str, np.ndarray]

_AHEAD: Final = 4  # batches that a thread of this process is ahead


def default_workers() -> int:
    """The number of worker processes by default: half of the cores that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores // 2)


class BatchStream(Iterator[Batch]):
    """Grain's batches, made ahead of time by a thread or by worker processes.

    Every failure becomes one line and ends the stream.

    Args:
        batches: Grain's data set of batches.
        workers: as `DataOptions.workers`.
        directory: of the data set, for errors.
    """

    def __init__(self, batches: Any, workers: int | None, directory: Path):
        if workers is not None and workers < 0:
            raise BeitJaxError(f"workers {workers}: expected at least 0")
        self._directory = directory
        self._batches = iter(_ahead(batches, default_workers() if workers is None else workers))

    def __next__(self) -> Batch:
        if self._batches is None:
            raise BeitJaxError(f"{printable(self._directory)}: reading has ended; open the batches anew")
        try:
            return {name: _unnamed(array) for name, array in next(self._batches).items()}
        except BeitJaxError:
            self.close()
            raise
        except RuntimeError as error:
            with suppress(AssertionError):  # Grain's: a process that did not start cannot be ended
                self.close()
            if "bootstrapping" in str(error):  # multiprocessing's: a worker imports the script, which starts workers
                raise BeitJaxError(
                    'processes that read images import the script: put `if __name__ == "__main__":` before its '
                    "statements, or read without processes (workers 0)"
                ) from error
            hint = "check the storage, the memory, /dev/shm and `ulimit -n`, then run again"
            raise BeitJaxError(f"{printable(self._directory)}: {printable(error)}; {hint}") from error

    def close(self) -> None:
        """Ends the workers. Grain complains about iterators that still exist when the interpreter exits."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()


def _unnamed(array: np.ndarray) -> np.ndarray:
    """Takes its name from a worker's shared memory, which then lives as long as the array and no longer.

    Grain takes the name when the array is collected. An array that still exists when the process ends, because JAX or
    an iterator holds it, would be reported as leaked, and a process that is killed would leave it behind.
    """
    if isinstance(array, SharedMemoryArray) and array.shm is not None:
        array.shm.unlink()
        array._unlink_on_del = False
    return array


def _ahead(batches: Any, workers: int) -> Any:
    if workers == 0:
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD))
    if not flags.FLAGS.is_parsed():  # Grain reads its flags, but only programs of absl parse them
        flags.FLAGS.mark_as_parsed()
    in_order = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # One finished batch per worker: Grain holds another one in the parent, and an ImageNet batch takes 150 MB.
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return in_order.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(index: int, count: int) -> None:
    """Ignores signals, because the parent finishes its step and saves; ends as soon as the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
