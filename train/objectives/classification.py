"""Classification: one label for an image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from beit_jax.config import BeitConfig
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.build import Model
from beit_jax.terminal import Advance
from beit_jax.tree import Nested

from ..augmentation.labels import ArrayLike, checked_targets
from ..augmentation.mixing import erase, mix, normalise, soft_targets
from ..evaluation.accuracy import evaluate_classification
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import State
from .labelled import LabelledImages, LabelledRecipe
from .objective import WholeModel

if TYPE_CHECKING:
    from .objective import Images


@dataclass(frozen=True)
class ClassificationRecipe(LabelledRecipe):
    """A run that trains a classifier."""

    objective: ClassVar[str] = "classification"


@dataclass(frozen=True)
class Classification(LabelledImages[ClassificationRecipe], WholeModel[ClassificationRecipe]):
    """A model learns to classify images."""

    @property
    def criterion(self) -> Criterion:
        return classification(self.recipe, self.config)

    def scores(
        self, state: State, images: "Images", processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        batches = self.evaluation_batches(images, processor)
        found = evaluate_classification(
            (self.graph, state.params), batches, self.config.labels, mesh=mesh, advance=advance
        )
        return {"accuracy": found.top1, "accuracy_top5": found.top5}


def classification(recipe: LabelledRecipe, config: BeitConfig) -> Criterion:
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

    return Criterion(prepare, loss)


def soft_cross_entropy(logits: Float[Array, "b classes"], targets: Float[ArrayLike, "b classes"]) -> Float[Array, ""]:
    """Mean over the batch of the cross entropy with targets that are distributions, in float32.

    Raises:
        BeitJaxError: targets of another shape than the logits'; rows that are no distributions, where the targets are
            known. What a compiled function is given is not checked.
    """
    targets = checked_targets(targets, logits.shape)
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1).mean()
