"""Masked image modelling: the head that predicts visual tokens, and BEiT v2's patch aggregation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.kernels.cpu.calls import PositionBias
from beit_jax.models import interface
from beit_jax.models.elementary import dense, has_scores, layer_norm
from beit_jax.models.encoder import BeitModel
from beit_jax.models.interface import ArrayLike, BeitOutput, Remat, check_task, patch_grid
from beit_jax.models.layers import Block, stacked_blocks
from beit_jax.models.partition import constrain
from beit_jax.models.position import Grid


class Aggregation(nnx.Module):
    """BEiT v2's extra blocks, which must predict the visual tokens from the final class token and early patches.

    The early patches lack what later blocks compute. These blocks can find it in the class token alone, so their loss
    trains the class token too. The rates of stochastic depth continue after the rate of block `aggregate_from`.
    The model's norm and head predict from them, or some of their own.

    Source: microsoft/unilm@768a3c8 beit2/modeling_pretrain.py, `VisionTransformerForMaskedImageModelingCLS`; paper
    section 2.3, arXiv 2208.06366.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.blocks = stacked_blocks(config, config.aggregation_layers, dtype, rngs)
        if config.own_aggregation_head:
            self.norm = layer_norm(config, rngs)
            self.lm_head = dense(config, config.hidden_size, config.vocab_size, dtype, rngs, jnp.float32)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b n d"],
        grid: Grid,
        shared_bias: PositionBias | None,
        key: Key[Array, ""] | None,
        remat: Remat,
    ) -> Float[Array, "b n d"]:
        first, count = self.config.aggregate_from, self.config.aggregation_layers
        total = max(self.config.num_hidden_layers, first + count)
        rates = interface.drop_path_rates(self.config, total, range(first, first + count))
        keys = None if key is None else jax.random.split(key, count)

        def run(
            x: Array, layer: tuple[Block, Array | None, Array | None], bias: PositionBias | None
        ) -> tuple[Array, None]:
            block, drop_path_rate, block_key = layer
            return constrain(block(x, grid, bias, drop_path_rate, block_key)[0]), None

        scores = has_scores(self.blocks.attention.dtype, self.config.attention_probs_dropout_prob, key)
        return interface.scan(run, x, (self.blocks, rates, keys), shared_bias, remat=remat, scores=scores)[0]


class BeitForMaskedImageModeling(nnx.Module):
    """Predicts the visual token of every patch: ``logits`` [b, patches, vocab_size].

    Source: microsoft/unilm@768a3c8 beit/modeling_pretrain.py; transformers 5.23 `BeitForMaskedImageModeling`.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        check_task(config, "masked_image_modeling")
        self.beit = BeitModel(config, dtype=dtype, rngs=rngs)
        if config.aggregation_layers:
            self.aggregation = Aggregation(config, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(config, rngs)
        self.lm_head = dense(config, config.hidden_size, config.vocab_size, dtype, rngs, jnp.float32)
        self.config = config

    def __call__(
        self,
        pixel_values: Float[ArrayLike, "b height width c"],
        bool_masked_pos: Shaped[ArrayLike, "b patches"] | None = None,
        *,
        predicted: Int[ArrayLike, "b k"] | None = None,
        aggregate: bool = False,
        key: Key[Array, ""] | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        taps: tuple[int, ...] = (),
        remat: Remat = "none",
    ) -> BeitOutput:
        """As `BeitModel.__call__`, with logits.

        Args:
            predicted: the patches to predict, whose logits are [b, k, vocab_size]; by default all, masked or not. The
                head's cost is in proportion to their number.
            aggregate: True to fill `aggregated_logits` too, for models with aggregation layers.

        Raises:
            BeitJaxError: as `BeitModel.__call__`; `aggregate` for a model without aggregation layers.
        """
        if aggregate and not self.config.aggregation_layers:
            raise BeitJaxError("aggregate: this model has no aggregation layers; leave it out")
        every = tuple(sorted({*taps, self.config.aggregate_from})) if aggregate else taps
        output = self.beit(
            pixel_values,
            bool_masked_pos,
            key=key,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            taps=every,
            remat=remat,
        )
        last, states = output.last_hidden_state, output.taps
        if not aggregate:
            return replace(output, logits=self.predict(last, predicted))
        assert states is not None
        early = states[every.index(self.config.aggregate_from)]
        grid = patch_grid(self.config, pixel_values.shape)
        aggregated = self.aggregation(
            jnp.concatenate([last[:, :1], early[:, 1:]], axis=1),
            grid,
            self.beit.shared_bias(grid, pixel_values.shape[0]),
            None if key is None else jax.random.fold_in(key, 0),
            remat,
        )
        return replace(
            output,
            logits=self.predict(last, predicted),
            taps=states[np.searchsorted(every, taps)] if taps else None,
            aggregated_logits=self.predict(aggregated, predicted, aggregated=True),
        )

    def predict(
        self, hidden: Float[Array, "b n d"], predicted: Int[ArrayLike, "b k"] | None, *, aggregated: bool = False
    ) -> Float[Array, "b k vocab"]:
        """Logits from hidden states: of all patches, or of the patches in `predicted`.

        Those of the extra blocks are `aggregated`, because these may have a norm and a head of their own.
        The norm is applied even where the encoder has normalised its output (pooling "cls"), as in the reference.
        """
        patches = hidden[:, 1:]
        if predicted is not None:
            patches = jnp.take_along_axis(patches, jnp.asarray(predicted)[..., None], axis=1)
        owner = self.aggregation if aggregated and self.config.own_aggregation_head else self
        return owner.lm_head(owner.norm(patches))
