"""The bytes of a training record -> 8-bit RGB, the pixels that timm and torchvision train on.

Unlike `beit_jax.open_image`, EXIF orientation is not applied: torchvision's ``ImageFolder`` and timm read training
and validation images by ``Image.open(...).convert("RGB")``, which leaves it alone, and the published numbers were
reached so. What else differs from that call are 16-bit greyscale images, scaled here and saturated there.
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
    """RGB of the stored size, uint8 [h, w, 3], from an image file of any of `beit_jax.images.files.FORMATS`.

    Colour JPEGs go through simplejpeg where it is installed, bit for bit as Pillow decodes them; everything else, CMYK
    and greyscale JPEGs among it, and whatever simplejpeg finds fault with, is Pillow's. Alpha is dropped, palettes
    are looked up, 16-bit greyscale keeps its high byte, an animation gives its first frame.

    Args:
        name: what stands for the record in an error; printable.

    Raises:
        BeitJaxError: no image, a truncated or visibly damaged one, or more than MAX_PIXELS. (JPEG has no checksum:
            damage inside may pass unseen.)
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
    except ValueError:  # Pillow decides what is damaged, and says it
        return None


def _any_format(data: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        found = f"{len(data)} bytes that begin {printable(data[:12])}" if data else "nothing"
        raise BeitJaxError(f"{name}: expected one of {', '.join(FORMATS)}, found {found}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BeitJaxError(f"{name}: too large ({printable(error)})") from error
    except Exception as error:  # Pillow's plugins let out whatever their parsing of untrusted bytes hits
        found = printable(f"{type(error).__name__}: {error}")
        raise BeitJaxError(f"{name}: damaged image ({found}); replace it") from error
    if image.width * image.height > MAX_PIXELS:
        raise BeitJaxError(f"{name}: {image.width}x{image.height} pixels, expected at most {MAX_PIXELS}; scale it down")
    return load_image(image, "RGB", name)
