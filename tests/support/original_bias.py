"""The original's resize of relative position bias tables, as it states it, on a spline.

SciPy removed interp2d, which the original calls; `RectBivariateSpline` of degree 3 equals it bit for bit.
Source: microsoft/unilm@768a3c8 beit/run_class_finetuning.py, "geometric progression".
"""

import numpy as np
from scipy.interpolate import RectBivariateSpline


def coordinates(source: int, target: int) -> tuple[list[float], np.ndarray]:
    """Where the table's entries lie along an axis, and where new ones are wanted, for grids of so many patches."""
    src, dst = 2 * source - 1, 2 * target - 1
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2.0
        if (1.0 - q ** (src // 2)) / (1.0 - q) > dst // 2:
            right = q
        else:
            left = q
    distances, current = [], 1.0
    for i in range(src // 2):
        distances.append(current)
        current += q ** (i + 1)
    t = dst // 2.0
    return [-d for d in reversed(distances)] + [0.0] + distances, np.arange(-t, t + 0.1, 1.0)


def resize(table: np.ndarray, source: int, target: int) -> np.ndarray:
    """A table [offsets + 3, heads] for another grid, head by head."""
    x, dx = coordinates(source, target)
    heads = []
    for head in range(table.shape[1]):
        z = table[:-3, head].reshape(len(x), len(x)).astype(np.float32)
        heads.append(RectBivariateSpline(x, x, z.T, kx=3, ky=3, s=0)(dx, dx).T.reshape(-1, 1))
    return np.concatenate([np.concatenate(heads, axis=1).astype(np.float32), table[-3:]])
