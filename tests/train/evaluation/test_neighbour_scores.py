"""`evaluate --knn` against scikit-learn's nearest neighbours of the same features."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from tiny_models import DEEP, checkpoint

import beit_jax
from beit_jax.cli.main import main
from beit_jax.weights import save

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": 12, "val": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a classifier, and images of three colours with much noise."""
    folder = tmp_path_factory.mktemp("knn")
    (folder / "native").mkdir()
    save(folder / "native", checkpoint(DEEP))
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number, label in enumerate(CLASSES if split == "train" else CLASSES[1:], start=split != "train"):
            (folder / "data" / split / label).mkdir(parents=True)
            for image in range(count):
                pixels = rng.normal(np.eye(3)[number] * 60 + 100, 90, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / label / f"{image:02}.png")
    return folder


def features(place: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    model, processor = beit_jax.from_pretrained(place / "native")
    paths = sorted((place / "data" / split).rglob("*.png"))
    labels = np.array([CLASSES.index(path.parent.name) for path in paths])
    return beit_jax.features(model, processor, paths).astype(np.float64), labels


def classifier(k: int, temperature: float) -> KNeighborsClassifier:
    return KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )


def test_the_accuracy_is_scikit_learns(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two splits, of which one lacks a class; and of one split, each image by all others."""
    command = ["evaluate", str(place / "native"), "--data", str(place / "data"), "--knn", "--workers", "0"]
    (train, labels), (tests, truth) = features(place, "train"), features(place, "val")
    assert main([*command, "--neighbours", "3", "20", "--temperature", "0.02", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["train_images"], found["leave_one_out"]) == (10, 36, False)
    assert [vote["k"] for vote in found["neighbours"]] == [3, 20]
    for vote in found["neighbours"]:
        assert vote["top1"] == classifier(vote["k"], 0.02).fit(train, labels).score(tests, truth)
        assert vote["top5"] == 1  # of three classes
    assert main([*command, "--split", "train", "--train-split", "train", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hits = [
        classifier(20, 0.07)
        .fit(np.delete(train, i, 0), np.delete(labels, i))
        .score(train[i : i + 1], labels[i : i + 1])
        for i in range(36)
    ]
    assert found["leave_one_out"] and found["neighbours"][0]["top1"] == np.mean(hits)
    alone = [*command[:3], str(place / "data" / "train"), *command[4:]]  # a folder without splits
    assert main(alone) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "36 images, each by all others" and f"{100 * np.mean(hits):6.2f} %" in lines[1]


def test_mistakes_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(place / "data")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train").symlink_to(place / "data" / "train")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "val").symlink_to(place / "data" / "train")
    (tmp_path / "other" / "train").symlink_to(place / "data" / "val")
    photo, other = (place / "data" / "val" / "bee" / name for name in ("00.png", "01.png"))
    (tmp_path / "table.csv").write_text(f"file_name,tags\n{photo},red;blue\n{other},red\n")
    cases = {
        f"--data {data} --neighbours 3": "--neighbours: for --knn, which was not given; leave it out",
        f"--data {data} --knn --neighbours 37 --workers 0": "k is 37, expected 1 to 36, the training images",
        f"--data {data} --knn --neighbours 0": "--neighbours: expected an integer of at least 1, found 0",
        f"--data {data} --knn --temperature 0": "--temperature 0.0: expected a number above 0",
        f"--data {data} --knn --per-class": "--per-class: for a classifier, and --knn scores features; leave it out",
        f"--data {data} --knn --train-split holdout": "no images of the split holdout alone; name another",
        f"--data {tmp_path / 'only'} --knn": "has no images of the split validation alone; name another with --split",
        f"--data {tmp_path / 'other'} --knn --workers 0": "class ant is none of the training images'",
        f"--data {tmp_path / 'table.csv'} --knn": "nearest neighbours vote for one class of",
    }
    for arguments, message in cases.items():
        assert main(["evaluate", str(place / "native"), *arguments.split()]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (arguments, error)
