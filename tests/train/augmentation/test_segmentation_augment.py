"""Scaling, cropping and colours of images with label maps.

The images made here show their labels as colours, so that what happens to one can be compared with the other.
"""

import colorsys
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from beit_jax.images import ImageProcessor
from beit_jax.images.label_maps import IGNORED
from beit_jax.train.augmentation.segmentation import (
    FACTORS,
    HUES,
    CropTransform,
    Draws,
    distort,
    draw_corner,
    draw_distortions,
    draw_size,
    from_hsv,
    is_mixed,
    scaled_part,
    segmentation_transform,
    to_hsv,
)
from beit_jax.train.objectives.segmentation import SegmentationOptions

# What is 32 pixels high stays so.
PLAIN = SegmentationOptions(scale=(64, 32), ratio=(1.0, 1.0), max_class_share=1.0, flip=0.0, photometric=False)
COLOURS = np.random.default_rng(0).integers(1, 256, (256, 3), dtype=np.uint8)
COLOURS[IGNORED] = 0


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scene(height: int, width: int, tile: int = 1) -> tuple[Image.Image, np.ndarray]:
    """Tiles of different classes, each in its colour."""
    rows, columns = np.arange(height)[:, None] // tile, np.arange(width)[None] // tile
    labels = ((rows * 13 + columns) % 150).astype(np.uint8)
    return Image.fromarray(COLOURS[labels]), labels


def noise(height: int, width: int) -> np.ndarray:
    return generator(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Geometry


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", [16, 40])  # inside the image, and beyond it
def test_pixels_and_labels_move_together(crop: int, flip: float) -> None:
    image, labels = scene(32, 48)
    options = replace(PLAIN, max_class_share=0.75, flip=flip)
    transform = segmentation_transform(options, crop)
    for seed in range(20):
        pixels, classes = transform(image, labels, generator(seed))
        assert (pixels.dtype, pixels.shape) == (np.uint8, (crop, crop, 3))
        assert (classes.dtype, classes.shape) == (np.int32, (crop, crop))
        np.testing.assert_array_equal(pixels, COLOURS[classes])


@pytest.mark.parametrize(("height", "width"), [(90, 60), (40, 100), (33, 31)])
def test_scaled_pixels_have_the_colour_of_their_label(height: int, width: int) -> None:
    """Bilinear and nearest differ only where tiles meet: centres of tiles agree at every ratio."""
    image, labels = scene(height, width, tile=10)
    options = SegmentationOptions(scale=(256, 64), ratio=(0.5, 2.0), max_class_share=1.0, photometric=False)
    for seed in range(10):
        pixels, classes = segmentation_transform(options, 48)(image, labels, generator(seed))
        inner = np.ones(classes.shape, bool)
        for axis in (0, 1):
            for step in (-1, 1, -2, 2, -3, 3):
                inner &= np.roll(classes, step, axis) == classes
        inner[:3] = inner[-3:] = inner[:, :3] = inner[:, -3:] = False
        assert inner.sum() > 50
        np.testing.assert_array_equal(pixels[inner], COLOURS[classes[inner]])


@pytest.mark.parametrize("size", [(20, 31), (53, 80), (7, 9), (97, 200)])
def test_part_of_a_scaled_image_is_the_part_of_the_scaled_image(size: tuple[int, int]) -> None:
    pixels = noise(37, 53)
    processor = ImageProcessor(size, "bilinear", rescale_factor=None, mean=None, std=None, antialias=False)
    whole = processor(pixels)[0].astype(np.uint8)
    rows, columns = slice(2, size[0] - 1), slice(3, size[1] - 2)
    np.testing.assert_array_equal(scaled_part(pixels, size, rows, columns), whole[rows, columns])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((512, 683), (512, 683)),  # the short edge decides
        ((100, 800), (256, 2048)),  # the long edge decides
        ((683, 512), (683, 512)),
        ((333, 500), (512, 769)),  # 768.77 is rounded
        ((3, 90_000), (1, 2048)),  # 0.07 is not 0
    ],
)
def test_sizes_at_ratio_one(image: tuple[int, int], expected: tuple[int, int]) -> None:
    assert draw_size(image, (2048, 512), (1.0, 1.0), generator()) == expected
    assert draw_size(image, (512, 2048), (1.0, 1.0), generator()) == expected


