"""Heads on the encoder: masked image modelling and image classification."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

from beit_jax.config import BeitConfig
from beit_jax.models.encoder import REMAT, ArrayLike, BeitModel, BeitOutput, Remat, patch_grid
from beit_jax.models.layers import Block, layer_norm
from beit_jax.models.partition import constrain
from beit_jax.models.position import Grid


def _head(config: BeitConfig, features: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    normal = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(
        config.hidden_size,
        features,
        kernel_init=normal,
        dtype=dtype,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


class Aggregation(nnx.Module):
    """BEiT v2's extra blocks: they must predict the visual tokens from the final class token and early patches.

    What the early patches lack has to come through the class token, which is thus trained too. Their stochastic depth
    goes on where that of block `aggregate_from` stops.

    Source: microsoft/unilm@768a3c8 beit2/modeling_pretrain.py, `VisionTransformerForMaskedImageModelingCLS`; paper
    section 2.3, arXiv 2208.06366.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.blocks = jax.vmap(lambda key: Block(config, dtype=dtype, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), config.aggregation_layers)
        )
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b n d"],
        grid: Grid,
        shared_bias: Float[Array, "shards heads n n"] | None,
        key: Key[Array, ""] | None,
        remat: Remat,
    ) -> Float[Array, "b n d"]:
        first, count = self.config.aggregate_from, self.config.aggregation_layers
        total = max(self.config.num_hidden_layers, first + count)
        rates = jnp.linspace(0.0, self.config.drop_path_rate, total)[first : first + count]
        keys = None if key is None else jax.random.split(key, count)

        def run(x: Array, layer: tuple[Block, Array, Array | None]) -> tuple[Array, None]:
            block, drop_path_rate, block_key = layer
            return constrain(block(x, grid, shared_bias, drop_path_rate, block_key)[0]), None

        return jax.lax.scan(REMAT[remat](run), x, (self.blocks, rates, keys))[0]


class BeitForMaskedImageModeling(nnx.Module):
    """Predicts the visual token of every patch: ``logits`` [b, patches, vocab_size].

    Source: microsoft/unilm@768a3c8 beit/modeling_pretrain.py; transformers 5.23 `BeitForMaskedImageModeling`.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.beit = BeitModel(config, dtype=dtype, rngs=rngs)
        if config.aggregation_layers:
            self.aggregation = Aggregation(config, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(config, rngs)
        self.lm_head = _head(config, config.vocab_size, dtype, rngs)
        self.config = config

    def __call__(
        self,
        pixel_values: Float[ArrayLike, "b height width c"],
        bool_masked_pos: Shaped[ArrayLike, "b patches"] | None = None,
        *,
        predicted: Int[ArrayLike, "b k"] | None = None,
        aggregate: bool = False,
        **options: Any,
    ) -> BeitOutput:
        """As `BeitModel.__call__`, with logits.

        Args:
            predicted: the patches to predict, whose logits are [b, k, vocab_size]; by default all, masked or not. The
                head's cost is in proportion to their number.
            aggregate: also fill `aggregated_logits`, for models with aggregation layers.
        """
        if not aggregate:
            output = self.beit(pixel_values, bool_masked_pos, **options)
            # A class-token encoder has normalised its output already; the reference normalises again, and so do we.
            return replace(output, logits=self.predict(output.last_hidden_state, predicted))
        wanted: tuple[int, ...] = options.pop("taps", ())
        taps = tuple(sorted({*wanted, self.config.aggregate_from}))
        output = self.beit(pixel_values, bool_masked_pos, taps=taps, **options)
        assert output.taps is not None
        key, last = options.get("key"), output.last_hidden_state
        early = output.taps[taps.index(self.config.aggregate_from)]
        grid = patch_grid(self.config, pixel_values.shape)
        aggregated = self.aggregation(
            jnp.concatenate([last[:, :1], early[:, 1:]], axis=1),
            grid,
            self.beit.shared_bias(grid, len(pixel_values)),
            None if key is None else jax.random.fold_in(key, 0),
            options.get("remat", "none"),
        )
        return replace(
            output,
            logits=self.predict(last, predicted),
            taps=output.taps[np.searchsorted(taps, wanted)] if wanted else None,
            aggregated_logits=self.predict(aggregated, predicted),
        )

    def predict(
        self, hidden: Float[Array, "b n d"], predicted: Int[ArrayLike, "b k"] | None
    ) -> Float[Array, "b k vocab"]:
        """Logits of patches, of all or of those that are named, from the encoder's output."""
        patches = hidden[:, 1:]
        if predicted is not None:
            patches = jnp.take_along_axis(patches, jnp.asarray(predicted)[..., None], axis=1)
        return self.lm_head(self.norm(patches))


class BeitForImageClassification(nnx.Module):
    """Classifies images: ``logits`` [b, num_labels], in the order of ``config.labels``.

    Source: microsoft/unilm@768a3c8 beit/modeling_finetune.py; transformers 5.23 `BeitForImageClassification`.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.beit = BeitModel(config, dtype=dtype, rngs=rngs)
        self.classifier = _head(config, config.num_labels, dtype, rngs) if config.num_labels else None
        self.config = config

    def __call__(
        self,
        pixel_values: Float[ArrayLike, "b height width c"],
        bool_masked_pos: Shaped[ArrayLike, "b patches"] | None = None,
        **options: Any,
    ) -> BeitOutput:
        """As `BeitModel.__call__`; without labels the logits are the pooled features, as in transformers."""
        output = self.beit(pixel_values, bool_masked_pos, **options)
        pooled = output.pooler_output
        assert pooled is not None  # a configuration for classification always pools
        return replace(output, logits=pooled if self.classifier is None else self.classifier(pooled))
