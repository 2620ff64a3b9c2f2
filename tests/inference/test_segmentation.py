"""Inference on images of any size against a plain accumulation over windows, one after the other."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from forward import logits as logits_by
from PIL import Image

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor, Within, ade20k_processor
from beit_jax.images.label_maps import read_label_map, reduce_labels, resize_labels, write_label_map
from beit_jax.inference import segmentation as inference
from beit_jax.inference.segmentation import Inference, class_logits, class_probabilities, segment
from beit_jax.looking.pictures import areas, overlay, palette
from beit_jax.models.build import build_model, param_shapes
from beit_jax.tree import unflatten

CONFIG = BeitConfig(
    task="semantic_segmentation",
    image_size=(32, 32),
    patch_size=(8, 8),
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=24,
    position_bias="per_layer",
    labels=("wall", "floor", "tree", "sky", "car"),
    out_indices=(0, 1, 2, 3),
    auxiliary_channels=8,
)
AS_IS = ImageProcessor(resize=None)
WINDOWS = [(20, 24), (32, 32), (32, 50), (50, 75), (20, 100), (33, 160), (100, 21)]


@pytest.fixture(scope="module")
def model() -> Any:
    rng = np.random.default_rng(0)
    params = {
        name: np.abs(rng.standard_normal(shape)) + 0.5 if name.endswith("/var") else rng.standard_normal(shape) * 0.3
        for name, shape in param_shapes(CONFIG).items()
    }
    return build_model(CONFIG, unflatten({name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def resized(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, classes] by torch."""
    channels_first = torch.from_numpy(np.ascontiguousarray(logits.transpose(2, 0, 1)))[None]
    found = torch.nn.functional.interpolate(channels_first, size=size, mode="bilinear", align_corners=False)
    return found[0].numpy().transpose(1, 2, 0)


