"""Pre-training steps on eight virtual devices compute what one computes, and share what lies beside the model."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from virtual import xla_flags

pytestmark = pytest.mark.thorough  # test_sharding and test_hosts show less of the same in a third of the time
STEPS_SCRIPT = Path(__file__).parents[2] / "support" / "sharded_pretraining.py"
LOSS = 1e-5
"""Between losses of magnitude 1 to 11 on different meshes, in float32: sums are taken in another order."""
PARAMETER = 5e-5
"""The tolerance of parameters, which five Adam steps moved by 5e-3, and of the codebook's directions: rounding shows
where a gradient is small."""
MESHES = {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
NAMES = ("masked_tokens", "data2vec", "vqkd")


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """The output of `sharded_pretraining` in a process with eight devices."""
    environment = os.environ | {
        # Programs are small: compiling them is what takes time, and most of it goes into optimizing machine code.
        # All devices take operations in one order: with jax 0.12's concurrent one two collectives wait for each other.
        "XLA_FLAGS": xla_flags(
            8, "--xla_backend_optimization_level=0", "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        ),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    if jax.config.jax_compilation_cache_dir:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    done = subprocess.run([sys.executable, STEPS_SCRIPT], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    # The partitioner's warning about tensors it could not reshard but by making them whole.
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_runs_learn(steps: dict[str, Any], name: str) -> None:
    """Otherwise equal losses would say nothing."""
    one = steps[name]["one"]
    assert one["steps"] == len(one["losses"]) == 5 and one["skipped"] == 0
    assert one["moved"]["params"] > 3e-3  # of five steps of 1e-3
    assert len({round(loss, 3) for loss in one["losses"]}) == 5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_on_a_mesh_are_steps_on_one_device(steps: dict[str, Any], name: str, mesh: str) -> None:
    """Masks of different counts, dropout, stochastic depth and accumulation included, and what is beside the model."""
    found, one = steps[name]["meshes"][mesh], steps[name]["one"]
    assert np.abs(np.subtract(found["losses"], one["losses"])).max() <= LOSS
    assert found["params"] <= PARAMETER and found["second"] <= PARAMETER and found["stats"] <= PARAMETER


def test_teachers_that_average_move_and_frozen_ones_do_not(steps: dict[str, Any]) -> None:
    moved = {name: steps[name]["one"]["moved"] for name in NAMES}
    assert moved["data2vec"]["second"] > 1e-3
    assert moved["masked_tokens"]["second"] == moved["vqkd"]["second"] == 0.0
    assert all(steps[name]["meshes"][mesh]["second"] == 0.0 for name in ("masked_tokens", "vqkd") for mesh in MESHES)
    assert moved["vqkd"]["stats"] > 0.1, "the codes became clusters, and followed"


def share(path: str, shape: list[int], fsdp: int, tensor: int) -> int:
    """Bytes of a tensor on one device by what is promised: kernels of 2**15 elements or more are split among all that
    do not split the batch alone; of attention's and MLP's blocks vectors of heads and hidden units by "tensor"."""
    size = 4 * prod(shape)
    in_blocks = "blocks/attention/" in path or "blocks/mlp/" in path
    by_tensor = tensor if (in_blocks and not path.endswith("out_bias") and "fc2/bias" not in path) else 1
    if path.endswith(("shared_bias_table", "lm_head/kernel")):
        by_tensor = tensor
    large = path.endswith("kernel") and prod(shape) >= 2**15
    return size // by_tensor // (fsdp if large else 1)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_device_holds_its_part_of_what_lies_beside(steps: dict[str, Any], name: str, mesh: str) -> None:
    """Bytes of the buffers themselves, before and after the steps."""
    found, (_, fsdp, tensor) = steps[name]["meshes"][mesh], MESHES[mesh]
    whole = sum(4 * prod(shape) for shape in found["sizes"].values())
    expected = sum(share(path, shape, fsdp, tensor) for path, shape in found["sizes"].items())
    assert found["held"]["second"] == found["held at first"]["second"] == [expected] * 8
    assert found["held"]["params"] == found["held at first"]["params"]
    assert len(set(found["held"]["params"])) == 1
    if fsdp * tensor == 4:
        assert expected < 0.6 * whole
    else:
        assert expected == whole
