"""Pillow's resampling of 8-bit images, as loops that Numba compiles. They are called through `resample`.

The innermost loops run over neighbours in memory, so that vector units can be used. Nothing here checks bounds.
"""

import math
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numpy as np
from numba import njit

_F = TypeVar("_F", bound=Callable[..., Any])

_BITS: Final = 22  # bits of a weight after the binary point
_HALF: Final = 1 << (_BITS - 1)
_ROWS: Final = 64  # rows that are computed together
_COLUMNS: Final = 256  # values that are transposed at a time: with _ROWS rows, they fill a third of a first-level cache


def _compiled(function: _F) -> _F:
    """Compiles a function at its first call, and stores the machine code for other processes."""
    try:
        return cast(_F, njit(cache=True, nogil=True)(function))
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return cast(_F, njit(nogil=True)(function))


@_compiled
def resize(pixels: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int], reach: float) -> np.ndarray:
    """Resizes the part of an image [h, w, 3] in a box (left, top, right, bottom) to (height, width), all uint8.

    There are two passes over products of whole numbers, levels and weights. The sums of the first pass are rounded to
    levels, so the result depends on which pass comes first.

    Args:
        pixels: C-contiguous.
        box: a box within the image.
        reach: the reach of the filter in pixels: 1 for bilinear, 2 for bicubic.

    Source of the arithmetic: Pillow 13.0.0 src/libImaging/Resample.c.
    """
    left, top, right, bottom = box
    height, width = size
    rows, columns = bottom - top, right - left
    values = pixels.reshape(pixels.shape[0], -1)
    firsts, counts, weights = _weights(columns, width, reach)
    tops, lengths, downward = _weights(rows, height, reach)
    if rows > height and rows - height > 2 * (columns - width):
        part = _vertical(values, 3 * left, 3 * columns, tops + np.int32(top), lengths, downward)
        return _horizontal(part, 0, 0, height, firsts, counts, weights).reshape(height, width, 3)
    first = tops[0]
    used = tops[-1] + lengths[-1] - first
    part = _horizontal(values, top + first, left, used, firsts, counts, weights)
    return _vertical(part, 0, 3 * width, tops - first, lengths, downward).reshape(height, width, 3)


@_compiled
def _weights(size_in: int, size_out: int, reach: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every output: its first input [out], the number of its inputs [out] and their weights [out, most], int32."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = reach * stretch
    most = math.ceil(support) * 2 + 1
    firsts, counts = np.empty(size_out, np.int32), np.empty(size_out, np.int32)
    weights, shares = np.zeros((size_out, most), np.int32), np.empty(most)
    for out in range(size_out):
        centre = (out + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), size_in) - first
        total = 0.0
        for i in range(count):
            shares[i] = _filter(abs((i + first - centre + 0.5) * (1.0 / stretch)), reach)
            total += shares[i]
        for i in range(count):
            share = shares[i] / total if total != 0.0 else shares[i]
            weights[out, i] = int(share * (1 << _BITS) + (-0.5 if share < 0 else 0.5))
        firsts[out], counts[out] = first, count
    return firsts, counts, weights


@_compiled
def _filter(x: float, reach: float) -> float:
    """The weight at a distance: a triangle, or the cubic with a slope of -1/2."""
    if x >= reach:
        return 0.0
    if reach == 1.0:
        return 1.0 - x
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5


@_compiled
def _level(total: np.int32) -> np.int32:
    return min(max(np.int32(total >> np.int32(_BITS)), np.int32(0)), np.int32(255))


