"""The directory of a zip archive that fills its file, and the places of its records.

Python's `zipfile` parses the directory. Everything it would read beyond that, this module reads by position.
"""

import io
import struct
import zipfile
import zlib

from beit_jax.errors import BeitJaxError, printable

from .weight_file import Extent, RandomAccessFile

_MAX_DIRECTORY = 16 * 2**20
_UTF8 = 0x800
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class RecordError(ValueError):
    """A record is not where the archive's directory says. The message tells the record, not the file."""


class FileStream(io.RawIOBase):
    """A file as a stream, for libraries that read one.

    Args:
        largest: the most bytes of one read; a larger one is refused as `zipfile.BadZipFile`.
    """

    def __init__(self, file: RandomAccessFile, largest: int | None = None) -> None:
        self._file, self._largest = file, largest
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always: reading is by position."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the position and returns it, as `io.IOBase.seek`."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if self._at < 0:
            raise OSError("negative position")
        return self._at

    def tell(self) -> int:
        """The position of the next read, in bytes."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes from the position, or what is left of the file."""
        count = self._count(size)
        if self._largest is not None and count > self._largest:
            raise zipfile.BadZipFile(f"its directory has {count} bytes; expected at most {self._largest}")
        data = self._file.read(self._at, count, "a record")
        self._at += count
        return data

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Fills the buffer, or what is left of the file, and returns how many bytes that were."""
        target = memoryview(buffer).cast("B")
        count = self._count(len(target))
        self._file.read_into(self._at, target[:count], "a record")
        self._at += count
        return count

    def _count(self, size: int | None) -> int:
        rest = max(self._file.size - self._at, 0)
        return rest if size is None or size < 0 else min(size, rest)


def zip_entries(file: RandomAccessFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the records of an archive in file order. The archive must fill the file; no record may stand twice.

    Raises:
        BeitJaxError: the archive is damaged, or something lies before or behind it.
    """
    try:
        with zipfile.ZipFile(FileStream(file, _MAX_DIRECTORY)) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except BeitJaxError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, OverflowError) as error:
        raise BeitJaxError(
            f"{file.label} is a truncated or damaged zip archive of {file.size} bytes ({printable(error)}); "
            "download it again"
        ) from None
    # Unlike torch, Python's zipfile takes an archive in the middle of a file. All readers must see the same records.
    if not entries or entries[0].header_offset != 0:
        raise BeitJaxError(f"{file.label} has no record at byte 0; expected nothing in front of the archive")
    if file.read(max(file.size - 22, 0), 4, "the end of the archive") != b"PK\5\6":
        raise BeitJaxError(f"{file.label} has bytes behind the end of its zip archive; expected none")
    by_name: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        name = entry.orig_filename  # .filename ends at a NUL
        if name in by_name:
            raise BeitJaxError(f"{file.label} has two records named {printable(name)}; expected one")
        by_name[name] = entry
    return by_name


def record_extent(file: RandomAccessFile, name: str, entry: zipfile.ZipInfo) -> Extent:
    """Returns the place of a record's bytes as they are stored; the CRC is that of the unpacked record.

    Raises:
        RecordError: its local header does not agree with the archive's directory, or it reaches behind the file.
    """
    what, nbytes = f"record {name}", entry.compress_size
    raw_name = name.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    start = entry.header_offset + _LOCAL_HEADER.size + len(raw_name)
    if start + nbytes > file.size:
        raise RecordError(f"{what} reaches behind the end of the file")
    header = file.read(entry.header_offset, start - entry.header_offset, what)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
    if magic != b"PK\3\4" or name_length != len(raw_name) or not header.endswith(raw_name):
        raise RecordError(f"{what} and the archive's directory disagree")
    if start + extra_length + nbytes > file.size:
        raise RecordError(f"{what} reaches behind the end of the file")
    return Extent(start + extra_length, nbytes, name, entry.CRC)


def inflated(file: RandomAccessFile, extent: Extent, nbytes: int) -> bytes:
    """Returns the `nbytes` of a deflated record.

    Raises:
        BeitJaxError: it unpacks to something else, by its length or its CRC-32.
    """
    machine, made = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    try:
        made += machine.decompress(file.read(extent.offset, extent.nbytes, extent.record), nbytes + 1)
    except zlib.error as error:
        found = printable(error)
    else:
        crc = zlib.crc32(made)
        if len(made) == nbytes and machine.eof and crc == extent.crc:
            return bytes(made)
        found = f"{len(made)} bytes of CRC {crc:08x}"
    raise BeitJaxError(
        f"record {printable(extent.record)} of {file.label}: expected {nbytes} bytes of CRC {extent.crc:08x}, found "
        f"{found}; the file is damaged: download it again"
    )
