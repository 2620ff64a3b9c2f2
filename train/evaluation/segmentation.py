"""How well a model segments: a confusion matrix, summed over images, and the scores that follow from it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.label_maps import (
    ADE20K_CLASSES,
    IGNORED,
    LabelMap,
    check_labels,
    model_labels,
    read_label_map,
)
from beit_jax.images.processor import ImageProcessor, open_image
from beit_jax.inference.segmentation import DEFAULT, Inference, segment
from beit_jax.models.build import Model
from beit_jax.terminal import Progress, no_progress

from ..data.listing import images_with_maps
from .shares import json_number, share


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a confusion matrix. A class that occurs neither in truth nor in prediction counts in no mean.

    Attributes:
        iou: for each class, intersection over union; NaN where the class does not occur.
        accuracy: for each class, the share of its pixels that were found; NaN where it has none.
        pixels, all_pixels: the pixels that counted, and those of all label maps.
        numbering: how annotations were read, for people and in JSON; None where label maps came as they are.
        left_out: a line for every image that could not be read.
    """

    labels: tuple[str, ...]
    iou: Float[np.ndarray, " classes"]
    accuracy: Float[np.ndarray, " classes"]
    pixel_accuracy: float
    pixels: int
    all_pixels: int
    numbering: "Numbering | None" = None
    left_out: tuple[str, ...] = ()

    @property
    def mean_iou(self) -> float:
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        return _mean(self.accuracy)

    def as_dict(self) -> dict[str, Any]:
        """The scores for JSON: mIoU, mAcc and aAcc as shares, and every class; null where a class does not occur."""
        classes = [
            {"label": label, "iou": json_number(iou), "accuracy": json_number(accuracy)}
            for label, iou, accuracy in zip(self.labels, self.iou, self.accuracy, strict=True)
        ]
        means = {"mIoU": self.mean_iou, "mAcc": self.mean_accuracy, "aAcc": self.pixel_accuracy}
        numbering = {} if self.numbering is None else self.numbering.as_dict()
        facts = {"pixels": self.pixels, "all_pixels": self.all_pixels, **numbering, "left_out": list(self.left_out)}
        return {name: json_number(value) for name, value in means.items()} | facts | {"classes": classes}


