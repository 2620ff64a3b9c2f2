"""Images of any number of bands, to arrays [h, w, c] of the file's own dtype: no band is dropped, no bit is lost.

| file | read by |
|---|---|
| 8-bit pictures: PNG, JPEG, WebP, ... and plain TIFF | Pillow (`files`), as always |
| PNG of 16 bits a channel | Pillow's decoder, both bytes of every value |
| TIFF of more bands, more bits, numbers with a sign or a fraction, several pages | tifffile (`tiff`) |
| ``.npy``, ``.npz`` with one array | NumPy, without pickles (`array_files`) |

What a model takes decides what a file may hold. A model of 3 channels takes pictures as RGB, and a model of 1 channel
takes them as greyscale, as `files.to_rgb` says; 16-bit greyscale keeps its high byte for 3 channels, and all its bits
for 1. All other files need as many bands as the model has channels. Alpha, where the file says that a band is that, is
left out if it is one too many. Or bands are selected, by their numbers from 1, as GDAL counts them.
"""

import io
import os
from typing import Any, Final, TypeAlias

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.array_files import is_array_file, read_array
from beit_jax.images.files import (
    MAX_FILE,
    MAX_PIXELS,
    SIXTEEN_BIT,
    ImageLike,
    OtherArray,
    convert_picture,
    in_memory,
    in_one_line,
    open_picture,
    read_image_file,
)
from beit_jax.images.tiff import ORIENTATION, Bands, is_plain, is_tiff, read_tiff, turned

Selection: TypeAlias = tuple[int, ...] | None
"""The bands of a file, counted from 1, that become the channels of an image; None: all of them, in their order."""
Pixels: TypeAlias = Shaped[np.ndarray, "h w c"]

DTYPES: Final = tuple(map(np.dtype, (np.uint8, np.uint16, np.int16, np.float32)))
_AS_FLOAT32: Final = (np.dtype(np.float16), np.dtype(np.float64))
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_LUMA: Final = (19595, 38470, 7471)  # ITU-R 601-2 in 16-bit fixed point, as Pillow computes "L" from RGB
_PICTURES: Final = {"L": (1, 0), "LA": (1, 1), "RGB": (3, 0), "RGBA": (3, 1)}  # mode: colours, alpha


