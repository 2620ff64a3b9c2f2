"""Runs that learn from labels: classification, segmentation, and linear probes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.segmentation import Inference, segment
from beit_jax.models.build import Model, abstract_model
from beit_jax.terminal import Advance
from beit_jax.tree import Nested

from ..augmentation.augment import train_transform
from ..augmentation.segmentation import segmentation_transform
from ..costs.estimate import flops
from ..data.batches import Dataset, SegmentationDataset, eval_batches, open_dataset, open_segmentation
from ..distributed.collectives import gather, on_host
from ..evaluation.accuracy import HostBatch, evaluate_classification
from ..evaluation.probe import LinearProbe, abstract_probe, evaluate_probe, linear_probe, probe_params
from ..evaluation.segmentation import Confusion
from ..recipe import STATISTICS, Recipe
from ..step.objective import Objective, classification, segmentation
from ..step.state import State, variables
from .initialize import from_checkpoint
from .model_config import model_config
from .task import Begin, Images, Quiet, Result, Shapes, Sources, Start, Whole


class _Labelled(Quiet):
    """Images of one label each."""

    recipe: Recipe
    config: BeitConfig

    @staticmethod
    def open(directory: Path, split: str) -> Images:
        return open_dataset(directory, split)

    @property
    def transform(self) -> Callable[..., Any]:
        mean, _ = STATISTICS[self.recipe.data.statistics]
        return train_transform(self.recipe.augment, self.config.image_size, mean)

    def batch(self, size: int) -> Shapes:
        return {
            "image": jax.ShapeDtypeStruct((size, *self.config.image_size, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        }

    def _evaluation(self, images: Images, processor: ImageProcessor) -> Iterator[HostBatch]:
        """This host's share of the images to evaluate."""
        assert isinstance(images, Dataset)
        data = self.recipe.data
        return eval_batches(
            images,
            processor,
            self.recipe.eval_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=data.workers,
        )


@dataclass(frozen=True)
class Classification(_Labelled, Whole):
    """One label for an image."""

    @property
    def objective(self) -> Objective:
        return classification(self.recipe, self.config)

    def scores(
        self, state: State, images: Images, processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        batches = self._evaluation(images, processor)
        found = evaluate_classification(
            (self.graph, state.params), batches, self.config.labels, mesh=mesh, advance=advance
        )
        return {"accuracy": found.top1, "accuracy_top5": found.top5}


@dataclass(frozen=True)
class Segmentation(Quiet, Whole):
    """One label for every pixel."""

    architecture: ClassVar[Architecture] = "semantic_segmentation"

    @staticmethod
    def open(directory: Path, split: str) -> Images:
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
    def objective(self) -> Objective:
        return segmentation(self.recipe, self.config)

    def scores(
        self, state: State, images: Images, processor: ImageProcessor, mesh: Mesh, advance: Advance
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


@dataclass(frozen=True)
class Probe(_Labelled):
    """Linear heads on every block of a checkpoint's encoder, which the state keeps beside them and nothing moves.

    Raises:
        BeitJaxError: there is no checkpoint.
    """

    recipe: Recipe
    config: BeitConfig
    sources: Sources
    steps: int

    @staticmethod
    def configure(recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        if sources.start is None:
            raise BeitJaxError("a linear probe needs an encoder: give --init CHECKPOINT")
        return model_config(recipe.model, labels, sources.start.config)

    @property
    def graph(self) -> nnx.GraphDef[LinearProbe]:
        return abstract_probe(self.config, self.config.num_labels)[0]

    @property
    def backbone(self) -> nnx.GraphDef[Model]:
        return abstract_model(self.config, dtype=jnp.dtype(self.recipe.model.dtype))[0]

    @property
    def objective(self) -> Objective:
        return linear_probe(self.recipe, self.backbone)

    def shapes(self) -> Start:
        return Start(abstract_probe(self.config, self.config.num_labels)[1], {}, abstract_model(self.config)[1])

    def first(self, key: Key[Array, ""]) -> Begin:
        assert self.sources.start is not None
        heads = partial(probe_params, self.config, self.config.num_labels, key)
        return Begin(heads, {}, from_checkpoint(self.sources.start, self.config, key)[0])

    def scores(
        self, state: State, images: Images, processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        batches = self._evaluation(images, processor)
        found = evaluate_probe(
            (self.graph, state.params), (self.backbone, state.ema), batches, mesh=mesh, advance=advance
        )
        by_block = {f"accuracy_block_{i}": correct / found.images for i, correct in enumerate(found.correct, start=1)}
        return {"accuracy": found.top1, "best_block": float(found.best), **by_block}

    def results(self, state: State) -> dict[str, Result]:
        return {}

    @property
    def flops(self) -> float:
        return flops(self.config).forward  # nothing passes back through the encoder

    @property
    def activations(self) -> int:
        return 4 * self.config.num_hidden_layers * 2 * self.config.hidden_size  # the features of every block
