"""Weights of classes in a loss: from an option's text, the names of the classes, and how often each occurs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float, Integer

from beit_jax.choices import nearest
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import Fields, read_json

BALANCED: Final = "balanced"
_LARGEST: Final = 1e6


def class_weights(
    option: str | None,
    labels: Sequence[str],
    balance: Callable[[], Float[np.ndarray, " classes"]],
    *,
    name: str = "--classify.class-weights",
) -> Float[np.ndarray, " classes"] | None:
    """The weight of every class.

    Args:
        option: None: no weights; "balanced": what `balance` returns; else a JSON file ``{"name of a class": weight}``.
            A class that the file does not name weighs 1.
        labels: the names of the classes.
        balance: called for "balanced" only, because it has to count: `balanced` or `balanced_positives` of the counts.
        name: of the option, for errors.

    Returns:
        float32; None without an option.

    Raises:
        BeitJaxError: no such file, or it is none of this kind; a name that is no class; a weight that is negative, no
            number or above a million; weights that are all 0.
    """
    if option is None:
        return None
    if option == BALANCED:
        return np.asarray(balance(), np.float32)
    path = Path(option)
    given = Fields(read_json(path, advice=f'{name} takes {BALANCED}, or a file {{"name of a class": weight}}'), option)
    weights = {label: 1.0 for label in labels}
    for label in given.content:
        if label not in weights:
            near = printable(nearest(label, list(labels)) or labels[0], 60)
            found = f"{printable(label, 60)} is no class of the data"
            raise BeitJaxError(f"{printable(path)}: {found}; one is called {near}")
        weights[label] = given.typed(label, float, 1.0)
        if not 0 <= weights[label] <= _LARGEST:
            raise given.error(label, f"a weight from 0 to {_LARGEST:,.0f}")
    if not any(weights.values()):
        raise BeitJaxError(f"{printable(path)}: every class weighs 0, so that nothing is learned; give one a weight")
    return np.asarray([weights[label] for label in labels], np.float32)


def balanced(counts: Integer[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    """n / (classes * count): every class weighs the same in all; a class that does not occur weighs 1.

    `classes` counts those that occur. Source of the formula: scikit-learn's ``compute_class_weight("balanced", ...)``.
    """
    found = counts > 0
    weights = np.ones(len(counts), np.float64)
    weights[found] = counts.sum() / (max(found.sum(), 1) * counts[found].astype(np.float64))
    return weights.astype(np.float32)


def balanced_positives(counts: Integer[np.ndarray, " classes"], images: int) -> Float[np.ndarray, " classes"]:
    """Images without a class over images with it, for classes that are decided one by one.

    A class that no image has, or that all have, weighs 1. Source of the formula: torch's `BCEWithLogitsLoss`, which
    calls such weights ``pos_weight``.
    """
    positives = counts.astype(np.float64)
    both = (counts > 0) & (counts < images)
    return np.where(both, (images - positives) / np.where(both, positives, 1.0), 1.0).astype(np.float32)
