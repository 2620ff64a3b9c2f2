"""What differs between the runs of the loop: data, initial parameters, what is learned, evaluation, and the result."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.errors import BeitJaxError
from beit_jax.heads import Model, abstract_model, statistics
from beit_jax.images import ImageProcessor
from beit_jax.segmentation import Inference, segment
from beit_jax.terminal import Advance
from beit_jax.tree import Nested, flatten, unflatten
from beit_jax.weights import NativeCheckpoint

from .accuracy import HostBatch, evaluate_classification
from .augment import train_transform
from .data import Dataset, SegmentationDataset, eval_batches, open_dataset, open_segmentation
from .evaluate import Confusion
from .hosts import gather, on_host
from .initialize import from_checkpoint, initial_params
from .objectives import Objective, classification, segmentation
from .probe import LinearProbe, abstract_probe, evaluate_probe, linear_probe, probe_params
from .recipe import STATISTICS, Recipe
from .segmentation_augment import segmentation_transform
from .state import State, variables

Images = Dataset | SegmentationDataset
Shapes = dict[str, jax.ShapeDtypeStruct]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Start:
    """What a state begins with, as arrays or as shapes.

    Attributes:
        params: what gradients move.
        stats: running statistics; empty for models without.
        beside: what the state keeps as `ema`: an average, or a frozen model; empty for most runs.
    """

    params: Nested
    stats: Nested
    beside: Nested


class Task(Protocol):
    """One kind of run."""

    architecture: ClassVar[Architecture]
    """The head of the model that the configuration speaks of."""

    @staticmethod
    def open(directory: Path, split: str) -> Images:
        """A split of prepared data; raises BeitJaxError for data of another kind."""

    @property
    def transform(self) -> Callable[..., Any]:
        """What the host does to a training image, as the data's `train_batches` calls it."""

    def batch(self, size: int) -> Shapes:
        """Shapes of a training batch."""

    @property
    def graph(self) -> nnx.GraphDef[Any]:
        """What is trained, without its parameters."""

    @property
    def objective(self) -> Objective:
        """What is learned."""

    def shapes(self) -> Start:
        """Shapes of what `first` returns."""

    def first(self, key: Key[Array, ""]) -> Start:
        """The values at the start; traceable unless a checkpoint is read."""

    def scores(
        self, state: State, images: Images, processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        """An evaluation's numbers by name; the first is the one to compare runs by."""

    def results(self, state: State) -> dict[str, Nested]:
        """Directory name to parameters (of `config`) of every model that the run makes; maybe none."""


@dataclass(frozen=True)
class _Whole:
    """All parameters learn, from a random start or from a checkpoint's."""

    recipe: Recipe
    config: BeitConfig
    start: NativeCheckpoint | None

    @property
    def graph(self) -> nnx.GraphDef[Model]:
        return abstract_model(self.config, dtype=jnp.dtype(self.recipe.model.dtype))[0]

    def shapes(self) -> Start:
        params, stats = self._split(abstract_model(self.config)[1])
        return Start(params, stats, params if self._averages else {})

    def first(self, key: Key[Array, ""]) -> Start:
        params, stats = self._split(
            initial_params(self.config, "finetune", key)
            if self.start is None
            else from_checkpoint(self.start, self.config, key)[0]
        )
        copy = np.copy if self.start else jnp.copy
        return Start(params, stats, jax.tree.map(copy, params) if self._averages else {})

    def results(self, state: State) -> dict[str, Nested]:
        models = {"model": state.params} | ({"model-ema": state.ema} if self._averages else {})
        return {name: variables(params, state.stats) for name, params in models.items()}

    def _split(self, tree: Nested) -> tuple[Nested, Nested]:
        """What gradients move, and running statistics."""
        flat, fixed = flatten(tree), statistics(self.config)
        return (
            unflatten({name: leaf for name, leaf in flat.items() if name not in fixed}),
            unflatten({name: leaf for name, leaf in flat.items() if name in fixed}),
        )

    @property
    def _averages(self) -> bool:
        return self.recipe.optim.ema is not None


class _Labelled:
    """Images of one label each."""

    architecture: ClassVar[Architecture] = "image_classification"
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
            data.eval_batch_size or data.batch_size // self.recipe.optim.accumulate,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=data.workers,
        )


@dataclass(frozen=True)
class Classification(_Labelled, _Whole):
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
class Segmentation(_Whole):
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
    start: NativeCheckpoint | None

    def __post_init__(self) -> None:
        if self.start is None:
            raise BeitJaxError("a linear probe needs an encoder: give --init CHECKPOINT")

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

    def first(self, key: Key[Array, ""]) -> Start:
        assert self.start is not None
        heads = jax.tree.map(np.asarray, probe_params(self.config, self.config.num_labels, key))
        return Start(heads, {}, from_checkpoint(self.start, self.config, key)[0])

    def scores(
        self, state: State, images: Images, processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        batches = self._evaluation(images, processor)
        found = evaluate_probe(
            (self.graph, state.params), (self.backbone, state.ema), batches, mesh=mesh, advance=advance
        )
        by_block = {f"accuracy_block_{i}": correct / found.images for i, correct in enumerate(found.correct, start=1)}
        return {"accuracy": found.top1, "best_block": float(found.best), **by_block}

    def results(self, state: State) -> dict[str, Nested]:
        return {}


def task_of(recipe: Recipe) -> type[Classification] | type[Segmentation] | type[Probe]:
    """The kind of a recipe's run."""
    if recipe.objective == "classification":
        return Classification
    return Segmentation if recipe.objective == "segmentation" else Probe
