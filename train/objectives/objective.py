"""The interface of an objective, with what most objectives have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key, UInt8

from beit_jax.adapters.file import AdapterRecord
from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.build import Model, abstract_model, param_shapes, statistics
from beit_jax.models.interface import Remat
from beit_jax.terminal import Advance, Progress, no_progress
from beit_jax.tree import Nested
from beit_jax.weights.native import NativeCheckpoint

from ..adapting import adapter_of, changed_before, published
from ..augmentation.decode import Reading
from ..costs.estimate import activation_bytes, flops, traced_activations, traced_flops, with_one_block
from ..initial.model_config import architecture, image_processor, model_config
from ..initial.parameters import Scheme, checkpoint_report, from_checkpoint, head_change, initial_params
from ..recipe import Recipe
from ..step import freezing
from ..step.adapting import Adapted
from ..step.criterion import Criterion
from ..step.division import EVERYTHING, Division
from ..step.state import Draw, Initial, Parts, State, divided, variables

if TYPE_CHECKING:
    from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
    from beit_jax.tokenizers.configs import TokenizerConfig

    from ..data.datasets import Dataset, SegmentationDataset
    from ..data.stored_tokens import StoredTokens

    Images = Dataset | SegmentationDataset

RecipeT = TypeVar("RecipeT", bound=Recipe, covariant=True)
Shapes = dict[str, jax.ShapeDtypeStruct]
SourceName = Literal["init", "tokenizer", "decoder", "stored_tokens", "teacher"]
"""The options that name what a run reads besides its data."""
IMAGENET = 1_281_167
"""Training images of ImageNet-1k, by which schedules are as long as they are where there is no data."""


@dataclass(frozen=True)
class Sources:
    """Checkpoints and tokens that a run reads besides its data.

    Attributes:
        start: the checkpoint that training starts from; None: parameters are drawn at random.
        tokenizer: computes the tokens that are predicted.
        decoder: turns tokens into pictures to look at.
        teacher: computes the features that a tokenizer learns from.
        tokens: the tokens that are predicted, computed before.
    """

    start: NativeCheckpoint | None = None
    tokenizer: "TokenizerCheckpoint | None" = None
    decoder: "TokenizerCheckpoint | None" = None
    teacher: NativeCheckpoint | None = None
    tokens: "StoredTokens | None" = None

    def begun(self) -> Self:
        """The same without the values of `start`, of which a run has made its first state."""
        return replace(self, start=None if self.start is None else self.start.without_values())


@dataclass(frozen=True)
class Result:
    """A model that a run makes: a native checkpoint of a model, or of a tokenizer."""

    config: "BeitConfig | TokenizerConfig"
    params: Nested


@dataclass(frozen=True)
class Objective(Generic[RecipeT]):
    """An objective: input, loss, second network, evaluation, results and costs of a run.

    A subclass implements what raises `NotImplementedError` here. `WholeModel` does so for a model of this library that
    learns as a whole, `labelled.LabelledImages` and `unlabelled.UnlabelledImages` do so for two kinds of input.

    Attributes:
        config: the model of the run; for a tokenizer that is trained, the images and patches it is for.
        steps: optimizer steps of the run.
    """

    recipe: RecipeT
    config: BeitConfig
    sources: Sources
    steps: int

    reads: ClassVar[frozenset[SourceName]] = frozenset()
    """The sources that the objective reads. Other options that name a source are refused."""
    needs_validation: ClassVar[bool] = True
    """True if the data must have a validation split."""
    evaluation: ClassVar[Literal["batches", "whole batches", "single images"]] = "batches"
    """How images are evaluated: in batches of which the last may be smaller, in whole ones, or one by one."""
    epoch_images: ClassVar[int] = IMAGENET
    """Training images of the data set that the published recipes are for."""

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        """The configuration of the run's model.

        Raises:
            BeitJaxError: sources that are missing, or do not fit the recipe.
        """
        raise NotImplementedError

    @classmethod
    def abstract_sources(cls, recipe: Recipe, labels: tuple[str, ...]) -> Sources:
        """The sources of the recipe without values, for a program that is compiled but not run."""
        return Sources()

    @staticmethod
    def processor(recipe: Recipe, config: BeitConfig) -> ImageProcessor:
        """How images are prepared for evaluation and use."""
        return image_processor(recipe, config)

    @property
    def image_processor(self) -> ImageProcessor:
        """How the run's images are prepared for evaluation and use, with what its data say of it."""
        return self.processor(self.recipe, self.config)

    @staticmethod
    def open(directory: Path, split: str) -> "Images":
        """A split of prepared data.

        Raises:
            BeitJaxError: data of another kind.
        """
        raise NotImplementedError

    def with_stored_tokens(self, directory: Path, images: "Images") -> Self:
        """This objective with tokens that were computed before; for an objective that reads ``stored_tokens``.

        Raises:
            BeitJaxError: the tokens are not those of this run.
        """
        raise NotImplementedError

    def store_tokens(
        self, images: "Images", directory: Path, progress: Progress = no_progress, *, overwrite: bool = False
    ) -> int:
        """Computes the tokens of all images of the run, as its steps would, and writes them.

        Returns:
            The number of these images.

        Raises:
            BeitJaxError: the objective predicts no tokens; a run of several hosts; as `stored_tokens.write_tokens`.
        """
        raise BeitJaxError(f"{self.recipe.name}: {self.recipe.objective} predicts no tokens; choose another recipe")

    @property
    def network(self) -> Mapping[str, Any]:
        """The configuration of what is trained, for people: its fields by name, without the names of classes."""
        return architecture(self.config)

    def fitted(self, images: "Images") -> Self:
        """This objective with what follows from its training images: what they say, how often, how much.

        Raises:
            BeitJaxError: the images are not what the recipe asks for.
        """
        return self

    @property
    def notes(self) -> list[str]:
        """Lines for people about what the run begins with."""
        return []

    def replaced(self, **changes: Any) -> Self:
        """This objective with other fields."""
        return replace(self, **changes)

    # --- Input

    @property
    def reading(self) -> Reading:
        """How images are decoded."""
        return Reading.of(self.recipe.data, self.config.num_channels)

    def pixels(self, size: int, sides: tuple[int, int] | None = None) -> jax.ShapeDtypeStruct:
        """The shape of so many training images.

        Args:
            sides: height and width; by default the model's.
        """
        shape = (size, *(sides or self.config.image_size), self.config.num_channels)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.reading.dtype))

    @property
    def transform(self) -> Callable[..., Any]:
        """The host's augmentation of a training image, as the data's `train_batches` calls it."""
        raise NotImplementedError

    def batch(self, size: int) -> Shapes:
        """Shapes of a training batch."""
        raise NotImplementedError

    def extend(self, batch: dict[str, np.ndarray], positions: np.ndarray) -> dict[str, np.ndarray]:
        """A host's part of a batch, with what is stored for it.

        Args:
            positions: [b] int, of every image among all that the run sees.
        """
        return batch

    # --- What is learned

    @property
    def graph(self) -> nnx.GraphDef[Any]:
        """The trained network without its parameters."""
        raise NotImplementedError

    @property
    def criterion(self) -> Criterion:
        """The loss."""
        raise NotImplementedError

    @property
    def division(self) -> Division:
        """What of the trained network learns; by default all of it.

        States that `scores`, `pictures` and `results` are given are whole: `step.state.whole` has joined them.
        """
        return EVERYTHING

    def shapes(self) -> Parts:
        """Shapes of what `initial` returns."""
        raise NotImplementedError

    def divided_shapes(self) -> tuple[Nested, Nested]:
        """Shapes of what learns and of what is fixed, by `division`."""
        learned, fixed = jax.eval_shape(self.division.divide, self.shapes().params, jax.random.key(0))
        return learned, fixed

    def initial(self, key: Key[Array, ""]) -> Initial:
        """The values at the start."""
        raise NotImplementedError

    # --- What comes out

    def scores(
        self, state: State, images: "Images", processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        """An evaluation's numbers by name; the first is the one to compare runs by. Empty: nothing can be evaluated."""
        return {}

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of `scores`, in their order, known before there are any."""
        return ()

    def pictures(self, state: State, images: "Images") -> dict[str, UInt8[np.ndarray, "h w 3"]]:
        """Pictures for people to look at during training, by name."""
        return {}

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """A line for everything that is wrong with these means of a training log's metrics."""
        return []

    def results(self, state: State) -> dict[str, Result]:
        """Directory name to every model that the run makes."""
        return {}

    def adapters(self, state: State) -> dict[str, AdapterRecord]:
        """For every result that is the merger of an adapter, what it was merged of.

        Args:
            state: as steps leave it, not joined.
        """
        return {}

    # --- What it costs

    @property
    def flops(self) -> float:
        """Floating point operations of a training step, for one image; what the run computes twice counts once."""
        raise NotImplementedError

    @property
    def activations(self) -> int:
        """Bytes that a training step keeps for one image, from the forward to the backward pass."""
        raise NotImplementedError


@dataclass(frozen=True)
class WholeModel(Objective[RecipeT]):
    """All parameters of a model learn, from a random start or from a checkpoint's."""

    reads = frozenset({"init"})
    architecture: ClassVar[Architecture] = "image_classification"
    """The head of the model."""

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        start = None if sources.start is None else sources.start.config
        return model_config(recipe, labels, start, task=cls.architecture)

    @property
    def division(self) -> Division:
        adapter = adapter_of(self.recipe)
        return freezing.division(self.recipe.optim.freeze, self.config) if adapter is None else Adapted(adapter)

    @property
    def graph(self) -> nnx.GraphDef[Model]:
        dtype, residual = (jnp.dtype(name) for name in (self.recipe.model.dtype, self.recipe.model.residual))
        return abstract_model(self.config, dtype=dtype, residual=residual, fixed_blocks=self.division.fixed_blocks)[0]

    @property
    def notes(self) -> list[str]:
        """What of the checkpoint is taken over in another form, left out, or starts new."""
        start = self.sources.start
        if start is None:
            return []
        report = checkpoint_report(start, self.config)
        reason = head_change(start.config, self.config)
        return [f"--init: {line}" for line in (*report.lines(), *([reason] if reason else []))]

    def shapes(self) -> Parts:
        params, stats = self._split(abstract_model(self.config)[1])
        return Parts(params, stats, {})

    def initial(self, key: Key[Array, ""]) -> Initial:
        if self.sources.start is not None:
            params, stats = self._split(from_checkpoint(self.sources.start, self.config, key)[0])
            return Initial(params, stats, {})
        scheme: Scheme = "pretrain" if self.config.task == "masked_image_modeling" else "finetune"

        def part(index: int) -> Draw:
            return lambda: self._split(initial_params(self.config, scheme, key))[index]

        return Initial(part(0), part(1), {})

    def results(self, state: State) -> dict[str, Result]:
        models = {"model": state.params} | ({"model-ema": state.average} if state.average else {})
        return {name: Result(self.config, variables(params, state.stats)) for name, params in models.items()}

    def adapters(self, state: State) -> dict[str, AdapterRecord]:
        division, start = self.division, self.sources.start
        if not isinstance(division, Adapted) or start is None:
            return {}
        report = checkpoint_report(start, self.config)
        asked = [*start.provenance.get("options", ()), *(["channels_from"] if self.recipe.model.channels_from else ())]
        changed = changed_before(asked, param_shapes(self.config))
        new = (*report.adapted, *report.drawn, *statistics(self.config), *changed)
        learned = {"model": state.params} | ({"model-ema": state.average} if state.average else {})
        return {name: division.record(params, new, published(start.provenance)) for name, params in learned.items()}

    @property
    def flops(self) -> float:
        learned, fixed = self.divided_shapes()
        return traced_flops(partial(self._forward, "none"), learned) if fixed else flops(self.config).training()

    @property
    def activations(self) -> int:
        model, (learned, fixed) = self.recipe.model, self.divided_shapes()
        if not fixed:
            dtype, residual = jnp.dtype(model.dtype), jnp.dtype(model.residual)
            return activation_bytes(self.config, dtype=dtype, residual=residual, remat=model.remat)
        whole = traced_activations(partial(self._forward, "none"), learned)
        if model.remat == "none":
            return whole
        kept = traced_activations(partial(self._forward, model.remat), learned)
        return with_one_block(kept, whole, len(self.division.blocks(self.config.num_hidden_layers)))

    def _forward(self, remat: Remat, images: int, learned: Nested) -> Array:
        """The sum of all logits of so many images, for tracing what the gradient of a part of the model costs."""
        stats, fixed = (jax.tree.map(zeros, tree) for tree in (self.shapes().stats, self.divided_shapes()[1]))
        model: Any = nnx.merge(self.graph, variables(self.division.trained(learned, fixed, jax.random.key(0)), stats))
        pixels = jnp.zeros((images, *self.config.image_size, self.config.num_channels))
        output = model(pixels, key=jax.random.key(0), remat=remat, **({"train": True} if stats else {}))
        return sum(
            logits.sum() for logits in (output.logits, getattr(output, "auxiliary_logits", None)) if logits is not None
        )

    def _split(self, tree: Nested) -> tuple[Nested, Nested]:
        return divided(tree, statistics(self.config))


def zeros(shape: jax.ShapeDtypeStruct) -> Array:
    """An array of zeros, for tracing."""
    return jnp.zeros(shape.shape, shape.dtype)
