"""Values of images: scaled by their type, and resized channel by channel."""

from functools import cache
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, Shaped
from PIL import Image

BY_TYPE: Final = 1 / 255
"""The factor that brings 8-bit values to [0, 1], and stands for the same of the other types (`rescale_factor`)."""


def rescale_factor(factor: float | None, dtype: np.dtype[Any]) -> float:
    """What the values of an image of a type are multiplied by: `factor`, or 1 if it is None.

    A factor of 1/255 means the type's own scale: one over its largest value, and 1 for floats, as torchvision's
    ``to_dtype(scale=True)``.
    """
    if factor is None:
        return 1.0
    if factor != BY_TYPE or dtype == np.uint8:
        return factor
    return 1.0 if dtype.kind == "f" else 1 / np.iinfo(dtype).max


def scaled(pixels: Shaped[np.ndarray, "h w c"], factor: float) -> Float32[np.ndarray, "h w c"]:
    """The pixels times a factor, computed in float64 and rounded to float32."""
    divisor = _divisor(factor) if pixels.dtype == np.uint8 else None
    if divisor is not None:
        return np.divide(pixels, divisor, dtype=np.float32)
    return (pixels.astype(np.float64) * factor).astype(np.float32)


@cache
def _divisor(factor: float) -> np.float32 | None:
    """A number by which float32 may be divided to the same effect, for all 256 levels; None if there is none."""
    levels = np.arange(256, dtype=np.uint8)
    divisor = np.float32(1 / factor)
    found, expected = np.divide(levels, divisor, dtype=np.float32), (levels.astype(np.float64) * factor)
    return divisor if np.array_equal(found, expected.astype(np.float32)) else None


def resized(
    pixels: Shaped[np.ndarray, "h w c"], size: tuple[int, int], resample: Image.Resampling
) -> Shaped[np.ndarray, "h2 w2 c"]:
    """Resizes every channel of an image to (height, width) by Pillow: uint8 stays so, every other type becomes float32.

    So an image of three channels becomes what Pillow makes of the same RGB image.
    """
    kind = np.uint8 if pixels.dtype == np.uint8 else np.float32
    found = np.empty((*size, pixels.shape[2]), kind)
    for channel in range(pixels.shape[2]):
        plane = Image.fromarray(np.ascontiguousarray(pixels[..., channel], kind))
        found[..., channel] = np.asarray(plane.resize(size[::-1], resample))
    return found
