"""Own masks from beginning to end by the command line: prepared, trained, evaluated, exported, read by transformers."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from beit_jax import from_pretrained
from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.images.label_maps import write_label_map
from beit_jax.inference.segmentation import segment
from beit_jax.train.data.datasets import open_segmentation
from beit_jax.train.evaluation.segmentation import Worst, evaluate_prepared
from beit_jax.train.loop.plan import make_plan
from beit_jax.train.recipes import recipe_named
from tests.support.scenes import scene, write_scenes
from tests.support.segmenter import save_segmenter

SMALL = (  # square, because transformers computes no others as they are
    "--model.image-size 48 --model.patch-size 8 --model.hidden-size 32 --model.depth 4 --model.heads 2 "
    "--model.mlp 64 --model.drop-path 0 --model.dtype float32 --data.workers 0"
).split()
SIDES = (40, 64)


def counted(model: Any, processor: Any, images: list[tuple[Path, np.ndarray]], classes: int) -> tuple[float, int]:
    """mIoU and pixels, by a loop over classes and images."""
    hits, unions = np.zeros(classes), np.zeros(classes)
    pixels = 0
    for path, truth in images:
        found = segment(model, processor, path)
        valid = truth != 255
        pixels += int(valid.sum())
        for number in range(classes):
            here, there = valid & (truth == number), valid & (found == number)
            hits[number] += (here & there).sum()
            unions[number] += (here | there).sum()
    occurs = unions > 0
    return float((hits[occurs] / unions[occurs]).mean()), pixels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of two classes, the ground among them."""
    root = tmp_path_factory.mktemp("own")
    write_scenes(root, range(64), classes=2, split="train", sides=SIDES)
    write_scenes(root, range(1000, 1012), classes=2, split="val", sides=SIDES)
    (root / "names.txt").write_text("ground\nberry\n")
    names = ["--labels", str(root / "names.txt")]
    assert main(["prepare", "segmentation", str(root / "images"), str(root / "masks"), str(root / "data"), *names]) == 0
    return root


@pytest.fixture(scope="module")
def run(data: Path) -> Iterator[Path]:
    schedule = "--optim.epochs 10 --optim.lr 4e-3 --optim.layer-decay 1 --optim.warmup-epochs 1".split()
    losses = "--segment.loss cross_entropy+0.5*dice --segment.class-weights balanced".split()
    places = ["--data", str(data / "data"), "--out", str(data / "run"), "--run.eval-every-epochs", "10"]
    assert main(["train", "segment", *places, *SMALL, *schedule, *losses]) == 0
    yield data / "run"


@pytest.mark.thorough
def test_two_classes_are_learned_and_scored(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worst = data / "worst.png"
    assert (
        main(["evaluate", str(run / "model"), "--data", str(data / "data"), "--worst", "2", str(worst), "--json"]) == 0
    )
    scores = json.loads(capsys.readouterr().out)
    assert scores["mIoU"] >= 0.9
    images = [(data / "images/val" / f"{seed}.jpg", scene(seed, 2, SIDES)[1]) for seed in range(1000, 1012)]
    mean, pixels = counted(*from_pretrained(run / "model"), images, 2)
    assert (scores["mIoU"], scores["pixels"], scores["all_pixels"]) == (pytest.approx(mean, abs=1e-12), pixels, pixels)
    folders = ["--images", str(data / "images/val"), "--annotations", str(data / "masks/val")]
    assert main(["evaluate", str(run / "model"), *folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == scores["classes"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(entry["mIoU"] for entry in reversed(logged) if "mIoU" in entry) == pytest.approx(mean, abs=1e-6)
    assert {"cross_entropy", "dice"} <= logged[0].keys()
    with Image.open(worst) as sheet:
        assert sheet.width > 3 * 48
    settings = json.loads((run / "model" / "preprocessor_config.json").read_text())
    assert settings["do_reduce_labels"] is False


@pytest.mark.thorough
def test_transformers_reads_the_export(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run / "model"), str(tmp_path / "hf")]) == 0
    theirs = transformers.BeitForSemanticSegmentation.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.id2label == {0: "ground", 1: "berry"} and theirs.config.semantic_loss_ignore_index == 255
    model, _ = from_pretrained(run / "model")
    pixels = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2)).logits.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(np.asarray(model(pixels).logits), expected, atol=1e-5 * np.abs(expected).max())
    image = data / "images/val/1000.jpg"
    capsys.readouterr()
    assert (
        main(
            [
                "segment",
                str(tmp_path / "hf"),
                str(image),
                "--mask",
                str(tmp_path / "mask.png"),
                "-o",
                str(tmp_path / "p.png"),
            ]
        )
        == 0
    )
    assert "berry" in capsys.readouterr().out
    found = np.asarray(Image.open(tmp_path / "mask.png"))
    assert np.array_equal(found, segment(*from_pretrained(run / "model"), image))


# Evaluation of a model that learned nothing


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segmenter(tmp_path_factory.mktemp("model") / "random", ("ground", "berry"), do_reduce_labels=False)


