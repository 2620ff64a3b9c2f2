"""Tables of several classes and of numbers, from the file to a model that transformers reads, by the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import torch
import transformers
from PIL import Image
from sklearn import metrics

from beit_jax.cli.main import main
from beit_jax.train.data.datasets import open_dataset

COLOURS = ("blue", "green", "red")
VALUES = ("brightness", "redness")
IMAGES, SIDE = 80, 36  # the shorter side that 32 pixels are cut from: nothing is resized, so all read the same pixels
TRAIN = (
    "--data.batch-size 16 --data.workers 0 --model.dtype float32 --optim.epochs 10 --optim.warmup-epochs 1 "
    "--optim.lr 3e-3 --optim.layer-decay 1 --run.log-every 4"
).split()


class Made(NamedTuple):
    """What the commands made, and what they printed."""

    pictures: Path
    table: Path
    data: Path
    model: Path
    exported: Path
    scores: dict[str, Any]
    printed: str


def ran(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that ends well."""
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out + printed.err


def draw(folder: Path) -> Path:
    """Pictures with or without each of three colours, and their table."""
    rng = np.random.default_rng(0)
    lines = ["file_name,colours,brightness,redness"]
    for i in range(IMAGES):
        has = rng.random(3) < 0.5
        pixels = 40 + 150 * has[::-1] + rng.normal(0, 12, (SIDE, SIDE, 3))
        pixels = pixels.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        names = ";".join(name for name, present in zip(COLOURS, has, strict=True) if present) or "[]"
        lines.append(f"{i:02}.png,{names},{pixels.mean() * 10:.4f},{pixels[..., 0].mean() / 1000:.6f}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"


def make(folder: Path, columns: Sequence[str], train: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Made:
    """Prepare, train from a checkpoint of transformers, evaluate, export."""
    (folder / "pictures").mkdir()
    table = draw(folder / "pictures")
    start = reference.save(reference.random_model(**reference.TINY, num_labels=5), folder / "start")
    printed = ran(["prepare", "table", table, folder / "data", *columns], capsys)
    run = ["train", "finetune", "--data", folder / "data", "--out", folder / "run", "--init", start, *TRAIN, *train]
    printed += ran(run, capsys)
    model = folder / "run" / "model"
    evaluate = ["evaluate", model, "--data", folder / "data", "--workers", "0", "--json"]
    scores = json.loads(ran(evaluate, capsys))
    ran(["export", model, folder / "exported"], capsys)
    return Made(folder / "pictures", table, folder / "data", model, folder / "exported", scores, printed)


def theirs(made: Made, count: int = 6) -> tuple[list[Path], list[dict[str, float]], transformers.PreTrainedModel]:
    """What transformers' pipeline says of some pictures, and its model."""
    model = transformers.BeitForImageClassification.from_pretrained(made.exported)
    processor = transformers.BeitImageProcessorPil.from_pretrained(made.exported)
    pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor, top_k=None)
    paths = sorted(made.pictures.glob("*.png"))[:count]
    found = pipeline([str(path) for path in paths])
    return paths, [{entry["label"]: entry["score"] for entry in each} for each in found], model


def ours(made: Made, paths: Sequence[Path], key: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, float]]:
    capsys.readouterr()
    assert main(["classify", str(made.model), *map(str, paths), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return [{guess["label"]: guess[key] for guess in entry["classes"]} for entry in found]


def evaluated(made: Made, model: transformers.PreTrainedModel) -> tuple[np.ndarray, np.ndarray]:
    """transformers' outputs for the validation split, and its labels."""
    data = open_dataset(made.data, "validation")
    processor = transformers.BeitImageProcessorPil.from_pretrained(made.exported)
    pictures, labels = zip(*(data.load(index) for index in range(len(data))), strict=True)
    inputs = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.numpy(), np.stack(labels)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["prepare", "table", "TABLE", "NEW", "--label-columns", "colors"],
            "has the columns file_name, colours, brightness",
        ),
        (["prepare", "table", "TABLE", "NEW"], "no column of labels (label, labels, class"),
        (
            ["prepare", "table", "TABLE", "NEW", "--value-columns", "colours"],
            "row 2, column colours: expected a number",
        ),
        (["prepare", "table", "NOWHERE", "NEW"], "expected a table, or a folder that has one, found nothing"),
        (["prepare", "table", "FOLDER", "NEW"], "found a folder without metadata.csv or metadata.jsonl"),
        (["prepare", "folder", "FOLDER", "NEW", "--separator", ","], "--separator: for a table with a row for every"),
        (
            ["evaluate", "NOWHERE", "--images", "FOLDER", "--annotations", "FOLDER", "--separator", ","],
            "--separator: for",
        ),
        (["evaluate", "NOWHERE", "--data", "FOLDER", "--label-columns", "x"], "no table, for which the options of col"),
    ],
)
def test_what_is_refused(command: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "00.png").touch()
    (tmp_path / "t.csv").write_text("file_name,colours,brightness\npictures/00.png,red,1\n")
    names = {"TABLE": "t.csv", "NEW": "new", "FOLDER": "pictures", "NOWHERE": "nowhere"}
    arguments = [str(tmp_path / names[word]) if word in names else word for word in command]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "new").exists()


