"""The best evaluation of a run, by one score, and how long ago it was: what is kept beside the last, and when to stop.

The run's log has the scores of every evaluation, so nothing else is stored: a run that goes on reads them again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from beit_jax.errors import BeitJaxError, printable

from ..evaluation.mean_loss import VALIDATION_LOSS
from ..recipe import RunOptions

LOWER_IS_BETTER = ("loss", "mae", "mse")
"""Ends of the names of scores that are better when they are lower. All other scores are better when they are higher."""
TRAINED = "skipped"
"""A metric of every record of training, and of no evaluation's."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        score: the name of the score.
        value: None before the first that is a number.
        step: after which it was found; 0 before.
        since: evaluations after it, none of which was better.
    """

    score: str
    direction: Literal["lower", "higher"]
    value: float | None = None
    step: int = 0
    since: int = 0

    def after(self, step: int, value: float) -> "Best":
        """The best after one more evaluation. An equal value is no improvement, and neither is NaN or an infinity."""
        old = self.value
        if math.isfinite(value) and (old is None or (value < old if self.direction == "lower" else value > old)):
            return Best(self.score, self.direction, value, step)
        return Best(self.score, self.direction, old, self.step, self.since + 1)

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.score}: no evaluation gave a number"
        return f"{self.score} {self.value:.4f} after step {self.step:,}"

    def as_dict(self) -> dict[str, Any]:
        """For programs, and for the checkpoint's record of where it comes from."""
        return {"score": self.score, "better": self.direction, "value": self.value, "step": self.step}


def watched(options: RunOptions, names: Sequence[str]) -> Best | None:
    """The score that a run watches, before its first evaluation; None if it watches none.

    Args:
        names: the scores of the run's evaluations; the first is the one to compare runs by. Empty: it has none.

    Raises:
        BeitJaxError: no evaluation has the score that is asked for, or an option that nothing reads.
    """
    if options.best is None and options.patience is None:
        if options.best_is is not None:
            raise BeitJaxError("--run.best-is: expected a score, --run.best, whose better values it names; found none")
        return None
    if not names:
        option = "--run.best" if options.best is not None else "--run.patience"
        raise BeitJaxError(
            f"{option}: this run evaluates nothing; prepare data with a validation split, or leave it out"
        )
    name = names[0] if options.best is None else VALIDATION_LOSS if options.best == "loss" else options.best
    if name not in names:
        raise BeitJaxError(
            f"--run.best: expected a score of this run, {', '.join(names)}; found {printable(options.best)}"
        )
    lower = name.endswith(LOWER_IS_BETTER)
    return Best(name, options.best_is or ("lower" if lower else "higher"))


def replayed(best: Best, records: Iterable[Mapping[str, float]]) -> Best:
    """The best after the evaluations of a log."""
    seen = set()
    for record in evaluations(records):
        step = int(record["step"])
        if best.score in record and step not in seen:  # a run that is started after its end evaluates once more
            best = best.after(step, record[best.score])
            seen.add(step)
    return best


def evaluations(records: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The records of a log that are evaluations. A training record may have a metric of the same name as a score."""
    return [record for record in records if TRAINED not in record]
