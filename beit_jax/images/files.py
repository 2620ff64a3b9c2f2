"""Image files, PIL images of any mode and arrays -> 8-bit PIL images; every defect is one line that names the image."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from beit_jax.errors import BeitJaxError, printable

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray
Mode: TypeAlias = Literal["RGB", "L"]

MAX_PIXELS: Final = 89_478_485  # the size above which Pillow warns of a decompression bomb
# Pillow reads more, some by running other programs (EPS starts Ghostscript): files from strangers get these only.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")

_CONVERTED: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
_SIXTEEN_BIT: Final = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


def open_image(path: str | os.PathLike[str], mode: Mode = "RGB") -> Image.Image:
    """The decoded image of a file, its EXIF orientation applied, as 8-bit RGB or greyscale (`mode` "L").

    The same pixels as `transformers.image_utils.load_image` gives, except for 16-bit greyscale (see `to_rgb`).
    Animated files give their first frame. Raises BeitJaxError, naming the file, when it is missing, not one of FORMATS,
    truncated or visibly damaged, or larger than MAX_PIXELS. (JPEG has no checksum: damage inside may pass unseen.)
    """
    name, file = printable(os.fspath(path)), Path(path)
    if not file.is_file():
        found = "a directory" if file.is_dir() else "no such file"
        raise BeitJaxError(f"{name}: {found}; give the path of an image file")
    try:
        stream = file.open("rb")
    except OSError as error:
        raise BeitJaxError(f"{name}: cannot be read ({error.strerror}); check its permissions") from error
    with stream:
        return _convert(_decode(stream, name), mode, name)


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB image of the same size, from a PIL image of any of these modes:

    - RGBA, LA, PA, palette with transparency: alpha is dropped, not composited, as `convert("RGB")` does.
    - P: palette looked up; CMYK, YCbCr, HSV: Pillow's conversion; 1: 0 or 255; L: repeated three times.
    - 16-bit greyscale (I;16 in any byte order, and I holding 0 to 65535): the high byte, `value >> 8`, which is what
      Pillow does to 16-bit colour files; its own conversion to RGB would saturate everything above 255.

    F (float), LAB, I beyond 16 bits: BeitJaxError, as no 8-bit scale is defined for them.
    EXIF orientation is a file's matter: `open_image` applies it, this does not.
    """
    return _convert(image, "RGB", "image")


def load_image(image: ImageLike, mode: Mode, name: str) -> Image.Image:
    """`open_image` of a path; of a PIL image or a uint8 array [h, w], [h, w, 1] or [h, w, 3] what `to_rgb` says.

    `mode` "L" is Pillow's luma of the RGB image, which leaves greyscale as it was. `name` stands for the image in
    BeitJaxError.
    """
    if isinstance(image, str | os.PathLike):
        return open_image(image, mode)
    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    if not isinstance(image, Image.Image):
        found = type(image).__name__
        raise BeitJaxError(f"{name}: expected a path, a PIL image or a uint8 array, found {found}; convert it")
    return _convert(image, mode, name)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shaped = array.ndim >= 2 and array.shape[2:] in ((), (1,), (3,)) and array.size > 0
    if array.dtype != np.uint8 or not shaped:
        found = f"{array.dtype} {list(array.shape)}"
        raise BeitJaxError(f"{name}: expected a uint8 array [h, w], [h, w, 1] or [h, w, 3], found {found}; convert it")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _decode(stream: IO[bytes], name: str) -> Image.Image:
    head = stream.read(64)
    if not head:
        raise BeitJaxError(f"{name}: empty file, expected an image; fetch or export it again")
    if head.startswith(b"version https://git-lfs"):
        raise BeitJaxError(f"{name}: a Git LFS pointer, expected the image itself; run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise BeitJaxError(f"{name}: an HTML page, expected an image; fetch the image itself")
    with _one_line(name), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(stream, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:  # holds where Image.MAX_IMAGE_PIXELS was changed as well
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, expected at most {MAX_PIXELS}")
        return ImageOps.exif_transpose(image)


def _convert(image: Image.Image, mode: Mode, name: str) -> Image.Image:
    with _one_line(name):
        image.load()
        if image.mode in _SIXTEEN_BIT:
            image = _high_byte(image, name)
        elif image.mode not in _CONVERTED:
            found = printable(image.mode)
            raise BeitJaxError(f"{name}: mode {found} has no defined 8-bit scale, expected 8 or 16 bit; save it as RGB")
        if "transparency" in image.info:  # Pillow warns about it, or rejects it, on the way to a mode without alpha
            image = image.copy()
            del image.info["transparency"]
        rgb = image.convert("RGB")
        return rgb if mode == "RGB" else rgb.convert("L")


def _high_byte(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BeitJaxError(f"{name}: pixel values {low} to {high}, expected 16-bit (0 to 65535); save it as RGB")
    return Image.fromarray((values >> 8).astype(np.uint8))


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    # Exception, not a list: Pillow's plugins let out whatever their parsing hits (OSError, ValueError, SyntaxError,
    # EOFError, struct.error, IndexError, ...), and the body holds nothing but Pillow's work on untrusted bytes.
    try:
        yield
    except BeitJaxError:
        raise
    except UnidentifiedImageError as error:
        wanted = ", ".join(FORMATS)
        raise BeitJaxError(f"{name}: not a readable image, expected one of {wanted}; fetch or convert it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BeitJaxError(f"{name}: too large ({printable(error)}); scale it down first") from error
    except Exception as error:
        found = printable(f"{type(error).__name__}: {error}")
        raise BeitJaxError(f"{name}: damaged or truncated image ({found}); fetch or export it again") from error
