"""Resizing, shear and translation of training images, with the same pixels as Pillow and in a third of its time.

Where Numba is installed, loops that it compiles (`kernels`) replace Pillow for images that are large enough to be worth
loading Numba. The pixels are the same: Pillow's arithmetic changes between versions, so the loops are only used if the
installed Pillow agrees with them.
"""

from functools import cache
from types import ModuleType
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from beit_jax.images.scaling import resized as resized_bands

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom."""
Colour: TypeAlias = tuple[int, int, int]
Resampling: TypeAlias = Literal[Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]
"""The filters of operations that move pixels."""
Filter: TypeAlias = Resampling | Literal[Image.Resampling.LANCZOS]
"""The filters of resizing."""

WORTHWHILE: Final = 96 * 96  # pixels; Pillow makes tens of thousands of smaller images while Numba is being loaded
_REACH: Final[dict[Image.Resampling, float]] = {Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0}


def resized(
    pixels: Shaped[np.ndarray, "h w c"], box: Box, size: tuple[int, int], resample: Filter
) -> Shaped[np.ndarray, "height width c"]:
    """Resizes the part of an image, uint8 or float32, in a box, which lies within the image, to (height, width).

    Equals ``Image.fromarray(pixels).crop(box).resize((width, height), resample)``, of other images than RGB for every
    channel. The image is cropped first, because
    `resize` with a box would use pixels outside the box at its edges.
    """
    height, width = size
    left, top, right, bottom = box
    assert 0 <= left < right <= pixels.shape[1] and 0 <= top < bottom <= pixels.shape[0], f"{box} of {pixels.shape}"
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        return resized_bands(pixels[top:bottom, left:right], size, resample)
    if resample in _REACH and height * width >= WORTHWHILE and (compiled := _kernels()):
        return np.asarray(compiled.resize(_read_only(pixels), box, size, _REACH[resample]))
    return np.asarray(Image.fromarray(pixels[top:bottom, left:right]).resize((width, height), resample))


def slide(
    image: Image.Image, axis: Literal["x", "y"], shear: float, shift: float, resample: Resampling, fill: Colour
) -> Image.Image:
    """Slides the rows of an RGB image: pixel (x, y) comes from (x + shear * y + shift, y), measured at pixel centres.

    With axis "y", columns slide likewise.

    Equals ``image.transform(image.size, AFFINE, (1, shear, shift, 0, 1, 0), resample, fillcolor=fill)``.
    """
    if axis == "y":
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        return slide(turned, "x", shear, shift, resample, fill).transpose(Image.Transpose.TRANSPOSE)
    if resample == Image.Resampling.BICUBIC and image.width * image.height >= WORTHWHILE and (compiled := _kernels()):
        moved, torn = compiled.slide(_read_only(np.asarray(image)), float(shear), float(shift), fill)
        if not torn:
            return Image.fromarray(moved)
    return _pillows_slide(image, shear, shift, resample, fill)


def _pillows_slide(image: Image.Image, shear: float, shift: float, resample: Resampling, fill: Colour) -> Image.Image:
    coefficients = (1.0, shear, shift, 0.0, 1.0, 0.0)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample, fillcolor=fill)


def _read_only(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels as a contiguous, read-only array: Numba compiles once for each kind of array."""
    view = np.ascontiguousarray(pixels).view()
    view.flags.writeable = False
    return view


@cache
def _kernels() -> ModuleType | None:
    """The compiled loops; None without Numba, with one that is too old for this NumPy, or with a different Pillow."""
    try:
        from . import kernels
    except ImportError:
        return None
    return kernels if _agree(kernels) else None


def _agree(kernels: ModuleType) -> bool:
    """True if the loops give the installed Pillow's pixels: enlarged, shrunk, in both orders of the axes, and slid."""
    pixels = _read_only(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8))
    image, fill = Image.fromarray(pixels), (1, 128, 254)
    for resample, reach in _REACH.items():
        for width, height in ((70, 80), (17, 31), (38, 11)):
            expected = np.asarray(image.resize((width, height), resample))
            if not np.array_equal(kernels.resize(pixels, (0, 0, 40, 50), (height, width), reach), expected):
                return False
    moved, torn = kernels.slide(pixels, 0.27, -3.3, fill)
    expected = np.asarray(_pillows_slide(image, 0.27, -3.3, Image.Resampling.BICUBIC, fill))
    return not torn and np.array_equal(moved, expected)
