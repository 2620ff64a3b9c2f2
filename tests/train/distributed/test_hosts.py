"""Two and four processes train every objective as one process does, and evaluate exactly what it evaluates."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import thorough
from objectives import RUNS, SCENES, STEPS, prepare
from ports import free_address
from virtual import xla_flags

pytestmark = pytest.mark.thorough  # two processes for every objective

SCRIPT = Path(__file__).parents[2] / "support" / "objectives.py"
DEVICES = 4  # virtual ones of a process
QUICK = ("classification", "masked_tokens")
LOSS = 1e-5
"""Between losses of magnitude 0.5 to 8, in float32: sums over devices of one process are taken in another order than
those over several."""
TIMEOUT = 1500.0

Scores = dict[str, list[dict[str, float]]]


def started(devices: int, *arguments: object, cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        # Programs are small: compiling them is what takes time, and most of it goes into optimizing machine code.
        "XLA_FLAGS": xla_flags(devices, "--xla_backend_optimization_level=0"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finished(children: list[subprocess.Popen[str]]) -> None:
    try:
        said = [child.communicate(timeout=TIMEOUT) for child in children]
        assert [child.returncode for child in children] == [0] * len(children), said
    finally:
        for child in children:
            child.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int, str], Scores]:
    """The scores by objective, for a number of processes and of devices of each, of all objectives of one group."""
    root = tmp_path_factory.mktemp("objectives")
    prepare(root)

    @cache
    def run(processes: int, devices: int, group: str) -> Scores:
        out = root / f"{processes}x{devices} {group}"
        out.mkdir()
        if processes == 1:
            finished([started(devices, root, out, group, cache=root / "cache")])
        else:
            place = (root, out, group, free_address(), processes)
            finished([started(devices, *place, index, cache=root / "cache") for index in range(processes)])
        records = {name: (out / name / "metrics.jsonl").read_text().splitlines() for name in group.split(",")}
        return {name: [json.loads(line) for line in lines] for name, lines in records.items()}

    return lambda processes, devices, objective: run(processes, devices, group_of(objective))


def group_of(objective: str) -> str:
    """Returns the objectives that run in one process with this one: those of the quick run, or the others."""
    return ",".join(name for name in RUNS if (name in QUICK) == (objective in QUICK))


COUNTS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("processes", COUNTS)
@pytest.mark.parametrize("objective", thorough(RUNS, but=QUICK))
def test_losses_are_those_of_one_process(
    runs: Callable[[int, int, str], Scores], objective: str, processes: int
) -> None:
    """On as many devices. Mixing, erasing, masks, dropout and noise included, which follow an image's place."""
    found, expected = (
        [record["loss"] for record in runs(*shape, objective)[objective] if "loss" in record]
        for shape in ((processes, DEVICES), (1, processes * DEVICES))
    )
    assert len(found) == len(expected) == (STEPS if objective != "segmentation" else STEPS * (SCENES // 16))
    assert np.abs(np.subtract(found, expected)).max() <= LOSS
    assert np.abs(np.diff(expected)).max() > 50 * LOSS, "a run that learns nothing would pass"


@pytest.mark.parametrize("processes", COUNTS)
@pytest.mark.parametrize("objective", thorough(RUNS, but=QUICK))
def test_evaluations_are_those_of_one_process(
    runs: Callable[[int, int, str], Scores], objective: str, processes: int
) -> None:
    """Counts exactly: of 450 images that no batch of 96 divides, and of segmented pixels. Losses up to rounding."""

    def scores(shape: tuple[int, int]) -> dict[str, Any]:
        (found,) = [record for record in runs(*shape, objective)[objective] if "loss" not in record]
        return found

    found, expected = scores((processes, DEVICES)), scores((1, processes * DEVICES))
    assert found.keys() == expected.keys() and len(found) > 1
    counted = objective in ("classification", "linear_probe", "segmentation")
    for name, value in expected.items():
        exact = counted and not name.endswith("loss")
        assert found[name] == (value if exact else pytest.approx(value, rel=1e-5, abs=1e-5)), name
