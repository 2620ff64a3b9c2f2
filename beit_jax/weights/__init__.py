"""Native checkpoints: a directory of ``config.json``, ``preprocessor_config.json`` and ``flax_model.safetensors``.

`native` reads and writes the checkpoint of a model, `tensors` the file of its tensors with a digest of each, `digest`
has one of a whole model. `leaves` compares a configuration with the tensors beside it, `sizes` bounds it first. May
import: the ground and `images`. Imports no model, so that reading a checkpoint needs no Flax.
"""

from beit_jax.hub import CONFIG, PROCESSOR, WEIGHTS
from beit_jax.weights.native import NativeCheckpoint, is_native, load, read_config, save, save_json
from beit_jax.weights.tensors import FORMAT, LeafSpec, read_metadata, read_specs, verify, write_tensors

__all__ = [
    "CONFIG",
    "FORMAT",
    "PROCESSOR",
    "WEIGHTS",
    "LeafSpec",
    "NativeCheckpoint",
    "is_native",
    "load",
    "read_config",
    "read_metadata",
    "read_specs",
    "save",
    "save_json",
    "verify",
    "write_tensors",
]
