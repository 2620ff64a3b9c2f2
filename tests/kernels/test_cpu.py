"""The kernels of one CPU: every form has the values and the gradients of the textbook form, or gives way to it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from numpy.testing import assert_allclose
from tiny_models import TINY

from beit_jax.errors import BeitJaxError
from beit_jax.kernels.cpu import calls, library
from beit_jax.kernels.cpu.calls import PositionBias
from beit_jax.models import one_cpu
from beit_jax.models.attention import attend
from beit_jax.models.build import build_model, param_shapes
from beit_jax.models.elementary import LayerNorm, expand, project
from beit_jax.models.one_cpu import traced_for
from beit_jax.models.position import num_relative_offsets, position_bias_by_slices
from beit_jax.tree import unflatten

pytestmark = pytest.mark.skipif(
    library.compiler() is None or not library.measured(), reason="no compiler, or another processor"
)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SMALLEST", 1)
    monkeypatch.setenv(library.SWITCH, "on")


def draw(*shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def agree(found: Any, expected: Any, rounding: float = 4e-6) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        other = np.asarray(other, np.float64)
        assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=rounding * np.abs(other).max())


def in_double(function: Callable[..., Any], *arguments: Any) -> Any:
    """XLA's form in float64."""
    with jax.enable_x64(True), traced_for("other"):
        return jax.jit(function)(*(jnp.asarray(np.asarray(one), jnp.float64) for one in arguments))


def with_gradients(function: Callable[..., Any], arguments: Any) -> Callable[..., Any]:
    """The value, and the gradients of a sum of it that weighs every number differently."""

    def both(*given: Any) -> Any:
        def loss(*given: Any) -> Any:
            value = function(*given)
            return (value * jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape)).sum()

        return function(*given), jax.grad(loss, tuple(range(len(given))))(*given)

    return both


PRODUCTS = [
    (5, 1, 1),
    (197, 769, 300),
    *(pytest.param(*sizes, marks=pytest.mark.thorough) for sizes in ((1, 385, 31), (14, 16, 64), (1025, 768, 301))),
]


@pytest.mark.parametrize(("rows", "inner", "outer"), PRODUCTS)
def test_products_of_any_size(rows: int, inner: int, outer: int) -> None:
    x, kernel, bias = draw((1, rows, inner), (inner, outer), (outer,))
    for form in (project, lambda *given: expand(*given, "gelu")):
        both = with_gradients(form, (x, kernel, bias))
        with traced_for("cpu"):
            text = str(jax.make_jaxpr(form)(x, kernel, bias))
            found = jax.jit(both)(x, kernel, bias)
        assert "beit_affine" in text
        agree(found, in_double(both, x, kernel, bias))


@pytest.mark.parametrize("turn_b", [False, True])
@pytest.mark.parametrize("turn_a", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(5, 1, 1), (20, 777, 33), (610, 40, 50), pytest.param(500, 1600, 300, marks=pytest.mark.thorough)]
)
def test_products_of_turned_matrices(m: int, k: int, n: int, turn_a: bool, turn_b: bool) -> None:
    a, b = draw((k, m) if turn_a else (m, k), (n, k) if turn_b else (k, n))
    expected = in_double(lambda a, b: (a.T if turn_a else a) @ (b.T if turn_b else b), a, b)
    both = with_gradients(partial(calls.product, turn_a=turn_a, turn_b=turn_b), (a, b))
    agree(jax.jit(both)(a, b), in_double(partial(with_gradients_of_plain, turn_a, turn_b), a, b))
    agree(calls.product(a, b, turn_a, turn_b), expected)


def with_gradients_of_plain(turn_a: bool, turn_b: bool, a: Any, b: Any) -> Any:
    return with_gradients(lambda a, b: calls._plain_product(a, b, turn_a, turn_b), (a, b))(a, b)


