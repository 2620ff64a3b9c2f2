"""Contenders that compute in no time, behind the real protocol: what a race is tested with.

Run as a script, it serves the job that its argument is.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.peers.job import Call, Job
from beit_jax.peers.process import serve

PROCESS = (sys.executable, str(Path(__file__)))


def sleeping(seconds: float, value: Any = (1.0, 2.0)) -> Callable[[Job], Call]:
    """Gives the value after so long."""

    def call() -> np.ndarray:
        time.sleep(seconds)
        return np.float32(value)

    return lambda job: call


def counting(job: Job) -> Call:
    """Gives 1, 2, 3, ...: every call depends on the one before it."""
    calls: list[int] = []

    def call() -> int:
        calls.append(1)
        return len(calls)

    return call


def talking(job: Job) -> Call:
    """Prints what is none of the protocol."""
    print("torch.compile: tuning", flush=True)
    return sleeping(0.001)(job)


def failing(job: Job) -> Call:
    """Has no compiler."""
    raise RuntimeError("no compiler here")


def leaving(job: Job) -> Call:
    """Is ready, and ends at its third turn's first call, as for want of memory."""
    count = 0

    def call() -> np.ndarray:
        nonlocal count
        count += 1
        if count > 3:
            sys.exit("out of memory")
        return np.float32((1.0, 2.0))

    return call


CONTENDERS: dict[str, Callable[[Job], Call]] = {
    "ours": sleeping(0.002),
    "ours, XLA": sleeping(0.004),
    "transformers, sdpa": sleeping(0.010),
    "timm": failing,
    "onnxruntime": sleeping(0.001, (1.0, 2.1)),
    "openvino": sleeping(0.001, (1.0, 2.0, 3.0)),
    "counting": counting,
    "talking": talking,
    "leaving": leaving,
}


if __name__ == "__main__":
    serve(Job(**json.loads(sys.argv[1])), CONTENDERS)
