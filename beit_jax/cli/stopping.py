"""SIGINT (Ctrl-C) and SIGTERM end a command by an exception, so that its `finally` blocks clean up."""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Final, Self

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
AGAIN: Final = 0.05  # seconds until a lost signal is sent again
IMPORTING: Final = "<frozen importlib._bootstrap>"  # the file of Python's code that imports
HASTE: Final = 1.0  # seconds in which a second signal is the same wish


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Attributes:
        exit_code: as shells report the signal: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class Stoppable:
    """Raises `Stopped` in the main thread when a signal comes, inside a ``with`` block. Other threads get no signals.

    Python drops an exception that is raised while a callback of the garbage collector or a `__del__` runs: JAX has such
    a callback, and starting JAX collects often. An exception within an import may pass through C++, which ends the
    process by a fault. A signal that comes in such a moment is sent again. A second signal, a second after the first,
    ends the process at once.

    Args:
        alone: this process is the command's own. It keeps no handlers afterwards: a signal while Python ends writes no
            traceback then.

    Attributes:
        exit_code: 0, or what a signal demands that came and was lost for good: a library may catch all exceptions.
    """

    def __init__(self, *, alone: bool) -> None:
        self.exit_code = 0
        self._alone, self._came = alone, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._dropped
            self._before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if self._alone else handler)
            sys.unraisablehook = self._hook_before

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            if time.monotonic() - self._came > HASTE:
                os._exit(self.exit_code)
        elif _importing(frame):
            _send_again(number)
        else:
            self.exit_code, self._came = 128 + number, time.monotonic()
            raise Stopped(number)

    def _dropped(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, Stopped):
            self._hook_before(unraisable)
            return
        number, self.exit_code = self.exit_code - 128, 0
        _send_again(number)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where the main thread is."""
    while frame is not None and frame.f_code.co_filename != IMPORTING:
        frame = frame.f_back
    return frame is not None


def _send_again(number: int) -> None:
    again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