def test_ratio_is_uniform() -> None:
    rng = generator()
    short = np.array([draw_size((500, 600), (2048, 512), (0.5, 2.0), rng)[0] for _ in range(4000)])
    assert short.min() >= 256 and short.max() <= 1024
    quarters = np.histogram(short, bins=4, range=(256, 1024))[0]
    assert (abs(quarters - 1000) < 120).all()  # four standard deviations


def test_crop_is_uniform_and_stays_inside() -> None:
    rng, labels = generator(), np.zeros((8, 6), np.uint8)
    corners = Counter(draw_corner(labels, 5, 1.0, rng) for _ in range(4000))
    assert set(corners) == {(top, left) for top in range(4) for left in range(2)}
    assert all(abs(count - 500) < 90 for count in corners.values())
    assert draw_corner(labels, 9, 1.0, rng) == (0, 0)


def test_flip_mirrors_both() -> None:
    image, labels = scene(32, 48)
    transform = segmentation_transform(PLAIN, 40)
    straight, flipped = (transform.apply(image, labels, Draws((32, 48), (0, 4), flip, ())) for flip in (False, True))
    for ours, theirs in zip(straight, flipped, strict=True):
        np.testing.assert_array_equal(ours[:32], theirs[:32, ::-1])
    np.testing.assert_array_equal(straight[1][:32], labels[:, 4:44])


def test_flips_as_often_as_asked() -> None:
    labels = scene(32, 48)[1]
    for probability in (0.0, 0.5, 1.0):
        transform = segmentation_transform(SegmentationOptions(flip=probability), 16)
        rng = generator()
        share = np.mean([transform.draw(labels, rng).flip for _ in range(400)])
        assert abs(share - probability) < 0.1


def test_padding_is_below_and_to_the_right() -> None:
    image, labels = scene(32, 48)
    pixels, classes = segmentation_transform(PLAIN, 60)(image, labels, generator())
    np.testing.assert_array_equal(classes[:32, :48], labels)
    outside = np.ones((60, 60), bool)
    outside[:32, :48] = False
    assert (classes[outside] == IGNORED).all() and (pixels[outside] == 0).all()
    assert (pixels[~outside] > 0).all()


def test_padding_of_the_mean_colour_that_no_distortion_touches() -> None:
    image, labels = scene(32, 48)
    options = SegmentationOptions(scale=(64, 32), ratio=(1.0, 1.0))
    transform = segmentation_transform(options, 60, (0.485, 0.456, 0.406))
    for seed in range(8):
        pixels, _ = transform(image, labels, generator(seed))
        assert (pixels[32:].reshape(-1, 3) == (124, 116, 104)).all()


# The share of a class


@pytest.mark.parametrize(
    ("counts", "mixed"),
    [
        ({3: 100}, False),  # one class alone
        ({3: 75, 4: 25}, False),  # less than the share, not the share itself
        ({3: 74, 4: 26}, True),
        ({IGNORED: 90, 3: 6, 4: 4}, True),  # what does not count is no class
        ({IGNORED: 20, 3: 70, 4: 10}, False),  # 70 of 80
        ({IGNORED: 50, 3: 50}, False),
        ({IGNORED: 100}, False),
    ],
)
def test_share_of_the_largest_class(counts: dict[int, int], mixed: bool) -> None:
    labels = np.repeat(np.array(list(counts), np.uint8), list(counts.values())).reshape(10, 10)
    assert is_mixed(labels, 0.75) is mixed


