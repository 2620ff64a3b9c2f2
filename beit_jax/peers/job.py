"""What a process is told to compute, again and again."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Call: TypeAlias = Callable[[], Any]
"""Does it once and returns the result, complete."""
INPUTS = "inputs.npz"


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        contender: who does it, a name in the table of `beit_jax.peers.process.serve`.
        kind: of `beit_jax.peers.needs.KINDS`: "forward" (classification) or "segment"; another table may have more.
        directory: holds the same weights as ``native``, ``hf`` and ``timm``, and ``inputs.npz``.
        output: file for what the first calls gave, in NumPy's format.
        dtype: of products, "float32" or "bfloat16".
        threads: how many cores compute.
        accelerator: whether to run on a GPU.
        cpu_time: whether seconds are those that the processor worked for this process, not those of the clock.
        outputs: how many calls are the first ones: more than one where a call depends on the one before it.
    """

    contender: str
    kind: str
    directory: str
    output: str
    dtype: str = "float32"
    threads: int = 2
    accelerator: bool = False
    cpu_time: bool = False
    outputs: int = 1

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Arrays by name; ``pixels`` [b, height, width, c] are what a forward pass reads."""
        with np.load(Path(self.directory, INPUTS)) as file:
            return dict(file)

    def encoded(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
