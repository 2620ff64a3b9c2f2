"""Meshes: every tensor lies where the table says, and steps on eight virtual devices compute what one computes."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from virtual import xla_flags

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import MODELS, abstract_model, statistics
from beit_jax.train.distributed.sharding import (
    AXES,
    batch_sharding,
    check_batch,
    make_mesh,
    place,
    put_batch,
    replicated,
    state_shardings,
)
from beit_jax.train.objectives.linear_probe import abstract_probe
from beit_jax.train.step.state import State, initial_state
from beit_jax.tree import flatten, unflatten
from beit_jax.variants import VARIANTS

STEPS_SCRIPT = Path(__file__).parents[2] / "support" / "sharded_steps.py"
LOSS = 1e-5
"""Between losses of magnitude 2 on different meshes, in float32: sums are taken in another order."""
PARAMETER = 5e-5
"""The tolerance of parameters, which five Adam steps moved by 5e-3: rounding shows where a gradient is small."""
MESHES = {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}


def abstract_mesh(*shape: int) -> Any:
    return AbstractMesh(shape, AXES, (AxisType.Auto,) * 3)


def specs(tree: Any, mesh: Any) -> dict[str, P]:
    return {name: sharding.spec for name, sharding in flatten(state_shardings(tree, mesh)).items()}


def share(config: BeitConfig, mesh: Any) -> float:
    """How much of the parameters one device holds."""
    shapes = abstract_model(config)[1]
    shardings = flatten(state_shardings(shapes, mesh))
    held = [prod(shardings[name].shard_shape(leaf.shape)) for name, leaf in flatten(shapes).items()]
    return sum(held) / sum(prod(leaf.shape) for leaf in flatten(shapes).values())


@pytest.mark.parametrize("name", VARIANTS)
def test_released_models_are_split_nearly_evenly(name: str) -> None:
    assert share(VARIANTS[name], abstract_mesh(1, 8, 1)) < 1.1 / 8
    assert share(VARIANTS[name], abstract_mesh(1, 4, 2)) < 1.1 / 4  # heads of models do not split by "tensor"
    assert share(VARIANTS[name], abstract_mesh(8, 1, 1)) == 1.0


@pytest.mark.parametrize("task", MODELS)
def test_every_parameter_of_every_kind_of_model_has_a_rule(task: Any) -> None:
    config = replace(
        VARIANTS["beit_base_patch16_640_ade20k"],
        task=task,
        position_bias="both",
        use_mask_token=True,
        use_absolute_position_embeddings=True,
        add_fpn=True,
        auxiliary_concat_input=True,
    )
    for pooling in ("mean", "cls"):
        assert share(replace(config, pooling=pooling), abstract_mesh(2, 2, 2)) < 1.0


def test_the_heads_of_a_linear_probe_are_split() -> None:
    shapes = abstract_probe(VARIANTS["beit_base_patch16_224"], 1000)[1]
    assert specs(shapes, abstract_mesh(1, 8, 1)) == {"heads/bias": P(), "heads/kernel": P(None, "fsdp", None)}


def test_a_tensor_without_a_rule_is_an_error() -> None:
    with pytest.raises(BeitJaxError, match=r"^beit/blocks/novelty: "):
        state_shardings({"beit": {"blocks": {"novelty": jnp.zeros((2, 4))}}}, abstract_mesh(2, 2, 2))


def test_blocks_are_split_by_heads_and_hidden_units() -> None:
    found = specs(abstract_model(VARIANTS["beit_base_patch16_224"])[1], abstract_mesh(1, 4, 2))
    assert found["beit/blocks/attention/qkv_kernel"] == P(None, "fsdp", None, "tensor", None)
    assert found["beit/blocks/attention/out_kernel"] == P(None, "tensor", None, "fsdp")
    assert found["beit/blocks/attention/q_bias"] == P(None, "tensor", None)
    assert found["beit/blocks/mlp/fc1/kernel"] == P(None, "fsdp", "tensor")
    assert found["beit/blocks/mlp/fc2/kernel"] == P(None, "tensor", "fsdp")
    assert found["beit/blocks/norm1/scale"] == P()
    relative = replace(VARIANTS["beit_base_patch16_224"], use_key_bias=True, use_sub_norm=True)
    found = specs(abstract_model(relative)[1], abstract_mesh(1, 4, 2))
    assert found["beit/blocks/attention/qkv_bias"] == P(None, None, "tensor", None)
    assert found["beit/blocks/attention/norm/scale"] == P()


def test_axes_that_do_not_divide_are_dropped() -> None:
    kernel = {"blocks": {"attention": {"qkv_kernel": jnp.zeros((2, 198, 3, 3, 66))}}}
    assert specs(kernel, abstract_mesh(1, 4, 2)) == {"blocks/attention/qkv_kernel": P(None, None, None, None, None)}
    assert specs(kernel, abstract_mesh(1, 2, 3)) == {
        "blocks/attention/qkv_kernel": P(None, "fsdp", None, "tensor", None)
    }


def test_small_leaves_are_not_gathered() -> None:
    def found(classes: int) -> P:
        return specs({"classifier": {"kernel": jnp.zeros((128, classes))}}, abstract_mesh(1, 8, 1))["classifier/kernel"]

    assert found(10) == P(None, None) and found(1000) == P("fsdp", None)


def test_moments_average_and_statistics_lie_as_parameters_do() -> None:
    config = VARIANTS["beit_base_patch16_640_ade20k"]
    shapes = abstract_model(config)[1]
    learned = unflatten({name: leaf for name, leaf in flatten(shapes).items() if name not in statistics(config)})
    tx = optax.chain(
        optax.scale_by_adam(), optax.masked(optax.trace(0.9), lambda tree: jax.tree.map(lambda _: True, tree))
    )
    state = jax.eval_shape(partial(initial_state, tx=tx, statistics=statistics(config), average=True), shapes)
    mesh = abstract_mesh(1, 4, 2)
    found = state_shardings(state, mesh)
    assert isinstance(found, State)
    adam, trace = found.opt
    assert (
        found.params == found.average == adam.mu == adam.nu == trace.inner_state.trace == state_shardings(learned, mesh)
    )
    whole = (found.step, found.bad, found.skipped, adam.count, *jax.tree.leaves(found.stats))
    assert len(whole) > 4 and all(sharding.is_fully_replicated for sharding in whole)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((-1, 1, 1), (6, 1, 1)), ((1, -1, 1), (1, 6, 1)), ((3, -1, 1), (3, 2, 1)), ((1, 2, 3), (1, 2, 3))],
)
def test_the_rest_of_the_devices(shape: tuple[int, int, int], sizes: tuple[int, ...]) -> None:
    mesh = make_mesh(shape, virtual_devices(6, by_host=6))
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2, 1), r"expected sizes of \(data, fsdp, tensor\) whose product is 6 devices, found \(2, 2, 1\)"),
        ((4, -1, 1), r"expected sizes of \(data, fsdp, tensor\) whose product is 6 devices, found \(4, -1, 1\)"),
        ((-1, -1, 1), r"expected positive numbers .* at most one of them -1, found \(-1, -1, 1\)"),
        ((0, 1, 1), r"expected positive numbers .* found \(0, 1, 1\)"),
        ((-2, -1, 1), r"expected positive numbers .* found \(-2, -1, 1\)"),
        ((2, 1, 3), r"the tensor axis must divide the 2 devices of a host, found 3"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(BeitJaxError, match=rf"^--run\.mesh: {message}$"):
        make_mesh(shape, virtual_devices(6))


@dataclass(frozen=True)
class Device:
    """A device in name."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def virtual_devices(count: int, *, by_host: int = 2) -> list[Any]:
    return [Device(i, i // by_host) for i in range(count)]


def test_a_batch_divides_among_devices_and_parts() -> None:
    mesh = abstract_mesh(2, 2, 2)
    check_batch(8, mesh, parts=2)
    with pytest.raises(BeitJaxError, match=r"^--data\.batch-size: expected a multiple of 4 \(.*\), found 6$"):
        check_batch(6, mesh)
    with pytest.raises(BeitJaxError, match=r"multiple of 4 \(.*\) x 3 \(--optim\.accumulate\), found 8$"):
        check_batch(8, mesh, parts=3)
    with pytest.raises(BeitJaxError, match=r"multiple of 4 \(.*\), found 2$"):
        put_batch({"image": np.zeros((2, 8, 8, 3), np.uint8)}, mesh)


def test_placing_keeps_every_bit() -> None:
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    rng = np.random.default_rng(0)
    shapes = {"classifier/kernel": (64, 8), "beit/blocks/mlp/fc1/kernel": (2, 64, 256), "classifier/bias": (8,)}
    params = unflatten({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    placed = place(params, state_shardings(params, mesh))
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, params))
    batch = put_batch({"label": np.arange(4, dtype=np.int32)}, mesh)
    assert np.array_equal(batch["label"], np.arange(4)) and batch["label"].sharding == batch_sharding(mesh)
    assert replicated(mesh).is_fully_replicated


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The output of `sharded_steps` in a process with eight devices."""
    environment = os.environ | {
        # Programs are small: compiling them is what takes time, and most of it goes into optimizing machine code.
        "XLA_FLAGS": xla_flags(8, "--xla_backend_optimization_level=0"),
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
    # The partitioner's warning about tensors it could not reshard but by making them whole. Programs from the cache
    # warned, or not, when they were compiled; their collectives are counted below in any case.
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def test_the_reference_run_learns(steps: dict[str, Any]) -> None:
    """Otherwise equal losses would say nothing."""
    one = steps["one"]
    assert one["steps"] == len(one["losses"]) == 5 and one["skipped"] == 0
    assert one["moved"] > 3e-3  # of five steps of 1e-3


@pytest.mark.parametrize("mesh", MESHES)
def test_steps_on_a_mesh_are_steps_on_one_device(steps: dict[str, Any], mesh: str) -> None:
    """Mixing, erasing, dropout, stochastic depth, accumulation, clipping and averaging included."""
    found = steps["meshes"][mesh]
    assert np.abs(np.subtract(found["losses"], steps["one"]["losses"])).max() <= LOSS
    assert found["params"] <= PARAMETER and found["average"] <= PARAMETER


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_holds_its_part_before_and_after(steps: dict[str, Any], mesh: str) -> None:
    """Bytes of the buffers themselves, against those of parameters that are split and parameters that are whole."""
    found, (_, fsdp, tensor) = steps["meshes"][mesh], MESHES[mesh]
    assert found["after"] == found["before"]
    kernels = 2 * (128 * 3 * 128 + 128 * 128 + 2 * 128 * 512)  # of two blocks: attention in and out, MLP in and out
    halves = 2 * (2 * 128 + 512 + 52 * 4) + 52 * 4  # q, v and MLP biases, bias tables of blocks; the shared one
    whole = found["before"]["total"]["params"] // 4 - kernels - halves
    expected = 4 * (kernels // (fsdp * tensor) + halves // tensor + whole)
    count = 4  # bytes of Adam's step counter
    assert found["before"]["held"] == {
        "params": [expected] * 8,
        "average": [expected] * 8,
        "moments": [2 * expected + count] * 8,
    }


def test_shards_have_the_shapes_of_the_table(steps: dict[str, Any]) -> None:
    shards = steps["meshes"]["2x2x2"]["after"]["shards"]
    assert shards["beit/blocks/attention/qkv_kernel"] == [2, 64, 3, 2, 32]
    assert shards["beit/blocks/attention/out_kernel"] == [2, 2, 32, 64]
    assert shards["beit/blocks/mlp/fc1/kernel"] == [2, 64, 256]
    assert shards["beit/blocks/mlp/fc2/kernel"] == [2, 256, 64]


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_drawn_on_a_mesh_are_those_drawn_on_one_device(steps: dict[str, Any], mesh: str) -> None:
    assert steps["meshes"][mesh]["same draw"]


def test_parameters_are_gathered_and_activations_stay(steps: dict[str, Any]) -> None:
    """Each of a block's four kernels once per pass: forward, computed again, backward. Without constraints on
    activations there are 45 gatherings here, 26 reductions and 2 exchanges."""
    counts = {mesh: found["collectives"] for mesh, found in steps["meshes"].items()}
    assert not any("all-to-all" in count for count in counts.values())
    assert "all-gather" not in counts["8x1x1"]
    assert 4 <= counts["2x4x1"]["all-gather"] <= 12 and 4 <= counts["2x2x2"]["all-gather"] <= 12


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_of_positions_are_summed_as_tables(steps: dict[str, Any], mesh: str) -> None:
    """Not as what is added to the scores, which at 512 pixels is 250 times as large."""
    assert not steps["meshes"][mesh]["bias crosses"]


def test_collectives_do_not_multiply_with_depth(steps: dict[str, Any]) -> None:
    assert steps["deeper"] == steps["meshes"]["2x4x1"]["collectives"]
