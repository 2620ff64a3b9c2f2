"""Images of one label each: the input of classification and of linear probes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp

from beit_jax.images.processor import ImageProcessor

from ..augmentation.classification import randaugment_policy, train_transform
from ..data.datasets import Dataset, open_dataset
from ..evaluation.stepping import HostBatch, host_batches
from ..recipe import AugmentOptions, Recipe
from .objective import Objective, Shapes

if TYPE_CHECKING:
    from .objective import Images


@dataclass(frozen=True)
class LabelledRecipe(Recipe):
    """A run on labelled images, with the augmentation of a classifier."""

    augment: AugmentOptions = field(default_factory=AugmentOptions)

    def check(self) -> None:
        super().check()
        self.check_pairs(self.augment)
        randaugment_policy(self.augment)


LabelledT = TypeVar("LabelledT", bound=LabelledRecipe, covariant=True)


class LabelledImages(Objective[LabelledT]):
    """The input: ``image`` uint8 [b, h, w, 3] and ``label`` int32 [b]."""

    @staticmethod
    def open(directory: Path, split: str) -> "Images":
        return open_dataset(directory, split)

    @property
    def transform(self) -> Callable[..., Any]:
        mean, _ = self.recipe.data.moments(self.config.num_channels)
        return train_transform(self.recipe.augment, self.config.image_size, mean)

    def batch(self, size: int) -> Shapes:
        return {
            "image": self.pixels(size),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        }

    def evaluation_batches(self, images: "Images", processor: ImageProcessor) -> "Iterator[HostBatch]":
        """This host's share of the images to evaluate."""
        assert isinstance(images, Dataset)
        return host_batches(images, processor, self.recipe.eval_batch_size, workers=self.recipe.data.workers)
