"""A run as people run it, by the command line: part of the model frozen, the best model kept, an early end; then the
best model in transformers."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import transformers
from PIL import Image

from beit_jax.cli.main import main
from beit_jax.weights.native import load

COLOURS, IMAGES, SIDE = ("blue", "green", "red"), 90, 36  # the shorter side that 32 pixels are cut from
TRAIN = (
    "--data.batch-size 20 --data.workers 0 --model.dtype float32 --optim.epochs 6 --optim.warmup-epochs 0 "
    "--optim.lr 5e-3 --optim.layer-decay 1 --optim.freeze embeddings,blocks.0,norm --run.best loss --run.patience 2"
).split()


def ran(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that ends well."""
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out + printed.err


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in error, error
    return error


def draw(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        label = i % 3
        pixels = rng.normal(100, 40, (SIDE, SIDE, 3))
        pixels[..., 2 - label] += 60
        path = folder / ("val" if i < 30 else "train") / COLOURS[label] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.mark.thorough
def test_from_a_checkpoint_of_transformers_to_the_best_model_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, data, run = draw(tmp_path / "pictures"), tmp_path / "data", tmp_path / "run"
    start = reference.save(reference.random_model(**reference.TINY, num_labels=5), tmp_path / "start")
    ran(["prepare", "folder", pictures, data], capsys)
    command = ["train", "finetune", "--data", data, "--out", run, "--init", start, *TRAIN]
    error = refused([*command, "--optim.freeze", "embeddings,blocks.0-2"], capsys)
    assert "--optim.freeze: expected blocks.A-B with A <= B <= 1, the model has 2 blocks, counted from 0" in error
    error = refused([*command, "--run.best", "acc"], capsys)
    assert "--run.best: expected a score of this run, accuracy, accuracy_top5, validation_loss; found acc" in error
    assert not run.exists()

    printed = ran(command, capsys)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {record["step"]: record for record in records if "skipped" not in record}
    best = min(evaluated.values(), key=lambda record: record["validation_loss"])
    assert (
        f"best         validation_loss {best['validation_loss']:.4f} after step {best['step']}, {run / 'best'}"
        in printed
    )
    native = load(run / "best")
    assert native.provenance["step"] == best["step"]
    assert native.provenance["scores"] == {
        name: best[name] for name in ("accuracy", "accuracy_top5", "validation_loss")
    }

    scores = json.loads(ran(["evaluate", run / "best", "--data", data, "--workers", 0, "--json"], capsys))
    assert scores["top1"] == best["accuracy"]
    ran(["export", run / "best", tmp_path / "exported"], capsys)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "exported").eval()
    processor = transformers.BeitImageProcessorPil.from_pretrained(tmp_path / "exported")
    files = sorted((pictures / "val").rglob("*.png"))
    labels = torch.tensor([COLOURS.index(path.parent.name) for path in files])
    with torch.no_grad():
        pixels = processor([Image.open(path) for path in files], return_tensors="pt")["pixel_values"]
        logits = theirs(pixels).logits
    assert float((logits.argmax(-1) == labels).float().mean()) == pytest.approx(best["accuracy"])
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(best["validation_loss"], abs=1e-5)

    before = transformers.AutoModelForImageClassification.from_pretrained(start).state_dict()
    after = theirs.state_dict()
    for name, frozen in (("embeddings", True), (r"layers?\.0\.", True), (r"layers?\.1\.", False), ("pooler", True)):
        found = [key for key in before if re.search(name, key) and key in after]
        assert found, name
        assert all(torch.equal(before[key], after[key]) == frozen for key in found if "relative" not in key), name

    more = ["train", "finetune", "--data", data, "--out", run, "--init", start, *TRAIN, "--optim.epochs", "9"]
    error = refused(more, capsys)
    assert "begun with recipe.optim.epochs 6.0, now it is 9.0" in error and f"another --out, --init {run}" in error
    for source in (run, run / "best"):
        out = tmp_path / f"from-{source.name}"
        once = "--optim.epochs 0.4 --optim.warmup-epochs 0 --optim.lr 1e-9 --optim.min-lr 0".split()
        ran(["train", "finetune", "--data", data, "--out", out, "--init", source, *TRAIN[:6], *once], capsys)
        step = "model" if source == run else "best"
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        expected = load(run / step).provenance["scores"]["validation_loss"]
        assert first["validation_loss"] == pytest.approx(expected, abs=1e-5)
