"""Images alone: the input of pre-training, and an evaluation by the loss of unseen images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from beit_jax.images.processor import ImageProcessor
from beit_jax.terminal import Advance
from beit_jax.tree import Nested

from ..augmentation.masking import BlockMask
from ..augmentation.views import ViewsTransform
from ..costs.estimate import traced_activations, traced_flops, with_one_block
from ..data.batches import train_batches
from ..data.datasets import Dataset, open_dataset
from ..distributed.sharding import batch_rows, put_batch
from ..evaluation.mean_loss import VALIDATION_LOSS
from ..recipe import CropOptions, MaskOptions, Recipe
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import State, variables
from .objective import Objective, Shapes, zeros

if TYPE_CHECKING:
    from .objective import Images

COLLAPSED: Mapping[str, tuple[float, str]] = {
    "target_deviation": (0.1, "the teacher gives nearly the same features for all patches"),
    "prediction_deviation": (0.01, "predictions are nearly the same for all patches"),
    "predicted_perplexity": (1.5, "one token is predicted for nearly all patches"),
    "target_perplexity": (1.5, "the tokenizer gives nearly all patches one token"),
}
"""Metrics below which learning has gone wrong, and what that means. The deviations are fairseq's for data2vec."""
VALIDATION_SEED = 0  # of the crops and masks of evaluation: the same in every evaluation of every run


@dataclass(frozen=True)
class UnlabelledRecipe(Recipe):
    """A run on images alone: random crops of them."""

    augment: CropOptions = field(default_factory=CropOptions)

    def check(self) -> None:
        super().check()
        self.check_without_pooling()


@dataclass(frozen=True)
class MaskedRecipe(UnlabelledRecipe):
    """A run that hides patches of its images."""

    mask: MaskOptions = field(default_factory=MaskOptions)


UnlabelledT = TypeVar("UnlabelledT", bound=UnlabelledRecipe, covariant=True)


class UnlabelledImages(Objective[UnlabelledT]):
    """The input: ``image`` uint8 [b, h, w, 3], and ``mask`` bool [b, patches] where patches are hidden.

    The score is the loss of images that the model has not seen.
    """

    needs_validation = False
    evaluation = "whole batches"

    @staticmethod
    def open(directory: Path, split: str) -> "Images":
        return open_dataset(directory, split)

    @property
    def views(self) -> ViewsTransform:
        """The views of an image that training and evaluation need."""
        return ViewsTransform(self.recipe.augment, self.config.image_size, None, "bicubic", self.mask)

    @property
    def transform(self) -> Callable[..., Any]:
        return self.views

    @property
    def mask(self) -> BlockMask | None:
        """Draws the hidden patches of an image; None hides nothing."""
        return None

    def batch(self, size: int) -> Shapes:
        shapes = {"image": self.pixels(size)}
        if self.mask is not None:
            rows, columns = self.config.grid
            shapes["mask"] = jax.ShapeDtypeStruct((size, rows * columns), jnp.bool_)
        return shapes

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        return collapse(metrics)

    def scores(
        self, state: State, images: "Images", processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        """Means of the objective's metrics over the validation images, in whole batches, without dropout.

        Crops and masks are drawn as in training, and are the same in every evaluation.
        """
        assert isinstance(images, Dataset)
        size = self.recipe.eval_batch_size
        count, totals = len(images) // size, dict[str, float]()
        with train_batches(
            images,
            replace(self.recipe.data, batch_size=size),
            self.views,
            seed=VALIDATION_SEED,
            start_step=0,
            rows=batch_rows(mesh, size),
        ) as batches:
            for _, batch in zip(range(count), batches, strict=False):
                found = jax.device_get(self._measure(state, self.second_network(state), put_batch(batch, mesh)))
                for name, value in found.items():
                    totals[name] = totals.get(name, 0.0) + float(value) / count
                advance(size)
        # A compiled function returns names in alphabetical order.
        return {f"validation_{name}": totals[name] for name in sorted(totals, key=lambda name: (name != "loss", name))}

    @property
    def score_names(self) -> tuple[str, ...]:
        def metrics(learned: Nested) -> Metrics:
            return self._traced(2, learned)[1]

        found = jax.eval_shape(metrics, self.divided_shapes()[0])
        return (VALIDATION_LOSS, *(f"validation_{name}" for name in sorted(found)))

    def second_network(self, state: State) -> Nested:
        """The parameters of the frozen network or of the average, which the criterion reads in an evaluation."""
        return state.frozen or state.average

    @property
    def evaluated(self) -> Criterion:
        """The criterion whose metrics are the scores."""
        return self.criterion

    @cached_property
    def _measure(self) -> Callable[[State, Nested, Batch], Metrics]:
        graph, criterion = self.graph, self.evaluated

        def measure(state: State, teacher: Nested, batch: Batch) -> Metrics:
            model = nnx.merge(graph, variables(state.params, state.stats))
            prepared = {**criterion.prepare(batch, jax.random.key(VALIDATION_SEED)), **criterion.schedule(state.step)}
            loss, metrics = criterion.loss(model, prepared, None, teacher or None)
            return {"loss": loss, **metrics}

        return jax.jit(measure)

    @property
    def flops(self) -> float:
        # What is computed again counts once.
        return traced_flops(self._storing_everything()._loss, self.divided_shapes()[0])

    @property
    def activations(self) -> int:
        learned = self.divided_shapes()[0]
        kept = traced_activations(self._loss, learned)
        if self.recipe.model.remat == "none":
            return kept
        whole = traced_activations(self._storing_everything()._loss, learned)
        return with_one_block(kept, whole, len(self.division.blocks(self.config.num_hidden_layers)))

    def _storing_everything(self) -> Self:
        """This objective without computing anything again on the way back."""
        model = replace(self.recipe.model, remat="none")
        return self.replaced(recipe=replace(self.recipe, model=model))

    def _loss(self, images: int, learned: Nested) -> Array:
        """The training loss of so many images, for tracing."""
        return self._traced(images, learned)[0]

    def _traced(self, images: int, learned: Nested) -> tuple[Array, Metrics]:
        """The training loss of so many images and its metrics, for tracing."""
        shapes, criterion, key = self.shapes(), self.criterion, jax.random.key(0)
        batch = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in self.batch(images).items()}
        prepared = {**criterion.prepare(batch, key), **criterion.schedule(jnp.zeros((), jnp.int32))}
        second = shapes.frozen or (shapes.params if self.recipe.optim.ema is not None else {})
        stats, second, fixed = (jax.tree.map(zeros, tree) for tree in (shapes.stats, second, self.divided_shapes()[1]))
        model = nnx.merge(self.graph, variables(self.division.join(learned, fixed), stats))
        return criterion.loss(model, prepared, key, second or None)


MaskedT = TypeVar("MaskedT", bound=MaskedRecipe, covariant=True)


class MaskedImages(UnlabelledImages[MaskedT]):
    """The input with ``mask`` bool [b, patches], True where a patch is hidden."""

    @property
    def mask(self) -> BlockMask:
        return BlockMask(self.config.grid, self.recipe.mask)


def collapse(metrics: Mapping[str, float]) -> list[str]:
    """A line for everything in these means of metrics that shows that nothing is learned any more."""
    return [
        f"{name} is {metrics[name]:.3g}, expected more than {least:g}: {meaning}"
        for name, (least, meaning) in COLLAPSED.items()
        if np.isfinite(metrics.get(name, np.nan)) and metrics[name] < least
    ]
