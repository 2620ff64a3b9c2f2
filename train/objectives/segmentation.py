"""Semantic segmentation: one label for every pixel. The loss is cross entropy of both heads at the labels' size.

Upsampled logits of a batch of four at 640 pixels and 150 classes are 1 GB in float32, and the loss needs several such
arrays. They are therefore made, used and, in the backward pass, made again in bands of rows.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Key

from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor, Within, ade20k_processor
from beit_jax.inference.segmentation import Inference, segment
from beit_jax.models.build import Model
from beit_jax.models.segmenter import BeitForSemanticSegmentation, SegmenterOutput
from beit_jax.resize import linear_matrix
from beit_jax.terminal import Advance
from beit_jax.tree import Nested

from ..augmentation.labels import ArrayLike, class_numbers, cross_entropy
from ..augmentation.mixing import normalise
from ..augmentation.segmentation import segmentation_transform
from ..data.datasets import SegmentationDataset, open_segmentation
from ..distributed.collectives import gather, on_host
from ..evaluation.segmentation import Confusion
from ..recipe import STATISTICS, Recipe, SceneOptions
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import State, variables
from .objective import Shapes, WholeModel

if TYPE_CHECKING:
    from .objective import Images

Average = Literal["valid", "all"]
BAND = 32  # rows of labels whose logits exist at a time


@dataclass(frozen=True)
class SegmentationOptions(SceneOptions):
    """The augmentation of training images and their label maps, in this order, and the evaluation of validation images.

    Source: microsoft/unilm@768a3c8 beit/semantic_segmentation/configs/_base_/datasets/ade20k.py.
    """

    mode: Literal["slide", "whole"] = "slide"
    """Validation images: windows of the crop's size over each, two thirds of it apart, or each in one piece."""


@dataclass(frozen=True)
class SegmentationRecipe(Recipe):
    """A run that trains a segmentation model."""

    objective: ClassVar[str] = "segmentation"
    fallback: ClassVar[str] = "beit_base_patch16_640_ade20k"
    segment: SegmentationOptions = field(default_factory=SegmentationOptions)

    def for_tpus(self) -> "SegmentationRecipe":
        """16 images, in one part or two."""
        recipe = replace(self, model=replace(self.model, remat="block"))
        if self.optim.accumulate == 1:
            return replace(recipe, topology="v5e:4x4")
        return replace(recipe, topology="v5e:2x4", run=replace(self.run, mesh=(1, -1, 1)))


