"""Evaluation on labelled images; matches their classes with the model's."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from beit_jax.choices import ProblemType
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.processor import ImageProcessor
from beit_jax.json_file import read_json_array
from beit_jax.models.build import Model
from beit_jax.terminal import Progress, no_progress

from ..labels.table import TableImages
from . import accuracy, multilabel, regression
from .accuracy import Scores, evaluate_classification
from .matching import ClassOrder, class_order, value_order
from .multilabel import MultiLabelScores, evaluate_multilabel
from .opening import ImageFolder, Labelled, open_labelled
from .regression import RegressionScores, evaluate_regression
from .stepping import HostBatch, host_batches

VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")


def real_labels(path: Path, file_names: Sequence[str], classes: int) -> Int[np.ndarray, "images any"]:
    """ImageNet's reassessed labels ("ReaL"). Each row holds the classes of one image, filled up with -1.

    A prediction is right if it is one of the classes. An image without any does not count.

    Args:
        path: ``real.json``: a list of classes for each validation image, in the order of the images' numbers. The order
            of a folder per class is another one. Source: google-research/reassessed-imagenet; arXiv 2006.07159.
        file_names: the names of the images in ImageNet: ILSVRC2012_val_00000001.JPEG.

    Raises:
        BeitJaxError: no such file, no list of lists of classes, or an image that it does not have.
    """
    lists = _read_lists(path, classes)
    numbers = []
    for name in file_names:
        match = VALIDATION_NUMBER.search(name)
        if match is None or not 1 <= int(match[1]) <= len(lists):
            raise BeitJaxError(
                f"{printable(name)}: has no labels in {printable(path)}, which are those of "
                f"ILSVRC2012_val_00000001.JPEG to {len(lists):08d}; evaluate ImageNet's validation images"
            )
        numbers.append(int(match[1]) - 1)
    found = np.full((len(numbers), max((len(lists[i]) for i in numbers), default=0) or 1), -1, np.int32)
    for row, number in zip(found, numbers, strict=True):
        row[: len(lists[number])] = lists[number]
    return found


def _read_lists(path: Path, classes: int) -> list[list[int]]:
    lists = read_json_array(path, advice="give the path of real.json")
    if not all(isinstance(entry, list) for entry in lists):
        raise BeitJaxError(f"{printable(path)}: expected a list of lists of classes; give the path of real.json")
    for number, entry in enumerate(lists, start=1):
        for label in entry:
            if type(label) is not int or not 0 <= label < classes:
                raise BeitJaxError(
                    f"{printable(path)}: image {number}: class {printable(label, 40)}, expected 0 to {classes - 1}"
                )
    return lists


AnyScores = Scores | MultiLabelScores | RegressionScores


def evaluate_directory(
    model: Model, processor: ImageProcessor, directory: str | Path, *, split: str = "validation", **options: Any
) -> AnyScores:
    """Scores of a model on a directory: `evaluate_images` of what `open_labelled` finds there, with its options.

    Raises:
        BeitJaxError: as both.
    """
    _check_task(model)
    return evaluate_images(model, processor, open_labelled(Path(directory), split), **options)


def evaluate_images(
    model: Model,
    processor: ImageProcessor,
    data: Labelled,
    *,
    real: Path | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    max_bad: float = 0.0,
    mesh: Mesh | None = None,
    progress: Progress = no_progress,
) -> AnyScores:
    """Scores of a model on labelled images, of the kind that its outputs are.

    A model whose outputs are classes of which several may hold takes data of one class for each image, too.

    Args:
        processor: prepares the images: the checkpoint's own, or the preset behind its published number.
        real: ``real.json``, to also count ImageNet's reassessed labels.
        batch_size: images at a time, over all devices and hosts.
        workers: processes that prepare images, as for `evaluation_batches.eval_batches`.
        max_bad: the share of images that may be left out because they cannot be read; `Scores.left_out` names them.

    Raises:
        BeitJaxError: the model does not classify, data cannot be read, they say something else than the model does, or
            their classes are not the model's.
    """
    labels = _check_task(model)
    problem = problem_type_of(model, data)
    if real is not None and problem != "single_label_classification":
        raise BeitJaxError(f"--real: ImageNet's labels are for one class of an image, the model is for {problem}")
    if problem == "regression":
        order = value_order(data.labels, labels, printable(data.directory))
    else:
        order = class_order(data.labels, labels, printable(data.directory))
    accepted = None
    if real is not None:
        accepted = real_labels(real, _file_names(data), len(labels))
        if not (accepted >= 0).any():
            raise BeitJaxError(f"{printable(real)}: no label for any of {len(data)} images, so there is no score")
    bad = BadImages(len(data), max_bad)
    batches = host_batches(data, processor, batch_size, workers=workers, bad=bad)
    scores: AnyScores
    with progress(len(data)) as advance:
        if problem == "single_label_classification":
            scores = evaluate_classification(
                model,
                reordered(batches, order),
                labels,
                accepted=accepted,
                mesh=mesh,
                matched=order.rule,
                advance=advance,
            )
        else:
            evaluate = evaluate_regression if problem == "regression" else evaluate_multilabel
            scores = evaluate(
                model, batches, data.labels, mesh=mesh, columns=order.indices, matched=order.rule, advance=advance
            )
    return replace(scores, left_out=tuple(bad.reasons.values()))


def problem_type_of(model: Model, data: Labelled) -> ProblemType:
    """How a model is scored on data: as its outputs are; where it does not say what they are, as the data say.

    Raises:
        BeitJaxError: the data say something else than the outputs are.
    """
    said, config = data.target.problem_type, model.config
    known = config.problem_type
    if known is None:
        return said
    if known == "multi_label_classification" and said == "single_label_classification":
        return known
    if known != said:
        raise BeitJaxError(
            f"{printable(data.directory)}: holds {_SAID[said]} ({data.target.feature}), but the model's outputs are "
            f"{_MADE[known]} (its problem_type is {known}); give data of its kind"
        )
    return known


_SAID: Mapping[ProblemType, str] = {
    "single_label_classification": "one class of each image",
    "multi_label_classification": "several classes of an image",
    "regression": "numbers",
}
_MADE: Mapping[ProblemType, str] = {
    "single_label_classification": "classes of which one holds",
    "multi_label_classification": "classes of which several may hold",
    "regression": "values",
}


def _check_task(model: Model) -> tuple[str, ...]:
    """The classes of a classifier."""
    labels = model.config.labels
    if model.config.task != "image_classification" or not labels:
        raise BeitJaxError(f"this model has no classifier (its task is {model.config.task}); nothing can be evaluated")
    return labels


def lines(scores: AnyScores) -> list[str]:
    """Scores of any kind as lines for people."""
    if isinstance(scores, MultiLabelScores):
        return multilabel.describe(scores)
    return regression.describe(scores) if isinstance(scores, RegressionScores) else accuracy.describe(scores)


def table(scores: AnyScores) -> tuple[Sequence[str], list[list[str]]]:
    """The head and the rows of a table with a row for each class or number."""
    if isinstance(scores, MultiLabelScores):
        return multilabel.TABLE, multilabel.class_table(scores)
    if isinstance(scores, RegressionScores):
        return regression.TABLE, regression.class_table(scores)
    return accuracy.TABLE, accuracy.class_table(scores)


def _file_names(data: Labelled) -> list[str]:
    if isinstance(data, ImageFolder | TableImages):
        return [str(path) for path in data.paths]
    return [data[i]["file_name"] for i in range(len(data))]


def reordered(batches: Iterable[HostBatch], order: ClassOrder) -> Iterator[dict[str, np.ndarray]]:
    """The batches, with the model's classes as their labels."""
    indices = np.asarray(order.indices, np.int32)
    for batch in batches:
        yield {**batch, "label": indices[batch["label"]]}
