"""Pixel values bit-equal to transformers' PIL processor and to torchvision's transforms, rebuilt from formulas."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from beit_jax.images import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, open_image, preset

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import BeitImageProcessorPil  # noqa: E402
from transformers.image_utils import load_image  # noqa: E402

# (height, width): odd, even, tall, wide, tiny, smaller than every crop below, exactly the target
SIZES = [(481, 639), (480, 640), (333, 100), (77, 500), (1, 1), (3, 2), (19, 23), (40, 20), (32, 32), (33, 257)]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth ramp with noise: resampling sees gradients as well as overshoot."""
    rng = np.random.default_rng([seed, height, width])
    ramp = np.add.outer(np.linspace(0, 128, height), np.linspace(0, 127, width))[..., None]
    pixels = ramp + rng.integers(-60, 60, (height, width, channels))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def transformers_pixels(config: dict[str, Any], image: Any) -> np.ndarray:
    values = BeitImageProcessorPil.from_dict(config)(image)["pixel_values"]
    return np.stack(values).transpose(0, 2, 3, 1).astype(np.float32)


CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "hub classification": {"size": 32, "resample": 2, "do_center_crop": False},
    "height and width": {"size": {"height": 48, "width": 32}, "resample": 3},
    "size list": {"size": [33, 47], "resample": 1},
    "nearest": {"size": 32, "resample": 0},
    "box": {"size": 32, "resample": 4},
    "hamming": {"size": 32, "resample": 5},
    "shortest edge": {"size": {"shortest_edge": 37}},
    "int as shortest edge": {"size": 37, "default_to_square": False},
    "crop": {"size": 37, "do_center_crop": True, "crop_size": 32},
    "odd crop": {"size": {"shortest_edge": 38}, "do_center_crop": True, "crop_size": {"height": 31, "width": 25}},
    "crop larger than image": {"size": 37, "do_center_crop": True, "crop_size": {"height": 60, "width": 50}},
    "crop larger one way": {"size": [20, 50], "do_center_crop": True, "crop_size": {"height": 33, "width": 33}},
    "crop without resize": {"do_resize": False, "do_center_crop": True, "crop_size": 32},
    "nothing but normalisation": {"do_resize": False},
    "imagenet statistics": {"size": 32, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)},
    "scalar statistics": {"size": 32, "image_mean": 0.45, "image_std": 0.225},
    "no rescale": {
        "size": 32,
        "do_rescale": False,
        "image_mean": [123.675, 116.28, 103.53],
        "image_std": [58.4, 57, 57],
    },
    "other rescale": {"size": 32, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
    "float32 rescale": {"size": 32, "rescale_factor": 0.003921568859368563},
    "no normalisation": {"size": 32, "do_normalize": False},
    "neither": {"size": 32, "do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_from_hf_is_bit_equal_to_transformers(kind: str, size: tuple[int, int]) -> None:
    config = {"image_processor_type": "BeitImageProcessor"} | CONFIGS[kind]
    image = Image.fromarray(picture(*size))
    processor = ImageProcessor.from_hf(config)
    expected = transformers_pixels(config, image)
    assert np.array_equal(processor(image), expected)
    assert np.array_equal(transformers_pixels(processor.to_hf(), image), expected), "to_hf must mean the same there"


def test_from_hf_of_a_file_saved_by_transformers(tmp_path: Path) -> None:
    reference = BeitImageProcessorPil(size={"height": 30, "width": 40}, resample=2, do_center_crop=True, crop_size=24)
    reference.save_pretrained(tmp_path)
    image = Image.fromarray(picture(50, 61))
    expected = np.stack(reference(image)["pixel_values"]).transpose(0, 2, 3, 1)
    processor = ImageProcessor.from_file(tmp_path / "preprocessor_config.json")
    assert processor == ImageProcessor((30, 40), "bilinear", (24, 24))
    assert np.array_equal(processor(image), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_greyscale_arrays(size: tuple[int, int]) -> None:
    grey = picture(*size, channels=1)[..., 0]
    config = {"size": 32, "do_center_crop": True, "crop_size": 27, "image_mean": [0.3], "image_std": [0.2]}
    assert np.array_equal(ImageProcessor.from_hf(config)(grey), transformers_pixels(config, grey[None]))
    three = {"size": 32, "resample": 2}
    repeated = Image.fromarray(np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(ImageProcessor.from_hf(three)(grey), transformers_pixels(three, repeated))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preset_hf(size: tuple[int, int]) -> None:
    """As convert_beit_unilm_to_pytorch.py saved the hub checkpoints."""
    config = {"size": 64, "resample": 2, "do_center_crop": False}
    image = Image.fromarray(picture(*size))
    assert np.array_equal(preset("hf", 64)(image), transformers_pixels(config, image))


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    size=st.one_of(
        st.fixed_dictionaries({"height": st.integers(1, 60), "width": st.integers(1, 60)}),
        st.fixed_dictionaries({"shortest_edge": st.integers(1, 40)}),
    ),
    crop=st.none() | st.fixed_dictionaries({"height": st.integers(1, 70), "width": st.integers(1, 70)}),
    resample=st.integers(0, 5),
    factor=st.none() | st.floats(1e-3, 2),
    mean=st.none() | st.tuples(*[st.floats(0, 1)] * 3),
)
def test_any_configuration_is_bit_equal_to_transformers(
    height: int, width: int, size: dict[str, int], crop: Any, resample: int, factor: float | None, mean: Any
) -> None:
    config: dict[str, Any] = {"size": size, "resample": resample, "do_center_crop": crop is not None}
    config |= {"crop_size": crop, "do_rescale": factor is not None, "rescale_factor": factor}
    config |= {"do_normalize": mean is not None, "image_mean": mean and list(mean)}
    image = Image.fromarray(picture(height, width))
    assert np.array_equal(ImageProcessor.from_hf(config)(image), transformers_pixels(config, image))


# --- torchvision, from its documented formulas -----------------------------------------------------------------------


def torchvision_resize(image: Image.Image, size: int) -> Image.Image:
    """transforms.Resize(size, bicubic) of a PIL image: shortest edge, the long one truncated."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new = (new_short, new_long) if width <= height else (new_long, new_short)
    return image.resize(new, Image.Resampling.BICUBIC)


def torchvision_center_crop(pixels: Any, height: int, width: int) -> Any:
    """functional.center_crop on a uint8 tensor [h, w, 3]."""
    found_height, found_width = pixels.shape[:2]
    down, right = max(height - found_height, 0), max(width - found_width, 0)
    if down or right:
        padding = (0, 0, right // 2, (right + 1) // 2, down // 2, (down + 1) // 2)
        pixels = torch.nn.functional.pad(pixels, padding)
    top = int(round((pixels.shape[0] - height) / 2.0))  # noqa: RUF046 - as documented
    left = int(round((pixels.shape[1] - width) / 2.0))  # noqa: RUF046
    return pixels[top : top + height, left : left + width]


def torchvision_pixels(
    image: Image.Image, resize: int | None, crop: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """Compose([Resize, CenterCrop, ToTensor, Normalize]), channels last."""
    if resize is not None:
        image = torchvision_resize(image, resize)
    pixels = torchvision_center_crop(torch.from_numpy(np.array(image)), *crop)
    values = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean_, std_ = (torch.as_tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (mean, std))
    return values.sub_(mean_).div_(std_).permute(1, 2, 0).numpy()[None]


@pytest.mark.parametrize(
    "statistics", [((0.5,) * 3, (0.5,) * 3), (IMAGENET_MEAN, IMAGENET_STD)], ids=["half", "imagenet"]
)
@pytest.mark.parametrize("target", [32, 31, 224, 384])
@pytest.mark.parametrize("size", [(481, 639), (100, 133), (133, 100), (77, 300), (31, 31), (3, 2)], ids=str)
def test_presets_are_bit_equal_to_torchvision(size: tuple[int, int], target: int, statistics: Any) -> None:
    image = Image.fromarray(picture(*size))
    mean, std = statistics
    unilm = int(target / (224 / 256 if target < 384 else 1.0))
    timm = math.floor(target / (0.9 if target < 384 else 1.0))
    for name, edge in (("unilm_eval", unilm), ("timm", timm)):
        expected = torchvision_pixels(image, edge, (target, target), mean, std)
        assert np.array_equal(preset(name, target, mean=mean, std=std)(image), expected), name


@pytest.mark.parametrize("target", [(32, 48), (31, 44), (400, 384)], ids=str)
@pytest.mark.parametrize("size", [(481, 639), (100, 133), (77, 300), (3, 2)], ids=str)
def test_the_evaluation_at_an_oblong_size_is_what_transformers_does_of_its_record(
    size: tuple[int, int], target: tuple[int, int]
) -> None:
    """Both sides are resized, to the same excess; from 384 pixels on nothing is cut."""
    ours, image = preset("unilm_eval", target), Image.fromarray(picture(*size))
    excess = 1.0 if min(target) >= 384 else 224 / 256
    assert ours.resize == tuple(int(side / excess) for side in target) and ours.crop == target
    found = ours(image)
    assert found.shape == (1, *target, 3)
    np.testing.assert_array_equal(found, transformers_pixels(ours.to_hf(), image))


@pytest.mark.parametrize("crop", [(32, 32), (31, 44), (60, 61), (300, 301)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_torchvision_crop_and_padding(size: tuple[int, int], crop: tuple[int, int]) -> None:
    image = Image.fromarray(picture(*size))
    processor = ImageProcessor(None, crop=crop, crop_rounding="half_even")
    assert np.array_equal(processor(image), torchvision_pixels(image, None, crop, (0.5,) * 3, (0.5,) * 3))


def test_the_two_crops_do_differ() -> None:
    """Otherwise the field would be idle: at 11 spare pixels one starts at 5, the other at 6."""
    image = Image.fromarray(picture(43, 43))
    floor, half_even = (ImageProcessor(None, crop=(32, 32), crop_rounding=way) for way in ("floor", "half_even"))
    assert np.array_equal(half_even(image)[0, :-1, :-1], floor(image)[0, 1:, 1:])


# --- files -----------------------------------------------------------------------------------------------------------


def stored(mode: str, form: str, **options: Any) -> bytes:
    image = Image.fromarray(picture(20, 31)).convert("RGB")
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(picture(20, 31, 1, seed=1)[..., 0]))
    buffer = io.BytesIO()
    (image.quantize(16) if mode == "P" else image.convert(mode)).save(buffer, form, **options)
    return buffer.getvalue()


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
FILES = {
    "rgb": stored("RGB", "PNG"),
    "jpeg": stored("RGB", "JPEG"),
    "rotated jpeg": stored("RGB", "JPEG", exif=ROTATED),
    "rotated grey png": stored("L", "PNG", exif=ROTATED),
    "cmyk jpeg": stored("CMYK", "JPEG"),
    "cmyk tiff": stored("CMYK", "TIFF"),
    "palette": stored("P", "PNG"),
    "palette, one transparent": stored("P", "PNG", transparency=3),
    "gif, one transparent": stored("P", "GIF", transparency=3),
    "grey with alpha": stored("LA", "PNG"),
    "rgb with alpha": stored("RGBA", "PNG"),
    "webp with alpha": stored("RGBA", "WEBP", lossless=True),
    "one bit": stored("1", "PNG"),
    "grey": stored("L", "PNG"),
    "ycbcr tiff": stored("YCbCr", "TIFF"),
    "bmp": stored("RGB", "BMP"),
    "jpeg 2000": stored("RGB", "JPEG2000"),
    "avif": stored("RGB", "AVIF"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_open_as_in_transformers(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES[kind])
    with Image.open(path) as image:  # opened here, as load_image would leave the file to the garbage collector
        expected = load_image(image)
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(expected))
    config = {"size": 16, "resample": 2}
    assert np.array_equal(ImageProcessor.from_hf(config)(path), transformers_pixels(config, expected))