def test_crops_of_one_class_are_drawn_again() -> None:
    """Two classes side by side: 9 of the 81 places of a crop are mixed enough."""
    labels = np.zeros((20, 100), np.uint8)
    labels[:, 50:] = 1
    rng = generator()

    def share(limit: float) -> float:
        found = [draw_corner(labels, 20, limit, rng)[1] for _ in range(1500)]
        return float(np.mean([is_mixed(labels[:20, left : left + 20], 0.75) for left in found]))

    once = 9 / 81  # columns 36 to 44: 6 to 14 pixels of the one, the others of the other
    assert share(1.0) == pytest.approx(once, abs=0.035)
    assert share(0.75) == pytest.approx(1 - (1 - once) ** 11, abs=0.05)  # ten are judged, the eleventh is taken


def test_the_transform_judges_crops_of_the_scaled_map() -> None:
    labels = np.zeros((32, 64), np.uint8)
    labels[:, 32:] = 1
    never, often = (segmentation_transform(replace(PLAIN, max_class_share=share), 16) for share in (1.0, 0.75))

    def mixed(transform: CropTransform) -> float:
        maps = [transform(Image.new("RGB", (64, 32)), labels, generator(seed))[1] for seed in range(200)]
        return float(np.mean([is_mixed(found.astype(np.uint8), 0.75) for found in maps]))

    assert mixed(never) < 0.3 and mixed(often) > 0.75  # 7 of 49 places; 1 - (42 / 49)^11 is 0.82


def test_a_map_of_one_class_ends_too() -> None:
    assert draw_corner(np.full((30, 30), IGNORED, np.uint8), 20, 0.75, generator())[0] in range(11)


# Colours