@pytest.mark.parametrize(("rows", "inner", "outer"), [*PRODUCTS, (230, 1540, 40)])
def test_products_by_packed_kernels(rows: int, inner: int, outer: int) -> None:
    """Each of several layers, in a loop over them and as a slice; packed and unpacked again, no number is lost."""
    x, several, bias = draw((1, rows, inner), (3, inner, outer), (outer,))
    packed = calls.Packed.of(several, inputs=1)
    assert isinstance(packed, calls.Packed)
    np.testing.assert_array_equal(packed.unpacked(), several)
    for form in (project, lambda *given: expand(*given, "gelu")):
        for number in (0, 2):
            loop = replace(packed, panels=calls.Stacked(packed.panels, jnp.int32(number)))
            alone = replace(packed, panels=packed.panels[number])
            expected = in_double(form, x, several[number], bias)
            for kernel in (loop, alone):
                np.testing.assert_array_equal(kernel.unpacked(), several[number])
                with traced_for("cpu"):
                    assert "beit_affine" in str(jax.make_jaxpr(form)(x, kernel, bias))
                    agree(jax.jit(form)(x, kernel, bias), expected)


def test_packed_kernels_of_several_axes() -> None:
    for inputs, both in ((1, (24, 3, 4, 8)), (2, (4, 8, 24))):
        kernels, x, bias = draw((2, *both), (2, 5, *both[:inputs]), both[inputs:])
        packed = calls.Packed.of(kernels, inputs)
        np.testing.assert_array_equal(packed.unpacked(), kernels)
        expected = in_double(project, x, kernels[1], bias)
        with traced_for("cpu"):
            agree(project(x, replace(packed, panels=packed.panels[1]), bias), expected)


