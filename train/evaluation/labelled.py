"""Evaluation on labelled images, from prepared data or a folder per class; matches their classes with the model's."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.files import read_image_file
from beit_jax.images.processor import ImageProcessor
from beit_jax.json_file import read_json_array
from beit_jax.models.build import Model
from beit_jax.terminal import Progress, no_progress

from ..data.datasets import Dataset, open_dataset
from ..data.evaluation_batches import eval_batches
from ..data.listing import class_folders, class_images
from ..data.shards import INFO
from ..labels.splits import SPLIT_FOLDERS
from ..labels.targets import Target, classes_of
from .accuracy import HostBatch, Scores, evaluate_classification


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder per class, at any depth below it. They are read like a `datasets.Dataset`.

    Attributes:
        labels: the folders' names, sorted as text. The model's order may be another one: see `class_order`.
        paths, classes: the file of every image, and its class as an index into `labels`; by folder, then by path.
    """

    directory: Path
    labels: tuple[str, ...]
    paths: tuple[Path, ...]
    classes: tuple[int, ...]

    @property
    def target(self) -> Target:
        return classes_of(self.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": read_image_file(path), "label": self.classes[index], "file_name": str(path)}


def open_folder(directory: Path, split: str = "validation") -> ImageFolder:
    """A tree with a folder per class, as `listing.class_images` lists it.

    The tree is the folder of the split below `directory` ("val" and the like count, see `splits.SPLIT_FOLDERS`), or
    `directory` itself where there is no such folder.

    Raises:
        BeitJaxError: no such folder, no folder of a class in it, or one without an image.
    """
    inner = [directory / name for name in SPLIT_FOLDERS.get(split, (split,)) if (directory / name).is_dir()]
    root = inner[0] if inner else directory
    if not class_folders(root):
        raise BeitJaxError(f"{printable(root)}: expected prepared data, or a folder of images per class; found neither")
    classes = class_images(root)
    images = [(path, number) for number, paths in enumerate(classes.values()) for path in paths]
    paths, numbers = zip(*images, strict=True)
    return ImageFolder(root, tuple(classes), paths, numbers)


@dataclass(frozen=True)
class ClassOrder:
    """The model's class for every class of the data, and the rule that says so, for people."""

    indices: tuple[int, ...]
    rule: str


WORDNET_ID = re.compile(r"n\d{8}")
PLACEHOLDER = re.compile(r"LABEL_\d+")


def class_order(found: Sequence[str], labels: Sequence[str], source: str) -> ClassOrder:
    """Matches the classes of data, by their names, with the classes of a model. The first rule that applies decides:

    - All names are classes of the model: matched by name. Classes may be missing from the data.
    - All names are numbers: they are the model's indices. ImageNet-V2 has the folders "0", "1", "10", "100", ...;
      sorted as text, as torchvision's ImageFolder sorts them, 988 of the 1000 would be wrong.
    - 1000 WordNet ids, and a model with 1000 classes: ImageNet numbers its classes in the order of their ids.
    - The model's classes are LABEL_0, LABEL_1, ..., which transformers writes where names are missing: matched in
      sorted order.

    Args:
        source: stands for the data in errors.

    Raises:
        BeitJaxError: no rule applies, or one applies ambiguously.
    """
    if set(found) <= set(labels):
        return _by_name(found, labels, source)
    if all(name.isascii() and name.isdecimal() for name in found):
        numbers = tuple(int(name) for name in found)
        if sorted(numbers) != list(range(len(labels))):
            seen = f"{len(numbers)} numbers from {min(numbers)} to {max(numbers)}"
            raise BeitJaxError(
                f"{source}: classes are {seen}, expected each of 0 to {len(labels) - 1} once, the model's classes"
            )
        return ClassOrder(numbers, "number")
    if len(found) != len(labels):
        raise BeitJaxError(
            f"{source}: {len(found)} classes, but the model has {len(labels)}; their names would have to be its labels"
        )
    ranks = tuple(int(rank) for rank in np.argsort(np.argsort(np.asarray(found))))
    if len(labels) == 1000 and all(WORDNET_ID.fullmatch(name) for name in found):
        return ClassOrder(ranks, "the order of WordNet ids, ImageNet's")
    if all(PLACEHOLDER.fullmatch(label) for label in labels):
        return ClassOrder(ranks, "the order of their names, as the model's have none")
    strange = next(name for name in found if name not in set(labels))
    raise BeitJaxError(
        f"{source}: class {printable(strange, 40)} is none of the model's, whose first is {printable(labels[0], 40)}; "
        "name the data's classes by the model's labels, or by their numbers"
    )


def _by_name(found: Sequence[str], labels: Sequence[str], source: str) -> ClassOrder:
    twice = next((name for name in found if list(labels).count(name) > 1), None)
    if twice is not None:
        raise BeitJaxError(
            f"{source}: the model has several classes called {printable(twice, 40)}; name the data's by their numbers"
        )
    where = {label: index for index, label in enumerate(labels)}
    missing = f" ({len(found)} of {len(labels)} occur)" if len(found) < len(labels) else ""
    return ClassOrder(tuple(where[name] for name in found), "name" + missing)


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


Labelled = Dataset | ImageFolder


def open_labelled(directory: Path, split: str = "validation") -> Labelled:
    """Opens prepared data, or a tree with a folder per class.

    Args:
        split: the split of prepared data, or the name of its folder in a tree of folders, if there is one.

    Raises:
        BeitJaxError: as `open_dataset` or `open_folder`.
    """
    prepared = any(next(directory.glob(place), None) for place in (INFO, f"*/{INFO}"))
    return open_dataset(directory, split) if prepared else open_folder(directory, split)


def evaluate_directory(
    model: Model, processor: ImageProcessor, directory: Path, *, split: str = "validation", **options: Any
) -> Scores:
    """Scores of a model on a directory: `evaluate_images` of what `open_labelled` finds there, with its options.

    Raises:
        BeitJaxError: as both.
    """
    _check_task(model)
    return evaluate_images(model, processor, open_labelled(directory, split), **options)


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
) -> Scores:
    """Scores of a model on labelled images.

    Args:
        processor: prepares the images: the checkpoint's own, or the preset behind its published number.
        real: ``real.json``, to also count ImageNet's reassessed labels.
        batch_size: images at a time, over all devices and hosts.
        workers: processes that prepare images, as for `evaluation_batches.eval_batches`.
        max_bad: the share of images that may be left out because they cannot be read; `Scores.left_out` names them.

    Raises:
        BeitJaxError: the model does not classify, data cannot be read, or its classes are not the model's.
    """
    labels = _check_task(model)
    order = class_order(data.labels, labels, printable(data.directory))
    accepted = None
    if real is not None:
        accepted = real_labels(real, _file_names(data), len(labels))
        if not (accepted >= 0).any():
            raise BeitJaxError(f"{printable(real)}: no label for any of {len(data)} images, so there is no score")
    bad = BadImages(len(data), max_bad)
    batches = eval_batches(
        data,
        processor,
        batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=workers,
        bad=bad,
    )
    with progress(len(data)) as advance:
        scores = evaluate_classification(
            model,
            reordered(batches, order),
            labels,
            accepted=accepted,
            mesh=mesh,
            matched=order.rule,
            advance=advance,
        )
    return replace(scores, left_out=tuple(bad.reasons.values()))


def _check_task(model: Model) -> tuple[str, ...]:
    """The classes of a classifier."""
    labels = model.config.labels
    if model.config.task != "image_classification" or not labels:
        raise BeitJaxError(f"this model has no classifier (its task is {model.config.task}); nothing can be evaluated")
    if model.config.score_function is None:
        raise BeitJaxError(
            "this model's outputs are values, not classes (its problem_type is regression), of which there is no "
            "accuracy; beit-jax classify prints them"
        )
    return labels


def _file_names(data: Labelled) -> list[str]:
    if isinstance(data, ImageFolder):
        return [str(path) for path in data.paths]
    return [data[i]["file_name"] for i in range(len(data))]


def reordered(batches: Iterable[HostBatch], order: ClassOrder) -> Iterator[dict[str, np.ndarray]]:
    """The batches, with the model's classes as their labels."""
    indices = np.asarray(order.indices, np.int32)
    for batch in batches:
        yield {**batch, "label": indices[batch["label"]]}
