"""TIFF files of any number of bands, read by tifffile, which keeps every band and every bit.

Pillow, which reads 8-bit colours and grey (`is_plain`), drops the fourth band of some files without a word, makes 8
bits of 16, and cannot open others.
"""

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Shaped
from PIL import Image, TiffImagePlugin

from beit_jax.errors import BeitJaxError, printable

_MAGIC: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION: Final = 274
"""The tag of TIFF files and EXIF data."""
_BITS, _PHOTOMETRIC, _DESCRIPTION, _SAMPLES, _EXTRA, _SAMPLE_FORMAT = 258, 262, 270, 277, 338, 339  # tags
_ONE_ARRAY: Final = re.compile(r'ImageJ=|\{"shape": |.*OME>\s*\Z', re.DOTALL)  # descriptions of an array in pages
_COLOURS: Final = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # photometric interpretation: its samples
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_ALPHA: Final = (1, 2)  # kinds of extra samples: associated and unassociated alpha
_REDUCED, _MASK = 1, 4  # bits of a page's kind: a smaller copy of another page, a mask of one
_MOST_PAGES: Final = 65536
_thread = threading.local()


@dataclass(frozen=True)
class Bands:
    """The bands of an image as they are stored.

    Attributes:
        pixels: [h, w, n], of the file's dtype.
        alpha: how many of the last bands say how opaque a pixel is.
        colour: the first three bands are red, green and blue.
    """

    pixels: Shaped[np.ndarray, "h w n"]
    alpha: int = 0
    colour: bool = False


def is_tiff(data: bytes) -> bool:
    """True if the bytes begin as a TIFF or BigTIFF file does."""
    return data.startswith(_MAGIC)


