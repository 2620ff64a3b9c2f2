"""Each form of one CPU has the values and the gradients of the textbook form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.typing import DTypeLike
from numpy.testing import assert_allclose
from tracing import computed, traced

from beit_jax.models import one_cpu
from beit_jax.models.attention import attend, of_every_sample, separated
from beit_jax.models.elementary import gelu, project
from beit_jax.models.one_cpu import on_one_cpu, traced_for

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


AXES = ("data", "fsdp", "tensor")


def abstract_mesh(sizes: tuple[int, ...], platform: str | None) -> AbstractMesh:
    """Of devices of this platform, or of unknown ones."""
    device = None if platform is None else AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    return AbstractMesh(sizes, AXES, (AxisType.Auto,) * 3, abstract_device=device)


@pytest.mark.parametrize(
    ("sizes", "platform", "expected"),
    [
        ((1, 1, 1), "cpu", True),
        ((1, 1, 1), "tpu", False),
        ((1, 1, 1), "cuda", False),
        ((1, 1, 1), None, None),
        ((2, 1, 1), "cpu", False),
        ((1, 1, 2), None, False),
    ],
)
def test_a_mesh_names_the_device(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], platform: str | None, expected: bool | None
) -> None:
    for default in ("cpu", "gpu", "tpu"):  # of this machine, which says nothing about the device
        monkeypatch.setattr(jax, "default_backend", lambda default=default: default)
        with jax.sharding.use_abstract_mesh(abstract_mesh(sizes, platform)):
            assert on_one_cpu() is expected


def test_the_caller_says_what_is_traced_for_where_no_mesh_does() -> None:
    assert on_one_cpu() is None
    with traced_for("cpu"):
        assert on_one_cpu() is True
        with jax.sharding.use_abstract_mesh(abstract_mesh((1, 1, 1), "tpu")):
            assert on_one_cpu() is False
        with pytest.raises(ZeroDivisionError), traced_for("tpu"):
            assert on_one_cpu() is False
            raise ZeroDivisionError
        assert on_one_cpu() is True
    assert on_one_cpu() is None


def test_a_mesh_of_this_machine_names_its_device() -> None:
    mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        assert on_one_cpu() is (jax.devices()[0].platform == "cpu")
