from typing import get_args

import numpy as np
import original_bias
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.interpolate import RectBivariateSpline
from tolerances import RESIZE, SPLINE

from beit_jax.config import PositionResize
from beit_jax.resize import BIAS_METHODS, _geometric_ratio, bias_matrix, bicubic_matrix, linear_matrix

sizes = st.integers(1, 40)


def test_every_method_of_configurations_exists() -> None:
    assert set(BIAS_METHODS) == set(get_args(PositionResize))


@given(sizes, sizes, st.sampled_from(["bilinear", "bicubic"]))
def test_torch_interpolation(source: int, target: int, mode: str) -> None:
    matrix = linear_matrix(source, target) if mode == "bilinear" else bicubic_matrix(source, target)
    image = np.random.default_rng(0).standard_normal((source, source)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None, None], (target, target), mode=mode)[0, 0]
    assert_allclose(matrix @ image @ matrix.T, expected, rtol=0.0, atol=RESIZE)


@pytest.mark.parametrize(("source", "target"), [(14, 16), (14, 24), (14, 32), (14, 40), (24, 14), (14, 10), (3, 5)])
def test_geometric_is_the_original_algorithm(source: int, target: int) -> None:
    """The same numbers by a matrix: one resize of an axis, applied to both."""
    src, dst = 2 * source - 1, 2 * target - 1
    x, dx = original_bias.coordinates(source, target)
    table = np.random.default_rng(0).standard_normal((src, src))
    expected = RectBivariateSpline(x, x, table.T, kx=3, ky=3, s=0)(np.clip(dx, x[0], x[-1]), np.clip(dx, x[0], x[-1])).T
    matrix = bias_matrix("geometric", src, dst)
    assert_allclose(matrix @ table @ matrix.T, expected, rtol=0.0, atol=SPLINE * 10)


@pytest.mark.parametrize(
    ("target", "ratio"),
    [(16, 1.023492832), (24, 1.090307446), (30, 1.125055904), (32, 1.134917812), (40, 1.168503628), (10, 1.010000935)],
)
def test_ratio_of_published_sizes(target: int, ratio: float) -> None:
    """The bisection's results of the original code, from 14 patches a side."""
    assert _geometric_ratio(27, 2 * target - 1) == pytest.approx(ratio, abs=1e-9)


@given(st.integers(2, 20), st.integers(2, 20), st.sampled_from(["bilinear", "geometric", "geometric_linear"]))
def test_every_method_keeps_constants_and_symmetry(source: int, target: int, method: str) -> None:
    if method == "geometric" and source < 3:
        source = 3  # a cubic needs more than three knots
    matrix = bias_matrix(method, 2 * source - 1, 2 * target - 1)
    assert_allclose(matrix.sum(axis=1), 1.0, rtol=0.0, atol=1e-9)
    assert_allclose(matrix, matrix[::-1, ::-1], rtol=0.0, atol=RESIZE)  # bilinear positions are float32


@pytest.mark.parametrize("method", ["bilinear", "geometric", "geometric_linear"])
def test_equal_sizes_are_untouched(method: str) -> None:
    assert np.array_equal(bias_matrix(method, 27, 27), np.eye(27))
