"""Losses of pixels: cross entropy, focal loss and Dice, or sums of them, of logits that are resized to their labels.

Upsampled logits of a batch of four at 640 pixels and 150 classes are 1 GB in float32, and a loss needs several such
arrays. They are therefore made, used and, in the backward pass, made again in bands of rows. Of every band only sums
are kept, from which each loss follows.

With p the probabilities by softmax, y the label of a pixel that counts and w the weights of classes (1 without any):

- cross entropy: the mean of w[y] * -log p[y]
- focal loss: the mean of w[y] * (1 - p[y])**gamma * -log p[y]. Source: Lin et al., arXiv:1708.02002, with softmax, and
  w as its alpha; gamma 0 is cross entropy.
- Dice: 1 minus the mean over the classes that occur of 2 * sum(p * g) / (sum(p) + sum(g)), g being 1 where the class is
  the label; sums are over all pixels of the batch, and the mean is weighted by w. Source: Milletari et al.,
  arXiv:1606.04797, without its squares, as Sudre et al., arXiv:1707.03237, have it.

Pixels of no class count nowhere.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from beit_jax.errors import BeitJaxError, printable
from beit_jax.resize import linear_matrix

from .labels import ArrayLike, class_numbers, cross_entropy, nan_unless_class

Average = Literal["valid", "all"]
Term = Literal["cross_entropy", "focal", "dice"]
TERMS: Final[tuple[Term, ...]] = get_args(Term)
BAND: Final = 32  # rows of labels whose logits exist at a time
_TERM: Final = re.compile(r"(?:([0-9.eE+-]+)\s*\*\s*)?([a-z_]+)")

Sums = Mapping[str, Array]


@dataclass(frozen=True)
class PixelLoss:
    """A loss of pixels.

    Attributes:
        terms: the weight of each loss that is added up.
        average: of cross entropy and focal loss: over the pixels that count, each as often as its class weighs, as
            torch's ``CrossEntropyLoss`` has it; or over all pixels, as mmseg 0.11 has it.
        gamma: of the focal loss.
        weights: of the classes, float32.
        empty: the loss of no pixels, where it is an average over those that count.
    """

    terms: Mapping[Term, float] = field(default_factory=lambda: {"cross_entropy": 1.0})
    average: Average = "valid"
    gamma: float = 2.0
    weights: Float[np.ndarray, " classes"] | None = None
    empty: float = float("nan")

    def __call__(
        self, logits: Float[Array, "b h w classes"], labels: Integer[ArrayLike, "n height width"], ignore: int
    ) -> dict[Term, Float[Array, ""]]:
        """The terms by name, without their weights, float32: `total` adds them up.

        Logits are resized bilinearly to the labels' size, as by torch's ``interpolate``.

        Args:
            labels: class numbers; `ignore` where a pixel does not count.

        Raises:
            BeitJaxError: labels of another shape than [b, height, width]; a label that is neither a class nor ignored,
                where the labels are known; in a compiled function every term is NaN.
        """
        if labels.ndim != 3 or len(labels) != len(logits):
            raise BeitJaxError(f"labels: expected [{len(logits)}, height, width], found {list(labels.shape)}")
        labels = class_numbers(labels, logits.shape[-1], labels.shape, ignored=ignore)
        height, width = labels.shape[1:]
        bands = -(-height // BAND)
        spare = bands * BAND - height
        rows = np.pad(linear_matrix(logits.shape[1], height), [(0, spare), (0, 0)]).reshape(bands, BAND, -1)
        columns = jnp.asarray(linear_matrix(logits.shape[2], width), logits.dtype)
        padded = jnp.pad(labels, [(0, 0), (0, spare), (0, 0)], constant_values=ignore)

        @jax.checkpoint
        def band(rows: Array, labels: Array) -> Sums:
            resized = jnp.einsum("ty,byxc,sx->btsc", rows, logits, columns, precision="highest")
            counted = labels != ignore
            return self._sums(resized, jnp.where(counted, labels, 0), counted)

        def add(total: Sums, piece: tuple[Array, Array]) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, band(*piece)), None

        by_band = padded.reshape(len(labels), bands, BAND, width).swapaxes(0, 1)
        pieces = (jnp.asarray(rows, logits.dtype), by_band)
        shapes = jax.eval_shape(band, *(piece[0] for piece in pieces))
        sums, _ = jax.lax.scan(add, jax.tree.map(lambda shape: jnp.zeros(shape.shape, jnp.float32), shapes), pieces)
        return self._losses(sums, labels, labels != ignore, logits.shape[-1])

    def total(self, losses: Mapping[Term, Float[Array, ""]]) -> Float[Array, ""]:
        """The terms, each times its weight, added up."""
        weighed = [losses[term] * weight if weight != 1 else losses[term] for term, weight in self.terms.items()]
        return sum(weighed[1:], weighed[0])

    def _sums(self, logits: Array, labels: Int[Array, "b h w"], counted: Bool[Array, "b h w"]) -> Sums:
        """What the pixels of a band add; labels are 0 where they do not count."""
        found: dict[str, Array] = {}
        entropy = cross_entropy(logits, labels)
        weighted = entropy if self.weights is None else entropy * jnp.asarray(self.weights)[labels]
        if "cross_entropy" in self.terms:
            found["cross_entropy"] = jnp.where(counted, weighted, 0.0).sum()
        if "focal" in self.terms:
            found["focal"] = jnp.where(counted, _missing(entropy, self.gamma) * weighted, 0.0).sum()
        if "dice" in self.terms:
            shares = jnp.where(counted[..., None], jax.nn.softmax(logits), 0.0)
            marked = jax.nn.one_hot(labels, logits.shape[-1], dtype=shares.dtype)
            unknown = jnp.where(counted, nan_unless_class(labels, logits.shape[-1]) - 1.0, 0.0).sum()
            found["hits"] = (shares * marked).sum(axis=(0, 1, 2)) + unknown
            found["shares"] = shares.sum(axis=(0, 1, 2))
        return found

    def _losses(
        self, sums: Sums, labels: Int[Array, "b h w"], counted: Bool[Array, "b h w"], classes: int
    ) -> dict[Term, Array]:
        losses: dict[Term, Array] = {}
        weights = None if self.weights is None else jnp.asarray(self.weights)
        pixels = None
        if "dice" in self.terms or weights is not None:
            pixels = jnp.bincount(jnp.where(counted, labels, classes).ravel(), length=classes + 1)[:-1]
        for term in ("cross_entropy", "focal"):
            if term in self.terms and self.average == "all":
                losses[term] = sums[term] / labels.size
            elif term in self.terms:
                count = counted.sum() if weights is None or pixels is None else (pixels * weights).sum()
                losses[term] = self._divided(sums[term], count)
        if "dice" in self.terms and pixels is not None:
            occurs = pixels > 0
            overlap = 2 * sums["hits"] / jnp.where(occurs, sums["shares"] + pixels, 1.0)
            counts = occurs.astype(jnp.float32) if weights is None else occurs * weights
            losses["dice"] = self._divided((counts * (1.0 - overlap)).sum(), counts.sum())
        return losses

    def _divided(self, part: Array, whole: Array) -> Array:
        """The quotient; of no pixels `empty`."""
        if np.isnan(self.empty):
            return part / whole
        return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), self.empty)


def _missing(entropy: Float[Array, "*b"], gamma: float) -> Float[Array, "*b"]:
    """(1 - p)**gamma, of -log p; 0 with a gradient of 0 where p is 1, of which the power has none."""
    missing = -jnp.expm1(-entropy)
    known = ~(missing <= 0)  # NaN stays
    return jnp.where(known, jnp.where(known, missing, 1.0) ** gamma, 1.0 if gamma == 0 else 0.0)


def parse_terms(text: str, option: str = "--segment.loss") -> dict[Term, float]:
    """The losses of a sum, with their weights: "cross_entropy", "cross_entropy + dice", "focal+0.5*dice".

    Raises:
        BeitJaxError: another text; a loss that stands twice; a weight that is not positive.
    """
    found: dict[Term, float] = {}
    for part in re.split(r"(?<![0-9.][eE])\+", text):
        match = _TERM.fullmatch(part.strip())
        name = next((term for term in TERMS if match and match[2] == term), None)
        try:
            weight = float(match[1]) if match and match[1] else 1.0
        except ValueError:
            name, weight = None, 1.0
        if name is None or name in found or not 0 < weight < float("inf"):
            raise BeitJaxError(
                f"{option}: expected {', '.join(TERMS)} or a sum of different ones such as cross_entropy+0.5*dice, "
                f"found {printable(text, 80)}"
            )
        found[name] = weight
    return found
