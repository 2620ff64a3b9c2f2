"""BEiT's attention: scaled dot products (arXiv:1706.03762, section 3.2.1) with a learned relative position bias.

    softmax(query @ key.T / sqrt(e) + bias) @ value

One CPU, TPUs and GPUs compute other forms of the decorated functions (`beit_jax.models.one_cpu`, `beit_jax.kernels`).
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from beit_jax.kernels import gpu, tpu
from beit_jax.kernels.cpu.calls import of_written_bias
from beit_jax.models.one_cpu import attend_in_pieces, for_one_cpu, repeated_with_looped_sum, separated_by_a_split
from beit_jax.models.position import Grid, num_relative_offsets


@for_one_cpu(attend_in_pieces)
@of_written_bias
@tpu.for_tpus(tpu.attend_by_rows)
@gpu.for_gpus(gpu.attend_by_tiles)
def attend(
    qkv: Float[Array, "b n 3 heads e"],
    bias: Float[Array, "shards heads n n"] | None,
    drop: Callable[[Array], Array] | None = None,
    *,
    output_attentions: bool = False,
) -> tuple[Float[Array, "b n heads e"], Float[Array, "b heads n n"] | None]:
    """Every token's average of all tokens' values, with the weights ``softmax(query @ key / sqrt(e) + bias)``.

    Scores and weights are float32. Products read the dtype of `qkv` and accumulate in float32.

    Args:
        bias: the position bias of `position_bias`, once for every shard of the batch (`partition.each_shard`): written
            out, or with its tables (`PositionBias`).
        drop: dropout of the weights.
        output_attentions: True to return the weights too.

    Returns:
        The averages, in the dtype of `qkv`; on request the weights, float32, after their dropout.
    """
    query, key, value = separated(qkv)
    scores = jnp.einsum("bhqe,bhke->bhqk", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + of_every_sample(bias, scores.shape[0])
    # softmax(scores) is exponentials / total. Dividing the averages instead of the many more weights is cheaper.
    exponentials = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = exponentials.sum(axis=-1, keepdims=True)
    weights = exponentials if drop is None else drop(exponentials)
    averages = jnp.einsum("bhqk,bhke->bhqe", weights.astype(qkv.dtype), value, preferred_element_type=jnp.float32)
    averages = jnp.moveaxis((averages / total).astype(qkv.dtype), 1, 2)
    return averages, weights / total if output_attentions else None


@for_one_cpu(separated_by_a_split)
def separated(
    qkv: Float[Array, "b n 3 heads e"],
) -> tuple[Float[Array, "b heads n e"], Float[Array, "b heads n e"], Float[Array, "b heads n e"]]:
    """Query, key and value of every head."""
    query, key, value = jnp.einsum("bnkhe->kbhne", qkv)
    return query, key, value


@for_one_cpu(repeated_with_looped_sum)
def of_every_sample(bias: Float[Array, "shards heads n n"], batch: int) -> Float[Array, "b heads n n"]:
    """The bias of each sample's scores, which is the bias of the sample's shard."""
    repeated = jnp.broadcast_to(bias[:, None], (len(bias), batch // len(bias), *bias.shape[1:]))
    return repeated.reshape(batch, *bias.shape[1:])


@lru_cache(maxsize=16)
def relative_position_index(grid: Grid) -> np.ndarray:
    """The row of the bias table for each (query, key) pair, [1 + h*w, 1 + h*w] int32; token 0 is the class token.

    Source: microsoft/unilm@768a3c8 beit/modeling_finetune.py, `Attention`. The index is never read from a checkpoint:
    files exist whose stored index was corrupted by weight averaging.
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


def position_bias(table: Float[Array, "m heads"], grid: Grid) -> Float[Array, "heads n n"]:
    """The bias of every head for every (query, key) pair. Models compute it by `position.position_bias_by_slices`."""
    return jnp.moveaxis(table[relative_position_index(grid)], -1, 0)
