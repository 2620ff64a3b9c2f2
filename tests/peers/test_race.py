"""Processes that take turns: what they answer, in which order, and what happens when one fails or differs."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_contenders

from beit_jax.errors import BeitJaxError
from beit_jax.peers import race
from beit_jax.peers.job import Job
from beit_jax.peers.race import Contender, ContenderFailed


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(race, "TURN", 0.02)
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, directory: Path, *names: str, **options: Any) -> dict[str, Contender]:
    return {
        name: Contender(
            Job(name, "forward", str(directory), str(directory / f"{number}.npy"), threads=1, **options),
            stack,
            toy_contenders.PROCESS,
        )
        for number, name in enumerate(names)
    }


def test_ratios_are_of_the_others_time_by_ours(stack: ExitStack, tmp_path: Path) -> None:
    running = start(stack, tmp_path, "ours", "transformers, sdpa")  # 2 and 10 ms
    assert race.require_same(running) == 0.0
    turns: list[int] = []
    race.take_turns(list(running.values()), 3, turns.append)
    assert turns == [1] * 6
    found = race.summary(running)
    assert found["ours"]["ours_is_faster_by"] == [1.0, 1.0, 1.0] and len(found["ours"]["rounds"]) == 3
    rounds = [found[name]["rounds"] for name in running]
    assert min(rounds[0]) >= 0.002 and min(rounds[1]) >= 0.010  # a machine with other work takes longer
    assert [found[name]["seconds"] for name in running] == [sorted(one)[1] for one in rounds]
    ratios = sorted(theirs / ours for ours, theirs in zip(*rounds, strict=True))
    low, middle, high = found["transformers, sdpa"]["ours_is_faster_by"]
    assert [low, middle, high] == pytest.approx(ratios)
    assert all(row["peak_bytes"] > 1e6 and row["first_call_seconds"] >= 0.002 for row in found.values())
    stack.close()
    assert all(contender.process.returncode is not None for contender in running.values())


def test_every_round_begins_with_the_next() -> None:
    order: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.measure = lambda: order.append(name)

    race.take_turns([Recorder(name) for name in "abc"], 4)  # type: ignore[misc]
    assert "".join(order) == "abcbcacababc"


def test_the_processor_does_not_work_while_it_sleeps(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "TURN", 0.001)
    (contender,) = start(stack, tmp_path, "transformers, sdpa", cpu_time=True).values()
    contender.measure()
    assert contender.medians[0] < 0.005  # of 10 ms by the clock


def test_calls_that_depend_on_each_other_are_kept_in_order(stack: ExitStack, tmp_path: Path) -> None:
    (contender,) = start(stack, tmp_path, "counting", outputs=2).values()
    assert np.load(contender.job.output).tolist() == [1, 2]


def test_what_libraries_print_is_passed_over(stack: ExitStack, tmp_path: Path) -> None:
    (contender,) = start(stack, tmp_path, "talking").values()
    contender.measure()
    assert contender.medians[0] >= 0.001


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("onnxruntime", r"at most 1e-04 of the largest output between them, found 5\.0e-02"),
        ("openvino", r"expected outputs of shape \(1, 2\), found \(1, 3\)"),
    ],
)
def test_who_computes_something_else_is_refused(other: str, said: str, stack: ExitStack, tmp_path: Path) -> None:
    running = start(stack, tmp_path, "ours", other)
    with pytest.raises(BeitJaxError, match=f"{other} computes something else than ours: .*{said}"):
        race.require_same(running)


def test_a_contender_that_does_not_start_says_why(stack: ExitStack, tmp_path: Path) -> None:
    with pytest.raises(ContenderFailed, match=r"timm: .* RuntimeError: no compiler here$") as failed:
        start(stack, tmp_path, "timm")
    assert failed.value.reason == "RuntimeError: no compiler here"
    assert "Traceback" in failed.value.errors and "\n" not in str(failed.value)


def test_a_contender_that_ends_on_the_way_ends_the_race(stack: ExitStack, tmp_path: Path) -> None:
    running = start(stack, tmp_path, "ours", "leaving")
    with pytest.raises(ContenderFailed, match=r"leaving: .* out of memory$"):
        race.take_turns(list(running.values()), 3)
    with pytest.raises(ContenderFailed):  # nobody reads any more
        running["leaving"].measure()
