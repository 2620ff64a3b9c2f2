"""`pixel_values` of images of any number of channels and any type, against Pillow band by band and against NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.images import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, preset
from beit_jax.images.preprocessor_config import RESAMPLES

RNG = np.random.default_rng(0)
SCALES = {"uint8": 255, "uint16": 65535, "int16": 32767, "float32": 1}


def image(channels: int, dtype: str, size: tuple[int, int] = (30, 44)) -> np.ndarray:
    if dtype == "float32":
        return RNG.standard_normal((*size, channels)).astype(np.float32)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, (*size, channels), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_every_channel_is_resized_as_pillow_does_and_scaled_by_its_type(channels: int, dtype: str) -> None:
    mean, std = tuple(RNG.uniform(0, 1, channels)), tuple(RNG.uniform(0.1, 1, channels))
    pixels = image(channels, dtype)
    for resample in RESAMPLES:
        processor = ImageProcessor((17, 50), resample, mean=mean, std=std, num_channels=channels)
        planes = []
        for band in np.moveaxis(pixels, -1, 0):
            plane = Image.fromarray(band if dtype == "uint8" else band.astype(np.float32))
            planes.append(np.asarray(plane.resize((50, 17), Image.Resampling[resample.upper()]), np.float64))
        expected = (np.stack(planes, axis=-1) / SCALES[dtype] - mean) / std
        found = processor(pixels)
        assert found.shape == (1, 17, 50, channels) and found.dtype == np.float32
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=2e-6)


def test_eight_bit_bands_become_what_they_are_as_rgb() -> None:
    pixels = image(3, "uint8")
    mean, std = (0.485, 0.456, 0.406, 0.485), (0.229, 0.224, 0.225, 0.229)
    four = preset("unilm_eval", 24, mean=mean, std=std)(np.dstack([pixels, pixels[..., :1]]))
    three = preset("unilm_eval", 24, mean=mean[:3], std=std[:3])(pixels)
    assert np.array_equal(four[..., :3], three) and np.array_equal(four[..., 3], three[..., 0])


def test_a_factor_is_taken_as_it_is_and_so_are_raw_values() -> None:
    pixels = image(4, "uint16")
    for factor, scale in ((1 / 10000, 1 / 10000), (None, 1.0), (1 / 255, 1 / 65535)):
        processor = ImageProcessor(None, mean=None, std=None, num_channels=4, rescale_factor=factor)
        np.testing.assert_allclose(processor(pixels)[0], pixels * scale, rtol=1e-6)


def test_crop_pads_and_cuts_every_channel() -> None:
    pixels = image(4, "int16", (6, 9))
    found = ImageProcessor(None, crop=(8, 5), mean=None, std=None, num_channels=4, rescale_factor=None)(pixels)[0]
    assert np.array_equal(found, np.pad(pixels[:, 2:7], ((1, 1), (0, 0), (0, 0))))


def test_files_and_selected_bands(tmp_path: Path) -> None:
    pixels = image(5, "uint16")
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", planarconfig="contig")
    np.save(tmp_path / "x.npy", np.moveaxis(pixels, -1, 0))
    processor = ImageProcessor((20, 20), mean=(0.2, 0.4), std=(0.1, 0.3), num_channels=2, bands=(4, 2))
    expected = ImageProcessor((20, 20), mean=(0.2, 0.4), std=(0.1, 0.3), num_channels=2)(pixels[..., [3, 1]])
    assert np.array_equal(processor([tmp_path / "x.tif", tmp_path / "x.npy"]), np.repeat(expected, 2, axis=0))
    assert np.array_equal(processor(pixels), expected)
    written = json.loads(json.dumps(processor.to_hf()))
    assert written["bands"] == [4, 2] and ImageProcessor.from_hf(written) == processor
    assert processor.describe().startswith("bands 4 2, resize 20x20")
    with pytest.raises(BeitJaxError, match=r"x.tif: 5 bands \(uint16\), the model takes 3"):
        preset("hf")(tmp_path / "x.tif")


def test_sixteen_bit_colours_of_tiff_keep_their_bits_for_a_model_of_rgb(tmp_path: Path) -> None:
    pixels = image(3, "uint16")
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb")
    found = ImageProcessor(None, mean=None, std=None)(tmp_path / "x.tif")[0]
    np.testing.assert_allclose(found, pixels / 65535, rtol=1e-6)


def test_presets_follow_the_number_of_channels() -> None:
    average = (sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3)
    for name in ("hf", "unilm_eval", "timm"):
        four = preset(name, 32, mean=IMAGENET_MEAN, std=IMAGENET_STD, num_channels=4)
        assert (four.mean, four.std) == ((average[0],) * 4, (average[1],) * 4)
        assert four == preset(name, 32, mean=IMAGENET_MEAN, std=IMAGENET_STD).for_channels(4)
        assert four(image(4, "float32", (60, 60))).shape == (1, 32, 32, 4)
    chosen = preset("hf", mean=IMAGENET_MEAN, std=IMAGENET_STD).for_channels(4, (0, 1, 2, 0))
    assert chosen.mean == (0.485, 0.456, 0.406, 0.485)