def is_plain(data: bytes) -> bool:
    """True for a TIFF file that Pillow reads as it is: 8-bit colours or grey, maybe with alpha, or 16-bit grey.

    Of several pages Pillow reads the first, unless the file says that they are one array (ImageJ, OME, tifffile).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
                assert isinstance(image, TiffImagePlugin.TiffImageFile)
                tags = image.tag_v2
                bits, extra = _several(tags.get(_BITS, 1)), _several(tags.get(_EXTRA, ()))
                formats = _several(tags.get(_SAMPLE_FORMAT, 1))
                samples, photometric = tags.get(_SAMPLES, 1), tags.get(_PHOTOMETRIC)
                described = _ONE_ARRAY.match(str(tags.get(_DESCRIPTION, "")).rstrip("\0"))
                stack = samples == 1 and described is not None and image.n_frames > 1
    except Exception:  # Pillow lets out errors of many classes; what is wrong with the file, the next reader says
        return False
    if any(kind != 1 for kind in formats):  # numbers with a sign, or with a fraction
        return False
    whole = max(bits) <= 8 or (bits == (16,) and samples == 1 and photometric == _BLACK_IS_ZERO)
    known = _COLOURS.get(photometric or 0) == samples - len(extra)
    return whole and known and not stack and len(extra) <= 1 and all(kind in _ALPHA for kind in extra)


def read_tiff(
    data: bytes, name: str, channels: int | None, *, oriented: bool, max_pixels: int, max_bytes: int
) -> Bands:
    """Reads the bands of a TIFF file: of its first page, or of all pages of one grey band each.

    Bands may be interleaved or planar, in strips or tiles. Smaller copies of a page and masks are passed over. A file
    that tifffile wrote from an array [h, w, c] without saying so, as h pages, is read as that array.

    Args:
        name: of the file, for errors; printable.
        channels: how many bands are wanted; None: all. Pages are only put together where their number is wanted.
        oriented: apply the file's orientation.
        max_pixels, max_bytes: of an image.

    Raises:
        BeitJaxError: tifffile is not installed; the file is damaged, compressed in a way that needs a package more, too
            large, or its pixels are neither grey nor red, green and blue. Other errors are tifffile's, of any class.
    """
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise BeitJaxError(
            f"{name}: bands that Pillow cannot keep, reading them needs tifffile: pip install 'beit-jax[tiff]'"
        ) from error
    with _noticed(name), tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
        if len(file.pages) > _MOST_PAGES:
            raise BeitJaxError(f"{name}: {len(file.pages):,} pages, expected at most {_MOST_PAGES:,}")
        first = file.pages.first
        pages = [page for page in file.pages if not int(page.subfiletype) & (_REDUCED | _MASK)]
        if not pages or len(first.shape) not in (2, 3) or "Z" in first.axes:
            raise BeitJaxError(f"{name}: {first.axes} pixels of {list(first.shape)}, expected a flat image")
        one = _shape(pages[0])
        alike = all(_shape(page) == one and page.dtype == pages[0].dtype for page in pages)
        grey = len(pages) > 1 and alike and one[2] == 1
        # Its own header says that tifffile wrote an array of three axes; then rows became pages.
        by_rows = grey and first.is_shaped and channels == one[1] != len(pages)
        # Where the file says that its pages are one array, they are all bands. Else they may be images of their own.
        stated = first.is_shaped or first.is_imagej or first.is_ome
        stacked = grey and not by_rows and (stated if channels == 1 else channels in (None, len(pages)))
        used = pages if by_rows or stacked else pages[:1]
        height, width, count = (len(pages), one[0], one[1]) if by_rows else (*one[:2], one[2] * len(used))
        _check_size(height, width, count * first.dtype.itemsize, name, max_pixels, max_bytes)
        for page in used:
            _check_segments(page, len(data), name)
        layers = [_page(page, first, name) for page in used]
    if by_rows:
        return Bands(np.stack([layer[..., 0] for layer in layers]))
    pixels = np.concatenate(layers, axis=-1)
    extra = _several(first.extrasamples) if not stacked else ()
    alpha = 0
    while alpha < len(extra) and int(extra[-1 - alpha]) in _ALPHA:
        alpha += 1
    colour = int(first.photometric) == _RGB
    tag = first.tags.get(ORIENTATION)
    return Bands(turned(pixels, int(tag.value) if oriented and tag is not None else 1), alpha, colour)


def _several(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _shape(page: Any) -> tuple[int, int, int]:
    """The height, the width and the bands of a page."""
    shape, axes = page.shape, page.axes
    if axes.startswith("S"):
        return shape[1], shape[2], shape[0]
    return shape[0], shape[1], shape[2] if len(shape) == 3 else 1


def _check_size(height: int, width: int, nbytes: int, name: str, max_pixels: int, max_bytes: int) -> None:
    if height * width > max_pixels or height * width * nbytes > max_bytes or not height * width:
        raise BeitJaxError(
            f"{name}: {width}x{height} pixels of {nbytes} bytes, expected at most {max_pixels} pixels and "
            f"{max_bytes:,} bytes; scale it down or cut it"
        )


def _check_segments(page: Any, length: int, name: str) -> None:
    """Refuses a page of which strips or tiles lie beyond the end of the file; tifffile reads what is there."""
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if offset + count > length:
            raise BeitJaxError(
                f"{name}: damaged or truncated image (cut off before byte {offset + count:,}); fetch or export it again"
            )


def _page(page: Any, first: Any, name: str) -> Shaped[np.ndarray, "h w n"]:
    """The pixels of a page, [h, w, bands]."""
    photometric = int(first.photometric)
    if photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        kind = printable(getattr(first.photometric, "name", first.photometric))
        raise BeitJaxError(f"{name}: {kind} pixels, expected grey or RGB bands; convert it")
    try:
        pixels = np.asarray(page.asarray(maxworkers=1))
    except (ValueError, ImportError) as error:  # for Zstandard, tifffile looks for the module of a later Python
        if "imagecodecs" in str(error) or isinstance(error, ImportError):
            kind = printable(getattr(first.compression, "name", first.compression))
            raise BeitJaxError(
                f"{name}: compressed by {kind}, which tifffile reads by another package: pip install imagecodecs"
            ) from error
        raise
    if page.axes.startswith("S"):
        pixels = np.moveaxis(pixels, 0, -1)
    if photometric == _WHITE_IS_ZERO:
        if pixels.dtype.kind != "u":
            raise BeitJaxError(f"{name}: {pixels.dtype} pixels where 0 is white have no defined scale; invert them")
        pixels = np.iinfo(pixels.dtype).max - pixels
    return pixels.reshape(*pixels.shape[:2], -1)


def turned(pixels: Shaped[np.ndarray, "h w n"], orientation: int) -> Shaped[np.ndarray, "h2 w2 n"]:
    """The image upright. Source: TIFF 6.0, tag 274."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


class _Listener(logging.Handler):
    """Keeps what tifffile reports as an error, and goes on from, while a file is read."""

    def emit(self, record: logging.LogRecord) -> None:
        found = getattr(_thread, "found", None)
        if found is not None and record.levelno >= logging.ERROR:
            found.append(record.getMessage())


# Without a handler, Python prints what tifffile logs as a second line on standard error.
logging.getLogger("tifffile").addHandler(_Listener())


@contextmanager
def _noticed(name: str) -> Iterator[None]:
    """Refuses a file of which tifffile logs an error in the block, and goes on."""
    found: list[str] = []
    before, _thread.found = getattr(_thread, "found", None), found
    try:
        yield
    finally:
        _thread.found = before
    if found:
        raise BeitJaxError(f"{name}: damaged or truncated image ({printable(found[0], 200)}); fetch or export it again")