def test_packed_kernels_where_no_product_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices, in bfloat16, and where the kernels were switched off afterwards."""
    x, several, bias = draw((1, 7, 20), (2, 20, 30), (30,))
    packed = calls.Packed.of(several, inputs=1)
    one = replace(packed, panels=packed.panels[1])
    np.testing.assert_array_equal(one.astype(jnp.bfloat16), several[1].astype(jnp.bfloat16))
    gradient = jax.jit(jax.grad(lambda x: jnp.sin(project(x, one, bias)).sum()))(x)
    agree(gradient, in_double(jax.grad(lambda x: jnp.sin(project(x, several[1], bias)).sum()), x))
    vectorised = jax.vmap(lambda x: project(x, one, bias))(x[None])[0]
    agree(vectorised, in_double(project, x, several[1], bias))
    monkeypatch.setenv(library.SWITCH, "off")
    assert calls.Packed.of(several, inputs=1) is several
    assert "beit_affine" not in str(jax.make_jaxpr(project)(x, one, bias))
    agree(project(x, one, bias), in_double(project, x, several[1], bias))


def test_panels_of_another_processor_are_refused() -> None:
    x, several, bias = draw((7, 20), (2, 20, 25), (25,))
    panels = calls.Packed.of(several, inputs=1).panels
    for wrong in (panels[:, :, :, :-1], jnp.pad(panels, [(0, 0), (0, 1), (0, 0), (0, 0)])):
        with pytest.raises(jax.errors.JaxRuntimeError, match="packed for another processor"):
            calls.affine(x, wrong, jnp.int32(0), bias).block_until_ready()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 15), (35, 200), (197, 768), (2, 1025)])
def test_layer_norm_of_any_size(rows: int, width: int) -> None:
    x, scale, bias = draw((1, rows, width), (width,), (width,))
    x = 3 * x + 10 * (jnp.arange(rows) % 3)[:, None]

    def normalized(x: Any, scale: Any, bias: Any) -> Any:
        norm = LayerNorm(width, epsilon=1e-6, use_fast_variance=False, dtype=x.dtype, rngs=nnx.Rngs(0))
        norm.scale.set_value(scale)
        norm.bias.set_value(bias)
        return norm(x)

    both = with_gradients(normalized, (x, scale, bias))
    with traced_for("cpu"):
        assert "beit_normalized" in str(jax.make_jaxpr(normalized)(x, scale, bias))
        found = jax.jit(both)(x, scale, bias)
    agree(found, in_double(both, x, scale, bias))


ATTENTION = [
    (2, (2, 2), 2, 20),
    (1, (5, 3), 3, 16),
    (1, (32, 32), 1, 64),
    *(
        pytest.param(*sizes, marks=pytest.mark.thorough)
        for sizes in (
            (1, (1, 1), 1, 4),
            (9, (14, 14), 2, 64),
            (1, (24, 24), 1, 48),
            (2, (1, 40), 1, 8),
            (1, (40, 1), 5, 8),
        )
    ),
]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("batch", "grid", "heads", "width"), ATTENTION)
def test_attention_of_any_size(
    monkeypatch: pytest.MonkeyPatch, batch: int, grid: tuple[int, int], heads: int, width: int, biased: bool
) -> None:
    monkeypatch.setattr(one_cpu, "CACHE", 2**20)
    tables = [(num_relative_offsets(grid), heads)] if biased else []
    qkv, *table = draw((batch, 1 + grid[0] * grid[1], 3, heads, width), *tables)

    def attended(qkv: jax.Array, *table: jax.Array) -> jax.Array:
        return attend(qkv, positions(*table, grid) if table else None)[0]

    both = with_gradients(attended, (qkv, *table))
    with traced_for("cpu"):
        program = jax.jit(lambda *given: attended(*given)).lower(qkv, *table).compile().as_text()
        found = jax.jit(both)(qkv, *table)
    assert library.target("attention") in program
    whole = f"f32[{heads},{qkv.shape[1]},{qkv.shape[1]}]"
    assert whole not in program, "the bias is not written out"
    agree(found, in_double(lambda *given: with_gradients(attended, given)(*given), qkv, *table))


@pytest.mark.parametrize("biased", [True, False])
def test_derivatives_of_attention(biased: bool) -> None:
    """Forwards, twice, and of some arguments alone; the way back calls the kernel."""
    qkv, change = draw((2, 5, 3, 2, 8), (2, 5, 3, 2, 8))
    grid, table = (2, 2), draw((num_relative_offsets((2, 2)), 2))[0]

    def averages(qkv: Any, table: Any) -> Any:
        return calls.attention(qkv, positions(table, grid) if biased else None)

    def plain(qkv: Any, table: Any) -> Any:
        return calls._plain_attention(qkv, *(positions(table, grid).written if biased else ()))

    def derivatives(function: Any) -> Any:
        def all_of(qkv: Any, table: Any, change: Any) -> Any:
            def loss(*given: Any) -> Any:
                return jnp.sin(function(*given)).sum()

            along = jax.jvp(lambda qkv: function(qkv, table), (qkv,), (change,))
            of_table = jax.jvp(lambda table: function(qkv, table), (table,), (jnp.cos(table),))
            twice = jax.grad(lambda *given: (jax.grad(loss)(*given) * change).sum(), (0, 1))(qkv, table)
            return along, of_table, twice, jax.grad(loss, 1)(qkv, table), jax.grad(loss, 0)(qkv, table)

        return all_of

    back = jax.jit(jax.grad(lambda qkv: jnp.sin(averages(qkv, table)).sum())).lower(qkv).as_text()
    assert library.target("attention_back") in back
    agree(jax.jit(derivatives(averages))(qkv, table, change), in_double(derivatives(plain), qkv, table, change), 1e-5)
    mapped = jax.vmap(jax.grad(lambda qkv: jnp.sin(averages(qkv, table)).sum()))(jnp.stack([qkv, change]))
    agree(mapped[1], in_double(jax.grad(lambda qkv, table: jnp.sin(plain(qkv, table)).sum()), change, table), 1e-5)


def positions(table: jax.Array, grid: tuple[int, int]) -> PositionBias:
    """`position.attention_bias` of one shard, in the dtype of the table."""
    return PositionBias(position_bias_by_slices(table, grid)[None], table[None], grid)


def test_heads_of_any_width() -> None:
    """Wider ones than the kernel's stretches have XLA's form."""
    for width, has_kernel in ((768, True), (800, False)):
        (qkv,) = draw((1, 7, 3, 1, width))
        with traced_for("cpu"):
            both = jax.jit(with_gradients(lambda qkv: attend(qkv, None)[0], (qkv,)))
            found, text = both(qkv), both.lower(qkv).as_text()
        assert (library.target("attention") in text) == has_kernel
        agree(found, in_double(with_gradients(lambda qkv: attend(qkv, None)[0], (qkv,)), qkv))
    with pytest.raises(jax.errors.JaxRuntimeError, match="too wide"):
        calls.attention(qkv).block_until_ready()


def test_gelu_of_any_magnitude() -> None:
    """Far from zero it is x or 0, and its slope 1 or 0."""
    x = jnp.asarray([-1e30, -50.0, -14.0, -6.0, -5.4, -1.0, 0.0, 1.0, 5.4, 6.0, 14.0, 1e30])
    found, slope = (np.asarray(f(x)) for f in (calls.gelu_by_kernel, jax.vmap(jax.grad(calls.gelu))))
    by_kernel = np.asarray(jax.grad(lambda x: calls.gelu_by_kernel(x).sum())(x))
    assert_allclose(found, calls.gelu(x), rtol=1e-6, atol=3e-7)
    assert_allclose(by_kernel, slope, rtol=1e-6, atol=3e-7)
    assert np.isnan(np.asarray(calls.gelu_by_kernel(jnp.float32([np.nan])))).all()
    for far in (found[:3], by_kernel[:3], by_kernel[-3:] - 1.0):
        np.testing.assert_array_equal(np.abs(far), 0.0)


ADAMW = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "decay": 0.2}


def step_of_adamw(*shape: int, rows: bool, moves: bool = True) -> list[Any]:
    parameter, mean, square, gradient = draw(*[shape] * 4)
    rates = (
        jnp.asarray(0.1 / (1 + jnp.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)))) if rows else jnp.float32(0.1)
    )
    return [parameter, mean, square**2, gradient, rates, jnp.asarray([0.7, 0.2, 0.3, moves], jnp.float32)]


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shape", [(1,), (33,), (3, 16), (2, 5, 7), (3, 17000), (40000,)], ids=str)
def test_adamw_of_any_size(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], rows: bool) -> None:
    monkeypatch.setattr(calls, "SMALLEST_STEP", 1)
    arguments = step_of_adamw(*shape, rows=rows)
    step = jax.jit(partial(calls.adamw, **ADAMW))
    assert library.target("adamw") in step.lower(*arguments).as_text()
    agree(step(*arguments), in_double(partial(calls._plain_adamw, **ADAMW), *arguments), 1e-6)


@pytest.mark.parametrize("spoilt", [jnp.nan, jnp.inf])
def test_a_step_of_adamw_that_does_not_count_changes_no_bit(monkeypatch: pytest.MonkeyPatch, spoilt: float) -> None:
    monkeypatch.setattr(calls, "SMALLEST_STEP", 1)
    arguments = step_of_adamw(3, 50, rows=True, moves=False)
    arguments[3] = arguments[3].at[1, 2].set(spoilt)
    before = [np.asarray(one).tobytes() for one in arguments]
    found = jax.jit(partial(calls.adamw, **ADAMW))(*arguments)
    assert [np.asarray(one).tobytes() for one in found] == before[:3]


def test_adamw_writes_where_it_read_what_is_given_away_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SMALLEST_STEP", 1)
    arguments = step_of_adamw(64, 1000, rows=True)
    before = [np.array(one) for one in arguments]
    kept = jax.jit(partial(calls.adamw, **ADAMW))
    kept(*arguments)
    for one, old in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(np.asarray(one), old)
    given = jax.jit(partial(calls.adamw, **ADAMW), donate_argnums=(0, 1, 2)).lower(*arguments).compile()
    sizes = given.memory_analysis()
    assert sizes.alias_size_in_bytes == 3 * arguments[0].nbytes and sizes.temp_size_in_bytes < arguments[0].nbytes


def test_constants_of_adamw_may_be_any_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SMALLEST_STEP", 1)
    arguments = step_of_adamw(3, 16, rows=False)
    numbers = {"beta1": 0, "beta2": np.float32(0.5), "epsilon": 1, "decay": np.int64(0)}
    agree(calls.adamw(*arguments, **numbers), in_double(partial(calls._plain_adamw, **numbers), *arguments), 1e-6)


def test_adamw_where_no_kernel_computes_it() -> None:
    arguments = step_of_adamw(3, 5, rows=True)
    expected = in_double(partial(calls._plain_adamw, **ADAMW), *arguments)
    agree(calls.adamw(*arguments, **ADAMW), expected, 1e-6)  # smaller than SMALLEST_STEP
    several = [jnp.stack([one, one]) for one in arguments]
    primitive = calls._primitive("adamw", calls._plain_adamw, several=True, in_place=3)
    found = jax.vmap(lambda *given: primitive.bind(*given, **ADAMW))(*several)
    agree([one[1] for one in found], expected, 1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (2, 16), (3, 4, 33000), (12, 64, 64)], ids=str)
def test_gradients_of_rows_are_stacked(shape: tuple[int, ...]) -> None:
    stack, *weights = draw(shape, *[shape[1:]] * shape[0])

    def loss(stack: Any, *weights: Any) -> Any:
        return sum((row**2 * weight).sum() for row, weight in zip(calls.unstacked(stack), weights, strict=True))

    gradient = jax.jit(jax.grad(loss))
    assert library.target("stacked") in gradient.lower(stack, *weights).as_text()
    np.testing.assert_array_equal(np.asarray(gradient(stack, *weights)), np.asarray(2 * stack * jnp.stack(weights)))
    some = jax.grad(lambda stack: loss(stack[:1], *weights[:1]) + calls.unstacked(stack)[-1].sum())(stack)
    expected = np.zeros(shape, np.float32)
    expected[:1] += 2 * np.asarray(stack[:1] * weights[0])
    expected[-1] += 1
    np.testing.assert_array_equal(np.asarray(some), expected)


def test_rows_of_what_no_kernel_stacks() -> None:
    keys, half = jax.random.split(jax.random.key(0), 3), jnp.ones((2, 3), jnp.bfloat16)
    for stack in (keys, jnp.arange(6).reshape(2, 3), half):
        assert [bool((row == stack[i]).all()) for i, row in enumerate(calls.unstacked(stack))] == [True] * len(stack)
    gradient = jax.grad(lambda stack: sum(row.sum() * i for i, row in enumerate(calls.unstacked(stack))))(half)
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[0.0] * 3, [1.0] * 3])
    (stack,) = draw((4, 3, 5))
    several = jax.vmap(jax.grad(lambda stack: sum((row**3).sum() for row in calls.unstacked(stack))))(stack)
    agree(several, 3 * stack**2)
    second = jax.jacfwd(jax.grad(lambda stack: sum((row**3).sum() for row in calls.unstacked(stack))))(stack[0])
    agree(jnp.einsum("abab->ab", second), 6 * stack[0])


def test_without_jit() -> None:
    x, kernel, bias = draw((1, 5, 20), (20, 30), (30,))
    with jax.disable_jit(), traced_for("cpu"):
        agree(project(x, kernel, bias), in_double(project, x, kernel, bias))


def test_a_bias_without_a_table_has_xlas_form() -> None:
    qkv, bias = draw((1, 5, 3, 2, 8), (1, 2, 5, 5))
    with traced_for("cpu"):
        assert "beit_" not in str(jax.make_jaxpr(lambda *given: attend(*given)[0])(qkv, bias))


def test_scores_of_any_magnitude() -> None:
    """Exponentials neither overflow nor lose the row's largest."""
    grid = (2, 4)
    (qkv,) = draw((1, 9, 3, 1, 16))
    table = jnp.where(jnp.arange(num_relative_offsets(grid)) % 3 == 0, 100.0, -300.0)[:, None]
    bias = positions(table, grid)
    expected = in_double(calls._plain_attention, qkv, bias.written[0])
    agree(calls.attention(qkv, bias), expected, 1e-4)  # scores of 100 have an ulp of 8e-6


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """A row's sum has one order, whatever rows are beside it and whatever threads compute it."""
    x, kernel, bias = draw((300, 500), (500, 600), (600,))
    whole = np.asarray(calls.affine(x, kernel, bias))
    for rows in (1, 13, 100):
        np.testing.assert_array_equal(np.asarray(calls.affine(x[:rows], kernel, bias)), whole[:rows])
    kernel = draw((1, 1600, 60))[0]
    panels = calls.Packed.of(kernel, inputs=1).panels
    x = draw((700, 1600))[0]
    whole = np.asarray(calls.affine(x, panels, jnp.int32(0), bias[:60]))
    for rows in (1, 13, 100, 700):
        for right in ((panels, jnp.int32(0)), (kernel[0],)):
            found = calls.affine(x[:rows], *right, bias[:60])
            np.testing.assert_array_equal(np.asarray(found), whole[:rows])


