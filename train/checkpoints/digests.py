"""The manifest of a training checkpoint: digests that show whether it still is what was saved, byte for byte.

There are two kinds of digests. Digests of arrays are taken in memory, from the values on the device; they cover the
whole way to the disk and back. Digests of files are taken after the arrays were read back and found equal; later they
show, without parsing a byte, whether the checkpoint has changed. All are xxh3_128, which detects bit rot and torn
writes, but no malice.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xxhash

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import parse_json

FILE = "manifest.json"
FORMAT = "beit-jax training checkpoint 1"
_CHUNK = 1 << 20
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}  # other errors say nothing about the content of a file

ArrayRecord: TypeAlias = dict[str, Any]
"""{"dtype", "shape", "parts": [{"start", "shape", "xxh3_128"}]}; the parts are boxes that tile the array."""
FileRecord: TypeAlias = dict[str, Any]
"""{"size", "xxh3_128"}"""
Part: TypeAlias = tuple[tuple[int, ...], np.ndarray]
"""A box of an array: the index at which it starts, and its values."""


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says where."""


@dataclass(frozen=True)
class Manifest:
    """A training checkpoint, apart from the values of its arrays.

    Attributes:
        extra: values that the caller stored with the arrays.
        arrays: records by flat name.
        files: records by path below the checkpoint's directory, of all files but the manifest.
    """

    step: int
    extra: dict[str, Any]
    arrays: dict[str, ArrayRecord]
    files: dict[str, FileRecord]


def describe(dtype: np.dtype[Any], shape: Sequence[int], parts: Sequence[Part]) -> ArrayRecord:
    """The record of an array, or of the parts of it that this process holds."""
    boxes = [
        {"start": list(start), "shape": list(values.shape), "xxh3_128": _digest(values)} for start, values in parts
    ]
    return {"dtype": dtype.name, "shape": list(shape), "parts": boxes}


def merge(records: Sequence[Mapping[str, ArrayRecord]]) -> dict[str, ArrayRecord]:
    """Merges the records of all processes into one per array. Uncovered parts are a bug, not damage of a file."""
    merged = {}
    for name, first in records[0].items():
        parts = [part for record in records for part in record[name]["parts"]]
        covered = sum(prod(part["shape"]) for part in parts)
        assert covered == prod(first["shape"]), f"{name}: digests cover {covered} elements of {first['shape']}"
        merged[name] = {**first, "parts": parts}
    return merged


def check_arrays(arrays: Mapping[str, np.ndarray], records: Mapping[str, ArrayRecord]) -> None:
    """Compares whole arrays with their records, however the arrays were divided when they were saved.

    Raises:
        Damaged: an array is not the one that was saved.
    """
    for name, record in records.items():
        array = arrays[name]
        found, expected = (array.dtype.name, array.shape), (record["dtype"], tuple(record["shape"]))
        if found != expected:
            raise Damaged(f"{printable(name)}: {expected} was saved, {found} is read")
        for part in record["parts"]:
            box = tuple(slice(at, at + size) for at, size in zip(part["start"], part["shape"], strict=True))
            if _digest(array[box]) != part["xxh3_128"]:
                raise Damaged(f"{printable(name)}: digest mismatch")


def describe_files(directory: Path) -> dict[str, FileRecord]:
    """The records of all files below a directory."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _file_record(path) for path in paths}


def check_files(directory: Path, files: Mapping[str, FileRecord]) -> None:
    """Compares files with their records. Files without a record are ignored.

    Raises:
        Damaged: a file is missing or differs.
        BeitJaxError: a file cannot be read, for a reason other than damage.
    """
    for name, expected in files.items():
        try:
            found = _file_record(directory / name)
        except OSError as error:
            raise _unreadable(directory / name, error) from None
        if found["size"] != expected["size"]:
            raise Damaged(f"{name}: {expected['size']:,} bytes expected, {found['size']:,} found")
        if found != expected:
            raise Damaged(f"{name}: digest mismatch")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest, with a digest of itself."""
    content = {"format": FORMAT, **dataclasses.asdict(manifest)}
    signed = {"xxh3_128": _content_digest(content), "content": content}
    (directory / FILE).write_text(json.dumps(signed) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Reads what `write_manifest` wrote.

    Raises:
        Damaged: the manifest is missing, or is not what was written.
        BeitJaxError: the manifest has another format, or cannot be read, for a reason other than damage.
    """
    try:
        signed = parse_json((directory / FILE).read_bytes())
        content = signed["content"]
        intact = signed["xxh3_128"] == _content_digest(content)
    except OSError as error:
        raise _unreadable(directory / FILE, error) from None
    except (ValueError, RecursionError, LookupError, TypeError):
        raise Damaged(f"{FILE}: not a manifest") from None
    if not intact:
        raise Damaged(f"{FILE}: digest mismatch")
    if content["format"] != FORMAT:
        found = printable(content["format"])
        raise BeitJaxError(f'{directory / FILE}: expected the format "{FORMAT}", found "{found}"; use its version')
    return Manifest(*(content[field.name] for field in dataclasses.fields(Manifest)))


def synchronise(directory: Path) -> None:
    """Returns when everything below a directory has reached the disk: a power cut then loses nothing."""
    for path in directory.rglob("*"):
        synchronise_entry(path)
    synchronise_entry(directory)


def synchronise_entry(path: Path) -> None:
    """Returns when a file, or a directory's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> Exception:
    if error.errno in _DAMAGE:
        return Damaged(f"{path.name}: {error.strerror}")
    return BeitJaxError(f"{path}: cannot be read ({error.strerror}); make it readable")


def _digest(array: np.ndarray) -> str:
    # A contiguous copy as bytes: bfloat16 exports no buffer, and a box of an array is not contiguous.
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _content_digest(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _file_record(path: Path) -> FileRecord:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    size = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"size": size, "xxh3_128": digest.hexdigest()}
