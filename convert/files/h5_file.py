"""Reads the HDF5 files of Keras and of transformers' TensorFlow models, through h5py.

Only data in the file itself are read: links to other files, and data sets that lie elsewhere, are refused. HDF5 has no
checksum of numbers; that no two tensors share bytes, and that each has as many as its shape says, is checked.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import parse_json

from . import keras_names
from .weight_file import MAX_TENSORS, RandomAccessFile, TensorInfo, WeightFile, checked_info

_DTYPES = {np.dtype(kind) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.int8)}
_WHOLE_MODEL = "model_weights"
"""The group of the weights in a file of `model.save`, beside those of the optimizer."""
_DEFLATED = 1100
"""The most bytes that one compressed byte becomes: deflate's limit is 1032."""
_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError)


class H5File(WeightFile):
    """The weights of a Keras model, named as its layers name them.

    Keras 2 names variables, ``stem_conv/kernel:0``; Keras 3 numbers them, ``stem_conv/vars/0``.

    Args:
        stream: the HDF5 file, where it is a part of `file`.
        model: the configuration of the model that lay beside it.
        format: the file type for people.

    Raises:
        BeitJaxError: h5py is not installed; the file is damaged; it refers to other files, or holds no numbers.
    """

    def __init__(
        self,
        file: RandomAccessFile,
        *,
        stream: BinaryIO | None = None,
        model: Mapping[str, Any] | None = None,
        format: str = "hdf5",
    ) -> None:
        super().__init__(file, format)
        try:
            import h5py
        except ImportError as error:
            raise BeitJaxError(
                f"{file.label} is HDF5, of TensorFlow or Keras, which h5py reads ({error}): pip install 'beit-jax[h5]'"
            ) from None
        try:
            self._h5 = h5py.File(stream or file.path, "r")
            self._plain = stream is None  # places in the HDF5 file are places in `file`
            self._read_attributes(model)
            self._sets: dict[str, Any] = {}
            self._collect(h5py)
        except BeitJaxError:
            self.close()
            raise
        except _ERRORS as error:
            self.close()
            raise BeitJaxError(
                f"{file.label} is not a whole HDF5 file ({printable(error, 200)}); download it again"
            ) from None

    def _read_attributes(self, model: Mapping[str, Any] | None) -> None:
        root = self._h5.get(_WHOLE_MODEL, self._h5)
        attributes = {str(key): value for each in (root, self._h5) for key, value in each.attrs.items()}
        listed = [value for key, value in attributes.items() if key.startswith("layer_names")]  # in parts where long
        self._layers = {_text(name) for part in listed for name in np.ravel(part)}
        text = attributes.pop("model_config", None)
        self.metadata = {key: _text(value)[:1000] for key, value in attributes.items() if key in _ATTRIBUTES}
        self.metadata |= {"model_config": model if model is not None else _parsed(text)}

    def _collect(self, h5py: Any) -> None:
        found = dict(self._data_sets(h5py, self._h5.get(_WHOLE_MODEL, self._h5)))
        if not found:
            raise BeitJaxError(f"{self.file.label} holds no weights of Keras; expected what model.save_weights writes")
        self._check_places(found)
        model: Any = self.metadata["model_config"]
        if keras_names.are_numbered(found):
            told = {path: _text(self._h5[path].attrs["name"]) for path in self._groups(found)}
            names, by = keras_names.of_numbered(found, told, model)
            self.notes += [f"layers of numbered variables are known by {by}"] * (by is not None)
        else:
            names = {path: self._named(path) for path in found}
        for path, name in names.items():
            self._add(name, found[path])
        self.tensors = dict(sorted(self.tensors.items()))

    def _named(self, path: str) -> str:
        """Keras 2's name of a variable, which repeats the layer in whose group it is.

        A group that is not repeated is a part of the name: that of a model within a model, and keras_core's layers.
        transformers' shards have no groups.
        """
        group, _, inner = path.partition("/")
        name = inner if group in inner.split("/")[:-1] and path not in self._layers else path
        return name if name.endswith(":0") else f"{name}:0"  # the number of an output, which Keras 3 leaves out

    def _groups(self, paths: Mapping[str, Any]) -> Iterator[str]:
        """The groups of variables whose layers tell their names, as Keras has written since 3.5."""
        for path in dict.fromkeys(parent for each in paths for parent in keras_names.groups_above(each)):
            if path in self._h5 and "name" in self._h5[path].attrs:
                yield path

    def _data_sets(self, h5py: Any, root: Any) -> Iterator[tuple[str, Any]]:
        waiting, count = [("", root)], 0
        while waiting:
            path, group = waiting.pop()
            for key in group:
                where, count = f"{path}{key}", count + 1
                if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                    raise BeitJaxError(
                        f"{self.file.label}: {printable(where)} is a link; expected the weights: save it again"
                    )
                if count > 4 * MAX_TENSORS:
                    raise BeitJaxError(f"{self.file.label} lists more than {4 * MAX_TENSORS} groups and tensors")
                found = group[key]
                if isinstance(found, h5py.Group):
                    waiting.append((f"{where}/", found))
                elif isinstance(found, h5py.Dataset) and not keras_names.is_of_training(where):
                    yield where, found

    def _check_places(self, sets: Mapping[str, Any]) -> None:
        """Refuses data sets elsewhere, with other bytes than their shapes need, and two of the same bytes."""
        places = []
        for path, found in sets.items():
            where = f"tensor {printable(path)} in {self.file.label}"
            if found.external or found.is_virtual:
                raise BeitJaxError(f"{where} lies in another file; expected the weights themselves: save it again")
            expected, stored = found.size * found.dtype.itemsize, found.id.get_storage_size()
            if expected != stored and (found.chunks is None or not stored or expected > stored * _DEFLATED):
                raise BeitJaxError(
                    f"{where} has shape {list(found.shape)}, that is {expected} bytes, and {stored} in the file; "
                    "download it again"
                )
            if found.id.get_offset() is not None:
                places.append((found.id.get_offset(), found.id.get_offset() + stored, path))
        for (_, end, first), (begin, _, second) in zip(sorted(places), sorted(places)[1:], strict=False):
            if begin < end:
                raise BeitJaxError(
                    f"{self.file.label}: tensors {printable(first)} and {printable(second)} share bytes; expected "
                    "every one in its own place: download it again"
                )

    def _add(self, name: str, found: Any) -> None:
        where = f"tensor {printable(name)} in {self.file.label}"
        if name in self._sets:
            raise BeitJaxError(f"{where}: the name stands twice; expected every name once")
        is_bfloat16 = found.dtype.str == "|V2" or _text(found.attrs.get("dtype", "")) == "bfloat16"
        dtype = np.dtype(ml_dtypes.bfloat16) if is_bfloat16 and found.dtype.itemsize == 2 else found.dtype
        if dtype not in _DTYPES and dtype != ml_dtypes.bfloat16:
            raise BeitJaxError(f"{where} has dtype {printable(found.dtype)}, which is not converted")
        if len(self._sets) >= MAX_TENSORS:
            raise BeitJaxError(f"{self.file.label} lists more than {MAX_TENSORS} tensors")
        self.tensors[name] = checked_info(name, list(found.shape), dtype, self.file.path)
        self._sets[name] = found

    def _fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        found = self._sets[info.name]
        start = found.id.get_offset()
        if self._plain and found.chunks is None and start is not None:
            # The bytes as they are, at a place that `_check_places` has seen. HDF5 would read them under one lock for
            # all threads, and into memory of its own.
            if start + info.nbytes > self.file.size:
                raise BeitJaxError(
                    f"{self.file.label} is truncated: tensor {printable(info.name)} ends at byte {start + info.nbytes},"
                    f" the file has {self.file.size}; download it again"
                )
            self.file.read_into(start, flat.data, f"tensor {printable(info.name)}")
            return
        try:
            array = np.asarray(found[()])
        except _ERRORS as error:
            raise BeitJaxError(
                f"tensor {printable(info.name)} in {self.file.label} cannot be read ({printable(error, 200)}); "
                "download it again"
            ) from None
        flat[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def close(self) -> None:
        if hasattr(self, "_h5"):
            self._h5.close()
        super().close()


_ATTRIBUTES = ("keras_version", "backend")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _parsed(text: Any) -> Mapping[str, Any] | None:
    """The configuration of a model as Keras 2 keeps it beside the weights; None where there is none."""
    if text is None:
        return None
    try:
        found = parse_json(text if isinstance(text, bytes) else str(text).encode())
    except (json.JSONDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"model_config is no JSON: {error}") from None
    return found if isinstance(found, dict) else None