def test_every_call_gives_the_same_bits() -> None:
    """Whichever thread takes a piece of work. Ends of rows are the rest of a vector here."""
    x, scale, bias, kernel = draw((129, 197), (197,), (197,), (197, 197))
    for function in (lambda: calls.normalized(x, scale, bias, 1e-6), lambda: calls.affine(x, kernel, bias)):
        first = np.asarray(function())
        for _ in range(20):
            np.testing.assert_array_equal(np.asarray(function()), first)


def test_transformations() -> None:
    x, kernel, bias = draw((3, 7, 20), (20, 30), (30,))
    expected = in_double(project, x, kernel, bias)

    def slope(row: Any, kernel: Any, bias: Any) -> Any:
        return jnp.sin(row @ kernel + bias).sum()

    with traced_for("cpu"):
        agree(jax.vmap(lambda x: project(x[None], kernel, bias)[0])(x), expected)
        ones = (jnp.ones_like(x), jnp.zeros_like(kernel), jnp.zeros_like(bias))
        tangent = jax.jvp(project, (x, kernel, bias), ones)[1]
        again = jax.hessian(lambda row: jnp.sin(calls.affine(row, kernel, bias)).sum())(x[0, :1])
        loop = jax.lax.scan(lambda total, one: (total + project(one[None], kernel, bias).sum(), None), 0.0, x)[0]
    agree(tangent, in_double(lambda kernel: jnp.broadcast_to(kernel.sum(0), (3, 7, 30)), kernel))
    agree(again, in_double(lambda row, *more: jax.hessian(slope)(row, *more), x[0, :1], kernel, bias), 1e-5)
    agree(loop, np.asarray(expected).sum(), 1e-4)


