"""Training images of a classifier, on the host: random crop, flip, and RandAugment or colour jitter, as in timm.

Drawing random numbers and using them are separate: `TrainTransform.draw` and `TrainTransform.apply`. Erasing and mixing
happen on the device, in `mixing`. Nothing here imports JAX: worker processes start without it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from PIL import Image

from beit_jax.errors import BeitJaxError

from ..recipe import AugmentOptions, CropOptions, Interpolation, PixelType
from .decode import Pixels
from .randaugment import Operation, RandAugment, perform
from .resample import Box, Colour, Filter, resized

Transform: TypeAlias = Callable[[Pixels, np.random.Generator], Pixels]

ATTEMPTS: Final = 10  # to draw a crop that fits, before the centre is taken
JITTERED: Final = ("Brightness", "Contrast", "Color")
RESAMPLES: Final[dict[Interpolation, tuple[Filter, ...]]] = {
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "lanczos": (Image.Resampling.LANCZOS,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}


@dataclass(frozen=True)
class Draws:
    """The random choices for one image: a crop, its resampling filter, a flip, and operations in order."""

    box: Box
    resample: Filter
    flip: bool
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class TrainTransform:
    """Image ([h, w, c] uint8 or float32, or PIL's) and generator -> [height, width, c] of `size`.

    Only RGB of 8 bits has colours to change (`check_colours`). The transform is a plain value, so that it can be sent
    to worker processes.
    """

    options: AugmentOptions
    size: tuple[int, int]
    fill: Colour
    policy: RandAugment | None

    def __call__(self, image: Pixels | Image.Image, rng: np.random.Generator) -> Pixels:
        pixels = np.asarray(image)
        height, width, _ = pixels.shape
        return self.apply(pixels, self.draw((width, height), rng))

    def draw(self, image_size: tuple[int, int], rng: np.random.Generator) -> Draws:
        """Draws the random choices for an image of (width, height)."""
        options = self.options
        resamples = RESAMPLES[options.interpolation]
        box = draw_box(image_size, options.crop_scale, options.crop_ratio, rng)
        resample = resamples[rng.integers(len(resamples))]
        flip = rng.random() < options.flip
        if self.policy is not None:
            operations = self.policy.draw(rng, tuple(r for r in resamples if r is not Image.Resampling.LANCZOS))
        else:
            operations = draw_jitter(options.color_jitter, rng)
        return Draws(box, resample, flip, operations)

    def apply(self, image: Pixels | Image.Image, draws: Draws) -> Pixels:
        """Applies the random choices."""
        pixels = resized(np.asarray(image), draws.box, self.size, draws.resample)
        if draws.flip:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        if not draws.operations:
            return pixels
        picture = Image.fromarray(pixels)
        for operation in draws.operations:
            picture = perform(picture, operation, self.fill)
        return np.asarray(picture)


def train_transform(options: AugmentOptions, size: tuple[int, int], mean: tuple[float, ...]) -> TrainTransform:
    """The transform to images of (height, width).

    Args:
        mean: the colour, in [0, 1], that RandAugment uses for pixels from outside the image; of RGB.

    Raises:
        BeitJaxError: as `randaugment_policy`.
    """
    policy, fill = randaugment_policy(options), (0, 0, 0)
    if policy is not None:
        red, green, blue = (max(0, min(255, round(255 * value))) for value in mean)
        fill = (red, green, blue)
    return TrainTransform(options, size, fill, policy)


def check_colours(options: CropOptions, channels: int, pixels: PixelType) -> None:
    """Refuses changes of colours, which only RGB images of 8 bits have.

    Raises:
        BeitJaxError: names what is on, and the options that switch it off.
    """
    if channels == 3 and pixels == "uint8":
        return
    on = {}
    if isinstance(options, AugmentOptions) and options.randaugment is not None:
        on["RandAugment"] = "--augment.randaugment None"
    if options.color_jitter > 0:
        on["colour jitter"] = "--augment.color-jitter 0"
    if on:
        raise BeitJaxError(
            f"{' and '.join(on)}: 8-bit RGB images have colours to change, found {channels} channels of {pixels}; pass "
            f"{' '.join(on.values())}"
        )


def randaugment_policy(options: AugmentOptions) -> RandAugment | None:
    """The policy that `options` names, None without one.

    Raises:
        BeitJaxError: `options.randaugment` is not understood, or would need a filter that it cannot use.
    """
    if options.randaugment is None:
        return None
    if options.interpolation == "lanczos":
        raise BeitJaxError(
            "--augment.interpolation: RandAugment moves pixels by bilinear or bicubic, found lanczos; choose one of "
            "those, or pass --augment.randaugment None"
        )
    return RandAugment.parse(options.randaugment)


def draw_box(
    image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A random crop of an image of (width, height).

    The crop's share of the area is uniform in `scale`, its width over height is log-uniform in `ratio`, and its place
    is uniform. If ten crops in a row do not fit, the largest centre crop with a ratio in `ratio` is taken.

    Source: torchvision RandomResizedCrop.get_params.
    """
    width, height = image_size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(ATTEMPTS):
        area = rng.uniform(*scale) * (width * height)
        aspect = math.exp(rng.uniform(low, high))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            return left, top, left + columns, top + rows
    columns, rows = width, height
    if width / height < ratio[0]:
        rows = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        columns = max(1, round(height * ratio[1]))
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows


def draw_jitter(strength: float, rng: np.random.Generator) -> tuple[Operation, ...]:
    """Changes of brightness, contrast and saturation, in random order. Their factors are uniform in
    [max(0, 1 - strength), 1 + strength].

    Source: torchvision ColorJitter.
    """
    if strength == 0:
        return ()
    low, high = max(0.0, 1 - strength), 1 + strength
    return tuple(Operation(JITTERED[number], rng.uniform(low, high)) for number in rng.permutation(len(JITTERED)))
