"""BEiT's encoder: patch embeddings, a stack of blocks run by one `jax.lax.scan`, final norm and pooling.

Blocks are stored stacked: every leaf under ``blocks`` has a leading axis of length `num_hidden_layers`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from beit_jax.config import BeitConfig
from beit_jax.kernels.cpu.calls import PositionBias
from beit_jax.models import interface
from beit_jax.models.elementary import EmbeddingHead, dropout, has_scores, layer_norm
from beit_jax.models.interface import ArrayLike, BeitOutput, Remat, patch_grid
from beit_jax.models.layers import Block, stacked_blocks
from beit_jax.models.partition import constrain
from beit_jax.models.position import Grid, attention_bias, num_relative_offsets, resize_position_embeddings

_Carry = tuple[Array, Array | None]
_States = tuple[Array | None, Array | None]


class Embeddings(nnx.Module):
    """Pixels to tokens: a class token, then the patches row by row; masked patches are replaced by the mask token."""

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        normal, hidden = nnx.initializers.normal(config.initializer_range), config.hidden_size
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
        grid = patch_grid(self.config, pixel_values.shape)
        x = self.patches(pixel_values, grid)
        if bool_masked_pos is not None:
            mask = interface.checked_mask(self.config, bool_masked_pos, x.shape[:2])
            x = jnp.where(mask[..., None], self.mask_token[...], x)
        x = jnp.concatenate([jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[-1])), x], axis=1)
        if self.config.use_absolute_position_embeddings:
            x = x + resize_position_embeddings(self.position_embeddings[...], self.config.grid, grid)
        return dropout(x, self.config.hidden_dropout_prob, key)

    def patches(self, pixel_values: Float[ArrayLike, "b height width c"], grid: Grid) -> Float[Array, "b patches d"]:
        """The patch projection: a convolution whose stride is its kernel, computed as the matrix product it is."""
        (rows, columns), (height, width) = grid, self.config.patch_size
        batch, channels = pixel_values.shape[0], pixel_values.shape[-1]
        cut = jnp.asarray(pixel_values).reshape(batch, rows, height, columns, width, channels).swapaxes(2, 3)
        pixels = cut.reshape(batch, rows * columns, -1).astype(self.dtype)
        kernel = self.patch_kernel[...].reshape(-1, self.config.hidden_size).astype(self.dtype)
        return jnp.einsum("bnp,pd->bnd", pixels, kernel, preferred_element_type=jnp.float32) + self.patch_bias[...]


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
            table = (num_relative_offsets(config.grid), config.num_attention_heads)
            self.shared_bias_table = nnx.Param(jnp.zeros(table))
        self.blocks = stacked_blocks(config, config.num_hidden_layers, dtype, rngs)
        if config.pooling == "cls":
            self.norm = layer_norm(config, rngs)
        elif config.has_pooler:
            self.pooler_norm = layer_norm(config, rngs)
        if config.embedding_size:
            self.embedding_head = EmbeddingHead(config, dtype=dtype, rngs=rngs)
        self.config, self.residual = config, jnp.dtype(jnp.float32)  # of the stream between blocks; training may set it
        self.fixed_blocks: tuple[int, ...] = ()  # numbers of the blocks that gradients pass by; training sets them

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
            remat: what gradients compute again on the way back, see `beit_jax.models.interface.REMAT`.

        Raises:
            BeitJaxError: wrong shapes, or a mask for a model without a mask token.
        """
        grid, depth = patch_grid(self.config, pixel_values.shape), self.config.num_hidden_layers
        embed_key = block_keys = None
        if key is not None:
            embed_key, *block_keys = jax.random.split(key, 1 + depth)
        embedded = constrain(self.embeddings(pixel_values, bool_masked_pos, embed_key).astype(self.residual))

        def run(
            carry: _Carry, layer: tuple[Block, Array | None, Array | None, Array | None], bias: PositionBias | None
        ) -> tuple[_Carry, _States]:
            (x, tapped), (block, drop_rate, block_key, slot) = carry, layer
            x, probabilities = block(x, grid, bias, drop_rate, block_key, output_attentions=output_attentions)
            x = constrain(x)
            return (x, interface.write_tap(tapped, x, slot)), (x if output_hidden_states else None, probabilities)

        rates = interface.drop_path_rates(self.config, depth)
        keys = None if block_keys is None else jnp.stack(block_keys)
        slots, tapped = interface.tap_slots(taps, depth), interface.tap_buffer(taps, embedded)
        layers, bias = (self.blocks, rates, keys, slots), self.shared_bias(grid, pixel_values.shape[0])
        rate = self.config.attention_probs_dropout_prob
        scores = output_attentions or has_scores(self.blocks.attention.dtype, rate, key)
        (x, tapped), (states, attentions) = interface.scan(
            run, (embedded, tapped), layers, bias, fixed=self.fixed_blocks, remat=remat, scores=scores
        )
        last = self.norm(x) if self.config.pooling == "cls" else x.astype(jnp.float32)
        return BeitOutput(
            last_hidden_state=last,
            pooler_output=self.pool(last),
            hidden_states=None if states is None else jnp.concatenate([embedded[None], states]),
            attentions=attentions,
            taps=interface.read_taps(taps, tapped),
        )

    def shared_bias(self, grid: Grid, batch: int) -> PositionBias | None:
        """The position bias that all layers share, at the given patch grid; None if the model has none."""
        if not self.config.has_shared_bias:
            return None
        return attention_bias(self.shared_bias_table[...], self.config.grid, grid, self.config.position_resize, batch)

    def pool(self, last: Float[Array, "b n d"]) -> Float[Array, "b pooled"] | None:
        """The class token of the normalised state, or the normalised mean of the patch tokens; or its embedding."""
        if not self.config.has_pooler:
            return None
        pooled = last[:, 0] if self.config.pooling == "cls" else self.pooler_norm(last[:, 1:].mean(axis=1))
        return self.embedding_head(pooled) if self.config.embedding_size else pooled
