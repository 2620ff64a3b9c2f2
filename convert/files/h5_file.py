"""Reads the HDF5 files of Keras and of transformers' TensorFlow models, through h5py.

Only data in the file itself are read: links to other files, and data sets that lie elsewhere, are refused.
"""

from typing import Any

import ml_dtypes
import numpy as np

from beit_jax.errors import BeitJaxError, printable

from .weight_file import MAX_TENSORS, RandomAccessFile, TensorInfo, WeightFile, checked_info

_DTYPES = {np.dtype(kind) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.int8)}
_WHOLE_MODEL = "model_weights"
"""The group of the weights in a file of `model.save`, beside those of the optimizer."""


class H5File(WeightFile):
    """The weights of a Keras 2 model, named as its layers name them: ``stem_conv/kernel:0``.

    Raises:
        BeitJaxError: h5py is not installed; the file is damaged; it refers to other files, or holds no numbers.
    """

    def __init__(self, file: RandomAccessFile) -> None:
        super().__init__(file, "hdf5")
        try:
            import h5py
        except ImportError as error:
            raise BeitJaxError(
                f"{file.label} is HDF5, of TensorFlow or Keras, which h5py reads ({error}): pip install 'beit-jax[h5]'"
            ) from None
        self._errors = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
        try:
            self._h5 = h5py.File(file.path, "r")
            self._collect(h5py)
        except self._errors as error:
            raise BeitJaxError(
                f"{file.label} is not a whole HDF5 file ({printable(error, 200)}); download it again"
            ) from None

    def _collect(self, h5py: Any) -> None:
        root = self._h5.get(_WHOLE_MODEL, self._h5)
        self.metadata = {str(key): _text(root.attrs[key]) for key in root.attrs if key != "layer_names"}
        self._sets: dict[str, Any] = {}
        waiting = [("", root)]
        while waiting:
            path, group = waiting.pop()
            for key in group:
                where = f"{path}{key}"
                if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                    raise BeitJaxError(
                        f"{self.file.label}: {printable(where)} is a link; expected the weights: save it again"
                    )
                found = group[key]
                if isinstance(found, h5py.Group):
                    waiting.append((f"{where}/", found))
                elif isinstance(found, h5py.Dataset):
                    self._add(where.partition("/")[2] or where, found)  # Keras puts a layer's weights in its group
                if len(self._sets) > MAX_TENSORS or len(waiting) > MAX_TENSORS:
                    raise BeitJaxError(f"{self.file.label} lists more than {MAX_TENSORS} tensors")
        if not self._sets:
            raise BeitJaxError(f"{self.file.label} holds no weights of Keras; expected what model.save_weights writes")
        self.tensors = dict(sorted(self.tensors.items()))

    def _add(self, name: str, found: Any) -> None:
        name = name if name.endswith(":0") else f"{name}:0"  # the number of an output, which Keras 3 leaves out
        where = f"tensor {printable(name)} in {self.file.label}"
        if found.external or found.is_virtual:
            raise BeitJaxError(f"{where} lies in another file; expected the weights themselves: save it again")
        if name in self._sets:
            raise BeitJaxError(f"{where}: the name stands twice; expected every name once")
        dtype = np.dtype(ml_dtypes.bfloat16) if found.dtype.str == "|V2" else found.dtype
        if dtype not in _DTYPES and dtype != ml_dtypes.bfloat16:
            raise BeitJaxError(f"{where} has dtype {printable(found.dtype)}, which is not converted")
        self.tensors[name] = checked_info(name, list(found.shape), dtype, self.file.path)
        self._sets[name] = found

    def _fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        found = self._sets[info.name]
        try:
            array = np.asarray(found[()])
        except self._errors as error:
            raise BeitJaxError(
                f"tensor {printable(info.name)} in {self.file.label} cannot be read ({printable(error, 200)}); "
                "download it again"
            ) from None
        flat[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def close(self) -> None:
        if hasattr(self, "_h5"):
            self._h5.close()
        super().close()


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)[:1000]
