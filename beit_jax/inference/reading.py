"""A checkpoint in any format to a native one in memory."""

from beit_jax.hub import Source
from beit_jax.weights.native import NativeCheckpoint, is_native, load


def read(source: Source) -> NativeCheckpoint:
    """A native checkpoint as it is; any other source through the converter, in memory.

    Raises:
        BeitJaxError: it cannot be read completely; one line that says which file or tensor.
    """
    if source.path.is_dir() and is_native(source.path):
        return load(source.path)
    from beit_jax.convert import importer  # not at the top: reading native checkpoints needs no converter

    return importer.load(source)
