"""Flax' msgpack in every precision and in shards; HDF5, and what it must not reach."""

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
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


# Keras 3's containers. ------------------------------------------------------------------------------------------------

KERAS = [FOREIGN / "keras3/beit.keras", FOREIGN / "keras2/beit.keras"]


def repacked(source: Path, target: Path, **options: Any) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


@pytest.mark.parametrize("source", KERAS, ids=["Keras 3", "Keras 2"])
def test_archives_deflated_and_their_weights_alone(source: Path, tmp_path: Path) -> None:
    """`.weights.h5` of Keras 3 names its layers; that of Keras 2 numbers them, and their order is BEiT's."""
    pytest.importorskip("h5py")
    expected = load(resolve(source)).params
    deflated = repacked(source, tmp_path / "deflated.keras", compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(source) as archive:
        archive.extract("model.weights.h5", tmp_path)
    for path in (deflated, (tmp_path / "model.weights.h5").rename(tmp_path / "x.weights.h5")):
        found = load(resolve(path)).params
        assert found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


def test_a_directory_as_keras_puts_it_on_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    with zipfile.ZipFile(KERAS[0]) as archive:
        archive.extractall(tmp_path)
    expected, found = load(resolve(KERAS[0])), load(resolve(tmp_path))
    assert found.config == expected.config
    assert all(np.array_equal(found.params[n], expected.params[n]) for n in expected.params)


def test_archives_that_grow_or_are_packed_otherwise_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    refused(repacked(KERAS[0], tmp_path / "a.keras", compression=zipfile.ZIP_BZIP2), "method 12", "deflated")
    with zipfile.ZipFile(tmp_path / "b.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", bytes(2**22))
    refused(tmp_path / "b.keras", "model.weights.h5", "grows from", "4194304")


def changed_model(source: Path, target: Path, change: Callable[[str], str]) -> Path:
    """The archive with another configuration of its model."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content.decode()) if name == "config.json" else content)
    return target


@pytest.mark.parametrize(
    ("old", "new", "needles"),
    [
        ('"class_name": "Softmax"', '"class_name": "PositionalEncodingFourierRot"', ("rotary positions",)),
        ('"activation": "gelu"', '"activation": "mish"', ("activation of its MLP is mish", "gelu")),
        ("[null, 16, 16, 3]", "[null, 16, 32, 3]", ("16x32", "not square")),
        ('"target_shape": [-1, 2, 4]', '"target_shape": [-1, 4, 2]', ("2 attention heads", "4 by")),
    ],
)
def test_what_the_configuration_of_a_keras_model_says_counts(
    old: str, new: str, needles: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("h5py")
    refused(changed_model(KERAS[1], tmp_path / "x.keras", lambda text: text.replace(old, new)), *needles)


def test_two_tensors_of_the_same_bytes_are_refused(tmp_path: Path) -> None:
    """The place of a tensor is a number without a checksum in most files of HDF5."""

    def share(h5py: Any, file: Any) -> None:
        del file["out_ln/out_ln/gamma:0"]
        file["out_ln/out_ln/gamma:0"] = file["out_ln/out_ln/beta:0"]

    refused(h5(tmp_path / "x.h5", change=share), "share bytes")


def test_a_shape_without_its_bytes_is_refused(tmp_path: Path) -> None:
    def claim(h5py: Any, file: Any) -> None:
        del file["out_ln/out_ln/gamma:0"]
        file["out_ln/out_ln"].create_dataset("gamma:0", (2**36,), np.float32, chunks=(2**20,))

    refused(h5(tmp_path / "x.h5", change=claim), "gamma:0", "68719476736", "0 in the file")
