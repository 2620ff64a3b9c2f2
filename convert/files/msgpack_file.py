"""Reads ``flax_model.msgpack``, the file of transformers 4's Flax models.

It holds arrays and nothing to run. Flax's own decoder reads the whole file into memory.
"""

import msgpack
import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.tree import flatten

from .weight_file import MAX_TENSORS, RandomAccessFile, TensorInfo, WeightFile, checked_info

_BROKEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError, msgpack.exceptions.UnpackException)


class MsgpackFile(WeightFile):
    """The parameters of a FlaxBeit model, named by their path, ``beit/encoder/layer/0/...``.

    Raises:
        BeitJaxError: the file is damaged, or no tree of arrays.
    """

    def __init__(self, file: RandomAccessFile) -> None:
        from flax import serialization  # takes a second, with JAX

        super().__init__(file, "flax msgpack")
        try:
            tree = serialization.msgpack_restore(file.read(0, file.size, "the file"))
            if not isinstance(tree, dict):
                raise ValueError(f"a {type(tree).__name__} where parameters should be")
            self._arrays = flatten(tree)
        except _BROKEN as error:
            raise BeitJaxError(
                f"{file.label} is not a whole Flax msgpack file ({printable(error)}); download it again"
            ) from None
        if len(self._arrays) > MAX_TENSORS:
            raise BeitJaxError(f"{file.label} lists {len(self._arrays)} tensors; expected at most {MAX_TENSORS}")
        for name, array in self._arrays.items():
            if not isinstance(array, np.ndarray):
                raise BeitJaxError(f"{printable(name)} in {file.label} is a {type(array).__name__}; expected an array")
            self.tensors[name] = checked_info(name, array.shape, array.dtype, file.path)

    def _fill(self, info: TensorInfo, flat: np.ndarray) -> None:
        flat[...] = np.ascontiguousarray(self._arrays[info.name]).reshape(-1).view(np.uint8)
