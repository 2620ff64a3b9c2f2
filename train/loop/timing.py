"""Where the time of a run goes: every second belongs to one phase; images per second, and the host that is slow."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from beit_jax.errors import printable

Now = Callable[[], float]
Phase = Literal["input", "step", "compile", "checkpoint", "evaluation", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
TRAINING: tuple[Phase, ...] = ("input", "step", "other")
"""The phases over which images per second are measured: those of training step after step."""


@dataclass(frozen=True)
class Timing:
    """The time of every phase.

    Attributes:
        seconds: by phase; their sum is all the time that passed.
        steps, images: the number of steps, and of their images, in the phase "step".
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
        """Images per second without compilation, checkpoints and evaluation; 0 before the first step."""
        seconds = sum(self.seconds[phase] for phase in TRAINING)
        return self.images / seconds if seconds > 0 else 0.0

    def share(self, phase: Phase) -> float:
        """The share of a phase in all the time, in [0, 1]."""
        return self.seconds[phase] / self.total if self.total > 0 else 0.0

    def rates(self, flops_per_image: float | None = None, peak: float | None = None) -> dict[str, float]:
        """Metrics to log: images per second, the share of training time spent waiting for input, and "mfu".

        Args:
            flops_per_image: FLOPs of a training step for one image, from `estimate.flops`.
            peak: FLOP/s of all devices together; without it, "mfu" is left out.
        """
        training = sum(self.seconds[phase] for phase in TRAINING)
        waited = self.seconds["input"] / training if training > 0 else 0.0
        rates = {"images_per_second": self.images_per_second, "input_wait": waited}
        if flops_per_image is not None and peak is not None:
            rates["mfu"] = self.images_per_second * flops_per_image / peak
        return rates

    def as_dict(self) -> dict[str, Any]:
        """The timing for JSON."""
        return {
            "seconds": {"total": self.total, **self.seconds},
            "steps": self.steps,
            "images": self.images,
            **self.rates(),
        }

    def lines(self) -> list[str]:
        """Lines for people: the rate, then every phase that took time."""
        rate = f"{self.images_per_second:,.1f} images/s over {self.steps:,} steps in {duration(self.total)}"
        phases = [
            f"  {phase:<10} {100 * self.share(phase):5.1f} %  {duration(self.seconds[phase])}"
            for phase in sorted(PHASES, key=lambda phase: -self.seconds[phase])
            if self.seconds[phase] > 0
        ]
        return [rate, *phases]


class Clock:
    """Measures the time of phases. At any time one phase is on; outside of all blocks it is "other".

    Args:
        now: returns seconds that never go back.
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
        """Adds the time of the block to `phase`. The time of a block inside it counts only for that block's phase.

        Args:
            images: the images of the training step in the block. They count if the block ends without an error and its
                phase is "step". A first step is in the phase "compile", and would falsify the rate.
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
        """The timing since the clock was made."""
        self._switch(self._phase)
        return Timing(dict(self._seconds), self._steps, self._images)

    def interval(self) -> Timing:
        """The timing since the last call."""
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


def straggler(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence about the host that makes the others wait; None if there is none. All hosts step together.

    Args:
        rows: for every process, its "host" and its seconds by phase; in the order of the processes.
    """
    if len(rows) < 2:
        return None
    waits = [Timing({phase: row[phase] for phase in PHASES}).rates()["input_wait"] for row in rows]
    slowest, usual = max(range(len(waits)), key=waits.__getitem__), statistics.median_low(waits)
    if waits[slowest] < 0.1 or waits[slowest] < 2 * usual:
        return None
    return (
        f"process {slowest} on {printable(rows[slowest]['host'])} waits for its images {waits[slowest]:.0%} of the "
        f"time, the median host {usual:.0%}: all others wait for it; look at its disk and processors"
    )
