"""Losses of classes, of several classes and of numbers: against torch's and transformers' own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BeitConfig as HfConfig
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from beit_jax.errors import BeitJaxError
from beit_jax.train.labels.targets import LABEL, Target
from beit_jax.train.objectives.outputs import Outputs
from beit_jax.train.step.step import split

CLASSES, IMAGES = 5, 12
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(IMAGES, CLASSES)).astype(np.float32) * 3
LABELS = RNG.integers(0, CLASSES, IMAGES).astype(np.int32)
SEVERAL = RNG.integers(0, 2, (IMAGES, CLASSES)).astype(np.uint8)
NUMBERS = RNG.normal(size=(IMAGES, CLASSES)).astype(np.float32) * 40 + 100
WEIGHTS = np.float32([0.5, 2, 0, 1, 3])
NAMES = tuple("abcde")


def single(weights: np.ndarray | None = None) -> Outputs:
    kind = "single_label_classification"
    return Outputs(Target(LABEL, kind, NAMES), kind, weights)  # type: ignore[arg-type]


def several(weights: np.ndarray | None = None) -> Outputs:
    kind = "multi_label_classification"
    return Outputs(Target("labels", kind, NAMES), kind, weights)  # type: ignore[arg-type]


def numbers(mean: np.ndarray | None = None, std: np.ndarray | None = None) -> Outputs:
    return Outputs(Target("values", "regression", NAMES), "regression", mean=mean, std=std)


def loss(outputs: Outputs, labels: np.ndarray, smoothing: float = 0.0, logits: np.ndarray = LOGITS) -> float:
    batch = outputs.prepared(outputs.targets(labels, smoothing))
    return float(outputs.loss(jnp.asarray(logits), batch)[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_of_classes_as_torch(smoothing: float) -> None:
    """torch's weighted mean: over the sum of the labels' weights; smoothing weighs each class's share."""
    expected = F.cross_entropy(
        torch.tensor(LOGITS), torch.tensor(LABELS).long(), torch.tensor(WEIGHTS), label_smoothing=smoothing
    )
    assert loss(single(WEIGHTS), LABELS, smoothing) == pytest.approx(float(expected), rel=1e-6)
    plain = F.cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS).long(), label_smoothing=smoothing)
    assert loss(single(), LABELS, smoothing) == pytest.approx(float(plain), rel=1e-6)
    assert loss(single(np.ones(CLASSES, np.float32)), LABELS, smoothing) == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_gradients_as_torch(weights: np.ndarray | None) -> None:
    outputs, weight = several(weights), None if weights is None else torch.tensor(weights)
    logits = torch.tensor(LOGITS, requires_grad=True)
    F.binary_cross_entropy_with_logits(logits, torch.tensor(SEVERAL).float(), pos_weight=weight).backward()  # type: ignore[no-untyped-call]
    batch = outputs.prepared(outputs.targets(SEVERAL, 0.0))
    found = jax.grad(lambda logits: outputs.loss(logits, batch)[0])(jnp.asarray(LOGITS))
    np.testing.assert_allclose(found, logits.grad, rtol=1e-5, atol=1e-8)


