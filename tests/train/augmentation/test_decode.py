"""Training images are decoded to Pillow's own pixels, whichever library decodes them; and the cases beyond Pillow."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.train.augmentation import decode as module
from beit_jax.train.augmentation.decode import MAX_PIXELS, decode

ORIENTATION = 0x0112


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours and some noise: JPEG's subsampling and its ringing both show."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    quality=st.integers(5, 100),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    keep_rgb=st.booleans(),
)
def test_colour_jpeg_is_bit_for_bit_pillows(
    height: int, width: int, quality: int, subsampling: int, progressive: bool, keep_rgb: bool
) -> None:
    chroma = {} if keep_rgb else {"subsampling": subsampling}
    data = encoded(
        picture(height, width), "JPEG", quality=quality, progressive=progressive, keep_rgb=keep_rgb, **chroma
    )
    np.testing.assert_array_equal(decode(data, "x"), pillow(data))


def test_colour_jpeg_does_not_need_pillows_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    data = encoded(picture(40, 30), "JPEG")
    expected = pillow(data)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
    np.testing.assert_array_equal(decode(data, "x"), expected)


def test_simplejpeg_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(40, 30), "JPEG")
    expected = decode(data, "x")
    monkeypatch.setattr(module, "simplejpeg", None)
    np.testing.assert_array_equal(decode(data, "x"), expected)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("CMYK", "TIFF"),
    ],
)
def test_other_modes_are_pillows_conversion(mode: str, kind: str) -> None:
    image = picture(20, 30)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encoded(image.convert(mode), kind)
    found = decode(data, "x")
    assert (found.dtype, found.shape) == (np.uint8, (20, 30, 3))
    np.testing.assert_array_equal(found, pillow(data))


def test_sixteen_bit_is_scaled_where_pillow_saturates() -> None:
    values = np.arange(0, 65536, 97, dtype=np.uint16)[:600].reshape(20, 30)
    data = encoded(Image.fromarray(values), "PNG")
    found = decode(data, "x")
    np.testing.assert_array_equal(found, np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=2))
    assert pillow(data).mean() > 250 > found.mean()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_not_applied(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a quarter turn
    data = encoded(picture(20, 30), kind, exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[ORIENTATION] == 6
    np.testing.assert_array_equal(decode(data, "x"), pillow(data))
    assert decode(data, "x").shape == (20, 30, 3)


def test_what_only_simplejpeg_refuses_is_what_pillow_makes_of_it() -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    whole = encoded(picture(40, 30), "JPEG")
    data = whole[:-2] + b"junk" + whole[-2:]  # libjpeg warns: extraneous bytes before the end marker
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(data)
    np.testing.assert_array_equal(decode(data, "x"), pillow(data))


def png_header(width: int, height: int) -> bytes:
    """A PNG of one row of data that says it is larger."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(bytes(width + 1))) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG of 16x16 that says it is larger."""
    data = encoded(picture(16, 16), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


WHOLE_JPEG, WHOLE_PNG = encoded(picture(60, 80), "JPEG"), encoded(picture(60, 80), "PNG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"hello world, no image", "expected one of JPEG, PNG"),
        (b"\xff\xd8\xff" + bytes(100), "x: "),
        (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], "truncated"),
        (WHOLE_PNG[: len(WHOLE_PNG) // 2], "truncated"),
        (WHOLE_PNG[:300] + b"\x55" * 40 + WHOLE_PNG[340:], "damaged"),
        (png_header(8000, 8000), f"8000x8000 pixels, expected at most {MAX_PIXELS}"),
        (jpeg_header(8000, 8000), f"8000x8000 pixels, expected at most {MAX_PIXELS}"),
        (png_header(20000, 5000), "too large"),
        (jpeg_header(60000, 60000), "too large"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_the_name(data: bytes, message: str) -> None:
    with pytest.raises(BeitJaxError, match=r"^x: ") as caught:
        decode(data, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)


@given(st.data())
def test_damage_anywhere_is_an_image_or_the_one_error(drawn: st.DataObject) -> None:
    whole = drawn.draw(st.sampled_from([WHOLE_JPEG, WHOLE_PNG]))
    data = bytearray(whole[: drawn.draw(st.integers(0, len(whole)))])
    for place in drawn.draw(st.lists(st.integers(0, max(0, len(data) - 1)), max_size=5)) if data else ():
        data[place] = drawn.draw(st.integers(0, 255))
    try:
        found = decode(bytes(data), "x")
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    except BeitJaxError as error:
        assert str(error).startswith("x: ")


def test_extreme_shapes(tmp_path: Path) -> None:
    for size in ((1, 1), (5000, 1), (1, 5000)):
        for kind in ("JPEG", "PNG"):
            assert decode(encoded(Image.new("RGB", size, "red"), kind), "x").shape == (*size[::-1], 3)