def decode_bands(
    data: bytes,
    name: str,
    channels: int,
    *,
    select: Selection = None,
    oriented: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Decodes the bytes of an image file to [h, w, channels], uint8, uint16, int16 or float32 as the file has it.

    float16 and float64 become float32. Of a ``.npy`` or ``.npz`` array of three axes the first or the last one are the
    bands: the one that is as long as they are many.

    Args:
        name: of the image, for errors; printable.
        channels: that the model takes.
        select: the bands of the file that become these channels; of pictures the colours, and then alpha.
        oriented: apply the orientation that EXIF data or a TIFF tag states.

    Raises:
        BeitJaxError: no image, a damaged one, one that is too large, one with another number of bands, an array whose
            axis of bands cannot be told, or values that are no pixels (NaN, 64-bit integers).
    """
    return _array(decode(data, name, channels, select=select, oriented=oriented, max_pixels=max_pixels))


def load_bands(image: ImageLike, channels: int, name: str, *, select: Selection = None) -> Pixels:
    """Loads an image file by `decode_bands`, or takes the bands of a PIL image or of an array [h, w] or [h, w, bands].

    Args:
        name: of the image, for errors.

    Raises:
        BeitJaxError: as `decode_bands`; an image of another type.
    """
    return _array(load(image, channels, name, select=select))


def decode(
    data: bytes,
    name: str,
    channels: int,
    *,
    select: Selection = None,
    oriented: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image | Pixels:
    """The same as `decode_bands`; an 8-bit picture for a model of 3 channels or 1 stays a PIL image, RGB or L."""
    if is_array_file(data):
        array = _bands_last(read_array(data, name, MAX_FILE), None if select else channels, name)
        return _fitting(Bands(array), channels, select, name, max_pixels)
    if is_tiff(data) and not (channels in (1, 3) and select is None and is_plain(data)):
        wanted = None if select else channels
        found = _read_tiff(data, name, wanted, oriented, max_pixels)
        return _fitting(found, channels, select, name, max_pixels)
    image = open_picture(data, name, oriented=oriented, max_pixels=max_pixels)
    if _is_deep_png(data, grey=channels != 3 or select is not None):
        return _fitting(_deep_png(data, name, oriented), channels, select, name, max_pixels)
    return _picture(image, channels, select, name)


def load(image: ImageLike, channels: int, name: str, *, select: Selection = None) -> Image.Image | Pixels:
    """The same as `load_bands`; an 8-bit picture for a model of 3 channels or 1 is a PIL image, RGB or L."""
    if isinstance(image, str | os.PathLike):
        return decode(read_image_file(image), printable(os.fspath(image)), channels, select=select)
    if isinstance(image, Image.Image):
        return _picture(image, channels, select, name)
    if not isinstance(image, np.ndarray | OtherArray):
        found = type(image).__name__
        raise BeitJaxError(f"{name}: expected a path, a PIL image or an array [h, w, channels], found {found}")
    array = in_memory(image, name)
    _check_array(array, channels, select, name)
    pixels = array.reshape(*array.shape[:2], -1)
    if pixels.dtype == np.uint8 and select is None and channels in (1, 3) and pixels.shape[2] in (1, 3):
        plane = pixels[..., 0] if pixels.shape[2] == 1 else pixels
        return convert_picture(Image.fromarray(plane), "RGB" if channels == 3 else "L", name)
    return _fitting(Bands(pixels), channels, select, name, MAX_PIXELS)


def _check_array(array: np.ndarray, channels: int, select: Selection, name: str) -> None:
    """Refuses an array in memory that is no image of as many channels."""
    counts = (1, 3) if channels in (1, 3) and array.dtype == np.uint8 else (channels,)
    shaped = array.ndim in (2, 3) and array.size > 0
    count = (*array.shape, 1)[2] if shaped else 0
    if shaped and (select is not None or count in counts) and _kind(array.dtype) is not None:
        return
    grey = "[h, w] or " if 1 in counts else ""
    advice = "convert it"
    if shaped and array.ndim == 3 and len(array) == channels:
        advice = "bands come last: numpy.moveaxis(array, 0, -1)"
    raise BeitJaxError(
        f"{name}: expected an array {grey}[h, w, {'bands' if select else channels}] of uint8, uint16, int16 or "
        f"float32, found {printable(array.dtype)} {list(array.shape)}; {advice}"
    )


def check_bands(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> None:
    """Decodes the bytes of an image file of any number of bands, and drops them.

    Raises:
        BeitJaxError: as `decode_bands`, but for the number of bands, of which nothing is known here.
    """
    if is_array_file(data):
        array = read_array(data, name, MAX_FILE)
        pixels = array.reshape(*array.shape, 1) if array.ndim == 2 else array
        if pixels.ndim != 3 or not pixels.size:
            found = f"{printable(array.dtype)} {list(array.shape)}"
            raise BeitJaxError(f"{name}: expected an array [h, w], [h, w, bands] or [bands, h, w], found {found}")
        _in_own_dtype(pixels, name)
        if pixels.size > MAX_FILE:
            raise BeitJaxError(f"{name}: {pixels.size:,} values, expected at most {MAX_FILE:,}; cut the image")
    else:
        _all_bands(data, name, max_pixels)


def size_of(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of an image file of any number of bands, which is decoded; its orientation is not applied.

    Raises:
        BeitJaxError: as `check_bands`; an array of which no axis is the shortest, which would be that of its bands.
    """
    if not is_array_file(data):
        return _all_bands(data, name, max_pixels)
    pixels = _in_own_dtype(_bands_last(read_array(data, name, MAX_FILE), None, name), name)
    return pixels.shape[0], pixels.shape[1]


def _all_bands(data: bytes, name: str, max_pixels: int) -> tuple[int, int]:
    """Height and width of a file that is no array, whose bands are all decoded."""
    if is_tiff(data) and not is_plain(data):
        pixels = _read_tiff(data, name, None, False, max_pixels).pixels
        _in_own_dtype(pixels, name)
        return pixels.shape[0], pixels.shape[1]
    image = open_picture(data, name, oriented=False, max_pixels=max_pixels)
    image = convert_picture(image, "RGB", name)
    return image.height, image.width


def visible(image: Image.Image | Pixels) -> Image.Image:
    """An RGB picture of bands for people: the first three as red, green and blue, or else the first as grey.

    8-bit values stay as they are. All others are stretched, so that 2 % of them become black and 2 % white.
    """
    pixels = _array(image)
    shown = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
    if shown.dtype != np.uint8:
        low, high = (np.percentile(shown, share, axis=(0, 1)) for share in (2, 98))
        shown = (np.clip((shown - low) / np.maximum(high - low, 1e-30), 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else np.ascontiguousarray(shown))


def _array(found: Image.Image | Pixels) -> Pixels:
    pixels = np.asarray(found)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _picture(image: Image.Image, channels: int, select: Selection, name: str) -> Image.Image | Pixels:
    """The bands of a picture in memory or in a file."""
    exact = image.mode in SIXTEEN_BIT or image.mode == "F"
    if select is None and (channels == 3 or (channels == 1 and not exact)):
        return convert_picture(image, "RGB" if channels == 3 else "L", name)
    with in_one_line(name):
        image.load()
        if image.mode in ("1", "P", "PA"):
            image = image.convert({"1": "L", "P": "RGB", "PA": "RGBA"}[image.mode])
        values = np.asarray(image)
    if exact:
        if image.mode == "I":  # Pillow's 32 bits hold 16 of a file
            if values.min() < 0 or values.max() > 65535:
                found = f"{values.min()} to {values.max()}"
                raise BeitJaxError(f"{name}: pixel values {found}, expected 16-bit (0 to 65535); give an array")
            values = values.astype(np.uint16)
        return _fitting(Bands(values[..., None]), channels, select, name, MAX_PIXELS)
    if image.mode not in _PICTURES:
        raise BeitJaxError(f"{name}: mode {printable(image.mode)}, expected grey or RGB bands; convert it")
    colours, alpha = _PICTURES[image.mode]
    pixels = values.reshape(*values.shape[:2], -1)
    return _fitting(Bands(pixels, alpha, colours == 3), channels, select, name, MAX_PIXELS)


def _is_deep_png(data: bytes, *, grey: bool) -> bool:
    """True for a PNG of 16 bits a channel with colours or, with `grey`, with grey and alpha. Pillow keeps grey."""
    return data.startswith(_PNG) and data[24:25] == b"\x10" and data[25] in ((2, 4, 6) if grey else (2, 6))


def _deep_png(data: bytes, name: str, oriented: bool) -> Bands:
    """All bits of a PNG of `_is_deep_png`.

    Pillow's decoder gives the high bytes of big-endian values, and the low ones if it is told that they are
    little-endian. Grey and alpha it reads as four bytes.
    """
    with in_one_line(name), Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(data)) as again:
        (tile,) = again.tile
        layout = str(tile.args)
        exif = image.getexif()
        if layout == "LA;16B":
            again.tile = [tile._replace(args="RGBA")]
            values = np.ascontiguousarray(np.asarray(again)).view(">u2").astype(np.uint16)
        elif layout in ("RGB;16B", "RGBA;16B"):
            again.tile = [tile._replace(args=f"{layout[:-1]}L")]
            values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)
        else:
            raise BeitJaxError(f"{name}: a PNG that Pillow reads as {printable(layout)}; convert it")
    if oriented:
        values = turned(values, exif.get(ORIENTATION, 1))
    return Bands(values, alpha=int(layout != "RGB;16B"), colour=layout != "LA;16B")


