"""Saving and restoring as they should go; faults/test_training_checkpoints.py has the rest."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from orbax.checkpoint import v1 as ocp
from virtual import xla_flags

from beit_jax.errors import BeitJaxError
from beit_jax.train.checkpoints import digests
from beit_jax.train.checkpoints.checkpointer import Checkpoints


class Moments(NamedTuple):
    count: Any
    mu: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Toy:
    """Has what a training state has: dicts, tuples, named tuples, nothing at all, and more dtypes."""

    step: Any
    params: Any
    opt: Any
    ema: Any


def toy(step: int = 7) -> Toy:
    rng = np.random.default_rng(step)
    kernel = jnp.asarray(rng.standard_normal((3, 4, 5), np.float32))
    params = {
        "beit": {"kernel": kernel, "half": kernel.astype(jnp.bfloat16), "mask": kernel > 0},
        "table": jnp.asarray(rng.integers(0, 256, 9, np.uint8)),
    }
    moments = Moments(jnp.int32(step), {"beit": {"kernel": kernel * 2}})
    return Toy(jnp.int32(step), params, ((), (moments, {"0": kernel[0]})), {})


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def assert_same(found: Any, expected: Any) -> None:
    """The same tree with the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    extra = {"recipe": {"lr": 1e-3, "name": "grün"}, "data": [1, None, True]}
    with Checkpoints(tmp_path / "new" / "run", keep=2) as checkpoints:
        assert checkpoints.newest is None
        checkpoints.save(7, toy(), extra)
    with Checkpoints(tmp_path / "new" / "run", keep=2) as checkpoints:
        assert checkpoints.newest == 7
        restored = checkpoints.restore(abstract(toy()))
    assert restored is not None and restored.step == 7 and restored.extra == extra
    assert_same(restored.state, toy())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored.state))


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(toy())) is None


def test_a_step_is_read_by_orbax_alone(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, toy(), {})
    tree = ocp.load(tmp_path / "7")
    assert set(tree) == {"step", "params", "opt"}
    assert_same(tree["params"], toy().params)
    assert_same(tree["opt"]["1"]["0"]["mu"], toy().opt[1][0].mu)


def test_the_manifest_covers_every_array_and_file(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, toy(), {"a": 1})
    content = json.loads((tmp_path / "7" / "manifest.json").read_text())["content"]
    kernel = np.asarray(toy().params["beit"]["kernel"])
    assert content["arrays"]["params/beit/kernel"] == {
        "dtype": "float32",
        "shape": [3, 4, 5],
        "parts": [{"start": [0, 0, 0], "shape": [3, 4, 5], "xxh3_128": xxhash.xxh3_128_hexdigest(kernel.tobytes())}],
    }
    assert len(content["arrays"]) == len(jax.tree.leaves(toy()))
    files = {path.relative_to(tmp_path / "7").as_posix() for path in (tmp_path / "7").rglob("*") if path.is_file()}
    assert set(content["files"]) == files - {"manifest.json"}
    for name, record in content["files"].items():
        data = (tmp_path / "7" / name).read_bytes()
        assert record == {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}


def test_donated_and_changed_buffers_do_no_harm(tmp_path: Path) -> None:
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 3 + 1, state), donate_argnums=0)
    expected = np.random.default_rng(0).standard_normal((512, 1024), np.float32)
    state = {"donated": jnp.array(expected), "changed": expected.copy()}
    extra = {"list": [1]}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(3):  # the second and third use the memory of the first
            copy = {"donated": np.array(state["donated"]), "changed": state["changed"].copy()}
            checkpoints.save(step, state, extra)
            state["changed"] += 1
            extra["list"].append(2)
            state["donated"] = update(state["donated"])
            for _ in range(5):
                state["donated"] = update(state["donated"])
            restored = checkpoints.restore(abstract(state))
            assert restored is not None and restored.step == step
            assert_same(restored.state, copy)
            assert restored.extra == {"list": [1]}
            extra = restored.extra
            state["donated"] = update(restored.state["donated"])  # what was restored can be donated too


def test_training_goes_on_while_a_step_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, synchronise = threading.Event(), digests.synchronise

    def slow(directory: Path) -> None:
        assert gate.wait(30)
        synchronise(directory)

    monkeypatch.setattr(digests, "synchronise", slow)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, toy(1), {})
        checkpoints.poll()
        assert checkpoints.newest is None and not (tmp_path / "1").exists()
        gate.set()
        checkpoints.save(2, toy(2), {})  # waits for the first
        assert checkpoints.newest == 1 and (tmp_path / "1").exists()
        checkpoints.wait()
        assert checkpoints.newest == 2