@dataclass(frozen=True)
class Numbering:
    """How annotations count the classes.

    Attributes:
        from_one: they count from 1, and 0 is no class; otherwise from 0. In both, neither 255 beyond the classes nor
            the checkpoint's ``semantic_loss_ignore_index`` is a class.
        source: who says so, for people.
    """

    from_one: bool
    source: str

    @property
    def option(self) -> str:
        """The option of `beit-jax evaluate` that asks for it."""
        return "--labels-from-one" if self.from_one else "--labels-from-zero"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the number of the first class, and who says so."""
        return {"labels_from": int(self.from_one), "labels_from_source": self.source}


def numbering(processor: ImageProcessor, classes: int, reduce: bool | None = None) -> Numbering:
    """How annotations count the classes of a model, by the first of these that says it.

    The caller does; the checkpoint does (`do_reduce_labels` in preprocessor_config.json); the model has ADE20K's 150
    classes, whose annotations count from 1.

    Args:
        reduce: True if annotations count from 1; None: not said.

    Raises:
        BeitJaxError: nothing says it.
    """
    if reduce is not None:
        return Numbering(reduce, "as asked for")
    if processor.do_reduce_labels is not None:
        return Numbering(processor.do_reduce_labels, "do_reduce_labels of the checkpoint")
    if classes == ADE20K_CLASSES:
        return Numbering(True, f"ADE20K's annotations, as the model has {ADE20K_CLASSES} classes")
    raise BeitJaxError(
        f"the checkpoint does not say whether annotations count its {classes} classes from 0 or from 1 "
        "(do_reduce_labels): pass --labels-from-zero, or --labels-from-one if 0 is no class (in Python reduce=False or "
        "True)"
    )


@dataclass
class Confusion:
    """Counts the (truth, prediction) pairs of any number of images, exactly, in any order or grouping.

    Args:
        labels: class names.
        ignore: the class number of pixels that do not count.

    Attributes:
        counts: pixels by true class (row) and predicted class.
        ignored: pixels that did not count.
    """

    labels: tuple[str, ...]
    ignore: int = IGNORED
    counts: Int[np.ndarray, "classes classes"] = field(init=False)
    ignored: int = 0

    def __post_init__(self) -> None:
        self.counts = np.zeros((len(self.labels), len(self.labels)), np.int64)

    def add(self, prediction: np.ndarray, truth: np.ndarray, name: str = "label map") -> None:
        """Counts the pixels of one image [h, w], or of a batch [b, h, w].

        Raises:
            BeitJaxError: the maps have different shapes, or a class number does not exist.
        """
        if prediction.shape != truth.shape:
            raise BeitJaxError(f"{name}: expected {list(prediction.shape)} as the image, found {list(truth.shape)}")
        counted = truth != self.ignore
        for what, values in (("truth", truth[counted]), ("prediction", prediction[counted])):
            if values.size and not 0 <= values.min() <= values.max() < len(self.labels):
                found = f"{values.min()} to {values.max()}"
                raise BeitJaxError(f"{name}: {what} of classes {found}, expected 0 to {len(self.labels) - 1}")
        self.ignored += int(truth.size - np.count_nonzero(counted))
        pairs = truth[counted].astype(np.int64) * len(self.labels) + prediction[counted]
        self.counts += np.bincount(pairs, minlength=self.counts.size).reshape(self.counts.shape)

    def scores(self) -> SegmentationScores:
        """The scores of everything counted so far."""
        hits, truth, predicted = np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)
        total = int(self.counts.sum())
        with np.errstate(invalid="ignore"):
            iou, accuracy = hits / (truth + predicted - hits), hits / truth
        pixel_accuracy = share(int(hits.sum()), total)
        return SegmentationScores(self.labels, iou, accuracy, pixel_accuracy, total, total + self.ignored)


def evaluate_folders(
    model: Model,
    processor: ImageProcessor,
    images: Path,
    annotations: Path,
    how: Inference = DEFAULT,
    *,
    reduce: bool | None = None,
    max_bad: float = 0.0,
    progress: Progress = no_progress,
) -> SegmentationScores:
    """Segments every image of a folder, and compares it with the PNG of the same name in another folder.

    This is the layout of ADE20K.

    Args:
        reduce: True if annotations count classes from 1, with 0 for none, as ADE20K's files do; by default as
            `numbering` finds.
        max_bad: the share of images that may be left out, because they or their annotations are missing or cannot be
            read.

    Raises:
        BeitJaxError: there are no images; more of them are bad than allowed; an annotation has another size than its
            image, or class numbers that the model does not have; nothing says how annotations count; no pixel counts.
    """
    how_counted = numbering(processor, len(model.config.labels), reduce)
    other = replace(how_counted, from_one=not how_counted.from_one)
    pairs, alone = images_with_maps(images, annotations)
    bad = BadImages(len(pairs) + len(alone), max_bad)
    for place, reason in enumerate(alone, start=len(pairs)):
        bad.note(place, BeitJaxError(reason))
    labels, ignored = model.config.labels, model.config.semantic_loss_ignore_index
    confusion = Confusion(labels, ignored)
    with progress(len(pairs)) as advance:
        for place, (image, annotation) in enumerate(pairs):
            try:
                picture, truth = open_image(image), read_label_map(annotation)
            except BeitJaxError as error:
                bad.note(place, error)
            else:
                _check_size(truth, picture, annotation, image)
                truth = model_labels(truth, len(labels), from_one=how_counted.from_one, ignored=ignored)
                advice = f"annotations were read as {how_counted.option} reads them; or do you want {other.option}?"
                check_labels(truth, labels, printable(annotation), advice, ignored=ignored)
                confusion.add(segment(model, processor, picture, how), truth, printable(annotation))
            advance(1)
    scores = confusion.scores()
    if not scores.pixels:
        raise BeitJaxError(
            f"{printable(annotations)}: none of {scores.all_pixels:,} pixels has a class, so there is no score; they "
            f"were read as {how_counted.option} reads them ({how_counted.source}): or do you want {other.option}?"
        )
    return replace(scores, numbering=how_counted, left_out=tuple(bad.reasons.values()))


def _check_size(truth: LabelMap, picture: Image.Image, annotation: Path, image: Path) -> None:
    if truth.shape != (picture.height, picture.width):
        raise BeitJaxError(
            f"{printable(annotation)}: {truth.shape[1]}x{truth.shape[0]} pixels, but {printable(image)} has "
            f"{picture.width}x{picture.height}; use the annotation of this image"
        )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def describe(scores: SegmentationScores) -> list[str]:
    """The means as lines for people, with the pixels that they count."""
    lines = [
        f"mIoU  {100 * scores.mean_iou:6.2f} %   intersection over union, mean of the classes that occur",
        f"mAcc  {100 * scores.mean_accuracy:6.2f} %   pixels found, mean of the classes",
        f"aAcc  {100 * scores.pixel_accuracy:6.2f} %   pixels found",
        f"counted {scores.pixels:,} of {scores.all_pixels:,} pixels; the others have no class",
    ]
    if scores.numbering is not None:
        first = "1, and 0 is no class" if scores.numbering.from_one else "0"
        lines.append(f"annotations count classes from {first} ({scores.numbering.source})")
    return lines + [f"left out     {line}" for line in scores.left_out]
