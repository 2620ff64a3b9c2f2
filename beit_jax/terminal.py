"""Output of commands: lines, tables and progress bars for people, JSON for programs."""

import json
import os
import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

Advance = Callable[[int], None]  # called with the work done since the last call, in bytes, records or images
Bar = AbstractContextManager[Advance]
Progress = Callable[[int], Bar]  # called with the total


def no_progress(total: int) -> Bar:
    """A progress bar that shows nothing."""
    return nullcontext(lambda done: None)


def say(text: str) -> None:
    """Writes a line to standard error, without Python's buffers: a thread that hangs may hold their lock."""
    os.write(2, f"{text}\n".encode())


def print_lines(lines: Sequence[str]) -> None:
    """Prints lines on standard output."""
    print("\n".join(lines))


def print_json(value: Any) -> None:
    """Prints indented JSON on standard output."""
    print(json.dumps(value, indent=2))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on standard output, as wide as its content needs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in file names are no markup
    console = Console()
    console.print(table, width=None if console.is_terminal else 200)  # a pipe has no width, and nothing may be cut


def reader_left() -> bool:
    """True if standard output is a pipe whose reader has ended (`beit-jax list | head`). Further output is lost."""
    poll = select.poll()
    poll.register(1, 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's last flush finds no broken pipe
    return left


def byte_progress(total: int) -> Bar:
    """A progress bar in bytes, on a terminal; elsewhere nothing is shown."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _bar("converting and verifying", total, DownloadColumn(), TransferSpeedColumn())


def image_progress(total: int, description: str = "segmenting") -> Bar:
    """A progress bar in images, with their rate and the time left, on a terminal; elsewhere nothing is shown."""
    from rich.progress import MofNCompleteColumn, ProgressColumn, Task
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.2f} images/s")

    return _bar(description, total, MofNCompleteColumn(), Rate())


@contextmanager
def _bar(description: str, total: int, *columns: "ProgressColumn") -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, advance=done)