@pytest.mark.parametrize("of", [(1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_of_some_of_a_product(of: tuple[int, ...]) -> None:
    """And derivatives of these gradients, forward and backward."""
    given = draw((70, 20), (20, 33), (33,))

    def slopes(function: Callable[..., Any], *given: Any) -> Any:
        def loss(*given: Any) -> Any:
            return jnp.sin(function(*given)).sum()

        def total(*given: Any) -> Any:
            return sum(jnp.square(one).sum() for one in jax.grad(loss, of)(*given))

        return jax.grad(loss, of)(*given), jax.grad(total, of)(*given), jax.jvp(total, given, given)[1]

    found = jax.jit(partial(slopes, calls.affine))(*given)
    agree(found, in_double(partial(slopes, partial(calls._plain_affine, end="bias")), *given), 1e-5)


@pytest.mark.parametrize("end", ["bias", "gelu"])
def test_gradients_of_a_kernel_that_stays_where_it_lies(end: str) -> None:
    """They are those of the layer's own matrix, which no program reads."""
    rows, kernels, bias = draw((7, 20), (3, 20, 30), (30,))

    def in_place(rows: Any, own: Any, bias: Any) -> Any:
        return jnp.sin(calls.affine(rows, kernels, jnp.int32(1), own, bias, end=end)).sum()

    def textbook(rows: Any, own: Any, bias: Any) -> Any:
        return jnp.sin(calls._plain_affine(rows, own, bias, end=end)).sum()

    given = (rows, kernels[1], bias)
    program = jax.jit(with_gradients(in_place, given)).lower(rows, jnp.full_like(kernels[1], jnp.nan), bias).compile()
    agree(program(rows, jnp.full_like(kernels[1], jnp.nan), bias), in_double(with_gradients(textbook, given), *given))
    ones = jax.tree.map(jnp.ones_like, given)
    found, expected = (jax.jvp(jax.grad(function, argnums=(0, 1)), given, ones)[1] for function in (in_place, textbook))
    agree(found, expected, 1e-4)


def test_a_model_reads_its_kernels_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block's kernels are sliced in a forward pass; gradients are those of the plain loop."""
    config = replace(TINY, position_bias="per_layer", layer_scale_init_value=0.1)
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32) for name, shape in param_shapes(config).items()
    }
    pixels = jnp.asarray(rng.standard_normal((2, *config.image_size, 3)), jnp.float32)

    def logits(params: Any, pixels: Any) -> Any:
        return build_model(config, unflatten(params))(pixels).logits

    numbered = []
    times = calls.Stacked.times
    monkeypatch.setattr(
        calls.Stacked, "times", lambda self, *given, **end: numbered.append(end) or times(self, *given, **end)
    )
    monkeypatch.setattr(calls.Stacked, "sliced", None)  # it would fail
    with traced_for("cpu"):
        found = jax.jit(with_gradients(logits, (params, pixels)))(params, pixels)
    assert numbered.count({}) == 3 * numbered.count({"end": "gelu"}) > 0
    with traced_for("other"):
        expected = jax.jit(with_gradients(logits, (params, pixels)))(params, pixels)
    agree(found, expected, 2e-5)


def test_gradients_of_models_that_are_vmapped() -> None:
    """Within `jax.vmap` products have their plain form, and kernels their gradients still."""
    config = replace(TINY, position_bias="per_layer", layer_scale_init_value=0.1)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal(shape) * 0.2) for name, shape in param_shapes(config).items()}
    pixels = jnp.asarray(rng.standard_normal((2, *config.image_size, 3)))

    def logits(params: Any, one: Any) -> Any:
        return jnp.sin(build_model(config, unflatten(params))(one[None]).logits)

    def outputs(params: Any, pixels: Any) -> Any:
        return jax.vmap(partial(logits, params))(pixels).sum()

    def slopes(params: Any, pixels: Any) -> Any:
        return jnp.square(jax.vmap(jax.grad(lambda one: logits(params, one).sum()))(pixels)).sum()

    def rows_of_the_jacobian(params: Any, pixels: Any) -> Any:
        return jnp.square(jax.jacrev(partial(logits, params))(pixels[0])).sum()

    for function in (outputs, slopes, rows_of_the_jacobian):
        with traced_for("cpu"):
            found = jax.jit(jax.grad(function))(params, pixels)
            change = jax.jit(
                lambda function=function: jax.jvp(lambda one: function(one, pixels), [params], [params])[1]
            )()
        with traced_for("other"):
            expected = jax.jit(jax.grad(function))(params, pixels)
        agree(found, expected, 1e-4)
        agree(change, sum(jnp.vdot(expected[name], params[name]) for name in params), 1e-4)


