"""Semantic segmentation: one label for every pixel. The losses are those of `pixel_losses`, of both heads."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Key

from beit_jax.choices import FeatureTaps
from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.images.label_maps import ignored_number
from beit_jax.images.processor import ImageProcessor, Within, ade20k_processor
from beit_jax.inference.segmentation import Inference, labels_and_losses
from beit_jax.models.build import Model
from beit_jax.models.segmenter import BeitForSemanticSegmentation, SegmenterOutput
from beit_jax.terminal import Advance
from beit_jax.tree import Nested

from ..adapting import AdaptableRecipe
from ..augmentation.labels import ArrayLike
from ..augmentation.mixing import normalise
from ..augmentation.pixel_losses import Average, PixelLoss, parse_terms
from ..augmentation.segmentation import segmentation_transform
from ..data.datasets import SegmentationDataset, open_segmentation
from ..distributed.collectives import gather, on_host
from ..evaluation.mean_loss import VALIDATION_LOSS
from ..evaluation.segmentation import Confusion
from ..initial.model_config import normalised
from ..initial.pixels import of_decoded
from ..recipe import LAYERS, NOT_NEGATIVE, SCALES, SIZE, Recipe, SceneOptions, require
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import State, variables
from .class_weights import balanced, class_weights
from .objective import Shapes, Sources, WholeModel

if TYPE_CHECKING:
    from .objective import Images

DEFAULT_GAMMA = 2.0  # Lin et al., arXiv:1708.02002


@dataclass(frozen=True)
class SegmentationOptions(SceneOptions):
    """The augmentation of training images and their label maps, in this order, the loss, and validation.

    Source: microsoft/unilm@768a3c8 beit/semantic_segmentation/configs/_base_/datasets/ade20k.py.
    """

    mode: Literal["slide", "whole"] = "slide"
    """Validation images: windows of the crop's size over each, two thirds of it apart, or each in one piece."""
    loss: str = "cross_entropy"
    """cross_entropy, focal, dice, or a sum of them such as cross_entropy+0.5*dice."""
    average: Average = "all"
    """Cross entropy and focal loss are means over all pixels, as the published runs have it, or over those that count
    (valid), each as often as its class weighs."""
    focal_gamma: Annotated[float, NOT_NEGATIVE] = DEFAULT_GAMMA
    """Exponent of the focal loss; 0 is cross entropy."""
    taps: FeatureTaps = "original"
    """What a new head reads of the encoder: after a third, a half, two thirds and all of the blocks (original), or one
    block earlier each (hf), the latest that transformers can read, so that it computes an export the same. A
    segmentation model of --init keeps its own; of three blocks there is only the first."""
    class_weights: str | None = None
    """Weights of classes in the loss: balanced (pixels over classes times the class's pixels), or a JSON file
    {"name of a class": weight}."""


@dataclass(frozen=True)
class HeadOptions:
    """UperNet on the encoder, as the checkpoint has it if that segments, else as the published models have it."""

    out_indices: tuple[int, int, int, int] | None = None
    """Blocks whose outputs it reads, from 0; by default 3 5 7 11 of 12 blocks, 7 11 15 23 of 24, and such parts of any
    other depth."""
    pool_scales: Annotated[tuple[int, ...] | None, SCALES] = None
    """Bins along a side of the pyramid pooling; by default 1 2 3 6."""
    auxiliary: bool | None = None
    """Whether there is a second head, on the third map, which only the loss uses; by default there is."""
    auxiliary_weight: Annotated[float | None, NOT_NEGATIVE] = None
    """Its weight in the loss; by default 0.4."""
    auxiliary_channels: Annotated[int | None, SIZE] = None
    """Its width; by default 256."""
    auxiliary_convs: Annotated[int | None, LAYERS] = None
    """Its convolutions; by default 1."""
    auxiliary_concat: bool | None = None
    """Whether its classifier reads the map, too; by default not."""


