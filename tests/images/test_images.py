"""Images in: decoding every kind of file, refusing the bad ones in one line, and reading preprocessor_config.json."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRESETS,
    ImageProcessor,
    open_image,
    preset,
    to_rgb,
)

RAW = ImageProcessor(resize=None, rescale_factor=None, mean=None, std=None)
RAW_GREY = ImageProcessor(resize=None, rescale_factor=None, mean=None, std=None, num_channels=1)


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    """The message of the BeitJaxError that `call` must raise, checked to be one printable line."""
    with pytest.raises(BeitJaxError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The EXIF standard's table: which side of the picture row 0 and column 0 are."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }[orientation]


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files(tmp_path: Path, orientation: int, suffix: str) -> None:
    pixels = random_pixels(5, 7, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    expected = orient(pixels, orientation)
    assert np.array_equal(np.asarray(open_image(path)), expected)
    assert np.array_equal(RAW(path)[0], expected)


def test_exif_orientation_of_an_image_in_memory_is_left_alone() -> None:
    pixels = random_pixels(5, 7, 3)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6
    assert np.array_equal(RAW(image)[0], pixels)


@pytest.mark.parametrize("transparency", [None, 2, bytes([0, 128, 255])])
def test_palette_is_looked_up_and_its_transparency_dropped(tmp_path: Path, transparency: int | bytes | None) -> None:
    palette, indices = random_pixels(3, 3), random_pixels(6, 4, seed=1) % 3
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    path = tmp_path / "palette.png"
    image.save(path, **({} if transparency is None else {"transparency": transparency}))
    with Image.open(path) as image:
        assert image.mode == "P"
    assert np.array_equal(np.asarray(open_image(path)), palette[indices])


@pytest.mark.parametrize(("mode", "colour"), [("LA", 1), ("RGBA", 3)])
def test_alpha_is_dropped_not_blended(mode: str, colour: int) -> None:
    pixels = random_pixels(6, 4, colour + 1)
    pixels[:3, :, -1] = 0
    expected = np.broadcast_to(pixels[..., :colour], (6, 4, 3))
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(pixels, mode))), expected)


def test_greyscale_with_a_transparent_colour_keeps_its_pixels(tmp_path: Path) -> None:
    pixels = random_pixels(6, 4)
    path = tmp_path / "grey.png"
    Image.fromarray(pixels).save(path, transparency=int(pixels[0, 0]))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(to_rgb(image)), np.repeat(pixels[..., None], 3, 2))
        assert "transparency" in image.info, "the caller's image must not be changed"


def test_cmyk() -> None:
    pixels = random_pixels(64, 64, 4)
    ink, white = pixels[..., :3].astype(np.int64), 255 - pixels[..., 3:].astype(np.int64)
    product = ink * white + 128
    expected = np.clip(white - ((product >> 8) + product >> 8), 0, 255)  # ink * white / 255, rounded
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(pixels, "CMYK"))), expected)


def test_one_bit_and_greyscale_repeat_into_three_channels() -> None:
    bits = random_pixels(9, 11) > 127
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(bits))), np.repeat(bits[..., None] * 255, 3, 2))
    grey = random_pixels(9, 11)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))


def sixteen_bit_png(values: np.ndarray) -> bytes:
    """A PNG of bit depth 16, greyscale [h, w] or RGB [h, w, 3], built by hand: Pillow cannot write the latter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_grey_is_scaled_as_pillow_scales_sixteen_bit_colour(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 9), dtype=np.uint16)
    (tmp_path / "grey.png").write_bytes(sixteen_bit_png(values))
    (tmp_path / "colour.png").write_bytes(sixteen_bit_png(np.repeat(values[..., None], 3, 2)))
    with Image.open(tmp_path / "grey.png") as image:
        assert image.mode == "I;16"
    grey = np.asarray(open_image(tmp_path / "grey.png"))
    assert np.array_equal(grey, np.asarray(open_image(tmp_path / "colour.png")))
    assert np.array_equal(grey[..., 0], values // 256)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_sixteen_bit_in_memory_and_eight_bit_widened_comes_back(dtype: str) -> None:
    eight = random_pixels(5, 6)
    image = Image.fromarray((eight.astype(np.uint32) * 257).astype(dtype))
    assert image.mode in ("I;16", "I;16B", "I")
    assert np.array_equal(np.asarray(to_rgb(image))[..., 1], eight)


def test_modes_without_an_eight_bit_scale_are_refused(tmp_path: Path) -> None:
    assert "mode F" in refusal(to_rgb, Image.fromarray(np.ones((3, 3), np.float32)))
    assert "0 to 70000" in refusal(to_rgb, Image.fromarray(np.array([[0, 70000]], np.int32)))
    assert "-1 to 5" in refusal(to_rgb, Image.fromarray(np.array([[-1, 5]], np.int32)))
    path = tmp_path / "float.tiff"
    Image.fromarray(np.ones((3, 3), np.float32)).save(path)
    assert refusal(open_image, path).startswith(str(path))
    rgb_to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (2, 2)), rgb_to_lab)
    assert lab is not None
    assert "mode LAB" in refusal(to_rgb, lab)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 5, 3), value, np.uint8)) for value in (10, 200)]
    for suffix, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("tiff", {})):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        with Image.open(path) as image:
            image.seek(1)  # raises unless the file holds a second frame
        assert np.all(np.asarray(open_image(path)) == 10)


