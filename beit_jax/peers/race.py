"""Contenders taking turns: a process for each, in another order every round, the others asleep."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.peers.job import Job
from beit_jax.terminal import Advance

TURN = 1.5  # seconds that a contender computes before the next one does
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest output
PROCESS = (sys.executable, "-P", "-m", "beit_jax.peers.process")  # -P: a folder of the user's is no package
OURS = "ours"


class ContenderFailed(BeitJaxError):
    """A contender's process ended.

    Attributes:
        reason: the last line of its standard error.
        errors: all of it.
    """

    def __init__(self, contender: str, errors: str):
        self.errors = errors
        self.reason = printable((errors.strip().splitlines() or ["it ended without a word"])[-1], 240)
        super().__init__(f"{contender}: expected a forward pass, found that its process ended: {self.reason}")


class Contender:
    """A process that computes when it is told to.

    Attributes:
        ready: what it said when it was ready: seconds of the first call, and the peak of its memory in bytes.
        rounds: seconds of every call, by rounds.
    """

    def __init__(self, job: Job, stack: ExitStack, command: Sequence[str] | None = None):
        """Starts it and waits until it is ready.

        Args:
            stack: ends the process.
            command: what starts it, by default `PROCESS`; the job follows.

        Raises:
            ContenderFailed: it ended before it was ready.
        """
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "OMP_NUM_THREADS": str(job.threads),
            "HF_HUB_OFFLINE": "1",  # all of the model lies in the job's directory
        }
        self.errors = stack.enter_context(Path(job.output).with_suffix(".errors").open("w+", errors="replace"))
        self.process = stack.enter_context(
            subprocess.Popen(
                [*(command or PROCESS), job.encoded()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                env=environment,
            )
        )
        stack.callback(self.process.kill)
        self.job = job
        self.ready: dict[str, Any] = self._answer()
        self.calls, self.rounds = 1, list[list[float]]()
        self.calls = max(1, round(TURN / max(statistics.median(self._turn()), 1e-6)))

    def measure(self) -> None:
        """One turn.

        Raises:
            ContenderFailed: it ended.
        """
        self.rounds.append(self._turn())

    @property
    def medians(self) -> list[float]:
        """Seconds of a call, in every round."""
        return [statistics.median(taken) for taken in self.rounds]

    def _turn(self) -> list[float]:
        assert self.process.stdin
        try:
            os.write(self.process.stdin.fileno(), f"{self.calls}\n".encode())  # a buffer would fail again at its end
        except BrokenPipeError:
            raise self._failure() from None
        return list(self._answer())

    def _answer(self) -> Any:
        """The next line that is JSON: libraries print what they like."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise self._failure()

    def _failure(self) -> ContenderFailed:
        self.errors.seek(0)
        return ContenderFailed(self.job.contender, self.errors.read())


def take_turns(running: Sequence[Contender], rounds: int, done: Advance = lambda turns: None) -> None:
    """So many rounds, each beginning with the next contender.

    Args:
        done: called after every turn.

    Raises:
        ContenderFailed: one of them ended.
    """
    for number in range(rounds):
        first = number % len(running)
        for contender in [*running[first:], *running[:first]]:
            contender.measure()
            done(1)


def ratio_of(theirs: Sequence[float], mine: Sequence[float]) -> list[float]:
    """Least, median and largest ratio of the same round."""
    ratios = [one / other for one, other in zip(theirs, mine, strict=True)]
    return [min(ratios), statistics.median(ratios), max(ratios)]


def require_same(running: Mapping[str, Contender], what: str = "forward") -> float:
    """The largest difference of any outputs from ours, as a share of the largest of ours.

    Args:
        what: is computed, for the message.

    Raises:
        BeitJaxError: a contender's are further from ours than `TOLERANCE`.
    """
    mine, worst = np.load(running[OURS].job.output), 0.0
    for name, contender in running.items():
        found, limit = np.load(contender.job.output), TOLERANCE[contender.job.dtype]
        if contender.job.kind == "segment" and found.shape != mine.shape:
            found = np.moveaxis(found, -3, -1)
        if found.shape != mine.shape:
            raise BeitJaxError(
                f"{what}: {name} computes something else than ours: expected outputs of shape {mine.shape}, found "
                f"{found.shape}; times of different results say nothing"
            )
        share = float(np.abs(found - mine).max() / np.abs(mine).max())
        if not share <= limit:
            raise BeitJaxError(
                f"{what}: {name} computes something else than ours: expected at most {limit:.0e} of the largest output "
                f"between them, found {share:.1e}; times of different results say nothing"
            )
        worst = max(worst, share)
    return worst


def summary(running: Mapping[str, Contender]) -> dict[str, dict[str, Any]]:
    """What the rounds say of every contender.

    Returns:
        By name: "seconds" of a call, the median of its "rounds"; "ours_is_faster_by", see `ratio_of`; and what it said
        when it was ready.
    """
    mine = running[OURS].medians
    return {
        name: {
            "seconds": statistics.median(contender.medians),
            "rounds": contender.medians,
            "ours_is_faster_by": ratio_of(contender.medians, mine),
            **contender.ready,
        }
        for name, contender in running.items()
    }