def _bands_last(array: np.ndarray, channels: int | None, name: str) -> Pixels:
    """An array of a file with its bands on the last axis."""
    found = f"{printable(array.dtype)} {list(array.shape)}"
    if array.ndim == 2 and array.size:
        return array[..., None]
    if array.ndim != 3 or not array.size:
        raise BeitJaxError(f"{name}: expected an array [h, w], [h, w, bands] or [bands, h, w], found {found}")
    first, last = array.shape[0], array.shape[2]
    if channels is None:  # bands will be selected: their axis is the shortest
        is_first, is_last = first < min(array.shape[1:]), last < min(array.shape[:2])
    else:
        is_first, is_last = first == channels, last == channels
    if is_first and is_last:
        raise BeitJaxError(
            f"{name}: {found}, where bands may be the first axis or the last; cut the image, or save it as TIFF"
        )
    if is_first:
        return np.moveaxis(array, 0, -1)
    if channels is None and not is_last:
        raise BeitJaxError(f"{name}: {found}, of which no axis is the shortest, as that of bands is; save it as TIFF")
    return array  # another number of bands is refused where all files are


def _fitting(found: Bands, channels: int, select: Selection, name: str, max_pixels: int) -> Pixels:
    """The channels of an image, in a dtype that images have.

    Raises:
        BeitJaxError: another number of bands, too many pixels, values that are no pixels.
    """
    pixels = found.pixels
    height, width, count = pixels.shape
    if height * width > max_pixels or height * width * channels * pixels.dtype.itemsize > MAX_FILE:
        raise BeitJaxError(
            f"{name}: {width}x{height} pixels of {channels} channels, expected at most {max_pixels} pixels and "
            f"{MAX_FILE:,} bytes; scale it down or cut it"
        )
    if select is not None:
        if len(select) != channels or min(select) < 1:
            raise BeitJaxError(f"{name}: bands {_listed(select)}, expected {channels} numbers from 1 on")
        if max(select) > count:
            raise BeitJaxError(f"{name}: {_counted(count)}, expected band {max(select)} among them; select others")
        pixels = pixels[..., [number - 1 for number in select]]
    elif count - found.alpha == channels or count == channels:
        pixels = pixels[..., :channels]
    elif channels == 1 and found.colour and count - found.alpha == 3:
        pixels = _luma(pixels, name)
    else:
        raise BeitJaxError(
            f"{name}: {_counted(count)} ({printable(pixels.dtype)}), the model takes {channels}; select bands: --bands "
            "for beit-jax convert, --data.bands for training, or ImageProcessor(bands=...); or give another file"
        )
    return np.ascontiguousarray(_in_own_dtype(pixels, name))