def all_levels() -> np.ndarray:
    steps = np.array([0, 1, 2, 50, 51, 127, 128, 200, 254, 255], np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    return np.concatenate([grid, noise(40, 50).reshape(-1, 1, 3)])


@pytest.mark.parametrize(
    ("rgb", "hsv"),
    [
        ((255, 0, 0), (0, 255, 255)),
        ((0, 255, 0), (60, 255, 255)),
        ((0, 0, 255), (120, 255, 255)),
        ((255, 255, 0), (30, 255, 255)),
        ((255, 0, 255), (150, 255, 255)),
        ((77, 77, 77), (0, 0, 77)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_hsv_of_known_colours(rgb: tuple[int, ...], hsv: tuple[int, ...]) -> None:
    """Those of OpenCV's documentation, where hues are half degrees."""
    assert tuple(to_hsv(np.array([[rgb]], np.uint8))[0, 0]) == hsv
    assert tuple(from_hsv(np.array([[hsv]], np.uint8))[0, 0]) == rgb


def test_hsv_is_the_nearest_level_as_far_as_its_fixed_point_goes() -> None:
    pixels = all_levels()
    exact = np.array([colorsys.rgb_to_hsv(*(rgb / 255)) for rgb in pixels[:, 0].astype(float)])
    away = to_hsv(pixels)[:, 0] - exact * (HUES, 255, 255)
    away[:, 0] = (away[:, 0] + HUES / 2) % HUES - HUES / 2
    error = 0.5 * 255 / 4096  # of the rounded divisions, times 5 at the end of the circle
    assert (abs(away).max(axis=0) <= (0.5 + 5 * error, 0.5 + error, 1e-9)).all()


def test_rgb_is_the_nearest_level() -> None:
    hsv = all_levels()
    hsv[..., 0] %= HUES
    exact = np.array([colorsys.hsv_to_rgb(*row) for row in hsv[:, 0] / np.array([HUES, 255, 255])]) * 255
    assert abs(from_hsv(hsv)[:, 0] - exact).max() < 0.5 + 1e-3


def test_brightness_and_contrast() -> None:
    levels = np.array([[[0, 10, 100], [101, 250, 255]]], np.uint8)
    assert distort(levels, ("brightness", 20.7)).tolist() == [[[20, 30, 120], [121, 255, 255]]]
    assert distort(levels, ("brightness", -20.7)).tolist() == [[[0, 0, 79], [80, 229, 234]]]
    assert distort(levels, ("contrast", 0.5)).tolist() == [[[0, 5, 50], [50, 125, 127]]]
    assert distort(levels, ("contrast", 1.5)).tolist() == [[[0, 15, 150], [151, 255, 255]]]


def test_saturation() -> None:
    pixels = np.array([[[200, 100, 100], [90, 90, 90]]], np.uint8)
    less, more = (distort(pixels, ("saturation", factor)) for factor in (0.5, 1.5))
    assert less.tolist() == [[[200, 151, 151], [90, 90, 90]]]  # 127 of 255, cut off to 63: 200 - 49.4
    assert more.tolist() == [[[200, 51, 51], [90, 90, 90]]]  # cut off to 190: 200 - 149.0


def test_hue_goes_round() -> None:
    red = np.array([[[255, 0, 0]]], np.uint8)
    assert to_hsv(distort(red, ("hue", -18.0)))[0, 0, 0] == HUES - 18
    assert to_hsv(distort(red, ("hue", 17.0)))[0, 0, 0] == 17
    assert distort(red, ("hue", 60.0)).tolist() == [[[0, 255, 0]]]


def test_what_is_drawn_of_colours() -> None:
    rng, count = generator(), 4000
    drawn = [draw_distortions(rng) for _ in range(count)]
    amounts = {kind: [dict(one)[kind] for one in drawn if kind in dict(one)] for kind in dict(sum(drawn, ()))}
    bounds = {"brightness": (-32, 32), "contrast": FACTORS, "saturation": FACTORS, "hue": (-18, 17)}
    assert amounts.keys() == bounds.keys()
    for kind, (low, high) in bounds.items():
        found = np.array(amounts[kind])
        assert abs(len(found) / count - 0.5) < 0.04
        assert low <= found.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < found.max() <= high
        assert abs(found.mean() - (low + high) / 2) < 0.04 * (high - low)
    assert set(amounts["hue"]) == set(range(-18, 18))
    orders = Counter(tuple(kind for kind, _ in one) for one in drawn if len(one) == 4)
    assert set(orders) == {
        ("brightness", "contrast", "saturation", "hue"),
        ("brightness", "saturation", "hue", "contrast"),
    }
    assert min(orders.values()) > 0.35 * orders.total()


def test_colours_stay_where_they_are_not_distorted() -> None:
    image, labels = scene(32, 48)
    transform = segmentation_transform(SegmentationOptions(), 16)
    plain = segmentation_transform(SegmentationOptions(photometric=False), 16)
    changed = 0
    for seed in range(16):
        ours, theirs = transform(image, labels, generator(seed)), plain(image, labels, generator(seed))
        np.testing.assert_array_equal(ours[1], theirs[1])  # the same geometry, and labels have no colours
        changed += bool((ours[0] != theirs[0]).any())
    assert changed > 8  # 15 of 16 on average


# As a value


def test_randomness_is_the_generators() -> None:
    image, labels = scene(60, 90, tile=7)
    transform = segmentation_transform(SegmentationOptions(scale=(128, 64)), 32)
    first, again, other = (transform(image, labels, generator(seed)) for seed in (3, 3, 4))
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (first[0] != other[0]).any()
    assert pickle.loads(pickle.dumps(transform)) == transform


def test_arguments_stay_as_they_were() -> None:
    image, labels = scene(60, 90, tile=7)
    pixels, before = np.array(image), labels.copy()
    for seed in range(4):
        segmentation_transform(SegmentationOptions(), 32)(image, labels, generator(seed))
    np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(labels, before)


def test_workers_do_not_import_jax() -> None:
    check = "import sys, beit_jax.train.augmentation.segmentation; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
