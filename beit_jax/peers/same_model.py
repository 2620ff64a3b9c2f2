"""One model for all contenders: drawn at random or given, and written in the layout of each."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from beit_jax.choices import PresetName
from beit_jax.config import BeitConfig
from beit_jax.convert.exporter import export
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import preset
from beit_jax.models.adapt import adaptations
from beit_jax.models.build import param_shapes
from beit_jax.weights.native import NativeCheckpoint, save


def drawn(config: BeitConfig, rng: np.random.Generator, processor: PresetName = "timm") -> NativeCheckpoint:
    """A model whose every parameter is drawn, with unit gain, so that activations keep their size.

    Args:
        processor: the preset of its images.
    """
    params = {}
    for name, shape in param_shapes(config).items():
        draw = rng.standard_normal(shape, np.float32)
        params[name] = draw * fan_in(name, shape) ** -0.5 if name.endswith("kernel") else 0.1 * draw
        if name.endswith(("scale", "var")):
            params[name] = 1 + np.abs(params[name])
    return NativeCheckpoint(config, preset(processor, config.image_size), params)


def fan_in(name: str, shape: Sequence[int]) -> int:
    """Inputs that one output of a kernel sums over."""
    stacked = "blocks/" in name
    if name.endswith("qkv_kernel"):
        return shape[1]
    return int(np.prod(shape[stacked:-1]))


def at_size(checkpoint: NativeCheckpoint, side: int | None) -> NativeCheckpoint:
    """The model in float32, for square images of so many pixels a side: its position tables are resized.

    Raises:
        BeitJaxError: no whole number of patches is so wide.
    """
    config, params = checkpoint.config, dict(checkpoint.params)
    if side is not None:
        config = replace(config, image_size=(side, side))
        for name, (origins, make) in adaptations(checkpoint.config, config).items():
            params[name] = make({origin: checkpoint.params[origin] for origin in origins})
    return replace(checkpoint, config=config, params={name: leaf.astype(np.float32) for name, leaf in params.items()})


def inputs(config: BeitConfig, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random images as bytes, and as ``pixels`` from -1 to 1, both [b, height, width, c]."""
    image = rng.integers(0, 256, (batch, *config.image_size, config.num_channels), np.uint8)
    return {"image": image, "pixels": (image / np.float32(255) - np.float32(0.5)) / np.float32(0.5)}


def write(checkpoint: NativeCheckpoint, directory: Path, layouts: Collection[str]) -> dict[str, str]:
    """Writes the model into ``native``, and into a folder for each of these layouts, "hf" and "timm".

    Returns:
        Why a layout cannot have the model, by its name; empty if all can.

    Raises:
        BeitJaxError: the native checkpoint cannot be written.
    """
    (directory / "native").mkdir()
    save(directory / "native", checkpoint)
    refused = {}
    for layout in layouts:
        try:
            export(checkpoint, directory / layout, layout)
        except BeitJaxError as error:
            refused[layout] = str(error)
    return refused