def _read_tiff(data: bytes, name: str, channels: int | None, oriented: bool, max_pixels: int) -> Bands:
    with in_one_line(name):
        return read_tiff(data, name, channels, oriented=oriented, max_pixels=max_pixels, max_bytes=MAX_FILE)


def _luma(pixels: Pixels, name: str) -> Pixels:
    if pixels.dtype not in (np.uint8, np.uint16):
        raise BeitJaxError(f"{name}: {pixels.dtype} colours, the model takes 1 channel of 8 or 16 bits; select a band")
    weights = np.array(_LUMA, np.uint64)
    return ((pixels[..., :3] @ weights + np.uint64(0x8000)) >> np.uint64(16)).astype(pixels.dtype)[..., None]


def _in_own_dtype(pixels: Pixels, name: str) -> Pixels:
    kind = _kind(pixels.dtype)
    if kind is None:
        raise BeitJaxError(
            f"{name}: {printable(pixels.dtype)} values, expected uint8, uint16, int16 or float32; convert them"
        )
    if kind == np.float32:
        with np.errstate(over="ignore"):
            pixels = pixels.astype(np.float32, copy=False)
        if not np.isfinite(pixels).all():
            row, column, band = (int(i) for i in np.argwhere(~np.isfinite(pixels))[0])
            raise BeitJaxError(
                f"{name}: {pixels[row, column, band]} at row {row}, column {column}, band {band + 1}, expected finite "
                "numbers; fill what has no data before"
            )
    return pixels.astype(kind, copy=False)


def _kind(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The type of an image whose values are stored as `dtype`; None if no image is stored so."""
    native = dtype.newbyteorder("=")
    return np.dtype(np.float32) if native in _AS_FLOAT32 else native if native in DTYPES else None


def _counted(count: int) -> str:
    return f"{count} band{'s' if count > 1 else ''}"


def _listed(select: tuple[int, ...]) -> str:
    return " ".join(map(str, select))
