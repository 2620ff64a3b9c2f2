"""How well a model's features classify labelled images by their nearest neighbours, without any training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.predictor import Pooling
from beit_jax.models.build import Model
from beit_jax.search.exact import Nearest
from beit_jax.terminal import Progress, no_progress

from ..labels.meaning import TableOptions
from ..labels.table import TableImages
from .logits import outputs
from .neighbours import TOP, nearest_train, votes
from .opening import ImageFolder, Labelled, open_labelled
from .shares import json_number, share
from .stepping import host_batches

PREFERRED: Final = 20
"""Neighbours that vote; of DINO's 10, 20, 100 and 200 the best on ImageNet (arXiv 2104.14294, appendix F)."""
TEMPERATURE: Final = 0.07


@dataclass(frozen=True)
class Vote:
    """How many images a vote of k neighbours classifies rightly.

    Attributes:
        correct, correct5: images whose class has most votes, or is among the five with most.
    """

    k: int
    correct: int
    correct5: int


@dataclass(frozen=True)
class NeighbourScores:
    """Counts of an evaluation by nearest neighbours.

    Attributes:
        train_images, images: those that vote, and those that are classified.
        leave_one_out: they are the same images, and none votes on itself.
        left_out: a line for every image that could not be read.
    """

    train_images: int
    images: int
    leave_one_out: bool
    temperature: float
    votes: tuple[Vote, ...]
    left_out: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The scores for JSON."""
        return {
            "images": self.images,
            "train_images": self.train_images,
            "leave_one_out": self.leave_one_out,
            "temperature": self.temperature,
            "neighbours": [
                {
                    "k": vote.k,
                    "top1": json_number(share(vote.correct, self.images)),
                    "top5": json_number(share(vote.correct5, self.images)),
                }
                for vote in self.votes
            ],
            "left_out": list(self.left_out),
        }

    def lines(self) -> list[str]:
        """The scores for people."""
        others = "each by all others" if self.leave_one_out else f"by {self.train_images:,} training images"
        found = [
            f"{vote.k:4}-NN  top-1 {100 * share(vote.correct, self.images):6.2f} %  "
            f"top-{TOP} {100 * share(vote.correct5, self.images):6.2f} %"
            for vote in self.votes
        ]
        return [f"{self.images:,} images, {others}", *found, *(f"left out     {line}" for line in self.left_out)]


def open_pair(
    directory: Path,
    split: str,
    train_split: str | None = None,
    table: TableOptions | None = None,
    *,
    allow_missing: bool = False,
) -> tuple[Labelled | None, Labelled]:
    """The training images and the test images of a directory; no training images: the test images themselves.

    Args:
        split, train_split: their splits. Where a directory has no splits, or both are the same, or none was asked for
            and it has no "train", every image is classified by all others.

    Raises:
        BeitJaxError: as `open_labelled`; or the images say no single class.
    """
    tests = open_labelled(directory, split, table, allow_missing=allow_missing)
    _check_classes(tests)
    if train_split == split:
        return None, tests
    try:
        train = open_labelled(directory, train_split or "train", table, allow_missing=allow_missing)
    except BeitJaxError:
        if train_split is not None:
            raise
        return None, tests
    whole = _holds(train, tests)
    if whole and train_split is None:
        return None, tests
    if whole or _holds(tests, train):
        option, missing = ("--train-split", train_split) if whole else ("--split", split)
        raise BeitJaxError(
            f"{printable(directory)}: has no images of the split {printable(missing)} alone; name another with "
            f"{option}; where --split and --train-split are the same, every image is classified by all others"
        )
    _check_classes(train)
    return train, tests


def _holds(one: Labelled, other: Labelled) -> bool:
    """True if a tree or table without the split that was asked for stands for all of its images."""
    if isinstance(one, ImageFolder) and isinstance(other, ImageFolder):
        return one.directory == other.directory or one.directory in other.directory.parents
    return isinstance(one, TableImages) and isinstance(other, TableImages) and one.paths == other.paths


def _check_classes(data: Labelled) -> None:
    if data.target.problem_type != "single_label_classification":
        raise BeitJaxError(
            f"{printable(data.directory)}: nearest neighbours vote for one class of an image, and these images have "
            f"{data.target.feature}; leave out --knn"
        )


def evaluate_neighbours(
    model: Model,
    processor: ImageProcessor,
    train: Labelled | None,
    tests: Labelled,
    *,
    ks: Sequence[int] = (PREFERRED,),
    temperature: float = TEMPERATURE,
    pooling: Pooling = "pooled",
    batch_size: int = 64,
    workers: int | None = None,
    max_bad: float = 0.0,
    mesh: Mesh | None = None,
    progress: Progress = no_progress,
) -> NeighbourScores:
    """Classifies images by the votes of their nearest training images, as DINO does; see `neighbours.knn`.

    Args:
        train: None: every test image is classified by all others.
        ks: numbers of neighbours; all are of one search.
        pooling: the features: "pooled", "mean" or "cls".
        batch_size, workers, max_bad, mesh, progress: as for `labelled.evaluate_images`, of which each host computes its
            part of every batch, and all hosts vote on all.

    Raises:
        BeitJaxError: an image cannot be read, a class of the test images is none of the training images', or there are
            too few images for a k.
    """
    left_out, computed = list[str](), list[tuple[np.ndarray, np.ndarray]]()
    for data in (tests,) if train is None else (train, tests):
        bad = BadImages(len(data), max_bad)
        batches = host_batches(data, processor, batch_size, workers=workers, bad=bad)
        with progress(len(data)) as advance:
            computed.append(_joined(list(outputs(model, batches, mesh=mesh, output=pooling, advance=advance))))
        left_out += bad.reasons.values()
    (features, labels), (test_features, test_labels) = computed[0], computed[-1]
    if train is not None:
        test_labels = _in_train(tests, train)[test_labels]
    largest = max(ks)
    found = nearest_train(features, labels, test_features, largest, temperature, leave_one_out=train is None)
    classes = int(max(labels.max(), test_labels.max())) + 1
    counted = []
    for k in ks:
        best = votes(Nearest(found.rows[:, :k], found.scores[:, :k]), labels, classes, temperature)
        hits = best == test_labels[:, None]
        counted.append(Vote(k, int(hits[:, 0].sum()), int(hits.any(axis=1).sum())))
    return NeighbourScores(len(labels), len(test_labels), train is None, temperature, tuple(counted), tuple(left_out))


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    features, labels = zip(*parts, strict=True)
    return np.concatenate(features), np.concatenate(labels).astype(np.int32)


def _in_train(tests: Labelled, train: Labelled) -> Int[np.ndarray, " classes"]:
    """The training images' number of every class of the test images, by name."""
    numbers = {label: number for number, label in enumerate(train.labels)}
    for label in tests.labels:
        if label not in numbers:
            raise BeitJaxError(
                f"{printable(tests.directory)}: class {printable(label, 40)} is none of the training images' in "
                f"{printable(train.directory)}; name the classes of both alike"
            )
    return np.array([numbers[label] for label in tests.labels], np.int32)
