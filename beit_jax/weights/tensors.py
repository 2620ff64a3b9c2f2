"""``flax_model.safetensors``: flat ``a/b/c`` names, and metadata with a digest of every tensor and its provenance."""

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from beit_jax.errors import BeitJaxError, printable
from beit_jax.terminal import Advance

FORMAT = "beit-jax 1"
_DTYPES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}
_ALIGNMENT = 64  # bytes
_CHUNK = 1 << 20  # bytes that are read and then hashed while they are in a core's cache


@dataclass(frozen=True)
class LeafSpec:
    """The shape and dtype of a tensor to write."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the tensors by name and their provenance, and compares every tensor with its recorded digest.

    Raises:
        BeitJaxError: the file is damaged or was not written by this library; names the file and the tensor.
    """
    path = Path(path)
    metadata = read_metadata(path)
    try:
        params = {name: _aligned(shape, np.dtype(dtype)) for name, (shape, dtype) in read_specs(path).items()}
        _read(path, {name: _bytes(leaf) for name, leaf in params.items()}, json.loads(metadata["digests"]))
    except (SafetensorError, OSError) as error:
        raise BeitJaxError(f"{path}: damaged ({printable(error)}); convert again") from None
    return params, json.loads(metadata["provenance"])


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised array, aligned as XLA needs it: JAX copies arrays that are not."""
    size = LeafSpec(shape, dtype).nbytes
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata of ``flax_model.safetensors``: "format", and "digests" and "provenance" as JSON.

    Raises:
        BeitJaxError: the file is no safetensors file, or this library did not write it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
    except (SafetensorError, OSError) as error:
        raise BeitJaxError(f"{path}: not a readable safetensors file ({printable(error)}); convert again") from None
    if metadata.get("format") != FORMAT:
        found = printable(metadata.get("format", "none"))
        raise BeitJaxError(f'{path}: expected the format "{FORMAT}" in its metadata, found "{found}"; convert again')
    digests = _json_object(path, metadata, "digests")
    _json_object(path, metadata, "provenance")
    different = names ^ set(digests)
    if different:
        name = min(different)
        found = "a tensor without a digest" if name in names else "a digest without a tensor"
        raise BeitJaxError(f"{path}: {printable(name)}: {found}; convert again")
    return dict(metadata)


def _json_object(path: str | Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BeitJaxError(f'{path}: expected a JSON object as "{key}" in its metadata; convert again')
    return found


def read_specs(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a native weight file, sorted by name.

    Raises:
        BeitJaxError: a tensor is neither float32 nor bfloat16, which this library writes.
    """
    names = {code: str(dtype) for dtype, code in _DTYPES.items()}
    specs = {}
    with safe_open(path, framework="numpy") as file:
        for name in sorted(file.keys()):
            part = file.get_slice(name)
            dtype = str(part.get_dtype())
            if dtype not in names:
                raise BeitJaxError(f"{path}: {printable(name)}: expected F32 or BF16, found {dtype}; convert again")
            specs[name] = tuple(part.get_shape()), names[dtype]
    return specs