def test_greyscale_output() -> None:
    grey = random_pixels(5, 6)
    assert np.array_equal(RAW_GREY(grey), grey[None, :, :, None])
    colour = random_pixels(5, 6, 3)
    weights = np.array([19595, 38470, 7471])  # ITU-R 601-2 luma in 16-bit fixed point
    assert np.array_equal(RAW_GREY(colour)[0, ..., 0], (colour @ weights + 0x8000) >> 16)


# --- files that are not images ---------------------------------------------------------------------------------------


def encoded(form: str, shape: tuple[int, ...] = (48, 64, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(*shape)).save(buffer, form)
    return buffer.getvalue()


BAD_FILES = {
    "empty": (b"", "empty file"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "text": (b"hello, world\n" * 20, "not a readable image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a readable image"),
    "short png": (encoded("PNG")[:2000], "damaged or truncated"),
    "short jpeg": (encoded("JPEG")[:1500], "damaged or truncated"),
    "short webp": (encoded("WEBP")[:500], "damaged or truncated"),
    "flipped png": (encoded("PNG")[:900] + bytes(200) + encoded("PNG")[1100:], "damaged or truncated"),
    "zero width": (sixteen_bit_png(np.zeros((3, 0), np.uint16)), "not a readable image"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_one_line_naming_it(tmp_path: Path, kind: str) -> None:
    content, expected = BAD_FILES[kind]
    path = tmp_path / f"{kind.replace(' ', '_')}.png"
    path.write_bytes(content)
    for call in (open_image, preset("hf")):
        message = refusal(call, path)
        assert message.startswith(str(path)), message
        assert expected in message, message


def test_missing_file_directory_and_names_with_escapes(tmp_path: Path) -> None:
    assert "no such file" in refusal(open_image, tmp_path / "absent.png")
    assert "no such file" in refusal(open_image, "nul\0l.png")
    assert "a directory" in refusal(open_image, tmp_path)
    assert "\\x1b[31m" in refusal(open_image, "\x1b[31mred\n.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF"])
def test_fuzz_damage_anywhere_never_escapes_as_another_exception(tmp_path: Path, form: str) -> None:
    content, rng = encoded(form, (24, 32, 3)), np.random.default_rng(1)
    path, refused = tmp_path / "damaged", 0
    trials = int(os.environ.get("BEIT_JAX_FUZZ_EXAMPLES", 60))  # more, to fuzz for longer
    for trial in range(trials):
        damaged = bytearray(content[: int(rng.integers(1, len(content)))] if trial % 2 else content)
        for position in rng.integers(0, len(damaged), 3):
            damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            image = open_image(path)
        except BeitJaxError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            assert image.mode == "RGB"
    assert refused >= trials / 4


@pytest.mark.parametrize("side", [9_460, 20_000])  # 89.49 Mpx, where Pillow only warns, and 400 Mpx, where it raises
def test_decompression_bomb_is_refused(tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sixteen_bit_png(np.zeros((1, 1), np.uint16))
    header = struct.pack(">II", side, side) + content[24:29]
    path = tmp_path / "bomb.png"
    path.write_bytes(content[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:])
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert "too large" in refusal(open_image, path)
    assert not shown, "Pillow's warning must not be a second line"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "too large" in refusal(open_image, path)


def test_truncated_image_opened_by_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "short.png"
    path.write_bytes(encoded("PNG")[:2000])
    with Image.open(path) as image:
        assert "image 0: damaged or truncated" in refusal(preset("hf"), image)


def test_thin_image_is_refused_before_it_fills_the_memory() -> None:
    processor = preset("unilm_eval")
    assert processor(np.zeros((1, 1), np.uint8)).shape == (1, 224, 224, 3)
    message = refusal(processor, np.zeros((1, 5000), np.uint8))
    assert "image 0: 1x5000" in message
    assert "327680000 pixels" in message


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4), bool),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.array(None),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_array_of_another_type_or_shape(array: np.ndarray) -> None:
    message = refusal(RAW, [np.zeros((2, 2), np.uint8), array])
    assert message.startswith("image 1: ")
    assert re.search(r"expected an array (\[h, w\] or )?\[h, w, 3\] of uint8, uint16, int16 or float32", message)
    assert str(array.dtype) in message
    assert str(list(array.shape)) in message


# --- batches and arithmetic ------------------------------------------------------------------------------------------


def test_kinds_of_input_give_the_same_batch(tmp_path: Path) -> None:
    pixels = random_pixels(30, 20, 3)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    processor = preset("hf", 16)
    expected = processor(pixels)
    assert expected.shape == (1, 16, 16, 3)
    for same in (path, str(path), Image.fromarray(pixels), np.asfortranarray(pixels), pixels[::-1][::-1]):
        assert np.array_equal(processor(same), expected)
    batch = processor([path, pixels, Image.fromarray(pixels)])
    assert np.array_equal(batch, np.repeat(expected, 3, 0))


def test_images_that_make_no_batch() -> None:
    assert "no images" in refusal(RAW, [])
    assert "2x3, 4x5" in refusal(RAW, [np.zeros((4, 5), np.uint8), np.zeros((2, 3), np.uint8)])


def test_normalisation_is_correctly_rounded_float32() -> None:
    """x / 255 rounded once, then one float32 subtraction and division, for all 256 values."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    processor = ImageProcessor(resize=None, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    scaled = values[..., None].astype(np.float32) / np.float32(255)
    expected = (scaled - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    assert np.array_equal(processor(values)[0], expected)
    assert preset("hf", 4)(np.full((9, 9), 255, np.uint8)).max() == 1.0
    assert preset("hf", 4)(np.zeros((9, 9), np.uint8)).min() == -1.0


@pytest.mark.parametrize(
    ("rounding", "found", "wanted", "first", "before"),
    [
        ("floor", 9, 4, 2, 0),
        ("half_even", 9, 4, 2, 0),  # 2.5 rounds to even
        ("floor", 11, 4, 3, 0),
        ("half_even", 11, 4, 4, 0),  # 3.5 rounds to even
        ("floor", 3, 6, 0, 2),
        ("half_even", 3, 6, 0, 1),
    ],
)
def test_centre_crop_by_hand(rounding: Any, found: int, wanted: int, first: int, before: int) -> None:
    line = np.arange(1, found + 1, dtype=np.uint8)
    crop = [0] * before + list(line[first : first + wanted]) + [0] * max(wanted - found - before, 0)
    processor = ImageProcessor(None, crop=(wanted, 1), crop_rounding=rounding, rescale_factor=None, mean=None, std=None)
    assert processor(line[:, None])[0, :, 0, 0].tolist() == crop
    across = ImageProcessor(None, crop=(1, wanted), crop_rounding=rounding, rescale_factor=None, mean=None, std=None)
    assert across(line[None, :])[0, 0, :, 0].tolist() == crop


def test_presets() -> None:
    assert preset("hf") == ImageProcessor((224, 224), "bilinear")
    assert preset("hf", (224, 448)).resize == (224, 448)
    edges = {(name, size): preset(name, size).resize for name in ("unilm_eval", "timm") for size in (224, 384, 512)}
    assert edges == {
        ("unilm_eval", 224): 256,
        ("unilm_eval", 384): 384,
        ("unilm_eval", 512): 512,
        ("timm", 224): 248,
        ("timm", 384): 384,
        ("timm", 512): 512,
    }
    assert preset("timm", crop_pct=0.95).resize == 235
    v2 = preset("timm", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert (v2.mean, v2.std, v2.resample, v2.crop, v2.crop_rounding) == (
        IMAGENET_MEAN,
        IMAGENET_STD,
        "bicubic",
        (224, 224),
        "half_even",
    )
    assert "224x448" in refusal(preset, "timm", (224, 448))
    assert "crop_pct" in refusal(preset, "hf", crop_pct=0.9)
    assert "crop_pct" in refusal(preset, "timm", crop_pct=1.5)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(PRESETS),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 64),
    grey=st.booleans(),
)
def test_output_shape_and_dtype(name: Any, height: int, width: int, size: int, grey: bool) -> None:
    pixels = preset(name, size)(random_pixels(height, width, *([] if grey else [3])))
    assert pixels.shape == (1, size, size, 3)
    assert pixels.dtype == np.float32
    assert np.all(np.abs(pixels) <= 1)


# --- preprocessor_config.json ----------------------------------------------------------------------------------------

EXTRACTOR_V4 = {  # transformers 4.1x feature extractor, as the first hub checkpoints have it
    "crop_size": 224,
    "do_center_crop": False,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "BeitFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "reduce_labels": False,
    "resample": 2,
    "size": 224,
}
SLOW_V4 = {  # transformers 4.57 slow
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_normalize": True,
    "do_reduce_labels": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BeitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 256, "width": 256},
}
FAST_V4 = SLOW_V4 | {  # transformers 4.57 fast writes its nulls
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "disable_grouping": None,
    "do_center_crop": False,
    "do_convert_rgb": None,
    "do_pad": None,
    "image_processor_type": "BeitImageProcessorFast",
    "input_data_format": None,
    "pad_size": None,
    "return_tensors": None,
    "size_divisor": None,
}


def test_from_hf_reads_what_each_version_writes() -> None:
    bicubic = ImageProcessor((224, 224), "bicubic")
    assert ImageProcessor.from_hf(EXTRACTOR_V4) == preset("hf")
    slow = ImageProcessor((256, 256), "bicubic", (224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert ImageProcessor.from_hf(SLOW_V4) == slow
    assert ImageProcessor.from_hf(FAST_V4) == ImageProcessor(
        (256, 256), "bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    extractor = {"feature_extractor_type": "BeitFeatureExtractor"}
    assert ImageProcessor.from_hf(extractor) == ImageProcessor((256, 256), "bicubic", (224, 224))
    for kind in ("BeitImageProcessor", "BeitImageProcessorPil", "BeitImageProcessorFast"):
        assert ImageProcessor.from_hf({"image_processor_type": kind}) == bicubic
        assert ImageProcessor.from_hf(extractor | {"image_processor_type": kind}) == bicubic
    assert ImageProcessor.from_hf({}) == bicubic


@pytest.mark.parametrize(
    ("config", "resize"),
    [
        ({"size": 32}, (32, 32)),
        ({"size": [32, 48]}, (32, 48)),
        ({"size": {"height": 32, "width": 48}}, (32, 48)),
        ({"size": {"height": 32, "width": 48, "shortest_edge": None}}, (32, 48)),
        ({"size": {"shortest_edge": 32}}, 32),
        ({"size": 32, "default_to_square": False}, 32),
        ({"size": 32, "do_resize": False}, None),
    ],
)
def test_from_hf_sizes(config: dict[str, Any], resize: Any) -> None:
    assert ImageProcessor.from_hf(config).resize == resize


def test_from_hf_channels_and_switches() -> None:
    one = ImageProcessor.from_hf({"image_mean": [0.5], "image_std": [0.5]})
    assert (one.num_channels, one.mean) == (1, (0.5,))
    assert ImageProcessor.from_hf({"image_mean": 0.25, "image_std": 1}).mean == (0.25,) * 3
    off = ImageProcessor.from_hf({"do_rescale": False, "do_normalize": False, "image_mean": [0], "image_std": [1]})
    assert (off.rescale_factor, off.mean, off.std, off.num_channels) == (None, None, None, 1)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"image_processor_type": ["\x1b"]}, "image_processor_type"),
        ({"size": "224"}, "size is '224'"),
        ({"size": True}, "size is True"),
        ({"size": 0}, "resize is (0, 0)"),
        ({"size": [224, 224, 3]}, "size is [224, 224, 3]"),
        ({"size": {"longest_edge": 224}}, "longest_edge"),
        ({"size": {"shortest_edge": 224, "longest_edge": 400}}, "longest_edge"),
        ({"size": {"height": 224.5, "width": 224}}, "224.5"),
        ({"size": 10**12}, "resize is (1000000000000, 1000000000000)"),
        ({"crop_size": {"shortest_edge": 224}, "do_center_crop": True}, "crop_size"),
        ({"crop_size": -1, "do_center_crop": True}, "crop is (-1, -1)"),
        ({"crop_rounding": ["up"]}, "crop_rounding"),
        ({"do_resize": 1}, "do_resize is 1"),
        ({"do_normalize": "yes"}, "do_normalize is 'yes'"),
        ({"resample": 6}, "resample is 6"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"resample": True}, "resample is True"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"rescale_factor": 0}, "rescale_factor is 0.0"),
        ({"rescale_factor": 10**400}, "rescale_factor"),
        ({"image_mean": [0.5, "0.5", 0.5]}, "image_mean"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "std is (0.5, 0.0, 0.5)"),
        ({"image_std": [0.5]}, "std is (0.5,)"),
        ({"image_mean": [0.5, 0.5], "bands": [1, 0]}, "bands is (1, 0)"),
        ({"bands": [1, 2]}, "bands is (1, 2)"),
        ({"bands": 4}, "bands is 4"),
        ({"image_mean": {}}, "image_mean"),
    ],
)
def test_from_hf_refuses_in_one_line(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    message = refusal(ImageProcessor.from_hf, config)
    assert message.startswith("preprocessor_config.json: "), message
    assert named in message, message
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    assert refusal(ImageProcessor.from_file, path).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not JSON"),
        (b"{'size': 224}", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"size": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[224, 224]", "found a list"),
        (b"null", "found a NoneType"),
    ],
)
def test_from_file_refuses_what_is_not_a_json_object(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(content)
    message = refusal(ImageProcessor.from_file, path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(SLOW_V4))
    assert ImageProcessor.from_file(path) == ImageProcessor.from_hf(SLOW_V4)
    assert "no such file" in refusal(ImageProcessor.from_file, tmp_path / "absent.json")
    assert "Is a directory" in refusal(ImageProcessor.from_file, tmp_path)


def test_constructor_refuses_mean_without_std() -> None:
    assert "mean and std" in refusal(ImageProcessor, mean=None)
    assert "num_channels" in refusal(ImageProcessor, num_channels=0)
    assert "mean is (0.5, 0.5, 0.5), expected 4 numbers" in refusal(ImageProcessor, num_channels=4)


edges = st.tuples(st.integers(1, 600), st.integers(1, 600))


@st.composite
def processors(draw: st.DrawFn) -> ImageProcessor:
    channels = draw(st.sampled_from([1, 3, 4, 13]))
    statistic = st.tuples(*[st.floats(0.01, 2)] * channels)
    normalise = draw(st.booleans())
    return ImageProcessor(
        resize=draw(st.none() | edges | st.integers(1, 600)),
        resample=draw(st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])),
        crop=draw(st.none() | edges),
        crop_rounding=draw(st.sampled_from(["floor", "half_even"])),
        rescale_factor=draw(st.none() | st.just(1 / 255) | st.floats(1e-3, 2)),
        mean=draw(statistic) if normalise else None,
        std=draw(statistic) if normalise else None,
        num_channels=channels,
    )


@given(processor=processors())
def test_hf_round_trip(processor: ImageProcessor) -> None:
    config = json.loads(json.dumps(processor.to_hf()))
    assert ImageProcessor.from_hf(config) == processor
    assert processor.describe().isprintable()


def test_describe() -> None:
    assert preset("hf").describe() == "resize 224x224 bilinear, /255, mean 0.5 std 0.5"
    assert (
        preset("timm", mean=IMAGENET_MEAN, std=IMAGENET_STD).describe()
        == "resize shortest edge 248 bicubic, centre crop 224x224, /255, "
        "mean (0.485, 0.456, 0.406) std (0.229, 0.224, 0.225)"
    )
    assert RAW.describe() == "pixels as they are"
    assert RAW_GREY.describe() == "greyscale"
    assert preset("hf", (2, 3), mean=HALF).describe().startswith("resize 2x3")


def test_import_is_light() -> None:
    code = "import sys, beit_jax.images; print(sorted({'jax', 'torch', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
