"""Shear and translation along one axis, bit for bit as Pillow's affine transform and in about half its time.

Pillow evaluates a 4 x 4 neighbourhood per pixel. Where rows only slide along themselves, one row of four suffices.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int16, Int64, UInt8
from PIL import Image


def slide(
    image: Image.Image,
    axis: Literal["x", "y"],
    shear: float,
    shift: float,
    resample: Literal[Image.Resampling.BILINEAR, Image.Resampling.BICUBIC],
    fill: tuple[int, int, int],
) -> Image.Image:
    """`image`, RGB, whose pixel (x, y) comes from (x + shear * y + shift, y), counted at pixel centres; y likewise.

    Equals ``image.transform(image.size, AFFINE, (1, shear, shift, 0, 1, 0), resample, fillcolor=fill)``.
    """
    if axis == "y":
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        return slide(turned, "x", shear, shift, resample, fill).transpose(Image.Transpose.TRANSPOSE)
    moved = _bicubic(image, shear, shift, fill) if resample == Image.Resampling.BICUBIC else None
    if moved is not None:
        return moved
    coefficients = (1.0, shear, shift, 0.0, 1.0, 0.0)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample, fillcolor=fill)


def _bicubic(image: Image.Image, shear: float, shift: float, fill: tuple[int, int, int]) -> Image.Image | None:
    """None where rounding tears a row apart, which Pillow's result then shows."""
    width, height = image.size
    centres = np.arange(width) + 0.5 + shear * (np.arange(height if shear else 1)[:, None] + 0.5) + shift
    inside = (centres >= 0) & (centres < width)
    columns = np.flatnonzero(inside.any(axis=0))
    if not columns.size:
        return Image.new("RGB", image.size, fill)
    window = slice(columns[0], columns[-1] + 1)
    sources = centres[:, window] - 0.5
    whole = np.floor(sources)
    offsets = whole[:, 0].astype(np.int64)
    if not (whole == offsets[:, None] + np.arange(whole.shape[1])).all():
        return None
    distance = sources - whole
    bands = []
    for band, colour in zip(image.split(), fill, strict=True):  # one by one, they stay in the cache
        taps = _slid(np.asarray(band), offsets - 1, whole.shape[1] + 3)
        moved = np.full((height, width), colour, np.uint8)
        np.copyto(moved[:, window], _cubic(taps, distance), where=inside[:, window])
        bands.append(Image.fromarray(moved))
    return Image.merge("RGB", bands)


def _slid(
    band: UInt8[np.ndarray, "h w"], starts: Int64[np.ndarray, "#h"], length: int
) -> Int16[np.ndarray, "h length"]:
    """`length` pixels of every row from its start on; the edge pixel goes on outside the row. One start serves all."""
    height, width = band.shape
    before, after = max(0, -int(starts.min())), max(0, int(starts.max()) + length - width)
    padded = np.empty((height, before + width + after), np.int16)
    padded[:, before : before + width] = band
    padded[:, :before] = band[:, :1]
    padded[:, before + width :] = band[:, -1:]
    starts = starts + before
    if len(starts) == 1:
        return padded[:, starts[0] : starts[0] + length]
    slid = np.empty((height, length), np.int16)
    cuts = [0, *(np.flatnonzero(np.diff(starts)) + 1).tolist(), height]
    for first, last in pairwise(cuts):  # rows that slide equally far move together
        slid[first:last] = padded[first:last, starts[first] : starts[first] + length]
    return slid


def _cubic(taps: Int16[np.ndarray, "h taps"], distance: Float64[np.ndarray, "#h w"]) -> UInt8[np.ndarray, "h w"]:
    """Pillow's cubic (a = -1) in its order of operations, which is what makes the last bit equal."""
    first, second, third, fourth = taps[:, :-3], taps[:, 1:-2], taps[:, 2:-1], taps[:, 3:]
    left, right = first - second, third - fourth
    right += left
    left += right
    value = right * distance
    np.subtract(left, value, out=value)
    value *= distance
    value += third - first
    value *= distance
    value += second
    np.clip(value, 0, 255, out=value)
    return value.astype(np.uint8)
