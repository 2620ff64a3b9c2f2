"""Data sets whose images have any number of bands: read, augmented and normalised, against NumPy and the RGB path."""

import io
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor
from beit_jax.train.augmentation.classification import check_colours, train_transform
from beit_jax.train.augmentation.decode import RGB, Reading
from beit_jax.train.augmentation.mixing import erase, mix, normalise
from beit_jax.train.augmentation.views import ViewsTransform
from beit_jax.train.data.batches import train_batches
from beit_jax.train.data.datasets import open_dataset
from beit_jax.train.data.evaluation_batches import eval_batches
from beit_jax.train.data.prepare import prepare_images
from beit_jax.train.recipe import AugmentOptions, CropOptions, DataOptions

RNG = np.random.default_rng(0)
PLAIN = AugmentOptions(randaugment=None)


def tiff(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig")
    return file.getvalue()


def npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


SIXTEEN = RNG.integers(0, 65536, (30, 40, 5), dtype=np.uint16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of five bands, 16-bit TIFF files and arrays."""
    root = tmp_path_factory.mktemp("bands")
    (root / "images").mkdir()
    for number in range(12):
        content = npy(SIXTEEN + number) if number % 2 else tiff(SIXTEEN + number)
        (root / "images" / f"{number:02}.{'npy' if number % 2 else 'tif'}").write_bytes(content)
    (root / "images" / "broken.tif").write_bytes(tiff(SIXTEEN)[:-9])
    with pytest.raises(BeitJaxError, match=r"broken\.tif: damaged or truncated"):
        prepare_images(root / "images", root / "data")
    assert not (root / "data").exists()
    (root / "images" / "broken.tif").unlink()
    prepare_images(root / "images", root / "data")
    return root / "data"


def test_values_are_scaled_by_type_or_by_an_option(prepared: Path) -> None:
    images = open_dataset(prepared, "train")
    assert images[0]["image"] == tiff(SIXTEEN), "a record holds the file as it is"
    for reading, expected in (
        (Reading(5, dtype="float32"), SIXTEEN / 65535),
        (Reading(2, bands=(5, 2), dtype="float32", scale=10000), SIXTEEN[..., [4, 1]] / 10000),
    ):
        for index in (0, 1):
            found, _ = replace(images, reading=reading).load(index)
            assert found.dtype == np.float32
            assert_allclose(found, expected + index / (reading.scale or 65535), rtol=0, atol=1e-6 * expected.max())
    with pytest.raises(BeitJaxError, match="5 bands"):
        images.load(0)
    with pytest.raises(BeitJaxError, match=r"expected 8 bits; --data\.pixels float32"):
        replace(images, reading=Reading(5)).load(0)


def test_pictures_are_read_as_ever() -> None:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8)).save(file, "PNG")
    rgb = RGB(file.getvalue(), "x")
    assert rgb.dtype == np.uint8
    assert np.array_equal(Reading(4, bands=(1, 2, 3, 1))(file.getvalue(), "x"), rgb[..., [0, 1, 2, 0]])
    assert_allclose(Reading(dtype="float32")(file.getvalue(), "x"), rgb / 255, rtol=1e-6)


@pytest.mark.parametrize("side", [32, 112])  # below and above the size from which Numba computes RGB
def test_other_bands_are_cropped_as_rgb(side: int) -> None:
    rgb = RNG.integers(90, 160, (150, 130, 3), np.uint8)  # Pillow clips 8-bit values between its two passes
    options = replace(PLAIN, interpolation="random")
    for seed in range(8):
        crop = train_transform(options, (side, side), (0.5, 0.5, 0.5))
        three = crop(rgb, np.random.default_rng(seed))
        seven = crop(rgb[..., [0, 1, 2, 2, 1, 0, 0]], np.random.default_rng(seed))
        floats = crop(rgb.astype(np.float32)[..., :2], np.random.default_rng(seed))
        assert np.array_equal(seven, three[..., [0, 1, 2, 2, 1, 0, 0]])
        assert floats.dtype == np.float32 and np.abs(np.clip(floats, 0, 255) - three[..., :2]).max() <= 1.2
    views = ViewsTransform(CropOptions(), (side, side), (16, 16), "lanczos", None)
    three, five = (views(image, np.random.default_rng(1)) for image in (rgb, rgb[..., [0, 1, 2, 0, 1]]))
    for name in ("image", "token_image"):
        assert np.array_equal(five[name], three[name][..., [0, 1, 2, 0, 1]])


def test_batches_for_training_and_evaluation(prepared: Path) -> None:
    images = replace(open_dataset(prepared, "train"), reading=Reading(5, dtype="float32"))
    options = DataOptions(batch_size=6, workers=0)
    with train_batches(images, options, train_transform(PLAIN, (16, 16), ()), seed=0, start_step=0) as batches:
        batch = next(batches)
    assert batch["image"].shape == (6, 16, 16, 5) and batch["image"].dtype == np.float32
    assert 0.3 < batch["image"].mean() < 0.7
    processor = ImageProcessor((16, 16), mean=(0.2, 0.4), std=(0.1, 0.3), num_channels=2, bands=(5, 1))
    (found,) = eval_batches(images, processor, 12, workers=0)
    expected = processor([SIXTEEN + number for number in range(12)])
    assert np.array_equal(found["image"], expected)


def test_pixels_are_normalised_by_type_and_channel() -> None:
    data = DataOptions(mean=(0.1, 0.2, 0.3, 0.4), std=(1.0, 2.0, 3.0, 4.0))
    eight = jnp.asarray(RNG.integers(0, 256, (2, 3, 3, 4), np.uint8))
    values, mean, std = np.asarray(eight), np.array(data.mean), np.array(data.std)
    expected = (values / 255 - mean) / std
    assert_allclose(normalise(eight, data), expected, atol=1e-6)
    assert_allclose(normalise(jnp.asarray(values / 255, jnp.float32), data), expected, atol=1e-6)
    assert_allclose(normalise(eight, replace(data, scale=10.0)), (values / 10 - mean) / std, atol=1e-5)
    average = np.mean([0.485, 0.456, 0.406]), np.mean([0.229, 0.224, 0.225])
    assert_allclose(normalise(eight, "imagenet"), (values / 255 - average[0]) / average[1], atol=1e-5)
    with pytest.raises(BeitJaxError, match=r"--data\.mean: expected 1 number or 3, one for each channel, found 4"):
        normalise(eight[..., :3], data)


def test_erasing_and_mixing_take_every_channel() -> None:
    images = jnp.zeros((4, 32, 32, 6))
    erased = np.asarray(erase(jax.random.key(0), images, 1.0))
    assert ((erased != 0).all(axis=-1) == (erased != 0).any(axis=-1)).all() and (erased != 0).any()
    images = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], images.shape)
    options = replace(PLAIN, mixup=0.8, cutmix=1.0)
    for seed in range(4):
        mixed = np.asarray(mix(jax.random.key(seed), images, jnp.eye(4), options)[0])
        assert (mixed == mixed[..., :1]).all() and mixed.shape == images.shape


def test_changes_of_colours_are_refused_by_name() -> None:
    check_colours(AugmentOptions(color_jitter=0.4), 3, "uint8")
    check_colours(PLAIN, 4, "float32")
    for options, channels, pixels, expected in (
        (AugmentOptions(), 4, "uint8", "RandAugment: .* pass --augment.randaugment None$"),
        (CropOptions(color_jitter=0.3), 1, "float32", "colour jitter: .* pass --augment.color-jitter 0$"),
        (
            AugmentOptions(color_jitter=0.3),
            3,
            "float32",
            "RandAugment and colour jitter: .* found 3 channels of float32",
        ),
    ):
        with pytest.raises(BeitJaxError, match=expected):
            check_colours(options, channels, pixels)  # type: ignore[arg-type]
