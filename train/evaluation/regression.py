"""How far the numbers that a model gives are from those of the data: mean distances, and R2."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.build import Model
from beit_jax.tree import Nested

from .logits import Observe, outputs
from .shares import json_number
from .stepping import HostBatch


@dataclass(frozen=True)
class RegressionScores:
    """Distances of a model's numbers from the data's, in the data's units; [numbers] float64.

    Attributes:
        labels: the names of the numbers.
        count: images.
        mae, mse: mean absolute and mean squared distance.
        r2: 1 - the squared distances over those from the mean of the data; where the data do not vary, 1 if all is
            exact and 0 if not; NaN for fewer than two images. As scikit-learn's ``r2_score``.
        not_finite: images with outputs that are not finite: their distance is infinite.
        matched: how the numbers of the data were matched with those of the model, for people.
        left_out: a line for every image that could not be read; such images count nowhere.
    """

    labels: tuple[str, ...]
    count: int
    mae: Float[np.ndarray, " values"]
    mse: Float[np.ndarray, " values"]
    r2: Float[np.ndarray, " values"]
    not_finite: int = 0
    matched: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def rmse(self) -> Float[np.ndarray, " values"]:
        """The root of `mse`."""
        return np.sqrt(self.mse)

    def of_a_run(self) -> dict[str, float]:
        """The numbers that a run logs, means over all outputs; the first is the one to compare runs by: R2 has no
        units, which may differ."""
        return {name: float(getattr(self, name).mean()) for name in ("r2", "mae", "rmse")}

    def as_dict(self) -> dict[str, Any]:
        """The scores for JSON; null for what is not finite."""
        rows = zip(self.labels, self.mae.tolist(), self.mse.tolist(), self.rmse.tolist(), self.r2.tolist(), strict=True)
        return {
            "problem_type": "regression",
            "images": self.count,
            **{name: json_number(float(getattr(self, name).mean())) for name in ("mae", "mse", "rmse", "r2")},
            "not_finite": self.not_finite,
            "matched": self.matched,
            "left_out": list(self.left_out),
            "values": [
                {"label": label, **{key: json_number(value) for key, value in zip(_KEYS, row, strict=True)}}
                for label, *row in rows
            ],
        }


_KEYS = ("mae", "mse", "rmse", "r2")


def describe(scores: RegressionScores) -> list[str]:
    """The scores as lines for people."""
    width = max(len(printable(label, 40)) for label in scores.labels)
    lines = [f"{'':<{width}}  {scores.count:,} images, in the units of the data"]
    for label, mae, rmse, r2 in zip(scores.labels, scores.mae, scores.rmse, scores.r2, strict=True):
        lines.append(f"{printable(label, 40):<{width}}  MAE {mae:.6g}   RMSE {rmse:.6g}   R2 {r2:.4f}")
    if scores.not_finite:
        lines.append(f"WARNING: the outputs of {scores.not_finite:,} images are not finite; their distance is infinite")
    lines += [f"values matched by {scores.matched}"] if scores.matched else []
    return lines + [f"left out     {line}" for line in scores.left_out]


TABLE = ("value", "MAE", "MSE", "RMSE", "R2")


def class_table(scores: RegressionScores) -> list[list[str]]:
    """A row of `TABLE` for every number."""
    return [
        [printable(label, 1024), *(f"{value:.6g}" for value in row)]
        for label, *row in zip(scores.labels, scores.mae, scores.mse, scores.rmse, scores.r2, strict=True)
    ]


@dataclass
class Distances:
    """Adds up batches in float64. The variance of the data is added up around its mean (Chan et al., 1979)."""

    values: int
    count: int = 0
    absolute: Float[np.ndarray, " values"] = field(init=False)
    squared: Float[np.ndarray, " values"] = field(init=False)
    mean: Float[np.ndarray, " values"] = field(init=False)
    spread: Float[np.ndarray, " values"] = field(init=False)
    not_finite: int = 0

    def __post_init__(self) -> None:
        self.absolute, self.squared, self.mean, self.spread = np.zeros((4, self.values))

    def add(self, found: Float[np.ndarray, "n values"], truth: Float[np.ndarray, "n values"]) -> None:
        """Adds a batch of outputs and numbers of the data."""
        if not len(found):
            return
        finite = np.isfinite(found).all(axis=1)
        self.not_finite += int((~finite).sum())
        truth = truth.astype(np.float64)
        distance = np.where(finite[:, None], np.where(finite[:, None], found, 0.0).astype(np.float64) - truth, np.inf)
        self.absolute += np.abs(distance).sum(axis=0)
        self.squared += np.square(distance).sum(axis=0)
        mean, total = truth.mean(axis=0), self.count + len(truth)
        shift = mean - self.mean
        self.spread += np.square(truth - mean).sum(axis=0) + np.square(shift) * (self.count * len(truth) / total)
        self.mean += shift * (len(truth) / total)
        self.count = total

    def scores(self, labels: tuple[str, ...], *, matched: str = "") -> RegressionScores:
        """The scores of everything added so far.

        Raises:
            BeitJaxError: nothing was added.
        """
        if not self.count:
            raise BeitJaxError("no images, so there is no score")
        varies = self.spread > 0
        r2 = np.where(varies, 1 - self.squared / np.where(varies, self.spread, 1), (self.squared == 0).astype(float))
        return RegressionScores(
            labels=labels,
            count=self.count,
            mae=self.absolute / self.count,
            mse=self.squared / self.count,
            r2=r2 if self.count > 1 else np.full(self.values, np.nan),
            not_finite=self.not_finite,
            matched=matched,
        )


def evaluate_regression(
    model: Model | tuple[nnx.GraphDef[Model], Nested],
    batches: Iterable[HostBatch],
    labels: Sequence[str],
    *,
    mesh: Mesh | None = None,
    columns: Sequence[int] | None = None,
    matched: str = "",
    observe: Observe | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> RegressionScores:
    """Scores of a model over batches. Each image counts once, however images are grouped, padded and distributed.

    Args:
        model, mesh, advance: as for `accuracy.evaluate_classification`.
        batches: of this host, whose labels are numbers, float32 [b, values].
        labels: the names of the data's numbers.
        columns: the model's output for each of them; by default the outputs in their order.
        matched: recorded in the scores.
        observe: called with the outputs and labels of every batch.

    Raises:
        BeitJaxError: no images.
    """
    distances = Distances(len(labels))
    for found, label in outputs(model, batches, mesh=mesh, columns=columns, observe=observe, advance=advance):
        distances.add(found, label)
    return distances.scores(tuple(labels), matched=matched)
