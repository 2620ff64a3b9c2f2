"""Models as programs. Outside of one, every operation of a model is compiled by itself, which takes much longer.

A function of a model is traced once for a configuration and the shapes of its inputs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.models.build import Model, build_model
from beit_jax.tree import unflatten


@jax.jit
def _logits(model: Model, pixels: Any) -> jax.Array:
    found = model(pixels).logits
    assert found is not None
    return found


def logits(model: Model, pixels: Any) -> np.ndarray:
    """The logits of a model."""
    return np.asarray(_logits(model, pixels))


def logits_of(config: BeitConfig, params: Mapping[str, Any], pixels: Any) -> np.ndarray:
    """The logits of the model with these parameters, by name."""
    return logits(build_model(config, unflatten(dict(params))), pixels)
