"""Native checkpoints: a directory of ``config.json``, ``preprocessor_config.json`` and ``flax_model.safetensors``.

Tensors have flat names ``a/b/c``. The metadata of their file holds the provenance of the weights and a digest of every
tensor, which is checked at every load.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from beit_jax.atomic import Contents
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import ADAPTER_WEIGHTS, CONFIG, PROCESSOR, WEIGHTS
from beit_jax.images.processor import ImageProcessor
from beit_jax.json_file import write_json
from beit_jax.weights.leaves import check_config
from beit_jax.weights.tensors import LeafSpec, read_metadata, read_specs, read_tensors, verify, write_tensors

NATIVE = Contents(
    "native checkpoint", (CONFIG, PROCESSOR, WEIGHTS, ADAPTER_WEIGHTS), lambda directory: is_native(directory)
)
"""What a native checkpoint of a model or of a tokenizer may replace."""


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

    def without_values(self) -> Self:
        """The same with parameters of these shapes and dtypes that take no memory: zeros."""
        zeros = {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in self.params.items()}
        return replace(self, params=zeros)


def is_native(path: str | Path) -> bool:
    """True if `path` is a directory that holds a native checkpoint.

    Raises:
        BeitJaxError: its weights are no file: a link to nothing, a pipe, a directory.
    """
    weights = Path(path) / WEIGHTS
    if os.path.lexists(weights) and not weights.is_file():
        raise BeitJaxError(
            f"{printable(weights)}: expected a regular file, found a directory, a device or a link to nothing; convert "
            "again what the checkpoint was made of, to another directory"
        )
    return weights.is_file()


def save(directory: str | Path, checkpoint: NativeCheckpoint) -> None:
    """Writes all three files into an existing directory (see `beit_jax.atomic.new_directory`) and verifies them.

    Raises:
        BeitJaxError: the images of the processor have another number of channels than the model takes.
    """
    directory, takes, given = Path(directory), checkpoint.config.num_channels, checkpoint.processor.num_channels
    if takes != given:
        raise BeitJaxError(
            f"image processor: makes images of {given} channels, the model takes {takes}; give another, such as "
            f"processor.for_channels({takes})"
        )
    specs = {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in checkpoint.params.items()}
    save_json(directory, checkpoint.config, checkpoint.processor)
    write_tensors(directory / WEIGHTS, specs, lambda name: [[checkpoint.params[name]]], checkpoint.provenance)
    verify(directory / WEIGHTS)


def save_json(directory: str | Path, config: BeitConfig, processor: ImageProcessor) -> None:
    """Writes the two JSON files of a native checkpoint, readable by transformers as well."""
    for name, content in ((CONFIG, config.to_hf()), (PROCESSOR, processor.to_hf())):
        write_json(Path(directory) / name, content)


def load(directory: str | Path) -> NativeCheckpoint:
    """Reads a native checkpoint and checks every tensor against its recorded digest.

    Raises:
        BeitJaxError: a file is missing or damaged, or ``config.json`` describes another model than the tensors; names
            the file, the key and the tensor.
    """
    directory = Path(directory)
    config = read_config(directory)
    processor = ImageProcessor.from_file(directory / PROCESSOR)
    params, provenance = read_tensors(directory / WEIGHTS)
    return NativeCheckpoint(config, processor, params, provenance)


def read_config(directory: str | Path) -> BeitConfig:
    """Reads the configuration and compares it with the header of the weights; no tensor is read.

    Raises:
        BeitJaxError: as `load`.
    """
    directory = Path(directory)
    config = BeitConfig.from_file(directory / CONFIG)
    read_metadata(directory / WEIGHTS)
    shapes = {name: shape for name, (shape, _) in read_specs(directory / WEIGHTS).items()}
    check_config(config, shapes, directory / CONFIG, directory / WEIGHTS)
    return config
