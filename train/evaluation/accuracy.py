"""How well a model classifies: devices count, the host adds up. The scores are exact for any batches and hosts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse import coo_array, csr_array

from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.build import Model
from beit_jax.tree import Nested

from ..augmentation.mixing import normalise
from ..distributed.sharding import make_mesh, replicated
from ..recipe import Statistics
from .mean_loss import MeanLoss, RowLosses
from .shares import json_number, share
from .stepping import EvalStep, HostBatch, on_every_device, stream

TOP = 5
# --- Scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Counts of an evaluation. The best class of an image has the largest logit; of equal logits, the first counts.

    Attributes:
        images: for each class, the number of its images.
        correct, correct5: for each class, the number of its images for which it is the best class, and for which it is
            among the five best (or all, if there are fewer).
        confusion: the number of images by class (row) and best class (column). It is sparse, because 21,841 classes
            would take 4 GB. Images whose logits are not finite count only in `images`.
        real: three counts where alternative labels were given: images that have such labels, images whose best class is
            one of them, and images with one of them among the five best classes.
        matched: how the classes of the data were matched with those of the model, for people.
        left_out: a line for every image that could not be read; such images count nowhere.
        loss: the mean loss of the images, where one was asked for.
    """

    labels: tuple[str, ...]
    images: Int[np.ndarray, " classes"]
    correct: Int[np.ndarray, " classes"]
    correct5: Int[np.ndarray, " classes"]
    confusion: csr_array
    real: tuple[int, int, int] | None = None
    matched: str = ""
    left_out: tuple[str, ...] = ()
    loss: float | None = None

    @property
    def count(self) -> int:
        return int(self.images.sum())

    @property
    def top1(self) -> float:
        return share(int(self.correct.sum()), self.count)

    @property
    def top5(self) -> float:
        return share(int(self.correct5.sum()), self.count)

    @property
    def mean_class_accuracy(self) -> float:
        """The mean, over the classes that occur, of the share of correct images."""
        known = self.images > 0
        return float((self.correct[known] / self.images[known]).mean()) if known.any() else float("nan")

    @property
    def not_finite(self) -> int:
        """The number of images whose logits are not finite; they count as wrong."""
        return self.count - int(self.confusion.sum())

    def as_dict(self) -> dict[str, Any]:
        """The scores for JSON: shares (null without images), counts, and the confusion without its zeros."""
        real = None
        if self.real is not None:
            images, correct, correct5 = self.real
            real = {
                "images": images,
                "top1": json_number(share(correct, images)),
                "top5": json_number(share(correct5, images)),
            }
        rows = zip(self.labels, self.images.tolist(), self.correct.tolist(), self.correct5.tolist(), strict=True)
        return {
            "images": self.count,
            "top1": json_number(self.top1),
            "top5": json_number(self.top5),
            "mean_class_accuracy": json_number(self.mean_class_accuracy),
            "not_finite": self.not_finite,
            "real": real,
            "matched": self.matched,
            "left_out": list(self.left_out),
            "classes": [
                {"label": label, "images": images, "correct": correct, "correct5": correct5}
                for label, images, correct, correct5 in rows
            ],
            "confusion": nonzero(self.confusion).tolist(),
        }


def nonzero(confusion: csr_array) -> Int[np.ndarray, "pairs 3"]:
    """The entries of a confusion matrix that are not 0, as (class, best class, images)."""
    entries = confusion.tocoo()
    return np.stack([entries.row, entries.col, entries.data], axis=1)


def describe(scores: Scores) -> list[str]:
    """The scores as lines for people."""
    lines = [f"top-1  {100 * scores.top1:6.2f} %   of {scores.count:,} images"]
    if len(scores.labels) > TOP:
        lines.append(f"top-5  {100 * scores.top5:6.2f} %   the class is among the five best")
    lines.append(f"mean   {100 * scores.mean_class_accuracy:6.2f} %   top-1, every class counting the same")
    if scores.real is not None:
        images, correct, _ = scores.real
        lines.append(f"ReaL   {100 * share(correct, images):6.2f} %   top-1, of {images:,} images with such labels")
    if scores.not_finite:
        lines.append(f"WARNING: the logits of {scores.not_finite:,} images are not finite; they count as wrong")
    lines += [f"classes matched by {scores.matched}"] if scores.matched else []
    return lines + [f"left out     {line}" for line in scores.left_out]


TABLE = ("class", "images", "top-1 %", "top-5 %", "most often taken for")


