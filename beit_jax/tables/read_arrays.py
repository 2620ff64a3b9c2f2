"""Features in ``.npz`` and ``.safetensors``: arrays, which are mapped and not read."""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from beit_jax.errors import BeitJaxError, printable
from beit_jax.tables.features import (
    METADATA,
    Block,
    FeatureTable,
    not_features,
    parsed_metadata,
    rows_of,
)

_DTYPES: Final = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_LOCAL_HEADER: Final = 30  # bytes before the name of a member; PKWARE's APPNOTE, section 4.3.7
_SHOWN: Final = 8


class ArrayTable(FeatureTable):
    """Features and names in two arrays."""

    def __init__(self, path: Path, features: Any, names: np.ndarray | list[str], metadata: Mapping[str, Any]):
        if len(names) != len(features):
            raise not_features(path, f"a name for each of {len(features)} rows", f"{len(names)} names")
        self.path, self.metadata, self.count = path, metadata, len(features)
        self.features, self.images = features, names
        self.width = int(np.prod(features.shape[1:], dtype=np.int64))

    def parts(self, rows: int, values: bool = True) -> Iterator[Block]:
        for start in range(0, len(self.features), rows):
            stop = min(len(self.features), start + rows)
            features = rows_of(self.features[start:stop], self.path)
            yield Block(features, partial(self._names, start, stop))

    def _names(self, start: int, stop: int) -> list[str]:
        return [str(name) for name in self.images[start:stop]]


def open_npz(path: Path) -> FeatureTable:
    """A table in NumPy's archive: ``features`` [images, ...] and ``images``, their names.

    Raises:
        BeitJaxError: it is no such archive, or has no such arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if not {"features", "images"} <= members.keys():
                found = ", ".join(sorted(members)[:_SHOWN]) or "nothing"
                raise not_features(path, "the arrays features and images", printable(found))
            arrays = {name: _member(archive, members[name], path) for name in ("features", "images")}
            said = _member(archive, members[METADATA], path) if METADATA in members else np.array("")
    except BeitJaxError:
        raise
    except Exception as error:  # NumPy and zipfile let out errors of many classes for damaged headers
        raise BeitJaxError(f"{printable(path)}: damaged or no .npz file ({printable(error)}); write it again") from None
    if arrays["images"].ndim != 1 or arrays["images"].dtype.kind != "U":
        raise not_features(path, "images to be names", f"{list(arrays['images'].shape)} {arrays['images'].dtype}")
    rows_of(arrays["features"][:0], path)
    return ArrayTable(path, arrays["features"], arrays["images"], parsed_metadata(str(said), path))


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Shaped[np.ndarray, "..."]:
    """An array of an archive: mapped where it is stored as it is, else read."""
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as member:
            return np.lib.format.read_array(io.BytesIO(member.read()), allow_pickle=False)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise not_features(path, f"{info.filename} to be text or numbers", "Python objects")
        if not np.prod(shape) or not dtype.itemsize:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def open_safetensors(path: Path) -> FeatureTable:
    """A table in a safetensors file: the tensor ``features``, and the names as a JSON list in the metadata.

    Raises:
        BeitJaxError: it is no such file, or has no such tensor or names.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header
            tensors, said = set(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise BeitJaxError(
            f"{printable(path)}: damaged or no safetensors file ({printable(error)}); write it again"
        ) from None
    if "features" not in tensors:
        raise not_features(path, "the tensor features", printable(", ".join(sorted(tensors)[:_SHOWN]) or "nothing"))
    try:
        names = json.loads(said.get("images", ""))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise not_features(path, "a JSON list of names as images in the metadata", "none")
    with path.open("rb") as binary:
        size = int.from_bytes(binary.read(8), "little")
        entry = json.loads(binary.read(size))["features"]
    if entry["dtype"] not in _DTYPES:
        raise not_features(path, "features of F32, F16 or F64", printable(entry["dtype"]))
    begin, shape = 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    features = np.memmap(path, dtype, "r", begin, shape) if np.prod(shape) else np.empty(shape, dtype)
    rows_of(features[:0], path)
    return ArrayTable(path, features, names, parsed_metadata(said.get(METADATA), path))
