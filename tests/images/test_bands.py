"""Images of any number of bands and any dtype: what `bands` reads against tifffile, NumPy and hand-made files."""

import io
import itertools
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.images.bands import decode_bands, load_bands, visible
from beit_jax.images.files import open_image

RNG = np.random.default_rng(0)


def values(*shape: int, dtype: str = "uint8") -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return RNG.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def tiff(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(BeitJaxError) as caught:
        decode_bands(*arguments, **options)
    message = str(caught.value)
    assert message.startswith("x: ") and message.isprintable()
    return message


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, rows filtered by each of the five filters in turn. Source: PNG specification, 9."""
    height, width, count = pixels.shape
    step, before, packed = 2 * count, np.zeros(2 * count * width, int), b""
    for y, row in enumerate(pixels.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)):
        left, corner = (np.concatenate([np.zeros(step, int), line[:-step]]) for line in (row, before))
        initial = left + before - corner
        near = np.stack([abs(initial - line) for line in (left, before, corner)]).argmin(axis=0)
        paeth = np.choose(near, [left, before, corner])
        predicted = [np.zeros_like(row), left, before, (left + before) // 2, paeth][y % 5]
        packed += bytes([y % 5]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
        before = row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


# --- TIFF


@pytest.mark.parametrize(
    ("count", "dtype"), list(itertools.product([1, 2, 4, 13], ["uint8", "uint16", "int16", "float32"])), ids=str
)
def test_tiff_of_every_layout_is_exact(count: int, dtype: str) -> None:
    pixels = values(20, 33, count, dtype=dtype)
    flat = np.moveaxis(pixels, -1, 0)
    together: dict[str, Any] = {"photometric": "minisblack"} | ({"planarconfig": "contig"} if count > 1 else {})
    files = {
        "interleaved": tiff(pixels, **together),
        "pages": tiff(flat, photometric="minisblack"),
        "pages without a word": tiff(flat, photometric="minisblack", metadata=None),
        "tiles, deflated": tiff(pixels, **together, tile=(16, 16), compression="zlib"),
        "predicted": tiff(pixels, **together, compression="zlib", predictor=dtype != "float32"),
        "big, big-endian": tiff(pixels, **together, bigtiff=True, byteorder=">"),
    }
    if count > 1:
        files["planar"] = tiff(flat, photometric="minisblack", planarconfig="separate")
    for layout, data in files.items():
        found = decode_bands(data, layout, count)
        assert found.dtype == dtype and np.array_equal(found, pixels), layout


def test_an_array_that_tifffile_wrote_as_a_page_per_row() -> None:
    pixels = values(20, 30, 13, dtype="float32")
    data = tiff(pixels)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert len(file.pages) == 20
    assert np.array_equal(decode_bands(data, "x", 13), pixels)
    assert "1 band (float32), the model takes 12" in refusal(data, "x", 12)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pages_that_a_program_wrote_as_one_array_are_bands_for_any_model(dtype: str) -> None:
    """Of pages that say nothing, the first is an image of its own, as Pillow reads it."""
    pixels = values(20, 30, 3, dtype=dtype)
    flat = np.moveaxis(pixels, -1, 0)
    files = {
        "ImageJ": tiff(flat, imagej=True, metadata={"axes": "CYX"}),
        "OME": tiff(flat, ome=True, metadata={"axes": "CYX"}, photometric="minisblack"),
        "tifffile": tiff(flat, photometric="minisblack"),
        "rows": tiff(pixels, photometric="minisblack"),
    }
    for program, data in files.items():
        assert np.array_equal(decode_bands(data, "x", 3), pixels), program
        assert "bands (" in refusal(data, "x", 1), program
    silent = tiff(flat, photometric="minisblack", metadata=None)
    assert np.array_equal(decode_bands(silent, "x", 1), pixels[..., :1])
    if dtype == "uint8":
        assert np.array_equal(decode_bands(silent, "x", 3), np.repeat(pixels[..., :1], 3, axis=2))
        assert np.array_equal(decode_bands(silent, "x", 3, select=(1, 2, 3)), pixels)


def test_alpha_is_a_band_where_it_is_wanted_and_dropped_where_it_is_one_too_many() -> None:
    pixels = values(9, 8, 4, dtype="uint16")
    for kind in ("unassalpha", "assocalpha"):
        data = tiff(pixels, photometric="rgb", extrasamples=[kind])
        assert np.array_equal(decode_bands(data, "x", 4), pixels)
        assert np.array_equal(decode_bands(data, "x", 3), pixels[..., :3])
    unknown = tiff(pixels, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(decode_bands(unknown, "x", 4), pixels)
    assert "4 bands (uint16), the model takes 3; select bands: --bands" in refusal(unknown, "x", 3)
    eight = tiff(pixels.astype(np.uint8), photometric="rgb", extrasamples=["unspecified"])
    assert Image.open(io.BytesIO(eight)).mode == "RGB", "Pillow drops the fourth band without a word"
    assert "4 bands (uint8), the model takes 3" in refusal(eight, "x", 3)


def test_eight_bit_colours_and_grey_are_pillows(tmp_path: Path) -> None:
    for form, shape, channels in itertools.product(("TIFF", "PNG", "JPEG"), ((9, 8, 3), (9, 8)), (1, 3)):
        path = tmp_path / f"image.{form.lower()}"
        Image.fromarray(values(*shape)).save(path)
        expected = np.asarray(open_image(path, "RGB" if channels == 3 else "L")).reshape(9, 8, channels)
        assert np.array_equal(load_bands(path, channels, "x"), expected)


def test_sixteen_bit_grey_keeps_its_bits_for_one_channel_and_its_high_byte_for_three() -> None:
    grey = values(7, 9, 1, dtype="uint16")
    for data in (deep_png(grey), tiff(grey[..., 0])):
        found = decode_bands(data, "x", 1)
        assert found.dtype == np.uint16 and np.array_equal(found, grey)
        assert np.array_equal(decode_bands(data, "x", 3), np.repeat(grey >> 8, 3, axis=2))
    assert np.array_equal(decode_bands(tiff(grey[..., 0], photometric="miniswhite"), "x", 1), 65535 - grey)


def test_smaller_copies_and_masks_are_passed_over() -> None:
    file, pixels = io.BytesIO(), values(16, 16, 4, dtype="uint16")
    with tifffile.TiffWriter(file) as writer:
        writer.write(pixels, photometric="minisblack", planarconfig="contig", subifds=0)
        writer.write(pixels[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1)
    assert np.array_equal(decode_bands(file.getvalue(), "x", 4), pixels)


def test_orientation_of_tiff_is_applied_unless_told_otherwise(tmp_path: Path) -> None:
    pixels = values(6, 5, 3)
    for orientation in range(1, 9):
        tag = (274, "H", 1, orientation, True)
        four = tiff(np.dstack([pixels, pixels[..., :1]]), photometric="minisblack", planarconfig="contig",
                    extratags=[tag])  # fmt: skip
        path = tmp_path / "three.tiff"
        path.write_bytes(tiff(pixels, photometric="rgb", extratags=[tag]))
        assert np.array_equal(decode_bands(four, "x", 4)[..., :3], np.asarray(open_image(path))), orientation
        assert np.array_equal(decode_bands(four, "x", 4, oriented=False)[..., :3], pixels)


def test_damaged_tiff_is_refused() -> None:
    data = tiff(values(64, 64, 4, dtype="uint16"), photometric="minisblack", planarconfig="contig", compression="zlib")
    assert "damaged or truncated" in refusal(data[:-200], "x", 4)
    assert "damaged or truncated" in refusal(data[: len(data) // 2] + b"\0" * 99 + data[len(data) // 2 + 99 :], "x", 4)
    plain = tiff(values(64, 64, 4), photometric="minisblack", planarconfig="contig")
    assert "damaged or truncated" in refusal(plain[:-1], "x", 4)
    for count in range(0, 700, 7):
        try:
            decode_bands(plain[:count], "x", 4)
        except BeitJaxError as error:
            assert str(error).isprintable()
        else:
            raise AssertionError(count)


def test_tiff_that_nothing_here_can_read_names_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    file, contiguous = io.BytesIO(), {"photometric": "minisblack", "planarconfig": "contig"}
    Image.fromarray(values(8, 8, 3)).save(file, "TIFF", compression="tiff_lzw")
    assert decode_bands(file.getvalue(), "x", 3).shape == (8, 8, 3), "Pillow's libtiff reads this one"
    assert "LZW" in (found := refusal(file.getvalue(), "x", 1, select=(2,))) and "pip install imagecodecs" in found
    file = io.BytesIO()
    Image.fromarray(values(8, 8, 4)).save(file, "TIFF", compression="zstd")
    assert "ZSTD" in (found := refusal(file.getvalue(), "x", 4)) and "pip install imagecodecs" in found
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "tifffile", None)
        assert "pip install 'beit-jax[tiff]'" in refusal(tiff(values(8, 8, 4, dtype="uint16"), **contiguous), "x", 4)
    assert "expected grey or RGB bands" in refusal(tiff(values(8, 8, 4), photometric="separated"), "x", 4)
    assert "at most 50 pixels" in refusal(tiff(values(8, 8, 4, dtype="int16"), **contiguous), "x", 4, max_pixels=50)


# --- PNG and other pictures


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_png_of_sixteen_bits_keeps_them(count: int) -> None:
    pixels = values(11, 9, count, dtype="uint16")
    found = decode_bands(deep_png(pixels), "x", count)
    assert found.dtype == np.uint16 and np.array_equal(found, pixels)
    assert np.array_equal(decode_bands(deep_png(pixels), "x", 1, select=(count,)), pixels[..., -1:])


def test_deep_colour_becomes_deep_luma_for_one_channel() -> None:
    colour = values(5, 6, 3, dtype="uint16")
    found = decode_bands(deep_png(colour), "x", 1)
    expected = colour @ np.array([0.299, 0.587, 0.114])
    assert found.dtype == np.uint16 and np.abs(found[..., 0] - expected).max() < 1.5


def test_pictures_give_as_many_bands_as_they_have(tmp_path: Path) -> None:
    for mode, count in (("LA", 2), ("RGBA", 4)):
        pixels = values(6, 5, count)
        path = tmp_path / f"{mode}.png"
        Image.fromarray(pixels).save(path)
        assert np.array_equal(load_bands(path, count, "x"), pixels)
        assert np.array_equal(load_bands(Image.open(path), count, "x"), pixels)
        assert np.array_equal(load_bands(path, 1, "x", select=(count,)), pixels[..., -1:])
    Image.fromarray(values(6, 5, 3)).save(tmp_path / "rgb.jpg")
    with pytest.raises(BeitJaxError, match=r"rgb.jpg: 3 bands \(uint8\), the model takes 4; select bands: --bands"):
        load_bands(tmp_path / "rgb.jpg", 4, "x")
    assert np.array_equal(
        load_bands(tmp_path / "rgb.jpg", 4, "x", select=(1, 2, 3, 1)),
        np.asarray(open_image(tmp_path / "rgb.jpg"))[..., [0, 1, 2, 0]],
    )
    with pytest.raises(BeitJaxError, match="3 bands, expected band 5 among them"):
        load_bands(tmp_path / "rgb.jpg", 1, "x", select=(5,))


# --- NumPy's files


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_arrays_in_files(dtype: str) -> None:
    pixels = values(12, 10, 4, dtype=dtype)
    packed = io.BytesIO()
    np.savez_compressed(packed, image=pixels)
    swapped = pixels.astype(pixels.dtype.newbyteorder(">"))
    forms = (pixels, np.moveaxis(pixels, -1, 0), np.asfortranarray(pixels), swapped)
    for data in (*map(npy, forms), packed.getvalue()):
        found = decode_bands(data, "x", 4)
        assert found.dtype == np.dtype(dtype) and found.dtype.isnative and np.array_equal(found, pixels)
    assert np.array_equal(decode_bands(npy(pixels[..., 0]), "x", 1), pixels[..., :1])
    assert np.array_equal(decode_bands(npy(pixels), "x", 2, select=(4, 2)), pixels[..., [3, 1]])


def test_floats_of_other_sizes_become_float32() -> None:
    pixels = values(5, 6, 4, dtype="float64")
    assert np.array_equal(decode_bands(npy(pixels), "x", 4), pixels.astype(np.float32))
    assert decode_bands(npy(pixels.astype(np.float16)), "x", 4).dtype == np.float32


def test_arrays_that_are_no_images_are_refused() -> None:
    several = io.BytesIO()
    np.savez(several, a=values(3, 3), b=values(3, 3))
    objects = npy(np.array([[{}]], dtype=object))
    whole = npy(values(9, 8, 4))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", b"no array")
    hole = values(6, 5, 4, dtype="float32")
    hole[2, 3, 1] = np.nan
    for data, expected in (
        (several.getvalue(), "expected one array in the archive, found a, b"),
        (objects, "expected numbers"),
        (whole[:-1], "damaged or truncated array file"),
        (whole + b"\0", "damaged or truncated array file"),
        (whole[:9], "damaged or truncated array file"),
        (bomb.getvalue(), "damaged or truncated array file"),
        (npy(values(4, 9, 4)), "where bands may be the first axis or the last"),
        (npy(values(9, 8, 5)), "5 bands (uint8), the model takes 4"),
        (npy(values(2, 9, 8, 4)), "expected an array [h, w]"),
        (npy(values(9, 8, 4).astype(np.int64)), "int64 values, expected uint8"),
        (npy(np.zeros((9, 8, 4), bool)), "bool values, expected uint8"),
        (npy(np.zeros((9, 0, 4), np.uint8)), "expected an array [h, w]"),
        (npy(hole), "nan at row 2, column 3, band 2, expected finite numbers"),
    ):
        assert expected in (found := refusal(data, "x", 4))
        assert "damaged" in expected or "damaged" not in found, "what is whole is not said to be damaged"
    for key in ("True", "9.5", "[]", "'9'"):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({key}, 8, 4)}}".ljust(117) + "\n"
        data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(288)
        assert "damaged or truncated array file" in refusal(data, "x", 4), key


# --- Arrays in memory


def test_arrays_in_memory_have_their_bands_last() -> None:
    pixels = values(6, 5, 4, dtype="int16")
    assert np.array_equal(load_bands(pixels, 4, "x"), pixels)
    assert np.array_equal(load_bands(pixels, 1, "x", select=(3,)), pixels[..., 2:3])
    assert np.array_equal(load_bands(pixels[..., 0], 1, "x"), pixels[..., :1])
    with pytest.raises(BeitJaxError, match=r"numpy.moveaxis\(array, 0, -1\)"):
        load_bands(np.moveaxis(pixels, -1, 0), 4, "x")


def test_a_picture_for_people() -> None:
    assert np.array_equal(np.asarray(visible(eight := values(6, 5, 4))), eight[..., :3])
    shown = np.asarray(visible(values(50, 50, 2, dtype="uint16")))
    assert shown.shape == (50, 50, 3) and shown.min() == 0 and shown.max() == 255
