"""How well frozen features classify: by a vote of the k nearest neighbours among the training images."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beit_jax.errors import BeitJaxError
from beit_jax.search.exact import Nearest, array_blocks, nearest

TOP = 5
VOTED = 1024  # test images whose votes are counted at a time


def knn(
    train_features: Float[np.ndarray, "..."],
    train_labels: Int[np.ndarray, "..."],
    test_features: Float[np.ndarray, "..."],
    k: int = 20,
    temperature: float = 0.07,
    *,
    leave_one_out: bool = False,
) -> Int[np.ndarray, "tests top"]:
    """Classifies images by a vote of their `k` nearest training images.

    The nearest have the largest cosine similarity s; a vote weighs exp(s / temperature).
    The search is exact and runs in blocks (`beit_jax.search.exact`). Similarities are float32; among equal ones the
    first training image counts.

    Args:
        train_features, train_labels, test_features: [train, d], [train] and [tests, d].
        leave_one_out: the tests are the training images, in the same order, and none is its own neighbour.

    Source: facebookresearch/dino@04c0ad9 eval_knn.py; Wu et al., arXiv 1805.01978, section 3.4.

    Returns:
        int32: for each test image the five classes with most votes (or all, if fewer), the best first.

    Raises:
        BeitJaxError: shapes do not belong together, `k` exceeds the number of training images, or features or the
            temperature are not finite numbers.
    """
    found = nearest_train(train_features, train_labels, test_features, k, temperature, leave_one_out=leave_one_out)
    return votes(found, train_labels, int(train_labels.max()) + 1, temperature)


def nearest_train(
    train_features: Float[np.ndarray, "..."],
    train_labels: Int[np.ndarray, "..."],
    test_features: Float[np.ndarray, "..."],
    k: int,
    temperature: float,
    *,
    leave_one_out: bool,
) -> Nearest:
    """The k nearest training images of each test image, of which fewer may vote; arguments and errors as of `knn`."""
    _check_neighbours(train_features, train_labels, test_features, k, temperature, leave_one_out)
    own = np.arange(len(test_features), dtype=np.int32) if leave_one_out else None
    return nearest(test_features, array_blocks(train_features, leave_one_out=leave_one_out), k, own=own)


def votes(
    found: Nearest, train_labels: Int[np.ndarray, " train"], classes: int, temperature: float = 0.07
) -> Int[np.ndarray, "tests top"]:
    """For each test image the five classes with most votes of its neighbours among the training images."""
    labels = np.asarray(train_labels, np.int32)[found.rows]
    parts = [slice(start, start + VOTED) for start in range(0, len(labels), VOTED)]
    voted = [_vote(found.scores[part], labels[part], temperature=temperature, classes=classes) for part in parts]
    return np.concatenate([np.asarray(part) for part in voted])


@partial(jax.jit, static_argnames="classes")
def _vote(
    similarities: Float[Array, "b k"], labels: Int[Array, "b k"], *, temperature: float | Array, classes: int
) -> Int[Array, "b top"]:
    # Similarities are relative to the largest: sums keep their order, and none overflows at low temperatures.
    weights = jnp.exp((similarities - similarities[:, :1]) / temperature)
    votes = jnp.zeros((len(labels), classes)).at[jnp.arange(len(labels))[:, None], labels].add(weights)
    return jax.lax.top_k(votes, min(TOP, classes))[1]


def _check_neighbours(
    train: np.ndarray, labels: np.ndarray, tests: np.ndarray, k: int, temperature: float, leave_one_out: bool
) -> None:
    if train.ndim != 2 or not len(tests) or tests.shape[1:] != train.shape[1:] or labels.shape != train.shape[:1]:
        found = f"{list(train.shape)}, {list(labels.shape)}, {list(tests.shape)}"
        raise BeitJaxError(f"k-NN: expected features [train, d], labels [train], features [tests, d], found {found}")
    if leave_one_out and len(train) != len(tests):
        raise BeitJaxError(f"k-NN: {len(tests)} tests, expected the {len(train)} training images themselves")
    others, kind = len(train) - leave_one_out, "other" if leave_one_out else "training"
    if not 1 <= k <= others:
        raise BeitJaxError(f"k-NN: k is {k}, expected 1 to {others}, the {kind} images")
    if not 0 < temperature < float("inf"):
        raise BeitJaxError(f"k-NN: the temperature is {temperature}, expected a positive number")
    if labels.min() < 0:
        raise BeitJaxError(f"k-NN: label {labels.min()}, expected 0 or more")
    for name, features in (("training", train), ("test", tests)):
        wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if wrong.size:
            raise BeitJaxError(f"k-NN: {len(wrong)} {name} features are not finite, row {wrong[0]} first")
