"""Scores against a plain count over pixels, and what is refused before or during an evaluation."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.train.data.listing import annotated_images
from beit_jax.train.evaluation.segmentation import Confusion, SegmentationScores

LABELS = ("a", "b", "c", "d", "e", "f")


def counted(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """mIoU, mAcc and aAcc by their definitions, class by class over sets of pixels."""
    valid = truth != 255
    ious, accuracies = [], []
    for c in range(len(LABELS)):
        here, there = valid & (truth == c), valid & (prediction == c)
        if (here | there).any():
            ious.append((here & there).sum() / (here | there).sum())
        if here.any():
            accuracies.append((here & there).sum() / here.sum())
    return float(np.mean(ious)), float(np.mean(accuracies)), float((prediction == truth)[valid].mean())


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.lists(st.integers(1, 39), max_size=5))
def test_scores_equal_a_plain_count_however_batches_are_split(seed: int, classes: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    truth, prediction = rng.integers(0, classes, (2, 40, 7))  # with few classes, some occur nowhere
    truth[rng.random(truth.shape) < 0.3] = 255
    truth[0, 0] = 0
    confusion = Confusion(LABELS)
    for p, t in zip(np.split(prediction, sorted(cuts)), np.split(truth, sorted(cuts)), strict=True):
        confusion.add(p, t)
    found = confusion.scores()
    expected = counted(prediction, truth)
    assert (found.mean_iou, found.mean_accuracy, found.pixel_accuracy) == pytest.approx(expected, abs=1e-12)
    assert found.pixels == (truth != 255).sum()


def test_a_class_that_never_occurs_counts_in_no_mean() -> None:
    confusion = Confusion(("a", "b", "c"))
    confusion.add(np.array([[0, 0, 1]]), np.array([[0, 0, 0]]))
    scores = confusion.scores()
    assert scores.mean_iou == pytest.approx((2 / 3 + 0) / 2) and scores.mean_accuracy == pytest.approx(2 / 3)
    assert scores.as_dict()["classes"][2] == {"label": "c", "iou": None, "accuracy": None, "dice": None}


def test_nothing_counted_has_no_score() -> None:
    scores = Confusion(LABELS).scores()
    assert isinstance(scores, SegmentationScores) and math.isnan(scores.mean_iou)
    assert scores.as_dict()["mIoU"] is None and scores.as_dict()["aAcc"] is None


def test_wrong_maps_are_named() -> None:
    confusion = Confusion(LABELS)
    with pytest.raises(BeitJaxError, match=r"x.png: expected \[2, 2\] as the image, found \[1, 2\]"):
        confusion.add(np.zeros((2, 2), int), np.zeros((1, 2), int), "x.png")
    with pytest.raises(BeitJaxError, match=r"x\.png: truth of classes 0 to 6, expected 0 to 5"):
        confusion.add(np.zeros((1, 2), int), np.array([[0, 6]]), "x.png")
    with pytest.raises(BeitJaxError, match="prediction of classes -1 to 0"):
        confusion.add(np.array([[0, -1]]), np.zeros((1, 2), int))


def test_images_are_paired_by_name(tmp_path: Path) -> None:
    images, annotations = tmp_path / "images", tmp_path / "annotations"
    with pytest.raises(BeitJaxError, match="images: expected a folder of images, found nothing"):
        annotated_images(images, annotations)
    images.mkdir(), annotations.mkdir()
    with pytest.raises(BeitJaxError, match="images: no images in this folder"):
        annotated_images(images, annotations)
    for name in ("b.jpg", "a.jpg"):
        Image.new("RGB", (2, 2)).save(images / name)
    (images / "notes.txt").write_text("not an image")
    with pytest.raises(BeitJaxError, match=r"annotations: no annotations \(.png\) in this folder"):
        annotated_images(images, annotations)
    Image.new("L", (2, 2)).save(annotations / "a.png")
    with pytest.raises(BeitJaxError, match=r"b.png: no such file, the annotation of b.jpg; 1 of 2 images have none"):
        annotated_images(images, annotations)
    Image.new("L", (2, 2)).save(annotations / "b.png")
    pairs = [(image.name, annotation.name) for image, annotation in annotated_images(images, annotations)]
    assert pairs == [("a.jpg", "a.png"), ("b.jpg", "b.png")]
