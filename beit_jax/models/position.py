"""Positions: the learned relative position bias of attention, and absolute position embeddings, at any input size."""

from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from beit_jax.resize import bias_matrix, bicubic_matrix

Grid = tuple[int, int]  # patches, (rows, columns)


def num_relative_offsets(grid: Grid) -> int:
    """Rows of a bias table: every (dy, dx) between two patches, then class->patch, patch->class, class->class."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


@lru_cache(maxsize=16)
def relative_position_index(grid: Grid) -> np.ndarray:
    """Which table row each (query, key) pair reads, [1 + h*w, 1 + h*w] int32; token 0 is the class token.

    Source: microsoft/unilm@768a3c8 beit/modeling_finetune.py, `Attention`. Never read from a checkpoint: files exist
    whose stored index was corrupted by weight averaging.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    dy = rows[:, None] - rows[None, :] + grid[0] - 1
    dx = columns[:, None] - columns[None, :] + grid[1] - 1
    extra = num_relative_offsets(grid) - 3
    index = np.empty((1 + dy.shape[0], 1 + dy.shape[1]), np.int32)
    index[1:, 1:] = dy * (2 * grid[1] - 1) + dx
    index[0, :] = extra
    index[:, 0] = extra + 1
    index[0, 0] = extra + 2
    return index


def resize_bias_table(
    table: Float[Array, "*layers m heads"], source: Grid, target: Grid, method: str
) -> Float[Array, "*layers m2 heads"]:
    """A bias table of the grid `source` resampled for the grid `target`; the three class rows are kept as they are."""
    if source == target:
        return table
    old_y, old_x = 2 * source[0] - 1, 2 * source[1] - 1
    new_y, new_x = 2 * target[0] - 1, 2 * target[1] - 1
    rows, columns = (
        jnp.asarray(bias_matrix(method, old, new), table.dtype) for old, new in ((old_y, new_y), (old_x, new_x))
    )
    *layers, _, heads = table.shape
    patches = table[..., :-3, :].reshape(*layers, old_y, old_x, heads)
    resized = jnp.einsum("ty,...yxh,sx->...tsh", rows, patches, columns, precision="highest")
    return jnp.concatenate([resized.reshape(*layers, new_y * new_x, heads), table[..., -3:, :]], axis=-2)


def position_bias(table: Float[Array, "m heads"], grid: Grid) -> Float[Array, "heads n n"]:
    """The bias of every head for every (query, key) pair, to be added to the scaled attention scores.

    The same as ``table[relative_position_index(grid)]`` with the heads first. But a gather of rows as short as the
    heads are many, and the scatter of its gradient, are what accelerators do worst. All queries of one row of patches
    read the same table, for keys further up or down by as much as they are: long slices of what is looked up once.
    """
    heads, (rows, columns) = table.shape[1], grid
    tokens, row = 1 + rows * columns, np.arange(columns)
    from_class, to_class, class_to_class = table[-3:, :, None, None]
    # Of a query in any column to keys in any column, from as many rows above as there can be to as many below.
    offsets = table[:-3].reshape(2 * rows - 1, 2 * columns - 1, heads)[::-1]
    looked_up = jnp.moveaxis(offsets[:, row[:, None] - row + columns - 1], (-1, 1), (0, 1))
    keys = jnp.pad(looked_up.reshape(heads, columns, -1), ((0, 0), (0, 0), (1, 0)))  # room for the class token
    starts = [(rows - 1 - y) * columns for y in range(rows)]
    patches = jnp.stack([keys[:, :, start : start + tokens] for start in starts], axis=1)
    is_class = np.arange(tokens) == 0
    below = jnp.where(is_class, to_class, patches.reshape(heads, -1, tokens))
    return jnp.concatenate([jnp.where(is_class, class_to_class, from_class), below], axis=1)


def resize_position_embeddings(embeddings: Float[Array, "1 n d"], source: Grid, target: Grid) -> Float[Array, "1 n2 d"]:
    """Absolute position embeddings (class token first) resampled as torch's bicubic does; the class position is kept.

    Source: microsoft/unilm@768a3c8 beit/run_class_finetuning.py; transformers 5.23 `BeitEmbeddings`.
    """
    if source == target:
        return embeddings
    rows, columns = (
        jnp.asarray(bicubic_matrix(old, new), embeddings.dtype) for old, new in zip(source, target, strict=True)
    )
    patches = embeddings[0, 1:].reshape(*source, -1)
    resized = jnp.einsum("ty,yxd,sx->tsd", rows, patches, columns, precision="highest")
    return jnp.concatenate([embeddings[:, :1], resized.reshape(1, target[0] * target[1], -1)], axis=1)
