"""How well frozen features classify: by a vote of the k nearest neighbours among the training images."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beit_jax.errors import BeitJaxError

TOP = 5
TEST_CHUNK, TRAIN_CHUNK = 1024, 16384  # 64 MB of similarities at a time


def knn(
    train_features: Float[np.ndarray, "..."],
    train_labels: Int[np.ndarray, "..."],
    test_features: Float[np.ndarray, "..."],
    k: int = 20,
    temperature: float = 0.07,
) -> Int[np.ndarray, "tests top"]:
    """Classifies images by a vote of their `k` nearest training images.

    The nearest have the largest cosine similarity s; a vote weighs exp(s / temperature).
    The search is exact and runs in chunks: devices hold the test features and a part of the training features at a
    time. Similarities are float32; among equal ones the first training image counts.

    Args:
        train_features, train_labels, test_features: [train, d], [train] and [tests, d].

    Source: facebookresearch/dino@04c0ad9 eval_knn.py; Wu et al., arXiv 1805.01978, section 3.4.

    Returns:
        int32: for each test image the five classes with most votes (or all, if fewer), the best first.

    Raises:
        BeitJaxError: shapes do not belong together, `k` exceeds the number of training images, or features or the
            temperature are not finite numbers.
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
    """Scales every row to length 1. A row of zeros stays one: it is equally far from all others."""
    largest = jnp.abs(features).max(axis=1, keepdims=True)  # divided by first: squares of large numbers would overflow
    scaled = features / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled / jnp.where(norm > 0, norm, 1.0)


@jax.jit
def _nearest(
    test: Float[Array, "b d"], best: _Neighbours, train: Float[Array, "n d"], labels: Int[Array, " n"]
) -> _Neighbours:
    """The nearest neighbours among those found so far and these training images."""
    similarity = jnp.matmul(test, train.T, precision="highest")
    everyone = jnp.concatenate([best[0], similarity], axis=1)
    owners = jnp.concatenate([best[1], jnp.broadcast_to(labels, similarity.shape)], axis=1)
    similarities, chosen = jax.lax.top_k(everyone, best[0].shape[1])
    return similarities, jnp.take_along_axis(owners, chosen, axis=1)


@partial(jax.jit, static_argnames="classes")
def _vote(
    similarities: Float[Array, "b k"], labels: Int[Array, "b k"], *, temperature: float | Array, classes: int
) -> Int[Array, "b top"]:
    # Similarities are relative to the largest: sums keep their order, and none overflows at low temperatures.
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
