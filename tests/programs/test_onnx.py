"""ONNX models: run by onnxruntime, with the numbers of this library's model.

Run with ``pytest -m onnx`` where onnx, onnxscript and onnxruntime are installed (extra onnx).
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import KINDS, TINY, checkpoint

from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import build_model
from beit_jax.programs import onnx_model
from beit_jax.programs.options import ProgramOptions
from beit_jax.tree import unflatten
from beit_jax.weights.native import NativeCheckpoint

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; see pyproject.toml, extra onnx")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

pytestmark = [pytest.mark.onnx, pytest.mark.filterwarnings("ignore")]  # torch and onnxscript warn of their own code
ROOT = Path(__file__).parents[2]


def run(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def images(batch: int) -> np.ndarray:
    """[b, c, h, w]"""
    return np.random.default_rng(100 + batch).standard_normal((batch, 3, 32, 32)).astype(np.float32)


def model(made: NativeCheckpoint) -> Any:
    return build_model(made.config, unflatten(made.params))


def first(pixel_values: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.moveaxis(pixel_values, 1, -1)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The ONNX model of a kind, written once."""
    done: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp("onnx") / "written"
            onnx_model.export_onnx(checkpoint(KINDS[kind]), done[kind])
        return done[kind]

    return write


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_classification(batch: int, written: Callable[[str], Path]) -> None:
    found = run(written("classification") / onnx_model.MODEL, pixel_values=images(batch))
    expected = model(checkpoint(TINY))(first(images(batch))).logits
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_masked_image_modelling(batch: int, written: Callable[[str], Path]) -> None:
    masks = np.random.default_rng(batch).random((batch, 16)) > 0.5
    found = run(written("masked") / onnx_model.MODEL, pixel_values=images(batch), bool_masked_pos=masks)
    expected = model(checkpoint(KINDS["masked"]))(first(images(batch)), masks).logits
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_features(batch: int, written: Callable[[str], Path]) -> None:
    found = run(written("features") / onnx_model.MODEL, pixel_values=images(batch))
    expected = model(checkpoint(KINDS["features"]))(first(images(batch)))
    np.testing.assert_allclose(found["last_hidden_state"], expected.last_hidden_state, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["pooler_output"], expected.pooler_output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_segmentation_by_the_blocks_it_was_trained_on(batch: int, written: Callable[[str], Path]) -> None:
    """For which transformers has no setting."""
    found = run(written("segmentation") / onnx_model.MODEL, pixel_values=images(batch))
    expected = model(checkpoint(KINDS["segmentation"]))(first(images(batch))).logits
    np.testing.assert_allclose(np.moveaxis(found["logits"], 1, -1), expected, rtol=0, atol=1e-5)


OTHERS = {
    "segmentation of transformers": replace(KINDS["segmentation"], feature_taps="hf", out_indices=(1, 2, 3, 4)),
    "backbone": replace(KINDS["backbone"], position_bias="per_layer"),
    "absolute positions": KINDS["regression by class token"],
    "data2vec": replace(TINY, model_type="data2vec-vision", position_bias="shared"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models(kind: str, tmp_path: Path) -> None:
    """The export compares them itself."""
    notes = onnx_model.export_onnx(checkpoint(OTHERS[kind]), tmp_path / "written")
    assert any("run by onnxruntime" in note for note in notes)


def test_features_of_a_model_with_a_head(tmp_path: Path) -> None:
    made = checkpoint(TINY)
    onnx_model.export_onnx(made, tmp_path / "written", ProgramOptions(features=True))
    found = run(tmp_path / "written" / onnx_model.MODEL, pixel_values=images(3))
    expected = model(made).beit(first(images(3))).last_hidden_state
    np.testing.assert_allclose(found["last_hidden_state"], expected, rtol=0, atol=1e-5)


def test_a_model_that_is_not_the_same_is_not_called_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison finds a model that is wrong by one weight."""
    made, exported = checkpoint(TINY), onnx_model.exporter.export

    def other(given: NativeCheckpoint, *arguments: Any) -> list[str]:
        params = {**given.params, "classifier/bias": given.params["classifier/bias"] + 1e-3}
        return exported(replace(given, params=params), *arguments)

    monkeypatch.setattr(onnx_model.exporter, "export", other)
    with pytest.raises(BeitJaxError, match=r"whose model is 1\.0e-03 from this one .* --to stablehlo"):
        onnx_model.export_onnx(made, tmp_path / "written")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_lie_beside_it(
    written: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "LARGEST_FILE", 1000)
    notes = onnx_model.export_onnx(checkpoint(TINY), tmp_path / "written")
    assert "its weights in a file beside it" in notes[-1]
    one, two = written("classification"), tmp_path / "written"
    assert {path.name for path in two.iterdir()} - {path.name for path in one.iterdir()} == {onnx_model.DATA}
    moved = Path(shutil.move(two, tmp_path / "moved"))
    found = run(moved / onnx_model.MODEL, pixel_values=images(3))["logits"]
    np.testing.assert_allclose(found, run(one / onnx_model.MODEL, pixel_values=images(3))["logits"], atol=1e-6)


def test_nothing_of_the_machine_is_in_it(written: Callable[[str], Path]) -> None:
    directory = written("classification")
    homes = [str(ROOT), sys.prefix, sys.base_prefix, str(directory.parent), str(Path.home()), "site-packages", ".py"]
    for file in directory.iterdir():
        content = file.read_bytes()
        assert [home for home in homes if home.encode() in content] == [], file.name
    onnx.checker.check_model(str(directory / onnx_model.MODEL), full_check=True)


def test_optimum_finds_what_it_needs(written: Callable[[str], Path]) -> None:
    directory = written("classification")
    config: Mapping[str, Any] = json.loads((directory / "config.json").read_text())
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cat"}
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.onnx", "preprocessor_config.json"}
    (batch, *sides) = onnxruntime.InferenceSession(str(directory / onnx_model.MODEL)).get_inputs()[0].shape
    assert isinstance(batch, str) and sides == [3, 32, 32]


def test_the_command_replaces_an_earlier_one_and_nothing_else(
    native: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "written"
    command = ["export", str(native()), str(destination), "--to", "onnx"]
    assert main(command) == 0
    assert re.search(r"run by onnxruntime .* at most \d\.\de-\d\d from the model", capsys.readouterr().out)
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0
    (destination / onnx_model.MODEL).write_bytes(b"another program's")
    capsys.readouterr()
    assert main([*command, "--overwrite"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (destination / onnx_model.MODEL).read_bytes() == b"another program's"
