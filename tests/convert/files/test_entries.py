"""Which entry of a training checkpoint holds the weights: any name of one, a choice where there are several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file

from beit_jax.convert import Options, load
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as transformers saves it."""
    model = reference.random_model(num_labels=3, **reference.TINY, **reference.BIAS["per_layer"])
    return reference.save(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def raw(directory: Path) -> Tensors:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def average(raw: Tensors) -> Tensors:
    return {name: tensor / 2 for name, tensor in raw.items()}


def taken(directory: Path, content: Any, path: Path, weights: str | None = None) -> np.ndarray:
    """The bias of the classifier that is read of a file with this content."""
    torch.save(content, path)
    return load(resolve(path), Options(weights=weights, config=directory / "config.json")).params["classifier/bias"]


@pytest.mark.parametrize("entry", ["model_state_dict", "net", "weights", "params_ema", "swa_model"])
@pytest.mark.parametrize("weights", [None, "model", "raw", "its name", "beit"])
def test_the_only_entry_of_tensors(
    entry: str, weights: str | None, directory: Path, raw: Tensors, tmp_path: Path
) -> None:
    named = entry if weights == "its name" else weights
    content = {entry: raw, "epoch": 3, "optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}}}
    content["loss"] = torch.tensor(0.5)
    assert np.array_equal(taken(directory, content, tmp_path / "x.pth", named), raw["classifier.bias"])


ENTRIES = [("params", "params_ema"), ("model", "swa_model"), ("state_dict", "ema"), ("net", "ema_net")]


@pytest.mark.parametrize(("first", "second"), ENTRIES)
def test_two_entries_are_a_choice(
    first: str, second: str, directory: Path, raw: Tensors, average: Tensors, tmp_path: Path
) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in average.items()}  # as AveragedModel names them
    content = {first: raw, second: wrapped | {"n_averaged": torch.tensor(3)}}
    with pytest.raises(BeitJaxError, match=f"choose one of them, --weights {first} or {second}"):
        taken(directory, content, tmp_path / "x.pth")
    assert np.array_equal(taken(directory, content, tmp_path / "x.pth", first), raw["classifier.bias"])
    assert np.array_equal(taken(directory, content, tmp_path / "x.pth", second), average["classifier.bias"])


def test_a_known_entry_within_another(directory: Path, raw: Tensors, tmp_path: Path) -> None:
    content = {"checkpoint": {"model": raw, "epoch": 1}, "step": 3}
    assert np.array_equal(taken(directory, content, tmp_path / "x.pth"), raw["classifier.bias"])


def test_a_few_tensors_beside_the_weights_are_no_choice(directory: Path, raw: Tensors, tmp_path: Path) -> None:
    content = {"model": raw, "criterion": {"weight": torch.ones(3)}, "optimizer": {f"state.{n}": raw[n] for n in raw}}
    assert np.array_equal(taken(directory, content, tmp_path / "x.pth"), raw["classifier.bias"])


def test_lightning_exchanges_the_average_and_the_raw_weights(
    directory: Path, raw: Tensors, average: Tensors, tmp_path: Path
) -> None:
    """As the callback EMAWeightAveraging of Lightning 2.6.6 writes them."""
    content = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"net.{name}": tensor for name, tensor in average.items()},
        "current_model_state": {f"net.{name}": tensor for name, tensor in raw.items()},
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }
    path = tmp_path / "last.ckpt"
    with pytest.raises(BeitJaxError, match=r"Lightning exchanges them.*--weights ema or raw"):
        taken(directory, content, path)
    assert np.array_equal(taken(directory, content, path, "ema"), average["classifier.bias"])
    assert np.array_equal(taken(directory, content, path, "raw"), raw["classifier.bias"])


def test_a_file_type_is_no_choice_of_one_file(directory: Path) -> None:
    with pytest.raises(BeitJaxError, match="is one file, not a directory of several formats; leave the option out"):
        load(resolve(directory / "model.safetensors"), Options(format="flax"))
