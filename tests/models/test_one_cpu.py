"""Each form of one CPU has the values and the gradients of the textbook form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.typing import DTypeLike
from numpy.testing import assert_allclose
from tracing import computed, traced

from beit_jax.models import one_cpu
from beit_jax.models.activations import gelu
from beit_jax.models.attention import attend, of_every_sample, separated
from beit_jax.models.layers import project
from beit_jax.models.one_cpu import on_one_cpu

BATCH, TOKENS, HEADS, WIDTH = 3, 5, 2, 4
QKV, BIAS = (BATCH, TOKENS, 3, HEADS, WIDTH), (1, HEADS, TOKENS, TOKENS)
SCORES = 4 * HEADS * TOKENS**2  # bytes of one sample's
ROUNDING = {jnp.float32: 1e-6, jnp.bfloat16: 2.0**-7}  # of the largest value; bfloat16 has eight bits

FORMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]] = {
    "attend, one sample at a time": (lambda qkv, bias: attend(qkv, bias)[0], (QKV, BIAS), SCORES),
    "attend, one head at a time": (lambda qkv, bias: attend(qkv, bias)[0], (QKV, BIAS), 0),
    "attend, one head at a time, without bias": (lambda qkv: attend(qkv, None)[0], (QKV,), 0),
    "attend, in one piece": (lambda qkv, bias: attend(qkv, bias)[0], (QKV, BIAS), BATCH * SCORES),
    "separated": (lambda qkv: jnp.stack(separated(qkv)), (QKV,), 0),
    "of_every_sample": (lambda bias: of_every_sample(bias, BATCH), (BIAS,), 0),
    "project to heads": (project, ((BATCH, TOKENS, 8), (8, 3, HEADS, WIDTH), (3, HEADS, WIDTH)), 0),
    "project from heads": (project, ((BATCH, TOKENS, HEADS, WIDTH), (HEADS, WIDTH, 8), (8,)), 0),
    "gelu": (gelu, ((50, 40),), 0),
}
"""The function, the shapes of its arguments, and the size of the cache."""


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_textbook_form(monkeypatch: pytest.MonkeyPatch, form: str, dtype: DTypeLike) -> None:
    function, shapes, cache = FORMS[form]
    monkeypatch.setattr(one_cpu, "CACHE", cache)
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    upstream = jnp.asarray(rng.standard_normal(jax.eval_shape(function, *arguments).shape), jnp.float32)

    def both(*arguments: Any) -> Any:
        loss = jax.grad(lambda *given: (function(*given) * upstream).sum(), argnums=tuple(range(len(arguments))))
        return function(*arguments), *loss(*arguments)

    assert str(traced(both, *arguments)) != str(traced(both, *arguments, several=True)), "there are two forms"
    for found, textbook in zip(computed(both, *arguments), computed(both, *arguments, several=True), strict=True):
        assert found.dtype == textbook.dtype and found.shape == textbook.shape
        expected = np.asarray(textbook, np.float32)
        most = ROUNDING[dtype] * np.abs(expected).max()
        assert most > 0
        assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=4 * most)


def test_the_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = ("data", "fsdp", "tensor")
    assert on_one_cpu()
    for sizes, alone in (((1, 1, 1), True), ((2, 1, 1), False), ((1, 1, 2), False)):
        with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, axes, (AxisType.Auto,) * 3)):
            assert on_one_cpu() == alone
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not on_one_cpu()
