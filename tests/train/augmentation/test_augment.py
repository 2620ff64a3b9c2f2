"""Training images on the host: what is drawn, and that what is drawn is what happens. timm's pixels: tests/parity."""

import math
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image, ImageEnhance, ImageFilter
from scipy import stats

from beit_jax.errors import BeitJaxError
from beit_jax.train.augmentation.classification import TrainTransform, draw_box, draw_jitter, train_transform
from beit_jax.train.augmentation.randaugment import OPERATIONS, Operation, RandAugment, argument, perform
from beit_jax.train.augmentation.smooth import smooth
from beit_jax.train.recipe import AugmentOptions

MEAN = (0.485, 0.456, 0.406)
PLAIN = AugmentOptions(randaugment=None, flip=0.0)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
LIKELY = 1e-3  # p-value below which draws of a fixed seed would not be of the distribution they claim


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def transform(**options: object) -> TrainTransform:
    return train_transform(replace(AugmentOptions(), **options), (24, 32), MEAN)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("randaugment", [None, "rand-m9-mstd0.5-inc1", "rand-m7-n4-p1"])
def test_result_is_a_function_of_the_generator_alone(interpolation: str, randaugment: str | None) -> None:
    image = noise(50, 37)
    ours = transform(interpolation=interpolation, randaugment=randaugment, color_jitter=0.4)
    sent = pickle.loads(pickle.dumps(ours))  # as worker processes get it
    first, again = ours(image, rng(3)), sent(image, rng(3))
    assert first.shape == (24, 32, 3) and first.dtype == np.uint8
    assert_array_equal(first, again)
    assert len({ours(image, rng(seed)).tobytes() for seed in range(8)}) == 8
    assert_array_equal(image, noise(50, 37))


def test_workers_do_not_import_jax() -> None:
    check = "import sys, beit_jax.train.augmentation.classification; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# The crop


sides = st.integers(1, 700)