def class_table(scores: Scores, limit: int | None = None) -> list[list[str]]:
    """A row of `TABLE` for every class that occurs, in the model's order, or only for the `limit` worst of them."""
    classes = np.flatnonzero(scores.images)
    if limit is not None and len(classes) > limit:
        classes = classes[np.argsort(scores.correct[classes] / scores.images[classes], kind="stable")[:limit]]
    # The last entry of a class is its most frequent mistake.
    mistaken = {truth: taken for truth, taken, _ in reversed(confused(scores))}
    return [
        [
            printable(scores.labels[i], 1024),
            f"{scores.images[i]:,}",
            f"{100 * scores.correct[i] / scores.images[i]:.2f}",
            f"{100 * scores.correct5[i] / scores.images[i]:.2f}",
            printable(scores.labels[mistaken[i]], 1024) if i in mistaken else "",
        ]
        for i in classes.tolist()
    ]


def confused(scores: Scores) -> list[tuple[int, int, int]]:
    """All mistakes as (class, class that was predicted instead, images), most images first."""
    found = nonzero(scores.confusion)
    found = found[found[:, 0] != found[:, 1]]
    order = np.lexsort((found[:, 1], found[:, 0], -found[:, 2]))
    return [(truth, taken, images) for truth, taken, images in found[order].tolist()]


