"""Native checkpoints: a directory of ``config.json``, ``preprocessor_config.json`` and ``flax_model.safetensors``.

Tensors have flat names ``a/b/c``. The metadata of their file holds the provenance of the weights and a digest of every
tensor, which is checked at every load.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.atomic import Contents, check_contents
from beit_jax.config import BeitConfig
from beit_jax.hub import CONFIG, PROCESSOR, WEIGHTS
from beit_jax.images.processor import ImageProcessor
from beit_jax.json_file import write_json
from beit_jax.weights.tensors import LeafSpec, read_tensors, verify, write_tensors

MODEL = Contents("model", (CONFIG, "checkpoint.pth"))
"""Directories that a converted or exported model may replace; ``checkpoint.pth`` is an exported one."""


@dataclass(frozen=True)
class NativeCheckpoint:
    """A loaded native checkpoint.

    Attributes:
        params: flat name to array, float32 or bfloat16.
        provenance: the source of the weights, as the converter recorded it.
    """

    config: BeitConfig
    processor: ImageProcessor
    params: dict[str, np.ndarray]
    provenance: dict[str, Any] = field(default_factory=dict)


def is_native(path: Path) -> bool:
    """True if `path` is a directory that holds a native checkpoint."""
    return (path / WEIGHTS).is_file()


def save(directory: Path, checkpoint: NativeCheckpoint) -> None:
    """Writes all three files into an existing directory (see `beit_jax.atomic.new_directory`) and verifies them."""
    specs = {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in checkpoint.params.items()}
    save_json(directory, checkpoint.config, checkpoint.processor)
    write_tensors(directory / WEIGHTS, specs, lambda name: [[checkpoint.params[name]]], checkpoint.provenance)
    verify(directory / WEIGHTS)


def save_json(directory: Path, config: BeitConfig, processor: ImageProcessor) -> None:
    """Writes the two JSON files of a native checkpoint, readable by transformers as well."""
    for name, content in ((CONFIG, config.to_hf()), (PROCESSOR, processor.to_hf())):
        write_json(directory / name, content)


def check_replaceable(destination: Path, source: Path | None = None) -> None:
    """Refuses to replace a directory that holds something else than a model, or that holds the source.

    Raises:
        BeitJaxError: naming the directory.
    """
    check_contents(destination, MODEL, source)


def load(directory: Path) -> NativeCheckpoint:
    """Reads a native checkpoint and checks every tensor against its recorded digest.

    Raises:
        BeitJaxError: a file is missing or damaged; names the file and the tensor.
    """
    config = BeitConfig.from_file(directory / CONFIG)
    processor = ImageProcessor.from_file(directory / PROCESSOR)
    params, provenance = read_tensors(directory / WEIGHTS)
    return NativeCheckpoint(config, processor, params, provenance)