@_compiled
def _vertical(
    values: np.ndarray, left: int, columns: int, firsts: np.ndarray, counts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Weighted sums over rows, for the columns from `left` on: [out, columns]."""
    found, totals = np.empty((len(firsts), columns), np.uint8), np.empty(columns, np.int32)
    for out in range(len(firsts)):
        totals[:] = _HALF
        for i in range(counts[out]):
            row, weight = values[firsts[out] + i, left : left + columns], weights[out, i]
            for j in range(columns):
                totals[j] = np.int32(totals[j] + np.int32(np.int32(row[j]) * weight))
        for j in range(columns):
            found[out, j] = _level(totals[j])
    return found


@_compiled
def _horizontal(
    values: np.ndarray, top: int, left: int, rows: int, firsts: np.ndarray, counts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Weighted sums of pixels from `left` on, for `rows` rows from `top` on: [rows, 3 * out].

    Some rows at a time are transposed, so that the sums run over neighbours in memory, and transposed back.
    """
    width = 3 * (firsts[-1] + counts[-1])
    turned, sums = np.empty((width, _ROWS), np.uint8), np.empty((3 * len(firsts), _ROWS), np.uint8)
    found, totals = np.empty((rows, 3 * len(firsts)), np.uint8), np.empty(_ROWS, np.int32)
    for start in range(0, rows, _ROWS):
        several = min(_ROWS, rows - start)
        for column in range(0, width, _COLUMNS):
            some = min(_COLUMNS, width - column)
            for r in range(several):
                first = 3 * left + column
                row = values[top + start + r, first : first + some]
                for j in range(some):
                    turned[column + j, r] = row[j]
        for out in range(len(firsts)):
            for colour in range(3):
                totals[:] = _HALF
                for i in range(counts[out]):
                    line, weight = turned[3 * (firsts[out] + i) + colour], weights[out, i]
                    for r in range(_ROWS):
                        totals[r] = np.int32(totals[r] + np.int32(np.int32(line[r]) * weight))
                line = sums[3 * out + colour]
                for r in range(_ROWS):
                    line[r] = _level(totals[r])
        for r in range(several):
            row = found[start + r]
            for j in range(3 * len(firsts)):
                row[j] = sums[j, r]
    return found


@_compiled
def slide(pixels: np.ndarray, shear: float, shift: float, fill: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
    """Slides the rows of an image: pixel (x, y) comes from (x + shear * y + shift, y), measured at pixel centres.

    Pillow evaluates 4 x 4 neighbours. Where rows slide along themselves, neighbours in other rows have no weight.

    Args:
        pixels: uint8 [h, w, 3], C-contiguous.
        fill: the colour of pixels from outside the image.

    Returns:
        The image, and True if some row is wrong: rounding tears a row whose pixels fall on both sides of whole pixels.

    Source of the arithmetic: Pillow 13.0.0 src/libImaging/Geometry.c, `affine_transform` and `bicubic_filter32RGB`.
    """
    height, width, _ = pixels.shape
    values, found = pixels.reshape(height, -1), np.empty((height, 3 * width), np.uint8)
    # Two pixels on either side, and one that only torn rows read.
    padded, parts, torn = np.empty(3 * (width + 5), np.uint8), np.empty(3 * width), False
    for y in range(height):
        begin, end, lean = 0, 0, shear * (y + 0.5)
        for x in range(width):
            place = (x + 0.5) + lean + shift
            begin += place < 0.0
            end += place < width
        for j in range(0, 3 * width, 3):
            for colour in range(3):
                found[y, j + colour] = fill[colour]
        if begin == end:
            continue
        offset = math.floor((begin + 0.5) + lean + shift - 0.5) - begin
        for x in range(begin, end):
            place = (x + 0.5) + lean + shift - 0.5
            whole = math.floor(place)
            torn |= whole != x + offset
            for colour in range(3):
                parts[3 * x + colour] = place - whole
        padded[6 : 6 + 3 * width] = values[y]
        for colour in range(3):
            padded[colour] = padded[3 + colour] = values[y, colour]
            for pixel in range(width + 2, width + 5):
                padded[3 * pixel + colour] = values[y, 3 * (width - 1) + colour]
        start, count = 3 * (begin + offset + 1), 3 * (end - begin)
        taps, part, row = padded[start : start + count + 9], parts[3 * begin : 3 * end], found[y, 3 * begin : 3 * end]
        for j in range(count):
            first, second = np.float64(taps[j]), np.float64(taps[j + 3])
            third, fourth = np.float64(taps[j + 6]), np.float64(taps[j + 9])
            cubic, square = -first + second - third + fourth, 2.0 * (first - second) + third - fourth
            level = second + part[j] * (third - first + part[j] * (square + part[j] * cubic))
            row[j] = np.uint8(min(max(level, 0.0), 255.0))
    return found.reshape(height, width, 3), torn