@given(width=sides, height=sides, seed=st.integers(0, 99), low=st.floats(0.01, 1.0), ratio=st.floats(0.2, 1.0))
def test_crops_lie_in_the_image(width: int, height: int, seed: int, low: float, ratio: float) -> None:
    left, top, right, bottom = draw_box((width, height), (low, 1.0), (ratio, 1 / ratio), rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_crops_have_the_distribution_of_their_definition() -> None:
    generator, side = rng(), 10_000
    boxes = np.array([draw_box((side, side), (0.08, 0.5), (3 / 4, 4 / 3), generator) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    shares = {
        "area": (width * height / side**2 - 0.08) / 0.42,
        "aspect": (np.log(width / height) - math.log(3 / 4)) / math.log(16 / 9),
        "left": left / (side - width),
        "top": top / (side - height),
    }
    for name, values in shares.items():
        assert stats.kstest(values, "uniform").pvalue > LIKELY, name
    for first, second in (("area", "aspect"), ("left", "top"), ("area", "left")):
        assert stats.spearmanr(shares[first], shares[second]).pvalue > LIKELY, (first, second)


def test_crops_reach_both_ends() -> None:
    boxes = np.array([draw_box((6, 5), (0.3, 0.7), (3 / 4, 4 / 3), rng(seed)) for seed in range(300)])
    assert boxes.min(axis=0)[:2].tolist() == [0, 0] and boxes.max(axis=0)[2:].tolist() == [6, 5]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((30, 1000), (0, 480, 30, 520)),  # narrow: 30 / (3/4) = 40 rows in the middle
        ((1000, 30), (480, 0, 520, 30)),  # wide: 30 * 4/3 columns
        ((31, 1001), (0, 480, 31, 521)),  # odd: rounded down, as timm
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_what_never_fits_is_cropped_in_the_centre(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert all(draw_box(size, (1.0, 1.0), (3 / 4, 4 / 3), rng(seed)) == box for seed in range(20))


def test_a_crop_knows_nothing_of_its_surroundings() -> None:
    ours, inner = transform(randaugment=None), noise(40, 30)
    draws = replace(ours.draw((100, 90), rng()), box=(20, 10, 60, 40))
    results = []
    for value in (0, 255):
        image = Image.new("RGB", (100, 90), (value,) * 3)
        image.paste(inner, (20, 10))
        results.append(ours.apply(image, draws))
    assert_array_equal(*results)


def test_flips_mirror_the_crop() -> None:
    image = noise(50, 37)
    kept, flipped = (train_transform(replace(PLAIN, flip=share), (24, 32), MEAN) for share in (0.0, 1.0))
    for seed in range(5):
        assert_array_equal(flipped(image, rng(seed)), kept(image, rng(seed))[:, ::-1])
    half = transform(flip=0.5)
    flips = sum(half.draw((50, 37), generator).flip for generator in [rng()] for _ in range(1000))
    assert stats.binomtest(flips, 1000).pvalue > LIKELY


def test_randaugment_has_no_lanczos_filter() -> None:
    with pytest.raises(BeitJaxError, match=r"--augment\.interpolation: .* found lanczos; .*randaugment None$"):
        transform(interpolation="lanczos")
    image, ours = noise(50, 37), transform(interpolation="lanczos", randaugment=None, flip=0.0)
    draws = ours.draw((50, 37), rng())
    assert_array_equal(ours.apply(image, draws), image.crop(draws.box).resize((32, 24), Image.Resampling.LANCZOS))


def test_random_interpolation_takes_both_filters() -> None:
    draws = [transform(interpolation="random", randaugment="rand-p1").draw((50, 37), rng(seed)) for seed in range(50)]
    assert {draw.resample for draw in draws} == {BILINEAR, BICUBIC}
    assert {operation.resample for draw in draws for operation in draw.operations} == {BILINEAR, BICUBIC}


# RandAugment


def test_notation() -> None:
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(2, 9, 0.5, 10, True, 0.5)
    assert RandAugment.parse("rand") == RandAugment(2, 10, 0.0, 10, False, 0.5)
    assert RandAugment.parse("rand-p0.25-mmax12-n3-inc0-m11-mstd101") == RandAugment(3, 11, 101.0, 12, False, 0.25)


@pytest.mark.parametrize(
    "text",
    ["", "augmix-m3", "rand-w0", "rand-tweights", "rand-m9.5", "rand-m", "rand-m9-m9", "rand-n0", "rand-p1.5",
     "rand-inc2", "rand-inc01", "rand-mmax0", "rand-mstdinf", "rand-m-9", "rand--m9", "rand-m9\n-n2", "rand-m٣"],
)  # fmt: skip
def test_other_notation_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BeitJaxError, match=r"^--augment\.randaugment: expected .*, found [ -~]*$"):
        train_transform(replace(PLAIN, randaugment=text), (24, 32), MEAN)


def test_policies_draw_what_they_say() -> None:
    policy, generator = RandAugment.parse("rand-m9-mstd0.5-inc1"), rng()
    drawn = [policy.draw(generator, (BICUBIC,)) for _ in range(6000)]
    lengths, operations = Counter(map(len, drawn)), [operation for draw in drawn for operation in draw]
    assert stats.chisquare([lengths[count] for count in range(3)], [1500, 3000, 1500]).pvalue > LIKELY
    names = Counter(operation.name for operation in operations)
    assert stats.chisquare([names[name] for name in OPERATIONS]).pvalue > LIKELY
    pairs = Counter(first.name == second.name for first, second in (draw for draw in drawn if len(draw) == 2))
    assert stats.binomtest(pairs[True], lengths[2], 1 / 15).pvalue > LIKELY  # with replacement
    degrees = np.array([operation.argument for operation in operations if operation.name == "Rotate"])
    levels = np.abs(degrees) / 3
    assert stats.binomtest(int((degrees < 0).sum()), len(degrees)).pvalue > LIKELY
    assert stats.kstest(np.where(levels < 10, levels, 10.5), stats.norm(9, 0.5).cdf).statistic < 0.1
    assert stats.binomtest(int((levels == 10).sum()), len(levels), stats.norm.sf(2)).pvalue > LIKELY


def test_other_deviations() -> None:
    def degrees(text: str) -> np.ndarray:
        generator, policy = rng(), RandAugment.parse(text)
        drawn = (operation for _ in range(4000) for operation in policy.draw(generator, (BICUBIC,)))
        return np.abs([operation.argument for operation in drawn if operation.name == "Rotate"]) / 3

    assert set(degrees("rand-m9")) == {9.0}
    assert set(degrees("rand-m30")) == {10.0} and set(degrees("rand-m30-mmax20")) == {20.0}
    assert stats.kstest(degrees("rand-m8-mstd101") / 8, "uniform").pvalue > LIKELY


@pytest.mark.parametrize(
    ("name", "increasing", "at_5", "at_10"),
    [
        ("Rotate", True, 15, 30),
        ("ShearX", True, 0.15, 0.3),
        ("ShearY", False, 0.15, 0.3),
        ("TranslateXRel", True, 0.225, 0.45),
        ("TranslateYRel", False, 0.225, 0.45),
        ("Posterize", True, 2, 0),
        ("Posterize", False, 2, 4),
        ("Solarize", True, 128, 0),
        ("Solarize", False, 128, 256),
        ("SolarizeAdd", True, 55, 110),
        ("Color", True, 1.45, 1.9),
        ("Contrast", False, 1.0, 1.9),
        ("Brightness", True, 1.45, 1.9),
        ("Sharpness", False, 1.0, 1.9),
        ("Invert", True, 0, 0),
    ],
)
def test_arguments(name: str, increasing: bool, at_5: float, at_10: float) -> None:
    found = [argument(name, level, False, increasing=increasing) for level in (5, 10)]
    assert found == pytest.approx([at_5, at_10])
    mirrored = argument(name, 5, True, increasing=increasing)
    if name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):
        assert mirrored == -found[0]
    elif name in ("Color", "Brightness"):
        assert mirrored == pytest.approx(2 - found[0])
    else:
        assert mirrored == found[0]


def test_enhancements_stop_at_a_tenth() -> None:
    assert argument("Color", 12, True, increasing=True) == 0.1  # levels beyond 10 come from mmax


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Operation("Invert", 0), lambda x: 255 - x),
        (Operation("Posterize", 3), lambda x: x // 32 * 32),
        (Operation("Posterize", 0), lambda x: 0 * x),
        (Operation("Posterize", -1), lambda x: 0 * x),
        (Operation("Posterize", 8), lambda x: x),
        (Operation("Solarize", 100), lambda x: np.where(x < 100, x, 255 - x)),
        (Operation("Solarize", 256), lambda x: x),
        (Operation("SolarizeAdd", 90), lambda x: np.where(x < 128, x + 90, x)),
        (Operation("SolarizeAdd", 128), lambda x: np.where(x < 128, np.minimum(x + 128, 255), x)),
        (Operation("Brightness", 0.5), lambda x: x // 2),
        (Operation("Color", 0), lambda x: np.repeat((x @ [19595, 38470, 7471] + 2**15 >> 16)[..., None], 3, axis=-1)),
        (Operation("TranslateXRel", 0.25), lambda x: np.concatenate([x[:, 4:], np.full_like(x[:, :4], 9)], axis=1)),
        (Operation("TranslateYRel", -0.25), lambda x: np.concatenate([np.full_like(x[:4], 9), x[:-4]], axis=0)),
        (Operation("ShearX", 0.0), lambda x: x),
        (Operation("Rotate", 180), lambda x: x[::-1, ::-1]),
    ],
)  # fmt: skip
def test_operations(operation: Operation, expected: object) -> None:
    image = noise(16, 16)
    found = np.asarray(perform(image, operation, (9, 9, 9)))
    assert_array_equal(found, expected(np.asarray(image).astype(int)))  # type: ignore[operator]
    assert_array_equal(image, noise(16, 16))


def test_an_unknown_operation_is_an_error() -> None:
    with pytest.raises(ValueError, match="operation Cutout"):
        perform(noise(4, 4), Operation("Cutout", 0), (0, 0, 0))


# Smoothing


@given(size=st.tuples(st.integers(1, 80), st.integers(1, 80)), seed=st.integers(0, 9), flat=st.booleans())
def test_smoothing_is_pillows_filter(size: tuple[int, int], seed: int, flat: bool) -> None:
    image = noise(*size, seed)
    if flat:
        image = image.point([value // 128 * 255 for value in range(256)] * 3)
    assert_array_equal(smooth(image), image.filter(ImageFilter.SMOOTH))


@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 1.9])
def test_sharpness_is_pillows(factor: float) -> None:
    image = noise(50, 37)
    expected = ImageEnhance.Sharpness(image).enhance(factor)
    assert_array_equal(perform(image, Operation("Sharpness", factor), (0, 0, 0)), expected)


# Colour jitter


def test_jitter_draws_every_order_and_uniform_factors() -> None:
    generator = rng()
    drawn = [draw_jitter(0.4, generator) for _ in range(3000)]
    orders = Counter(tuple(operation.name for operation in draw) for draw in drawn)
    assert len(orders) == 6 and stats.chisquare(list(orders.values())).pvalue > LIKELY
    for name in ("Brightness", "Contrast", "Color"):
        factors = np.array([operation.argument for draw in drawn for operation in draw if operation.name == name])
        assert stats.kstest((factors - 0.6) / 0.8, "uniform").pvalue > LIKELY
    strong = [operation.argument for _ in range(200) for operation in draw_jitter(1.5, generator)]
    assert 0 <= min(strong) < 0.1 and 2.4 < max(strong) <= 2.5


def test_jitter_gives_way_to_randaugment() -> None:
    image = noise(50, 37)
    jittered, both = transform(color_jitter=0.4, randaugment=None), transform(color_jitter=0.4)
    assert len(jittered.draw((50, 37), rng()).operations) == 3
    assert_array_equal(both(image, rng()), transform(color_jitter=0.0)(image, rng()))
    assert draw_jitter(0.0, rng()) == ()


def test_pixels_moved_in_have_the_mean_colour() -> None:
    ours = transform(randaugment="rand-m10-p1")
    draws = replace(ours.draw((50, 37), rng()), operations=(Operation("TranslateXRel", 0.45),))
    assert_array_equal(ours.apply(noise(50, 37), draws)[:, -14:], np.broadcast_to([124, 116, 104], (24, 14, 3)))
