"""The bytes of one weight file, read by position and never mapped into memory.

If another program cuts a mapped file short, the system kills the reader (SIGBUS). A read by position returns fewer
bytes instead, which becomes an ordinary error.
"""

import math
import os
import stat
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import BeitJaxError, printable

MAX_TENSORS = 20_000  # the largest published BEiT has under 1000
MAX_RANK = 8
_MAX_BYTES = 2**62
_CHUNK = 2**20  # bytes that stay in the cache between the read and the sum


@dataclass(frozen=True)
class TensorInfo:
    """The facts of one stored tensor that are known before its bytes are read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # ml_dtypes.bfloat16 for bfloat16
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shown(value: object) -> str:
    """Returns `value`, which a file holds, for a message: numbers, text and flat lists as they are, else the type."""
    items = value if isinstance(value, list | tuple) else [value]
    flat = all(isinstance(item, str | int | float | None) for item in items)
    if not flat:
        return type(value).__name__
    return printable(list(value) if isinstance(value, tuple) else value)


def checked_info(name: str, shape: object, dtype: np.dtype[Any], file: Path) -> TensorInfo:
    """Returns the `TensorInfo` of a shape that a file claims. Raises `BeitJaxError` if no array can have the shape."""
    where = f"tensor {printable(name)} in {printable(file, 1024)}"
    if not isinstance(shape, list | tuple):
        raise BeitJaxError(f"{where} has shape {shown(shape)}; expected a list of non-negative integers")
    if len(shape) > MAX_RANK:
        raise BeitJaxError(f"{where} has {len(shape)} dimensions; expected at most {MAX_RANK}")
    sizes = tuple(size for size in shape if type(size) is int and size >= 0)
    if len(sizes) != len(shape):
        raise BeitJaxError(f"{where} has shape {shown(shape)}; expected a list of non-negative integers")
    if math.prod(max(size, 1) for size in sizes) * dtype.itemsize > _MAX_BYTES:
        raise BeitJaxError(f"{where} has shape {shown(shape)}, larger than any memory")
    return TensorInfo(name, sizes, dtype, file)


class RandomAccessFile:
    """A regular file, open for reads by position from any thread.

    Attributes:
        label: the path, safe to print.

    Raises:
        BeitJaxError: the file cannot be opened, is no regular file, or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = printable(path, 1024)
        try:
            # O_NONBLOCK: opening a named pipe must not wait for a writer; it changes nothing for regular files.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            broken = " (a symbolic link to a file that is not there)" if os.path.islink(path) else ""
            raise BeitJaxError(f"{self.label}: no such file{broken}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise BeitJaxError(f"cannot read {self.label}: {printable(reason)}") from None
        status = os.fstat(self._fd)
        self.size = status.st_size
        self._version = (status.st_size, status.st_mtime_ns)
        kind = _refused_kind(status)
        if kind:
            self.close()
            raise BeitJaxError(f"{self.label} {kind}; expected a weight file")

    def read_into(self, offset: int, buffer: memoryview, what: str) -> None:
        """Fills the flat byte `buffer` from `offset`. Raises `BeitJaxError`, naming `what`, if the file changed."""
        done = 0
        try:
            while done < len(buffer):
                got = os.preadv(self._fd, [buffer[done:]], offset + done)
                if got == 0:
                    break
                done += got
            status = os.fstat(self._fd)
        except OSError as error:
            raise BeitJaxError(f"cannot read {what} from {self.label}: {printable(error.strerror)}") from None
        if done < len(buffer) or (status.st_size, status.st_mtime_ns) != self._version:
            raise BeitJaxError(
                f"{self.label} changed while it was read (opened with {self.size} bytes, now {status.st_size}): "
                f"{what} cannot be trusted; start again once the file is complete"
            )

    def read(self, offset: int, count: int, what: str) -> bytes:
        """Returns `count` bytes from `offset`; see `read_into`."""
        data = bytearray(count)
        self.read_into(offset, memoryview(data), what)
        return bytes(data)

    def close(self) -> None:
        """Closes the file. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _refused_kind(status: os.stat_result) -> str | None:
    if stat.S_ISDIR(status.st_mode):
        return "is a directory"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    return "is empty (0 bytes)" if status.st_size == 0 else None


class FileWindow(RandomAccessFile):
    """Bytes in the middle of an open file, as a file of their own. Closing it leaves the file open.

    Raises:
        BeitJaxError: the file is shorter.
    """

    def __init__(self, file: RandomAccessFile, start: int, nbytes: int) -> None:
        self.path, self.label, self.size = file.path, file.label, nbytes
        self._file, self._start = file, start
        if start < 0 or nbytes < 0 or start + nbytes > file.size:
            raise BeitJaxError(
                f"{file.label} is truncated: a record reaches from byte {start} to {start + nbytes}, the file has "
                f"{file.size}; copy it again"
            )

    def read_into(self, offset: int, buffer: memoryview, what: str) -> None:
        self._file.read_into(self._start + offset, buffer, what)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Extent:
    """The place of a record in a file, and its CRC-32 if the file has one."""

    offset: int
    nbytes: int
    record: str
    crc: int | None = None


def read_checked(file: RandomAccessFile, extent: Extent, what: str, into: memoryview | None = None) -> None:
    """Reads a record and compares its CRC-32. Keeps the bytes in `into` if it is given. Raises `BeitJaxError`."""
    scratch = memoryview(bytearray(0 if into is not None else min(_CHUNK, extent.nbytes)))
    crc = 0
    for at in range(0, extent.nbytes, _CHUNK):
        size = min(_CHUNK, extent.nbytes - at)
        chunk = into[at : at + size] if into is not None else scratch[:size]
        file.read_into(extent.offset + at, chunk, what)
        if extent.crc is not None:
            crc = zlib.crc32(chunk, crc)
    if extent.crc is not None and crc != extent.crc:
        raise BeitJaxError(
            f"CRC mismatch in record {printable(extent.record)} of {file.label} ({what}): expected {extent.crc:08x}, "
            f"found {crc:08x}; the file is damaged (or written with torch's checksums off): download or save it again"
        )


class WeightFile(ABC):
    """One parsed weight file. Names, shapes and dtypes are checked; the bytes of the tensors are still on disk."""

    def __init__(self, file: RandomAccessFile, format: str) -> None:
        self.file = file
        self.format = format
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, object] = {}
        self.notes: list[str] = []

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return (self.file.path,)

    @abstractmethod
    def _fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Writes the C-ordered bytes of one tensor into `flat`, `info.nbytes` long."""

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """Returns one tensor, C-contiguous, in its stored dtype: a new array, or a view of the uint8 `out` [bytes]."""
        info = self.tensors[name]
        if out is None:
            out = np.empty(info.nbytes, np.uint8)
        elif out.dtype != np.uint8 or out.ndim != 1 or out.nbytes < info.nbytes or not out.flags.c_contiguous:
            raise ValueError(f"out must be a flat contiguous uint8 array of at least {info.nbytes} bytes")
        flat = out[: info.nbytes]
        self._fill(info, flat)
        if info.dtype == np.bool_ and flat.size and flat.max() > 1:
            raise BeitJaxError(
                f"tensor {printable(name)} in {self.file.label} is BOOL but holds a byte {flat.max()}; expected 0 or 1"
            )
        return flat.view(info.dtype).reshape(info.shape)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