def test_training_slices_no_kernel() -> None:
    params = {name: jnp.ones(shape) for name, shape in param_shapes(TINY).items()}
    pixels = jnp.ones((2, *TINY.image_size, 3))

    def slices(platform: str) -> set[str]:
        def loss(params: Any) -> Any:
            return build_model(TINY, unflatten(params))(pixels, remat="dots").logits.sum()

        with traced_for(platform):
            program = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
        return set(re.findall(r"f32\[1,([0-9,]+)\]\S* dynamic-slice\(", program))

    kernels = {
        ",".join(map(str, shape[1:]))
        for name, shape in param_shapes(TINY).items()
        if "/blocks/" in name and "kernel" in name
    }
    assert len(kernels) == 4 and kernels <= slices("other")
    assert not kernels & slices("cpu")


def test_what_the_kernels_do_not_compute() -> None:
    x, kernel, bias = draw((1, 7, 20), (20, 30), (30,))

    def computed(*arguments: Any, **options: Any) -> bool:
        with traced_for("cpu"):
            return "beit_" in str(jax.make_jaxpr(lambda *given: attend(*given, **options)[0])(*arguments))

    qkv = draw((1, 5, 3, 2, 8))[0]
    assert computed(qkv, None) and not computed(qkv, None, output_attentions=True)
    assert not computed(qkv.astype(jnp.bfloat16), None)
    mesh = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "beit_" not in str(jax.make_jaxpr(project)(x, kernel, bias))


