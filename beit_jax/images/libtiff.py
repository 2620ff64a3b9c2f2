"""What libtiff notices while Pillow decodes a TIFF file.

libtiff prints its errors on standard error by itself, and goes on after some of them: a damaged fax page comes out with
other pixels. Pillow lets both pass. Here the errors of a decoding are kept instead, for one line that names the file.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from PIL import _imaging

# void handler(const char *module, const char *format, va_list arguments); a va_list is passed as a pointer.
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_thread = threading.local()


@contextmanager
def noticed() -> Iterator[list[str]]:
    """The parts of libtiff that report an error on this thread within the block: "ZIPDecode".

    Outside of such blocks libtiff's errors go where they went before. Where Pillow's copy of libtiff cannot be reached,
    they always do.
    """
    _listen()
    found: list[str] = []
    before, _thread.found = getattr(_thread, "found", None), found
    try:
        yield found
    finally:
        _thread.found = before


@cache
def _listen() -> object:
    """Sets libtiff's handler of errors, once for the process. Its return value must stay alive as long."""
    try:
        library = ctypes.CDLL(_imaging.__file__)  # its names include those of the libraries that it was linked with
        set_handler = library.TIFFSetErrorHandler
    except (AttributeError, OSError):  # a Pillow without libtiff, or with one that shows no names
        return None
    set_handler.argtypes, set_handler.restype = [_Handler], ctypes.c_void_p

    def handle(module: bytes | None, form: bytes | None, arguments: int | None) -> None:
        found = getattr(_thread, "found", None)
        if found is not None:
            found.append((module or b"").decode("ascii", "replace"))
        elif before:
            before(module, form, arguments)

    handler = _Handler(handle)
    address = set_handler(handler)
    before = _Handler(address) if address else None
    return handler
