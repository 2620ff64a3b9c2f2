"""Output of commands: lines, tables and progress bars for people, JSON for programs."""

import io
import json
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Self

from beit_jax.errors import BeitJaxError

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

_NUMBER = re.compile(r"-|[-+]?\d[\d.,]*(e[-+]?\d+)?( \w| %)?|")

# Seconds until the first line about work where there is no terminal: of so many bytes or images; of unknown length, as
# waiting for a network or a compiler. Then the most between two lines.
SILENCE, UNKNOWN_SILENCE, LONGEST_PAUSE = 15.0, 2.0, 60.0

Advance = Callable[[int], None]  # called with the work done since the last call, in bytes, records or images
Bar = AbstractContextManager[Advance]
Progress = Callable[[int], Bar]  # called with the total


def no_progress(total: int) -> Bar:
    """A progress bar that shows nothing."""
    return nullcontext(lambda done: None)


def say(text: str) -> None:
    """Writes a line to standard error, without Python's buffers: a thread that hangs may hold their lock."""
    os.write(2, f"{text}\n".encode())


@contextmanager
def standard_output(*, alone: bool) -> Iterator[None]:
    """Encloses a command that prints. Characters that standard output cannot have are escaped.

    Args:
        alone: this process is the command's own, and standard output is the command's.

    Raises:
        BeitJaxError: standard output is closed, before anything is done; or it cannot be written.
    """
    if sys.stdout is None:
        raise BeitJaxError("standard output is closed; send it to a file or to /dev/null")
    if alone and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    yield
    with _written():
        sys.stdout.flush()


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's last flush does not fail again
        raise BeitJaxError(f"standard output: {error.strerror}; send it elsewhere and run again") from error


def print_error(line: str) -> None:
    """Prints a line on standard error, if there is one."""
    if sys.stderr is not None:
        print(line, file=sys.stderr)


def print_lines(lines: Sequence[str]) -> None:
    """Prints lines on standard output."""
    with _written():
        for line in lines:
            print(line)


def print_json(value: Any) -> None:
    """Prints indented JSON on standard output."""
    print_lines([json.dumps(value, indent=2)])


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on standard output, as wide as its content needs: no cell is cut or wrapped, on any terminal.

    Columns of numbers, in which "-" stands for none, are aligned on the right.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(head)
    widths = [max(map(len, (title, *column))) for title, column in zip(head, columns, strict=True)]
    aligned = [str.rjust if column and all(map(_NUMBER.fullmatch, column)) else str.ljust for column in columns]
    print_lines(
        [
            "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
            for row in (head, ["-" * width for width in widths], *rows)
        ]
    )


def reader_left() -> bool:
    """True if standard output is a pipe whose reader has ended (`beit-jax list | head`). Further output is lost."""
    poll = select.poll()
    poll.register(1, 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's last flush finds no broken pipe
    return left


def byte_progress(total: int, description: str = "converting and verifying") -> Bar:
    """Progress in bytes, of which `total` is 0 if unknown: a bar on a terminal; elsewhere lines, if it takes long."""
    from rich.filesize import decimal
    from rich.progress import DownloadColumn

    silence = SILENCE if total else UNKNOWN_SILENCE
    return _bar(description, total, "bytes", DownloadColumn(), lambda speed: f"{decimal(int(speed))}/s", silence)


def image_progress(total: int, description: str = "segmenting", first: str | None = None) -> Bar:
    """Progress in images, with their rate and the time left: a bar on a terminal; elsewhere lines, if it takes long.

    Args:
        first: what happens until the first images are done, in the place of `description`: "compiling".
    """
    from rich.progress import MofNCompleteColumn

    silence = SILENCE if first is None else UNKNOWN_SILENCE
    return _bar(
        description, total, "images", MofNCompleteColumn(), lambda speed: f"{speed:,.2f} images/s", silence, first
    )


def turn_progress(total: int, description: str = "measuring", first: str | None = "starting") -> Bar:
    """Progress in turns of processes, as `image_progress` has it of images."""
    from rich.progress import MofNCompleteColumn

    silence = SILENCE if first is None else UNKNOWN_SILENCE
    return _bar(
        description, total, "turns", MofNCompleteColumn(), lambda speed: f"{speed:,.2f} turns/s", silence, first
    )


@contextmanager
def _bar(
    description: str,
    total: int,
    unit: str,
    done: "ProgressColumn",
    rate: Callable[[float], str],
    silence: float,
    first: str | None = None,
) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else rate(task.speed))

    console = Console(stderr=True)
    if not console.is_terminal:
        with _Lines(description, total, unit, first, silence, rate) as lines:
            yield lines.advance
        return
    # On a narrow terminal the rate gives way, not the bar and what is done.
    last = Rate(table_column=Column(no_wrap=True, ratio=1))
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), done, TimeRemainingColumn(), last
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(first or description, total=total or None)

        def advance(done: int) -> None:
            bar.update(task, advance=done, description=description)

        yield advance


class _Lines:
    """Progress as lines on standard error, which is no terminal. Work of less than `silence` seconds writes nothing.

    A thread writes the lines, because the work may be a single call that lasts: a compiler's.
    """

    def __init__(
        self, description: str, total: int, unit: str, first: str | None, silence: float, rate: Callable[[float], str]
    ) -> None:
        self._description, self._total, self._unit, self._first = description, total, unit, first
        self._silence, self._rate = silence, rate
        self._done = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def advance(self, done: int) -> None:
        self._done += done

    def _write(self) -> None:
        pause, began = self._silence, time.monotonic()
        while not self._stop.wait(pause):
            what = self._description if self._done or self._first is None else self._first
            done = f"{self._done:,} of {self._total:,} {self._unit} after " if self._total else ""
            passed = time.monotonic() - began
            say(f"{what}: {done}{passed:.0f} s{self._outlook(passed)}")
            pause = min(2 * pause, LONGEST_PAUSE)

    def _outlook(self, passed: float) -> str:
        """The rate so far, and the time left, where both can be told."""
        if not self._total or not self._done:
            return ""
        speed = self._done / passed
        left = (self._total - self._done) / speed
        for unit, seconds in (("h", 3600), ("min", 60)):
            if left >= 2 * seconds:
                return f", {self._rate(speed)}, {left / seconds:.0f} {unit} left"
        return f", {self._rate(speed)}, {left:.0f} s left"
