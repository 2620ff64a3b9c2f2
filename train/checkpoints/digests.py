"""What was saved, byte for byte: the manifest of a training checkpoint.

It holds two kinds of digests (xxh3_128: rot and torn writes, not malice). Those of arrays are taken in memory, from
what the device gave, and cover the whole way to the disk and back. Those of files are taken once the arrays were read
back and found equal; later they decide, without parsing a byte, whether a checkpoint is still what was verified.
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

FILE = "manifest.json"
FORMAT = "beit-jax training checkpoint 1"
_CHUNK = 1 << 20
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}  # other failures to read say nothing of what is there

ArrayRecord: TypeAlias = dict[str, Any]
"""{"dtype", "shape", "parts": [{"start", "shape", "xxh3_128"}]}; the parts are boxes that tile the array."""
FileRecord: TypeAlias = dict[str, Any]
"""{"size", "xxh3_128"}"""
Part: TypeAlias = tuple[tuple[int, ...], np.ndarray]
"""A box of an array: where it starts, and its values."""


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says where."""


@dataclass(frozen=True)
class Manifest:
    """A training checkpoint, apart from the values of its arrays.

    Attributes:
        extra: what the caller stored beside the arrays.
        arrays: by flat name.
        files: by path below the checkpoint's directory; all of them but the manifest.
    """

    step: int
    extra: dict[str, Any]
    arrays: dict[str, ArrayRecord]
    files: dict[str, FileRecord]


def describe(dtype: np.dtype[Any], shape: Sequence[int], parts: Sequence[Part]) -> ArrayRecord:
    """The record of an array, or of those parts of it that this process holds."""
    boxes = [
        {"start": list(start), "shape": list(values.shape), "xxh3_128": _digest(values)} for start, values in parts
    ]
    return {"dtype": dtype.name, "shape": list(shape), "parts": boxes}


def merge(records: Sequence[Mapping[str, ArrayRecord]]) -> dict[str, ArrayRecord]:
    """One record per array from those of all processes. A fault of ours, not of a file, leaves parts uncovered."""
    merged = {}
    for name, first in records[0].items():
        parts = [part for record in records for part in record[name]["parts"]]
        covered = sum(prod(part["shape"]) for part in parts)
        assert covered == prod(first["shape"]), f"{name}: digests cover {covered} elements of {first['shape']}"
        merged[name] = {**first, "parts": parts}
    return merged


def check_arrays(arrays: Mapping[str, np.ndarray], records: Mapping[str, ArrayRecord]) -> None:
    """Compares whole arrays with what was saved, however they were divided then.

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
    """Records of all files below a directory."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): _file_record(path) for path in paths}


def check_files(directory: Path, files: Mapping[str, FileRecord]) -> None:
    """Compares files with what was verified when they were written. Files without a record are of no concern.

    Raises:
        Damaged: a file is missing or differs.
        BeitJaxError: a file cannot be read for a reason that does not lie in it.
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
        Damaged: there is none, or it is not what was written.
        BeitJaxError: it was written in another format, or cannot be read for a reason that does not lie in it.
    """
    try:
        signed = json.loads((directory / FILE).read_bytes())
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
    """Returns when everything below a directory has reached the disk: a power cut leaves it whole."""
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
    # Bytes of a contiguous copy: bfloat16 exports no buffer, and a box of an array lies scattered.
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
