"""Training images with their label maps, as mmseg 0.11 trains on ADE20K: scale, crop, flip, colours, padding.

Drawing random numbers and using them are separate, as in `classification`; but the place of the crop depends on the
labels. Only the crop of the image is scaled, to the same pixels. Nothing here imports JAX: worker processes start
without it.

Source: mmsegmentation v0.11.0 mmseg/datasets/pipelines/transforms.py: Resize, RandomCrop, RandomFlip,
PhotoMetricDistortion, Pad; mmcv.imrescale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer, UInt8
from PIL import Image

from beit_jax.images.label_maps import IGNORED, resize_labels
from beit_jax.resize import linear_taps

from ..recipe import SceneOptions
from .decode import Pixels

Labels: TypeAlias = Integer[np.ndarray, "h w"]
SegmentationTransform: TypeAlias = Callable[
    [Pixels, np.ndarray, np.random.Generator],
    tuple[Pixels, Int32[np.ndarray, "crop_h crop_w"]],
]
Kind: TypeAlias = Literal["brightness", "contrast", "saturation", "hue"]
Distortion: TypeAlias = tuple[Kind, float]
"""A change of colours and its amount: an offset of levels, a factor, a factor, or an offset in half degrees."""

ATTEMPTS: Final = 10  # crops that are checked; the next one is taken without a check
BRIGHTNESS: Final = 32.0  # levels up or down
FACTORS: Final = (0.5, 1.5)  # of contrast and saturation
HUES: Final = 180  # OpenCV's circle of hues, in half degrees
HUE: Final = 18  # half degrees backwards; forwards one less


@dataclass(frozen=True)
class Draws:
    """The random choices for one image: its (height, width), the crop's top and left, a flip, and colours."""

    size: tuple[int, int]
    corner: tuple[int, int]
    flip: bool
    distortions: tuple[Distortion, ...]


@dataclass(frozen=True)
class CropTransform:
    """Image ([h, w, c] uint8 or float32, or PIL's), its labels and generator -> [h, w, c] and int32 [h, w] of the crop.

    Only RGB of 8 bits has colours to distort. The transform is a plain value, so that it can be sent to worker
    processes.

    Attributes:
        crop: height and width.
        fill: the colour of padding, in [0, 1].
        scale: bounds of the long and the short edge, as those of `SceneOptions`.
        ignored: the number of pixels of no class.
    """

    options: SceneOptions
    crop: tuple[int, int]
    fill: tuple[float, ...]
    scale: tuple[int, int]
    ignored: int = IGNORED

    def __call__(
        self, image: Pixels | Image.Image, labels: Labels, rng: np.random.Generator
    ) -> tuple[Pixels, Int32[np.ndarray, "crop_h crop_w"]]:
        return self.apply(image, labels, self.draw(labels, rng))

    def draw(self, labels: Labels, rng: np.random.Generator) -> Draws:
        """Draws the random choices for an image with these labels."""
        options = self.options
        height, width = labels.shape
        size = draw_size((height, width), self.scale, options.ratio, rng)
        corner = draw_corner(resize_labels(labels, size), self.crop, options.max_class_share, rng, self.ignored)
        flip = rng.random() < options.flip
        return Draws(size, corner, flip, draw_distortions(rng) if options.photometric else ())

    def apply(
        self, image: Pixels | Image.Image, labels: Labels, draws: Draws
    ) -> tuple[Pixels, Int32[np.ndarray, "crop_h crop_w"]]:
        """Applies the random choices. A scaled image that is smaller than the crop is placed at the top left."""
        rows, columns = (
            slice(start, min(start + side, length))
            for start, side, length in zip(draws.corner, self.crop, draws.size, strict=True)
        )
        pixels = scaled_part(np.asarray(image), draws.size, rows, columns)
        classes = resize_labels(labels, draws.size)[rows, columns]
        if draws.flip:
            pixels, classes = pixels[:, ::-1], classes[:, ::-1]
        for distortion in draws.distortions:
            pixels = distort(pixels, distortion)
        height, width = classes.shape
        image_out = np.empty((*self.crop, pixels.shape[2]), pixels.dtype)
        image_out[:] = _levels_of(self.fill) if pixels.dtype == np.uint8 else self.fill
        image_out[:height, :width] = pixels
        labels_out = np.full(self.crop, self.ignored, np.int32)
        labels_out[:height, :width] = classes
        return image_out, labels_out


def segmentation_transform(
    options: SceneOptions,
    crop: int | tuple[int, int],
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    *,
    ignored: int = IGNORED,
) -> CropTransform:
    """The transform to crop x crop pixels, or to (height, width).

    Args:
        mean: the colour of padding, in [0, 1]. mmseg pads normalised images with 0, which is the mean colour here.
        ignored: the number of pixels of no class.
    """
    sides = _sides(crop)
    return CropTransform(options, sides, mean, options.edges(sides), ignored)


def _levels_of(colour: tuple[float, ...]) -> list[int]:
    return [max(0, min(255, round(255 * value))) for value in colour]


def _sides(crop: int | tuple[int, int]) -> tuple[int, int]:
    return (crop, crop) if isinstance(crop, int) else crop


# Geometry


def draw_size(
    image_size: tuple[int, int], scale: tuple[int, int], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int]:
    """Draws the (height, width) to which an image of (height, width) is scaled, with the same proportions.

    The image becomes as large as `scale` times a factor, uniform in `ratio`, allows: the larger number of `scale`
    bounds the long edge, the smaller one the short edge.
    """
    factor = rng.uniform(*ratio)
    short, long = sorted(int(edge * factor) for edge in scale)
    by = min(long / max(image_size), short / min(image_size))
    height, width = (max(1, int(edge * by + 0.5)) for edge in image_size)
    return height, width


