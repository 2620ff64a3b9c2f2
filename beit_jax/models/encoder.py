"""BEiT's encoder: patch embeddings, a stack of blocks run by one `jax.lax.scan`, final norm and pooling.

Blocks are stored stacked: every leaf under ``blocks`` has a leading axis of length `num_hidden_layers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.layers import Block, attention_bias, dropout, layer_norm
from beit_jax.models.partition import constrain
from beit_jax.models.position import Grid, num_relative_offsets, resize_position_embeddings

ArrayLike = Array | np.ndarray
Remat = Literal["none", "block", "dots"]

REMAT: Mapping[Remat, Callable[[Any], Any]] = {
    "none": lambda step: step,
    "block": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
"""What wraps the scanned step. The two passes are two loops, so nothing computed again can be merged with its first
computation, and `jax.checkpoint` need not prevent it.

"dots" saves the products with parameters; attention scores, quadratic in the tokens, are computed again.
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeitOutput:
    """What a model returns; fields mean what transformers' fields of the same name mean.

    Attributes:
        last_hidden_state: [b, 1 + patches, d]; normalised if and only if the model pools the class token.
        pooler_output: [b, d], or None for a model without pooling.
        logits: the head's output, or None for a model without a head.
        hidden_states: on request, [depth + 1, b, 1 + patches, d]: the embeddings, then after each block, un-normalised.
        attentions: on request, [depth, b, heads, n, n] float32 probabilities.
        taps: on request, chosen hidden states [taps, b, 1 + patches, d].
        aggregated_logits: on request, the same head on what BEiT v2's aggregation layers made.
    """

    last_hidden_state: Float[Array, "b n d"]
    pooler_output: Float[Array, "b d"] | None = None
    logits: Float[Array, "b *classes"] | None = None
    hidden_states: Float[Array, "layers b n d"] | None = None
    attentions: Float[Array, "depth b heads n n"] | None = None
    taps: Float[Array, "taps b n d"] | None = None
    aggregated_logits: Float[Array, "b k classes"] | None = None


