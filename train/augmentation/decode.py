"""Decodes training records to 8-bit RGB, with the same pixels that timm and torchvision train on.

Unlike `beit_jax.open_image`, decoding ignores EXIF orientation. torchvision's ``ImageFolder`` and timm read images by
``Image.open(...).convert("RGB")``, which ignores it, and the published numbers were reached so. Only 16-bit greyscale
images differ from that call: they are scaled here, and saturate there.
"""

import io
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import FORMATS, load_image

try:
    import simplejpeg
except ModuleNotFoundError:  # it only saves time
    simplejpeg = None

Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]

MAX_PIXELS: Final = 50_000_000  # a record of 12 kB can ask for a gigabyte


def decode(data: bytes, name: str) -> Pixels:
    """Decodes an image file, in one of `beit_jax.images.files.FORMATS`, to RGB, uint8 [h, w, 3].

    simplejpeg, where it is installed, decodes colour JPEGs, with the same pixels as Pillow. Pillow decodes everything
    else, including CMYK and greyscale JPEGs and files that simplejpeg refuses. Alpha is dropped, palettes are looked
    up, 16-bit greyscale keeps its high byte, and an animation gives its first frame.

    Args:
        name: the name of the record in errors; printable.

    Raises:
        BeitJaxError: no image, a truncated or visibly damaged one, or more than MAX_PIXELS. JPEG has no checksum, so
            damage inside a file may pass unnoticed.
    """
    pixels = _colour_jpeg(data)
    return np.asarray(_any_format(data, name)) if pixels is None else pixels


def _colour_jpeg(data: bytes) -> Pixels | None:
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB") or height * width > MAX_PIXELS:
            return None
        return np.asarray(simplejpeg.decode_jpeg(data))
    except ValueError:  # Pillow decides whether the file is damaged, and reports it
        return None


def _any_format(data: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        found = f"{len(data)} bytes that begin {printable(data[:12])}" if data else "nothing"
        raise BeitJaxError(f"{name}: expected one of {', '.join(FORMATS)}, found {found}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BeitJaxError(f"{name}: too large ({printable(error)})") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsing of untrusted bytes meets
        found = printable(f"{type(error).__name__}: {error}")
        raise BeitJaxError(f"{name}: damaged image ({found}); replace it") from error
    if image.width * image.height > MAX_PIXELS:
        raise BeitJaxError(f"{name}: {image.width}x{image.height} pixels, expected at most {MAX_PIXELS}; scale it down")
    return load_image(image, "RGB", name)