def test_large_logits_do_not_overflow() -> None:
    extreme = np.float32([[1e4, -1e4, 500, -500, 0]])
    expected = F.binary_cross_entropy_with_logits(torch.tensor(extreme), torch.zeros(1, CLASSES))
    assert loss(several(), np.zeros((1, CLASSES), np.uint8), logits=extreme) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("problem", "outputs", "labels", "cast"),
    [
        ("single_label_classification", single, LABELS, torch.Tensor.long),
        ("multi_label_classification", several, SEVERAL, torch.Tensor.float),
        ("regression", numbers, NUMBERS, torch.Tensor.float),
    ],
)
def test_the_loss_is_transformers_own(
    problem: str, outputs: Callable[[], Outputs], labels: np.ndarray, cast: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    config = HfConfig(num_labels=CLASSES, problem_type=problem)
    expected = ForSequenceClassificationLoss(cast(torch.tensor(labels)), torch.tensor(LOGITS), config)
    assert loss(outputs(), labels) == pytest.approx(float(expected), rel=1e-6)


def test_one_number_as_transformers() -> None:
    one = Outputs(Target("values", "regression", ("age",)), "regression")
    config = HfConfig(num_labels=1, problem_type="regression")
    expected = ForSequenceClassificationLoss(torch.tensor(NUMBERS[:, 0]), torch.tensor(LOGITS[:, :1]), config)
    assert loss(one, NUMBERS[:, :1], logits=LOGITS[:, :1]) == pytest.approx(float(expected), rel=1e-6)


def test_one_class_for_each_image_can_be_learned_for_itself() -> None:
    """As timm's --bce-loss: the labels' numbers become 0 and 1."""
    outputs = Outputs(Target(LABEL, "single_label_classification", NAMES), "multi_label_classification")
    expected = F.binary_cross_entropy_with_logits(torch.tensor(LOGITS), F.one_hot(torch.tensor(LABELS).long()).float())
    assert loss(outputs, LABELS) == pytest.approx(float(expected), rel=1e-6)


def test_smoothing_of_several_classes() -> None:
    smooth = torch.tensor(SEVERAL).float() * 0.8 + 0.1
    expected = F.binary_cross_entropy_with_logits(torch.tensor(LOGITS), smooth)
    assert loss(several(), SEVERAL, 0.2) == pytest.approx(float(expected), rel=1e-6)


def test_parts_of_a_batch_have_its_weighted_mean() -> None:
    """Weights are over the whole batch, though its parts are computed one after the other."""
    outputs = single(WEIGHTS)
    batch = outputs.prepared(outputs.targets(LABELS, 0.1))
    parts = split(batch, 3)
    logits = split({"logits": jnp.asarray(LOGITS)}, 3)["logits"]
    found = [outputs.loss(logits[i], {name: array[i] for name, array in parts.items()})[0] for i in range(3)]
    assert float(np.mean(found)) == pytest.approx(loss(outputs, LABELS, 0.1), rel=1e-6)


def test_only_images_without_weight() -> None:
    """Nothing is learned of them; torch's loss would be NaN."""
    assert loss(single(WEIGHTS), np.full(IMAGES, 2, np.int32)) == 0.0


def test_numbers_are_learned_standardised_and_given_as_they_are() -> None:
    mean, std = NUMBERS.mean(axis=0), NUMBERS.std(axis=0)
    outputs = numbers(mean, std)
    expected = F.mse_loss(torch.tensor(LOGITS), torch.tensor((NUMBERS - mean) / std))
    assert loss(outputs, NUMBERS) == pytest.approx(float(expected), rel=1e-5)
    features = RNG.normal(size=(IMAGES, 7)).astype(np.float32)
    head = {"kernel": RNG.normal(size=(7, CLASSES)).astype(np.float32), "bias": RNG.normal(size=CLASSES).astype("f4")}
    folded = outputs.in_units({"classifier": head})["classifier"]
    np.testing.assert_allclose(
        features @ folded["kernel"] + folded["bias"],
        (features @ head["kernel"] + head["bias"]) * std + mean,
        atol=1e-4,  # of values up to 260, float32
        rtol=0,
    )
    back = outputs.standardised({"classifier": jax.tree.map(np.asarray, folded)})["classifier"]
    np.testing.assert_allclose(back["kernel"], head["kernel"], rtol=1e-5)
    np.testing.assert_allclose(back["bias"], head["bias"], rtol=1e-4, atol=1e-5)


def test_labels_that_say_nothing_like_it() -> None:
    with pytest.raises(BeitJaxError, match=r"labels: expected 0 or 1 for every class, found 2 at \[0, 0\]"):
        several().targets(np.full((1, CLASSES), 2, np.uint8), 0.0)
    with pytest.raises(BeitJaxError, match=r"labels: expected 0 or 1 for every class, \[2, 5\], found \[2, 4\]"):
        several().targets(np.zeros((2, 4), np.uint8), 0.0)
    traced = jax.jit(lambda labels: several().targets(labels, 0.0))(np.full((1, CLASSES), 2, np.uint8))
    assert np.isnan(traced).all()
