"""`beit-jax prepare`, `train` and `evaluate` as people type them: what is printed, what is refused, and how."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from beit_jax.__main__ import main
from beit_jax.train.recipes import RECIPES

RUN = ["train", "digits_finetune", "--data", "DATA", "--out", "OUT"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("data") / "digits"
    assert main(["prepare", "digits", str(destination)]) == 0
    return destination


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that exits with 2."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_prepare_says_what_it_wrote(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "digits", str(tmp_path / "again"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"] == {"train": 1347, "validation": 450}
    assert found["labels"][3] == "three"
    assert "already exists" in refused(["prepare", "digits", digits], capsys)
    assert "expected SOURCE DEST, found 1 names" in refused(["prepare", "folder", tmp_path / "x"], capsys)


def test_dry_run_prints_the_recipe_and_writes_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "digits_finetune", "--data", str(digits), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*run, "--optim.lr", "0.003", "--model.remat", "block", "--optim.ema", "0.99"]) == 0
    printed = capsys.readouterr().out
    assert "optim.lr = 0.003" in printed
    assert "1,347 images to train, 450 to evaluate, 10 classes" in printed
    assert main([*run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 60 * (1347 // 32)
    assert found["recipe"]["optim"]["lr"] == 2e-3
    assert found["memory"]["total"] > 16 * found["parameters"]
    assert not (tmp_path / "run").exists()


def test_help_lists_the_recipes_and_shows_a_recipes_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    listed = "".join(capsys.readouterr().out.replace("│", "").split())
    assert all(name in listed for name in RECIPES)
    with pytest.raises(SystemExit):
        main(["train", "beit_large_ft1k", "--help"])
    shown = capsys.readouterr().out
    assert "86.0 top-1" in shown
    assert "beit_large_patch16_224" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "beit_base_ft2k"], "no recipe is called beit_base_ft2k; the nearest is beit_base_ft22k"),
        ([*RUN, "--optim.lr", "-1"], "--optim.lr: expected a positive number, found -1"),
        ([*RUN, "--data", "NONE"], "no data set here"),
        ([*RUN, "--out", "NONE/run"], "no such directory; make it first"),
        (["train", "digits_probe", *RUN[2:]], "a linear probe needs an encoder"),
        ([*RUN, "--data.batch-size", "2048"], "1347 training images, fewer than --data.batch-size 2048"),
        ([*RUN, "--run.mesh", "3", "1", "1"], "--run.mesh: expected sizes of"),
        ([*RUN, "--init", "NONE"], "NONE"),
        (["evaluate", "NONE"], "give --data to evaluate a classifier, or --images and --annotations"),
        (["evaluate", "NONE", "--data", "DATA", "--images", "DATA"], "give --data to evaluate a classifier"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"DATA": digits, "OUT": tmp_path / "run", "NONE": tmp_path / "NONE", "NONE/run": tmp_path / "NONE" / "run"}
    assert message in refused([places.get(argument, argument) for argument in arguments], capsys)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_option_names_the_right_one(digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "beit_jax", "train", "digits_finetune", "--data", str(digits), "--out", "x"]
    done = subprocess.run(
        [*command, "--model.drop-pth", "0.3"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert "--model.drop-path" in done.stderr


def test_evaluate_a_classifier(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded classifier, trained by PyTorch, on the held-out digits: its recorded accuracy."""
    assert main(["demo", "--out", str(tmp_path / "native"), "--json"]) == 0
    recorded = json.loads(capsys.readouterr().out)["held_out_accuracy"]
    picture = tmp_path / "mistakes.png"
    command = ["evaluate", str(tmp_path / "native"), "--data", str(digits), "--workers", "0"]
    assert main([*command, "--confusion", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 450
    assert found["top1"] == pytest.approx(recorded, abs=1e-9)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--per-class"]) == 0
    assert "three" in capsys.readouterr().out
    assert "ending in .png" in refused([*command, "--confusion", tmp_path / "mistakes.txt"], capsys)


def test_without_the_extra_a_line_says_what_to_install(digits: Path, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['grain'] = None; from beit_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", hidden, "train", "digits_finetune", "--data", str(digits), "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (2, "error: grain is not installed; pip install 'beit-jax[train]'\n")
