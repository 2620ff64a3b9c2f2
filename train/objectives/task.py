"""What differs between the runs of the loop: data, initial parameters, what is learned, evaluation, and the result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key, UInt8

from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.build import Model, abstract_model, statistics
from beit_jax.terminal import Advance
from beit_jax.tokenizers.tokenizer import TokenizerCheckpoint, TokenizerConfig
from beit_jax.tree import Nested
from beit_jax.weights.native import NativeCheckpoint

from ..costs.estimate import activation_bytes, flops
from ..data.batches import Dataset, SegmentationDataset
from ..data.stored_tokens import StoredTokens
from ..recipe import Recipe
from ..step.objective import Objective
from ..step.state import State, divided, variables
from .initialize import Scheme, from_checkpoint, initial_params
from .model_config import model_config

Images = Dataset | SegmentationDataset
Shapes = dict[str, jax.ShapeDtypeStruct]
Draw = Callable[[], Nested]
"""Draws parameters; traceable."""


@dataclass(frozen=True)
class Sources:
    """What a run reads besides its data.

    Attributes:
        start: the checkpoint that training starts from; None: parameters are drawn at random.
        tokenizer: gives the tokens that are predicted.
        decoder: turns tokens into pictures to look at.
        teacher: gives the features that a tokenizer learns from.
        tokens: the tokens that are predicted, computed before.
    """

    start: NativeCheckpoint | None = None
    tokenizer: TokenizerCheckpoint | None = None
    decoder: TokenizerCheckpoint | None = None
    teacher: NativeCheckpoint | None = None
    tokens: StoredTokens | None = None


@dataclass(frozen=True)
class Begin:
    """The values that a state begins with: arrays of the host, or how they are drawn on the devices."""

    params: Nested | Draw
    stats: Nested | Draw
    beside: Nested | Draw


@dataclass(frozen=True)
class Result:
    """A model that a run makes: a native checkpoint of a model, or of a tokenizer."""

    config: BeitConfig | TokenizerConfig
    params: Nested


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

    @staticmethod
    def configure(recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        """The model of the run; raises BeitJaxError for sources that are missing or do not fit."""

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

    def first(self, key: Key[Array, ""]) -> Begin:
        """The values at the start."""

    def scores(
        self, state: State, images: Images, processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        """An evaluation's numbers by name; the first is the one to compare runs by. Empty: nothing can be evaluated."""

    def pictures(self, state: State, images: Images) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
        """What people look at while it trains, by name; maybe none."""

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """What is wrong with these means of a training log's metrics; mostly nothing."""

    def results(self, state: State) -> dict[str, Result]:
        """Directory name to every model that the run makes; maybe none."""

    @property
    def flops(self) -> float:
        """Floating point operations of a training step, for one image, whatever the run computes twice."""

    @property
    def activations(self) -> int:
        """Bytes that a training step keeps for one image, from the forward to the backward pass."""


class Quiet:
    """A task that shows nothing on the way and never complains."""

    def pictures(self, state: State, images: Images) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
        return {}

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        return []


@dataclass(frozen=True)
class Whole:
    """All parameters of a model learn, from a random start or from a checkpoint's."""

    recipe: Recipe
    config: BeitConfig
    sources: Sources
    steps: int

    architecture: ClassVar[Architecture] = "image_classification"
    """The head of the model."""

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        start = None if sources.start is None else sources.start.config
        return model_config(recipe.model, labels, start, task=cls.architecture)

    @property
    def graph(self) -> nnx.GraphDef[Model]:
        return abstract_model(self.config, dtype=jnp.dtype(self.recipe.model.dtype))[0]

    def shapes(self) -> Start:
        params, stats = self._split(abstract_model(self.config)[1])
        return Start(params, stats, params if self._averages else {})

    def first(self, key: Key[Array, ""]) -> Begin:
        if self.sources.start is not None:
            params, stats = self._split(from_checkpoint(self.sources.start, self.config, key)[0])
            return Begin(params, stats, params if self._averages else {})
        scheme: Scheme = "pretrain" if self.config.task == "masked_image_modeling" else "finetune"

        def part(index: int) -> Draw:
            return lambda: self._split(initial_params(self.config, scheme, key))[index]

        return Begin(part(0), part(1), part(0) if self._averages else {})

    def results(self, state: State) -> dict[str, Result]:
        models = {"model": state.params} | ({"model-ema": state.ema} if self._averages else {})
        return {name: Result(self.config, variables(params, state.stats)) for name, params in models.items()}

    @property
    def flops(self) -> float:
        return flops(self.config).training()

    @property
    def activations(self) -> int:
        model = self.recipe.model
        return activation_bytes(self.config, dtype=jnp.dtype(model.dtype), remat=model.remat)

    def _split(self, tree: Nested) -> tuple[Nested, Nested]:
        return divided(tree, statistics(self.config))

    @property
    def _averages(self) -> bool:
        return self.recipe.optim.ema is not None
