"""Pre-training without labels: BEiT's visual tokens, BEiT v2's with patch aggregation, and data2vec's features.

Batches hold ``image`` uint8 [b, h, w, 3] and ``mask`` bool [b, patches]. Masks hide different numbers of patches; a
program has one shape: of every image the same number of patches is gathered, hidden ones first, and what is too many
gets the weight zero. So only hidden patches pay for the head, and a mean is over them alone: over all of a batch, or of
its part where gradients are accumulated, as over those of one GPU in the originals.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from beit_jax.models.heads import BeitForMaskedImageModeling
from beit_jax.tree import Nested

from ..augmentation.mixing import normalise
from ..recipe import Data2vecOptions, Recipe
from ..step.objective import Batch, Metrics, Objective
from .codebook import perplexity

TARGET_EPSILON = 1e-5  # of the norms on a teacher's features: torch's default, not the model's
COLLAPSED: Mapping[str, tuple[float, str]] = {
    "target_deviation": (0.1, "the teacher gives nearly the same features for all patches"),
    "prediction_deviation": (0.01, "predictions are nearly the same for all patches"),
    "predicted_perplexity": (1.5, "one token is predicted for nearly all patches"),
    "target_perplexity": (1.5, "the tokenizer gives nearly all patches one token"),
}
"""Metrics below which learning has gone wrong, and what that means. The deviations are fairseq's for data2vec."""


def masked_tokens(recipe: Recipe, tokenizer: nnx.GraphDef[Any] | None) -> Objective:
    """The visual tokens of hidden patches, from the patches that are seen: cross entropy.

    The tokenizer's parameters are the teacher, which nothing moves: a state keeps them as its `ema`, without a decay.
    It sees ``token_image`` uint8 [b, height, width, 3], or the image where there is none.

    Args:
        tokenizer: a `beit_jax.tokenizers.tokenizer.Tokenizer` without parameters; None: batches hold ``tokens`` int32 [b, patches]
            instead.

    Source: microsoft/unilm@768a3c8 beit/engine_for_pretraining.py; with aggregation layers beit2's, where their loss is
    added.
    """
    aggregates = recipe.tokens.aggregation_layers > 0

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        ready = {"image": normalise(batch["image"], recipe.data.statistics)}
        if tokenizer is None:
            ready["tokens"] = batch["tokens"]
        else:
            ready["token_image"] = batch.get("token_image", batch["image"])
        return ready | hidden_patches(batch["mask"], recipe.mask.patches)

    def loss(
        model: BeitForMaskedImageModeling, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        if tokenizer is None:
            tokens = batch["tokens"]
        else:
            tokens = visual_tokens(nnx.merge(tokenizer, teacher), batch["token_image"])
        labels = jnp.take_along_axis(tokens, batch["positions"], axis=1)
        output = model(
            batch["image"],
            batch["mask"],
            predicted=batch["positions"],
            aggregate=aggregates,
            key=key,
            remat=recipe.model.remat,
        )
        assert output.logits is not None
        value, accuracy = token_loss(output.logits, labels, batch["weights"])
        metrics = {"masked_accuracy": accuracy} | perplexities(output.logits, labels, batch["weights"])
        if output.aggregated_logits is None:
            return value, metrics
        more, accuracy = token_loss(output.aggregated_logits, labels, batch["weights"])
        return value + more, metrics | {
            "loss_patches": value,
            "loss_aggregated": more,
            "masked_accuracy_aggregated": accuracy,
        }

    return Objective(prepare, loss)


def data2vec(recipe: Recipe, graph: nnx.GraphDef[BeitForMaskedImageModeling]) -> Objective:
    """What a teacher, the moving average of the model, makes of hidden patches when it sees all: smooth L1.

    The model is one for masked image modelling whose "vocabulary" are the features: its head maps them to themselves.

    Args:
        graph: the model without its parameters.

    Source: facebookresearch/data2vec_vision@af9a363 beit/engine_for_cyclical.py, described in arXiv 2202.03555
    section 3. There the teacher computes in float32; here it does in what `model.dtype` says, with the same float32
    residual stream and norms.
    """

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        image = normalise(batch["image"], recipe.data.statistics)
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

    return Objective(prepare, loss)


def hidden_patches(mask: Bool[Array, "b patches"], count: int) -> dict[str, Array]:
    """``mask`` itself; ``positions`` int32 [b, count] of patches, the hidden ones first and in order; and ``weights``
    float32 [b, count], 1 for those that are hidden. No mask may hide more than `count`."""
    positions = jnp.argsort(~mask, axis=1, stable=True)[:, :count].astype(jnp.int32)
    weights = jnp.take_along_axis(mask, positions, axis=1).astype(jnp.float32)
    return {"mask": mask, "positions": positions, "weights": weights}


def visual_tokens(tokenizer: Any, images: Array) -> Int[Array, "b patches"]:
    """The tokens of uint8 images [b, h, w, 3], row by row."""
    low, high = tokenizer.value_range
    tokens = tokenizer.tokens(low + (high - low) * images.astype(jnp.float32) / 255)
    return tokens.reshape(len(tokens), -1)


def feature_targets(
    teacher: BeitForMaskedImageModeling, images: Float[Array, "b h w 3"], options: Data2vecOptions
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


def token_loss(
    logits: Float[Array, "b k vocab"], labels: Int[Array, "b k"], weights: Float[Array, "b k"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross entropy, and the share of labels that are the most probable token."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    entropies = jax.nn.logsumexp(logits, axis=-1) - chosen
    return weighted_mean(entropies, weights), weighted_mean(logits.argmax(axis=-1) == labels, weights)


def perplexities(logits: Float[Array, "b k vocab"], labels: Int[Array, "b k"], weights: Float[Array, "b k"]) -> Metrics:
    """How many tokens occur, as it were, among the predicted ones and among the labels: the exponential of the entropy
    of their frequencies in this batch."""

    def sizes(tokens: Int[Array, "b k"]) -> Float[Array, " vocab"]:
        return jnp.zeros(logits.shape[-1]).at[tokens].add(weights)

    return {
        "predicted_perplexity": perplexity(sizes(logits.argmax(axis=-1))),
        "target_perplexity": perplexity(sizes(labels)),
    }


def deviation(features: Float[Array, "b k d"], weights: Float[Array, "b k"]) -> Float[Array, ""]:
    """Standard deviation of a feature over the patches of a batch, mean over features: 0 where all patches are one."""
    flat, weight = features.astype(jnp.float32).reshape(-1, features.shape[-1]), weights.reshape(-1, 1)
    count = jnp.maximum(weight.sum(), 1.0)
    mean = (weight * flat).sum(axis=0) / count
    variance = (weight * jnp.square(flat - mean)).sum(axis=0) / count
    return jnp.sqrt(variance).mean()


def weighted_mean(values: Shaped[Array, "*b"], weights: Float[Array, "*b"]) -> Float[Array, ""]:
    """Zero where nothing has a weight."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def collapse(metrics: Mapping[str, float]) -> list[str]:
    """A line for everything in these means of metrics that shows that nothing is learned any more."""
    return [
        f"{name} is {metrics[name]:.3g}, expected more than {least:g}: {meaning}"
        for name, (least, meaning) in COLLAPSED.items()
        if np.isfinite(metrics.get(name, np.nan)) and metrics[name] < least
    ]
