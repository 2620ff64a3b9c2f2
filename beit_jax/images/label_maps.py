"""Label maps: a class number for every pixel, read from PNG files, renumbered, resized, checked and written."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Integer
from PIL import Image, UnidentifiedImageError

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.containers import check_container
from beit_jax.images.files import MAX_PIXELS, read_image_file

IGNORED: Final = 255
ADE20K_CLASSES: Final = 150
_MODES: Final = frozenset({"L", "P", "1", "I", "I;16", "I;16L", "I;16B", "I;16N"})

LabelMap = Integer[np.ndarray, "h w"]


def read_label_map(path: str | os.PathLike[str]) -> LabelMap:
    """Reads the class numbers in a PNG file, [h, w] int32: the stored numbers, not the colours of a palette.

    Raises:
        BeitJaxError: the file is missing, no PNG, damaged or too large, or its pixels are colours.
    """
    return decode_label_map(read_image_file(path, "a label map"), printable(Path(path)))


def decode_label_map(data: bytes, name: str) -> LabelMap:
    """Reads the class numbers in the bytes of a PNG file, as `read_label_map` does.

    Args:
        name: of the map, for errors; printable.

    Raises:
        BeitJaxError: the bytes are no PNG, damaged or too large, or the pixels are colours.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BeitJaxError(f"{name}: {image.width}x{image.height} pixels, expected at most {MAX_PIXELS}")
            if image.mode not in _MODES:
                raise BeitJaxError(
                    f"{name}: mode {printable(image.mode)} holds colours, expected class numbers (a greyscale PNG)"
                )
            check_container(data, image)
            return np.asarray(image).astype(np.int32)
    except BeitJaxError:
        raise
    except UnidentifiedImageError as error:
        found = f"{len(data)} bytes that begin {data[:12]!r}"
        raise BeitJaxError(f"{name}: not a readable PNG, found {found}; export it again") from error
    except Exception as error:  # Pillow's parsers let out errors of many classes
        raise BeitJaxError(f"{name}: not a readable PNG ({printable(error)}); export it again") from error


def write_label_map(labels: LabelMap, path: Path) -> None:
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