@pytest.mark.parametrize("often", [False, True])
def test_small_products_have_kernels_where_they_are_computed_often(
    often: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    given = draw((1, 7, 64), (64, 64), (64,))
    with traced_for("cpu"), calls.computed_often() if often else nullcontext():
        assert ("beit_" in str(jax.make_jaxpr(lambda *given: project(*given))(*given))) == often


def test_exported_programs_contain_none() -> None:
    """Another machine will run them. The batch may be symbolic."""
    x, kernel, bias = draw((1, 7, 20), (20, 30), (30,))
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, 7, 20"), jnp.float32)
    for shape in (x, symbolic):
        exported = export.export(jax.jit(lambda *given: expand(*given, "gelu")), platforms=["cpu"])(shape, kernel, bias)
        assert library.PREFIX not in exported.mlir_module()
        agree(exported.call(x, kernel, bias), in_double(lambda *given: expand(*given, "gelu"), x, kernel, bias))


def test_the_switch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert library.state() == f"kernels built for this processor ({library.library().reason})"
    monkeypatch.setenv(library.SWITCH, "off")
    assert not library.available() and library.state() == f"XLA's products and attention ({library.SWITCH}=off)"
    monkeypatch.setenv(library.SWITCH, "perhaps")
    with pytest.raises(BeitJaxError, match="expected auto, on or off, found perhaps"):
        library.available()


@pytest.mark.parametrize("broken", ["no compiler", "a failing compiler", "a cache that cannot be written"])
def test_without_a_library_xla_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str) -> None:
    library.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if broken == "no compiler":
        monkeypatch.setattr(library, "compiler", lambda: None)
        expected = "no C\\+\\+ compiler was found: install g\\+\\+, or set CXX"
    elif broken == "a failing compiler":
        monkeypatch.setattr(library, "FLAGS", ("--no-such-flag",))
        expected = "building the CPU kernels failed: .*no-such-flag"
    else:
        (tmp_path / "beit-jax").write_text("")
        expected = "building the CPU kernels failed: "
    try:
        with pytest.raises(BeitJaxError, match=f"{library.SWITCH}=on: {expected}"):
            library.available()
        monkeypatch.setenv(library.SWITCH, "auto")
        assert not library.available()
        arguments = draw((1, 7, 20), (20, 30), (30,))
        agree(project(*arguments), in_double(project, *arguments))
    finally:
        library.library.cache_clear()


