"""Reads a checkpoint of any format into memory as a native one."""

from beit_jax.hub import Source
from beit_jax.weights.native import NativeCheckpoint, is_native, load


def read(source: Source) -> NativeCheckpoint:
    """Loads a native checkpoint, or converts any other source in memory.

    Raises:
        BeitJaxError: the checkpoint cannot be read completely; names the file or the tensor.
    """
    if source.path.is_dir() and is_native(source.path):
        return load(source.path)
    from beit_jax.convert import importer  # not at the top: reading native checkpoints needs no converter

    return importer.load(source)
