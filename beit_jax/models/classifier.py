"""Image classification: a linear head on the pooled output of the encoder."""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from beit_jax.config import BeitConfig
from beit_jax.models.elementary import dense
from beit_jax.models.encoder import BeitModel
from beit_jax.models.interface import ArrayLike, BeitOutput, Remat, check_task


class BeitForImageClassification(nnx.Module):
    """Classifies images: ``logits`` [b, num_labels], in the order of ``config.labels``.

    Source: microsoft/unilm@768a3c8 beit/modeling_finetune.py; transformers 5.23 `BeitForImageClassification`.
    """

    def __init__(self, config: BeitConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        check_task(config, "image_classification")
        self.beit = BeitModel(config, dtype=dtype, rngs=rngs)
        labels, wide = config.num_labels, jnp.float32
        self.classifier = dense(config, config.hidden_size, labels, dtype, rngs, wide) if labels else None
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
        """As `BeitModel.__call__`, with logits. Without labels the logits are the pooled output, as in transformers."""
        output = self.beit(
            pixel_values,
            bool_masked_pos,
            key=key,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            taps=taps,
            remat=remat,
        )
        pooled = output.pooler_output
        assert pooled is not None  # a configuration for classification always pools
        return replace(output, logits=pooled if self.classifier is None else self.classifier(pooled))
