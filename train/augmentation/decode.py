"""Decodes training records: to 8-bit RGB, with the same pixels that timm and torchvision train on, or to any bands.

Unlike `beit_jax.open_image`, decoding ignores EXIF orientation. torchvision's ``ImageFolder`` and timm read images by
``Image.open(...).convert("RGB")``, which ignores it, and the published numbers were reached so. Only 16-bit greyscale
images differ from that call: they are scaled here, and saturate there.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8

from beit_jax.errors import BeitJaxError
from beit_jax.images.array_files import is_array_file
from beit_jax.images.bands import Selection, decode_bands
from beit_jax.images.files import decode_image
from beit_jax.images.scaling import BY_TYPE, rescale_factor
from beit_jax.images.tiff import is_plain, is_tiff

from ..recipe import DataOptions, PixelType

try:
    import simplejpeg
except ModuleNotFoundError:  # it only saves time
    simplejpeg = None

Pixels: TypeAlias = UInt8[np.ndarray, "h w c"] | Float32[np.ndarray, "h w c"]

MAX_PIXELS: Final = 50_000_000  # a record of 12 kB can ask for a gigabyte


def decode(data: bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
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


def decode_own(data: bytes, name: str, channels: int, bands: Selection = None) -> np.ndarray:
    """Decodes an image file to [h, w, channels] of the file's own dtype; pictures for 3 channels as `decode` does.

    Args:
        bands: of the file that are the channels, counted from 1; None: all of them.

    Raises:
        BeitJaxError: as `decode` and `beit_jax.images.bands.decode_bands`.
    """
    if channels == 3 and bands is None and not _has_bands(data):
        return decode(data, name)
    return decode_bands(data, name, channels, select=bands, oriented=False, max_pixels=MAX_PIXELS)


def _has_bands(data: bytes) -> bool:
    """True for a file that is no picture: an array, or a TIFF file that Pillow does not read as it is."""
    return is_array_file(data) or (is_tiff(data) and not is_plain(data))


@dataclass(frozen=True)
class Reading:
    """How the images of records are read: by default as 8-bit RGB.

    Attributes:
        channels: of an image.
        bands: of the file that these are, counted from 1; None: all of them.
        dtype: "uint8": files of 8 bits, as they are. "float32": files of every type, scaled to [0, 1] as
            `beit_jax.images.processor.rescale_factor` says, or divided by `scale`.
        scale: the value that becomes 1; None: the largest of the file's type.
    """

    channels: int = 3
    bands: Selection = None
    dtype: PixelType = "uint8"
    scale: float | None = None

    @classmethod
    def of(cls, data: DataOptions, channels: int) -> "Reading":
        """How images of so many channels are read by these options."""
        return cls(channels, data.bands, data.pixel_type(channels), data.scale)

    def __call__(self, data: bytes, name: str) -> Pixels:
        """Decodes an image file to [h, w, channels].

        Raises:
            BeitJaxError: as `decode` and `beit_jax.images.bands.decode_bands`; more than 8 bits, where 8 are read.
        """
        pictures = self.channels == 3 and self.bands is None and self.dtype == "uint8"
        if pictures and not _has_bands(data):
            return decode(data, name)
        pixels = decode_bands(data, name, self.channels, select=self.bands, oriented=False, max_pixels=MAX_PIXELS)
        if self.dtype == "float32":
            factor = rescale_factor(BY_TYPE if self.scale is None else 1 / self.scale, pixels.dtype)
            return pixels.astype(np.float32) * np.float32(factor)
        if pixels.dtype != np.uint8:
            raise BeitJaxError(f"{name}: {pixels.dtype} values, expected 8 bits; --data.pixels float32 reads all types")
        return pixels


RGB: Final = Reading()


def _colour_jpeg(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB") or height * width > MAX_PIXELS:
            return None
        return np.asarray(simplejpeg.decode_jpeg(data))
    except ValueError:  # Pillow decides whether the file is damaged, and reports it
        return None
