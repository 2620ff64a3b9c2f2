"""What ends a run from outside: a signal, answered by saving, or a hang, answered by printing where it hangs."""

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

INTERRUPTED = 75
"""Exit code of a run that a signal ended: start it again to go on (sysexits' EX_TEMPFAIL)."""
HUNG = 9
"""Exit code of a run that stood still."""
PHASES: Mapping[str, float] = {"compile": 4.0, "restore": 4.0}
"""How many times the usual patience a phase gets; 1 where a phase is not named."""

_STDERR = 2


class Interruption:
    """SIGTERM and SIGINT (Ctrl-C) as a request to save and stop, inside a ``with`` block of the main thread.

    The first signal sets `requested`; the loop asks `agreed` after every step, saves, and exits with `INTERRUPTED`. The
    second ends the process at once with the same code, also while it compiles or waits for a device: the signals are
    counted by a thread of their own.

    With several processes, SIGTERM belongs to JAX: its preemption service, started by `jax.distributed.initialize`,
    tells all hosts and makes them agree on the step to save. Its handler is left alone, and SIGINT is passed on to it.
    Hence a second SIGTERM does not end a process of several; a second SIGINT does.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether a signal came, in this process; with several processes ask `agreed` alone."""
        self._several = jax.process_count() > 1
        self._numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python runs handlers between two of its own instructions, not while it waits for a compiler; but it writes a
        # signal's number to this pipe the moment it comes.
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, name="interruption", daemon=True)
        self._thread.start()
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def agreed(self, step: int) -> bool:
        """Whether to save and stop after `step`. With several processes all must ask after every step, and all get the
        same answer."""
        if self._several:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _count(self) -> None:
        came = 0
        while byte := os.read(self._read, 1):
            if byte[0] not in self._numbers:
                continue
            came += 1
            name = signal.Signals(byte[0]).name
            if came > 1:
                _say(f"{name} again: stopping at once, nothing is saved")
                os._exit(INTERRUPTED)
            _say(f"{name}: saving after this step, then stopping; once more stops at once")


class Watchdog:
    """Ends a process that stands still: prints the stacks of all threads and exits with `HUNG`.

    The loop calls `beat` after every step and every batch of an evaluation. Time in which the whole process is stopped
    (SIGSTOP, a suspended machine) does not count.

    Args:
        minutes: patience between two beats.
        phases: by name, how many times that for what `phase` surrounds.
    """

    def __init__(self, minutes: float, phases: Mapping[str, float] = PHASES) -> None:
        self._patience, self._phases = 60.0 * minutes, phases
        self._phase, self._beats = "step", 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self) -> None:
        """Says that something was done."""
        self._beats += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Gives the block the patience of the phase `name`. Entering and leaving are beats."""
        before, self._phase = self._phase, name
        self.beat()
        try:
            yield
        finally:
            self._phase = before
            self.beat()

    def _watch(self) -> None:
        pause = min(10.0, self._patience / 20)
        silent, seen = 0.0, self._beats
        while not self._stop.wait(pause):
            silent, seen = (silent + pause, seen) if seen == self._beats else (0.0, self._beats)
            if silent >= self._patience * self._phases.get(self._phase, 1.0):
                _say(f"no progress for {silent / 60:.2g} minutes (phase: {self._phase}); the stacks of all threads:")
                faulthandler.dump_traceback(_STDERR, all_threads=True)
                os._exit(HUNG)


def _say(text: str) -> None:
    """One line to standard error, past Python's buffers: their lock may be held by whoever is interrupted or hangs."""
    os.write(_STDERR, f"{text}\n".encode())
