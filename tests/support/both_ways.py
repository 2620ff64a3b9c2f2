"""Arguments of attention, and its values with all gradients, which kernels and the textbook form have in common."""

from typing import Any

import jax
import numpy as np

from beit_jax.models.attention import attend
from beit_jax.models.position import attention_bias, num_relative_offsets


def drawn(grid: tuple[int, int], heads: int, width: int, batch: int = 2) -> tuple[np.ndarray, ...]:
    """Query, key and value; a bias table; gradients of the averages."""
    rng = np.random.default_rng(0)
    n = 1 + grid[0] * grid[1]
    shapes = (batch, n, 3, heads, width), (num_relative_offsets(grid), heads), (batch, n, heads, width)
    return tuple(rng.standard_normal(shape) for shape in shapes)


def both_ways(grid: tuple[int, int], biased: bool, qkv: Any, table: Any, upstream: Any) -> tuple[Any, ...]:
    """The averages, and the gradients of queries, keys and values and of the table."""

    def averages(qkv: Any, table: Any) -> Any:
        return attend(qkv, attention_bias(table, grid, grid, "bicubic", len(qkv)) if biased else None)[0]

    found, back = jax.vjp(averages, qkv, table)
    of_qkv, of_table = back(upstream.astype(found.dtype))
    return found, *(of_qkv[:, :, part] for part in range(3)), of_table