def accumulated(model: Any, pixels: np.ndarray, size: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    """Sliding windows as mmseg's ``slide_inference`` describes them, with images below the window padded by zeros."""
    height, width = pixels.shape[:2]
    total, count = np.zeros((height, width, 5)), np.zeros((height, width, 1))
    rows, columns = (
        max(side - 32 + step - 1, 0) // step + 1 for side, step in zip((height, width), stride, strict=True)
    )
    for i, j in product(range(rows), range(columns)):
        bottom, right = min(i * stride[0] + 32, height), min(j * stride[1] + 32, width)
        top, left = max(bottom - 32, 0), max(right - 32, 0)
        window = np.zeros((32, 32, 3), np.float32)
        window[: bottom - top, : right - left] = pixels[top:bottom, left:right]
        logits = resized(logits_by(model, window[None])[0], (32, 32))
        total[top:bottom, left:right] += logits[: bottom - top, : right - left]
        count[top:bottom, left:right] += 1
    return resized((total / count).astype(np.float32), size)


@pytest.mark.parametrize("size", WINDOWS, ids=str)
def test_sliding_equals_accumulation(model: Any, size: tuple[int, int]) -> None:
    image = picture(*size)
    found = class_logits(model, AS_IS, image)
    expected = accumulated(model, AS_IS(image)[0], size, (21, 21))
    assert found.shape == (*size, 5) and found.std() > 0.1
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    clear = np.sort(expected, axis=-1)
    clear = clear[..., -1] - clear[..., -2] > 1e-4
    assert np.array_equal(segment(model, AS_IS, image)[clear], expected.argmax(axis=-1)[clear])


def test_the_result_is_resized_to_the_image(model: Any) -> None:
    """Proportions kept, 45 x 200 becomes 29 x 128: below the window in height, and four times as wide as it."""
    processor, image = ade20k_processor(32), picture(45, 200)
    pixels = processor(image)[0]
    assert pixels.shape == (29, 128, 3)
    expected = accumulated(model, pixels, (45, 200), (21, 21))
    assert np.abs(class_logits(model, processor, image) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("stride", [(32, 32), (8, 16)])
def test_strides(model: Any, stride: tuple[int, int]) -> None:
    image = picture(50, 75)
    expected = accumulated(model, AS_IS(image)[0], (50, 75), stride)
    found = class_logits(model, AS_IS, image, Inference(stride=stride))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_whole_image_at_the_native_size_and_at_others(model: Any) -> None:
    squash = ImageProcessor(resize=(32, 32))
    image = picture(70, 45)
    expected = resized(resized(logits_by(model, squash(image))[0], (32, 32)), (70, 45))
    assert np.abs(class_logits(model, squash, image) - expected).max() <= 1e-5 * np.abs(expected).max()
    pixels = np.zeros((64, 64, 3), np.float32)  # whole, 40 x 60: padded to multiples of four patches
    pixels[:40, :60] = AS_IS(picture(40, 60))[0]
    expected = resized(logits_by(model, pixels[None])[0], (64, 64))[:40, :60]
    found = class_logits(model, AS_IS, picture(40, 60), Inference("whole"))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_scales_and_flips_average_probabilities(model: Any) -> None:
    image, how = picture(40, 60), Inference(scales=(0.5, 1.0, 1.5), flip=True)
    views = [
        ((32, 48), False),
        ((32, 48), True),
        ((32, 48), False),
        ((32, 48), True),
        ((48, 72), False),
        ((48, 72), True),
    ]
    expected = np.zeros((40, 60, 5))
    for size, flip in views:
        pixels = replace(ade20k_processor(32), resize=size)(image)[0]
        pixels = pixels[:, ::-1] if flip else pixels
        logits = accumulated(model, pixels, (40, 60), (21, 21))
        probabilities = np.asarray(jax.nn.softmax(logits[:, ::-1] if flip else logits, axis=-1))
        expected += probabilities / len(views)
    found = class_probabilities(model, ade20k_processor(32), image, how)
    assert np.abs(found - expected).max() <= 1e-5
    assert np.array_equal(segment(model, ade20k_processor(32), image, how), found.argmax(axis=-1))


def test_batches_of_windows_do_not_matter_and_compile_once(model: Any) -> None:
    image = picture(50, 75)
    one, many = (class_logits(model, AS_IS, image, Inference(batch_size=size)) for size in (1, 4))
    assert np.allclose(one, many, atol=1e-5 * np.abs(one).max())
    before = inference._forward._cache_size()
    for size in ((60, 40), (100, 33), (41, 200)):
        segment(model, AS_IS, picture(*size), Inference(batch_size=4))
    assert inference._forward._cache_size() == before


@pytest.mark.parametrize(
    ("how", "message"),
    [({"scales": ()}, "scales"), ({"scales": (0.0,)}, "scales"), ({"stride": (0, 1)}, "stride"),
     ({"batch_size": 0}, "batch size")],
)  # fmt: skip
def test_wrong_options(how: dict[str, Any], message: str) -> None:
    with pytest.raises(BeitJaxError, match=message):
        Inference(**how)


def test_wrong_models_and_processors(model: Any) -> None:
    with pytest.raises(BeitJaxError, match="several scales"):
        class_logits(model, AS_IS, picture(32, 32), Inference(flip=True))
    with pytest.raises(BeitJaxError, match="crops"):
        segment(model, ImageProcessor(crop=(16, 16)), picture(32, 32))
    with pytest.raises(BeitJaxError, match="scales need an image processor that resizes"):
        segment(model, AS_IS, picture(32, 32), Inference(scales=(2.0,)))
    with pytest.raises(BeitJaxError, match=r"stride \(40, 8\): expected at most the window \(32, 32\)"):
        segment(model, AS_IS, picture(32, 32), Inference(stride=(40, 8)))
    with pytest.raises(BeitJaxError, match="does not segment"):
        segment(model.beit, AS_IS, picture(32, 32))


# --- images as trained, label maps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (640, 853)), ((2048, 400), (2560, 500)), ((400, 2048), (500, 2560)), ((683, 512), (854, 640)),
     ((1, 10_000), (1, 2560))],
)  # fmt: skip
def test_proportions_are_kept_as_mmcv_rounds(size: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = ade20k_processor()(np.zeros((*size, 3), np.uint8))
    assert pixels.shape == (1, *expected, 3)


def test_pixels_as_trained() -> None:
    """Sampled bilinearly without averaging; mean and deviation as mmseg writes them, in levels."""
    image = picture(50, 70)
    found = ade20k_processor(20)(image)[0]
    channels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None].float()
    levels = torch.nn.functional.interpolate(channels, size=(20, 28), mode="bilinear", align_corners=False)
    levels = np.floor(levels[0].numpy().transpose(1, 2, 0) + 0.5)
    expected = (levels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    assert np.abs(found - expected).max() <= 1e-6
    greyscale = replace(ade20k_processor(20), num_channels=1, mean=(0.5,), std=(0.5,))
    assert greyscale(image).shape == (1, 20, 28, 1)


def test_the_processor_survives_its_file() -> None:
    processor = ade20k_processor(512)
    assert ImageProcessor.from_hf(processor.to_hf()) == processor
    assert processor.describe().startswith("resize within 512x2048 bilinear (sampled)")
    for size in (64, {"height": 64, "width": 64}):
        with pytest.raises(BeitJaxError, match="max_longest_edge is 256, expected an int, with a size of"):
            ImageProcessor.from_hf({"size": size, "max_longest_edge": 256})
    with pytest.raises(BeitJaxError, match="max_longest_edge is 'long'"):
        ImageProcessor.from_hf({"size": {"shortest_edge": 64}, "max_longest_edge": "long"})
    for change in ({"resize": Within(0, 5)}, {"resize": Within(9, 5)}, {"resample": "bicubic"}):
        with pytest.raises(BeitJaxError):
            replace(processor, **change)


def test_labels_are_reduced_and_resized_without_new_classes() -> None:
    labels = np.array([[0, 1, 150, 255], [2, 0, 3, 3]], np.int32)
    reduced = reduce_labels(labels)
    assert reduced.tolist() == [[255, 0, 149, 255], [1, 255, 2, 2]]
    rng = np.random.default_rng(0)
    large = rng.integers(0, 5, (37, 53)).astype(np.int32) * 50
    found = resize_labels(large, (20, 80))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(large)[None, None].float(), size=(20, 80), mode="nearest"
    )
    assert np.array_equal(found, expected[0, 0].numpy())


