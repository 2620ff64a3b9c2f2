"""Linear probe: a linear classifier on every block of a frozen encoder, all trained at once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Key

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.build import Model, abstract_model
from beit_jax.models.interface import abstract_module
from beit_jax.terminal import Advance
from beit_jax.tree import Nested
from beit_jax.weights.native import NativeCheckpoint

from ..augmentation.labels import ArrayLike, class_numbers, cross_entropy
from ..augmentation.mixing import normalise
from ..costs.estimate import flops
from ..data.datasets import open_dataset
from ..distributed.sharding import make_mesh, replicated
from ..initial.model_config import model_config
from ..initial.parameters import from_checkpoint
from ..recipe import Recipe, Statistics, require
from ..step.state import Initial, Parts, State
from .labelled import LabelledImages, LabelledRecipe
from .objective import Sources

if TYPE_CHECKING:
    from .objective import Images

from ..evaluation.accuracy import best_classes, to_send
from ..evaluation.mean_loss import VALIDATION_LOSS, MeanLoss
from ..evaluation.shares import share
from ..evaluation.stepping import EvalStep, HostBatch, stream
from ..step.criterion import Batch, Criterion, Metrics


@dataclass(frozen=True)
class LinearProbeRecipe(LabelledRecipe):
    """A run that trains linear classifiers on the features of a checkpoint's encoder."""

    objective: ClassVar[str] = "linear_probe"

    def check(self) -> None:
        super().check()
        self.check_without_average()
        self.check_without_freezing()
        best, patience = self.run.best, self.run.patience
        require(best is None or patience is not None, "run.best", "none without --run.patience, no model is kept", best)

    def for_tpus(self) -> "LinearProbeRecipe":
        """No gradient goes through blocks, so that nothing is gained by computing them again."""
        recipe = super().for_tpus()
        return replace(recipe, model=replace(recipe.model, remat="none"))


