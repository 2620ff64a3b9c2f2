"""What ends a process from outside: a signal, answered by saving, or a hang, answered by printing where it hangs."""

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
"""How many times the usual patience a phase gets; 1 where a phase is not named."""


class Interruption:
    """SIGTERM and SIGINT (Ctrl-C) as a request to save and stop, inside a ``with`` block of the main thread.

    The first signal calls `request`: the loop saves after its step, and exits with `INTERRUPTED`. The second calls
    `again` and ends the process at once with the same code, also while it compiles or waits for a device: signals are
    noticed by a thread of their own.

    Args:
        request, again: called with the signal's name, in that thread.
    """

    def __init__(self, request: Callable[[str], None], again: Callable[[str], None] = lambda name: None) -> None:
        self._request, self._again = request, again
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python runs handlers between two of its own instructions, not while it waits for a compiler; but it writes a
        # signal's number to this pipe the moment it comes.
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, name="interruption", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            self._before[number] = signal.signal(number, lambda number, frame: None)
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

    def _count(self) -> None:
        came = 0
        while byte := os.read(self._read, 1):
            if byte[0] not in SIGNALS:
                continue
            came += 1
            name = signal.Signals(byte[0]).name
            if came > 1:
                say(f"{name} again: stopping at once, nothing is saved")
                telling = threading.Thread(target=self._again, args=(name,), daemon=True)
                telling.start()
                telling.join(2.0)  # seconds; it may be the network that hangs
                os._exit(INTERRUPTED)
            say(f"{name}: saving after this step, then stopping; once more stops at once")
            self._request(name)


class Watchdog:
    """Ends a process that stands still: prints the stacks of all threads and exits with `HUNG`.

    The loop calls `beat` after every step and every batch of an evaluation. Time in which the whole process is stopped
    (SIGSTOP, a suspended machine) does not count.

    Args:
        minutes: patience between two beats.
        phases: by name, how many times that for what `phase` surrounds.
        hung: called with the minutes, once the stacks are printed.
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
        """Says that something was done."""
        self.beats += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Gives the block the patience of the phase `name`. Entering and leaving are beats."""
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
