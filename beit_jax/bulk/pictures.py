"""Colour JPEG files to pixel values, by faster libraries than Pillow, with the same values.

simplejpeg decodes and loops that Numba compiles resize, where the extra `train` has installed them. What they are not
sure to do as Pillow does is left to `ImageProcessor`: other files, damaged ones, those that are turned, other filters.
"""

import io
from typing import Final

import numpy as np
from jaxtyping import Float32
from PIL import Image

from beit_jax.images.files import FORMATS
from beit_jax.images.processor import ImageProcessor, centre_crop, target_size

try:
    import simplejpeg
except ModuleNotFoundError:  # it only saves time
    simplejpeg = None

MOST_PIXELS: Final = 50_000_000
ORIENTATION: Final = 0x0112
_START, _APP1 = b"\xff\xd8\xff", b"\xff\xe1"


def quickly(data: bytes, processor: ImageProcessor, name: str) -> Float32[np.ndarray, "h w 3"] | None:
    """The pixel values of a colour JPEG file; None where Pillow has to look at it.

    Args:
        name: of the image, for errors.

    Raises:
        BeitJaxError: the resized image would be too large.
    """
    if simplejpeg is None or processor.num_channels != 3 or processor.bands is not None or not processor.antialias:
        return None
    if not data.startswith(_START) or _is_turned(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB") or height * width > MOST_PIXELS:
            return None
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:  # Pillow decides whether the file is damaged, and reports it
        return None
    if processor.resize is not None:
        from beit_jax.train.augmentation.resample import resized

        target = target_size(processor.resize, height, width, name)
        filter = Image.Resampling[processor.resample.upper()]
        if filter not in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            return None
        pixels = resized(pixels, (0, 0, width, height), target, filter)
    if processor.crop is not None:
        pixels = centre_crop(pixels, processor.crop, processor.crop_rounding)
    return processor.normalised(pixels, pixels.dtype)


def _is_turned(data: bytes) -> bool:
    """True if the file says so, in EXIF data or in XMP, or if it cannot be told."""
    if _APP1 not in data:  # the beginning of a segment with either; scans hold no such bytes
        return False
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).getexif().get(ORIENTATION, 1) != 1
    except Exception:  # whatever Pillow's parsers let out: it meets the file again, and reports it
        return True
