"""Image files, PIL images of any mode and arrays to 8-bit PIL images. Every error is one line that names the image."""

import io
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images import libtiff
from beit_jax.images.containers import DamageError, check_container


@runtime_checkable
class OtherArray(Protocol):
    """An array of another library: `jax.Array`, or a tensor in memory."""

    def __array__(self) -> np.ndarray: ...


ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | OtherArray
Mode: TypeAlias = Literal["RGB", "L"]

MAX_PIXELS: Final = 89_478_485  # the size above which Pillow warns of a decompression bomb
MAX_FILE: Final = 1 << 30  # bytes: MAX_PIXELS of 16-bit RGBA, uncompressed, and a third more
# Pillow reads more formats, some of them by other programs (EPS by Ghostscript), which untrusted files must not start.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")

# Pillow logs some damage as well, which would be a second line on standard error where nobody has set up logging.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_CONVERTED: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
SIXTEEN_BIT: Final = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


def open_image(path: str | os.PathLike[str], mode: Mode = "RGB") -> Image.Image:
    """Decodes an image file to 8-bit RGB, or greyscale with `mode` "L", and applies its EXIF orientation.

    The pixels are those of `transformers.image_utils.load_image`, except for 16-bit greyscale (see `to_rgb`). An
    animated file gives its first frame. The checks of the file's format are used; `containers` says which have none.

    Raises:
        BeitJaxError: the file is missing, not one of FORMATS, truncated, damaged, or larger than MAX_PIXELS.
    """
    return decode_image(read_image_file(path), printable(os.fspath(path)), mode)


def read_image_file(path: str | os.PathLike[str], kind: str = "an image file") -> bytes:
    """The bytes of a regular file.

    Args:
        kind: what the file should be, for errors.

    Raises:
        BeitJaxError: the path names no regular file, or one that cannot be read or is larger than MAX_FILE.
    """
    name, file = printable(os.fspath(path)), Path(path)
    if not file.is_file():
        found = "a directory" if file.is_dir() else "no regular file" if file.exists() else "no such file"
        found = "an address, and nothing is fetched" if is_address(name) else found
        raise BeitJaxError(f"{name}: {found}; give the path of {kind}")
    try:
        size = file.stat().st_size
        if size > MAX_FILE:
            raise BeitJaxError(f"{name}: {size:,} bytes, expected {kind} of at most {MAX_FILE:,}")
        return file.read_bytes()
    except OSError as error:
        raise BeitJaxError(f"{name}: cannot be read ({error.strerror}); check its permissions and the disk") from error


