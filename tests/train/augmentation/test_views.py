"""Views of pre-training images: one region for both, and what is drawn. torchvision's pixels: tests/parity."""

import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from scipy import stats

from beit_jax.train.augmentation.classification import Draws
from beit_jax.train.augmentation.masking import BlockMask
from beit_jax.train.augmentation.randaugment import Operation
from beit_jax.train.augmentation.views import ViewsTransform
from beit_jax.train.recipe import AugmentOptions, MaskOptions

LIKELY = 1e-3  # p-value below which draws of a fixed seed would not be of the distribution they claim
OPTIONS = AugmentOptions(randaugment=None, color_jitter=0.4)
BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
BOTH = ViewsTransform(OPTIONS, (32, 48), (16, 24), "lanczos", BlockMask((4, 6), MaskOptions(patches=9, min_block=2)))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(width: int, height: int) -> Image.Image:
    """Red says the column and green the row, at 0.5 a pixel."""
    rows, columns = np.mgrid[:height, :width] // 2
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_shapes_and_types() -> None:
    views = BOTH(noise(50, 37), rng())
    assert {name: (value.shape, value.dtype) for name, value in views.items()} == {
        "image": ((32, 48, 3), np.uint8),
        "token_image": ((16, 24, 3), np.uint8),
        "mask": ((24,), np.bool_),
    }


def test_views_are_a_function_of_the_generator_alone() -> None:
    image, sent = noise(50, 37), pickle.loads(pickle.dumps(BOTH))  # as worker processes get it
    first, again = BOTH(image, rng(3)), sent(image, rng(3))
    for name in ("image", "token_image", "mask"):
        assert_array_equal(first[name], again[name])
    assert len({BOTH(image, rng(seed))["image"].tobytes() for seed in range(8)}) == 8
    assert_array_equal(image, noise(50, 37))


def test_views_that_are_not_wanted_are_absent_and_change_nothing() -> None:
    image, full = noise(50, 37), BOTH(noise(50, 37), rng(5))
    for transform, names in (
        (replace(BOTH, token_size=None), {"image", "mask"}),
        (replace(BOTH, mask=None), {"image", "token_image"}),
        (replace(BOTH, token_size=None, mask=None), {"image"}),
    ):
        views = transform(image, rng(5))
        assert set(views) == names
        for name in names:
            assert_array_equal(views[name], full[name])


def test_masks_follow_from_the_generator_too() -> None:
    assert BOTH.mask is not None
    generator = rng(3)
    BOTH.draw((50, 37), generator)
    assert_array_equal(BOTH(noise(50, 37), rng(3))["mask"], BOTH.mask(generator))


def test_both_views_show_the_same_region() -> None:
    """Colours that say where a pixel comes from: whatever is drawn, both views begin and end at the same places.

    A view's pixel i of n shows the region's (i + 0.5) / n-th part: where in the image follows for the middle pixels,
    linear filters keeping a ramp. They agree within a pixel of 200 (half a level), plus the rounding of levels.
    """
    image = ramp(400, 300)
    transform = replace(BOTH, options=replace(OPTIONS, color_jitter=0.0))
    for seed in range(60):
        draws = transform.draw(image.size, rng(seed))
        views = transform.apply(image, draws)
        left, top, right, bottom = draws.box
        for name, view in views.items():
            height, width = view.shape[:2]
            columns = left + (np.arange(width) + 0.5) / width * (right - left) - 0.5
            rows = top + (np.arange(height) + 0.5) / height * (bottom - top) - 0.5
            columns = 399 - columns if draws.flip else columns
            inner = np.s_[4:-4, 4:-4]
            red, green = np.broadcast_arrays(columns / 2 - 0.25, (rows / 2 - 0.25)[:, None])
            found = view.astype(float)
            assert np.abs(found[..., 0] - red)[inner].max() <= 1, (name, draws)
            assert np.abs(found[..., 1] - green)[inner].max() <= 1, (name, draws)


def test_equal_sizes_and_filters_give_equal_views() -> None:
    transform = replace(BOTH, token_size=BOTH.size, token_interpolation="bicubic")
    for seed in range(10):
        views = transform(noise(90, 70), rng(seed))
        assert_array_equal(views["image"], views["token_image"])


def test_each_view_has_its_own_filter() -> None:
    image, draws = noise(60, 40), Draws((10, 5, 50, 37), BICUBIC, False, ())
    views = BOTH.apply(image, draws)
    crop = image.crop(draws.box)
    assert_array_equal(views["image"], crop.resize((48, 32), BICUBIC))
    assert_array_equal(views["token_image"], crop.resize((24, 16), LANCZOS))
    bicubic = replace(BOTH, token_interpolation="bicubic").apply(image, draws)
    assert_array_equal(bicubic["token_image"], crop.resize((24, 16), BICUBIC))
    assert not np.array_equal(bicubic["token_image"], views["token_image"])


