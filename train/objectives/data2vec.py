"""data2vec for images: the model predicts the features that its moving average computes of patches it cannot see."""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.errors import BeitJaxError
from beit_jax.models.masked_image_modeling import BeitForMaskedImageModeling
from beit_jax.tree import Nested, flatten, unflatten

from ..augmentation.masking import BlockMask
from ..augmentation.mixing import normalise
from ..recipe import COUNT, NOT_NEGATIVE, Recipe, require
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import State
from .hidden_patches import deviation, hidden_patches, weighted_mean
from .objective import Result, Sources, WholeModel
from .unlabelled import MaskedImages, MaskedRecipe

TARGET_EPSILON = 1e-5  # of the norms on a teacher's features: torch's default, not the model's


@dataclass(frozen=True)
class Data2vecOptions:
    """Pre-training on a teacher's features. Source: facebookresearch/data2vec_vision beit/engine_for_cyclical.py."""

    target_layers: Annotated[int, COUNT] = 6
    """Last blocks of the teacher whose outputs, normalised, are averaged."""
    normalise_mean: bool = True
    """Normalise the average once more, as every published run does."""
    beta: Annotated[float, NOT_NEGATIVE] = 2.0
    """Where the loss turns from quadratic to linear."""


@dataclass(frozen=True)
class Data2vecRecipe(MaskedRecipe):
    """A run that pre-trains a model on the features of its moving average."""

    objective: ClassVar[str] = "data2vec"
    data2vec: Data2vecOptions = field(default_factory=Data2vecOptions)

    def check(self) -> None:
        super().check()
        require(self.optim.ema is not None, "optim.ema", "a decay, data2vec's teacher is the moving average", None)


@dataclass(frozen=True)
class Data2vec(MaskedImages[Data2vecRecipe], WholeModel[Data2vecRecipe]):
    """The model predicts the features of hidden patches. Its moving average, which sees the patches, computes them."""

    architecture: ClassVar[Architecture] = "masked_image_modeling"

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        assert isinstance(recipe, Data2vecRecipe)
        config = super().configure(recipe, labels, sources)
        if recipe.data2vec.target_layers > config.num_hidden_layers:
            raise BeitJaxError(
                f"--data2vec.target-layers: expected at most the {config.num_hidden_layers} blocks, "
                f"found {recipe.data2vec.target_layers}"
            )
        BlockMask(config.grid, recipe.mask)  # refuses what cannot be hidden before a run begins
        return replace(config, vocab_size=config.hidden_size)  # the head maps features to features

    @property
    def criterion(self) -> Criterion:
        return data2vec(self.recipe, cast("nnx.GraphDef[BeitForMaskedImageModeling]", self.graph))

    def results(self, state: State) -> dict[str, Result]:
        """Student and teacher as the released models are, encoders with their final norm; and the whole student, which
        a second stage goes on from."""
        config = replace(
            self.config,
            task="features",
            pooling="cls",
            use_mask_token=True,
            add_pooling_layer=self.config.model_type == "beit",
        )

        def encoder(params: Nested) -> Nested:
            flat = flatten(params)
            kept = {name: leaf for name, leaf in flat.items() if not name.startswith("lm_head/")}
            return unflatten({name.removeprefix("beit/"): leaf for name, leaf in kept.items()})

        return {
            "model": Result(config, encoder(state.params)),
            "model-ema": Result(config, encoder(state.average)),
            "student": Result(self.config, state.params),
        }


def data2vec(recipe: Data2vecRecipe, graph: nnx.GraphDef[BeitForMaskedImageModeling]) -> Criterion:
    """Smooth L1 between the model's predictions of hidden patches and the teacher's features of them.

    The teacher is the moving average of the model, and sees all patches. The model is one for masked image modelling
    whose head maps features to features.

    Args:
        graph: the model without its parameters.

    Source: facebookresearch/data2vec_vision@af9a363 beit/engine_for_cyclical.py, described in arXiv 2202.03555
    section 3. The teacher there computes in float32. The teacher here computes products in `model.dtype`, with the same
    float32 residual stream and norms.
    """

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        image = normalise(batch["image"], recipe.data)
        return {"image": image} | hidden_patches(batch["mask"], recipe.mask.patches)

    def loss(
        model: BeitForMaskedImageModeling, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        targets = feature_targets(nnx.merge(graph, teacher), batch["image"], recipe.data2vec)
        targets = jnp.take_along_axis(targets, batch["positions"][..., None], axis=1)
        predictions = model(
            batch["image"], batch["mask"], predicted=batch["positions"], key=key, remat=recipe.model.remat
        ).logits
        assert predictions is not None
        weights = batch["weights"]
        distances = smooth_l1(predictions.astype(jnp.float32) - targets, recipe.data2vec.beta).mean(axis=-1)
        return weighted_mean(distances, weights), {
            "target_deviation": deviation(targets, weights),
            "prediction_deviation": deviation(predictions, weights),
        }

    return Criterion(prepare, loss)


def feature_targets(
    teacher: BeitForMaskedImageModeling, images: Float[Array, "b h w c"], options: Data2vecOptions
) -> Float[Array, "b patches d"]:
    """The mean of the last blocks' outputs for every patch, each normalised, and normalised again; no gradient."""
    depth = teacher.config.num_hidden_layers
    states = teacher.beit(images, taps=tuple(range(depth - options.target_layers + 1, depth + 1))).taps
    assert states is not None
    mean = standardised(states[:, :, 1:].astype(jnp.float32)).mean(axis=0)
    return jax.lax.stop_gradient(standardised(mean) if options.normalise_mean else mean)


def standardised(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """LayerNorm without parameters."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + TARGET_EPSILON)


def smooth_l1(difference: Float[Array, "*b"], beta: float) -> Float[Array, "*b"]:
    """``0.5 d**2 / beta`` where ``|d| < beta``, ``|d| - 0.5 beta`` elsewhere; ``|d|`` where beta is 0."""
    size = jnp.abs(difference)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 * jnp.square(difference) / beta, size - 0.5 * beta)