@dataclass(frozen=True)
class Segmentation(WholeModel[SegmentationRecipe]):
    """A model learns to classify every pixel."""

    evaluation = "single images"
    epoch_images = 20_210  # of ADE20K

    architecture: ClassVar[Architecture] = "semantic_segmentation"

    @staticmethod
    def processor(recipe: Recipe, config: BeitConfig) -> ImageProcessor:
        """Images fit into the recipe's bounds and are not cut."""
        assert isinstance(recipe, SegmentationRecipe)
        mean, std = STATISTICS[recipe.data.statistics]
        long, short = recipe.segment.scale
        return replace(ade20k_processor(short), resize=Within(short, long), mean=mean, std=std)

    @staticmethod
    def open(directory: Path, split: str) -> "Images":
        return open_segmentation(directory, split)

    @property
    def transform(self) -> Callable[..., Any]:
        mean, _ = STATISTICS[self.recipe.data.statistics]
        return segmentation_transform(self.recipe.segment, self.config.image_size[0], mean)

    def batch(self, size: int) -> Shapes:
        height, width = self.config.image_size
        return {
            "image": jax.ShapeDtypeStruct((size, height, width, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((size, height, width), jnp.int32),
        }

    @property
    def criterion(self) -> Criterion:
        return segmentation(self.recipe, self.config)

    def scores(
        self, state: State, images: "Images", processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        """mIoU, mAcc and aAcc of all images at their own sizes, which no batch could hold.

        Every device takes images of its own, with a whole copy of the model: counting is exact in any order.
        """
        assert isinstance(images, SegmentationDataset)
        model = jax.tree.map(on_host, variables(state.params, state.stats))
        local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        share = range(jax.process_index(), len(images), jax.process_count())

        def count(place: int) -> Int[np.ndarray, "classes classes"]:
            with jax.default_device(local[place]):
                return self._confusion(model, images, share[place :: len(local)], processor, advance)

        # Threads of their own also leave the mesh: on one device there is nothing to constrain.
        with ThreadPoolExecutor(len(local)) as threads:
            counts = sum(threads.map(count, range(len(local))))
        total = Confusion(self.config.labels, self.config.semantic_loss_ignore_index)
        total.counts = np.sum([np.asarray(part, np.int64) for part in gather(np.asarray(counts).tolist())], axis=0)
        found = total.scores()
        return {"mIoU": found.mean_iou, "mAcc": found.mean_accuracy, "aAcc": found.pixel_accuracy}

    def _confusion(
        self,
        params: Nested,
        images: SegmentationDataset,
        chosen: Sequence[int],
        processor: ImageProcessor,
        advance: Advance,
    ) -> Int[np.ndarray, "classes classes"]:
        """(truth, prediction) pairs of the chosen images, by the model on the default device."""
        model = nnx.merge(self.graph, jax.tree.map(jnp.asarray, params))
        confusion = Confusion(self.config.labels, self.config.semantic_loss_ignore_index)
        for index in chosen:
            picture, truth = images.load(index)
            found = segment(model, processor, picture, Inference(mode=self.recipe.segment.mode))
            confusion.add(found, truth, images.where(index))
            advance(1)
        return confusion.counts


def segmentation(recipe: SegmentationRecipe, config: BeitConfig, *, average: Average = "all") -> Criterion:
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

    return Criterion(prepare, loss)


def segmentation_loss(
    output: SegmenterOutput,
    labels: Integer[ArrayLike, "b height width"],
    config: BeitConfig,
    *,
    average: Average = "valid",
) -> Float[Array, ""]:
    """Cross entropy of the logits plus ``config.auxiliary_loss_weight`` times that of the auxiliary ones.

    Args:
        labels: class numbers; ``config.semantic_loss_ignore_index`` where a pixel does not count.
        average: over the pixels that count, as transformers does, or over all, as mmseg 0.11 trained the models. Of no
            pixels the average is NaN.

    Raises:
        BeitJaxError: labels of another shape than [b, height, width]; a label that is neither a class nor ignored,
            where the labels are known; in a compiled function the loss is NaN.
    """
    assert output.logits is not None
    ignore = config.semantic_loss_ignore_index
    loss = pixel_cross_entropy(output.logits, labels, ignore, average)
    if output.auxiliary_logits is None:
        return loss
    return loss + config.auxiliary_loss_weight * pixel_cross_entropy(output.auxiliary_logits, labels, ignore, average)


def pixel_cross_entropy(
    logits: Float[Array, "b h w classes"], labels: Integer[ArrayLike, "n height width"], ignore: int, average: Average
) -> Float[Array, ""]:
    """Mean cross entropy after bilinear resizing of the logits to the labels' size, as torch's ``interpolate``.

    Labels are checked as those of `segmentation_loss`.
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
    def band(rows: Array, labels: Array) -> Array:
        resized = jnp.einsum("ty,byxc,sx->btsc", rows, logits, columns, precision="highest")
        counted = labels != ignore
        return jnp.where(counted, cross_entropy(resized, jnp.where(counted, labels, 0)), 0.0).sum()

    def add(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        return total + band(*piece), None

    by_band = padded.reshape(len(labels), bands, BAND, width).swapaxes(0, 1)
    total, _ = jax.lax.scan(add, jnp.zeros(()), (jnp.asarray(rows, logits.dtype), by_band))
    return total / (labels.size if average == "all" else (labels != ignore).sum())
