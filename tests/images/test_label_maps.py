"""Which files are read as class numbers, and which are refused: each kind written here, or by its library."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.images.label_maps import decode_label_map, ignored_number, read_label_map

NUMBERS = np.array([[0, 1, 1, 2], [3, 0, 2, 1]])
LARGE = np.array([[0, 1, 300, 2], [65535, 0, 2, 1]])
PALETTE = [9, 9, 9, 200, 3, 4, 5, 250, 6, 7, 8, 9]


def pillow(values: np.ndarray, kind: str = "PNG", *, palette: bool = False, **options: object) -> bytes:
    image, buffer = Image.fromarray(values), io.BytesIO()
    if palette:
        image.putpalette(PALETTE)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(bits: int, values: np.ndarray, *, palette: bool = False) -> bytes:
    """A PNG of so many bits a pixel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b""
    for row in values.tolist():
        packed = sum(int(value) << bits * place for place, value in enumerate(reversed(row)))
        spare = -bits * len(row) % 8
        rows += b"\0" + (packed << spare).to_bytes((bits * len(row) + spare) // 8, "big")
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 3 if palette else 0, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(PALETTE[: 3 * 2**bits])) if palette else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + colours
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **({"photometric": "minisblack"} | options))
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


U8, ONES = NUMBERS.astype(np.uint8), NUMBERS > 0
READ: dict[str, tuple[bytes, np.ndarray]] = {
    "PNG of 8 bits": (pillow(U8), NUMBERS),
    "PNG of 16 bits": (pillow(LARGE.astype(np.uint16)), LARGE),
    "PNG of 1 bit": (pillow(ONES), ONES),
    "PNG of 2 bits": (png(2, NUMBERS), NUMBERS),
    "PNG of 4 bits": (png(4, NUMBERS * 5), NUMBERS * 5),
    "PNG with a palette": (pillow(U8, palette=True), NUMBERS),
    "PNG with a palette of 2 bits": (png(2, NUMBERS, palette=True), NUMBERS),
    "PNG with a palette of 1 bit": (png(1, NUMBERS % 2, palette=True), NUMBERS % 2),
    "GIF": (pillow(U8, "GIF", palette=True), NUMBERS),
    "BMP": (pillow(U8, "BMP"), NUMBERS),
    "PGM": (b"P5\n4 2\n255\n" + U8.tobytes(), NUMBERS),
    "TIFF of 8 bits": (tiff(U8), NUMBERS),
    "TIFF of 16 bits": (tiff(LARGE.astype(np.uint16), compression="deflate"), LARGE),
    "TIFF of signed numbers": (tiff(NUMBERS.astype(np.int16) - 1), NUMBERS - 1),
    "TIFF of 32 bits": (tiff(LARGE.astype(np.int32) * 100), LARGE * 100),
    "TIFF of whole floats": (tiff(LARGE.astype(np.float32)), LARGE),
    "TIFF of halves": (tiff(NUMBERS.astype(np.float16)), NUMBERS),
    "TIFF of doubles": (tiff(LARGE.astype(np.float64), compression="deflate"), LARGE),
    "TIFF of int64": (tiff(LARGE - 1), LARGE - 1),
    "TIFF of uint64": (tiff(LARGE.astype(np.uint64)), LARGE),
    "TIFF of booleans": (tiff(ONES), ONES),
    ".npy of int64": (npy(LARGE), LARGE),
    ".npy of booleans": (npy(ONES), ONES),
    ".npy of halves": (npy(NUMBERS.astype(np.float16)), NUMBERS),
    ".npy of whole floats": (npy(NUMBERS.astype(np.float64)), NUMBERS),
    ".npy [h, w, 1]": (npy(U8[..., None]), NUMBERS),
    ".npz": (npz(mask=U8), NUMBERS),
}


@pytest.mark.parametrize("kind", READ)
def test_read_as_the_stored_numbers(kind: str, tmp_path: Path) -> None:
    data, expected = READ[kind]
    (tmp_path / "map").write_bytes(data)
    found = read_label_map(tmp_path / "map")
    assert found.dtype == np.int32 and found.tolist() == expected.astype(int).tolist()


