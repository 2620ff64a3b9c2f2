"""Projections over several axes have the same values on one CPU, by matrices, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tracing import computed, traced

from beit_jax.models.elementary import project

CASES = {
    "qkv": ("bnd,dkhe->bnkhe", (2, 5, 8), (8, 3, 2, 4)),
    "out": ("bnhe,hed->bnd", (2, 5, 2, 4), (2, 4, 8)),
}


def drawn(case: str) -> tuple[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    spec, inputs, kernel = CASES[case]
    return spec, [rng.standard_normal(s, np.float32) for s in (inputs, kernel, kernel[len(inputs) - 2 :])]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_projections_and_their_gradients(case: str, several: bool) -> None:
    """Against float64 by NumPy."""
    spec, arrays = drawn(case)
    x, kernel, bias = (array.astype(np.float64) for array in arrays)
    expected = np.einsum(spec, x, kernel) + bias
    weight = np.random.default_rng(1).standard_normal(expected.shape, np.float32)
    inputs, both, outputs = spec.replace("->", ",").split(",")
    gradients = (
        np.einsum(f"{outputs},{both}->{inputs}", weight, kernel),
        np.einsum(f"{inputs},{outputs}->{both}", x, weight),
        weight.astype(np.float64).sum(axis=(0, 1)),
    )
    (value,) = computed(project, *arrays, several=several)
    assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    backward = jax.grad(lambda *given: (weight * project(*given)).sum(), argnums=(0, 1, 2))
    for one, other in zip(computed(backward, *arrays, several=several), gradients, strict=True):
        assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_devices_keep_the_heads_as_an_axis(case: str) -> None:
    """Several devices share out the axis of heads. One CPU multiplies matrices."""
    _, arrays = drawn(case)

    def largest_rank(several: bool) -> int:
        equations = traced(project, *arrays, several=several).eqns
        (product,) = (equation for equation in equations if equation.primitive.name == "dot_general")
        return max(variable.aval.ndim for variable in (*product.invars, *product.outvars))

    assert largest_rank(False) == 2
    assert largest_rank(True) > 3


@pytest.mark.parametrize("several", [False, True])
def test_bfloat16_is_summed_in_float32(several: bool) -> None:
    """The result has the dtype of the bias: the dtype of the inputs, or float32 before the residual stream."""
    _, (x, kernel, bias) = drawn("out")
    low = [jnp.asarray(array, jnp.bfloat16) for array in (x, kernel)]
    exact = np.einsum("bnhe,hed->bnd", *(np.asarray(array, np.float64) for array in low)) + bias
    (wide,) = computed(project, *low, jnp.asarray(bias), several=several)
    assert_allclose(wide, exact, rtol=1e-5, atol=1e-5)
    (narrow,) = computed(project, *low, jnp.asarray(bias, jnp.bfloat16), several=several)
    assert narrow.dtype == jnp.bfloat16
