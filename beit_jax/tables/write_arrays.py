"""Tables of features as arrays: NumPy's .npz and safetensors. Rows are written as they come, never all in memory."""

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from beit_jax.errors import BeitJaxError
from beit_jax.tables.schema import IMAGE, VALUES, Part, Parts, Schema, refuse, utf8

NAMES: Final = "images"
METADATA: Final = "beit_jax"
MAX_HEADER: Final = 100_000_000  # bytes; safetensors reads no longer one, and it holds the names


def check_arrays(name: str, schema: Schema) -> None:
    """Refuses a table without values.

    Raises:
        BeitJaxError: says which formats have it.
    """
    if schema.shape is None:
        raise refuse(name, "holds arrays of features alone", ".jsonl, .csv, .parquet or .arrow")


def write_npz(path: Path, schema: Schema, parts: Parts) -> int:
    """Writes `features` [n, ...] float32, `images` [n] and `beit_jax`, what made them. Images with errors are left out.

    Returns:
        The number of images, with those that were left out.
    """
    total, count, longest = 0, 0, 1
    for part in parts():
        kept = part.kept()
        total, count = total + len(part), count + len(kept)
        longest = max([longest, *(len(row[IMAGE]) for row in kept.rows)])
    kind = np.dtype(f"<U{longest}")
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        with archive.open(f"{VALUES}.npy", "w", force_zip64=True) as file:
            file.write(_npy_header(np.dtype("<f4"), (count, *(schema.shape or ()))))
            for values in _values(parts()):
                file.write(values)
        with archive.open(f"{NAMES}.npy", "w", force_zip64=True) as file:
            file.write(_npy_header(kind, (count,)))
            for part in parts():
                file.write(np.array([row[IMAGE] for row in part.kept().rows], kind).tobytes())
        with archive.open(f"{METADATA}.npy", "w", force_zip64=True) as file:
            text = io.BytesIO()
            np.lib.format.write_array(text, np.array(schema.described), allow_pickle=False)
            file.write(text.getvalue())
    return total


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _values(parts: Iterator[Part]) -> Iterator[bytes]:
    for part in parts:
        values = part.kept().values
        assert values is not None  # `check_arrays`
        yield np.ascontiguousarray(values, "<f4").tobytes()


def write_safetensors(path: Path, schema: Schema, parts: Parts) -> int:
    """Writes the tensor `features` [n, ...] float32; names and what made them are JSON in the metadata.

    Returns:
        The number of images, with those that were left out.

    Raises:
        BeitJaxError: the names are more than a header may hold.
    """
    total, names = 0, []
    for part in parts():
        total += len(part)
        names += [utf8(row[IMAGE]) for row in part.kept().rows]
    shape = (len(names), *(schema.shape or ()))
    nbytes = 4 * len(names) * schema.width
    header = {
        "__metadata__": {METADATA: schema.described, NAMES: json.dumps(names)},
        VALUES: {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise BeitJaxError(
            f"the names of {len(names):,} images take {len(text):,} bytes, a header of safetensors holds at most "
            f"{MAX_HEADER:,}; choose a name ending in .parquet or .arrow"
        )
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in _values(parts()):
            file.write(values)
    return total