@pytest.mark.thorough
def test_threads_change_no_bit(tmp_path: Path) -> None:
    """A process on one core computes what one on all does."""
    code = (
        "import sys, numpy as np, jax, jax.numpy as jnp\n"
        "from beit_jax.kernels.cpu import calls, library; library.offer()\n"
        "rng = np.random.default_rng(0); draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)\n"
        "np.savez(sys.argv[1], calls.affine(draw(577, 770), draw(770, 900), draw(900), end='gelu'),"
        " calls.affine(draw(577, 1600), calls.Packed.of(draw(2, 1600, 900), 1).panels, jnp.int32(1), draw(900)),"
        " calls.product(draw(700, 577), draw(700, 300), turn_a=True),"
        " calls.product(draw(500, 900), draw(300, 900), turn_b=True),"
        " calls.normalized(draw(129, 197), draw(197), draw(197), 1e-6), calls.gelu_by_kernel(draw(129, 777)),"
        " *jax.grad(lambda *a: (calls.normalized(*a, 1e-6) ** 2).sum(), (0, 1))(draw(129, 197), draw(197), draw(197)),"
        " jax.grad(lambda x: (calls.attention(x) ** 2).sum())(draw(6, 197, 3, 3, 64)),"
        " calls.attention(draw(2, 577, 3, 3, 64),"
        " calls.PositionBias(jnp.zeros((1, 3, 577, 577)), draw(1, 47 * 47 + 3, 3), (24, 24))))"
    )
    found = []
    for cores in ({min(os.sched_getaffinity(0))}, os.sched_getaffinity(0)):
        file = tmp_path / f"{len(cores)}.npz"
        threads = ",".join(map(str, cores))
        subprocess.run(["taskset", "-c", threads, sys.executable, "-c", code, file], check=True)
        with np.load(file) as arrays:
            found.append(list(arrays.values()))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_rematerialisation_without_gradients(remat: str) -> None:
    """Blocks' kernels go through `jax.checkpoint` as other arguments do."""
    config = replace(TINY, position_bias="per_layer")
    params = unflatten(dict(zip(param_shapes(config), draw(*param_shapes(config).values()), strict=True)))
    pixels = draw((2, *config.image_size, 3))[0]

    def run(params: Any, pixels: Any, remat: Any) -> Any:
        return build_model(config, params)(pixels, remat=remat).logits

    with traced_for("cpu"):
        found, expected = (jax.jit(run, static_argnums=2)(params, pixels, how) for how in (remat, "none"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("block", 2)])
def test_what_a_way_back_computes_again(remat: str, times: int) -> None:
    """With "dots" neither products nor attention, and only the kernels' own ways back are called."""
    config = replace(TINY, position_bias="per_layer")
    params = unflatten(dict(zip(param_shapes(config), draw(*param_shapes(config).values()), strict=True)))
    pixels = draw((2, *config.image_size, 3))[0]

    def loss(params: Any) -> Any:
        return jnp.sin(build_model(config, params)(pixels, remat=remat).logits).sum()

    with traced_for("cpu"):
        program = str(jax.make_jaxpr(jax.grad(loss))(params))
    called = {name: program.count(f" beit_{name}[") + program.count(f" beit_{name} ") for name in library.CALLS}
    expected = {"affine": 4 * times, "attention": times, "product": 8, "attention_back": 1, "packing": 0}
    assert {name: called[name] for name in expected} == expected
    assert called["gelu_back"] == 1 and called["normalized_back"] == 3  # two of a block and the pooled one