def draw_corner(
    labels: Labels,
    crop: int | tuple[int, int],
    max_class_share: float,
    rng: np.random.Generator,
    ignored: int = IGNORED,
) -> tuple[int, int]:
    """Draws top and left of a crop, uniformly; again, up to ATTEMPTS times, while one class covers too much of it."""
    high, wide = _sides(crop)
    spare = [max(length - side, 0) for length, side in zip(labels.shape, (high, wide), strict=True)]

    def draw() -> tuple[int, int]:
        return int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1))

    top, left = draw()
    if max_class_share < 1:
        for _ in range(ATTEMPTS):
            if is_mixed(labels[top : top + high, left : left + wide], max_class_share, ignored):
                break
            top, left = draw()
    return top, left


def is_mixed(labels: Labels, max_class_share: float, ignored: int = IGNORED) -> bool:
    """True if there are two or more classes, and the largest has less than this share of the pixels that count."""
    counts = np.bincount(labels.ravel(), minlength=ignored + 1)
    counts[ignored] = 0
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_class_share)


def scaled_part(pixels: Pixels, size: tuple[int, int], rows: slice, columns: slice) -> Pixels:
    """``scaled[rows, columns]`` of the image scaled to (height, width); the rest is not computed.

    Pixels are bilinear between the four nearest ones, also when shrinking, as in OpenCV: `ImageProcessor` without
    antialiasing.
    """
    values = pixels
    for axis, part in enumerate((rows, columns)):
        lower, upper, weight = (taps[part] for taps in linear_taps(pixels.shape[axis], size[axis]))
        weight = weight.astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        values = values.take(lower, axis) * (1 - weight) + values.take(upper, axis) * weight
    return np.floor(values + np.float32(0.5)).astype(np.uint8) if pixels.dtype == np.uint8 else values


# Colours


def draw_distortions(rng: np.random.Generator) -> tuple[Distortion, ...]:
    """Draws each of the four with probability 1/2; contrast comes before or after saturation and hue, equally often."""
    contrast: Distortion = ("contrast", rng.uniform(*FACTORS))
    colours: list[Distortion] = [("saturation", rng.uniform(*FACTORS)), ("hue", float(rng.integers(-HUE, HUE)))]
    ordered = [contrast, *colours] if rng.random() < 0.5 else [*colours, contrast]
    drawn: list[Distortion] = [("brightness", rng.uniform(-BRIGHTNESS, BRIGHTNESS)), *ordered]
    chosen: Bool[np.ndarray, " 4"] = rng.random(len(drawn)) < 0.5
    return tuple(distortion for distortion, keep in zip(drawn, chosen, strict=True) if keep)


def distort(pixels: Pixels, distortion: Distortion) -> Pixels:
    """Changes 8-bit colours. Fractions are cut off after every step, as in mmseg."""
    kind, amount = distortion
    if kind == "brightness":
        return _levels(1.0, amount)[pixels]
    if kind == "contrast":
        return _levels(amount, 0.0)[pixels]
    hsv = to_hsv(pixels)
    if kind == "saturation":
        hsv[..., 1] = _levels(amount, 0.0)[hsv[..., 1]]
    else:
        hsv[..., 0] = ((np.arange(HUES) + int(amount)) % HUES).astype(np.uint8)[hsv[..., 0]]
    return from_hsv(hsv)


def to_hsv(pixels: Pixels) -> Pixels:
    """RGB -> hue (0 to 179), saturation and value (0 to 255) in the fixed-point arithmetic of OpenCV's 8-bit images.

    Source: OpenCV 4.x modules/imgproc/src/color_hsv.simd.hpp, RGB2HSV_b.
    """
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)  # of planes: NumPy is slow along an axis of three
    spread = value - np.minimum(np.minimum(red, green), blue)
    turned = red - green + 4 * spread
    np.copyto(turned, blue - red + 2 * spread, where=value == green)
    np.copyto(turned, green - blue, where=value == red)
    hue = (turned * _HUE_DIVISION[spread] + _HALF) >> _SHIFT
    hue[hue < 0] += HUES
    hsv = np.empty_like(pixels)
    hsv[..., 0], hsv[..., 2] = hue, value
    hsv[..., 1] = (spread * _SATURATION_DIVISION[value] + _HALF) >> _SHIFT
    return hsv


def from_hsv(hsv: Pixels) -> Pixels:
    """Hue, saturation and value -> RGB, rounded to the nearest level."""
    saturation, value = (hsv[..., channel, None].astype(np.float32) for channel in (1, 2))
    return np.rint(value - value * (saturation / np.float32(255)) * _ABSENCE[hsv[..., 0]]).astype(np.uint8)


def _levels(factor: float, offset: float) -> UInt8[np.ndarray, " 256"]:
    """The new level for each of the 256 levels."""
    changed = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(changed, 0, 255).astype(np.uint8)


def _division(scale: float) -> Int32[np.ndarray, " 256"]:
    """A table of scale / i in fixed point; 0 for i = 0."""
    return np.rint([0.0, *((scale * (1 << _SHIFT)) / np.arange(1, 256))]).astype(np.int32)


def _absence() -> Float32[np.ndarray, "hues 3"]:
    """The amounts of red, green and blue that a saturated colour of each hue lacks."""
    place = (np.arange(HUES)[:, None] * (6 / HUES) + np.array([5, 3, 1])) % 6
    return np.clip(np.minimum(place, 4 - place), 0, 1).astype(np.float32)


_SHIFT: Final = 12
_HALF: Final = 1 << (_SHIFT - 1)
_SATURATION_DIVISION: Final = _division(255)
_HUE_DIVISION: Final = _division(HUES / 6)
_ABSENCE: Final = _absence()