def test_label_maps_keep_their_numbers_in_files(tmp_path: Path) -> None:
    for values, name in ((np.arange(256), "eight"), (np.array([0, 300, 65535, 1]), "sixteen")):
        labels = values.reshape(2, -1).astype(np.int32)
        write_label_map(labels, tmp_path / name)
        assert np.array_equal(read_label_map(tmp_path / name), labels)
    indexed = Image.new("P", (2, 2))
    indexed.putdata([0, 2, 1, 2])
    indexed.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    indexed.save(tmp_path / "indexed.png")
    assert read_label_map(tmp_path / "indexed.png").tolist() == [[0, 2], [1, 2]]


def test_palette_and_legend() -> None:
    assert len({tuple(colour) for colour in palette(150)}) == 150
    assert np.array_equal(palette(150)[:10], palette(10))
    labels = np.zeros((60, 80), np.int32)
    labels[:15] = 2
    labels[:, :8] = 255
    found = areas(labels, CONFIG.labels)
    assert [(area.label, area.share) for area in found] == [("wall", 0.675), ("tree", 0.225)]
    image = picture(60, 80)
    drawn = np.asarray(overlay(image, labels, CONFIG.labels, opacity=1.0))
    assert np.array_equal(drawn[20:60, 8:80], np.broadcast_to(palette(5)[0], (40, 72, 3)))
    assert np.array_equal(drawn[:60, :8], np.asarray(image)[:, :8])  # ignored pixels stay
    assert drawn.shape[1] > 100 and (drawn[:, 80:] < 128).any()  # a legend, with text in it
