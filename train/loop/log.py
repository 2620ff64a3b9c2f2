"""Reports of a run: metrics as JSON lines and in TensorBoard, and progress on the terminal."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import UInt8

from beit_jax.errors import BeitJaxError

from .metrics_file import METRICS, append, keep_until, open_to_append
from .timing import Now, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

HOST_TIMES, BOARD = "hosts.jsonl", "tensorboard"


class Log:
    """The log of a run, a context manager. Only process 0 writes and shows anything.

    Metrics are written to ``metrics.jsonl``, a JSON object per line; a process that is killed loses none of them. They
    are also written to TensorBoard's files under ``tensorboard/``. Standard error shows a progress bar on a terminal,
    and otherwise a line per record.

    Args:
        directory: of the run; exists.
        total_steps: of the run.
        start_step: steps done before. Records of later steps, left by a process that was killed after it wrote them,
            are removed: these steps will be done again. At 0 the log starts empty.
        process_index: the number of this process in the run.
        quiet: whether to show nothing.
        tensorboard: whether to write TensorBoard's files.
        console: where to show; by default standard error.
        now: seconds that never go back.

    Raises:
        BeitJaxError: a file cannot be written, an earlier log is damaged, or tensorboardX is not installed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        process_index: int = 0,
        quiet: bool = False,
        tensorboard: bool = True,
        console: "Console | None" = None,
        now: Now = time.monotonic,
    ) -> None:
        self._path, self._board_path = directory / METRICS, directory / BOARD
        self._total, self._start, self._now = total_steps, start_step, now
        self._writes, self._shows = process_index == 0, process_index == 0 and not quiet
        self._tensorboard, self._given_console = tensorboard, console
        self._file: FileIO | None = None
        self._board: Any = None
        self._console: Console | None = None
        self._bar: Progress | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._writes:
                keep_until(self._path, self._start)
                keep_until(self._path.with_name(HOST_TIMES), self._start)
                self._file = stack.enter_context(open_to_append(self._path))
                self._board = stack.enter_context(_board(self._board_path, self._start)) if self._tensorboard else None
            if self._shows:
                self._console = self._given_console or _standard_error()
                self._bar = stack.enter_context(_bar(self._console)) if self._console.is_terminal else None
            if self._bar is not None:
                self._bar.add_task("", total=self._total, completed=self._start)
            self._stack = stack.pop_all()
        self._began = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step: those of training, which have a "loss", or others.

        Infinities and NaN, which JSON does not have, become null in the file.

        Raises:
            BeitJaxError: the file cannot be written; the disk is full, for example.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if self._file is not None:
            record = {name: value if math.isfinite(value) else None for name, value in values.items()}
            append(self._file, {"step": step, **record})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._show(step, values)

    def host_times(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records the time of every host since the last record. With one process there are no rows, and no record."""
        if rows and self._writes:
            with open_to_append(self._path.with_name(HOST_TIMES)) as file:
                append(file, {"step": step, "hosts": list(rows)})

    def picture(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Shows a picture in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def compiling(self, step: int) -> None:
        """Says that the program of this step, the first of this process, is compiled."""
        if self._bar is None:
            self.note(f"step {step:,}/{self._total:,}  compiling")
        else:
            self._bar.update(self._bar.task_ids[0], description="compiling")

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`, where there is one."""
        if self._bar is not None:
            bar = self._bar.tasks[0]
            self._bar.update(bar.id, completed=step, description=bar.description.removeprefix("compiling"))

    def note(self, text: str) -> None:
        """Shows a line, above the progress bar where there is one."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        self.advance(step)
        if self._bar is None or "loss" not in metrics:
            self.note(f"step {step:,}/{self._total:,}  {describe(metrics, self._eta(step))}")
        else:
            self._bar.update(self._bar.task_ids[0], description=describe(metrics, self._eta(step)))

    def _eta(self, step: int) -> float | None:
        """Seconds left at the average speed since the start; None before the first step."""
        done = step - self._start
        return (self._now() - self._began) / done * (self._total - step) if done > 0 else None


def describe(metrics: Mapping[str, float], eta: float | None = None) -> str:
    """Metrics in one line: those of training first and in words, then the others by name.

    Args:
        eta: seconds left; shown only with the metrics of training, which have a "loss".
    """
    worded = {name: show(metrics[name]) for name, show in _WORDS.items() if name in metrics}
    if "loss" in metrics and eta is not None:
        worded["eta"] = f"ETA {duration(eta)}"
    others = [f"{name} {value:.4g}" for name, value in metrics.items() if name not in _WORDS]
    return "  ".join([word for word in worded.values() if word] + others)


_WORDS: Mapping[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "images_per_second": lambda value: f"{value:,.1f} images/s",
    "mfu": lambda value: f"MFU {100 * value:.1f} %",
    "input_wait": lambda value: f"input wait {100 * value:.0f} %",
    "skipped": lambda value: f"{value:.0f} skipped" if value else "",
}


def _board(path: Path, start_step: int) -> Any:
    """A writer of TensorBoard's files. It hides what an earlier process wrote for steps that are done again."""
    try:
        writer = import_module("tensorboardX")
    except ModuleNotFoundError:
        raise BeitJaxError("tensorboardX is not installed; pip install 'beit-jax[train]'") from None
    return writer.SummaryWriter(
        str(path),
        purge_step=start_step + 1 if start_step else 0,
        # Without a suffix, names differ only by the second, and a file of the same name would be emptied.
        filename_suffix=f".{start_step}.{os.getpid()}",
    )


def _standard_error() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _bar(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    # On a narrow terminal the end of the metrics gives way, not the bar and the step.
    metrics = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
    return Progress(BarColumn(bar_width=20), MofNCompleteColumn(), metrics, console=console, expand=True)
