"""Reads a .safetensors file: a length, a JSON header, then the tensors' bytes one behind the other.

This module bounds and parses the header, and then lets the safetensors library check the structure as well. The library
alone accepts duplicate names (the last one wins), does not name a tensor that overlaps another, and needs seconds and
gigabytes for a header of 100 MB. Source: https://github.com/safetensors/safetensors#format.
"""

from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import DuplicateKeyError, parse_json

from .weight_file import MAX_TENSORS, RandomAccessFile, TensorInfo, WeightFile, checked_info, shown

MAX_HEADER = 8 * 2**20

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafetensorsFile(WeightFile):
    """A .safetensors file. Raises `BeitJaxError` for any flaw in names, shapes, dtypes, places or `__metadata__`."""

    def __init__(self, file: RandomAccessFile) -> None:
        super().__init__(file, "safetensors")
        length = _header_length(file)
        header = _parse_header(file, file.read(8, length, "the header"))
        self.metadata = _metadata(file, header)
        self._start = 8 + length
        self._offsets: dict[str, tuple[int, int]] = {}
        for name in sorted(header):
            self.tensors[name], self._offsets[name] = _entry(file, name, header[name])
        _check_layout(file, self._start, self._offsets)
        _check_with_library(file)

    def _fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        begin, _ = self._offsets[info.name]
        self.file.read_into(self._start + begin, flat.data, f"tensor {printable(info.name)}")


def _header_length(file: RandomAccessFile) -> int:
    if file.size < 8:
        raise BeitJaxError(f"{file.label} is truncated: it has {file.size} bytes, a safetensors file at least 10")
    length = int.from_bytes(file.read(0, 8, "the header length"), "little")
    if length > MAX_HEADER:
        raise BeitJaxError(
            f"{file.label} is damaged or not a safetensors file: its first 8 bytes promise a header of {length} bytes; "
            f"expected at most {MAX_HEADER}"
        )
    if 8 + length > file.size:
        raise BeitJaxError(
            f"{file.label} is truncated: its header promises {8 + length} bytes, the file has {file.size}; "
            "download it again"
        )
    return length


def _parse_header(file: RandomAccessFile, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise BeitJaxError(f"the header of {file.label} starts with {printable(raw[:8])}; expected a JSON object '{{'")
    try:
        header = parse_json(raw)
    except DuplicateKeyError as error:
        raise BeitJaxError(
            f"{file.label} names {printable(error)} twice in its header; expected every name once"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BeitJaxError(f"the header of {file.label} is not valid JSON: {printable(error)}") from None
    return dict(header)


def _metadata(file: RandomAccessFile, header: dict[str, Any]) -> dict[str, object]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BeitJaxError(f"__metadata__ in {file.label} is not a table of strings")
    if not header:
        raise BeitJaxError(f"{file.label} holds no tensors")
    if len(header) > MAX_TENSORS:
        raise BeitJaxError(f"{file.label} lists {len(header)} tensors; expected at most {MAX_TENSORS}")
    return metadata


def _entry(file: RandomAccessFile, name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    where = f"tensor {printable(name)} in {file.label}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise BeitJaxError(f"{where} has the header entry {shown(entry)}; expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        small = str(entry["dtype"]).startswith(("F8", "F6", "F4"))
        raise BeitJaxError(
            f"{where} has dtype {shown(entry['dtype'])}{' (quantised)' * small}; expected one of {', '.join(DTYPES)}: "
            "load it with the library that wrote it, and save it as float32 or bfloat16"
        )
    info = checked_info(name, entry["shape"], dtype, file.path)
    match entry["data_offsets"]:
        case [int(begin), int(end)] if 0 <= begin <= end < 2**63:
            pass
        case offsets:
            raise BeitJaxError(f"{where} has data_offsets {shown(offsets)}; expected [begin, end] with begin <= end")
    if end - begin != info.nbytes:
        raise BeitJaxError(
            f"{where} has dtype {entry['dtype']} and shape {list(info.shape)}, that is {info.nbytes} bytes, "
            f"but its data_offsets [{begin}, {end}] hold {end - begin}"
        )
    return info, (begin, end)


def _check_layout(file: RandomAccessFile, start: int, offsets: dict[str, tuple[int, int]]) -> None:
    """Refuses tensors that overlap, gaps between tensors, and bytes behind the last."""
    end, last = 0, "the start of the data"
    for name, (begin, own_end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != end:
            flaw = f"overlaps {last}" if begin < end else f"leaves a gap of {begin - end} bytes behind {last}"
            raise BeitJaxError(
                f"tensor {printable(name)} in {file.label} {flaw}: expected it at byte {end}, found {begin}"
            )
        end, last = own_end, f"tensor {printable(name)}"
    if start + end > file.size:
        raise BeitJaxError(
            f"{file.label} is truncated: its header promises {start + end} bytes ({last} is the last), "
            f"the file has {file.size}; download it again"
        )
    if start + end < file.size:
        raise BeitJaxError(
            f"{file.label} has {file.size - start - end} bytes behind {last}, its last: "
            f"its header promises {start + end} bytes, the file has {file.size}"
        )


def _check_with_library(file: RandomAccessFile) -> None:
    try:
        with safe_open(file.path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise BeitJaxError(f"safetensors refuses {file.label}: {printable(error, 300)}") from None