def is_address(name: str) -> bool:
    """True for what lies elsewhere, as https://... or gs://..., also where a path has lost one of both slashes."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", name, re.IGNORECASE) is not None and not os.path.lexists(name)


def decode_image(
    data: bytes, name: str, mode: Mode = "RGB", *, oriented: bool = True, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decodes the bytes of an image file, as `open_image` does.

    Args:
        name: of the image, for errors; printable.
        oriented: apply the EXIF orientation.

    Raises:
        BeitJaxError: not one of FORMATS, truncated, damaged, or more than `max_pixels`.
    """
    return convert_picture(open_picture(data, name, oriented=oriented, max_pixels=max_pixels), mode, name)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a PIL image of any of these modes to an 8-bit RGB image of the same size:

    - RGBA, LA, PA, palette with transparency: alpha is dropped, not composited, as in `convert("RGB")`.
    - P: colours of the palette. CMYK, YCbCr, HSV: Pillow's conversion. 1: 0 or 255. L: repeated three times.
    - 16-bit greyscale (I;16 in any byte order, and I with values 0 to 65535): the high byte, `value >> 8`, as Pillow
      reads 16-bit colour files. Pillow's own conversion to RGB would make everything above 255 white.

    EXIF orientation is not applied; `open_image` does that.

    Raises:
        BeitJaxError: the mode has no defined 8-bit scale: F (float), LAB, I with larger values.
    """
    return convert_picture(image, "RGB", "image")


def load_image(image: ImageLike, mode: Mode, name: str) -> Image.Image:
    """Loads a path by `open_image`, or converts a PIL image or uint8 array [h, w], [h, w, 1], [h, w, 3] by `to_rgb`.

    Args:
        mode: "L" is Pillow's luma of the RGB image; greyscale stays as it was.
        name: of the image, for errors.

    Raises:
        BeitJaxError: as `open_image` and `to_rgb`; an image of another type.
    """
    if isinstance(image, str | os.PathLike):
        return open_image(image, mode)
    if not isinstance(image, Image.Image) and isinstance(image, np.ndarray | OtherArray):
        image = _from_array(in_memory(image, name), name)
    if not isinstance(image, Image.Image):
        found = type(image).__name__
        raise BeitJaxError(f"{name}: expected a path, a PIL image or a uint8 array, found {found}; convert it")
    return convert_picture(image, mode, name)


def image_list(images: ImageLike | Iterable[ImageLike]) -> tuple[list[ImageLike], bool]:
    """One image or several as a list; and True if it was one.

    One image is a path, a PIL image, or an array [h, w], [h, w, 1] or [h, w, 3]. Everything else that can be iterated
    is several images: a list of these kinds, or an array [b, h, w, c]. A data set's row and an open file are neither.
    """
    one = isinstance(images, str | os.PathLike | Image.Image | bytes | io.IOBase | Mapping)
    if one or not isinstance(images, Iterable) or getattr(images, "ndim", None) in (0, 2, 3):
        return [cast(ImageLike, images)], True
    return list(images), False


def image_name(image: ImageLike, place: int) -> str:
    """The name of an image in errors: its path, or its place among the images."""
    return printable(Path(image)) if isinstance(image, str | os.PathLike) else f"image {place}"


def in_memory(array: object, name: str) -> np.ndarray:
    """The NumPy array of an array of another library.

    Raises:
        BeitJaxError: it is on another device, or its values are not known.
    """
    try:
        return np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:  # on another device, or a value that is being traced
        raise BeitJaxError(f"{name}: is no array in memory ({printable(error, 200)}); copy it there first") from None


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shaped = array.ndim >= 2 and array.shape[2:] in ((), (1,), (3,)) and array.size > 0
    if array.dtype != np.uint8 or not shaped:
        found = f"{array.dtype} {list(array.shape)}"
        raise BeitJaxError(f"{name}: expected a uint8 array [h, w], [h, w, 1] or [h, w, 3], found {found}; convert it")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def open_picture(data: bytes, name: str, *, oriented: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens the bytes of an image file in the mode that it has, with the checks of its format; nothing is converted.

    Raises:
        BeitJaxError: as `decode_image`; pixels may be damaged, which their decoding (`Image.load`) notices later.
    """
    head = data[:64]
    if not head:
        raise BeitJaxError(f"{name}: empty file, expected an image; fetch or export it again")
    if head.startswith(b"version https://git-lfs"):
        raise BeitJaxError(f"{name}: a Git LFS pointer, expected the image itself; run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise BeitJaxError(f"{name}: an HTML page, expected an image; fetch the image itself")
    with in_one_line(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of strange EXIF data, which ImageNet has too
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            found, formats = f"{len(data)} bytes that begin {data[:12]!r}", ", ".join(FORMATS)
            raise BeitJaxError(
                f"{name}: not a readable image: expected one of {formats}, found {found}; fetch or convert it"
            ) from error
        if image.width * image.height > max_pixels:  # independent of Image.MAX_IMAGE_PIXELS
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, expected at most {max_pixels}")
        check_container(data, image)
        return ImageOps.exif_transpose(image) if oriented else image


def convert_picture(image: Image.Image, mode: Mode, name: str) -> Image.Image:
    """Converts a PIL image to 8-bit RGB or greyscale, as `to_rgb` does.

    Raises:
        BeitJaxError: as `to_rgb`, naming the image.
    """
    with in_one_line(name):
        image.load()
        if image.mode in SIXTEEN_BIT:
            image = _high_byte(image, name)
        elif image.mode not in _CONVERTED:
            found = printable(image.mode)
            raise BeitJaxError(f"{name}: mode {found} has no defined 8-bit scale, expected 8 or 16 bit; save it as RGB")
        if "transparency" in image.info:  # else Pillow warns about it or rejects it
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
def in_one_line(name: str) -> Iterator[None]:
    """Makes one line, which names the image, of every error of the decoders in the block."""
    # Every Exception: Pillow's plugins let out many classes (OSError, ValueError, SyntaxError, EOFError, struct.error,
    # IndexError, ...), and the enclosed block holds nothing but Pillow's work on untrusted bytes.
    try:
        with libtiff.noticed() as complaints:
            yield
        if complaints:
            raise DamageError(f"noticed by libtiff's {printable(complaints[0])}")
    except BeitJaxError:
        raise
    except DamageError as error:
        raise BeitJaxError(f"{name}: damaged or truncated image ({error}); fetch or export it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BeitJaxError(f"{name}: too large ({printable(error)}); scale it down first") from error
    except Exception as error:
        found = printable(f"{type(error).__name__}: {error}")
        raise BeitJaxError(f"{name}: damaged or truncated image ({found}); fetch or export it again") from error
