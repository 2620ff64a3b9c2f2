"""The command `evaluate`: a classifier or a segmentation model on labelled images. Imports wait until it runs."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from beit_jax.cli.arguments import Hub, Json, SegmentationArguments, SourceName
from beit_jax.cli.extras import train_extra
from beit_jax.errors import BeitJaxError, printable
from beit_jax.terminal import image_progress, print_json, print_lines, print_table

if TYPE_CHECKING:
    from beit_jax.images.processor import ImageProcessor
    from beit_jax.models.build import Model


@dataclass(frozen=True)
class ClassificationArguments:
    """How a classifier is evaluated."""

    split: str = "validation"
    """The split of prepared data; or, below --data, the folder of this name if there is one."""
    preset: Literal["hf", "unilm_eval", "timm"] | None = None
    """Prepare images as transformers, the original evaluation or timm do, not as the checkpoint says."""
    real: Path | None = None
    """ImageNet's reassessed labels: real.json."""
    confusion: Path | None = None
    """PNG to write: the confusion matrix."""
    per_class: bool = False
    """Print a line for every class."""
    eval_batch_size: int = 64
    """Images computed at once."""
    workers: int | None = None
    """Processes that prepare images; 0 uses threads instead. By default half of the cores, at most 16."""


def evaluate(
    checkpoint: Positional[SourceName],
    *,
    data: Annotated[Path | None, arg(metavar="DIR")] = None,
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    annotations: Annotated[Path | None, arg(metavar="DIR")] = None,
    labels_from_zero: bool = False,
    json: Json = False,
    classification: Annotated[ClassificationArguments, arg(name="")] = ClassificationArguments(),
    segmentation: Annotated[SegmentationArguments, arg(name="")] = SegmentationArguments(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Score a checkpoint on labelled images: top-1 and top-5 of a classifier, or mIoU, mAcc and aAcc of segmentation.

    Try:
      beit-jax evaluate facebook/data2vec-vision-base-ft1k --data ./imagenet
      beit-jax evaluate ./native --data ./folder-per-class --preset unilm_eval --confusion mistakes.png
      beit-jax evaluate ./native --images ADE/images/validation --annotations ADE/annotations/validation --as-trained
      beit-jax evaluate ./native --images DIR --annotations DIR --scales 0.5 0.75 1 1.25 1.5 1.75 --flip --as-trained

    Args:
        data: For a classifier: data from `beit-jax prepare`, or a folder of images per class.
        images: For segmentation: the folder of images.
        annotations: The folder of PNG files with a class number for every pixel, named as their images.
        labels_from_zero: Annotations count classes from 0, and 255 is no class. By default they are ADE20K's, which
            count from 1, and 0 is no class.
    """
    if data is not None and images is None and annotations is None:
        model, processor = hub.load(checkpoint)
        return _evaluate_classifier(model, processor, data, classification, json=json)
    if data is not None or images is None or annotations is None:
        raise BeitJaxError("give --data to evaluate a classifier, or --images and --annotations for segmentation")
    return _evaluate_segmentation(checkpoint, images, annotations, labels_from_zero, json, segmentation, hub)


def _evaluate_classifier(
    model: "Model", processor: "ImageProcessor", data: Path, options: ClassificationArguments, *, json: bool
) -> int:
    """`beit-jax evaluate` with ``--data``."""
    from beit_jax.images.processor import HALF, preset

    with train_extra():
        from beit_jax.train.evaluation import accuracy, labelled
        from beit_jax.train.evaluation.confusion import confusion_picture

    if options.confusion is not None and options.confusion.suffix.lower() != ".png":
        raise BeitJaxError(f"{options.confusion}: expected a name ending in .png")
    if options.preset is not None:
        processor = preset(
            options.preset, model.config.image_size, mean=processor.mean or HALF, std=processor.std or HALF
        )
    scores = labelled.evaluate_directory(
        model,
        processor,
        data,
        split=options.split,
        real=options.real,
        batch_size=options.eval_batch_size,
        workers=options.workers,
        progress=partial(image_progress, description="evaluating"),
    )
    if options.confusion is not None:
        confusion_picture(scores, options.confusion)
    if json:
        print_json(scores.as_dict())
        return 0
    if options.per_class:
        print_table(accuracy.TABLE, accuracy.class_table(scores))
    print_lines(accuracy.describe(scores))
    return 0


def _evaluate_segmentation(
    checkpoint: str,
    images: Path,
    annotations: Path,
    labels_from_zero: bool,
    json: bool,
    segmentation: SegmentationArguments,
    hub: Hub,
) -> int:
    from beit_jax.train.data.listing import annotated_images
    from beit_jax.train.evaluation import segmentation as scoring

    annotated_images(images, annotations)  # before a checkpoint is fetched for nothing
    model, processor, options = segmentation.load(checkpoint, hub)
    scores = scoring.evaluate_folders(
        model, processor, images, annotations, options, reduce=not labels_from_zero, progress=image_progress
    )
    if json:
        print_json(scores.as_dict())
        return 0
    rows = [
        [
            printable(row["label"], 60),
            *("" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("iou", "accuracy")),
        ]
        for row in scores.as_dict()["classes"]
    ]
    print_table(["class", "IoU %", "accuracy %"], rows)
    print_lines(scoring.describe(scores))
    return 0