@dataclass(frozen=True)
class SegmentationRecipe(AdaptableRecipe):
    """A run that trains a segmentation model."""

    objective: ClassVar[str] = "segmentation"
    fallback: ClassVar[str] = "beit_base_patch16_640_ade20k"
    segment: SegmentationOptions = field(default_factory=SegmentationOptions)
    head: HeadOptions = field(default_factory=HeadOptions)

    def check(self) -> None:
        super().check()
        gamma, terms = self.segment.focal_gamma, parse_terms(self.segment.loss)
        require("focal" in terms or gamma == DEFAULT_GAMMA, "segment.focal_gamma", "a --segment.loss with focal", gamma)

    def for_tpus(self) -> "SegmentationRecipe":
        """16 images, in one part or two."""
        recipe = replace(self, model=replace(self.model, remat="block"))
        if self.optim.accumulate == 1:
            return replace(recipe, topology="v5e:4x4")
        return replace(recipe, topology="v5e:2x4", run=replace(self.run, mesh=(1, -1, 1)))


@dataclass(frozen=True)
class Segmentation(WholeModel[SegmentationRecipe]):
    """A model learns to classify every pixel.

    Attributes:
        weights: of the classes; None: all weigh the same.
        do_reduce_labels: what the result says of the label maps of its data: see `SegmentationDataset`.
    """

    weights: Float[np.ndarray, " classes"] | None = field(default=None, compare=False)
    do_reduce_labels: bool | None = True

    evaluation = "single images"
    epoch_images = 20_210  # of ADE20K

    architecture: ClassVar[Architecture] = "semantic_segmentation"

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        config = super().configure(recipe, labels, sources)
        config = replace(config, semantic_loss_ignore_index=ignored_number(len(labels)))
        assert isinstance(recipe, SegmentationRecipe)
        has_head = sources.start is not None and sources.start.config.task == config.task
        if recipe.segment.taps == "original" or has_head or config.feature_taps == "hf" or config.out_indices[0] < 0:
            return config
        # transformers' number k is what comes before block k - 1: each map is of one block earlier than the original's.
        return replace(config, feature_taps="hf", out_indices=tuple(index + 1 for index in config.out_indices))

    def fitted(self, images: "Images") -> "Segmentation":
        assert isinstance(images, SegmentationDataset)
        weights = class_weights(
            self.recipe.segment.class_weights,
            self.config.labels,
            lambda: balanced(images.count_pixels()),
            name="--segment.class-weights",
        )
        return self.replaced(weights=weights, do_reduce_labels=images.do_reduce_labels)

    @staticmethod
    def processor(recipe: Recipe, config: BeitConfig) -> ImageProcessor:
        """Images fit into the recipe's bounds and are not cut."""
        assert isinstance(recipe, SegmentationRecipe)
        long, short = recipe.segment.edges(config.image_size)
        found = ade20k_processor(short).for_channels(config.num_channels)
        return normalised(replace(found, resize=Within(short, long)), recipe.data)

    @property
    def image_processor(self) -> ImageProcessor:
        return replace(super().image_processor, do_reduce_labels=self.do_reduce_labels)

    @staticmethod
    def open(directory: Path, split: str) -> "Images":
        return open_segmentation(directory, split)

    @property
    def transform(self) -> Callable[..., Any]:
        mean, _ = self.recipe.data.moments(self.config.num_channels)
        ignored = self.config.semantic_loss_ignore_index
        return segmentation_transform(self.recipe.segment, self.config.image_size, mean, ignored=ignored)

    def batch(self, size: int) -> Shapes:
        height, width = self.config.image_size
        return {
            "image": self.pixels(size),
            "label": jax.ShapeDtypeStruct((size, height, width), jnp.int32),
        }

    @property
    def criterion(self) -> Criterion:
        return segmentation(self.recipe, self.config, self.weights)

    def scores(
        self, state: State, images: "Images", processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        """mIoU, mAcc and aAcc of all images at their own sizes, which no batch could hold, and the validation loss.

        The loss is the mean cross entropy of the pixels that count, each the same, whatever terms are trained by. Every
        device takes images of its own, with a whole copy of the model: sums are exact in any order.
        """
        assert isinstance(images, SegmentationDataset)
        model = jax.tree.map(on_host, variables(state.params, state.stats))
        local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        share = range(jax.process_index(), len(images), jax.process_count())

        loss: list[float] = []  # of every image, in any order

        def count(place: int) -> Int[np.ndarray, "classes classes"]:
            with jax.default_device(local[place]):
                return self._confusion(model, images, share[place :: len(local)], processor, advance, loss)

        # Threads of their own also leave the mesh: on one device there is nothing to constrain.
        with ThreadPoolExecutor(len(local)) as threads:
            counts = sum(threads.map(count, range(len(local))))
        total = Confusion(self.config.labels, self.config.semantic_loss_ignore_index)
        total.counts = np.sum([np.asarray(part, np.int64) for part in gather(np.asarray(counts).tolist())], axis=0)
        found = total.scores()
        pixels, losses = int(total.counts.sum()), math.fsum(chain(*gather(loss)))
        mean = losses / pixels if pixels else math.nan
        values = (found.mean_iou, found.mean_accuracy, found.pixel_accuracy, mean)
        return dict(zip(self.score_names, values, strict=True))

    @property
    def score_names(self) -> tuple[str, ...]:
        return "mIoU", "mAcc", "aAcc", VALIDATION_LOSS

    def _confusion(
        self,
        params: Nested,
        images: SegmentationDataset,
        chosen: Sequence[int],
        processor: ImageProcessor,
        advance: Advance,
        loss: list[float],
    ) -> Int[np.ndarray, "classes classes"]:
        """(truth, prediction) pairs of the chosen images, by the model on the default device.

        Args:
            loss: the sum of the losses of its pixels is added for every image.
        """
        model = nnx.merge(self.graph, jax.tree.map(jnp.asarray, params))
        confusion = Confusion(self.config.labels, self.config.semantic_loss_ignore_index)
        processor, how = of_decoded(processor, self.reading), Inference(mode=self.recipe.segment.mode)
        ignored = self.config.semantic_loss_ignore_index
        for index in chosen:
            picture, truth = images.load(index)
            found, losses = labels_and_losses(model, processor, picture, truth, ignored=ignored, how=how)
            loss.append(float(losses.sum(dtype=np.float64)))
            confusion.add(found, truth, images.where(index))
            advance(1)
        return confusion.counts


def segmentation(
    recipe: SegmentationRecipe, config: BeitConfig, weights: Float[np.ndarray, " classes"] | None = None
) -> Criterion:
    """Classes of pixels: ``image`` uint8 [b, h, w, 3] and ``label`` int32 [b, h, w], by the recipe's loss.

    A batch in which no pixel counts teaches nothing.

    Args:
        weights: of the classes.

    Source: microsoft/unilm@768a3c8 beit/semantic_segmentation.
    """
    options = recipe.segment
    how = PixelLoss(parse_terms(options.loss), options.average, options.focal_gamma, weights, empty=0.0)

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        return {"image": normalise(batch["image"], recipe.data), "label": batch["label"]}

    def loss(
        model: Model, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        assert isinstance(model, BeitForSemanticSegmentation)
        output = model(batch["image"], train=True, key=key, remat=recipe.model.remat)
        assert output.logits is not None
        terms = how(output.logits, batch["label"], config.semantic_loss_ignore_index)
        metrics: Metrics = {str(term): value for term, value in terms.items()} if len(terms) > 1 else {}
        return _with_auxiliary(how, how.total(terms), output, batch["label"], config), metrics

    return Criterion(prepare, loss)


def segmentation_loss(
    output: SegmenterOutput,
    labels: Integer[ArrayLike, "b height width"],
    config: BeitConfig,
    *,
    average: Average = "valid",
    how: PixelLoss | None = None,
) -> Float[Array, ""]:
    """The loss of the logits plus ``config.auxiliary_loss_weight`` times that of the auxiliary ones.

    Args:
        labels: class numbers; ``config.semantic_loss_ignore_index`` where a pixel does not count.
        average: of cross entropy over the pixels that count, as transformers does, or over all, as mmseg 0.11 trained
            the models. Of no pixels the average is NaN.
        how: another loss than cross entropy, in place of `average`.

    Raises:
        BeitJaxError: labels of another shape than [b, height, width]; a label that is neither a class nor ignored,
            where the labels are known; in a compiled function the loss is NaN.
    """
    assert output.logits is not None
    how = PixelLoss(average=average) if how is None else how
    loss = how.total(how(output.logits, labels, config.semantic_loss_ignore_index))
    return _with_auxiliary(how, loss, output, labels, config)


def _with_auxiliary(
    how: PixelLoss,
    loss: Float[Array, ""],
    output: SegmenterOutput,
    labels: Integer[ArrayLike, "b height width"],
    config: BeitConfig,
) -> Float[Array, ""]:
    if output.auxiliary_logits is None:
        return loss
    auxiliary = how.total(how(output.auxiliary_logits, labels, config.semantic_loss_ignore_index))
    return loss + config.auxiliary_loss_weight * auxiliary
