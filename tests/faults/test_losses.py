"""Labels that are no class: refused where they are known, and a loss and a gradient of NaN where they are traced.

A new loss is a row of `LOSSES`; a new mistake is a row of `MISTAKES`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.segmenter import SegmenterOutput
from beit_jax.train.augmentation.labels import checked_targets, class_numbers, soft_cross_entropy
from beit_jax.train.augmentation.mixing import soft_targets
from beit_jax.train.objectives.linear_probe import summed_cross_entropy
from beit_jax.train.objectives.masked_tokens import token_loss
from beit_jax.train.objectives.segmentation import segmentation_loss

CLASSES = 3
SCENES = BeitConfig(task="semantic_segmentation", labels=("a", "b", "c"), out_indices=(3, 5, 7, 11))
Loss = Callable[[Any, Any], Any]


def of_scenes(logits: Any, labels: Any) -> Any:
    last = jnp.zeros((2, 5, 2))
    return segmentation_loss(SegmenterOutput(last, logits=logits, auxiliary_logits=logits[:, ::2]), labels, SCENES)


def of_smoothed(logits: Any, labels: Any) -> Any:
    return soft_cross_entropy(logits, soft_targets(labels, CLASSES, 0.1))


LOSSES: dict[str, tuple[Loss, tuple[int, ...], tuple[int, ...]]] = {
    "classification": (of_smoothed, (4,), (4,)),
    "masked tokens": (lambda logits, labels: token_loss(logits, labels, jnp.ones(labels.shape))[0], (2, 5), (2, 5)),
    "linear probe": (summed_cross_entropy, (6, 4), (4,)),
    "segmentation": (of_scenes, (2, 4, 4), (2, 8, 8)),
}  # fmt: skip
"""The loss of logits and labels, the shape of the logits without classes, and the shape of the labels."""

MISTAKES = {
    "below the classes": (-1, "found -1"),
    "far below": (-CLASSES - 1, "found -4"),
    "beyond the classes": (CLASSES, "found 3"),
    "far beyond": (2**31 - 1, "found 2147483647"),
}


def inputs(name: str) -> tuple[Any, np.ndarray]:
    _, logits, labels = LOSSES[name]
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((*logits, CLASSES)).astype(np.float32)
    return jnp.asarray(drawn), rng.integers(0, CLASSES, labels).astype(np.int32)


def with_mistake(labels: np.ndarray, value: int) -> np.ndarray:
    changed = labels.copy()
    changed.flat[-1] = value
    return changed


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", LOSSES)
def test_known_labels_are_refused(name: str, mistake: str) -> None:
    (loss, *_), (logits, labels) = LOSSES[name], inputs(name)
    value, found = MISTAKES[mistake]
    wrong = with_mistake(labels, value)
    where = str([size - 1 for size in labels.shape])
    constant = jnp.asarray(wrong)
    for given in (wrong, constant, wrong.astype(np.int64)):
        with pytest.raises(BeitJaxError, match=rf"labels: .* 0 to {CLASSES - 1}") as caught:
            loss(logits, given)
        assert found in str(caught.value) and where in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(BeitJaxError, match="labels"):  # a constant of a traced function is known as well
        jax.jit(lambda logits: loss(logits, constant))(logits)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", LOSSES)
def test_traced_labels_make_the_loss_and_its_gradient_nan(name: str, mistake: str) -> None:
    (loss, *_), (logits, labels) = LOSSES[name], inputs(name)
    both = jax.jit(jax.value_and_grad(loss))
    value, gradient = both(logits, labels)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert_allclose(value, loss(logits, labels), rtol=1e-6)
    value, gradient = both(logits, with_mistake(labels, MISTAKES[mistake][0]))
    assert np.isnan(value) and np.isnan(gradient).any()


KINDS = {
    "floats": (np.zeros((2, 3), np.float32), "integers, found float32"),
    "bools": (np.zeros((2, 3), bool), "integers, found bool"),
    "a list": ([[0, 1, 2], [0, 1, 2]], "integers, found list"),
    "another shape": (np.zeros((3, 2), np.int32), r"shape \[2, 3\], found \[3, 2\]"),
    "a number": (np.int32(0), r"shape \[2, 3\], found \[\]"),
    "beyond 32 bits": (np.full((2, 3), 2**32), f"found {2**32}"),
}


@pytest.mark.parametrize("name", KINDS)
def test_labels_of_another_kind_are_refused(name: str) -> None:
    labels, said = KINDS[name]
    with pytest.raises(BeitJaxError, match=f"labels: expected .*{said}"):
        class_numbers(labels, CLASSES, (2, 3))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint32])
@pytest.mark.parametrize("name", LOSSES)
def test_every_type_of_integers_holds_labels(name: str, dtype: type) -> None:
    (loss, *_), (logits, labels) = LOSSES[name], inputs(name)
    assert loss(logits, jnp.asarray(labels, dtype)) == loss(logits, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_ignored_pixels_are_no_mistake(dtype: type) -> None:
    logits, labels = inputs("segmentation")
    ignored = labels.copy()
    ignored[:, :3] = 255
    value, gradient = jax.value_and_grad(of_scenes)(logits, jnp.asarray(ignored, dtype))
    compiled = jax.jit(of_scenes)(logits, jnp.asarray(ignored, dtype))
    assert np.isfinite(gradient).all() and compiled == pytest.approx(float(value), rel=1e-6)
    uniform = float(of_scenes(jnp.ones_like(logits), jnp.asarray(ignored, dtype)))
    assert uniform == pytest.approx(1.4 * np.log(CLASSES), rel=1e-6)  # the auxiliary loss has a weight of 0.4
    with pytest.raises(BeitJaxError, match="0 to 2 or 255, which is ignored, found 254"):
        of_scenes(logits, with_mistake(ignored, 254).astype(dtype))


TARGETS = {
    "labels in their place": (np.array([0, 2, 1]).astype(np.float32), "soft_targets"),
    "of other classes": (np.eye(4, dtype=np.float32)[:3], "found [3, 4]"),
    "of another sum": (np.eye(3, dtype=np.float32) * 2, "the sum 2"),
    "all zero": (np.zeros((3, 3), np.float32), "the sum 0"),
    "negative": (np.array([[2, -1, 0]] * 3, np.float32), "the least share -1"),
    "NaN": (np.full((3, 3), np.nan, np.float32), "the sum nan"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_are_no_distributions(name: str) -> None:
    targets, said = TARGETS[name]
    with pytest.raises(BeitJaxError, match="targets: expected") as caught:
        checked_targets(targets, (3, 3))
    assert said in str(caught.value)
