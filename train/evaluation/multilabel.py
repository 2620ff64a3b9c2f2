"""How well a model finds classes of which several may hold: average precision, F1, exact matches."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.build import Model
from beit_jax.tree import Nested

from .logits import Observe, outputs
from .shares import json_number, share
from .stepping import HostBatch


@dataclass(frozen=True)
class MultiLabelScores:
    """Counts and average precisions of an evaluation. A class is found in an image where its score is at least 0.5.

    Means over classes are over those that occur in the data.

    Attributes:
        count: images.
        images, found, correct: for each class, the images that have it, those in which it is found, and both.
        exact: images of which all classes are right.
        average_precision: of each class, float64; NaN for one that no image has.
        micro_average_precision: of all classes of all images together.
        not_finite: images with outputs that are not finite: nothing is found in them, and they are ranked last.
        matched: how the classes of the data were matched with those of the model, for people.
        left_out: a line for every image that could not be read; such images count nowhere.
    """

    labels: tuple[str, ...]
    count: int
    images: Int[np.ndarray, " classes"]
    found: Int[np.ndarray, " classes"]
    correct: Int[np.ndarray, " classes"]
    exact: int
    average_precision: Float[np.ndarray, " classes"]
    micro_average_precision: float
    not_finite: int = 0
    matched: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def map_macro(self) -> float:
        """The mean average precision of the classes that occur."""
        return self._mean(self.average_precision)

    @property
    def f1(self) -> Float[np.ndarray, " classes"]:
        """Of each class: 2 correct / (images + found), 0 where that is 0 / 0."""
        return np.asarray(2 * self.correct / np.maximum(self.images + self.found, 1))

    @property
    def f1_macro(self) -> float:
        """The mean F1 of the classes that occur."""
        return self._mean(self.f1)

    @property
    def f1_micro(self) -> float:
        """Of all classes of all images together."""
        return share(2 * int(self.correct.sum()), int(self.images.sum() + self.found.sum()))

    @property
    def exact_match(self) -> float:
        """The share of images of which all classes are right."""
        return share(self.exact, self.count)

    def of_a_run(self) -> dict[str, float]:
        """The numbers that a run logs; the first is the one to compare runs by."""
        return {
            "map": self.map_macro,
            "map_micro": self.micro_average_precision,
            "f1": self.f1_macro,
            "f1_micro": self.f1_micro,
            "exact_match": self.exact_match,
        }

    def as_dict(self) -> dict[str, Any]:
        """The scores for JSON: shares (null without images), and counts."""
        rows = zip(
            self.labels,
            self.images.tolist(),
            self.found.tolist(),
            self.correct.tolist(),
            self.average_precision.tolist(),
            self.f1.tolist(),
            strict=True,
        )
        return {
            "problem_type": "multi_label_classification",
            "images": self.count,
            "map_macro": json_number(self.map_macro),
            "map_micro": json_number(self.micro_average_precision),
            "f1_macro": json_number(self.f1_macro),
            "f1_micro": json_number(self.f1_micro),
            "exact_match": json_number(self.exact_match),
            "not_finite": self.not_finite,
            "matched": self.matched,
            "left_out": list(self.left_out),
            "classes": [
                {
                    "label": label,
                    "images": images,
                    "found": found,
                    "correct": correct,
                    "average_precision": json_number(precision),
                    "f1": f1 if images else None,
                }
                for label, images, found, correct, precision, f1 in rows
            ],
        }

    def _mean(self, values: Float[np.ndarray, " classes"]) -> float:
        known = self.images > 0
        return float(values[known].mean()) if known.any() else float("nan")


def describe(scores: MultiLabelScores) -> list[str]:
    """The scores as lines for people."""
    occur = int((scores.images > 0).sum())
    lines = [
        f"mAP     {100 * scores.map_macro:6.2f} %   mean of {occur:,} classes, of {scores.count:,} images; "
        f"{100 * scores.micro_average_precision:.2f} % of all together",
        f"F1      {100 * scores.f1_macro:6.2f} %   mean of {occur:,} classes, from a score of 0.5 on; "
        f"{100 * scores.f1_micro:.2f} % of all together",
        f"exact   {100 * scores.exact_match:6.2f} %   of images: all their classes are right",
    ]
    if occur < len(scores.labels):
        lines.append(f"classes {len(scores.labels) - occur:,} of {len(scores.labels):,} occur in no image")
    if scores.not_finite:
        lines.append(f"WARNING: the outputs of {scores.not_finite:,} images are not finite; nothing is found in them")
    lines += [f"classes matched by {scores.matched}"] if scores.matched else []
    return lines + [f"left out     {line}" for line in scores.left_out]


TABLE = ("class", "images", "AP %", "F1 %", "precision %", "recall %")


def class_table(scores: MultiLabelScores) -> list[list[str]]:
    """A row of `TABLE` for every class."""

    def percent(part: float) -> str:
        return "" if math.isnan(part) else f"{100 * part:.2f}"

    counts = (column.tolist() for column in (scores.images, scores.found, scores.correct))
    rows = zip(scores.labels, *counts, strict=True)
    means = zip(scores.average_precision.tolist(), scores.f1.tolist(), strict=True)
    return [
        [
            printable(label, 1024),
            f"{images:,}",
            percent(precision),
            percent(f1 if images else math.nan),
            percent(share(correct, found)),
            percent(share(correct, images)),
        ]
        for (label, images, found, correct), (precision, f1) in zip(rows, means, strict=True)
    ]


def average_precision(scores: Float[np.ndarray, " n"], present: Bool[np.ndarray, " n"]) -> float:
    """The mean, over the images that have a class, of the precision at their scores; NaN where no image has it.

    The precision at a score is the share of images that have the class, of those with this score or a higher one. As
    scikit-learn's ``average_precision_score``.
    """
    total = int(present.sum())
    if not total:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of the images with equal scores
    hits = np.cumsum(present[order], dtype=np.int64)[last]
    return float((np.diff(hits, prepend=0) * (hits / (last + 1.0))).sum() / total)


def evaluate_multilabel(
    model: Model | tuple[nnx.GraphDef[Model], Nested],
    batches: Iterable[HostBatch],
    labels: Sequence[str],
    *,
    mesh: Mesh | None = None,
    columns: Sequence[int] | None = None,
    matched: str = "",
    observe: Observe | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> MultiLabelScores:
    """Scores of a model over batches. Each image counts once, however images are grouped, padded and distributed.

    Ranking needs all scores at once: five bytes are kept for each image and class.

    Args:
        model, mesh, advance: as for `accuracy.evaluate_classification`.
        batches: of this host, whose labels are 1 for each class of an image and 0 for the others, or the number of its
            only class.
        labels: the classes of the data.
        columns: the model's output for each of them; by default the outputs in their order.
        matched: recorded in the scores.
        observe: called with the outputs and labels of every batch.

    Raises:
        BeitJaxError: no images.
    """
    logits, present = [], []
    for found, label in outputs(model, batches, mesh=mesh, columns=columns, observe=observe, advance=advance):
        logits.append(found)
        present.append(np.eye(len(labels), dtype=bool)[label] if label.ndim == 1 else label.astype(bool))
    if not sum(map(len, logits)):
        raise BeitJaxError("no images, so there is no score")
    return scored(np.concatenate(logits), np.concatenate(present), tuple(labels), matched=matched)


def scored(
    logits: Float[np.ndarray, "n classes"],
    present: Bool[np.ndarray, "n classes"],
    labels: tuple[str, ...],
    matched: str = "",
) -> MultiLabelScores:
    """The scores of these outputs."""
    finite = np.isfinite(logits).all(axis=1)
    logits = np.where(finite[:, None], logits, -np.inf)
    found = logits >= 0  # a score of 0.5
    return MultiLabelScores(
        labels=labels,
        count=len(logits),
        images=present.sum(axis=0),
        found=found.sum(axis=0),
        correct=(found & present).sum(axis=0),
        exact=int((found == present).all(axis=1).sum()),
        average_precision=np.asarray([average_precision(*column) for column in zip(logits.T, present.T, strict=True)]),
        micro_average_precision=average_precision(logits.ravel(), present.ravel()),
        not_finite=int((~finite).sum()),
        matched=matched,
    )
