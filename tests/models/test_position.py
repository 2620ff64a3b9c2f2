import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.typing import DTypeLike
from numpy.testing import assert_allclose
from tolerances import RESIZE

from beit_jax.models.attention import position_bias, relative_position_index
from beit_jax.models.position import (
    attention_bias,
    num_relative_offsets,
    position_bias_by_slices,
    resize_bias_table,
    resize_position_embeddings,
)


@pytest.mark.parametrize(
    ("side", "total", "digest"),
    [
        (14, 14_270_119, "6b72b42c59778888"),
        (24, 368_828_259, "b8383edebc2cee46"),
        (32, 2_088_508_291, "32808cbc471b00e0"),
        (40, 8_007_179_043, "ae64b9faed4a3754"),
    ],
)
def test_index_is_the_originals(side: int, total: int, digest: str) -> None:
    """Sums and hashes of ``relative_position_index`` as microsoft/unilm@768a3c8 computes it."""
    index = relative_position_index((side, side)).astype("<i8")
    assert index.sum() == total
    assert hashlib.sha256(index.tobytes()).hexdigest().startswith(digest)


def test_index_by_hand() -> None:
    assert num_relative_offsets((1, 2)) == 6
    # patches 0 and 1 in a row: offsets -1, 0, 1 are rows 0, 1, 2; then class->patch, patch->class, class->class
    assert relative_position_index((1, 2)).tolist() == [[5, 3, 3], [4, 1, 0], [4, 2, 1]]


grids = st.tuples(st.integers(2, 6), st.integers(2, 6))
# Compiled once for a grid, not once for each of its operations.
bias_of = jax.jit(position_bias_by_slices, static_argnums=1)
resized_table = jax.jit(resize_bias_table, static_argnums=(1, 2, 3))
resized_embeddings = jax.jit(resize_position_embeddings, static_argnums=(1, 2))
gradient_of = jax.jit(
    lambda upstream, table, grid: jax.vjp(lambda table: position_bias_by_slices(table, grid), table)[1](upstream)[0],
    static_argnums=2,
)


@given(grids)
def test_bias_depends_on_the_offset_alone(grid: tuple[int, int]) -> None:
    rows, columns = grid
    table = jnp.arange(num_relative_offsets(grid) * 2.0).reshape(-1, 2)
    bias = np.asarray(bias_of(table, grid))[:, 1:, 1:].reshape(2, rows, columns, rows, columns)
    assert np.array_equal(bias[:, 1:, 1:, 1:, 1:], bias[:, :-1, :-1, :-1, :-1])
    assert len(np.unique(bias[0])) == num_relative_offsets(grid) - 3


@given(st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_bias_and_its_gradient_are_those_of_the_index(grid: tuple[int, int]) -> None:
    rng, index = np.random.default_rng(0), relative_position_index(grid)
    table = jnp.asarray(rng.standard_normal((num_relative_offsets(grid), 3)), jnp.float32)
    assert np.array_equal(bias_of(table, grid), np.moveaxis(np.asarray(table)[index], -1, 0))
    upstream = rng.integers(-9, 10, (3, *index.shape)).astype(np.float32)  # sums of integers are exact in any order
    expected = np.zeros_like(table)
    np.add.at(expected, index, np.moveaxis(upstream, 0, -1))
    assert np.array_equal(gradient_of(jnp.asarray(upstream), table, grid), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 2), (5, 5)])
def test_slices_are_the_textbook_form(grid: tuple[int, int], dtype: DTypeLike) -> None:
    """The values are the same bits. Gradients are sums of small integers, which are exact in any order and dtype."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((num_relative_offsets(grid), 3)), dtype)
    textbook, back = jax.vjp(lambda table: position_bias(table, grid), table)
    assert np.array_equal(bias_of(table, grid), textbook)
    found = attention_bias(table, grid, grid, "bilinear", 4)
    assert np.array_equal(found.written, textbook[None]) and np.array_equal(found.tables, table[None])
    upstream = jnp.asarray(rng.integers(-2, 3, textbook.shape), dtype)
    assert np.array_equal(gradient_of(upstream, table, grid), back(upstream)[0])


@given(grids, grids)
def test_bilinear_resize_is_torchs(source: tuple[int, int], target: tuple[int, int]) -> None:
    table = np.random.default_rng(0).standard_normal((num_relative_offsets(source), 3)).astype(np.float32)
    shape, size = ([2 * side - 1 for side in grid] for grid in (source, target))
    patches = torch.from_numpy(table[:-3]).reshape(1, *shape, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(patches, size, mode="bilinear")[0].permute(1, 2, 0).reshape(-1, 3)
    found = np.asarray(resized_table(table, source, target, "bilinear"))
    assert_allclose(found[:-3], expected, rtol=0.0, atol=RESIZE)
    assert np.array_equal(found[-3:], table[-3:])


def test_resize_of_stacked_tables() -> None:
    tables = jnp.asarray(np.random.default_rng(0).standard_normal((2, num_relative_offsets((4, 4)), 3)), jnp.float32)
    together = resize_bias_table(tables, (4, 4), (6, 5), "geometric")
    alone = resize_bias_table(tables[1], (4, 4), (6, 5), "geometric")
    assert_allclose(together[1], alone, rtol=0.0, atol=RESIZE)


@given(grids, grids)
def test_absolute_positions_resize_as_torchs_bicubic(source: tuple[int, int], target: tuple[int, int]) -> None:
    embeddings = np.random.default_rng(0).standard_normal((1, 1 + source[0] * source[1], 3)).astype(np.float32)
    patches = torch.from_numpy(embeddings[:, 1:]).reshape(1, *source, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(patches, target, mode="bicubic")[0].permute(1, 2, 0).reshape(-1, 3)
    found = np.asarray(resized_embeddings(embeddings, source, target))
    assert_allclose(found[0, 1:], expected, rtol=0.0, atol=RESIZE)
    assert np.array_equal(found[0, 0], embeddings[0, 0])
