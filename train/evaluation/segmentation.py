"""How well a model segments: a confusion matrix, summed over images, and the scores that follow from it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.label_maps import IGNORED, LabelMap
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.segmentation import DEFAULT, Inference, Picture, segment
from beit_jax.looking.compared import Compared
from beit_jax.models.build import Model
from beit_jax.terminal import Progress, no_progress

from ..data.datasets import SegmentationDataset
from ..data.listing import images_with_maps
from .shares import json_number, share
from .truths import FolderTruth, Numbering, PreparedTruth, Truth, map_order, numbering


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a confusion matrix. A class that occurs neither in truth nor in prediction counts in no mean.

    Attributes:
        iou: for each class, intersection over union; NaN where the class does not occur.
        accuracy: for each class, the share of its pixels that were found; NaN where it has none.
        pixels, all_pixels: the pixels that counted, and those of all label maps.
        numbering: how annotations were read, for people and in JSON; None where label maps came as they are.
        matched: how the classes of prepared data were matched with those of the model, for people.
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
    matched: str = ""

    @property
    def dice(self) -> Float[np.ndarray, " classes"]:
        """For each class, twice the intersection over the sum of both areas (F1); NaN where it does not occur."""
        return 2 * self.iou / (1 + self.iou)

    @property
    def mean_dice(self) -> float:
        return _mean(self.dice)

    @property
    def mean_iou(self) -> float:
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        return _mean(self.accuracy)

    def as_dict(self) -> dict[str, Any]:
        """The scores for JSON: the means as shares, and every class; null where a class does not occur."""
        classes = [
            {"label": label, "iou": json_number(iou), "accuracy": json_number(accuracy), "dice": json_number(dice)}
            for label, iou, accuracy, dice in zip(self.labels, self.iou, self.accuracy, self.dice, strict=True)
        ]
        means = {
            "mIoU": self.mean_iou,
            "mAcc": self.mean_accuracy,
            "aAcc": self.pixel_accuracy,
            "mDice": self.mean_dice,
        }
        numbering = {} if self.numbering is None else self.numbering.as_dict()
        numbering |= {"matched": self.matched} if self.matched else {}
        facts = {"pixels": self.pixels, "all_pixels": self.all_pixels, **numbering, "left_out": list(self.left_out)}
        return {name: json_number(value) for name, value in means.items()} | facts | {"classes": classes}


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

    def merge(self, other: "Confusion") -> None:
        """Adds what another one has counted."""
        self.counts += other.counts
        self.ignored += other.ignored

    def scores(self) -> SegmentationScores:
        """The scores of everything counted so far."""
        hits, truth, predicted = np.diag(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)
        total = int(self.counts.sum())
        with np.errstate(invalid="ignore"):
            iou, accuracy = hits / (truth + predicted - hits), hits / truth
        pixel_accuracy = share(int(hits.sum()), total)
        return SegmentationScores(self.labels, iou, accuracy, pixel_accuracy, total, total + self.ignored)


@dataclass
class Worst:
    """The images of the smallest mean IoU of the classes that occur in them; of equal ones the first.

    Images of which no pixel counts are none of them.
    """

    count: int
    found: list[tuple[float, int, Compared]] = field(default_factory=list)

    def add(
        self, counts: Confusion, place: int, title: str, picture: Picture, truth: LabelMap, found: LabelMap
    ) -> None:
        """Notes an image, whose pixels `counts` holds."""
        iou = counts.scores().mean_iou
        if np.isnan(iou):
            return
        words = f"{title}: mIoU {100 * iou:.2f} %   image, truth, found"
        self.found.append((iou, place, Compared(words, picture, truth, found)))
        self.found.sort(key=lambda entry: entry[:2])
        del self.found[self.count :]

    @property
    def rows(self) -> list[Compared]:
        """The images, the worst first."""
        return [row for _, _, row in self.found]


def evaluate_folders(
    model: Model,
    processor: ImageProcessor,
    images: Path,
    annotations: Path,
    how: Inference = DEFAULT,
    *,
    reduce: bool | None = None,
    max_bad: float = 0.0,
    worst: Worst | None = None,
    progress: Progress = no_progress,
) -> SegmentationScores:
    """Segments every image of a folder, and compares it with the label map of the same name in another folder.

    This is the layout of ADE20K.

    Args:
        reduce: True if annotations count classes from 1, with 0 for none, as ADE20K's files do; by default as
            `numbering` finds.
        max_bad: the share of images that may be left out, because they or their annotations are missing or cannot be
            read.
        worst: collects the images that score worst.

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
    config = model.config
    truth = FolderTruth(pairs, how_counted, config.labels, config.semantic_loss_ignore_index)
    scores = _evaluated(model, processor, truth, how, bad, worst, progress).scores()
    if not scores.pixels:
        raise BeitJaxError(
            f"{printable(annotations)}: none of {scores.all_pixels:,} pixels has a class, so there is no score; they "
            f"were read as {how_counted.option} reads them ({how_counted.source}): or do you want {other.option}?"
        )
    if truth.seen == {"0", "255"} and not how_counted.from_one and len(config.labels) <= IGNORED:
        raise BeitJaxError(
            f"{printable(annotations)}: hold 0 and 255 only, and 255 is no class; if it is the second one, prepare "
            "them (beit-jax prepare segmentation IMAGES ANNOTATIONS DEST --binary), and evaluate with --data DEST"
        )
    return replace(scores, numbering=how_counted, left_out=tuple(bad.reasons.values()))


