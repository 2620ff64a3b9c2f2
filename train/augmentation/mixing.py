"""Training images on the device: normalised, erased and mixed, with distributions as targets. JAX can trace it all.

Drawing random numbers and using them are separate functions. Source of the semantics: timm 1.0.31,
timm/data/random_erasing.py (mode "pixel", one rectangle) and timm/data/mixup.py (mode "batch").
"""

import math
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key, UInt8

from beit_jax.errors import BeitJaxError

from ..recipe import AugmentOptions, DataOptions, Statistics
from .labels import ArrayLike, class_numbers, nan_unless_class

ERASED_AREA: Final = (0.02, 1 / 3)
ERASED_ASPECT: Final = (0.3, 1 / 0.3)  # height over width
ATTEMPTS: Final = 10  # to draw a rectangle that fits; after that the image stays as it is


class Boxes(NamedTuple):
    """Rectangles [top, bottom) x [left, right), int32."""

    top: Int[Array, "*b"]
    bottom: Int[Array, "*b"]
    left: Int[Array, "*b"]
    right: Int[Array, "*b"]

    def contain(self, height: int, width: int) -> Bool[Array, "*b h w"]:
        """True for every pixel of an image of (height, width) that is in the rectangle."""
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
        top, bottom, left, right = (edge[..., None, None] for edge in self)
        return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)


class Mixing(NamedTuple):
    """How a batch is mixed.

    Attributes:
        share: the share that an image keeps of itself.
        cut: True: a rectangle comes from the other image. False: all pixels are blended.
        box: the rectangle; empty where nothing is cut.
    """

    share: Float[Array, ""]
    cut: Bool[Array, ""]
    box: Boxes


def normalise(
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"], options: Statistics | DataOptions
) -> Float[Array, "b h w c"]:
    """Scales pixels to [0, 1] (`scaled`), subtracts the mean, and divides by the deviation, in float32.

    Args:
        options: with the mean and the deviation of the images' channels.

    Raises:
        BeitJaxError: numbers for another number of channels.
    """
    data = DataOptions(statistics=options) if isinstance(options, str) else options
    mean, deviation = (jnp.asarray(values, jnp.float32) for values in data.moments(images.shape[-1]))
    return (scaled(images, data.scale) - mean) / deviation