def test_old_steps_go(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (8, 9, 10, 11):
            checkpoints.save(step, toy(step), {})
        checkpoints.wait()
        assert sorted(os.listdir(tmp_path)) == ["10", "11", "lock"]


@pytest.mark.parametrize("step", [9, 10])
def test_steps_only_go_up(tmp_path: Path, step: int) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(10, toy(), {})
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(BeitJaxError, match=rf"step {step} does not come after step 10, which is saved here; continue"),
    ):
        checkpoints.save(step, toy(), {})
    assert sorted(os.listdir(tmp_path)) == ["10", "lock"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float, dtype: Any) -> None:
    state = {"params": {"good": jnp.ones(3), "bad": jnp.ones(3, dtype).at[1].set(value)}, "step": jnp.int32(1)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, toy(1), {})
        with pytest.raises(BeitJaxError, match=r"step 2: params/bad: not finite, as 1 of 3 tensors; not saved"):
            checkpoints.save(2, state, {})
        assert checkpoints.restore(abstract(toy(1))) is not None
    assert sorted(os.listdir(tmp_path)) == ["1", "lock"]


def test_another_state_is_refused_by_name(tmp_path: Path) -> None:
    saved = {"params": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "step": jnp.int32(1)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, saved, {})
        wanted = abstract(saved)

        def refused(message: str, **params: jax.ShapeDtypeStruct) -> None:
            with pytest.raises(BeitJaxError, match=message):
                checkpoints.restore({"params": params, "step": wanted["step"]})

        kernel, bias = wanted["params"]["kernel"], wanted["params"]["bias"]
        refused(
            r"params/kernel: expected the shape \[4, 3\], found \[3, 4\]", kernel=kernel.update(shape=(4, 3)), bias=bias
        )
        refused(
            r"params/kernel: expected the shape \[12\], found \[3, 4\]", kernel=kernel.update(shape=(12,)), bias=bias
        )
        for dtype in ("bfloat16", "int32"):
            other = kernel.update(dtype=jnp.dtype(dtype))
            refused(f"params/kernel: expected the dtype {dtype}, found float32", kernel=other, bias=bias)
        refused(r"/1: has params/bias, which the run lacks; resume", kernel=kernel)
        refused(r"/1: lacks params/ema, which the run has; resume", kernel=kernel, bias=bias, ema=bias)
        refused(
            r"lacks params/a and 1 more, which the run has and has params/bias, which", kernel=kernel, a=bias, b=bias
        )
        assert checkpoints.restore(wanted) is not None
    assert sorted(os.listdir(tmp_path)) == ["1", "lock"]  # a good checkpoint is not renamed


MESHES = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from beit_jax.train.checkpoints.checkpointer import Checkpoints

def shardings(shape, **specs):
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

def values():
    rng = np.random.default_rng(0)
    return {
        "rows": rng.standard_normal((16, 6), np.float32),
        "columns": rng.standard_normal((6, 16), np.float32),
        "whole": rng.standard_normal(5, np.float32),
        "half": rng.standard_normal((8, 8), np.float32).astype(jnp.bfloat16),
    }

where = Path(sys.argv[1])
fsdp = shardings((1, 8), rows=P("fsdp"), columns=P(None, "fsdp"), whole=P(), half=P("fsdp"))
mixed = shardings((2, 4), rows=P("fsdp", "data"), columns=P("data", "fsdp"), whole=P(), half=P("data", "fsdp"))
one = dict.fromkeys(fsdp, jax.sharding.SingleDeviceSharding(jax.devices()[3]))
with Checkpoints(where, keep=9) as checkpoints:
    for step, (source, target) in enumerate([(fsdp, mixed), (fsdp, one), (mixed, fsdp), (one, mixed)]):
        checkpoints.save(step, {name: jax.device_put(value, source[name]) for name, value in values().items()}, {})
        abstract = {n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=target[n]) for n, v in values().items()}
        restored = checkpoints.restore(abstract)
        for name, value in values().items():
            found = restored.state[name]
            assert found.sharding == target[name], (name, found.sharding)
            assert found.dtype == value.dtype and np.asarray(found).tobytes() == value.tobytes(), name
            for shard in found.addressable_shards:
                assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes(), name
print("same")
"""


def test_another_mesh_gets_the_same_bits(tmp_path: Path) -> None:
    flags = {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", MESHES, str(tmp_path)],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "same", "")
