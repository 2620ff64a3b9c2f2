"""Attention by the kernels of TPUs, interpreted: the values and gradients are those of the textbook form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from both_ways import both_ways, drawn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from tracing import computed

from beit_jax.config import BeitConfig
from beit_jax.kernels import elements, mesh, tpu
from beit_jax.models.attention import attend
from beit_jax.models.build import abstract_model, build_model
from beit_jax.models.interface import Remat
from beit_jax.models.partition import BATCH_AXES
from beit_jax.models.position import attention_bias
from beit_jax.tree import Nested

AXES = ("data", "fsdp", "tensor")
CASES: dict[str, tuple[tuple[int, int], int, int, bool]] = {
    "two heads in a block": ((2, 3), 4, 64, True),
    "four heads in a block": ((3, 2), 4, 32, True),
    "one head in a block": ((2, 2), 1, 128, True),
    "heads of more than a block": ((1, 4), 1, 256, True),
    "heads that are padded": ((2, 2), 3, 8, True),
    "an odd number of heads of 64": ((2, 2), 3, 64, True),
    "without a bias": ((2, 3), 2, 64, False),
    "rows in two pieces": ((16, 18), 2, 64, True),
}
"""The grid of patches, the number of heads and their width, and whether there is a bias."""


def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by kernels, and new to JAX."""

    def run(*arguments: Any) -> Any:
        with tpu.interpreted(), elements.interpreted():
            return jax.jit(lambda *given: function(*given))(*arguments)

    return run


