"""Shear and translation along one axis, bit for bit as Pillow's affine transform and in a fraction of its time.

Pillow evaluates a 4 x 4 neighbourhood per pixel, in float64. Where rows only slide along themselves, one row of four
suffices; float32 tells all but a few of the whole numbers that Pillow cuts its values down to, and those few are
computed as Pillow does.
"""

from typing import Final, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8
from numpy.lib.stride_tricks import as_strided
from PIL import Image

_MARGIN: Final = np.float32(2**-10)  # of a level; ten roundings to float32 of values below 2^11 err by less
_NEAR: Final = 1e-6  # of a pixel; float64 errs by less in the place where a pixel comes from
_VALUES: Final = 30_000  # at a time: float32 of 120 kB stays in the cache, and malloc does not ask the system for it
_FEW: Final = 1 / 8  # of all values; with more left to float64, Pillow is as fast


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
    if resample == Image.Resampling.BICUBIC:
        moved = _bicubic(np.asarray(image), shear, shift, fill)
        if moved is not None:
            return Image.fromarray(moved)
    coefficients = (1.0, shear, shift, 0.0, 1.0, 0.0)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample, fillcolor=fill)


def _bicubic(
    pixels: UInt8[np.ndarray, "h w 3"], shear: float, shift: float, fill: tuple[int, int, int]
) -> UInt8[np.ndarray, "h w 3"] | None:
    """None where rounding decides too much: on which side of a pixel rows land, or the levels of many values."""
    height, width, _ = pixels.shape
    slides = shear * (np.arange(height if shear else 1) + 0.5) + shift
    if (np.abs(2 * slides - np.rint(2 * slides)) < _NEAR).any():
        return None
    whole, nearest = np.floor(slides), np.floor(slides + 0.5).clip(-width, width).astype(np.int64)
    first, last = max(0, -int(nearest.max())), width - max(0, int(nearest.min()))  # columns that come from inside
    moved = np.empty((height, 3 * width), np.uint8)
    moved[:] = np.tile(np.array(fill, np.uint8), width)
    if first < last:
        length = last - first + 3
        taps = _slid(pixels, (whole + first - 1).clip(-length, width).astype(np.int64), length)
        values, unsure = _rows_cubic(taps, np.broadcast_to(slides - whole, height))
        if len(unsure) > _FEW * taps.size:
            return None
        rows, places = np.divmod(unsure, 3 * length)
        sources = places // 3 + first + 0.5 + shear * (rows + 0.5) + shift - 0.5
        values[rows, places] = _exact(taps.ravel(), unsure, sources - np.floor(sources))
        window = moved[:, 3 * first : 3 * last]
        window ^= (window ^ values[:, :-9]) & _inside(nearest + first, width, last - first)
    return moved.reshape(pixels.shape)


def _slid(
    pixels: UInt8[np.ndarray, "h w 3"], starts: Int64[np.ndarray, " #h"], length: int
) -> UInt8[np.ndarray, "h values"]:
    """`length` pixels of every row from its start on; the edge pixel goes on outside the row. One start serves all."""
    height, width, _ = pixels.shape
    before, after = max(0, -int(starts.min())), max(0, int(starts.max()) + length - width)
    padded = np.empty((height, before + width + after, 3), np.uint8)
    padded[:, before : before + width] = pixels
    padded[:, :before] = pixels[:, :1]
    padded[:, before + width :] = pixels[:, -1:]
    return _windows(padded, np.arange(height) * padded[0].size + 3 * (starts + before), 3 * length)


def _inside(starts: Int64[np.ndarray, " #h"], width: int, length: int) -> UInt8[np.ndarray, "#h values"]:
    """255 where the `length` pixels from a start on are some of `width` pixels, else 0; three values for each."""
    row = np.repeat(np.array([0, 255, 0], np.uint8), 3 * width)
    return _windows(row, 3 * (width + starts), 3 * length)


def _windows(
    values: UInt8[np.ndarray, "..."], starts: Int64[np.ndarray, " n"], size: int
) -> UInt8[np.ndarray, "n size"]:
    return as_strided(values, (values.size - size + 1, size), (1, 1))[starts]  # of all windows


def _rows_cubic(
    taps: UInt8[np.ndarray, "h values"], distance: Float64[np.ndarray, " h"]
) -> tuple[UInt8[np.ndarray, "h values"], Int64[np.ndarray, " unsure"]]:
    """`_cubic`, some rows at a time: their intermediate values stay in the cache, and malloc keeps their memory."""
    height, size = taps.shape
    found, unsure = np.empty(taps.shape, np.uint8), []
    step = max(1, _VALUES // size)
    for row in range(0, height, step):
        rows = slice(row, row + step)
        doubtful = _cubic(taps[rows].ravel(), distance[rows], found[rows].ravel())
        unsure.append(np.flatnonzero(doubtful) + row * size)
    return found, np.concatenate(unsure)


def _cubic(
    taps: UInt8[np.ndarray, " values"], distance: Float64[np.ndarray, " rows"], found: UInt8[np.ndarray, " values"]
) -> Bool[np.ndarray, " compared"]:
    """Writes Pillow's cubic (a = -1) between a value and its three successors to `found`, and says where it may be off
    by one. The last nine have no successors.
    """
    values = taps.astype(np.int16)
    first, second, third, fourth = values[:-9], values[3:-6], values[6:-3], values[9:]
    cubic = first - second
    square = cubic + cubic
    cubic += third
    cubic -= fourth
    square += third
    square -= fourth
    linear = third - first
    part = np.repeat(distance.astype(np.float32), len(taps) // len(distance))[:-9]
    value = cubic * part
    np.subtract(square, value, out=value)
    value *= part
    value += linear
    value *= part
    value += second
    np.clip(value, 0, 255.5, out=value)
    value -= _MARGIN
    lower = value.astype(np.uint8)
    value += 2 * _MARGIN
    found[:-9] = value
    cubic |= square
    cubic |= linear
    return (found[:-9] != lower) & (cubic != 0)  # where four neighbours are equal nothing is rounded


def _exact(
    flat: UInt8[np.ndarray, " values"], places: Int64[np.ndarray, " n"], distance: Float64[np.ndarray, " n"]
) -> UInt8[np.ndarray, " n"]:
    """`_cubic` at some places in Pillow's precision and order of operations, which is what makes the last bit equal."""
    first, second, third, fourth = (flat[places + offset].astype(np.float64) for offset in (0, 3, 6, 9))
    cubic = -first + second - third + fourth
    square = 2 * (first - second) + third - fourth
    linear = third - first
    value = second + distance * (linear + distance * (square + distance * cubic))
    return value.clip(0, 255).astype(np.uint8)
