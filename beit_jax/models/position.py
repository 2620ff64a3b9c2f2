"""Position tables at any input size: relative position bias of attention, and absolute position embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float

from beit_jax.errors import BeitJaxError
from beit_jax.kernels.cpu.calls import PositionBias
from beit_jax.models.partition import each_shard
from beit_jax.resize import bias_matrix, bicubic_matrix

Grid = tuple[int, int]  # patches, (rows, columns)


def check_known(grid: Grid, what: str) -> None:
    """Refuses a grid of symbolic size (`jax.export`) for what is computed for one size.

    Raises:
        BeitJaxError: names what needs the size.
    """
    if any(export.is_symbolic_dim(side) for side in grid):
        raise BeitJaxError(
            f"pixel_values: {what} need a known height and width, found {grid[0]} x {grid[1]} patches; export the "
            "model once for each size, where the batch alone may be symbolic"
        )


def num_relative_offsets(grid: Grid) -> int:
    """Rows of a bias table: every (dy, dx) between two patches, then class->patch, patch->class, class->class."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def attention_bias(table: Float[Array, "m heads"], source: Grid, target: Grid, method: str, batch: int) -> PositionBias:
    """`attention.position_bias` for the grid `target`, once for every shard of a batch of this size.

    Args:
        table: the bias table, of the grid `source`.
        method: how to resize the table, as in `resize_bias_table`.

    Raises:
        BeitJaxError: a grid of symbolic size.
    """
    check_known(target, "tables of relative position bias")
    copies = each_shard(resize_bias_table(table.astype(jnp.float32), source, target, method), batch)
    return PositionBias(jax.vmap(lambda table: position_bias_by_slices(table, target))(copies), copies, target)


def position_bias_by_slices(table: Float[Array, "m heads"], grid: Grid) -> Float[Array, "heads n n"]:
    """The same values and gradients as `attention.position_bias`, by slices instead of a gather of single rows.

    A row of the table is as short as the heads are few. Accelerators are slow at gathering short rows, and at
    scattering the gradient back. All queries in one row of patches read the same part of the table, and the part moves
    by one row of patches from one row of queries to the next. So the table is read once, and cut into long slices.
    """
    heads, (rows, columns) = table.shape[1], grid
    tokens, row = 1 + rows * columns, np.arange(columns)
    from_class, to_class, class_to_class = table[-3:, :, None, None]
    # [heads, query column, (dy from the most rows above to the most below, key column)]
    offsets = table[:-3].reshape(2 * rows - 1, 2 * columns - 1, heads)[::-1]
    looked_up = jnp.moveaxis(offsets[:, row[:, None] - row + columns - 1], (-1, 1), (0, 1))
    keys = jnp.pad(looked_up.reshape(heads, columns, -1), ((0, 0), (0, 0), (1, 0)))  # room for the class token
    starts = [(rows - 1 - y) * columns for y in range(rows)]
    patches = jnp.stack([keys[:, :, start : start + tokens] for start in starts], axis=1)
    is_class = np.arange(tokens) == 0
    below = jnp.where(is_class, to_class, patches.reshape(heads, -1, tokens))
    return jnp.concatenate([jnp.where(is_class, class_to_class, from_class), below], axis=1)


def resize_bias_table(
    table: Float[Array, "*layers m heads"], source: Grid, target: Grid, method: str
) -> Float[Array, "*layers m2 heads"]:
    """A bias table of the grid `source`, resampled for the grid `target`. The three class rows stay as they are.

    `method` is one of `beit_jax.resize.BIAS_METHODS`.
    """
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


def resize_position_embeddings(embeddings: Float[Array, "1 n d"], source: Grid, target: Grid) -> Float[Array, "1 n2 d"]:
    """Absolute position embeddings (class token first), resampled by torch's bicubic method. The class token's
    embedding stays as it is.

    Raises:
        BeitJaxError: a grid of symbolic size.

    Source: microsoft/unilm@768a3c8 beit/run_class_finetuning.py; transformers 5.23 `BeitEmbeddings`.
    """
    check_known(target, "absolute position embeddings")
    if source == target:
        return embeddings
    rows, columns = (
        jnp.asarray(bicubic_matrix(old, new), jnp.float32) for old, new in zip(source, target, strict=True)
    )
    embeddings = embeddings.astype(jnp.float32)
    patches = embeddings[0, 1:].reshape(*source, -1)
    resized = jnp.einsum("ty,yxd,sx->tsd", rows, patches, columns, precision="highest")
    return jnp.concatenate([embeddings[:, :1], resized.reshape(1, target[0] * target[1], -1)], axis=1)