def apart(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest value."""
    found, expected = (np.asarray(one, np.float64) for one in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_textbook_form(case: str) -> None:
    grid, heads, width, biased = CASES[case]
    arguments = [jnp.asarray(array, jnp.float32) for array in drawn(grid, heads, width)]
    function = partial(both_ways, grid, biased)
    found, expected = interpreted(function)(*arguments), computed(function, *arguments, several=True)
    assert "pallas_call" in str(jax.make_jaxpr(interpreted(function))(*arguments))
    for mine, textbook in zip(found[: 4 + biased], expected, strict=False):
        assert mine.dtype == textbook.dtype and mine.shape == textbook.shape
        assert apart(mine, textbook) <= 1e-5


def test_in_bfloat16_it_is_as_near_to_the_exact_values_as_the_textbook_form() -> None:
    grid, arrays = (4, 4), drawn((4, 4), 2, 64)
    small = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    given = small[0], jnp.asarray(arrays[1], jnp.float32), small[2]
    function = partial(both_ways, grid, True)
    found, textbook = interpreted(function)(*given), list(computed(function, *given, several=True))
    textbook[3] = values_gradient_of_a_tpu(grid, *given)
    with jax.enable_x64(True):
        exact = computed(function, *(jnp.asarray(np.asarray(array, np.float64)) for array in given), several=True)
    for mine, theirs, true in zip(found, textbook, exact, strict=True):
        assert mine.dtype == theirs.dtype
        mine, theirs, true = (np.asarray(array, np.float64) for array in (mine, theirs, true))
        assert 0 < np.linalg.norm(mine - true) <= 1.01 * np.linalg.norm(theirs - true)


def values_gradient_of_a_tpu(grid: tuple[int, int], qkv: Any, table: Any, upstream: Any) -> Any:
    """The textbook form multiplies weights in bfloat16 with a float32 array, which the product unit of a TPU rounds. A
    CPU does not."""
    query, key, _ = jnp.unstack(qkv, axis=2)
    scores = jnp.einsum("bqhe,bkhe->bhqk", query / 8, key, preferred_element_type=jnp.float32)
    scores += attention_bias(table, grid, grid, "bicubic", len(qkv)).written
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    given = jnp.moveaxis(upstream.astype(jnp.float32), 1, 2) / weights.sum(axis=-1, keepdims=True)
    rounded = weights.astype(jnp.bfloat16), given.astype(jnp.bfloat16)
    return jnp.einsum("bhqk,bhqe->bkhe", *rounded, preferred_element_type=jnp.float32).astype(jnp.bfloat16)


# --- What the textbook form computes ----------------------------------------------------------------------------------


def kernels(function: Callable[..., Any], *arguments: Any) -> int:
    """The number of kernels in what is traced for TPUs."""
    return str(jax.make_jaxpr(interpreted(function))(*arguments)).count("name=attention_rows")


def mesh_of(sizes: tuple[int, ...], kind: str = "TPU v5 lite", mode: Any = AxisType.Auto, platform: str = "tpu") -> Any:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh(sizes, AXES, (mode,) * 3, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def traced_kernels(batch: int, tokens: int, heads: int, shards: int = 1) -> int:
    """The number of kernels in attention, as it is traced without interpreting them."""
    qkv = jax.ShapeDtypeStruct((batch, tokens, 3, heads, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((shards, heads, tokens, tokens), jnp.float32)
    return str(jax.make_jaxpr(lambda *given: attend(*given)[0])(qkv, bias)).count("name=attention_rows")


def test_weights_that_are_dropped_or_returned_take_the_textbook_form() -> None:
    qkv = jnp.ones((2, 5, 3, 2, 64))
    assert kernels(lambda qkv: attend(qkv, None)[0], qkv) > 0
    assert kernels(lambda qkv: attend(qkv, None)[0], qkv[:0]) == 0  # and so do no samples
    assert kernels(lambda qkv: attend(qkv, None, lambda weights: 2 * weights)[0], qkv) == 0
    assert kernels(lambda qkv: attend(qkv, None, output_attentions=True), qkv) == 0


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_a_mesh_says_whether_there_are_tpus(platform: str) -> None:
    for sizes in ((1, 1, 1), (2, 1, 1)):
        with mesh_of(sizes, platform=platform):
            assert traced_kernels(4, 5, 2) == (platform == "tpu")
    assert traced_kernels(4, 5, 2) == 0  # without a mesh


def test_a_mesh_that_cannot_divide_the_arrays_takes_the_textbook_form() -> None:
    with mesh_of((4, 1, 1)):
        assert traced_kernels(8, 5, 2, shards=4) == traced_kernels(8, 5, 2) == 1
        assert traced_kernels(6, 5, 2) == traced_kernels(8, 5, 2, shards=2) == 0
    with mesh_of((1, 1, 4)):
        assert traced_kernels(8, 5, 4) == traced_kernels(8, 5, 2) == 1  # every device computes all of two heads
    with mesh_of((4, 1, 1), mode=AxisType.Explicit):
        assert traced_kernels(8, 5, 2) == 0


def test_rows_that_a_core_cannot_hold_take_the_textbook_form() -> None:
    """A TPU v4 has 16 MiB, and holds the biases of two heads of 197 tokens; v5e holds those of 1,601 too."""
    found = {}
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        with mesh_of((1, 1, 1), kind):
            found[kind] = [traced_kernels(4, tokens, 2) for tokens in (197, 577, 1025, 3137)]
    v4 = found.pop("TPU v4")
    assert v4[0] == 1 and v4[2] == 0
    assert set(map(tuple, found.values())) == {(1, 1, 1, 0)}


def test_symbolic_sizes_take_the_textbook_form() -> None:
    (batch,) = jax.export.symbolic_shape("b")
    qkv = jax.ShapeDtypeStruct((batch, 5, 3, 2, 64), jnp.float32)
    jaxtyping.config.update("jaxtyping_disable", True)  # a symbolic size behaves like an integer, and is none
    try:
        assert kernels(lambda qkv: attend(qkv, None)[0], qkv) == 0
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# --- Programs ---------------------------------------------------------------------------------------------------------

TINY = BeitConfig(
    task="image_classification", hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
    image_size=(16, 24), patch_size=(8, 8), position_bias="both", labels=("a", "b"),
)  # fmt: skip


def gradient(remat: Remat, params: Nested, pixels: Any) -> Any:
    def loss(params: Nested) -> Any:
        return jnp.square(build_model(TINY, params)(pixels, key=jax.random.key(0), remat=remat).logits).sum()

    return jax.grad(loss)(params)


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("dots", 1), ("block", 2)])
def test_a_step_calls_a_kernel_once_for_each_direction(remat: Remat, forward: int) -> None:
    """And once more where the whole block is computed again; all blocks are one loop."""
    shapes = abstract_model(TINY)[1], jax.ShapeDtypeStruct((2, 16, 24, 3), jnp.float32)
    with mesh_of((1, 1, 1)):
        program = jax.jit(lambda *given: gradient(remat, *given)).trace(*shapes)
        text = program.lower(lowering_platforms=("tpu",)).as_text()
    names = ("attention_rows_forward", "attention_rows_backward")
    assert [text.count(f'kernel_name = "{name}"') for name in names] == [forward, 1]
    assert text.count("tpu_custom_call") == forward + 1


@pytest.fixture(scope="module")
def inputs() -> tuple[Nested, Any]:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), abstract_model(TINY)[1]
    )
    return params, jnp.asarray(rng.standard_normal((2, 16, 24, 3)), jnp.float32)


@pytest.fixture(scope="module")
def textbook(inputs: tuple[Nested, Any]) -> list[Any]:
    """The gradient by the textbook form, which is the same whatever is computed again (tests/models/test_remat.py)."""
    leaves, structure = jax.tree.flatten(inputs)
    return computed(lambda *given: gradient("none", *jax.tree.unflatten(structure, given)), *leaves, several=True)


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_a_model_has_the_gradients_of_the_textbook_form(
    remat: Remat, inputs: tuple[Nested, Any], textbook: list[Any]
) -> None:
    found = jax.tree.leaves(interpreted(partial(gradient, remat))(*inputs))
    for mine, expected in zip(found, textbook, strict=True):
        assert apart(mine, expected) <= 1e-5


def test_a_batch_of_calls_is_the_calls_one_by_one() -> None:
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((3, 2, 5, 3, 2, 64)), jnp.float32)
    own = jnp.asarray(rng.standard_normal((3, 1, 2, 5, 5)), jnp.float32)
    for bias, axis in ((own, 0), (own[0], None)):

        def together(qkv: Any, bias: Any, axis: int | None = axis) -> Any:
            return jax.vmap(lambda *given: attend(*given)[0], in_axes=(0, axis))(qkv, bias)

        def one_by_one(qkv: Any, bias: Any, axis: int | None = axis) -> Any:
            return jnp.stack([attend(qkv[i], bias if axis is None else bias[i])[0] for i in range(3)])

        for mine, expected in zip(
            jax.tree.leaves(interpreted(with_gradients(together))(qkv, bias)),
            computed(with_gradients(one_by_one), qkv, bias, several=True),
            strict=True,
        ):
            assert apart(mine, expected) <= 1e-5


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of several arrays, and the gradients of the first two."""

    def loss(*given: Any) -> Any:
        return jnp.square(jax.tree.leaves(function(*given))[0]).sum()

    def both(*arguments: Any) -> Any:
        return function(*arguments), jax.grad(loss, (0, 1))(*arguments)

    return both


def test_axes_are_those_of_the_models() -> None:
    assert mesh.BATCH_AXES == BATCH_AXES and {*BATCH_AXES, mesh.HEAD_AXIS} == set(AXES)
