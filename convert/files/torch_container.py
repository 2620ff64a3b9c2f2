"""The two files `torch.save` writes around a pickle: a zip archive (since 1.6), or pickles followed by raw storages.

Either is opened into the unpickled object and the place of every storage's bytes. Source: the archives themselves
(`zipfile.ZipFile(f).infolist()`) and the five consecutive pickles of old files (`pickletools.dis`).
"""

import io
import zipfile
from typing import BinaryIO, Protocol

from beit_jax.errors import BeitJaxError, printable

from ..pickles.machine import MAX_PICKLE, PickleMachine
from ..pickles.names import ITEM_SIZES, PickleError, Storage
from ..pickles.refusals import refused
from ..strangers.contents import of_archive, of_entries
from .weight_file import Extent, RandomAccessFile, read_checked, shown
from .zip_archive import RecordError, record_extent, zip_entries

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_OPCODE = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little")
_PROTOCOL = 1001
_ENCRYPTED = 0x1


class Container(Protocol):
    """An opened file.

    Attributes:
        format: the file type, for people.
        top: the unpickled object.
        forbidden: names in its pickle that no checkpoint needs. What they would have made stands in `top` as
            `Forbidden`; nothing was run.
    """

    format: str
    top: object
    forbidden: tuple[str, ...]

    def locate(self, storage: Storage) -> Extent:
        """Returns the place of a storage.

        Raises:
            PickleError: the storage is not there, or has another size than the pickle says.
        """


class ZipContainer:
    """The zip archive: records ``<any>/data.pkl`` and ``<any>/data/<key>``, none of them compressed."""

    format = "pytorch zip"

    def __init__(self, file: RandomAccessFile) -> None:
        self._file = file
        self._entries = zip_entries(file)
        stranger = of_archive(self._entries.keys())
        if stranger is not None:
            raise BeitJaxError(f"{file.label} is {stranger}: expected a state dict written by torch.save")
        first = next(iter(self._entries))
        self._folder = first.partition("/")[0] + "/"
        for name, entry in self._entries.items():
            self._check_entry(name, entry)
        if self._folder + "data.pkl" not in self._entries:
            raise BeitJaxError(f"{file.label} is a zip archive without data.pkl; expected a file written by torch.save")
        order = self._small_record("byteorder") if self._folder + "byteorder" in self._entries else b"little"
        if order != b"little":
            raise BeitJaxError(f"{file.label} has byte order {printable(order)}; expected little")
        self.top, self.forbidden = run_outer(file, io.BytesIO(self._small_record("data.pkl")), PickleMachine())

    def locate(self, storage: Storage) -> Extent:
        name = f"{self._folder}data/{storage.key}"
        if name not in self._entries:
            raise PickleError(f"its record {name} is not in the archive")
        extent = self._extent(name)
        expected = storage.numel * ITEM_SIZES[storage.kind]
        if extent.nbytes != expected:
            raise PickleError(f"its record {name} has {extent.nbytes} bytes, the pickle says {expected}")
        return extent

    def _check_entry(self, name: str, entry: zipfile.ZipInfo) -> None:
        where = f"record {printable(name)} of {self._file.label}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise BeitJaxError(f"{where} is compressed ({entry.file_size} bytes unpacked); expected it stored as it is")
        if entry.flag_bits & _ENCRYPTED:
            raise BeitJaxError(f"{where} is encrypted; expected it stored as it is")
        if not name.startswith(self._folder):
            raise BeitJaxError(f"{where} lies outside {printable(self._folder)}; expected one folder")

    def _extent(self, name: str) -> Extent:
        """Returns the place of a record, behind its local header, which must agree with the archive's directory."""
        try:
            return record_extent(self._file, name, self._entries[name])
        except RecordError as error:
            raise PickleError(str(error)) from None

    def _small_record(self, name: str) -> bytes:
        name = self._folder + name
        try:
            extent = self._extent(name)
        except PickleError as error:
            raise BeitJaxError(f"{self._file.label} is damaged: {printable(error)}") from None
        if extent.nbytes > MAX_PICKLE:
            raise BeitJaxError(
                f"record {printable(name)} of {self._file.label} has {extent.nbytes} bytes; "
                f"expected at most {MAX_PICKLE}"
            )
        data = bytearray(extent.nbytes)
        read_checked(self._file, extent, "its pickle or version", memoryview(data))
        return bytes(data)


