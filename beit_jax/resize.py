"""Resampling of position tables by one matrix per axis.

Every method is linear in the table. So its matrices are built once, in float64 with NumPy from the (static) sizes, and
applied as ``rows @ table @ columns.T``, which is exact and differentiable. `jax.image.resize` is not used: its cubic
kernel has a = -0.5 where torch has -0.75, and it has no geometric method.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import numpy as np

Matrix = np.ndarray  # [target, source] float64


@lru_cache(maxsize=64)
def bias_matrix(method: str, source: int, target: int) -> Matrix:
    """Resamples one axis of a relative position bias table from `source` to `target` offsets, both odd (2 * side - 1).

    `method` is one of `BIAS_METHODS`, which are the values of `BeitConfig.position_resize`. Equal sizes give the
    identity, for every method.
    """
    return np.eye(source) if source == target else BIAS_METHODS[method](source, target)


def linear_matrix(source: int, target: int) -> Matrix:
    """torch's ``interpolate(mode="bilinear", align_corners=False)`` along one axis, without antialiasing."""
    lower, upper, weight = linear_taps(source, target)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), lower), 1.0 - weight)
    np.add.at(matrix, (np.arange(target), upper), weight)
    return matrix


def linear_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two source samples around each target sample, and the weight of the second source sample, each [target]."""
    position = np.maximum(_torch_position(source, target), 0.0)
    lower = np.floor(position).astype(int)
    return lower, np.minimum(lower + 1, source - 1), position - lower


@lru_cache(maxsize=64)
def bicubic_matrix(source: int, target: int) -> Matrix:
    """torch's ``interpolate(mode="bicubic", align_corners=False)`` along one axis: a = -0.75, clamped at the border."""
    if source == target:
        return np.eye(source)
    position = _torch_position(source, target)
    lower = np.floor(position).astype(int)
    matrix = np.zeros((target, source))
    for tap in (-1, 0, 1, 2):
        weight = _cubic_kernel(np.abs(position - (lower + tap)), -0.75)
        np.add.at(matrix, (np.arange(target), np.clip(lower + tap, 0, source - 1)), weight)
    return matrix


def antialiased_bicubic_matrix(source: int, target: int) -> np.ndarray:
    """torch's ``interpolate(mode="bicubic", antialias=True)`` along one axis: Pillow's kernel, a = -0.5, widened when
    shrinking, weights normalised."""
    scale = source / target
    support = max(scale, 1.0)
    centre = (np.arange(target)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(source)[None] + 0.5 - centre) / support
    weight = np.where(distance < 2, _cubic_kernel(distance, -0.5), 0.0)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


def _torch_position(source: int, target: int) -> np.ndarray:
    """The position of each target sample in the source. In float32, as in torch: float64 would differ by 1e-5."""
    scale, half = np.float32(source / target), np.float32(0.5)
    return (scale * (np.arange(target, dtype=np.float32) + half) - half).astype(np.float64)


def _cubic_kernel(distance: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution (Keys 1981, eq. 4) at distances in [0, 2]."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


def _geometric_matrix(source: int, target: int, degree: int) -> Matrix:
    """The table resize of the original code: a spline (not-a-knot if cubic) through the source offsets.

    The source offsets are placed at geometrically growing distances. So near offsets keep their values, and far offsets
    stretch to the new window.

    Source: microsoft/unilm@768a3c8 beit/run_class_finetuning.py, "geometric progression" (SciPy's interp2d there, which
    clamps to the border). When the table shrinks this crops its centre.
    """
    from scipy.interpolate import make_interp_spline  # takes half a second, and most programs do not need it

    grid, wanted = geometric_grid(source, target)
    spline = make_interp_spline(grid, np.eye(source), k=degree)
    return np.asarray(spline(np.clip(wanted, grid[0], grid[-1])))


def geometric_grid(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates of the source's offsets, and of the target's: ``-t, ..., t`` with t = target // 2.

    The sum is computed term by term, as in the original: another order of additions changes the last bit. An axis that
    keeps its size keeps its values (the original resizes square tables only, and only to other sizes).
    """
    wanted = np.arange(target) - float(target // 2)
    if source == target:
        return wanted, wanted
    ratio, steps, current = _geometric_ratio(source, target), [], 1.0
    for i in range(source // 2):
        steps.append(current)
        current += ratio ** (i + 1)
    grid = np.array([*(-step for step in reversed(steps)), 0.0, *steps])
    return grid, wanted


def _geometric_ratio(source: int, target: int) -> float:
    """The q with 1 + q + ... + q**(source//2 - 1) = target // 2, by the original's bisection of [1.01, 1.5] to 1e-6.

    The result is the last midpoint, as in the original: the sixth digit of q changes converted checkpoints.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        middle = (low + high) / 2.0
        if (1.0 - middle ** (source // 2)) / (1.0 - middle) > target // 2:
            high = middle
        else:
            low = middle
    return middle


BIAS_METHODS: Mapping[str, Callable[[int, int], Matrix]] = {
    "bilinear": linear_matrix,
    "geometric": partial(_geometric_matrix, degree=3),
    "geometric_linear": partial(_geometric_matrix, degree=1),
}
"""The methods of `bias_matrix`: as transformers does it; as BEiT's original code does it; as timm does it."""
