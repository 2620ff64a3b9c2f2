"""The mean loss of all images of an evaluation, exact for any batches and hosts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Array, Float

VALIDATION_LOSS = "validation_loss"
"""The score's name: the loss of the validation images without augmentation, smoothing and dropout, float32. A training
record's "loss" is another number: of training images as the step sees them."""
RowLosses = Callable[[Array, Array], tuple[Array, Array]]
"""From outputs [b, outputs] and labels [b, ...] to the loss of every row and its weight, [b] float32."""


@dataclass
class MeanLoss:
    """Adds up losses of images. The mean does not depend on the order in which they come.

    Attributes:
        total, weight: the weighted losses and the weights of every batch, as sums without rounding can be made of them.
    """

    total: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)

    def add(self, losses: Float[np.ndarray, " b"], weights: Float[np.ndarray, " b"]) -> None:
        """Adds the losses of images; those of weight 0 do not count, whatever they are."""
        counted = np.asarray(weights) != 0
        kept = np.asarray(weights, np.float64)[counted]
        self.total += (np.asarray(losses, np.float64)[counted] * kept).tolist()
        self.weight += kept.tolist()

    @property
    def mean(self) -> float:
        """The weighted mean; NaN of no images, and where a loss is not finite."""
        if not self.weight or not all(map(math.isfinite, self.total)):
            return math.nan
        return math.fsum(self.total) / math.fsum(self.weight)
