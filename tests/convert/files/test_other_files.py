"""Flax' msgpack in every precision and in shards; HDF5, and what it must not reach."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import original
import pytest
import reference
from flax import serialization
from safetensors.torch import load_file

from beit_jax.convert import load, plan
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.tree import flatten, unflatten

FOREIGN = Path(__file__).parents[1] / "foreign"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = reference.random_model(num_labels=3, **reference.TINY, **reference.BIAS["per_layer"])
    return reference.save(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture
def tree(directory: Path, tmp_path: Path) -> dict[str, Any]:
    """FlaxBeit's parameters, and their configuration beside where they will be written."""
    shutil.copy(directory / "config.json", tmp_path)
    return original.flax_names(load_file(directory / "model.safetensors"))


@pytest.mark.parametrize(("dtype", "kept"), [("float16", "float32"), ("bfloat16", "bfloat16"), ("float64", "float32")])
def test_msgpack_of_every_precision(
    dtype: str, kept: str, tree: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    expected = load(resolve(directory)).params
    cast = {name: array.astype(jnp.dtype(dtype)) for name, array in flatten(tree).items()}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(unflatten(cast)))
    found = load(resolve(tmp_path)).params
    for name, leaf in expected.items():
        assert found[name].dtype == jnp.dtype(kept)
        assert np.array_equal(found[name], leaf.astype(jnp.dtype(dtype)).astype(jnp.dtype(kept)))


def test_msgpack_in_shards(tree: dict[str, Any], directory: Path, tmp_path: Path) -> None:
    """As transformers 4 writes a model over max_shard_size: nested parameters in each, and an index of flat names."""
    flat = flatten(tree)
    names = sorted(flat)
    shards = {f"flax_model-0000{i + 1}-of-00002.msgpack": names[i::2] for i in range(2)}
    for file, held in shards.items():
        (tmp_path / file).write_bytes(serialization.to_bytes(unflatten({name: flat[name] for name in held})))
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    expected, found = load(resolve(directory)).params, load(resolve(tmp_path)).params
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert plan(resolve(tmp_path)).checkpoint.format == "flax msgpack, 2 shards"
    (tmp_path / next(iter(shards))).unlink()
    with pytest.raises(BeitJaxError, match=r"flax_model-00001-of-00002\.msgpack, which is not there"):
        plan(resolve(tmp_path))


# HDF5. ----------------------------------------------------------------------------------------------------------------

KECAM = FOREIGN / "kecam/beit.h5"


def h5(path: Path, **changes: Any) -> Path:
    h5py = pytest.importorskip("h5py")
    shutil.copy(KECAM, path)
    with h5py.File(path, "a") as file:
        for change in changes.values():
            change(h5py, file)
    return path


def refused(path: Path, *needles: str) -> None:
    with pytest.raises(BeitJaxError) as caught:
        load(resolve(path))
    assert all(needle in str(caught.value) for needle in needles), caught.value


def test_weights_of_a_whole_keras_model(tmp_path: Path) -> None:
    """`model.save` puts them into a group, beside the optimizer's."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(KECAM) as source, h5py.File(tmp_path / "model.h5", "w") as file:
        group = file.create_group("model_weights")
        for name in source:
            source.copy(name, group)
        group["out_ln/out_ln"].move("gamma:0", "gamma")  # as Keras 3 writes the same file
        file["optimizer_weights/x/iteration:0"] = np.ones(3)
    expected, found = load(resolve(KECAM)).params, load(resolve(tmp_path / "model.h5")).params
    assert found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


def test_nothing_outside_the_file_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.h5"
    shutil.copy(pytest.importorskip("h5py") and KECAM, secret)

    def link(h5py: Any, file: Any) -> None:
        file["out_ln"].move("out_ln", "old")
        file["out_ln/out_ln"] = h5py.ExternalLink(str(secret), "/out_ln/out_ln")

    refused(h5(tmp_path / "a.h5", change=link), "out_ln/out_ln is a link")

    def external(h5py: Any, file: Any) -> None:
        del file["out_ln/out_ln/gamma:0"]
        (tmp_path / "raw").write_bytes(bytes(64))
        file["out_ln/out_ln"].create_dataset(
            "gamma:0", (16,), np.float32, external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
        )

    refused(h5(tmp_path / "b.h5", change=external), "out_ln/gamma:0", "lies in another file")


def test_h5_that_is_damaged(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    data = KECAM.read_bytes()
    draw = np.random.default_rng(0)
    for at in draw.integers(1, len(data), 20):
        (tmp_path / "x.h5").write_bytes(data[:at])
        with pytest.raises(BeitJaxError):
            load(resolve(tmp_path / "x.h5"))


def test_h5_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(KECAM, "h5py", "pip install 'beit-jax[h5]'")