class LegacyContainer:
    """The older file: pickles of a magic number, a version, the platform, the object and the storage keys, then bytes.

    The object's pickle names the storages, and the keys say in which order they follow: each is a count of elements and
    its bytes. There is no checksum.
    """

    format = "pytorch legacy"

    def __init__(self, file: RandomAccessFile) -> None:
        self._file = file
        stream = io.BytesIO(file.read(0, min(file.size, MAX_PICKLE), "the pickle"))
        machine = PickleMachine()
        magic, forbidden = run_outer(file, stream, machine)
        stranger = of_entries(magic if isinstance(magic, dict) else (), forbidden)
        if stranger is not None:
            raise BeitJaxError(f"{file.label} is {stranger}")
        if forbidden:
            raise refused(file.label, forbidden)
        if magic != _MAGIC:
            raise BeitJaxError(
                f"{file.label} is a pickle that torch.save did not write; expected a state dict of tensors"
            )
        version, platform = (run_pickle(file, stream, machine) for _ in range(2))
        if version != _PROTOCOL:
            raise BeitJaxError(f"{file.label} has version {shown(version)} of PyTorch's format; expected {_PROTOCOL}")
        if not isinstance(platform, dict) or platform.get("little_endian") is not True:
            raise BeitJaxError(f"{file.label} was written on a big-endian machine; expected a little-endian one")
        self.top, self.forbidden = run_outer(file, stream, machine)
        machine.forbidden.clear()
        keys = run_pickle(file, stream, machine)
        self._extents = self._follow(keys, stream.tell(), machine.storages)

    def locate(self, storage: Storage) -> Extent:
        return self._extents[storage.key]

    def _follow(self, keys: object, offset: int, storages: dict[str, Storage]) -> dict[str, Extent]:
        label = self._file.label
        names = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
        if sorted(names) != sorted(storages):
            raise BeitJaxError(f"{label} is damaged: its list of storages is not the one its pickle uses")
        extents = {}
        for key in names:
            storage = storages[key]
            nbytes = storage.numel * ITEM_SIZES[storage.kind]
            if offset + 8 + nbytes > self._file.size:
                raise BeitJaxError(
                    f"{label} is truncated: storage {printable(key)} ends at byte {offset + 8 + nbytes}, "
                    f"the file has {self._file.size}; download it again"
                )
            count = int.from_bytes(self._file.read(offset, 8, f"storage {printable(key)}"), "little")
            if count != storage.numel:
                raise BeitJaxError(
                    f"storage {printable(key)} of {label} has {count} elements, its pickle says {storage.numel}"
                )
            extents[key] = Extent(offset + 8, nbytes, f"storage {key}")
            offset += 8 + nbytes
        if offset != self._file.size:
            raise BeitJaxError(f"{label} has {self._file.size - offset} bytes behind its last storage")
        return extents


def is_legacy(head: bytes) -> bool:
    """True if `head`, the first bytes of a pickle, are the magic number of PyTorch's older files."""
    return _MAGIC_OPCODE in head[:32]


def run_pickle(file: RandomAccessFile, stream: io.BytesIO, machine: PickleMachine) -> object:
    """Returns the object of the next pickle of `stream`.

    Raises:
        BeitJaxError: the pickle is damaged, or mentions names that no checkpoint needs. The message lists these names.
    """
    top, forbidden = run_outer(file, stream, machine)
    if forbidden:
        raise refused(file.label, forbidden)
    return top


def run_outer(
    file: RandomAccessFile, stream: BinaryIO, machine: PickleMachine, writer: str = "torch.save"
) -> tuple[object, tuple[str, ...]]:
    """Returns the object of the next pickle of `stream`, and the names in it that no checkpoint needs.

    Args:
        writer: what writes such files, for messages.

    Raises:
        BeitJaxError: the pickle is damaged; with such names the message is about these.
    """
    flaw, top = None, None
    try:
        top = machine.run(stream)
    except PickleError as error:
        flaw = printable(error, 300)
    forbidden = tuple(machine.forbidden)
    if flaw is not None and forbidden:
        raise refused(file.label, forbidden)
    if flaw is not None:
        raise BeitJaxError(f"the pickle in {file.label} {flaw}; expected a state dict written by {writer}")
    return top, forbidden