# --- Counting ---------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """Counts of one batch, int32. Rows that are not valid add nothing.

    Attributes:
        images, correct, correct5: for each class, as in `Scores`.
        truth, predicted: for each row, its class and its best class; -1 where the row is not valid. `predicted` is -1
            also where the logits are not finite.
        real: as in `Scores`; zeros without alternative labels.
        losses: where they were asked for, the loss of every row and its weight, [b] float32; 0 where it is not valid.
    """

    images: Int[Array, " classes"]
    correct: Int[Array, " classes"]
    correct5: Int[Array, " classes"]
    truth: Int[Array, " b"]
    predicted: Int[Array, " b"]
    real: Int[Array, " 3"]
    losses: tuple[Float[Array, " b"], Float[Array, " b"]] | None = None


def best_classes(logits: Float[Array, "*rows classes"]) -> Int[Array, "*rows top"]:
    """The five best classes (or all, if fewer), best first; -1 in rows with a logit that is not finite."""
    best = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))[1]
    return jnp.where(jnp.isfinite(logits).all(axis=-1, keepdims=True), best, -1)


def count(
    logits: Float[Array, "b classes"],
    label: Int[Array, " b"],
    valid: Bool[Array, " b"],
    accepted: Int[Array, "b any"] | None = None,
) -> Counts:
    """Counts of a batch.

    Args:
        accepted: the alternative labels of every image; -1 fills the row of an image with fewer labels than others.
    """
    best = best_classes(logits)

    def by_class(rows: Bool[Array, " b"]) -> Int[Array, " classes"]:
        return jnp.zeros(logits.shape[-1], jnp.int32).at[label].add((rows & valid).astype(jnp.int32))

    hits = best == label[:, None]
    real = jnp.zeros(3, jnp.int32)
    if accepted is not None:
        match = ((best[:, :, None] == accepted[:, None, :]) & (accepted >= 0)[:, None, :]).any(axis=-1)
        rows = jnp.stack([(accepted >= 0).any(axis=-1), match[:, 0], match.any(axis=-1)])
        real = (rows & valid).sum(axis=-1, dtype=jnp.int32)
    return Counts(
        images=by_class(valid),
        correct=by_class(hits[:, 0]),
        correct5=by_class(hits.any(axis=-1)),
        truth=jnp.where(valid, label, -1),
        predicted=jnp.where(valid, best[:, 0], -1),
        real=real,
    )


@lru_cache(maxsize=8)
def make_eval_step(
    graph: nnx.GraphDef[Model],
    statistics: Statistics | None = None,
    mesh: Mesh | None = None,
    losses: RowLosses | None = None,
) -> EvalStep:
    """The compiled step of an evaluation: (nested) parameters and a batch -> `Counts`. Equal arguments share a program.

    A batch holds ``image`` [b, h, w, 3], ``label`` int32 [b] (the model's class), ``valid`` bool [b] (False: padding)
    and maybe ``accepted`` int32 [b, any] (see `count`).

    Args:
        statistics: of pixels. ``image`` is uint8 and is normalised here; None: ``image`` is float32 and normalised.
        mesh: the mesh on which batch and parameters lie. Every device of every host gets the counts of the whole batch.
        losses: of rows, which the counts then have too.
    """

    def step(params: Nested, batch: Mapping[str, Array]) -> Counts:
        images = batch["image"] if statistics is None else normalise(batch["image"], statistics)
        logits = nnx.merge(graph, params)(images).logits
        assert logits is not None
        found = count(logits, batch["label"], batch["valid"], batch.get("accepted"))
        if losses is None:
            return found
        of_rows, weights = losses(logits, batch["label"])
        valid = batch["valid"]
        return replace(found, losses=(jnp.where(valid, of_rows, 0.0), jnp.where(valid, weights, 0.0)))

    return jax.jit(step, out_shardings=None if mesh is None else replicated(mesh))


@dataclass
class Tally:
    """Adds up the counts of batches, in int64."""

    labels: tuple[str, ...]
    images: Int[np.ndarray, " classes"] = field(init=False)
    correct: Int[np.ndarray, " classes"] = field(init=False)
    correct5: Int[np.ndarray, " classes"] = field(init=False)
    real: Int[np.ndarray, " 3"] = field(init=False)
    confusion: csr_array = field(init=False)
    loss: MeanLoss = field(default_factory=MeanLoss)

    def __post_init__(self) -> None:
        classes = len(self.labels)
        self.images, self.correct, self.correct5 = np.zeros((3, classes), np.int64)
        self.real = np.zeros(3, np.int64)
        self.confusion = csr_array((classes, classes), dtype=np.int64)

    def add(self, counts: Counts) -> int:
        """Adds the counts of a batch and returns its number of images.

        Raises:
            BeitJaxError: the counts have another number of classes.
        """
        classes = len(self.labels)
        if len(counts.images) != classes:
            raise BeitJaxError(f"labels: {classes} classes, but the model has {len(counts.images)} logits")
        self.images += np.asarray(counts.images)
        self.correct += np.asarray(counts.correct)
        self.correct5 += np.asarray(counts.correct5)
        self.real += np.asarray(counts.real)
        if counts.losses is not None:
            self.loss.add(*(np.asarray(values) for values in counts.losses))
        truth, predicted = np.asarray(counts.truth), np.asarray(counts.predicted)
        known = (truth >= 0) & (predicted >= 0)
        pairs = truth[known], predicted[known]
        self.confusion += coo_array((np.ones(len(pairs[0]), np.int64), pairs), shape=(classes, classes)).tocsr()
        return int(np.asarray(counts.images).sum())

    def scores(self, *, real: bool = False, matched: str = "") -> Scores:
        """The scores of everything added so far."""
        images, correct, correct5 = (int(value) for value in self.real)
        alternative = (images, correct, correct5) if real else None
        loss = self.loss.mean if self.loss.weight else None
        return Scores(
            self.labels, self.images, self.correct, self.correct5, self.confusion, alternative, matched, loss=loss
        )


def evaluate_classification(
    model: Model | tuple[nnx.GraphDef[Model], Nested],
    batches: Iterable[HostBatch],
    labels: tuple[str, ...],
    *,
    accepted: Int[np.ndarray, "images any"] | None = None,
    statistics: Statistics | None = None,
    mesh: Mesh | None = None,
    matched: str = "",
    losses: RowLosses | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Scores of a model over batches. Each image counts once, however images are grouped, padded and distributed.

    Args:
        model: a model, which is copied to every device; or its graph and parameters, which stay where they are.
        batches: of this host: dicts as `make_eval_step` takes them, without ``accepted``. The last may be shorter.
        labels: the model's classes.
        accepted: alternative labels by ``index``, which batches must then hold too; see `labelled.real_labels`.
        statistics: of pixels, for batches of uint8 images.
        mesh: the devices to compute on; by default batches are split over all devices.
        matched: recorded in the scores.
        losses: of rows, whose mean the scores then have.
        advance: called with the number of images after every batch.

    Raises:
        BeitJaxError: a label that is no class of the model.
    """
    mesh = make_mesh((-1, 1, 1)) if mesh is None else mesh
    graph, params = model if isinstance(model, tuple) else on_every_device(model, mesh)
    tally = Tally(labels)
    sent = (to_send(batch, len(labels), accepted) for batch in batches)
    for counts in stream(make_eval_step(graph, statistics, mesh, losses), params, sent, mesh):
        advance(tally.add(counts))
    return tally.scores(real=accepted is not None, matched=matched)


def to_send(batch: HostBatch, classes: int, accepted: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The arrays of a batch that the step of an evaluation reads, with the rows of `accepted` [images, labels].

    Raises:
        BeitJaxError: a label that is no class of the model.
    """
    label = batch["label"][batch["valid"]]
    if label.size and not 0 <= label.min() <= label.max() < classes:
        raise BeitJaxError(f"labels {label.min()} to {label.max()}, but the model's classes are 0 to {classes - 1}")
    sent = {name: batch[name] for name in ("image", "label", "valid")}
    return sent if accepted is None else sent | {"accepted": accepted[batch["index"]]}