COLOURS = np.stack([U8 * 60, U8 * 20, U8 * 5], axis=-1)
REFUSED: dict[str, tuple[bytes, str]] = {
    "RGB": (pillow(COLOURS), "x: mode RGB holds colours, expected class numbers .*--colors FILE"),
    "grey RGB": (pillow(np.repeat(U8[..., None], 3, axis=-1)), "x: mode RGB holds colours"),
    "RGBA, partly transparent": (pillow(np.dstack([COLOURS, U8 * 80])), "x: mode RGBA with transparent pixels"),
    "grey and alpha": (pillow(np.stack([U8, U8], axis=-1)), "x: mode LA with transparent pixels"),
    "TIFF of RGB in 16 bits": (tiff(COLOURS.astype(np.uint16) * 257, photometric="rgb"), "x: colours of 16 bits"),
    "JPEG": (pillow(U8, "JPEG"), "x: JPEG smears class numbers, expected a lossless PNG; .*--binary"),
    "lossy WebP": (pillow(COLOURS, "WEBP"), "x: WEBP smears class numbers"),
    "two bands": (tiff(np.dstack([U8, U8]), planarconfig="contig", metadata=None), "x: 2 values for a pixel"),
    "two planes": (tiff(np.stack([U8, U8]), planarconfig="separate", metadata=None), "x: 2 values of uint8"),
    "two pages": (tiff(np.stack([U8, U8])), "x: 2 images, expected one map"),
    "white is 0": (tiff(U8, photometric="miniswhite"), "x: a TIFF in which 0 is white"),
    "PGM of another maximum": (b"P5\n4 2\n10\n" + U8.tobytes(), "x: written as text, or of another maximum than 255"),
    "fractions": (npy(NUMBERS / 2), "x: 0.5 at row 0, column 1, expected whole numbers"),
    "doubles that are fractions": (tiff(NUMBERS / 3), "x: 0.33.* at row 0, column 1, expected whole numbers"),
    "complex": (tiff(NUMBERS.astype(np.complex64)), "x: 1 values of complex64 for a pixel"),
    "int64, cut off": (tiff(LARGE)[:-3], "x: damaged or truncated"),
    "probabilities": (tiff(np.full((2, 4), 0.99, np.float32)), "x: 0.99.* at row 0, column 0, expected whole numbers"),
    "NaN": (npy(np.full((2, 2), np.nan)), "x: nan at row 0"),
    "numbers beyond 32 bits": (npy(NUMBERS + 2**40), "x: 1099511627776 at row 0"),
    "one-hot": (npy(np.eye(4)[NUMBERS]), r"x: expected an array \[h, w\] of class numbers, found float64 \[2, 4, 4\]"),
    "text": (npy(np.array([["a", "b"]])), r"x: expected an array \[h, w\] of class numbers"),
    "objects": (npz(mask=np.array([["a", None]], object)), "x: "),
    "two arrays": (npz(a=U8, b=U8), "x: expected one array"),
    "no image": (b"no image", "x: not a readable PNG"),
    "cut off": (pillow(U8)[:45], "x: not a readable PNG"),
    "nothing": (b"", "x: not a readable PNG"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind: str) -> None:
    data, message = REFUSED[kind]
    with pytest.raises(BeitJaxError, match=message) as caught:
        decode_label_map(data, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alpha", [False, True])
def test_grey_colours_are_numbers_where_that_is_asked_for(alpha: bool) -> None:
    grey = np.repeat(U8[..., None], 3, axis=-1)
    opaque = np.dstack([grey, np.full(U8.shape, 255, np.uint8)]) if alpha else grey
    assert decode_label_map(pillow(opaque), "x", grey_colours=True).tolist() == NUMBERS.tolist()
    with pytest.raises(BeitJaxError, match=r"found \(60, 20, 5\) at row 0, column 1"):
        decode_label_map(pillow(COLOURS), "x", grey_colours=True)


@pytest.mark.parametrize(("classes", "number"), [(2, 255), (255, 255), (256, 65535), (1000, 65535)])
def test_the_number_of_no_class_is_none_of_the_classes(classes: int, number: int) -> None:
    assert ignored_number(classes) == number >= classes
