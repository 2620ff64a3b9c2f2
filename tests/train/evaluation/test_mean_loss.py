"""The validation loss: torch's loss of all images, to the bit the same for any batches."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from forward import logits

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import Within, ade20k_processor
from beit_jax.inference.segmentation import Inference, class_logits, labels_and_losses, segment
from beit_jax.models.build import MODELS, Model
from beit_jax.train.evaluation.accuracy import evaluate_classification
from beit_jax.train.evaluation.mean_loss import MeanLoss
from beit_jax.train.evaluation.multilabel import evaluate_multilabel
from beit_jax.train.evaluation.regression import evaluate_regression
from beit_jax.train.labels.targets import Target
from beit_jax.train.objectives.classification import SCORES
from beit_jax.train.objectives.outputs import Outputs

CLASSES, IMAGES = 5, 11
CONFIG = BeitConfig(
    task="image_classification", hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    image_size=(16, 16), patch_size=(8, 8), layer_scale_init_value=1.0, labels=tuple("abcde"),
)  # fmt: skip
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.25, 3.0], np.float32)


@cache
def model(config: BeitConfig = CONFIG) -> Model:
    made: Any = MODELS[config.task](config, rngs=nnx.Rngs(0))
    if config.task == "image_classification":
        made.classifier.kernel[...] = jax.random.normal(jax.random.key(1), made.classifier.kernel.shape)
    return made


def data(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    label = {
        "class": rng.integers(0, CLASSES, IMAGES).astype(np.int32),
        "classes": rng.integers(0, 2, (IMAGES, CLASSES)).astype(np.uint8),
        "values": rng.standard_normal((IMAGES, CLASSES)).astype(np.float32),
    }[kind]
    image = rng.standard_normal((IMAGES, 16, 16, 3)).astype(np.float32)
    return {"image": image, "label": label, "index": np.arange(IMAGES, dtype=np.int32), "valid": np.ones(IMAGES, bool)}


def batches(kind: str, size: int) -> list[dict[str, np.ndarray]]:
    return [{name: array[at : at + size] for name, array in data(kind).items()} for at in range(0, IMAGES, size)]


def outputs(problem: Any, feature: str, **more: Any) -> Outputs:
    return Outputs(Target(feature, problem, CONFIG.labels), problem, **more)


def torch_logits() -> torch.Tensor:
    return torch.from_numpy(np.array(logits(model(), data("class")["image"])))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_of_one_class_for_an_image_it_is_cross_entropy(weights: np.ndarray | None) -> None:
    of_rows = outputs("single_label_classification", "label", weights=weights).losses
    found = [
        evaluate_classification(model(), batches("class", size), CONFIG.labels, losses=of_rows).loss for size in (4, 11)
    ]
    weight = None if weights is None else torch.from_numpy(weights)
    labels = torch.from_numpy(data("class")["label"]).long()
    expected = torch.nn.functional.cross_entropy(torch_logits(), labels, weight)
    assert found == pytest.approx([float(expected)] * 2, rel=1e-6)
    assert evaluate_classification(model(), batches("class", 4), CONFIG.labels).loss is None


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_of_several_classes_it_is_binary_cross_entropy(weights: np.ndarray | None) -> None:
    weight = None if weights is None else torch.from_numpy(weights)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch_logits(), torch.from_numpy(data("classes")["label"]).float(), pos_weight=weight
    )
    learned = outputs("multi_label_classification", "labels", weights=weights)
    assert observed(evaluate_multilabel, learned, "classes") == pytest.approx(float(expected), rel=1e-6)


def test_of_numbers_it_is_the_squared_error_of_what_is_learned() -> None:
    mean, std = np.linspace(-1, 1, CLASSES, dtype=np.float32), np.linspace(0.5, 2, CLASSES, dtype=np.float32)
    learned = outputs("regression", "values", mean=mean, std=std)
    found, said = ((value - mean) / std for value in (torch_logits().numpy(), data("values")["label"]))
    expected = torch.nn.functional.mse_loss(torch.from_numpy(found), torch.from_numpy(said))
    assert observed(evaluate_regression, learned, "values") == pytest.approx(float(expected), rel=1e-5)


def observed(evaluate: Any, learned: Outputs, kind: str) -> float:
    loss = MeanLoss()
    scores = evaluate(
        model(), batches(kind, 4), CONFIG.labels,
        observe=lambda found, label: loss.add(*map(np.asarray, learned.losses(jnp.asarray(found), label))),
    )  # fmt: skip
    assert tuple(scores.of_a_run()) == SCORES[learned.problem_type]
    return loss.mean


def test_the_mean_is_exact_in_any_order() -> None:
    rng = np.random.default_rng(0)
    losses = (rng.standard_normal(1000) * 10.0 ** rng.integers(-8, 8, 1000)).astype(np.float32)
    weights = rng.random(1000).astype(np.float32)
    means = set()
    for order in (np.arange(1000), rng.permutation(1000)):
        loss = MeanLoss()
        for part in np.array_split(order, 7):
            loss.add(losses[part], weights[part])
        means.add(loss.mean)
    exact = losses.astype(np.float64) * weights
    assert means == {math.fsum(exact) / math.fsum(weights.astype(np.float64))}


def test_padding_does_not_count_and_what_is_not_finite_is_not_hidden() -> None:
    loss = MeanLoss()
    assert math.isnan(loss.mean)
    loss.add(np.array([2.0, np.nan], np.float32), np.array([1.0, 0.0], np.float32))
    assert loss.mean == 2.0
    loss.add(np.array([np.inf], np.float32), np.array([1.0], np.float32))
    assert math.isnan(loss.mean)


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_of_pixels_it_is_cross_entropy_of_the_logits_that_classify(mode: Any, tmp_path: Path) -> None:
    config = replace(
        CONFIG, task="semantic_segmentation", num_hidden_layers=4, out_indices=(0, 1, 2, 3), use_auxiliary_head=False
    )
    segmenter, processor = model(config), replace(ade20k_processor(16), resize=Within(20, 64))
    rng, how = np.random.default_rng(0), Inference(mode=mode)
    image = rng.integers(0, 256, (75, 90, 3), np.uint8)
    truth = rng.integers(0, CLASSES, (75, 90)).astype(np.uint8)
    truth[:9] = 255
    labels, losses = labels_and_losses(segmenter, processor, image, truth, ignored=255, how=how)
    assert np.array_equal(labels, segment(segmenter, processor, image, how))
    logits = torch.from_numpy(class_logits(segmenter, processor, image, how)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(truth).long()[None], ignore_index=255, reduction="none"
    )[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    assert not losses[:9].any() and losses[9:].all()
    with pytest.raises(BeitJaxError, match=r"expected true classes \[75, 90\], found \[90, 75\]"):
        labels_and_losses(segmenter, processor, image, truth.T, ignored=255, how=how)
