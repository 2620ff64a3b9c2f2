"""Normalising, erasing and mixing on the device: invariants and distributions. timm's results: tests/parity."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from beit_jax.errors import BeitJaxError
from beit_jax.train.augmentation.mixing import (
    Boxes,
    apply_erasing,
    apply_mixing,
    cut_box,
    draw_cut,
    draw_erasing,
    draw_mixing,
    erase,
    mix,
    normalise,
    soft_targets,
)
from beit_jax.train.recipe import STATISTICS, AugmentOptions

SIZE = (20, 30)
LIKELY = 1e-3  # p-value below which draws of a fixed seed would not be of the distribution they claim
ROUNDING = 1e-6
MIXUP, CUTMIX = AugmentOptions(mixup=0.8), AugmentOptions(cutmix=1.0)
BOTH = AugmentOptions(mixup=0.8, cutmix=1.0)


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("statistics", ["half", "imagenet"])
def test_normalised_pixels(statistics: Any) -> None:
    values = np.arange(256, dtype=np.uint8)
    images = np.broadcast_to(values.reshape(1, 16, 16, 1), (1, 16, 16, 3))
    mean, deviation = (np.array(part) for part in STATISTICS[statistics])
    found = jax.jit(normalise, static_argnums=1)(images, statistics)
    assert found.dtype == jnp.float32
    assert_allclose(found, (images / 255.0 - mean) / deviation, rtol=0, atol=ROUNDING)


@given(labels=st.lists(st.integers(0, 6), min_size=4, max_size=4), smoothing=st.floats(0, 0.99))
def test_soft_targets_are_distributions(labels: list[int], smoothing: float) -> None:
    found = np.asarray(soft_targets(jnp.asarray(labels), 7, smoothing))
    assert_allclose(found.sum(axis=1), 1.0, rtol=0, atol=ROUNDING)
    assert (found >= 0).all()
    assert_allclose(found[range(4), labels], 1 - smoothing + smoothing / 7, rtol=0, atol=ROUNDING)
    others = found[np.arange(7) != np.array(labels)[:, None]]
    assert_allclose(others, smoothing / 7, rtol=0, atol=ROUNDING)


# Erasing


@pytest.fixture(scope="module")
def rectangles() -> np.ndarray:
    """Top, bottom, left, right [4, 4000] in images of SIZE."""
    return np.stack(draw_erasing(jax.random.key(0), SIZE, 4000, 1.0))


def test_rectangles_lie_in_the_image_and_have_their_area(rectangles: np.ndarray) -> None:
    top, bottom, left, right = rectangles
    rows, columns = bottom - top, right - left
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= SIZE[0]).all() and (right <= SIZE[1]).all()
    # Half a pixel of rounding on either side of the exact lengths.
    assert ((rows + 0.5) * (columns + 0.5) >= 0.02 * 600).all()
    assert ((rows - 0.5) * (columns - 0.5) <= 600 / 3).all()
    assert ((rows + 0.5) / (columns - 0.5) >= 0.3).all() and ((rows - 0.5) / (columns + 0.5) <= 1 / 0.3).all()
    assert (rows < SIZE[0]).all() and (columns < SIZE[1]).all()
    assert rows.max() == SIZE[0] - 1  # tall ones are drawn as far as they fit


def test_rectangles_have_the_distribution_of_their_definition() -> None:
    side = 10_000  # fine enough for continuous distributions; only areas that fit at any aspect are looked at
    top, bottom, left, right = np.stack(draw_erasing(jax.random.key(1), (side, side), 4000, 1.0)).astype(float)
    rows, columns = bottom - top, right - left
    area = rows * columns / side**2
    assert 0.02 < area.min() < 0.021 and 0.33 < area.max() < 1 / 3
    small = area < 0.25
    assert stats.kstest((area[small] - 0.02) / 0.23, "uniform").pvalue > LIKELY
    aspect = np.log(rows / columns)[small] / np.log(1 / 0.3) / 2 + 0.5
    assert stats.kstest(aspect, "uniform").pvalue > LIKELY
    for start, length in ((top, rows), (left, columns)):
        assert stats.kstest(start / (side - length), "uniform").pvalue > LIKELY
    assert stats.spearmanr(area[small], aspect).pvalue > LIKELY


def test_places_reach_both_ends(rectangles: np.ndarray) -> None:
    top, bottom, left, right = rectangles
    assert top.min() == 0 and left.min() == 0 and bottom.max() == SIZE[0] and right.max() == SIZE[1]


def test_share_of_erased_images() -> None:
    top, bottom, *_ = draw_erasing(jax.random.key(0), SIZE, 4000, 0.25)
    assert stats.binomtest(int((bottom > top).sum()), 4000, 0.25).pvalue > LIKELY


def test_images_where_nothing_fits_stay() -> None:
    images = jnp.ones((8, 1, 1, 3))
    assert_array_equal(erase(jax.random.key(0), images, 1.0), images)


def test_noise_fills_the_rectangles_and_nothing_else() -> None:
    images = jnp.full((400, *SIZE, 3), 7.0)
    found = np.asarray(jax.jit(erase, static_argnums=2)(jax.random.key(0), images, 0.5))
    erased = (found != 7.0).any(axis=-1)
    for mask in erased:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask.sum() == len(rows) * len(columns)
        assert not mask.any() or mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    noise = found[erased]
    assert stats.kstest(noise.ravel()[:5000], "norm").pvalue > LIKELY
    assert abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.02  # channels have their own noise
    assert_array_equal(erase(jax.random.key(0), images, 0.0), images)


def test_rectangles_are_applied_to_their_images() -> None:
    images, noise = jnp.zeros((2, 4, 5, 3)), jnp.ones((2, 4, 5, 3))
    boxes = Boxes(*(jnp.array(edges) for edges in ((1, 0), (3, 0), (2, 0), (5, 0))))
    expected = np.zeros((2, 4, 5, 3))
    expected[0, 1:3, 2:5] = 1
    assert_array_equal(apply_erasing(images, boxes, noise), expected)


# Mixing


@pytest.mark.parametrize("options", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])
def test_labels_are_mixed_as_much_as_pixels(options: AugmentOptions) -> None:
    """Images that show nothing but their target, so that the mean pixel is what the mixed target must be."""
    targets = jax.nn.one_hot(jnp.arange(6), 6)
    images = jnp.broadcast_to(targets[:, None, None], (6, *SIZE, 6))
    mixed = jax.jit(lambda *arrays: mix(*arrays, options))
    for key in keys(20):
        found, labels = mixed(key, images, targets)
        assert_allclose(found.mean(axis=(1, 2)), labels, rtol=0, atol=ROUNDING)
        assert_allclose(labels.sum(axis=1), 1, rtol=0, atol=ROUNDING)
        assert_allclose(found + found[::-1], images + images[::-1], rtol=0, atol=ROUNDING)
        assert (labels * (1 - targets - targets[::-1]) == 0).all()  # the partner is the mirrored place
    assert mixed._cache_size() == 1


def test_cut_images_hold_whole_pixels() -> None:
    images = jax.random.normal(jax.random.key(1), (4, *SIZE, 3))
    cut = jax.jit(lambda key: mix(key, images, jnp.ones((4, 2)), CUTMIX)[0])
    for key in keys(10):
        found = cut(key)
        own, partner = (found == images).all(axis=-1), (found == images[::-1]).all(axis=-1)
        assert (own ^ partner).all()
        assert (partner == partner[0]).all()  # one rectangle for the batch


def test_shares_have_their_beta_distribution() -> None:
    options, fine = AugmentOptions(mixup=4.0, cutmix=0.4), (20_000, 20_000)
    draw = jax.jit(jax.vmap(lambda key: draw_mixing(key, fine, options)))(keys(3000))
    blended, cut = np.asarray(draw.share)[~draw.cut], np.asarray(draw.cut)
    assert stats.kstest(blended, stats.beta(4.0, 4.0).cdf).pvalue > LIKELY
    top, bottom = (np.asarray(edges)[cut].astype(float) for edges in draw.box[:2])
    whole = (top > 0) & (bottom < fine[0])  # a side that no border has clipped is the drawn one
    shares = 1 - ((bottom - top)[whole] / fine[0]) ** 2
    # A side of s is whole with probability 1 - s, so that short ones are met more often.
    grid = np.linspace(0, 1, 100_001)
    weights = stats.beta(0.4, 0.4).pdf(grid[1:-1]) * (1 - np.sqrt(1 - grid[1:-1]))
    assert stats.kstest(shares, lambda x: np.interp(x, grid[1:-1], np.cumsum(weights) / weights.sum())).pvalue > LIKELY


def test_cuts_have_the_area_of_their_share_before_the_border() -> None:
    draw = jax.jit(jax.vmap(lambda key: draw_mixing(key, SIZE, CUTMIX)))(keys(3000))
    top, bottom, left, right = (np.asarray(edges) for edges in draw.box)
    assert draw.cut.all()
    assert_allclose(draw.share, 1 - (bottom - top) * (right - left) / 600, rtol=0, atol=ROUNDING)
    assert top.min() == 0 and left.min() == 0 and bottom.max() == SIZE[0] and right.max() == SIZE[1]
    inside = (top > 0) & (bottom < SIZE[0]) & (left > 0) & (right < SIZE[1])
    ratios = (bottom - top)[inside] / (right - left)[inside].clip(1)
    assert np.median(ratios) == pytest.approx(SIZE[0] / SIZE[1], abs=0.05)


@pytest.mark.parametrize(
    ("share", "row", "column", "expected"),
    [
        (0.75, 10, 15, (5, 15, 8, 23)),  # half of each side: 10 rows, 15 columns, the odd one after the centre
        (0.75, 0, 29, (0, 5, 22, 30)),
        (1.0, 3, 4, (3, 3, 4, 4)),
        (0.0, 10, 15, (0, 20, 0, 30)),
        (0.0, 0, 0, (0, 10, 0, 15)),
    ],
)
def test_cut_boxes(share: float, row: int, column: int, expected: tuple[int, ...]) -> None:
    assert tuple(map(int, cut_box(SIZE, jnp.asarray(share), jnp.array([row, column])))) == expected


def test_centres_of_cuts_are_uniform() -> None:
    almost = jnp.asarray(1 - 1.01 / 400)  # one pixel of 20 x 20: the rectangle is its centre
    boxes = jax.jit(jax.vmap(lambda key: draw_cut(key, (20, 20), almost)))(keys(4000))
    for start, end in ((boxes.top, boxes.bottom), (boxes.left, boxes.right)):
        assert (end - start == 1).all()
        assert stats.chisquare(np.bincount(start, minlength=20)).pvalue > LIKELY


@pytest.mark.parametrize(
    ("options", "mixed", "cut"),
    [
        (replace(BOTH, mix_switch=0.3), 1.0, 0.3),
        (replace(BOTH, mix_switch=1.0, mix_probability=0.4), 0.4, 0.4),
        (replace(MIXUP, mix_switch=1.0), 1.0, 0.0),
        (replace(CUTMIX, mix_switch=0.0, mix_probability=0.5), 0.5, 0.5),
    ],
)
def test_shares_of_batches(options: AugmentOptions, mixed: float, cut: float) -> None:
    draw = jax.jit(jax.vmap(lambda key: draw_mixing(key, SIZE, options)))(keys(2000))
    cuts = np.asarray(draw.cut)
    assert stats.binomtest(int(cuts.sum()), 2000, cut).pvalue > LIKELY
    blends = np.asarray(draw.share)[~cuts] < 1
    if mixed > cut:
        assert blends.mean() > 0.99 * (mixed - cut)
    else:
        assert not blends.any()
    assert all((np.asarray(edges)[~cuts] == 0).all() for edges in draw.box)


def test_what_is_not_mixed_stays() -> None:
    images, targets = jax.random.normal(jax.random.key(1), (4, *SIZE, 3)), jax.nn.one_hot(jnp.arange(4), 5)
    for options in (AugmentOptions(), replace(BOTH, mix_probability=0.0)):
        found, labels = mix(jax.random.key(0), images, targets, options)
        assert_array_equal(found, images)
        assert_array_equal(labels, targets)


def test_applied_mixing_keeps_the_dtype() -> None:
    images, targets = jnp.ones((2, *SIZE, 3), jnp.bfloat16), jnp.ones((2, 5), jnp.float32)
    found, labels = apply_mixing(images, targets, draw_mixing(jax.random.key(0), SIZE, MIXUP))
    assert (found.dtype, labels.dtype) == (jnp.bfloat16, jnp.float32)


def test_odd_batches_have_no_partners() -> None:
    with pytest.raises(BeitJaxError, match="expected an even batch, found 3"):
        mix(jax.random.key(0), jnp.ones((3, *SIZE, 3)), jnp.ones((3, 5)), MIXUP)
