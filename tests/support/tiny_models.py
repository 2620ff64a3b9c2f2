"""Tiny checkpoints of every kind of model, as programs and exports are made of them."""

from dataclasses import replace

import jax
import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.build import param_shapes
from beit_jax.weights.native import NativeCheckpoint

TINY = BeitConfig(
    task="image_classification", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    image_size=(32, 32), patch_size=(8, 8), position_bias="both", labels=("ant", "bee", "cat"),
)  # fmt: skip
DEEP = replace(TINY, task="features", num_hidden_layers=4)
KINDS = {
    "classification": TINY,
    "masked": replace(DEEP, task="masked_image_modeling", pooling="cls", vocab_size=8, use_mask_token=True),
    "features": DEEP,
    "segmentation": replace(DEEP, task="semantic_segmentation", out_indices=(0, 1, 2, 3)),
    "backbone": replace(DEEP, task="backbone", out_indices=(0, 2)),
    "regression by class token": replace(
        TINY, pooling="cls", use_absolute_position_embeddings=True, problem_type="regression"
    ),
    "without positions": replace(TINY, position_bias="none"),
}


def checkpoint(config: BeitConfig, seed: int = 0) -> NativeCheckpoint:
    """A checkpoint whose every parameter is drawn, variances above 0."""
    rng = np.random.default_rng(seed)
    params = {
        name: np.float32(rng.random(shape) + 0.5 if name.endswith("/var") else rng.standard_normal(shape) * 0.3)
        for name, shape in param_shapes(config).items()
    }
    return NativeCheckpoint(config, ImageProcessor(resize=config.image_size), params, {"source": "org/tiny"})


def differences(found: dict[str, jax.Array], expected: dict[str, jax.Array]) -> float:
    """The largest difference of any output."""
    assert found.keys() == expected.keys()
    return max(float(np.abs(np.asarray(found[name]) - np.asarray(expected[name])).max()) for name in expected)