def test_a_random_model_of_two_classes_counts_every_labelled_pixel(
    random_model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [(data / "images/val" / f"{seed}.jpg", scene(seed, 2, SIDES)[1]) for seed in range(1000, 1012)]
    mean, pixels = counted(*from_pretrained(random_model), images, 2)
    assert mean < 0.8
    for where in (
        ["--data", str(data / "data")],
        ["--images", str(data / "images/val"), "--annotations", str(data / "masks/val")],
    ):
        assert main(["evaluate", str(random_model), *where, "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert (scores["mIoU"], scores["pixels"]) == (pytest.approx(mean, abs=1e-12), pixels)
        dice = [entry["dice"] for entry in scores["classes"]]
        assert dice == pytest.approx([2 * e["iou"] / (1 + e["iou"]) for e in scores["classes"]])


def test_classes_are_found_by_name(random_model: Path, data: Path, tmp_path: Path) -> None:
    """The same model with its classes in another order, and one more, has the same scores."""
    images = open_segmentation(data / "data", "validation")
    model, processor = from_pretrained(random_model)
    found = evaluate_prepared(model, processor, images)
    assert found.matched == "name"
    unnamed = save_segmenter(tmp_path / "unnamed", ("LABEL_0", "LABEL_1"))
    by_number = evaluate_prepared(*from_pretrained(unnamed), images)
    assert by_number.matched == "number" and by_number.mean_iou == found.mean_iou
    turned = evaluate_prepared(*from_pretrained(save_segmenter(tmp_path / "turned", ("berry", "ground"))), images)
    assert turned.mean_iou != found.mean_iou and turned.pixels == found.pixels
    other = save_segmenter(tmp_path / "other", ("sky", "berry"))
    with pytest.raises(
        BeitJaxError, match="class ground is none of the model's 2, whose first is sky; prepare the data"
    ):
        evaluate_prepared(*from_pretrained(other), images)


def test_the_worst_images_are_the_same_ones_every_time(random_model: Path, data: Path, tmp_path: Path) -> None:
    images, loaded = open_segmentation(data / "data", "validation"), from_pretrained(random_model)
    drawn = []
    for count in (3, 12):
        worst = Worst(count)
        evaluate_prepared(*loaded, images, worst=worst)
        assert len(worst.rows) == count
        assert [iou for iou, _, _ in worst.found] == sorted(iou for iou, _, _ in worst.found)
        drawn.append([row.title for row in worst.rows])
    assert drawn[1][:3] == drawn[0]
    arguments = ["evaluate", str(random_model), "--data", str(data / "data"), "--worst", "2"]
    for name in ("a.png", "b.png", "folder"):
        assert main([*arguments, str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["001.png", "002.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels-from-one"], "--labels-from-one: prepared data say how they count classes; leave it out"),
        (["--per-class"], "--per-class: for a classifier, and .* holds label maps; leave it out"),
        (["--split", "nowhere"], "no split nowhere, found train, validation"),
        (["--worst", "0", "w.png"], "--worst: expected an integer of at least 1, found 0"),
        (["--worst", "2", "w.jpg"], "--worst: w.jpg has another ending, expected a name in .png or a new folder"),
    ],
)
def test_options_that_cannot_be(
    options: list[str], message: str, random_model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(random_model), "--data", str(data / "data"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and re.search(message, captured.err), captured.err


def test_masks_of_0_and_255_are_no_silent_score(
    random_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the pixels would count, all of one class."""
    for seed in range(1000, 1012):
        write_label_map(scene(seed, 2, SIDES)[1].astype(int) * 255, tmp_path / f"{seed}.png")
    folders = ["--images", str(data / "images/val"), "--annotations", str(tmp_path)]
    assert main(["evaluate", str(random_model), *folders]) == 2
    assert "hold 0 and 255 only, and 255 is no class" in (message := capsys.readouterr().err) and "--binary" in message


# The recipe


def test_a_recipe_for_any_classes_and_weights(data: Path, tmp_path: Path) -> None:
    recipe = recipe_named("segment")
    recipe = replace(
        recipe,
        model=replace(recipe.model, image_size=(32, 48), variant="beit_base_patch16_640_ade20k"),
        segment=replace(recipe.segment, class_weights="balanced", loss="dice+focal"),
    )
    recipe.check()
    plan = make_plan(recipe, data / "data")
    counts = np.array(open_segmentation(data / "data", "train").pixels)
    np.testing.assert_allclose(plan.objective.weights, counts.sum() / (2 * counts), rtol=1e-6)  # type: ignore[attr-defined]
    assert plan.processor.do_reduce_labels is False and plan.processor.resize.short == 32  # type: ignore[union-attr]
    assert plan.config.labels == ("ground", "berry") and plan.config.image_size == (32, 48)
    assert (plan.config.feature_taps, plan.config.out_indices) == ("hf", (4, 6, 8, 12))
    picture, labels = plan.training.load(0)
    pixels, classes = plan.objective.transform(picture, labels, np.random.default_rng(0))
    assert pixels.shape == (32, 48, 3) and classes.shape == (32, 48)
    with pytest.raises(BeitJaxError, match=r"--segment.focal-gamma: expected a --segment.loss with focal, found 1.0"):
        replace(recipe, segment=replace(recipe.segment, loss="dice", focal_gamma=1.0)).check()
    (tmp_path / "weights.json").write_text('{"sea": 2}')
    wrong = replace(recipe, segment=replace(recipe.segment, class_weights=str(tmp_path / "weights.json")))
    with pytest.raises(BeitJaxError, match="sea is no class of the data"):
        make_plan(wrong, data / "data")
