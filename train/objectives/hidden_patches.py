"""Hidden patches: what the losses of masked image modelling and data2vec have in common.

Masks hide different numbers of patches; a program has one shape. So the same number of patches is gathered from every
image, hidden ones first, and the rest gets the weight zero. Only hidden patches pay for the head, and a mean is over
them alone: over all of a batch, or of its part where gradients are accumulated, as over those of one GPU in the
originals.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped


def hidden_patches(mask: Bool[Array, "b patches"], count: int) -> dict[str, Array]:
    """``mask`` itself; ``positions`` int32 [b, count] of patches, the hidden ones first and in order; and ``weights``
    float32 [b, count], 1 for those that are hidden. No mask may hide more than `count`."""
    positions = jnp.argsort(~mask, axis=1, stable=True)[:, :count].astype(jnp.int32)
    weights = jnp.take_along_axis(mask, positions, axis=1).astype(jnp.float32)
    return {"mask": mask, "positions": positions, "weights": weights}


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
