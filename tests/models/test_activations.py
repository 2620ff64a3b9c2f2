"""Activations and their derivatives are those of their definitions, on one CPU and on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm
from tracing import computed, traced

from beit_jax.models.elementary import ACTIVATIONS, gelu

X = np.concatenate([np.linspace(-12, 12, 4001), [-0.0, 0.0, 1e-30, -1e-30, 60.0, -60.0]])
Function = Callable[[Any], Any]


def value(x: np.ndarray) -> np.ndarray:
    return x * norm.cdf(x)


def derivative(x: np.ndarray) -> np.ndarray:
    return norm.cdf(x) + x * norm.pdf(x)


def second(x: np.ndarray) -> np.ndarray:
    return (2 - x**2) * norm.pdf(x)


def summed(function: Function) -> Function:
    return lambda x: function(x).sum()


@pytest.mark.parametrize("several", [False, True])
def test_gelu_and_its_derivatives(several: bool) -> None:
    """Against float64 by SciPy: values, first derivatives in both modes, second derivatives."""
    x = jnp.asarray(X, jnp.float32)
    exact = np.asarray(x, np.float64)

    def every(x: Any) -> Any:
        slope = jax.grad(summed(gelu))
        return *jax.jvp(gelu, (x,), (jnp.ones_like(x),)), slope(x), jax.grad(summed(slope))(x)

    expected = (value(exact), derivative(exact), derivative(exact), second(exact))
    for found, right in zip(computed(every, x, several=several), expected, strict=True):
        assert_allclose(found, right, rtol=1e-6, atol=1e-6)


def test_gelu_in_bfloat16_rounds_once() -> None:
    x = jnp.asarray(X, jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    for found, expected in ((gelu(x), value(exact)), (jax.grad(summed(gelu))(x), derivative(exact))):
        assert found.dtype == jnp.bfloat16
        assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_gelu_is_written_out_on_one_cpu_only() -> None:
    """Several devices compute JAX's own GELU. A narrow array needs no kernel, which would be compiled for it."""
    for narrow in (1.0, jnp.ones((3, 64))):
        text = str(traced(gelu, narrow))
        assert "custom_jvp" in text and "beit_gelu" not in text
    assert str(traced(gelu, 1.0, several=True)) == str(
        traced(lambda x: jax.nn.gelu(x, approximate=False), 1.0, several=True)
    )


def test_other_activations() -> None:
    """transformers' names; each differs from the others."""
    x = jnp.asarray(X, jnp.float32)
    exact = np.asarray(x, np.float64)
    tanh = exact * (0.5 + 0.5 * np.tanh(np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    with np.errstate(over="ignore"):
        expected = {
            "gelu": value(exact),
            "gelu_new": tanh,
            "gelu_pytorch_tanh": tanh,
            "relu": np.maximum(exact, 0),
            "silu": exact / (1 + np.exp(-exact)),
        }
    assert ACTIVATIONS.keys() == expected.keys()
    for name, function in ACTIVATIONS.items():
        assert_allclose(function(x), expected[name], rtol=1e-6, atol=1e-6)
