"""Phases of a run add up to all of its time; rates and shares follow from them."""

import json
from typing import Any

import pytest
from clock import Time
from hypothesis import given
from hypothesis import strategies as st

from beit_jax.train.loop.timing import PHASES, Clock, Timing, duration


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 86399, 2 * 86400 + 3661)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "23:59:59",
        "2 d 1:01:01",
    ]


def test_shares_and_rates() -> None:
    now = Time()
    clock = Clock(now)
    with clock.measure("compile", images=64):
        now.go(30.0)
    first = clock.interval()
    for _ in range(4):
        with clock.measure("input"):
            now.go(1.0)
        with clock.measure("step", images=64):
            now.go(6.0)
        now.go(1.0)  # nobody's
    with clock.measure("evaluation"):
        now.go(28.0)
        with clock.measure("checkpoint"):
            now.go(10.0)
    second = clock.interval()
    assert (first.total, first.share("compile"), first.images_per_second) == (30.0, 1.0, 0.0)
    assert second.seconds == {
        "input": 4.0,
        "step": 24.0,
        "compile": 0.0,
        "checkpoint": 10.0,
        "evaluation": 28.0,
        "other": 4.0,
    }
    assert (second.steps, second.images, second.images_per_second) == (4, 256, 8.0)
    assert second.share("step") == 24 / 70
    assert second.rates() == {"images_per_second": 8.0, "input_wait": 0.125}
    assert second.rates(flops_per_image=1e9, peak=4e10)["mfu"] == 0.2
    assert "mfu" not in second.rates(flops_per_image=1e9)
    assert clock.timing().total == 100.0
    assert clock.timing().lines() == [
        "8.0 images/s over 4 steps in 0:01:40",
        "  compile     30.0 %  0:00:30",
        "  evaluation  28.0 %  0:00:28",
        "  step        24.0 %  0:00:24",
        "  checkpoint  10.0 %  0:00:10",
        "  input        4.0 %  0:00:04",
        "  other        4.0 %  0:00:04",
    ]
    summary = json.loads(json.dumps(clock.timing().as_dict()))
    assert summary["seconds"] == {"total": 100.0} | dict(clock.timing().seconds)
    assert (summary["steps"], summary["images"], summary["images_per_second"]) == (4, 256, 8.0)


def test_a_step_that_fails_is_not_counted_but_its_time_is() -> None:
    now = Time()
    clock = Clock(now)
    with pytest.raises(KeyError), clock.measure("step", images=8):
        now.go(2.0)
        raise KeyError
    now.go(1.0)
    timing = clock.timing()
    assert (timing.steps, timing.images, timing.seconds["step"], timing.seconds["other"]) == (0, 0, 2.0, 1.0)


def test_before_anything_happened_nothing_divides_by_zero() -> None:
    timing = Clock(Time()).timing()
    assert timing == Timing(dict.fromkeys(PHASES, 0.0))
    assert timing.rates(1.0, 1.0) == {"images_per_second": 0.0, "input_wait": 0.0, "mfu": 0.0}
    assert timing.share("step") == 0.0


@given(
    st.recursive(
        st.integers(0, 1000),
        lambda inner: st.tuples(st.sampled_from(PHASES), st.lists(inner, max_size=4)),
        max_leaves=20,
    )
)
def test_all_time_belongs_to_one_phase_however_they_nest(plan: Any) -> None:
    now = Time()
    clock, expected = Clock(now), dict.fromkeys(PHASES, 0.0)

    def run(part: Any, phase: str) -> None:
        if isinstance(part, int):
            now.go(float(part))
            expected[phase] += part
            return
        with clock.measure(part[0]):
            for inner in part[1]:
                run(inner, part[0])

    run(plan, "other")
    assert clock.timing().seconds == expected
    assert clock.timing().total == now.seconds - 100.0
