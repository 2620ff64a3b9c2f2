"""Ends a run in good order: after a signal, by saving; after a hang, by printing where each thread hangs."""

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from beit_jax.terminal import say

from ..distributed.peers import HUNG

INTERRUPTED = 75
"""Exit code of a run that a signal ended: start it again to go on (sysexits' EX_TEMPFAIL)."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PHASES: Mapping[str, float] = {"compile": 4.0, "restore": 4.0}
"""Factors by which the patience is longer in a phase; 1 for phases that are not named."""


class Interruption:
    """Turns SIGTERM and SIGINT (Ctrl-C) into requests to stop, inside a ``with`` block of the main thread.

    In another thread, as that of a notebook's executor, the block changes nothing: only the main thread gets signals.

    The first signal calls `request`: the loop saves after its step, and exits with `INTERRUPTED`. The second signal
    calls `again`, and ends the process at once with the same code, also during compilation or while waiting for a
    device: a thread of its own notices signals.

    Args:
        request, again: called in that thread with the name of the signal.
    """

    def __init__(self, request: Callable[[str], None], again: Callable[[str], None] = lambda name: None) -> None:
        self._request, self._again = request, again
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python runs signal handlers only between two of its own instructions, not while it waits for a compiler. But
        # it writes the number of a signal to this pipe at once.
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, name="interruption", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            self._before[number] = signal.signal(number, lambda number, frame: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _count(self) -> None:
        came = 0
        while byte := os.read(self._read, 1):
            if byte[0] not in SIGNALS:
                continue
            came += 1
            name = signal.Signals(byte[0]).name
            if came > 1:
                say(f"{name} again: stopping at once, nothing is saved")
                report = threading.Thread(target=self._again, args=(name,), daemon=True)
                report.start()
                report.join(2.0)  # seconds; the network may be what hangs
                os._exit(INTERRUPTED)
            say(f"{name}: saving after this step, then stopping; once more stops at once")
            self._request(name)


class Watchdog:
    """Ends a process that hangs: prints the stacks of all threads and exits with `HUNG`.

    The loop calls `beat` after every step and every batch of an evaluation. Time in which the whole process is stopped
    (SIGSTOP, a suspended machine) does not count.

    Args:
        minutes: the longest time between two beats.
        phases: factors of that time, by name of a phase.
        hung: called with the minutes, after the stacks are printed.
    """

    def __init__(
        self,
        minutes: float,
        phases: Mapping[str, float] = PHASES,
        hung: Callable[[float], None] = lambda minutes: None,
    ) -> None:
        self._patience, self._phases, self._hung = 60.0 * minutes, phases, hung
        self.phase_name, self.beats = "step", 0
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
        """Reports progress."""
        self.beats += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Gives the block the patience of the phase `name`. Entering and leaving the block are beats."""
        before, self.phase_name = self.phase_name, name
        self.beat()
        try:
            yield
        finally:
            self.phase_name = before
            self.beat()

    def _watch(self) -> None:
        pause = min(10.0, self._patience / 20)
        silent, seen = 0.0, self.beats
        while not self._stop.wait(pause):
            silent, seen = (silent + pause, seen) if seen == self.beats else (0.0, self.beats)
            if silent >= self._patience * self._phases.get(self.phase_name, 1.0):
                say(f"no progress for {silent / 60:.2g} minutes (phase: {self.phase_name}); the stacks of all threads:")
                faulthandler.dump_traceback(2, all_threads=True)
                self._hung(silent / 60)
                os._exit(HUNG)
