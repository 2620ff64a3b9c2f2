"""What a run tells: metrics as JSON lines and to TensorBoard, progress for people, and where its time went."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
from jaxtyping import UInt8

from beit_jax.atomic import new_file
from beit_jax.errors import BeitJaxError, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

METRICS, HOSTS, BOARD = "metrics.jsonl", "hosts.jsonl", "tensorboard"
Now = Callable[[], float]
Phase = Literal["input", "step", "compile", "checkpoint", "evaluation", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
TRAINING: tuple[Phase, ...] = ("input", "step", "other")
"""The phases that the rate of images is measured over: what training goes on with, step after step."""


# --- Time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Where time went.

    Attributes:
        seconds: by phase; together all the time there was.
        steps, images: done in the phase "step".
    """

    seconds: Mapping[Phase, float]
    steps: int = 0
    images: int = 0

    def __sub__(self, earlier: "Timing") -> "Timing":
        seconds = {phase: self.seconds[phase] - earlier.seconds[phase] for phase in PHASES}
        return Timing(seconds, self.steps - earlier.steps, self.images - earlier.images)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Without compilation, checkpoints and evaluation; 0 before the first step."""
        seconds = sum(self.seconds[phase] for phase in TRAINING)
        return self.images / seconds if seconds > 0 else 0.0

    def share(self, phase: Phase) -> float:
        """Of all the time, in [0, 1]."""
        return self.seconds[phase] / self.total if self.total > 0 else 0.0

    def rates(self, flops_per_image: float | None = None, peak: float | None = None) -> dict[str, float]:
        """Metrics to log: images per second, the share of training time spent waiting for input, and "mfu".

        Args:
            flops_per_image: of a training step, `estimate.flops`.
            peak: FLOP/s of all devices together; without it, utilisation is left out.
        """
        training = sum(self.seconds[phase] for phase in TRAINING)
        waited = self.seconds["input"] / training if training > 0 else 0.0
        rates = {"images_per_second": self.images_per_second, "input_wait": waited}
        if flops_per_image is not None and peak is not None:
            rates["mfu"] = self.images_per_second * flops_per_image / peak
        return rates

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seconds": {"total": self.total, **self.seconds},
            "steps": self.steps,
            "images": self.images,
            **self.rates(),
        }

    def lines(self) -> list[str]:
        """For people: the rate, then every phase that took time."""
        rate = f"{self.images_per_second:,.1f} images/s over {self.steps:,} steps in {duration(self.total)}"
        phases = [
            f"  {phase:<10} {100 * self.share(phase):5.1f} %  {duration(self.seconds[phase])}"
            for phase in sorted(PHASES, key=lambda phase: -self.seconds[phase])
            if self.seconds[phase] > 0
        ]
        return [rate, *phases]


class Clock:
    """Charges all time to one phase at a time; what nobody claims is "other".

    Args:
        now: seconds that never go back.
    """

    def __init__(self, now: Now = time.monotonic) -> None:
        self._now = now
        self._phase: Phase = "other"
        self._since = now()
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._steps = self._images = 0
        self._last = self.timing()

    @contextmanager
    def measure(self, phase: Phase, images: int = 0) -> Iterator[None]:
        """Charges the block to `phase`. A block inside is charged to its own phase alone.

        Args:
            images: of the training step that the block is; counted if it ends well and its phase is "step": a first
                step, whose time is the compiler's, would falsify the rate.
        """
        before = self._switch(phase)
        try:
            yield
            if phase == "step":
                self._steps += 1
                self._images += images
        finally:
            self._switch(before)

    def timing(self) -> Timing:
        """Everything since the clock was made."""
        self._switch(self._phase)
        return Timing(dict(self._seconds), self._steps, self._images)

    def interval(self) -> Timing:
        """Everything since the last call."""
        now, before = self.timing(), self._last
        self._last = now
        return now - before

    def _switch(self, phase: Phase) -> Phase:
        before, now = self._phase, self._now()
        self._seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before


def duration(seconds: float) -> str:
    """``h:mm:ss``, with days where there are any."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock


def straggler(hosts: Sequence[Mapping[str, Any]]) -> str | None:
    """The host that keeps the others waiting, in words, if there is one: they all wait in every step for the last.

    Args:
        hosts: "host" and seconds by phase of each, in the order of the processes.
    """
    if len(hosts) < 2:
        return None
    waits = [Timing({phase: row[phase] for phase in PHASES}).rates()["input_wait"] for row in hosts]
    slowest, usual = max(range(len(waits)), key=waits.__getitem__), statistics.median_low(waits)
    if waits[slowest] < 0.1 or waits[slowest] < 2 * usual:
        return None
    return (
        f"process {slowest} on {printable(hosts[slowest]['host'])} waits for its images {waits[slowest]:.0%} of the "
        f"time, the median host {usual:.0%}: all others wait for it; look at its disk and processors"
    )


# --- The log ----------------------------------------------------------------------------------------------------------


