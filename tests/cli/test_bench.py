"""`beit-jax bench` as users run it: a table, JSON, one line for a mistake."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import toy_contenders
from tiny_models import KINDS, checkpoint

from beit_jax import variants
from beit_jax.cli.main import main
from beit_jax.peers import needs, race
from beit_jax.peers.job import cores
from beit_jax.weights.native import save

DIGITS = str(files("beit_jax") / "digits")


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toys in the place of ours and of transformers, which alone is installed."""
    monkeypatch.setattr(race, "PROCESS", toy_contenders.PROCESS)
    monkeypatch.setattr(race, "TURN", 0.02)
    monkeypatch.setattr(needs, "find_spec", lambda name: name if name in ("torch", "transformers") else None)
    monkeypatch.setattr("beit_jax.peers.bench.CONTENDERS", ("ours", "transformers, sdpa", "timm"))


@pytest.mark.usefixtures("toys")
def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", DIGITS, "--image-size", "16", "--rounds", "2", "--batch-size", "2", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("A forward pass of BeitForImageClassification, ")
    assert lines[0].endswith("16 x 16 pixels, batch 2, float32, on 1 thread of the CPU")
    assert "ms a call" in captured.out and "images/s" in captured.out and "peak memory" in captured.out
    (row,) = (line for line in lines if line.startswith("transformers, sdpa "))
    assert 1.0 < float(row.split()[-5]) < 5.5  # 2 and 10 ms
    assert "left out: timm (not installed: timm)" in lines and any("ours is computed by" in line for line in lines)
    assert lines[-1].startswith("python 3.") and "jax " in lines[-1]


@pytest.mark.usefixtures("toys")
def test_json_for_programs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "TURN", 0.001)  # of the processor, which hardly works here
    assert main(["bench", DIGITS, "--rounds", "2", "--cpu-time", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["contenders"]) == ["ours", "transformers, sdpa"] and found["left_out"].keys() == {"timm"}
    assert found["rounds"] == 2 and found["clock"] == "cpu" and found["parameters"] == 207_818
    assert found["threads"] == cores() and found["image_size"] == [32, 32]


@pytest.mark.usefixtures("toys")
def test_without_a_checkpoint_it_draws_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model, here of a smaller width."""
    small = replace(variants.VARIANTS["beit_base_patch16_224"], hidden_size=24, num_hidden_layers=1)
    monkeypatch.setattr(variants, "VARIANTS", {"beit_large_patch16_224": small})
    assert main(["bench", "--size", "large", "--image-size", "64", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image_size"] == [64, 64] and found["model"] == "BeitForImageClassification"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file or directory"),
        ([DIGITS, "--size", "base"], "--size base: of a model with random numbers, and a checkpoint was given"),
        (["--size", "huge"], "--size: expected base or large, found huge"),
        (["--image-size", "30"], "not a multiple of patch_size"),
        ([DIGITS, "--image-size", "30"], "not a multiple of patch_size"),
        (["--rounds", "0"], "--rounds: expected an integer of at least 1, found 0"),
        (["--batch-size", "0"], "--batch-size: expected an integer of at least 1"),
        (["--threads", str(cores() + 1)], f"--threads: expected at most {cores()}, found {cores() + 1}"),
        (["--revision", "main"], "--revision: for a checkpoint, which was not given"),
        (["--round", "3"], "--round: bench has no such option; the nearest is --rounds"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_a_model_of_another_task_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(tmp_path, checkpoint(KINDS["segmentation"]))
    assert main(["bench", str(tmp_path)]) == 2
    assert "expected a classifier, found a model of the task semantic_segmentation" in capsys.readouterr().err