@dataclass(frozen=True)
class Probe(LabelledImages[LinearProbeRecipe]):
    """Linear heads learn on every block of a checkpoint's encoder. The encoder is the state's frozen network.

    Raises:
        BeitJaxError: there is no checkpoint.
    """

    reads = frozenset({"init"})

    @staticmethod
    def open(directory: Path, split: str) -> "Images":
        images = open_dataset(directory, split)
        if images.target.problem_type != "single_label_classification":
            raise BeitJaxError(
                f"{printable(directory)}: a linear probe learns one class of each image, found {images.target.kind}; "
                "fine-tune with the recipe finetune"
            )
        return images

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        if sources.start is None:
            raise BeitJaxError("a linear probe needs an encoder: give --init CHECKPOINT")
        return model_config(recipe, labels, sources.start.config)

    @classmethod
    def abstract_sources(cls, recipe: Recipe, labels: tuple[str, ...]) -> Sources:
        """An encoder of the recipe's own size."""
        config = model_config(recipe, labels)
        return Sources(start=NativeCheckpoint(config, cls.processor(recipe, config), {}))

    @property
    def graph(self) -> "nnx.GraphDef[LinearProbe]":
        return abstract_probe(self.config, self.config.num_labels)[0]

    @property
    def backbone(self) -> nnx.GraphDef[Model]:
        dtype, residual = (jnp.dtype(name) for name in (self.recipe.model.dtype, self.recipe.model.residual))
        return abstract_model(self.config, dtype=dtype, residual=residual)[0]

    @property
    def criterion(self) -> Criterion:
        return linear_probe(self.recipe, self.backbone)

    def shapes(self) -> Parts:
        return Parts(abstract_probe(self.config, self.config.num_labels)[1], {}, abstract_model(self.config)[1])

    def initial(self, key: Key[Array, ""]) -> Initial:
        assert self.sources.start is not None
        heads = partial(probe_params, self.config, self.config.num_labels, key)
        return Initial(heads, {}, from_checkpoint(self.sources.start, self.config, key)[0])

    def scores(
        self, state: State, images: "Images", processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        batches = self.evaluation_batches(images, processor)
        found = evaluate_probe(
            (self.graph, state.params), (self.backbone, state.frozen), batches, mesh=mesh, advance=advance
        )
        shares = [correct / found.images for correct in found.correct]
        values = (found.top1, float(found.best), *shares, found.loss)
        return dict(zip(self.score_names, values, strict=True))

    @property
    def score_names(self) -> tuple[str, ...]:
        blocks = range(1, self.config.num_hidden_layers + 1)
        return ("accuracy", "best_block", *(f"accuracy_block_{block}" for block in blocks), VALIDATION_LOSS)

    @property
    def flops(self) -> float:
        return flops(self.config).forward  # nothing passes back through the encoder

    @property
    def activations(self) -> int:
        return 4 * self.config.num_hidden_layers * 2 * self.config.hidden_size  # the features of every block


class Heads(nnx.Module):
    """Linear classifiers, one for each layer: ``kernel`` [layers, 2 d, classes] and ``bias`` [layers, classes]."""

    def __init__(self, layers: int, features: int, classes: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.01 * jax.random.normal(rngs.params(), (layers, features, classes)))
        self.bias = nnx.Param(jnp.zeros((layers, classes)))

    def __call__(self, features: Float[Array, "layers b features"]) -> Float[Array, "layers b classes"]:
        return jnp.einsum("lbf,lfc->lbc", features, self.kernel[...]) + self.bias[...][:, None]


class LinearProbe(nnx.Module):
    """The model that a probe trains: heads on all blocks of an encoder, without the encoder.

    Source: microsoft/unilm@006195f beit/run_linear_eval.py.
    """

    def __init__(self, config: BeitConfig, classes: int, *, rngs: nnx.Rngs):
        self.heads = Heads(config.num_hidden_layers, 2 * config.hidden_size, classes, rngs=rngs)


def abstract_probe(config: BeitConfig, classes: int) -> tuple[nnx.GraphDef[LinearProbe], Nested]:
    """The graph of a `LinearProbe` and the shapes of its parameters, nested."""
    return abstract_module(lambda: LinearProbe(config, classes, rngs=nnx.Rngs(0)))


def probe_params(config: BeitConfig, classes: int, key: Key[Array, ""]) -> Nested:
    """Initial heads: kernels of standard deviation 0.01, biases zero."""
    return nnx.to_pure_dict(nnx.state(LinearProbe(config, classes, rngs=nnx.Rngs(key))))


def token_features(hidden_states: Float[Array, "layers b n d"]) -> Float[Array, "layers b features"]:
    """The class token and the mean of the patch tokens, one after the other, float32."""
    tokens = hidden_states.astype(jnp.float32)
    return jnp.concatenate([tokens[:, :, 0], tokens[:, :, 1:].mean(axis=2)], axis=-1)


def block_features(backbone: Model, pixel_values: Float[Array, "b h w c"]) -> Float[Array, "depth b features"]:
    """`token_features` of what every block gives, not normalised. Nothing is dropped, and no gradient passes."""
    hidden_states = backbone(pixel_values, output_hidden_states=True).hidden_states
    assert hidden_states is not None
    return jax.lax.stop_gradient(token_features(hidden_states[1:]))


def linear_probe(recipe: LinearProbeRecipe, backbone: nnx.GraphDef[Model]) -> Criterion:
    """The sum over all blocks of the cross entropy: ``image`` uint8 [b, h, w, 3] and ``label`` int32 [b].

    The model is a `LinearProbe`. The backbone is the state's frozen network, so it is placed, donated and saved with
    the state.
    """

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        return {"image": normalise(batch["image"], recipe.data), "label": batch["label"]}

    def loss(
        model: Any, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        assert teacher is not None  # the backbone
        logits = model.heads(block_features(nnx.merge(backbone, teacher), batch["image"]))
        correct = logits.argmax(axis=-1) == batch["label"]
        return summed_cross_entropy(logits, batch["label"]), {"accuracy": correct.mean(axis=1).max()}

    return Criterion(prepare, loss)


def summed_cross_entropy(
    logits: Float[Array, "layers b classes"], labels: Integer[ArrayLike, " b"]
) -> Float[Array, ""]:
    """The mean over the batch, the sum over layers.

    Raises:
        BeitJaxError: a label that is no class, where the labels are known; in a compiled function the loss is NaN.
    """
    labels = class_numbers(labels, logits.shape[-1], logits.shape[1:-1])
    return cross_entropy(logits, jnp.broadcast_to(labels, logits.shape[:-1])).mean(axis=1).sum()


@dataclass(frozen=True)
class ProbeScores:
    """Scores of the head of every block.

    Attributes:
        images: how many were classified.
        correct, correct5: of each block's head, the images whose class is its best, and among its five best.
        loss: the mean over images of the sum over heads of the cross entropy.
    """

    images: int
    correct: tuple[int, ...]
    correct5: tuple[int, ...]
    loss: float = float("nan")

    @property
    def best(self) -> int:
        """The block whose head finds most, counted from 1; of equal ones the first."""
        return 1 + int(np.argmax(self.correct))

    @property
    def top1(self) -> float:
        """Top-1 accuracy of the best block."""
        return share(self.correct[self.best - 1], self.images)

    def as_dict(self) -> dict[str, Any]:
        """For programs: shares, null without images."""
        blocks = [
            {"block": block, "top1": share(one, self.images), "top5": share(five, self.images)}
            for block, (one, five) in enumerate(zip(self.correct, self.correct5, strict=True), start=1)
        ]
        if not self.images:
            return {"images": 0, "top1": None, "best_block": None, "blocks": []}
        return {"images": self.images, "top1": self.top1, "best_block": self.best, "blocks": blocks}


def describe(scores: ProbeScores) -> list[str]:
    """The scores as lines for people, a bar for every block."""
    shares = [share(correct, scores.images) for correct in scores.correct]
    lines = [
        f"block {block:2d}  {100 * found:6.2f} %  {'#' * round(40 * found) if scores.images else ''}"
        for block, found in enumerate(shares, start=1)
    ]
    return [*lines, f"best: block {scores.best}, {100 * scores.top1:.2f} % of {scores.images:,} images"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProbeCounts:
    """Counts of one batch, int32; and, float32, the sum over heads of the cross entropy, and 1, or 0 for padding, of
    every row."""

    images: Int[Array, ""]
    correct: Int[Array, " layers"]
    correct5: Int[Array, " layers"]
    losses: tuple[Float[Array, " b"], Float[Array, " b"]]


@lru_cache(maxsize=8)
def make_probe_step(
    probe: nnx.GraphDef[LinearProbe],
    backbone: nnx.GraphDef[Model],
    statistics: Statistics | None = None,
    mesh: Mesh | None = None,
) -> EvalStep:
    """The compiled step of an evaluation: from (heads, backbone) parameters and a batch to `ProbeCounts`.

    Batches, `statistics` and `mesh` as in `accuracy.make_eval_step`.
    """

    def step(params: tuple[Nested, Nested], batch: Mapping[str, Array]) -> ProbeCounts:
        images = batch["image"] if statistics is None else normalise(batch["image"], statistics)
        features = block_features(nnx.merge(backbone, params[1]), images)
        logits = nnx.merge(probe, params[0]).heads(features)
        best = best_classes(logits)
        valid = batch["valid"].astype(jnp.float32)
        entropies = cross_entropy(logits, jnp.broadcast_to(batch["label"], logits.shape[:-1])).sum(axis=0)
        hits = (best == batch["label"][None, :, None]) & batch["valid"][None, :, None]
        return ProbeCounts(
            images=batch["valid"].sum(dtype=jnp.int32),
            correct=hits[..., 0].sum(axis=1, dtype=jnp.int32),
            correct5=hits.any(axis=-1).sum(axis=1, dtype=jnp.int32),
            losses=(entropies * valid, valid),
        )

    return jax.jit(step, out_shardings=None if mesh is None else replicated(mesh))


def evaluate_probe(
    probe: tuple[nnx.GraphDef[LinearProbe], Nested],
    backbone: tuple[nnx.GraphDef[Model], Nested],
    batches: Iterable[HostBatch],
    *,
    statistics: Statistics | None = None,
    mesh: Mesh | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> ProbeScores:
    """Scores of every block's head over batches, exact as `accuracy.evaluate_classification` is.

    Args:
        probe, backbone: graphs and parameters, which stay where they are.

    Raises:
        BeitJaxError: a label that is no class of the heads.
    """
    mesh = make_mesh((-1, 1, 1)) if mesh is None else mesh
    step = make_probe_step(probe[0], backbone[0], statistics, mesh)
    sent = (to_send(batch, probe[1]["heads"]["bias"].shape[-1]) for batch in batches)
    images, correct, correct5, loss = 0, np.zeros(1, np.int64), np.zeros(1, np.int64), MeanLoss()
    for counts in stream(step, (probe[1], backbone[1]), sent, mesh):
        images += int(counts.images)
        correct, correct5 = correct + np.asarray(counts.correct), correct5 + np.asarray(counts.correct5)
        loss.add(*(np.asarray(values) for values in counts.losses))
        advance(int(counts.images))
    return ProbeScores(images, tuple(correct.tolist()), tuple(correct5.tolist()), loss.mean)