class Log:
    """The log of a run, a context manager.

    Metrics go, a JSON object per line, to ``metrics.jsonl``, where a killed process loses none that were written; and
    to TensorBoard's files under ``tensorboard/``. People see, on standard error, a line that keeps up with the run on a
    terminal, and a line per record elsewhere. All but the first process of a run do nothing.

    Args:
        directory: of the run; exists.
        total_steps: of the run.
        start_step: steps done before. Records of later steps, left by a process that was killed after it wrote them,
            are removed: these steps will be done again. At 0 the log starts empty.
        process_index: of this process among the hosts'.
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
                keep_until(self._path.with_name(HOSTS), self._start)
                self._file = stack.enter_context(_appending(self._path))
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
        """Records metrics of a step: those of training, which have a "loss", or others.

        Infinities and NaN, which JSON does not have, are null in the file.

        Raises:
            BeitJaxError: the file cannot be written; the disk is full, for example.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if self._file is not None:
            record = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._append(self._file, json.dumps({"step": step, **record}).encode() + b"\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._show(step, values)

    def hosts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records where the time of every host went since the last record; nothing for a run of one."""
        if rows and self._writes:
            with _appending(self._path.with_name(HOSTS)) as file:
                self._append(file, json.dumps({"step": step, "hosts": list(rows)}).encode() + b"\n")

    def picture(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Shows a picture in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def advance(self, step: int) -> None:
        """Moves the terminal's bar to `step` steps done; nothing elsewhere."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def note(self, text: str) -> None:
        """Shows a line, above the bar where there is one."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _append(self, file: FileIO, line: bytes) -> None:
        """Past all buffers: what a failed write left in one would fail again when the file is closed."""
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as error:
            raise BeitJaxError(
                f"{file.name}: cannot be written ({error.strerror}); free space and start the run again"
            ) from None

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        self.advance(step)
        if self._bar is None or "loss" not in metrics:
            self.note(f"step {step:,}/{self._total:,}  {describe(metrics, self._eta(step))}")
        else:
            self._bar.update(self._bar.task_ids[0], description=describe(metrics, self._eta(step)))

    def _eta(self, step: int) -> float | None:
        """Seconds left, if everything since the start goes on as it did; None before the first step."""
        done = step - self._start
        return (self._now() - self._began) / done * (self._total - step) if done > 0 else None


def describe(metrics: Mapping[str, float], eta: float | None = None) -> str:
    """Metrics in one line: those of training first and in words, then all others by their names.

    Args:
        eta: seconds left; shown with training's metrics, which have a "loss".
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


def keep_until(path: Path, step: int) -> None:
    """Removes the records after `step` from a file of them, and a last line that a killed process left unfinished.

    At step 0 nothing is kept.

    Raises:
        BeitJaxError: a finished line is no record, naming the line.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    finished = [(number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]
    kept = [line for number, line in finished if _record_of(path, number, line)["step"] <= step] if step else []
    if kept != lines:
        with new_file(path) as partial:
            partial.write_bytes(b"".join(kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a file that a `Log` wrote, in its order; NaN stands for what was not finite.

    A last line that is not finished is passed over: the run goes on, or was killed.

    Raises:
        BeitJaxError: the file cannot be read, or a finished line is no record of numbers, naming the line.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise BeitJaxError(
            f"{printable(path)}: cannot be read ({error.strerror}); give the directory of a run, which has a {METRICS}"
        ) from None
    return [_numbers(path, number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


_LARGEST = float(np.finfo(np.float64).max)  # integers of JSON have no bounds


def _numbers(path: Path, number: int, line: bytes) -> dict[str, float]:
    record = _record_of(path, number, line)
    for name, value in record.items():
        if value is not None and (type(value) not in (int, float) or not abs(value) <= _LARGEST):
            raise BeitJaxError(
                f"{printable(path)}: line {number}: {printable(name)}: expected a number or null, found "
                f"{printable(json.dumps(value), 40)}; repair or remove the line"
            )
    return {name: math.nan if value is None else float(value) for name, value in record.items()}


def _record_of(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise BeitJaxError(
            f'{printable(path)}: line {number}: expected a JSON object with a "step"; move the file away'
        )
    return record


def _appending(path: Path) -> FileIO:
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise BeitJaxError(f"{path}: cannot be written ({error.strerror}); choose another directory") from None


def _board(path: Path, start_step: int) -> Any:
    """TensorBoard's files. What an earlier process wrote for the steps that will be done again is hidden."""
    try:
        writer = import_module("tensorboardX")
    except ModuleNotFoundError:
        raise BeitJaxError("tensorboardX is not installed; pip install 'beit-jax[train]'") from None
    return writer.SummaryWriter(
        str(path),
        purge_step=start_step + 1 if start_step else 0,
        # Its own names differ by the second only, and a file of the same name would be emptied.
        filename_suffix=f".{start_step}.{os.getpid()}",
    )


def _standard_error() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _bar(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), console=console
    )