def evaluate_prepared(
    model: Model,
    processor: ImageProcessor,
    images: SegmentationDataset,
    how: Inference = DEFAULT,
    *,
    max_bad: float = 0.0,
    worst: Worst | None = None,
    progress: Progress = no_progress,
) -> SegmentationScores:
    """Segments every image of a split of prepared data.

    Classes of the data are found among the model's by name. Where one of them has no names, they are the same numbers.

    Args:
        max_bad, worst: as for `evaluate_folders`.

    Raises:
        BeitJaxError: classes that the model does not have; more records are bad than allowed; no pixel counts.
    """
    order = map_order(images, model.config.labels)
    ignored = model.config.semantic_loss_ignore_index
    truth = PreparedTruth(images, np.array([*order.indices, ignored]))
    bad = BadImages(len(images), max_bad)
    scores = _evaluated(model, processor, truth, how, bad, worst, progress).scores()
    if not scores.pixels:
        raise BeitJaxError(
            f"{printable(images.directory)}: none of the {scores.all_pixels:,} pixels of {images.split} has a class of "
            "the model, so there is no score; evaluate another split"
        )
    return replace(scores, matched=order.rule, left_out=tuple(bad.reasons.values()))


def _evaluated(
    model: Model,
    processor: ImageProcessor,
    truth: Truth,
    how: Inference,
    bad: BadImages,
    worst: Worst | None,
    progress: Progress,
) -> Confusion:
    labels, ignored = model.config.labels, model.config.semantic_loss_ignore_index
    total, decoded = Confusion(labels, ignored), replace(processor, bands=None)
    with progress(len(truth)) as advance:
        for place in range(len(truth)):
            try:
                picture, stored = truth.read(place, processor)
            except BeitJaxError as error:
                bad.note(place, error)
            else:
                name = truth.name(place)
                _check_size(stored, picture, name, truth.title(place))
                wanted, found = truth.numbered(place, stored), segment(model, decoded, picture, how)
                counts = Confusion(labels, ignored)
                counts.add(found, wanted, name)
                total.merge(counts)
                if worst is not None:
                    worst.add(counts, place, truth.title(place), picture, wanted, found)
            advance(1)
    return total


def _check_size(truth: LabelMap, picture: Picture, name: str, image: str) -> None:
    height, width = (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]
    if truth.shape != (height, width):
        raise BeitJaxError(
            f"{name}: {truth.shape[1]}x{truth.shape[0]} pixels, but {image} has {width}x{height}; use the annotation "
            "of this image"
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
        f"mDice {100 * scores.mean_dice:6.2f} %   Dice (F1), mean of the classes that occur",
        f"counted {scores.pixels:,} of {scores.all_pixels:,} pixels; the others have no class",
    ]
    if scores.numbering is not None:
        first = "1, and 0 is no class" if scores.numbering.from_one else "0"
        lines.append(f"annotations count classes from {first} ({scores.numbering.source})")
    if scores.matched:
        lines.append(f"classes matched by {scores.matched}")
    return lines + [f"left out     {line}" for line in scores.left_out]
