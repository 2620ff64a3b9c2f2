"""What frozen features know: a linear classifier on every block at once, and k nearest neighbours."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import Model
from beit_jax.tree import Nested

from ..augmentation.mixing import normalise
from ..distributed.sharding import make_mesh, replicated
from ..recipe import Recipe, Statistics
from ..step.objective import Batch, Metrics, Objective
from .accuracy import TOP, EvalStep, HostBatch, best_classes, share, stream, to_send

# --- Linear probe -----------------------------------------------------------------------------------------------------


class Heads(nnx.Module):
    """Linear classifiers, one for each layer: ``kernel`` [layers, 2 d, classes] and ``bias`` [layers, classes]."""

    def __init__(self, layers: int, features: int, classes: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.01 * jax.random.normal(rngs.params(), (layers, features, classes)))
        self.bias = nnx.Param(jnp.zeros((layers, classes)))

    def __call__(self, features: Float[Array, "layers b features"]) -> Float[Array, "layers b classes"]:
        return jnp.einsum("lbf,lfc->lbc", features, self.kernel[...]) + self.bias[...][:, None]


class LinearProbe(nnx.Module):
    """What a probe trains: heads on all blocks of an encoder, without the encoder.

    Source: microsoft/unilm@006195f beit/run_linear_eval.py.
    """

    def __init__(self, config: BeitConfig, classes: int, *, rngs: nnx.Rngs):
        self.heads = Heads(config.num_hidden_layers, 2 * config.hidden_size, classes, rngs=rngs)


def abstract_probe(config: BeitConfig, classes: int) -> tuple[nnx.GraphDef[LinearProbe], Nested]:
    """A probe without memory: what `nnx.merge` needs besides the parameters, and their shapes, nested."""
    graph, state = nnx.split(nnx.eval_shape(lambda: LinearProbe(config, classes, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


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


def linear_probe(recipe: Recipe, backbone: nnx.GraphDef[Model]) -> Objective:
    """The objective of a probe: ``image`` uint8 [b, h, w, 3] and ``label`` int32 [b]; losses of all blocks are summed.

    Its model is a `LinearProbe`; its teacher are the parameters of the backbone, which nothing moves. A run keeps them
    as the state's `ema`, without a decay: so they are placed, donated and saved like everything else.
    """

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        return {"image": normalise(batch["image"], recipe.data.statistics), "label": batch["label"]}

    def loss(
        model: Any, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        assert teacher is not None  # the backbone
        logits = model.heads(block_features(nnx.merge(backbone, teacher), batch["image"]))
        correct = logits.argmax(axis=-1) == batch["label"]
        return summed_cross_entropy(logits, batch["label"]), {"accuracy": correct.mean(axis=1).max()}

    return Objective(prepare, loss)


def summed_cross_entropy(logits: Float[Array, "layers b classes"], labels: Int[Array, " b"]) -> Float[Array, ""]:
    """The mean over the batch, the sum over layers."""
    chosen = jnp.take_along_axis(logits, labels[None, :, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean(axis=1).sum()


@dataclass(frozen=True)
class ProbeScores:
    """What the head of every block finds.

    Attributes:
        images: how many were classified.
        correct, correct5: of each block's head, the images whose class is its best, and among its five best.
    """

    images: int
    correct: tuple[int, ...]
    correct5: tuple[int, ...]

    @property
    def best(self) -> int:
        """The block whose head finds most, counted from 1; of equal ones the first."""
        return 1 + int(np.argmax(self.correct))

    @property
    def top1(self) -> float:
        """Of the best block."""
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
    """What one batch adds, int32."""

    images: Int[Array, ""]
    correct: Int[Array, " layers"]
    correct5: Int[Array, " layers"]


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
        best = best_classes(nnx.merge(probe, params[0]).heads(features))
        hits = (best == batch["label"][None, :, None]) & batch["valid"][None, :, None]
        return ProbeCounts(
            images=batch["valid"].sum(dtype=jnp.int32),
            correct=hits[..., 0].sum(axis=1, dtype=jnp.int32),
            correct5=hits.any(axis=-1).sum(axis=1, dtype=jnp.int32),
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
    images, correct, correct5 = 0, np.zeros(1, np.int64), np.zeros(1, np.int64)
    for counts in stream(step, (probe[1], backbone[1]), sent, mesh):
        images += int(counts.images)
        correct, correct5 = correct + np.asarray(counts.correct), correct5 + np.asarray(counts.correct5)
        advance(int(counts.images))
    return ProbeScores(images, tuple(correct.tolist()), tuple(correct5.tolist()))


# --- k nearest neighbours ---------------------------------------------------------------------------------------------

TEST_CHUNK, TRAIN_CHUNK = 1024, 16384  # 64 MB of similarities at a time


def knn(
    train_features: Float[np.ndarray, "..."],
    train_labels: Int[np.ndarray, "..."],
    test_features: Float[np.ndarray, "..."],
    k: int = 20,
    temperature: float = 0.07,
) -> Int[np.ndarray, "tests top"]:
    """Classes by a vote of the `k` training images of largest cosine similarity s, with weights exp(s / temperature).

    Exact, in chunks: devices hold the test features, and a part of the training features at a time. Similarities are
    float32; of equal ones the first training image counts.

    Args:
        train_features, train_labels, test_features: [train, d], [train] and [tests, d].

    Source: facebookresearch/dino@04c0ad9 eval_knn.py; Wu et al., arXiv 1805.01978, section 3.4.

    Returns:
        int32: of each test image the five classes with most votes (or all, if fewer), the best first.

    Raises:
        BeitJaxError: shapes that do not belong together, `k` larger than the training images, features or a
            temperature that are no numbers.
    """
    _check_neighbours(train_features, train_labels, test_features, k, temperature)
    classes = int(train_labels.max()) + 1
    tests = [_unit(jnp.asarray(chunk, jnp.float32)) for chunk in _chunks(test_features, TEST_CHUNK)]
    best = [_no_neighbours(len(chunk), k) for chunk in tests]
    labels = jnp.asarray(train_labels, jnp.int32)
    for start in range(0, len(train_features), TRAIN_CHUNK):
        features = _unit(jnp.asarray(train_features[start : start + TRAIN_CHUNK], jnp.float32))
        known = labels[start : start + TRAIN_CHUNK]
        best = [_nearest(chunk, found, features, known) for chunk, found in zip(tests, best, strict=True)]
    votes = [np.asarray(_vote(*found, temperature=temperature, classes=classes)) for found in best]
    return np.concatenate(votes)


_Neighbours = tuple[Array, Array]  # similarities [b, k], largest first, and labels [b, k]


def _no_neighbours(count: int, k: int) -> _Neighbours:
    return jnp.full((count, k), -jnp.inf), jnp.zeros((count, k), jnp.int32)


def _chunks(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))


@jax.jit
def _unit(features: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows of length 1; a row of zeros stays one, and is equally far from everything."""
    largest = jnp.abs(features).max(axis=1, keepdims=True)  # first: squares of large numbers would overflow
    scaled = features / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled / jnp.where(norm > 0, norm, 1.0)