@pytest.mark.parametrize(
    ("interpolation", "filters"),
    [
        ("bilinear", {Image.Resampling.BILINEAR}),
        ("bicubic", {BICUBIC}),
        ("lanczos", {LANCZOS}),
        ("random", {Image.Resampling.BILINEAR, BICUBIC}),
    ],
)
def test_filters_of_the_students_view(interpolation: str, filters: set[Image.Resampling]) -> None:
    transform = replace(BOTH, options=replace(OPTIONS, interpolation=interpolation))
    assert {transform.draw((50, 37), rng(seed)).resample for seed in range(40)} == filters


# What is drawn


def test_flips_and_crops_have_the_distribution_of_their_options() -> None:
    options = replace(OPTIONS, flip=0.3, crop_scale=(0.2, 0.5))
    transform, generator, side = replace(BOTH, options=options), rng(), 10_000
    drawn = [transform.draw((side, side), generator) for _ in range(3000)]
    flips = np.array([draws.flip for draws in drawn])
    assert stats.binomtest(int(flips.sum()), len(flips), 0.3).pvalue > LIKELY
    left, top, right, bottom = np.array([draws.box for draws in drawn]).T
    width, height = right - left, bottom - top
    shares = {
        "area": (width * height / side**2 - 0.2) / 0.3,
        "aspect": (np.log(width / height) / np.log(4 / 3) + 1) / 2,
        "left": left / (side - width),
        "top": top / (side - height),
    }
    for name, values in shares.items():
        assert stats.kstest(values, "uniform").pvalue > LIKELY, name
        assert stats.ks_2samp(values[flips], values[~flips]).pvalue > LIKELY, name
    for name in ("Brightness", "Contrast", "Color"):
        factors = [operation.argument for draws in drawn for operation in draws.operations if operation.name == name]
        assert stats.kstest((np.array(factors) - 0.6) / 0.8, "uniform").pvalue > LIKELY, name


def test_no_jitter_and_no_flip() -> None:
    still = replace(BOTH, options=replace(OPTIONS, color_jitter=0.0, flip=0.0))
    drawn = [still.draw((50, 37), rng(seed)) for seed in range(50)]
    assert all(draws.operations == () and not draws.flip for draws in drawn)
    always = replace(BOTH, options=replace(OPTIONS, flip=1.0))
    assert all(always.draw((50, 37), rng(seed)).flip for seed in range(50))


# What is done with it


def test_flips_mirror_both_views() -> None:
    image, box = noise(60, 40), (0, 3, 60, 33)
    kept, flipped = (BOTH.apply(image, Draws(box, BICUBIC, flip, ())) for flip in (False, True))
    for name in kept:
        assert_array_equal(flipped[name], kept[name][:, ::-1])


def test_the_box_is_of_the_flipped_image() -> None:
    image = ramp(400, 300)
    view = BOTH.apply(image, Draws((0, 0, 96, 64), BICUBIC, True, ()))["image"]
    assert view[:, :, 0].min() >= (400 - 96) // 2 - 1


def test_contrast_is_of_the_whole_image() -> None:
    """Without contrast every pixel is the mean, which here is that of what the crop does not show."""
    image = Image.new("RGB", (100, 100), (200, 200, 200))
    image.paste((0, 0, 0), (0, 0, 10, 10))
    views = BOTH.apply(image, Draws((0, 0, 10, 10), BICUBIC, False, (Operation("Contrast", 0.0),)))
    assert set(np.unique(views["image"])) == set(np.unique(views["token_image"])) == {198}


def test_operations_come_in_their_order() -> None:
    """Grey that is brightened first saturates."""
    image, (bright, dark) = Image.new("RGB", (9, 9), (128,) * 3), (Operation("Brightness", by) for by in (4, 0.25))
    for operations, value in (((bright, dark), 255 // 4), ((dark, bright), 128)):
        assert (BOTH.apply(image, Draws((0, 0, 9, 9), BICUBIC, False, operations))["image"] == value).all()


def test_a_crop_knows_nothing_of_its_surroundings() -> None:
    results = []
    for value in (0, 255):
        image = Image.new("RGB", (100, 90), (value,) * 3)
        image.paste(noise(40, 30), (20, 10))
        results.append(BOTH.apply(image, Draws((20, 10, 60, 40), BICUBIC, False, ())))
    for name in results[0]:
        assert_array_equal(results[0][name], results[1][name])


def test_workers_do_not_import_jax() -> None:
    check = "import sys, beit_jax.train.augmentation.views; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
