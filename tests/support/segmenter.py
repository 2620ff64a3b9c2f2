"""A tiny segmentation model with random weights, as a native checkpoint on disk."""

from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.images import ImageProcessor
from beit_jax.models.build import param_shapes
from beit_jax.weights import NativeCheckpoint, save


def save_segmenter(
    directory: Path, labels: tuple[str, ...], *, do_reduce_labels: bool | None = None, **changes: Any
) -> Path:
    """Writes a model of these classes for images of 32 x 32 pixels; the checkpoint may say how label maps count.

    Args:
        changes: other fields of the configuration.
    """
    config = BeitConfig(
        task="semantic_segmentation",
        image_size=(32, 32),
        patch_size=(8, 8),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        labels=labels,
        out_indices=(0, 1, 2, 3),
        auxiliary_channels=8,
        **changes,
    )
    rng = np.random.default_rng(0)
    params = {
        name: (np.abs(draw) + 0.5 if name.endswith("/var") else draw * 0.3).astype(np.float32)
        for name, shape in param_shapes(config).items()
        for draw in [rng.standard_normal(shape)]
    }
    directory.mkdir(parents=True, exist_ok=True)
    processor = ImageProcessor(resize=(32, 32), do_reduce_labels=do_reduce_labels)
    save(directory, NativeCheckpoint(config, processor, params))
    return directory
