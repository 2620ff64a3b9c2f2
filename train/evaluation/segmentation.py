"""How well a model segments: a confusion matrix, summed over images, and the scores that follow from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.label_maps import IGNORED, check_labels, read_label_map, reduce_labels
from beit_jax.images.processor import ImageProcessor, open_image
from beit_jax.inference.segmentation import DEFAULT, Inference, segment
from beit_jax.models.build import Model
from beit_jax.terminal import Progress, no_progress

from ..data.listing import annotated_images
from .shares import json_number, share


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a confusion matrix. A class that occurs neither in truth nor in prediction counts in no mean.

    Attributes:
        iou: for each class, intersection over union; NaN where the class does not occur.
        accuracy: for each class, the share of its pixels that were found; NaN where it has none.
    """

    labels: tuple[str, ...]
    iou: Float[np.ndarray, " classes"]
    accuracy: Float[np.ndarray, " classes"]
    pixel_accuracy: float
    pixels: int

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
        return {name: json_number(value) for name, value in means.items()} | {"pixels": self.pixels, "classes": classes}


@dataclass
class Confusion:
    """Counts the (truth, prediction) pairs of any number of images, exactly, in any order or grouping.

    Args:
        labels: class names.
        ignore: the class number of pixels that do not count.
    """

    labels: tuple[str, ...]
    ignore: int = IGNORED
    counts: Int[np.ndarray, "classes classes"] = field(init=False)

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
        pairs = truth[counted].astype(np.int64) * len(self.labels) + prediction[counted]
        self.counts += np.bincount(pairs, minlength=self.counts.size).reshape(self.counts.shape)

    def scores(self) -> SegmentationScores:
        """The scores of everything counted so far."""
        hits, truth, predicted = np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)
        total = int(self.counts.sum())
        with np.errstate(invalid="ignore"):
            iou, accuracy = hits / (truth + predicted - hits), hits / truth
        return SegmentationScores(self.labels, iou, accuracy, share(int(hits.sum()), total), total)


def evaluate_folders(
    model: Model,
    processor: ImageProcessor,
    images: Path,
    annotations: Path,
    how: Inference = DEFAULT,
    *,
    reduce: bool = True,
    progress: Progress = no_progress,
) -> SegmentationScores:
    """Segments every image of a folder, and compares it with the PNG of the same name in another folder.

    This is the layout of ADE20K.

    Args:
        reduce: True if annotations count classes from 1, with 0 for none, as ADE20K's files do.

    Raises:
        BeitJaxError: there are no images; an image has no annotation; or an annotation has another size than its image,
            or class numbers that the model does not have.
    """
    pairs = annotated_images(images, annotations)
    confusion = Confusion(model.config.labels)
    with progress(len(pairs)) as advance:
        for image, annotation in pairs:
            picture = open_image(image)
            truth = read_label_map(annotation)
            if truth.shape != (picture.height, picture.width):
                raise BeitJaxError(
                    f"{printable(annotation)}: {truth.shape[1]}x{truth.shape[0]} pixels, but {printable(image)} has "
                    f"{picture.width}x{picture.height}; use the annotation of this image"
                )
            truth = reduce_labels(truth) if reduce else truth
            check_labels(truth, model.config.labels, printable(annotation))
            confusion.add(segment(model, processor, picture, how), truth, printable(annotation))
            advance(1)
    return confusion.scores()


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def describe(scores: SegmentationScores) -> list[str]:
    """The means as lines for people."""
    return [
        f"mIoU  {100 * scores.mean_iou:6.2f} %   intersection over union, mean of the classes that occur",
        f"mAcc  {100 * scores.mean_accuracy:6.2f} %   pixels found, mean of the classes",
        f"aAcc  {100 * scores.pixel_accuracy:6.2f} %   pixels found, of {scores.pixels:,}",
    ]
