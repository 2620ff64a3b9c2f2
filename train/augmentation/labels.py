"""Labels: numbers of classes, checked where they are known, and loud where they are not.

A compiled function cannot look at the labels it will be given. There a label that is no class makes the result NaN, and
the gradient with it; a training step skips it and counts it as bad.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beit_jax.errors import BeitJaxError

ArrayLike = Array | np.ndarray


def class_numbers(
    labels: Any, classes: int, shape: tuple[int, ...], *, ignored: int | None = None
) -> Int[Array, "*shape"]:
    """The labels as int32.

    Args:
        labels: an array of integers.
        shape: that they must have.
        ignored: a number besides the classes that labels may have.

    Raises:
        BeitJaxError: another dtype or shape; a label that is neither a class nor `ignored`, where the labels are known:
            outside traced functions, or as a constant in them.
    """
    found = getattr(labels, "dtype", None)
    if found is None or not jnp.issubdtype(found, jnp.integer):
        raise BeitJaxError(f"labels: expected an array of integers, found {found or type(labels).__name__}")
    if labels.shape != shape:
        raise BeitJaxError(f"labels: expected shape {list(shape)}, found {list(labels.shape)}")
    known = _known(labels)
    if known is not None:
        wrong = (known < 0) | (known >= classes)
        if ignored is not None:
            wrong &= known != ignored
        if wrong.any():
            place = tuple(int(index) for index in np.argwhere(wrong)[0])
            besides = "" if ignored is None else f" or {ignored}, which is ignored"
            raise BeitJaxError(
                f"labels: expected numbers of classes, 0 to {classes - 1}{besides}, found {known[place]} at "
                f"{list(place)} (and {int(wrong.sum()) - 1} more); give them class numbers"
                + ("" if ignored is None else f", or {ignored} where nothing is to be learned")
            )
    return jnp.asarray(labels).astype(jnp.int32)


def checked_targets(targets: Any, shape: tuple[int, ...]) -> Float[Array, "b classes"]:
    """Distributions over classes, which are given in place of labels.

    Args:
        targets: an array of floats.
        shape: that it must have.

    Raises:
        BeitJaxError: another shape; a negative share, or shares whose sum is not 1, where the targets are known.
    """
    if targets.shape != shape:
        raise BeitJaxError(
            f"targets: expected a distribution over the classes for every image, {list(shape)}, found "
            f"{list(targets.shape)}; labels become targets by beit_jax.train.augmentation.mixing.soft_targets"
        )
    known = _known(targets)
    if known is not None:
        sums = known.astype(np.float64).sum(axis=-1)
        wrong = ~(np.abs(sums - 1.0) < 1e-2) | (known < 0).any(axis=-1)  # bfloat16 has two digits
        if wrong.any():
            row = int(np.argmax(wrong))
            raise BeitJaxError(
                f"targets: expected shares of at least 0 with the sum 1, found row {row} with the sum {sums[row]:.4g} "
                f"and the least share {known[row].min():.4g}"
            )
    return jnp.asarray(targets)


def several_classes(labels: Any, shape: tuple[int, ...]) -> Float[Array, "b classes"]:
    """Labels of several classes, 1 for each class that an image has and 0 for the others, as float32.

    Args:
        labels: an array of integers, floats or bools.
        shape: that they must have.

    Raises:
        BeitJaxError: another shape; a label that is neither 0 nor 1, where the labels are known. In a compiled function
            such a label is NaN.
    """
    if labels.shape != shape:
        raise BeitJaxError(f"labels: expected 0 or 1 for every class, {list(shape)}, found {list(labels.shape)}")
    known = _known(labels)
    if known is not None and not np.isin(known, (0, 1)).all():
        place = tuple(int(index) for index in np.argwhere(~np.isin(known, (0, 1)))[0])
        raise BeitJaxError(f"labels: expected 0 or 1 for every class, found {known[place]} at {list(place)}")
    labels = jnp.asarray(labels)
    return jnp.where((labels == 0) | (labels == 1), labels, jnp.nan).astype(jnp.float32)


def soft_cross_entropy(logits: Float[Array, "b classes"], targets: Float[ArrayLike, "b classes"]) -> Float[Array, ""]:
    """Mean over the batch of the cross entropy with targets that are distributions, in float32.

    Raises:
        BeitJaxError: targets of another shape than the logits'; rows that are no distributions, where the targets are
            known. What a compiled function is given is not checked.
    """
    targets = checked_targets(targets, logits.shape)
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1).mean()


def binary_cross_entropy(
    logits: Float[Array, "*b classes"],
    targets: Float[Array, "*b classes"],
    positives: Float[ArrayLike, " classes"] | None = None,
) -> Float[Array, "*b classes"]:
    """The cross entropy of every class for itself, by logits, float32.

    Args:
        targets: from 0 to 1.
        positives: weights of the term of images that have the class.

    Source: torch's `BCEWithLogitsLoss`, which calls the weights ``pos_weight``.
    """
    logits = logits.astype(jnp.float32)
    absent, present = jax.nn.softplus(logits), jax.nn.softplus(-logits)
    weighted = present if positives is None else present * jnp.asarray(positives, jnp.float32)
    return targets * weighted + (1 - targets) * absent


def nan_unless_class(labels: Int[Array, "*b"], classes: int) -> Float[Array, "*b"]:
    """1 for every label that is a class, else NaN: a factor of what is computed from it."""
    return jnp.where(is_class(labels, classes), 1.0, jnp.nan)


def is_class(labels: Int[Array, "*b"], classes: int) -> Bool[Array, "*b"]:
    """Whether each label is the number of a class."""
    return (labels >= 0) & (labels < classes)


def cross_entropy(logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Minus the logarithm of each label's probability; NaN, with a gradient of NaN, for a label that is no class."""
    classes = logits.shape[-1]
    places = jnp.where(is_class(labels, classes), labels, 0)
    chosen = jnp.take_along_axis(logits, places[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen) * nan_unless_class(labels, classes)


def _known(array: Any) -> np.ndarray | None:
    """The values of an array; None where a function is traced, or where other processes hold a part of them."""
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(array)
