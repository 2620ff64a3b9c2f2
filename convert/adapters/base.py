"""A native checkpoint as the base of an adapter: read as the transformers directory that it can be exported as."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from beit_jax.hub import WEIGHTS
from beit_jax.weights.native import load

from ..files.weight_file import RandomAccessFile, TensorInfo, WeightFile
from ..formats import LAYOUTS, writers


class _Exported(WeightFile):
    """The tensors that an export would write, in memory."""

    def __init__(self, file: RandomAccessFile, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__(file, "native")
        self._values = tensors
        self.tensors = {name: TensorInfo(name, leaf.shape, leaf.dtype, file.path) for name, leaf in tensors.items()}

    def _fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        flat[...] = self._values[info.name].reshape(-1).view(np.uint8)


def native_base(directory: Path) -> WeightFile:
    """Opens a native checkpoint by the names of transformers' files. Its ``config.json`` is one of transformers too.

    Raises:
        BeitJaxError: as `beit_jax.weights.native.load`.
    """
    checkpoint = load(directory)
    possible = writers(LAYOUTS[0])
    naming = next((each for each in possible if each.refusal(checkpoint.config) is None), possible[-1])
    tensors = naming.to_torch(checkpoint.config, checkpoint.params)
    return _Exported(RandomAccessFile(directory / WEIGHTS), tensors)
