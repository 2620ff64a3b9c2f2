"""Arrays in NumPy's files, ``.npy`` and ``.npz`` with one array, as images. Nothing in a file is unpickled."""

import io
import zipfile
from typing import Final

import numpy as np

from beit_jax.errors import BeitJaxError, printable

NPY: Final = b"\x93NUMPY"
NPZ: Final = b"PK\x03\x04"
EMPTY_NPZ: Final = b"PK\x05\x06"
MOST_BYTES: Final = 1 << 30


def is_array_file(data: bytes) -> bool:
    """True if the bytes begin as NumPy's files do."""
    return data.startswith((NPY, NPZ, EMPTY_NPZ))


def read_array(data: bytes, name: str, most: int = MOST_BYTES) -> np.ndarray:
    """Reads the array in the bytes of a ``.npy`` file, or the only one in those of a ``.npz`` file.

    Args:
        name: of the file, for errors; printable.
        most: bytes of pixels.

    Raises:
        BeitJaxError: the file is damaged or cut off, holds Python objects, several arrays, none, or too many bytes
            of pixels.
    """
    try:
        content = data if data.startswith(NPY) else _only_member(data, name, most)
        return _read_npy(content, name)
    except BeitJaxError:
        raise
    except Exception as error:  # NumPy and zipfile let out errors of many classes for damaged headers
        found = printable(error, 200)
        raise BeitJaxError(f"{name}: damaged or truncated array file ({found}); save it again by numpy.save") from error


def _only_member(data: bytes, name: str, most: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) != 1:
            found = printable(", ".join(member.filename.removesuffix(".npy") for member in members) or "none", 200)
            raise BeitJaxError(f"{name}: expected one array in the archive, found {found}; save the image alone")
        if members[0].file_size > most:
            raise BeitJaxError(f"{name}: {members[0].file_size:,} bytes of pixels, expected at most {most:,}")
        with archive.open(members[0]) as member:
            content = member.read(most + 1)  # whatever size the archive states
    if len(content) > most:
        raise BeitJaxError(f"{name}: more than {most:,} bytes of pixels; cut the image")
    return content


def _read_npy(content: bytes, name: str) -> np.ndarray:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    shape, by_columns, dtype = read_header[version](file)
    if dtype.hasobject or dtype.names is not None:
        raise BeitJaxError(f"{name}: {printable(dtype)} values, expected numbers; save the image as a plain array")
    expected, found = int(np.prod(shape, dtype=object)) * dtype.itemsize, len(content) - file.tell()
    if expected != found:
        raise ValueError(f"{found:,} bytes of values, expected {expected:,} for {printable(dtype)} {list(shape)}")
    values = np.frombuffer(content, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if by_columns else "C")
