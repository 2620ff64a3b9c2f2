"""Losses of pixels and their gradients against torch, each formula written out over whole arrays, in float64."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from beit_jax.errors import BeitJaxError
from beit_jax.train.augmentation.pixel_losses import Average, PixelLoss, parse_terms

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, (2, 10, 12, 5)).astype(np.float32)
ON_DEVICE = jnp.asarray(LOGITS)
LABELS = RNG.choice([0, 1, 2, 4], (2, 77, 65)).astype(np.int32)  # class 3 does not occur
LABELS[RNG.random(LABELS.shape) < 0.3] = 255
WEIGHTS = np.array([0.5, 1, 2, 3, 0.25], np.float32)


def reference(
    terms: Mapping[str, float], average: Average, gamma: float, weights: np.ndarray | None
) -> tuple[float, np.ndarray]:
    logits = torch.tensor(LOGITS.astype(np.float64)).permute(0, 3, 1, 2).requires_grad_()
    resized = torch.nn.functional.interpolate(logits, size=LABELS.shape[1:], mode="bilinear", align_corners=False)
    classes = resized.shape[1]
    flat = resized.permute(0, 2, 3, 1).reshape(-1, classes)
    labels = torch.tensor(LABELS).reshape(-1).long()
    w = torch.ones(classes, dtype=torch.float64) if weights is None else torch.tensor(weights.astype(np.float64))
    entropy = partial(torch.nn.functional.cross_entropy, flat, labels, weight=w, ignore_index=255)
    counted = labels != 255
    shares, known = flat.softmax(1)[counted], labels[counted]
    values = {"cross_entropy": entropy() if average == "valid" else entropy(reduction="sum") / labels.numel()}
    chosen = shares[torch.arange(len(known)), known]
    focal = -(w[known] * (1 - chosen) ** gamma * chosen.log()).sum()
    values["focal"] = focal / (w[known].sum() if average == "valid" else labels.numel())
    marked = torch.nn.functional.one_hot(known, classes)
    occurs = marked.sum(0) > 0
    dice = 1 - 2 * (shares * marked).sum(0) / (shares.sum(0) + marked.sum(0))
    values["dice"] = (w * dice)[occurs].sum() / w[occurs].sum()
    loss = sum(weight * values[term] for term, weight in terms.items())
    loss.backward()
    assert logits.grad is not None
    return float(loss.detach()), logits.grad.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("average", ["valid", "all"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("text", ["cross_entropy", "focal", "dice", "cross_entropy+0.5*dice", "2*focal + 1e-1*dice"])
def test_values_and_gradients(text: str, weights: np.ndarray | None, average: Average) -> None:
    terms = parse_terms(text)
    how = PixelLoss(terms, average, 1.7, weights)
    found, gradient = jax.value_and_grad(lambda logits: how.total(how(logits, LABELS, 255)))(ON_DEVICE)
    expected, slope = reference(terms, average, 1.7, weights)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6 * np.abs(slope).max())


def test_focal_loss_of_gamma_0_is_cross_entropy() -> None:
    found = PixelLoss({"focal": 1.0, "cross_entropy": 1.0}, gamma=0.0, weights=WEIGHTS)(ON_DEVICE, LABELS, 255)
    assert float(found["focal"]) == float(found["cross_entropy"])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_pixels_have_finite_gradients(gamma: float) -> None:
    """Where p is 1 in float32, a power of 1 - p has no derivative."""
    how = PixelLoss({"focal": 1.0, "dice": 1.0}, gamma=gamma)
    logits = jnp.zeros((1, 2, 2, 3)).at[..., 1].set(200.0)
    loss, gradient = jax.value_and_grad(lambda logits: how.total(how(logits, np.ones((1, 2, 2), int), 255)))(logits)
    assert float(loss) == 0.0 and np.isfinite(gradient).all()


@pytest.mark.parametrize("term", ["cross_entropy", "focal", "dice"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_ignored_pixels_count_nowhere(term: str, weights: np.ndarray | None) -> None:
    how = PixelLoss(parse_terms(term), weights=weights)
    wide = np.full((2, 8, 6), 255)
    wide[:, :, :3] = RNG.integers(0, 5, (2, 8, 3))
    logits = jnp.asarray(RNG.normal(size=(2, 8, 6, 5)), jnp.float32)  # as large as the labels: nothing is interpolated
    part = how(logits[:, :, :3], wide[:, :, :3], 255)
    assert float(how(logits, wide, 255)[term]) == pytest.approx(float(part[term]), rel=1e-6)  # type: ignore[index]
    gradient = jax.grad(lambda logits: how.total(how(logits, wide, 255)))(jnp.asarray(logits))
    assert not np.asarray(gradient[:, :, 3:]).any() and np.asarray(gradient[:, :, :3]).any()


@pytest.mark.parametrize("term", ["cross_entropy", "focal", "dice"])
def test_no_pixels_and_no_class(term: str) -> None:
    none = np.full_like(LABELS, 255)
    assert np.isnan(float(PixelLoss(parse_terms(term))(ON_DEVICE, none, 255)[term]))  # type: ignore[index]
    how = PixelLoss(parse_terms(term), empty=0.0)
    loss, gradient = jax.value_and_grad(lambda logits: how.total(how(logits, none, 255)))(ON_DEVICE)
    assert float(loss) == 0.0 and not np.asarray(gradient).any()
    wrong = np.where(LABELS == 0, 7, LABELS)
    with pytest.raises(BeitJaxError, match="labels: expected numbers of classes, 0 to 4 or 255"):
        how(ON_DEVICE, wrong, 255)
    assert np.isnan(float(jax.jit(lambda labels: how.total(how(ON_DEVICE, labels, 255)))(wrong)))


@pytest.mark.parametrize("terms", ["cross_entropy", "cross_entropy+focal+dice"])
def test_memory_is_that_of_bands(terms: str) -> None:
    """The resized logits of these labels would take 52 MB."""
    how = PixelLoss(parse_terms(terms))
    shapes = jax.ShapeDtypeStruct((1, 16, 16, 50), jnp.float32), jax.ShapeDtypeStruct((1, 512, 512), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda logits, labels: how.total(how(logits, labels, 255))))
    memory = step.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 26e6


@pytest.mark.parametrize(
    "text", ["", "crossentropy", "dice+dice", "0*dice", "dice*2", "-1*dice", "dice,focal", "1e999*dice"]
)
def test_losses_that_are_none(text: str) -> None:
    with pytest.raises(
        BeitJaxError, match=r"--segment\.loss: expected cross_entropy, focal, dice or a sum of different"
    ):
        parse_terms(text)


def test_sums_of_losses() -> None:
    assert parse_terms(" 0.5 * dice + 1e+1*focal ") == {"dice": 0.5, "focal": 10.0}
