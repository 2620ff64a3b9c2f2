"""Steps are called as early as the memory of their devices allows."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from beit_jax.train.loop import dispatch as of
from beit_jax.train.loop.dispatch import Dispatch


class Pending:
    """A result on its way, for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._due = time.perf_counter() + seconds

    def is_ready(self) -> bool:
        return time.perf_counter() >= self._due

    def block_until_ready(self) -> "Pending":
        while not self.is_ready():
            time.sleep(0.001)
        return self


class Program:
    """Its step takes some time, the first time more, and notes whether the one before had ended when it was called."""

    def __init__(self, platform: str, seconds: float) -> None:
        self.mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
        self.ended = list[bool]()
        self._seconds = seconds
        self._last: Pending | None = None

    def step(self, state: int, batch: Any) -> tuple[int, dict[str, Pending]]:
        self.ended += [] if self._last is None else [self._last.is_ready()]
        self._last = Pending(self._seconds if self.ended else 0.3)
        return state + 1, {"loss": self._last}


@pytest.mark.parametrize(
    ("platform", "seconds", "expected"),
    [
        ("cpu", 0.2, [True] * 4),
        ("tpu", 0.2, [False] * 4),
        ("gpu", 0.2, [False] * 4),
        ("cpu", 0.05, [True, True, False, False]),  # the first one compiles
    ],
)
def test_steps_wait_on_a_cpu_if_they_are_long(
    platform: str, seconds: float, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = list[bool]()
    monkeypatch.setattr(of, "SHORT", 0.1)
    monkeypatch.setattr(of.Heap, "settle", lambda heap: settled.append(True))
    program: Any = Program(platform, seconds)
    dispatch, state = Dispatch(program.step, program.mesh), 0
    for _ in range(5):
        state, _ = dispatch(state, {})  # type: ignore[assignment,arg-type]
    assert state == 5
    assert program.ended == expected
    assert len(settled) == sum(expected)
