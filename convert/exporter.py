"""Flax parameters become PyTorch tensors, through the same tables as the import."""

from collections.abc import Mapping

import numpy as np

from beit_jax.config import BeitConfig

from .rules import export
from .tables import HF, Naming


def to_torch(config: BeitConfig, params: Mapping[str, np.ndarray], naming: Naming = HF) -> dict[str, np.ndarray]:
    """The flat parameters of a model as torch tensors by name, contiguous, in the dtype they have.

    What comes out of a converted checkpoint equals the tensors it was converted from bit for bit, except float16 and
    float64 sources, which are float32 here.
    """
    rules = [rule for rule in naming.rules(config, naming.own_prefix(config)) if rule.flax in params]
    return export(rules, params)