@jax.jit
def _nearest(
    test: Float[Array, "b d"], best: _Neighbours, train: Float[Array, "n d"], labels: Int[Array, " n"]
) -> _Neighbours:
    """The nearest of those so far and these."""
    similarity = jnp.matmul(test, train.T, precision="highest")
    everyone = jnp.concatenate([best[0], similarity], axis=1)
    owners = jnp.concatenate([best[1], jnp.broadcast_to(labels, similarity.shape)], axis=1)
    similarities, chosen = jax.lax.top_k(everyone, best[0].shape[1])
    return similarities, jnp.take_along_axis(owners, chosen, axis=1)


@partial(jax.jit, static_argnames="classes")
def _vote(
    similarities: Float[Array, "b k"], labels: Int[Array, "b k"], *, temperature: float | Array, classes: int
) -> Int[Array, "b top"]:
    # Relative to the nearest: the order of the sums is the same, and none overflows at low temperatures.
    weights = jnp.exp((similarities - similarities[:, :1]) / temperature)
    votes = jnp.zeros((len(labels), classes)).at[jnp.arange(len(labels))[:, None], labels].add(weights)
    return jax.lax.top_k(votes, min(TOP, classes))[1]


def _check_neighbours(train: np.ndarray, labels: np.ndarray, tests: np.ndarray, k: int, temperature: float) -> None:
    if train.ndim != 2 or not len(tests) or tests.shape[1:] != train.shape[1:] or labels.shape != train.shape[:1]:
        found = f"{list(train.shape)}, {list(labels.shape)}, {list(tests.shape)}"
        raise BeitJaxError(f"k-NN: expected features [train, d], labels [train], features [tests, d], found {found}")
    if not 1 <= k <= len(train):
        raise BeitJaxError(f"k-NN: k is {k}, expected 1 to {len(train)}, the training images")
    if not 0 < temperature < float("inf"):
        raise BeitJaxError(f"k-NN: the temperature is {temperature}, expected a positive number")
    if labels.min() < 0:
        raise BeitJaxError(f"k-NN: label {labels.min()}, expected 0 or more")
    for name, features in (("training", train), ("test", tests)):
        wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if wrong.size:
            raise BeitJaxError(f"k-NN: {len(wrong)} {name} features are not finite, row {wrong[0]} first")
