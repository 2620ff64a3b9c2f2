"""Batches and losses of the objectives."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit_jax.config import BeitConfig
from beit_jax.models.build import Model
from beit_jax.models.classifier import BeitForImageClassification
from beit_jax.models.interface import BeitOutput
from beit_jax.models.segmenter import BeitForSemanticSegmentation, SegmenterOutput
from beit_jax.train.augmentation.labels import soft_cross_entropy
from beit_jax.train.augmentation.mixing import soft_targets
from beit_jax.train.objectives.classification import ClassificationRecipe, classification
from beit_jax.train.objectives.segmentation import SegmentationRecipe, segmentation, segmentation_loss
from beit_jax.train.recipe import AugmentOptions, DataOptions, ModelOptions
from beit_jax.train.step.criterion import Batch

CONFIG = BeitConfig(task="image_classification", image_size=(8, 8), patch_size=(4, 4), labels=tuple("abcd"))
BARE = AugmentOptions(erasing=0.0, smoothing=0.0)


def standing_in(kind: type[Model], output: BeitOutput) -> tuple[Model, list[dict[str, Any]]]:
    """A model whose output is given, and the options of its calls."""
    calls = []

    class StandIn(kind):
        def __init__(self) -> None: ...

        def __call__(self, pixel_values: object, **options: Any) -> BeitOutput:
            calls.append(options)
            return output

    return StandIn(), calls


def raw_batch(size: int = 4) -> Batch:
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, 8, 8, 3)), jnp.uint8),
        "label": jnp.arange(size, dtype=jnp.int32) % 4,
    }


def prepared(augment: AugmentOptions, key: int = 0, size: int = 4, statistics: str = "half") -> Batch:
    recipe = ClassificationRecipe("test", augment=augment, data=DataOptions(statistics=statistics))
    return jax.jit(classification(recipe, CONFIG).prepare)(raw_batch(size), jax.random.key(key))


def test_without_augmentation_a_batch_is_pixels_and_one_hot_labels() -> None:
    batch = prepared(BARE, statistics="imagenet")
    pixels = np.asarray(raw_batch()["image"], np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch["image"], expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(batch["target"], np.eye(4))


def test_images_are_erased_before_they_are_mixed() -> None:
    """So noise of an erased rectangle shows, blended, in the partner too. Every image is erased and blended here."""
    plain, erased = prepared(BARE)["image"], prepared(replace(BARE, erasing=1.0))["image"]
    batch = prepared(replace(BARE, erasing=1.0, mixup=0.8))
    share = float(batch["target"][0, 0])
    assert 0.0 < share < 1.0 and (np.asarray(plain != erased).any(axis=(1, 2, 3))).all()
    np.testing.assert_allclose(batch["image"], share * erased + (1 - share) * erased[::-1], atol=1e-5)
    np.testing.assert_allclose(batch["target"], share * np.eye(4) + (1 - share) * np.eye(4)[::-1], atol=1e-6)


def test_randomness_is_the_keys() -> None:
    augment = AugmentOptions(mixup=0.8, cutmix=1.0, erasing=0.5)
    one, again, other = (prepared(augment, key)["image"] for key in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


@given(smoothing=st.floats(0.0, 0.9), seed=st.integers(0, 9))
def test_one_loss_is_the_three_of_the_original(smoothing: float, seed: int) -> None:
    """Its cross entropy with smoothing: (1 - s) of the label's, s of the mean over classes; plain without."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = np.mean((1 - smoothing) * -log[np.arange(6), labels] + smoothing * -log.mean(axis=1))
    targets = soft_targets(jnp.asarray(labels, jnp.int32), 5, smoothing)
    assert soft_cross_entropy(jnp.asarray(logits, jnp.float32), targets) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_bfloat16_logits_is_computed_in_float32() -> None:
    logits, targets = jnp.full((1, 1000), 1.0, jnp.bfloat16), jnp.full((1, 1000), 1e-3)
    loss = soft_cross_entropy(logits, targets)
    assert loss.dtype == jnp.float32 and loss == pytest.approx(np.log(1000.0), rel=1e-6)


def test_accuracy_counts_the_larger_share_of_mixed_images() -> None:
    logits = jnp.eye(4)
    targets = jnp.asarray([[0.9, 0.1, 0, 0], [0.6, 0.4, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.4]])
    model, calls = standing_in(BeitForImageClassification, BeitOutput(jnp.zeros((4, 5, 2)), logits=logits))
    recipe, key = ClassificationRecipe("test", model=ModelOptions(remat="dots")), jax.random.key(0)
    batch = {"image": jnp.zeros((4, 8, 8, 3)), "target": targets}
    loss, metrics = classification(recipe, CONFIG).loss(model, batch, key, None)
    assert metrics == {"accuracy": 0.5}
    assert loss == pytest.approx(float(soft_cross_entropy(logits, targets)))
    assert calls == [{"key": key, "remat": "dots"}]


def test_segmentation_trains_both_heads_and_the_running_statistics() -> None:
    rng = np.random.default_rng(1)
    logits, auxiliary = (jnp.asarray(rng.standard_normal((2, side, side, 4)), jnp.float32) for side in (4, 2))
    output = SegmenterOutput(jnp.zeros((2, 5, 2)), logits=logits, auxiliary_logits=auxiliary)
    labels = jnp.asarray(rng.integers(0, 4, (2, 8, 8)), jnp.int32).at[:, :3].set(255)
    model, calls = standing_in(BeitForSemanticSegmentation, output)
    objective, key = (
        segmentation(SegmentationRecipe("test", model=ModelOptions(remat="block")), CONFIG),
        jax.random.key(0),
    )
    batch = objective.prepare({"image": raw_batch(2)["image"], "label": labels}, key)
    loss, _ = objective.loss(model, batch, key, None)
    assert loss == pytest.approx(float(segmentation_loss(output, labels, CONFIG, average="all")))
    assert calls == [{"train": True, "key": key, "remat": "block"}]
    assert float(batch["image"].min()) < -0.5 < 0.5 < float(batch["image"].max()) <= 1.0