def write_tensors(
    path: str | Path,
    specs: Mapping[str, LeafSpec],
    layers: Callable[[str], Iterable[Iterable[np.ndarray]]],
    provenance: Mapping[str, Any],
    advance: Advance = lambda done: None,
) -> None:
    """Writes a new safetensors file with one chunk per thread in memory, whatever the size of the file.

    The safetensors library needs all tensors in memory at once. The format does not: it is an eight-byte length, a JSON
    header and the bytes. The same tensors give the same file: names are sorted, and the layout is fixed.

    Args:
        layers: takes a name and yields its bytes in order, as layers of C-contiguous arrays. An array may be reused
            when the next one is asked for. One thread writes a layer from its beginning to its end, but different
            layers may be written by different threads.

    Raises:
        BeitJaxError: a tensor is neither float32 nor bfloat16.
    """
    names = sorted(specs)
    for name in names:
        if specs[name].dtype not in _DTYPES:
            raise BeitJaxError(
                f"{path}: {printable(name)}: expected float32 or bfloat16, found {specs[name].dtype}; cast it first"
            )
    offsets = dict(zip(names, np.cumsum([0] + [specs[name].nbytes for name in names]).tolist(), strict=False))
    blank = {name: "0" * 32 for name in names}
    header_size = len(_header(specs, offsets, blank, provenance))

    with Path(path).open("wb") as file:
        # Takes the space before any work is done. Writing into allocated blocks also costs a third less.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, header_size + sum(spec.nbytes for spec in specs.values()))

        def write(name: str) -> Iterator[None]:
            digest, position = xxhash.xxh3_128(), header_size + offsets[name]
            for layer in layers(name):
                for chunk in layer:
                    data = _bytes(chunk)
                    digest.update(data)
                    while data:
                        written = os.pwrite(file.fileno(), data, position)
                        data, position = data[written:], position + written
                    advance(chunk.nbytes)
                yield
            expected = header_size + offsets[name] + specs[name].nbytes
            assert position == expected, f"{name}: {position - expected} bytes more than its shape holds"
            digests[name] = digest.hexdigest()

        digests: dict[str, str] = {}
        _take_turns(map(write, names))
        os.pwrite(file.fileno(), _header(specs, offsets, digests, provenance), 0)


def _take_turns(jobs: Iterable[Iterator[None]]) -> None:
    """Runs generators to their ends in two threads, one step of each in turn, so that both threads end together.

    No further step begins after a generator has failed or the caller was interrupted.
    """
    waiting, stopped = deque(jobs), threading.Event()

    def work(_: int) -> None:
        while not stopped.is_set():
            try:
                job = waiting.popleft()
            except IndexError:  # the other thread runs the last generator
                return
            try:
                next(job)
            except StopIteration:
                continue
            except BaseException:
                stopped.set()
                raise
            waiting.append(job)

    with ThreadPoolExecutor(max_workers=2) as pool:
        try:
            list(pool.map(work, range(2)))
        finally:
            stopped.set()


def verify(path: str | Path, advance: Advance = lambda done: None) -> None:
    """Reads a written file back and compares every tensor with its digest.

    Raises:
        BeitJaxError: the header is damaged, or the bytes of a tensor have changed.
    """
    _read(Path(path), {}, json.loads(read_metadata(path)["digests"]), advance)


def _read(
    path: Path, places: Mapping[str, memoryview], digests: Mapping[str, str], advance: Advance = lambda done: None
) -> None:
    """Reads the tensors of a native file in two threads and compares their digests.

    A tensor is read in pieces, each of which is hashed while it is in a core's cache. A tensor with no entry in
    `places` is not kept: all its pieces go to the same memory.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))

        def read(name: str) -> None:
            start, end = (8 + length + offset for offset in header[name]["data_offsets"])
            place, filled = places.get(name) or memoryview(bytearray(min(_CHUNK, end - start))), 0
            digest = xxhash.xxh3_128()
            while start < end:
                piece = place[filled : filled + min(_CHUNK, end - start)]
                count = os.preadv(file.fileno(), [piece], start)
                if not count:  # the file became shorter; the digest will differ
                    break
                digest.update(piece[:count])
                start += count
                filled = (filled + count) % len(place)
                advance(count)
            _check_digest(path, name, digest.hexdigest(), digests[name])

        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(read, sorted(digests)))


def _header(
    specs: Mapping[str, LeafSpec], offsets: Mapping[str, int], digests: Mapping[str, str], provenance: Mapping[str, Any]
) -> bytes:
    metadata = {
        "format": FORMAT,
        "digests": json.dumps(dict(sorted(digests.items()))),
        "provenance": json.dumps(dict(provenance), sort_keys=True),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    for name in sorted(specs):
        spec, start = specs[name], offsets[name]
        entries[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, start + spec.nbytes],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format asks for data aligned to eight bytes
    return len(header).to_bytes(8, "little") + header


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array. (A bfloat16 array exports no buffer itself.)"""
    return array.reshape(-1).view(np.uint8).data


def _check_digest(path: Path, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise BeitJaxError(
            f"{path}: {printable(name)}: digest {printable(expected)} expected, {found} found; convert again"
        )
