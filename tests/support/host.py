"""`beit-jax` as one process of several, with a fault on the way.

Run as a script: ``host.py FAULT PROCESS STEP arguments of beit-jax...``. The fault happens in this process, before its
next step after STEP, and the time is printed when it does (``time.monotonic``, one clock for all processes of a
machine). With ``NO_PRIVATE_JAX`` in the environment, modules of beit_jax cannot import ``jax._src``.
"""

import builtins
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.train.loop import contract
from beit_jax.train.loop import run as loop

Batch = dict[str, np.ndarray]


def fail() -> None:
    raise BeitJaxError("the disk is on fire; put it out")


def crash() -> None:
    raise ZeroDivisionError("a fault of the program")


def hang() -> None:
    threading.Event().wait()


FAULTS: dict[str, Callable[[], object]] = {
    "fail": fail,
    "crash": crash,
    "hang": hang,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "term twice": lambda: [(os.kill(os.getpid(), signal.SIGTERM), time.sleep(1)) for _ in range(2)],
    "slow": lambda: None,
    "batch": lambda: None,
    "none": lambda: None,
}


def odd(batch: Batch) -> Batch:
    """One image less than the others read."""
    return {name: array[:-1] for name, array in batch.items()}


class Faulty:
    """Batches among which a fault waits."""

    def __init__(self, batches: Any, fault: str, step: int, first: int):
        self._batches, self._fault, self._when, self._step = batches, fault, step, first
        self.bad = batches.bad

    def __next__(self) -> Batch:
        batch: Batch = next(self._batches)
        if self._fault == "slow":
            time.sleep(0.5)
        if self._step == self._when:
            print(f"now {time.monotonic()}", flush=True)
            FAULTS[self._fault]()
            batch = odd(batch) if self._fault == "batch" else batch
        self._step += 1
        return batch


def with_fault(fault: str, step: int) -> None:
    """Runs of this process have it from now on."""
    begin = loop._Run.__post_init__

    def begin_with_fault(run: loop._Run) -> None:
        begin(run)
        run.batches = Faulty(run.batches, fault, step, run.step)  # type: ignore[assignment]

    loop._Run.__post_init__ = begin_with_fault  # type: ignore[method-assign]
    if fault == "code":
        contract.source_digest = lambda: "edited"


def refuse_private_jax() -> None:
    """From now on, modules of beit_jax cannot import from ``jax._src``."""
    found = builtins.__import__

    def refusing(name: str, globals: Any = None, *arguments: Any, **named: Any) -> Any:
        if name.startswith("jax._src") and str((globals or {}).get("__name__")).startswith("beit_jax"):
            raise ImportError(f"{name} is not there")
        return found(name, globals, *arguments, **named)

    builtins.__import__ = refusing


if __name__ == "__main__":
    if "NO_PRIVATE_JAX" in os.environ:
        refuse_private_jax()
    fault, process, step, *arguments = sys.argv[1:]
    if arguments[arguments.index("--hosts.process") + 1] == process:
        with_fault(fault, int(step))
    sys.exit(main(arguments))
