"""Training images on the host: random crop, flip, and RandAugment or colour jitter, as timm does them on PIL images.

What is drawn and what is done with it are apart: `TrainTransform.draw` and `TrainTransform.apply`. Erasing and mixing
happen on the device, in `mixing`. Nothing here imports JAX: worker processes start without it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from beit_jax.errors import BeitJaxError

from .randaugment import Colour, Operation, RandAugment, Resampling, perform
from .recipe import AugmentOptions, Interpolation

Transform: TypeAlias = Callable[[Image.Image, np.random.Generator], UInt8[np.ndarray, "h w 3"]]
Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom."""
Filter: TypeAlias = Resampling | Literal[Image.Resampling.LANCZOS]
"""Of resizing; operations that move pixels have no Lanczos filter."""

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
    """All that is random about one image: a crop, its resampling filter, a flip, then operations in their order."""

    box: Box
    resample: Filter
    flip: bool
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class TrainTransform:
    """RGB PIL image and generator -> uint8 [h, w, 3]. A value, so that it can be sent to worker processes."""

    options: AugmentOptions
    size: tuple[int, int]
    fill: Colour
    policy: RandAugment | None

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
        return self.apply(image, self.draw(image.size, rng))

    def draw(self, image_size: tuple[int, int], rng: np.random.Generator) -> Draws:
        """For an image of (width, height)."""
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

    def apply(self, image: Image.Image, draws: Draws) -> UInt8[np.ndarray, "h w 3"]:
        """Cropped before it is resized: `resize` with a box would let pixels beyond the crop into its edges."""
        height, width = self.size
        image = image.crop(draws.box).resize((width, height), draws.resample)
        if draws.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for operation in draws.operations:
            image = perform(image, operation, self.fill)
        return np.asarray(image)


def train_transform(options: AugmentOptions, size: tuple[int, int], mean: tuple[float, float, float]) -> TrainTransform:
    """The transform to (height, width). Pixels that RandAugment moves in have the colour `mean`, of [0, 1].

    Raises:
        BeitJaxError: `options.randaugment` that is not understood, or that moves pixels by a filter it cannot have.
    """
    if options.randaugment is not None and options.interpolation == "lanczos":
        raise BeitJaxError(
            "--augment.interpolation: RandAugment moves pixels by bilinear or bicubic, found lanczos; choose one of "
            "those, or pass --augment.randaugment None"
        )
    red, green, blue = (min(255, round(255 * value)) for value in mean)
    policy = None if options.randaugment is None else RandAugment.parse(options.randaugment)
    return TrainTransform(options, size, (red, green, blue), policy)


def draw_box(
    image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A crop of an image of (width, height): its area uniform in `scale` as a share of the image's, its width over
    height log-uniform in `ratio`, its place uniform. After ten that do not fit, the largest centre crop in `ratio`.

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
    """Brightness, contrast and saturation in random order, factors uniform in [max(0, 1 - strength), 1 + strength].

    Source: torchvision ColorJitter.
    """
    if strength == 0:
        return ()
    low, high = max(0.0, 1 - strength), 1 + strength
    return tuple(Operation(JITTERED[number], rng.uniform(low, high)) for number in rng.permutation(len(JITTERED)))
