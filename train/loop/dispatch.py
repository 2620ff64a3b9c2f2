"""Calls of a run's step, one after the other: as early as the memory of its devices allows."""

import time
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from beit_jax.memory import Heap

from ..step.state import State

SHORT = 0.2
"""Seconds. The temporaries of steps that take less are small, and waiting between such steps costs a hundredth."""


class Dispatch:
    """Calls a program's compiled step.

    A step on a GPU or TPU is called while the one before is computed, and waits for it there. On a CPU it is called
    when the one before has ended and freed its temporaries: XLA would allocate those of a waiting step at once. BEiT-B
    and eight images take 3 GB so, and took 5 to 9.
    """

    def __init__(self, step: jax.stages.Wrapped, mesh: Mesh) -> None:
        self._step = step
        self._waits = mesh.devices.flat[0].platform == "cpu"
        self._before: Mapping[str, jax.Array] | None = None
        self._began = 0.0
        self._heap = Heap()

    def __call__(self, state: State, batch: Mapping[str, jax.Array]) -> tuple[State, Mapping[str, jax.Array]]:
        """The step's state and metrics, which may be on their way; the state that is given is used up."""
        if self._waits and self._before is not None:
            self._await_memory(self._before)
        self._began = time.perf_counter()
        state, self._before = self._step(state, batch)
        return state, self._before

    def _await_memory(self, before: Mapping[str, jax.Array]) -> None:
        """Waits for the step before, and for XLA to free its temporaries, some ms after it has told of the results."""
        jax.block_until_ready(before)
        took = time.perf_counter() - self._began
        time.sleep(min(0.01, took / 100))
        self._heap.settle()
        self._waits = took > SHORT