class Embeddings(nnx.Module):
    """Pixels to tokens: a class token, then the patches row by row; masked patches are replaced by the mask token."""

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(config.initializer_range)
        hidden = config.hidden_size
        self.cls_token = nnx.Param(jnp.zeros((1, 1, hidden)))
        if config.use_mask_token:
            self.mask_token = nnx.Param(jnp.zeros((1, 1, hidden)))
        if config.use_absolute_position_embeddings:
            self.position_embeddings = nnx.Param(jnp.zeros((1, 1 + config.grid[0] * config.grid[1], hidden)))
        self.patch_kernel = nnx.Param(normal(rngs.params(), (*config.patch_size, config.num_channels, hidden)))
        self.patch_bias = nnx.Param(jnp.zeros((hidden,)))
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        pixel_values: Float[ArrayLike, "b height width c"],
        bool_masked_pos: Shaped[ArrayLike, "b patches"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b n d"]:
        batch = len(pixel_values)
        grid = patch_grid(self.config, pixel_values.shape)
        x = self.patches(pixel_values, grid)
        if bool_masked_pos is not None:
            x = jnp.where(self.checked_mask(bool_masked_pos, x)[..., None], self.mask_token[...], x)
        x = jnp.concatenate([jnp.broadcast_to(self.cls_token[...], (batch, 1, x.shape[-1])), x], axis=1)
        if self.config.use_absolute_position_embeddings:
            x = x + resize_position_embeddings(self.position_embeddings[...], self.config.grid, grid)
        return dropout(x, self.config.hidden_dropout_prob, key)

    def patches(self, pixel_values: Float[ArrayLike, "b height width c"], grid: Grid) -> Float[Array, "b patches d"]:
        """The patch projection: a convolution whose stride is its kernel, computed as the matrix product it is."""
        (rows, columns), (height, width) = grid, self.config.patch_size
        batch, channels = pixel_values.shape[0], pixel_values.shape[-1]
        cut = jnp.asarray(pixel_values).reshape(batch, rows, height, columns, width, channels).swapaxes(2, 3)
        x = jnp.einsum(
            "bnp,pd->bnd",
            cut.reshape(batch, rows * columns, -1).astype(self.dtype),
            self.patch_kernel[...].reshape(-1, self.config.hidden_size).astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return x + self.patch_bias[...]

    def checked_mask(self, mask: ArrayLike, x: Array) -> Array:
        """`mask`, or a one-line error: the model has no mask token, or the mask is not [batch, patches]."""
        if not self.config.use_mask_token:
            raise BeitJaxError("bool_masked_pos was given, but this model has no mask token (use_mask_token is false)")
        if mask.shape != x.shape[:2]:
            raise BeitJaxError(f"bool_masked_pos: expected shape {x.shape[:2]} (batch, patches), found {mask.shape}")
        return jnp.asarray(mask, bool)


def patch_grid(config: BeitConfig, pixel_shape: tuple[int, ...]) -> Grid:
    """(rows, columns) of patches in pixel_values of this shape.

    Raises:
        BeitJaxError: not [batch, height, width, channels], other channels than the model's, or sides that the patch
            does not divide.
    """
    if len(pixel_shape) != 4 or pixel_shape[-1] != config.num_channels:
        raise BeitJaxError(
            f"pixel_values: expected [batch, height, width, {config.num_channels}], found {list(pixel_shape)}"
        )
    sides = pixel_shape[1:3]
    if any(side % patch or not side for side, patch in zip(sides, config.patch_size, strict=True)):
        raise BeitJaxError(f"pixel_values: height and width {sides} are not multiples of the patch {config.patch_size}")
    return sides[0] // config.patch_size[0], sides[1] // config.patch_size[1]


_Carry = tuple[Array, Array | None]
_States = tuple[Array | None, Array | None]


def _slots(taps: tuple[int, ...], depth: int) -> Array | None:
    """Where each block writes its output in a buffer of the tapped states, [depth] int32; None without taps.

    Every block writes, to the slot of the next tap: what is not tapped is overwritten before anyone reads it. So the
    scan carries the taps alone, and neither direction of it holds a state per layer. Blocks after the last tap write to
    one more slot.
    """
    if not taps:
        return None
    if list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] <= depth:
        raise BeitJaxError(f"taps: expected growing indices of the {depth + 1} hidden states, found {list(taps)}")
    return jnp.asarray(np.searchsorted(np.asarray(taps), np.arange(1, depth + 1)), jnp.int32)


class BeitModel(nnx.Module):
    """The encoder, for `model_type` beit and data2vec-vision alike.

    Args:
        config: the architecture.
        dtype: what matrix products compute in (float32 or bfloat16); parameters stay float32.
        rngs: draws the initial parameters; loading a checkpoint never draws any.

    Source: microsoft/unilm@768a3c8 beit/modeling_finetune.py and modeling_pretrain.py; transformers 5.23 `BeitModel`.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        if config.has_shared_bias:
            self.shared_bias_table = nnx.Param(
                jnp.zeros((num_relative_offsets(config.grid), config.num_attention_heads))
            )
        self.blocks = jax.vmap(lambda key: Block(config, dtype=dtype, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), config.num_hidden_layers)
        )
        if config.pooling == "cls":
            self.norm = layer_norm(config, rngs)
        elif config.has_pooler:
            self.pooler_norm = layer_norm(config, rngs)
        self.config = config

    def __call__(
        self,
        pixel_values: Float[ArrayLike, "b height width c"],
        bool_masked_pos: Shaped[ArrayLike, "b patches"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        taps: tuple[int, ...] = (),
        remat: Remat = "none",
    ) -> BeitOutput:
        """Encodes images.

        Args:
            pixel_values: as the checkpoint's processor makes them; any height and width that the patch divides.
            bool_masked_pos: True where a patch is replaced by the mask token.
            key: randomness of dropout and stochastic depth; None for inference.
            output_hidden_states, output_attentions: fill these fields; they cost memory in proportion to depth.
            taps: growing indices of hidden states (0: the embeddings) to return; they cost the memory of their number.
            remat: what gradients compute again on the way back: nothing; "block": each block, of which only the input
                is kept; "dots": each block but its products with parameters.

        Raises:
            BeitJaxError: wrong shapes, or a mask for a model without a mask token.
        """
        grid = patch_grid(self.config, pixel_values.shape)
        embed_key, block_keys = None, None
        if key is not None:
            embed_key, *block_keys = jax.random.split(key, 1 + self.config.num_hidden_layers)
        embedded = constrain(self.embeddings(pixel_values, bool_masked_pos, embed_key))
        shared_bias = self.shared_bias(grid, len(pixel_values))

        def run(carry: _Carry, layer: tuple[Block, Array, Array | None, Array | None]) -> tuple[_Carry, _States]:
            (x, kept), (block, drop_path_rate, block_key, slot) = carry, layer
            x, probabilities = block(
                x, grid, shared_bias, drop_path_rate, block_key, output_attentions=output_attentions
            )
            x = constrain(x)
            if kept is not None:
                kept = jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)
            return (x, kept), (x if output_hidden_states else None, probabilities)

        rates = jnp.linspace(0.0, self.config.drop_path_rate, self.config.num_hidden_layers)
        keys = None if block_keys is None else jnp.stack(block_keys)
        slots = _slots(taps, self.config.num_hidden_layers)
        kept = None if slots is None else jnp.broadcast_to(embedded, (len(taps) + 1, *embedded.shape))
        (x, kept), (after, attentions) = jax.lax.scan(
            REMAT[remat](run), (embedded, kept), (self.blocks, rates, keys, slots)
        )
        hidden_states = None if after is None else jnp.concatenate([embedded[None], after])
        last = self.norm(x) if self.config.pooling == "cls" else x
        return BeitOutput(
            last, self.pool(last), None, hidden_states, attentions, None if kept is None else kept[: len(taps)]
        )

    def shared_bias(self, grid: Grid, batch: int) -> Float[Array, "shards heads n n"] | None:
        """The position bias that all layers share, at the given patch grid, if the model has one."""
        if not self.config.has_shared_bias:
            return None
        return attention_bias(self.shared_bias_table[...], self.config, grid, batch)

    def pool(self, last: Float[Array, "b n d"]) -> Float[Array, "b d"] | None:
        """The class token of the normalised state, or the normalised mean of the patch tokens."""
        if not self.config.has_pooler:
            return None
        return last[:, 0] if self.config.pooling == "cls" else self.pooler_norm(last[:, 1:].mean(axis=1))
