"""What is learned: an objective prepares a batch and computes a loss. Steps, sharding and the loop know nothing of it.

To add one, write a function that returns an `Objective`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from beit_jax.config import BeitConfig
from beit_jax.models.build import Model
from beit_jax.models.segmenter import BeitForSemanticSegmentation
from beit_jax.tree import Nested

from ..augmentation.mixing import erase, mix, normalise, soft_targets
from ..objectives.segmentation_loss import Average, segmentation_loss
from ..recipe import Recipe

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@dataclass(frozen=True)
class Objective:
    """A training task.

    Attributes:
        prepare: from a batch as the data pipeline makes it (arrays [b, ...]) and a key to what `loss` reads, on device.
            It sees the whole batch, so that what pairs samples does not depend on how the batch is computed.
        loss: from the model, a batch or a part of one, a key for dropout, and what the state keeps as `ema` (None if
            nothing) to the mean loss, float32, and more scalars to log. The model's running statistics may move: the
            step carries them on. Without a key nothing is drawn, and they stay: this is evaluation.
        schedule: from the number of the step to scalars that follow from it alone; `loss` finds them in its batch.
    """

    prepare: Callable[[Batch, Key[Array, ""]], Batch]
    loss: Callable[[Any, Batch, Key[Array, ""] | None, Nested | None], tuple[Float[Array, ""], Metrics]]
    schedule: Callable[[Int[Array, ""]], Metrics] = lambda step: {}


def classification(recipe: Recipe, config: BeitConfig) -> Objective:
    """Labels of images: ``image`` uint8 [b, h, w, 3] and ``label`` int32 [b].

    Source: microsoft/unilm@768a3c8 beit/run_class_finetuning.py and engine_for_finetuning.py. One loss serves its three
    (mixed, smoothed and plain labels): cross entropy with targets that are a distribution.
    """
    augment = recipe.augment

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        erase_key, mix_key = jax.random.split(key)
        images = erase(erase_key, normalise(batch["image"], recipe.data.statistics), augment.erasing)
        targets = soft_targets(batch["label"], config.num_labels, augment.smoothing)
        images, targets = mix(mix_key, images, targets, augment)
        return {"image": images, "target": targets}

    def loss(
        model: Model, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        logits = model(batch["image"], key=key, remat=recipe.model.remat).logits
        assert logits is not None
        target = batch["target"]
        # Of mixed images, the larger share is what they count as.
        correct = logits.argmax(axis=-1) == target.argmax(axis=-1)
        return soft_cross_entropy(logits, target), {"accuracy": correct.mean()}

    return Objective(prepare, loss)


def segmentation(recipe: Recipe, config: BeitConfig, *, average: Average = "all") -> Objective:
    """Classes of pixels: ``image`` uint8 [b, h, w, 3] and ``label`` int32 [b, h, w]; `average` as `segmentation_loss`.

    Source: microsoft/unilm@768a3c8 beit/semantic_segmentation.
    """

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        return {"image": normalise(batch["image"], recipe.data.statistics), "label": batch["label"]}

    def loss(
        model: Model, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        assert isinstance(model, BeitForSemanticSegmentation)
        output = model(batch["image"], train=True, key=key, remat=recipe.model.remat)
        return segmentation_loss(output, batch["label"], config, average=average), {}

    return Objective(prepare, loss)


def soft_cross_entropy(logits: Float[Array, "b classes"], targets: Float[Array, "b classes"]) -> Float[Array, ""]:
    """Mean over the batch of the cross entropy with targets that are distributions, in float32."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1).mean()
