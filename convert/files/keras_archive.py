"""Reads a ``.keras`` archive: a zip of ``config.json``, ``metadata.json`` and the HDF5 file ``model.weights.h5``.

The records' CRC-32 are compared before HDF5 sees a byte, so that no damaged file is read.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import parse_json

from ..strangers.contents import of_archive
from .h5_file import H5File
from .weight_file import Extent, FileWindow, RandomAccessFile, read_checked
from .zip_archive import FileStream, RecordError, inflated, record_extent, zip_entries

WEIGHTS = "model.weights.h5"
_CONFIG, _METADATA = "config.json", "metadata.json"
_LARGEST_TEXT = 32 * 2**20
_MOST_INFLATED = 64
"""Weights that deflate shrinks more are no weights; Keras itself stores them as they are."""


def is_keras(head: bytes) -> bool:
    """True for a zip archive whose first record is one of Keras', by the first bytes of the file."""
    length = int.from_bytes(head[26:28], "little")
    name = head[30 : 30 + length].decode("latin-1")
    return name in (_CONFIG, _METADATA, WEIGHTS) or name.startswith("assets/")


def open_keras(file: RandomAccessFile) -> H5File:
    """Opens the weights of an archive.

    Raises:
        BeitJaxError: as `H5File`; a record is damaged, encrypted, or packed by another method than deflate.
    """
    entries = zip_entries(file)
    if WEIGHTS not in entries:
        stranger = of_archive(entries)
        found = f"is {stranger}" if stranger is not None else f"holds no {WEIGHTS}"
        raise BeitJaxError(f"{file.label} {found}: expected what model.save of Keras writes")
    model = _json(file, entries, _CONFIG)
    told = _json(file, entries, _METADATA) or {}
    entry = entries[WEIGHTS]
    extent = _extent(file, entry)
    stream: Any
    if entry.compress_type == zipfile.ZIP_STORED:
        read_checked(file, extent, "its weights")
        stream = FileStream(FileWindow(file, extent.offset, extent.nbytes))
    else:
        stream = io.BytesIO(_unpacked(file, entry, extent))
    opened = H5File(file, stream=stream, model=model, format="keras archive")
    opened.metadata |= {key: printable(told[key], 100) for key in ("keras_version",) if key in told}
    return opened


def _json(file: RandomAccessFile, entries: Mapping[str, zipfile.ZipInfo], name: str) -> dict[str, Any] | None:
    if name not in entries:
        return None
    entry = entries[name]
    if entry.file_size > _LARGEST_TEXT:
        raise BeitJaxError(f"{name} in {file.label} has {entry.file_size} bytes; expected at most {_LARGEST_TEXT}")
    extent = _extent(file, entry)
    if entry.compress_type == zipfile.ZIP_STORED:
        data = bytearray(extent.nbytes)
        read_checked(file, extent, "its configuration", memoryview(data))
    else:
        data = bytearray(_unpacked(file, entry, extent))
    try:
        content = parse_json(bytes(data))
    except (ValueError, RecursionError) as error:
        raise BeitJaxError(f"{name} in {file.label} is no JSON ({printable(error)}); save it again") from None
    if not isinstance(content, dict):
        raise BeitJaxError(f"{name} in {file.label}: expected an object, found a {type(content).__name__}")
    return content


def _extent(file: RandomAccessFile, entry: zipfile.ZipInfo) -> Extent:
    name = entry.orig_filename
    where = f"record {printable(name)} of {file.label}"
    if entry.flag_bits & 0x1:
        raise BeitJaxError(f"{where} is encrypted; expected it as Keras writes it")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BeitJaxError(f"{where} is packed by method {entry.compress_type}; expected it stored, or deflated")
    if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
        raise BeitJaxError(f"{where} has two sizes, {entry.file_size} and {entry.compress_size}; expected one")
    try:
        return record_extent(file, name, entry)
    except RecordError as error:
        raise BeitJaxError(f"{file.label} is damaged: {printable(error)}; download it again") from None


def _unpacked(file: RandomAccessFile, entry: zipfile.ZipInfo, extent: Extent) -> bytes:
    if entry.file_size > _MOST_INFLATED * entry.compress_size + 2**16:
        raise BeitJaxError(
            f"record {printable(entry.orig_filename)} of {file.label} grows from {entry.compress_size} to "
            f"{entry.file_size} bytes; expected at most {_MOST_INFLATED} times as many: save it again"
        )
    return inflated(file, extent, entry.file_size)
