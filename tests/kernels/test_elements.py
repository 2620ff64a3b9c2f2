"""The elements of a block as TPUs and GPUs compute them: the values and gradients are those of the textbook form."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tracing import computed

from beit_jax.config import BeitConfig
from beit_jax.kernels import elements, tpu
from beit_jax.kernels.mesh import KEPT
from beit_jax.models.attention import attend
from beit_jax.models.build import abstract_model, build_model
from beit_jax.models.elementary import gelu, layer_norm
from beit_jax.models.interface import Remat
from beit_jax.models.layers import Block
from beit_jax.models.one_cpu import traced_for
from beit_jax.tree import Nested

CONFIG = BeitConfig(
    task="image_classification", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    image_size=(16, 16), patch_size=(8, 8), layer_scale_init_value=0.1, drop_path_rate=0.3, labels=("a", "b"),
)  # fmt: skip


def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as TPUs compute it, and new to JAX."""

    def run(*arguments: Any) -> Any:
        with ExitStack() as stack:
            for target in (elements.ACCELERATORS, tpu.TPUS):
                stack.enter_context(target.interpreted())
            return jax.jit(lambda *given: function(*given))(*arguments)

    return run


def apart(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest value."""
    found, expected = (np.asarray(one, np.float64) for one in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def both_ways(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """The values of a function, and the gradients of all of its arguments but the last from the last."""

    def run(*arguments: Any) -> list[Any]:
        *given, upstream = arguments
        found, back = jax.vjp(function, *given)
        return [found, *back(upstream.astype(found.dtype))]

    return run


def norm(dtype: Any) -> Callable[..., Any]:
    module = layer_norm(CONFIG, nnx.Rngs(0))

    def function(x: Any, scale: Any, bias: Any) -> Any:
        given = jax.tree.map(lambda leaf: leaf, module)
        given.scale, given.bias = nnx.Param(scale), nnx.Param(bias)
        return given(x.astype(dtype))

    return function


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = 3 + rng.standard_normal((2, 5, 32)), *rng.standard_normal((2, 32)), rng.standard_normal((2, 5, 32))
    given = [jnp.asarray(array, jnp.float32) for array in arrays]
    function = both_ways(norm(dtype))
    for mine, textbook in zip(interpreted(function)(*given), computed(function, *given, several=True), strict=True):
        assert mine.dtype == textbook.dtype and apart(mine, textbook) <= (1e-5 if dtype == jnp.float32 else 1e-2)


def test_gelu() -> None:
    x = jnp.linspace(-6, 6, 101)
    for mine, textbook in zip(
        interpreted(both_ways(gelu))(x, jnp.ones(101)), computed(both_ways(gelu), x, jnp.ones(101), several=True),
        strict=True,
    ):  # fmt: skip
        assert apart(mine, textbook) <= 1e-6


def gradient(config: BeitConfig, remat: Remat, params: Nested, pixels: Any) -> Any:
    def loss(params: Nested) -> Any:
        return jnp.square(build_model(config, params)(pixels, key=jax.random.key(0), remat=remat).logits).sum()

    return jax.grad(loss)(params)


def drawn(config: BeitConfig) -> tuple[Nested, Any]:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), abstract_model(config)[1]
    )
    return params, jnp.asarray(rng.standard_normal((4, 16, 16, 3)), jnp.float32)


@pytest.mark.parametrize("remat", ["dots", pytest.param("none", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("scale", [0.1, pytest.param(0.0, marks=pytest.mark.thorough)])
def test_a_model_has_the_gradients_of_the_textbook_form(remat: Remat, scale: float) -> None:
    config = replace(CONFIG, layer_scale_init_value=scale, hidden_dropout_prob=0.2)
    leaves, structure = jax.tree.flatten(drawn(config))

    def function(*leaves: Any) -> Any:
        return gradient(config, remat, *jax.tree.unflatten(structure, leaves))

    found = jax.tree.leaves(interpreted(function)(*leaves))
    for mine, textbook in zip(found, computed(function, *leaves, several=True), strict=True):
        assert apart(mine, textbook) <= 1e-5


def test_what_a_block_keeps() -> None:
    """Under "dots", of each block: its input, the stream between its branches, queries with keys and values, averages,
    the MLP before its activation, and of both norms two numbers of each row. Nothing but the stream is float32."""
    shapes = abstract_model(CONFIG)[1], jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)

    def function(params: Nested, pixels: Any) -> Any:
        model = nnx.merge(abstract_model(CONFIG, dtype=jnp.bfloat16)[0], params)
        return jnp.square(model(pixels, key=jax.random.key(0), remat="dots").logits).sum()

    with traced_for("tpu"), elements.interpreted(), tpu.interpreted():
        program = jax.make_jaxpr(lambda params, pixels: jax.grad(function)(params, pixels))(*shapes)
    forward = next(step for step in program.eqns if step.primitive.name == "scan")
    stacks = [one.aval for one in forward.outvars if one.aval.shape[:3] == (2, 4, 5)]
    kept = sorted((one.dtype.name, one.shape[3:]) for one in stacks)
    rows = [("float32", ())] * 4
    assert kept == [("bfloat16", (32,)), ("bfloat16", (48,)), ("bfloat16", (96,)), *rows, *[("float32", (32,))] * 2]


def test_the_callers_block_keeps_its_parameters() -> None:
    block = Block(CONFIG, rngs=nnx.Rngs(0))
    before = jax.tree.leaves(block)
    with elements.interpreted():
        block(jnp.ones((1, 5, 32)), (2, 2))
    assert all(mine is theirs for mine, theirs in zip(jax.tree.leaves(block), before, strict=True))


def test_one_tpu_needs_no_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is the only device; what is compiled for a CPU there holds the textbook form alone."""
    qkv = jax.ShapeDtypeStruct((2, 5, 3, 2, 64), jnp.float32)

    def kernels() -> tuple[int, int]:
        program = jax.jit(lambda qkv: attend(qkv, None)[0]).trace(qkv)
        text = program.lower(lowering_platforms=("cpu",)).as_text()
        return min(1, str(program.jaxpr).count("name=attention_rows")), text.count("tpu_custom_call")

    assert kernels() == (0, 0)
    monkeypatch.setattr(tpu.TPUS, "alone", lambda: SimpleNamespace(device_kind="TPU v5 lite", platform="tpu"))
    assert kernels() == (1, 0)


@pytest.mark.parametrize(("platform", "marked"), [("tpu", True), ("cuda", True), ("cpu", False)])
def test_a_mesh_says_whether_there_are_accelerators(platform: str, marked: bool) -> None:
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert (KEPT in str(jax.make_jaxpr(elements.kept)(jnp.ones(3)))) == marked
    assert KEPT not in str(jax.make_jaxpr(elements.kept)(jnp.ones(3)))
