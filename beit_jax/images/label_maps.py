"""Label maps: a class number for every pixel, read from files, renumbered, resized, checked and written.

| file | class numbers |
|---|---|
| PNG, BMP, GIF with a palette | the stored indices, not their colours |
| PNG, TIFF, BMP, PGM in grey of 1 to 32 bits, TIFF of 64 | the stored values, as they are |
| .npy, and .npz of one array: integers, booleans and whole floats [h, w] | the values |
| RGB, RGBA | `decode_stored` gives the colours to who knows what they mean; else they are refused |
| JPEG, lossy WebP | refused: compression smears numbers |
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from jaxtyping import Integer
from PIL import Image, UnidentifiedImageError

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images import libtiff
from beit_jax.images.array_files import is_array_file, read_array
from beit_jax.images.containers import check_container
from beit_jax.images.files import MAX_FILE, MAX_PIXELS, in_one_line, read_image_file
from beit_jax.images.tiff import is_tiff, read_tiff

IGNORED: Final = 255
IGNORED_16: Final = 65535
ADE20K_CLASSES: Final = 150
MAP_SUFFIXES: Final = frozenset(".png .tif .tiff .bmp .gif .pgm .pbm .pnm .npy .npz".split())
"""The endings of files that hold label maps without loss."""
LOSSY_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".webp"})
"""The endings of files that may hold masks of two classes."""

_NUMBERS: Final = frozenset({"L", "P", "1", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
_COLOURS: Final = frozenset({"RGB", "RGBA", "LA"})
_FORMATS: Final = ("PNG", "TIFF", "BMP", "GIF", "PPM", "JPEG", "WEBP")
_PNG_BITS: Final = 24  # the byte of a PNG that says it
_TIFF_BITS, _PHOTOMETRIC, _SAMPLES = 258, 262, 277  # the last is how many values a pixel has
_WHITE_IS_ZERO: Final = 0
_STRETCHED: Final = {2: 85, 4: 17}  # the factor by which Pillow stretches grey of so many bits
_MOST: Final = 2**31 - 1

LabelMap = Integer[np.ndarray, "h w"]


def ignored_number(classes: int) -> int:
    """The number of pixels of no class beside so many classes: 255, or 65535 where 255 is a class."""
    return IGNORED if classes <= IGNORED else IGNORED_16


def read_label_map(path: str | os.PathLike[str]) -> LabelMap:
    """Reads the class numbers in a file, [h, w] int32; the head of this file says of which kinds.

    Raises:
        BeitJaxError: the file is missing, none of these kinds, damaged or too large, or its pixels are colours.
    """
    return decode_label_map(read_image_file(path, "a label map"), printable(Path(path)))


def decode_label_map(data: bytes, name: str, *, grey_colours: bool = False) -> LabelMap:
    """Reads the class numbers in the bytes of a file, as `read_label_map` does.

    Args:
        name: of the map, for errors; printable.
        grey_colours: read RGB in which every pixel is grey as numbers, which some programs write so.

    Raises:
        BeitJaxError: as `read_label_map`.
    """
    values = decode_stored(data, name)
    if values.ndim == 2:
        return values
    coloured = (values[..., :1] != values).any(axis=-1)
    if grey_colours and not coloured.any():
        return values[..., 0].astype(np.int32)
    row, column = (int(i) for i in np.argwhere(coloured if coloured.any() else ~coloured)[0])
    raise BeitJaxError(
        f"{name}: mode RGB holds colours, expected class numbers (a greyscale or palette PNG), found "
        f"{tuple(values[row, column].tolist())} at row {row}, column {column}; beit-jax prepare segmentation "
        "--colors FILE takes a file of the colours"
    )


def decode_stored(data: bytes, name: str, *, palettes: bool = False, lossy: bool = False) -> np.ndarray:
    """What a file stores for every pixel: numbers, int32 [h, w], or colours, uint8 [h, w, 3].

    Args:
        name: of the map, for errors; printable.
        palettes: give the colours of a palette instead of its indices.
        lossy: accept JPEG and lossy WebP as well.

    Raises:
        BeitJaxError: the bytes are no label map, damaged or too large; pixels that are partly transparent, have other
            than 1 or 3 values, or fractions.
    """
    if is_array_file(data):
        return _array(data, name)
    try:
        with libtiff.noticed() as complaints, Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check(image, data, name, lossy)
            values = _pixels(image, data, name, palettes)
        if complaints:
            raise BeitJaxError(f"{name}: damaged, noticed by libtiff's {printable(complaints[0])}; export it again")
        return values
    except BeitJaxError:
        raise
    except UnidentifiedImageError as error:
        if is_tiff(data):
            return _wide_tiff(data, name)
        found = f"{len(data)} bytes that begin {data[:12]!r}"
        raise BeitJaxError(f"{name}: not a readable PNG or other label map, found {found}; export it again") from error
    except Exception as error:  # Pillow's parsers let out errors of many classes
        raise BeitJaxError(
            f"{name}: not a readable PNG or other label map ({printable(error)}); export it again"
        ) from error


def _check(image: Image.Image, data: bytes, name: str, lossy: bool) -> None:
    def refuse(found: str, expected: str, way_out: str = "export it again") -> None:
        raise BeitJaxError(f"{name}: {found}, expected {expected}; {way_out}")

    mode, bits = image.mode, _bits(image, data)
    if image.width * image.height > MAX_PIXELS:
        refuse(f"{image.width}x{image.height} pixels", f"at most {MAX_PIXELS}", "cut it")
    if (image.format == "JPEG" or (image.format == "WEBP" and b"VP8L" not in data[:64])) and not lossy:
        refuse(f"{image.format} smears class numbers", "a lossless PNG", "export it again, or with two classes prepare "
               "it with --binary")  # fmt: skip
    if mode not in _NUMBERS | _COLOURS:
        refuse(f"mode {printable(mode)} holds colours", "class numbers (a greyscale or palette PNG)")
    if mode in _COLOURS and bits > 8:  # of which Pillow keeps the high byte without a word
        refuse(f"colours of {bits} bits", "class numbers, or colours of 8 bits")
    tags = getattr(image, "tag_v2", {})
    samples, frames = tags.get(_SAMPLES, len(image.getbands())), getattr(image, "n_frames", 1)
    if samples != len(image.getbands()) or frames != 1:
        found = f"{frames} images" if frames != 1 else f"{samples} values for a pixel"
        refuse(found, "one map with one class number for a pixel")
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        refuse("a TIFF in which 0 is white, which programs read in two ways", "one in which 0 is black")
    tiles = getattr(image, "tile", [])
    if image.format == "PPM" and tiles and "ppm" in tiles[0][0]:
        refuse(
            "written as text, or of another maximum than 255", "a binary PGM (P5) with the maximum 255"
        )  # Pillow stretches the values
    check_container(data, image)


def _bits(image: Image.Image, data: bytes) -> int:
    """The bits of each value that is stored; 8 where the format has no other."""
    if image.format == "PNG":
        return data[_PNG_BITS]
    tagged = getattr(image, "tag_v2", {}).get(_TIFF_BITS, 8)
    return int(max(tagged) if isinstance(tagged, tuple) else tagged)


def _pixels(image: Image.Image, data: bytes, name: str, palettes: bool) -> np.ndarray:
    if image.mode == "P" and palettes:
        return np.asarray(image.convert("RGB"))
    array, bits = np.asarray(image), _bits(image, data)
    if image.mode not in _COLOURS:
        if image.mode == "L" and bits in _STRETCHED:
            array = array // _STRETCHED[bits]
        return _whole(array, name)
    if image.mode != "RGB":
        if array[..., -1].min() < 255:
            raise BeitJaxError(
                f"{name}: mode {image.mode} with transparent pixels, expected class numbers; export it without "
                "transparency"
            )
        array = np.broadcast_to(array[..., :-1], (*array.shape[:2], 3))
    return array


def _wide_tiff(data: bytes, name: str) -> LabelMap:
    """The numbers of a TIFF file of a type that Pillow does not know: integers and floats of 64 bits, halves."""
    with in_one_line(name):
        found = read_tiff(data, name, 1, oriented=False, max_pixels=MAX_PIXELS, max_bytes=MAX_FILE).pixels
    if found.shape[2] != 1 or found.dtype.kind not in "iuf":
        stored = f"{found.shape[2]} values of {printable(found.dtype)} for a pixel"
        raise BeitJaxError(f"{name}: {stored}, expected one map with one class number for a pixel; export it again")
    return _whole(found[..., 0], name)


def _array(data: bytes, name: str) -> np.ndarray:
    array = read_array(data, name)
    squeezed = array[..., 0] if array.shape[2:] == (1,) else array[0] if array.shape[:1] == (1,) else array
    if squeezed.shape[2:] == (3,) and squeezed.dtype == np.uint8:
        return squeezed
    if squeezed.ndim != 2 or not squeezed.size or squeezed.dtype.kind not in "biuf":
        found = f"{array.dtype} {list(array.shape)}"
        raise BeitJaxError(f"{name}: expected an array [h, w] of class numbers, found {found}; save such an array")
    if squeezed.size > MAX_PIXELS:
        raise BeitJaxError(f"{name}: {squeezed.size} pixels, expected at most {MAX_PIXELS}")
    return _whole(squeezed, name)


def _whole(array: np.ndarray, name: str) -> np.ndarray:
    """The numbers as int32; fractions and numbers beyond it are refused."""
    if array.dtype == np.float16:  # which cannot hold what it is compared with
        array = array.astype(np.float32)
    wrong = ~((array >= -_MOST) & (array <= _MOST)) if array.dtype.kind in "iuf" else np.zeros(array.shape, bool)
    if array.dtype.kind == "f":
        wrong |= array != np.floor(array)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise BeitJaxError(f"{name}: {array[row, column]} at row {row}, column {column}, expected whole numbers of "
                           "classes; save the class numbers, not their probabilities")  # fmt: skip
    return array.astype(np.int32)


def write_label_map(labels: LabelMap, path: Path | BinaryIO) -> None:
    """Writes class numbers as an 8-bit greyscale PNG, or 16-bit where they exceed 255."""
    kind = np.uint8 if labels.max(initial=0) < 256 else np.uint16
    Image.fromarray(labels.astype(kind)).save(path, format="PNG")


def reduce_labels(labels: LabelMap) -> LabelMap:
    """Renumbers ADE20K's classes for its models: 0 ("other") becomes 255 (ignored), all others become one less.

    Source: mmseg's ``reduce_zero_label``; transformers' ``do_reduce_labels``.
    """
    return np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1).astype(labels.dtype)


def model_labels(labels: LabelMap, classes: int, *, from_one: bool, ignored: int) -> LabelMap:
    """Renumbers annotations as a model's classes, and gives every pixel of no class one number, int64.

    Args:
        classes: how many the model has. 255 and `ignored` are no class where they lie beyond them.
        from_one: annotations count from 1, and 0 is no class.
        ignored: the model's number for no class. It may be one of its classes, which then does not count.
    """
    first = int(from_one)
    no_class = [number for number in (IGNORED, ignored) if number >= classes + first]
    return np.where(np.isin(labels, no_class) | (labels < first), ignored, labels.astype(np.int64) - first)


def resize_labels(labels: LabelMap, size: tuple[int, int]) -> LabelMap:
    """Resizes a map to (height, width) by the nearest pixel, at floor(i * old / new), as OpenCV and torch do.

    Call `reduce_labels` before. (transformers resizes label maps with the image's bicubic kernel, which mixes the
    numbers of different classes.)
    """
    rows, columns = (
        np.minimum((np.arange(new) * (old / new)).astype(int), old - 1)
        for old, new in zip(labels.shape, size, strict=True)
    )
    return labels[rows][:, columns]


def check_labels(
    labels: LabelMap,
    classes: Sequence[str],
    name: str,
    advice: str = "is it this model's, and to be reduced or not?",
    *,
    ignored: int = IGNORED,
) -> None:
    """Refuses a map with class numbers that the model does not have.

    Args:
        advice: the end of the error.
        ignored: the number of pixels of no class.

    Raises:
        BeitJaxError: names the map and the first such number.
    """
    wrong = (labels != ignored) & ((labels < 0) | (labels >= len(classes)))
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise BeitJaxError(
            f"{name}: label {int(labels[row, column])} at row {row}, column {column}, expected 0 to {len(classes) - 1} "
            f"or {ignored} (ignored); {int(wrong.sum())} such pixels: {advice}"
        )
