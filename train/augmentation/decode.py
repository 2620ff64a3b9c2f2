"""Decodes training records to 8-bit RGB, with the same pixels that timm and torchvision train on.

Unlike `beit_jax.open_image`, decoding ignores EXIF orientation. torchvision's ``ImageFolder`` and timm read images by
``Image.open(...).convert("RGB")``, which ignores it, and the published numbers were reached so. Only 16-bit greyscale
images differ from that call: they are scaled here, and saturate there.
"""

from typing import Final, TypeAlias

import numpy as np
from jaxtyping import UInt8

from beit_jax.images.files import decode_image

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
        BeitJaxError: no image, a truncated or damaged one, or more than MAX_PIXELS. `beit_jax.images.containers` says
            which formats have a checksum; JPEG has none.
    """
    pixels = _colour_jpeg(data)
    if pixels is not None:
        return pixels
    return np.asarray(decode_image(data, name, oriented=False, max_pixels=MAX_PIXELS))


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
