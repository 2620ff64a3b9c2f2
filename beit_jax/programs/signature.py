"""What the program of a model takes and gives: the inputs after its weights, and its outputs by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from beit_jax.config import BeitConfig
from beit_jax.models.build import build_model
from beit_jax.models.interface import BeitOutput
from beit_jax.tree import unflatten

Weights = Mapping[str, Any]
Program = Callable[..., dict[str, Array]]
"""Takes the flat weights and the inputs in their order, gives the outputs by name."""


def takes_mask(config: BeitConfig, features: bool) -> bool:
    """True if a program takes ``bool_masked_pos``: that of masked image modelling."""
    return config.task == "masked_image_modeling" and config.use_mask_token and not features


def program(config: BeitConfig, *, dtype: DTypeLike, features: bool) -> Program:
    """The function to export.

    Its outputs are the ``logits`` of a model with a head, one ``feature_map_N`` for every index of a backbone, and
    otherwise, or with `features`, ``last_hidden_state`` [b, 1 + patches, d] and ``pooled`` [b, d] as
    `beit_jax.features` has it. All are float32.
    """

    def beit(weights: Weights, pixel_values: Array, *masks: Array) -> dict[str, Array]:
        output = build_model(config, unflatten(dict(weights)), dtype=dtype)(pixel_values, *masks)
        found = _features(output) if features or config.task == "features" else _outputs(config, output)
        return {name: value.astype(jnp.float32) for name, value in found.items()}

    return beit


def _features(output: BeitOutput) -> dict[str, Array]:
    tokens, pooled = output.last_hidden_state, output.pooler_output
    return {"last_hidden_state": tokens, "pooled": tokens[:, 1:].mean(axis=1) if pooled is None else pooled}


def _outputs(config: BeitConfig, output: Any) -> dict[str, Array]:
    if config.task == "backbone":
        return {
            f"feature_map_{index}": found for index, found in zip(config.out_indices, output.feature_maps, strict=True)
        }
    return {"logits": output.logits}
