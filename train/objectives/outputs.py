"""What the outputs of a classifier are: classes of which one holds, or several, or numbers; their targets and loss."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from beit_jax.choices import ProblemType
from beit_jax.config import BeitConfig
from beit_jax.tree import Nested

from ..augmentation.labels import (
    ArrayLike,
    binary_cross_entropy,
    class_numbers,
    nan_unless_class,
    several_classes,
    soft_cross_entropy,
)
from ..augmentation.mixing import soft_targets
from ..labels.targets import LABEL, Target
from ..step.criterion import Batch, Metrics

HEAD = "classifier"
"""The layer of a model that makes its outputs."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model's outputs are, and how they are learned.

    Attributes:
        target: what the data say.
        weights: of the classes, float32; None where all weigh the same.
        mean, std: of the numbers, float32 [values]: the model learns (number - mean) / std. None: as they are.
    """

    target: Target
    problem_type: ProblemType
    weights: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None

    @classmethod
    def of(cls, config: BeitConfig) -> "Outputs":
        """Outputs of a model for which there are no data yet."""
        problem = config.problem_type or "single_label_classification"
        return cls(Target(LABEL, problem, config.labels), problem)

    def targets(self, labels: ArrayLike, smoothing: float) -> Float[Array, "b columns"]:
        """What is learned of the images of a batch, so that two rows can be mixed; `prepared` takes it apart.

        Args:
            labels: a `targets.Label` for every image.
            smoothing: the share of a class's target that all classes share; where several classes hold, each of them is
                smoothed between having it and not (as Keras' BinaryCrossentropy does).

        Raises:
            BeitJaxError: labels that say nothing like it, where they are known.
        """
        classes = len(self.target.names)
        if self.problem_type == "regression":
            numbers = jnp.asarray(labels, jnp.float32)
            return numbers if self.mean is None or self.std is None else (numbers - self.mean) / self.std
        if self.problem_type == "multi_label_classification":
            if labels.ndim == 1:
                numbered = class_numbers(labels, classes, labels.shape)
                present = jax.nn.one_hot(numbered, classes) * nan_unless_class(numbered, classes)[:, None]
            else:
                present = several_classes(labels, (len(labels), classes))
            return present * (1 - smoothing) + smoothing / 2
        soft = soft_targets(labels, classes, smoothing)
        if self.weights is None:
            return soft
        weight = jnp.asarray(self.weights)[jnp.asarray(labels)]  # of the label itself, as torch has it when it smooths
        return jnp.concatenate([soft, weight[:, None]], axis=1)

    def prepared(self, mixed: Float[Array, "b columns"]) -> dict[str, Array]:
        """What `loss` reads of a batch, from its mixed `targets`: ``target``, and ``scale`` where classes have weights.

        The mean over the batch of scale times loss is torch's: the sum of the weighted losses over the sum of weights.
        The scale is of the whole batch, so that parts of it can be computed one after the other.
        """
        if self.weights is None or self.problem_type != "single_label_classification":
            return {"target": mixed}
        mean = mixed[:, -1].mean()
        scale = jnp.where(mean > 0, 1 / jnp.where(mean > 0, mean, 1.0), 0.0)
        return {"target": mixed[:, :-1], "scale": jnp.full(len(mixed), scale)}

    def loss(self, logits: Float[Array, "b classes"], batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """The mean loss of a batch that `prepared` made, and a number to log: of images whose largest share is right
        (``accuracy``), of all classes of all images together (``f1``, a class being found from a score of 0.5 on), or
        the mean distance from the numbers as the data have them (``mae``)."""
        target = batch["target"]
        if self.problem_type == "regression":
            distance = logits.astype(jnp.float32) - target
            in_units = jnp.abs(distance) if self.std is None else jnp.abs(distance) * self.std
            return jnp.square(distance).mean(), {"mae": in_units.mean()}
        if self.problem_type == "multi_label_classification":
            return binary_cross_entropy(logits, target, self.weights).mean(), {"f1": _f1(logits >= 0, target >= 0.5)}
        # Of mixed images, the larger share is what they count as.
        accuracy = {"accuracy": (logits.argmax(axis=-1) == target.argmax(axis=-1)).mean()}
        if self.weights is None:
            return soft_cross_entropy(logits, target), accuracy
        each = -(target * self.weights * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1)
        return (each * batch["scale"]).mean(), accuracy

    def losses(self, outputs: Float[Array, "b outputs"], labels: ArrayLike) -> tuple[Array, Array]:
        """The loss of every image of an evaluation and its weight, [b] float32: `loss` without smoothing.

        The weighted mean over images is the validation loss.

        Args:
            outputs: logits; numbers as the data have them.
            labels: a `targets.Label` for every image.
        """
        outputs, ones = outputs.astype(jnp.float32), jnp.ones(len(outputs), jnp.float32)
        if self.problem_type == "regression":
            distance = outputs - jnp.asarray(labels, jnp.float32)
            return jnp.square(distance if self.std is None else distance / self.std).mean(axis=-1), ones
        targets = self.targets(labels, 0.0)
        if self.problem_type == "multi_label_classification":
            return binary_cross_entropy(outputs, targets, self.weights).mean(axis=-1), ones
        weights = ones if self.weights is None else jnp.asarray(self.weights)[jnp.asarray(labels)]
        return -(targets[:, : outputs.shape[-1]] * jax.nn.log_softmax(outputs)).sum(axis=-1), weights

    def in_units(self, params: Nested) -> Nested:
        """The parameters of a model that gives numbers as the data do, of one that gives them standardised."""
        if self.mean is None or self.std is None:
            return params
        mean, std = self.mean, self.std

        @jax.jit
        def folded(head: Mapping[str, Array]) -> dict[str, Array]:
            return {"kernel": head["kernel"] * std, "bias": head["bias"] * std + mean}

        return {**params, HEAD: folded(params[HEAD])}

    def standardised(self, params: Nested) -> Nested:
        """The inverse of `in_units`, for parameters on the host."""
        if self.mean is None or self.std is None:
            return params
        head = params[HEAD]
        kernel, bias = head["kernel"] / self.std, (head["bias"] - self.mean) / self.std
        return {**params, HEAD: {"kernel": np.asarray(kernel, np.float32), "bias": np.asarray(bias, np.float32)}}


def _f1(found: Array, present: Array) -> Float[Array, ""]:
    both, either = (found & present).sum(), found.sum() + present.sum()
    return jnp.where(either > 0, 2 * both / jnp.maximum(either, 1), 0.0)