@pytest.mark.thorough
def test_several_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path, ["--label-columns", "colours"], ["--classify.class-weights", "balanced"], capsys)
    assert "several classes from colours (';' between them)" in made.printed
    assert "train 72, validation 8; 3 classes" in made.printed
    assert "the head starts new: the data's labels are 3 (blue, green, red), the checkpoint's 5" in made.printed

    paths, expected, model = theirs(made)
    assert model.config.problem_type == "multi_label_classification"
    assert list(model.config.id2label.values()) == list(COLOURS)
    for one, other in zip(ours(made, paths, "probability", capsys), expected, strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose([one[name] for name in other], list(other.values()), atol=1e-5)
        assert abs(sum(other.values()) - 1) > 1e-3  # each class for itself

    logits, truth = evaluated(made, model)
    assert made.scores["map_macro"] == pytest.approx(metrics.average_precision_score(truth, logits), abs=1e-9)
    assert made.scores["f1_micro"] == pytest.approx(metrics.f1_score(truth, logits >= 0, average="micro"), abs=1e-9)
    assert made.scores["map_macro"] > 0.95
    said = model(torch.zeros(1, 3, 32, 32), labels=torch.zeros(1, 3))  # its loss follows from problem_type
    expected_loss = torch.nn.functional.binary_cross_entropy_with_logits(said.logits, torch.zeros(1, 3))
    assert said.loss.item() == pytest.approx(expected_loss.item())

    lines = ran(["evaluate", made.model, "--data", made.table, "--label-columns", "colours", "--per-class"], capsys)
    assert "exact" in lines and "of 80 images" in lines and "AP %" in lines
    refused = main(["evaluate", str(made.model), "--data", str(made.table), "--value-columns", "redness"])
    assert refused == 2
    assert "holds numbers (values), but the model's outputs are classes of which several" in capsys.readouterr().err


@pytest.mark.thorough
def test_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path, ["--value-columns", *VALUES], ["--optim.ema", "0.5"], capsys)
    assert "numbers from brightness, redness" in made.printed and "2 values" in made.printed

    paths, expected, model = theirs(made)
    assert model.config.problem_type == "regression"
    assert list(model.config.id2label.values()) == list(VALUES)
    for one, other in zip(ours(made, paths, "value", capsys), expected, strict=True):
        np.testing.assert_allclose([one[name] for name in VALUES], [other[name] for name in VALUES], rtol=1e-5)

    logits, truth = evaluated(made, model)
    for row, index in zip(made.scores["values"], range(2), strict=True):
        assert row["label"] == VALUES[index]
        assert row["mae"] == pytest.approx(metrics.mean_absolute_error(truth[:, index], logits[:, index]), rel=1e-4)
        assert row["r2"] == pytest.approx(metrics.r2_score(truth[:, index], logits[:, index]), abs=1e-4)
    assert made.scores["r2"] > 0.9, "values of other sizes are learned alike"
    average = json.loads(
        ran(["evaluate", made.model.with_name("model-ema"), "--data", made.data, "--workers", "0", "--json"], capsys)
    )
    assert average["r2"] > 0.9, "the average is in the data's units, too"
    again = ["train", "finetune", "--data", made.data, "--out", tmp_path / "again", "--init", made.model, *TRAIN]
    first = ran([*again, "--optim.lr", "1e-9", "--optim.epochs", "1"], capsys)
    assert "starts new" not in first
    evaluate = ["evaluate", tmp_path / "again/model", "--data", made.data, "--workers", "0", "--json"]
    kept = json.loads(ran(evaluate, capsys))
    assert kept["mae"] == pytest.approx(made.scores["mae"], rel=1e-3)