def scaled(images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"], scale: float | None) -> Float[Array, "b h w c"]:
    """Pixels as float32: 8-bit values divided by `scale`, by default 255; floats, which are scaled already, as such."""
    values = images.astype(jnp.float32)
    return values / (255 if scale is None else scale) if images.dtype == jnp.uint8 else values


def soft_targets(labels: Integer[ArrayLike, " b"], classes: int, smoothing: float) -> Float[Array, "b classes"]:
    """Targets with 1 - `smoothing` on the label and `smoothing` spread over all classes, float32.

    Raises:
        BeitJaxError: a label that is no class, where the labels are known; in a compiled function its targets are NaN.
    """
    labels = class_numbers(labels, classes, labels.shape)
    targets = jax.nn.one_hot(labels, classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / classes
    return targets * nan_unless_class(labels, classes)[..., None]


def erase(key: Key[Array, ""], images: Float[Array, "b h w c"], probability: float) -> Float[Array, "b h w c"]:
    """Replaces a rectangle of each normalised image by noise, with this probability."""
    if probability == 0:
        return images
    batch, height, width, _ = images.shape
    box_key, noise_key = jax.random.split(key)
    boxes = draw_erasing(box_key, (height, width), batch, probability)
    return apply_erasing(images, boxes, jax.random.normal(noise_key, images.shape, images.dtype))


def draw_erasing(key: Key[Array, ""], size: tuple[int, int], batch: int, probability: float) -> Boxes:
    """Draws `batch` rectangles in images of (height, width); a rectangle is empty where nothing is erased.

    The area and the logarithm of the aspect are uniform. The first of ten rectangles that leaves a row and a column of
    the image is taken.
    """
    height, width = size
    shape_key, place_key = jax.random.split(key)
    area, aspect = jax.random.uniform(shape_key, (2, batch, ATTEMPTS))
    area = _between(area, *ERASED_AREA) * (height * width)
    aspect = jnp.exp(_between(aspect, *map(math.log, ERASED_ASPECT)))
    rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (rows < height) & (columns < width)
    chosen = fits.argmax(axis=1, keepdims=True)
    chance, down, along = jax.random.uniform(place_key, (3, batch))
    erased = fits.any(axis=1) & (chance < probability)
    rows, columns = (
        jnp.where(erased, jnp.take_along_axis(sides, chosen, axis=1)[:, 0], 0) for sides in (rows, columns)
    )
    top = (down * (height - rows + 1)).astype(jnp.int32)
    left = (along * (width - columns + 1)).astype(jnp.int32)
    return Boxes(top, top + rows, left, left + columns)


def apply_erasing(
    images: Float[Array, "b h w c"], boxes: Boxes, noise: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """The images, with `noise` within the rectangles."""
    return jnp.where(boxes.contain(*images.shape[1:3])[..., None], noise, images)


def mix(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    targets: Float[Array, "b classes"],
    options: AugmentOptions,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Mixes the batch with itself in reverse order, by mixup or cutmix; unchanged if both are off.

    Raises:
        BeitJaxError: the size of the batch is odd, so the image in the middle would be mixed with itself.
    """
    if options.mixup == 0 and options.cutmix == 0:
        return images, targets
    if len(images) % 2:
        raise BeitJaxError(f"mixing pairs images: expected an even batch, found {len(images)}; change the batch size")
    return apply_mixing(images, targets, draw_mixing(key, images.shape[1:3], options))


def draw_mixing(key: Key[Array, ""], size: tuple[int, ...], options: AugmentOptions) -> Mixing:
    """Draws how a batch of images of (height, width) is mixed. `options.mixup` or `options.cutmix` must be on.

    The share of cutmix is the area outside the rectangle, after the border of the image has clipped the rectangle.
    """
    mixed_key, cut_key, share_key, box_key = jax.random.split(key, 4)
    mixed = jax.random.bernoulli(mixed_key, options.mix_probability)
    cut = jax.random.bernoulli(cut_key, _cut_probability(options))
    alpha = jnp.where(cut, options.cutmix, options.mixup)
    blended = jax.random.beta(share_key, alpha, alpha)
    box = draw_cut(box_key, size, blended)
    left_over = 1 - (box.bottom - box.top) * (box.right - box.left) / (size[0] * size[1])
    share = jnp.where(mixed, jnp.where(cut, left_over, blended), 1.0)
    cut &= mixed
    return Mixing(share, cut, Boxes(*(jnp.where(cut, edge, 0) for edge in box)))


def draw_cut(key: Key[Array, ""], size: tuple[int, ...], share: Float[Array, ""]) -> Boxes:
    """Draws a rectangle of 1 - `share` of the image's area and of its shape, with a uniform centre; borders clip it."""
    return cut_box(size, share, jax.random.randint(key, (2,), 0, jnp.asarray(size)))


def cut_box(size: tuple[int, ...], share: Float[Array, ""], centre: Int[Array, "2"]) -> Boxes:
    """The rectangle of `draw_cut` around a given centre. The extra pixel of an odd side comes after the centre."""
    sides = jnp.asarray(size)
    lengths = (sides * jnp.sqrt(1 - share)).astype(jnp.int32)
    top, left = jnp.clip(centre - lengths // 2, 0, sides)
    bottom, right = jnp.clip(centre + (lengths + 1) // 2, 0, sides)
    return Boxes(top, bottom, left, right)


def apply_mixing(
    images: Float[Array, "b h w c"], targets: Float[Array, "b classes"], mixing: Mixing
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Mixes every image and target with its partner's. Partners are the batch in reverse order, as in timm."""
    inside = mixing.box.contain(*images.shape[1:3])
    own = jnp.where(mixing.cut, 1.0 - inside, mixing.share)[..., None].astype(images.dtype)
    share = mixing.share.astype(targets.dtype)
    return (
        images * own + images[::-1] * (1 - own),
        targets * share + targets[::-1] * (1 - share),
    )


def _cut_probability(options: AugmentOptions) -> float:
    if options.mixup == 0:
        return 1.0
    return options.mix_switch if options.cutmix else 0.0


def _between(uniform: Float[Array, "*b"], low: float, high: float) -> Float[Array, "*b"]:
    return low + (high - low) * uniform
