"""Resizing and sliding are Pillow's to the last bit, by the compiled loops and without them."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image

from beit_jax.train.augmentation import resample as module
from beit_jax.train.augmentation.resample import Filter, Resampling, resized, slide

kernels = pytest.importorskip("beit_jax.train.augmentation.kernels", reason="Numba is not installed")

BILINEAR, BICUBIC, LANCZOS = (Image.Resampling[name] for name in ("BILINEAR", "BICUBIC", "LANCZOS"))
FILL = (1, 128, 254)


def noise(height: int, width: int, seed: int = 0, *, flat: bool = False) -> np.ndarray:
    """Levels at random; `flat`: the two extreme ones only, where sums overshoot and rounding would show."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return np.where(pixels < 128, np.uint8(0), np.uint8(255)) if flat else pixels


@pytest.fixture
def only_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of any size take the compiled loops, and Pillow is an error once they have been compared with it."""
    assert module._kernels() is kernels
    monkeypatch.setattr(module, "WORTHWHILE", 0)
    monkeypatch.setattr(module, "_pillows_slide", lambda *_: pytest.fail("Pillow was asked"))
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("Pillow was asked"))


sides = st.integers(1, 150)


@settings(max_examples=300)
@given(data=st.data(), image=st.tuples(sides, sides), size=st.tuples(sides, sides), seed=st.integers(0, 9))
def test_resizing_is_pillows(data: st.DataObject, image: tuple[int, int], size: tuple[int, int], seed: int) -> None:
    (rows, columns), (height, width) = image, size
    left, top = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, rows - 1))
    box = (left, top, data.draw(st.integers(left + 1, columns)), data.draw(st.integers(top + 1, rows)))
    resample, reach = data.draw(st.sampled_from([(BILINEAR, 1.0), (BICUBIC, 2.0)]))
    pixels = noise(rows, columns, seed, flat=data.draw(st.booleans()))
    expected = Image.fromarray(pixels).crop(box).resize((width, height), resample)
    assert_array_equal(kernels.resize(module._read_only(pixels), box, size, reach), expected)


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC, LANCZOS])
@pytest.mark.parametrize(
    "box", [(0, 0, 500, 375), (13, 70, 203, 371), (100, 5, 450, 40), (7, 7, 8, 8), (20, 30, 244, 254)]
)
def test_crops_of_training_images(box: module.Box, resample: Filter) -> None:
    for pixels in (noise(375, 500), noise(375, 500)[:, ::-1]):  # mirrored: not in one piece
        expected = np.asarray(Image.fromarray(pixels).crop(box).resize((224, 208), resample))
        assert_array_equal(resized(pixels, box, (208, 224), resample), expected)


@pytest.mark.usefixtures("only_loops")
def test_large_images_take_the_loops() -> None:
    assert resized(noise(20, 30), (1, 2, 20, 20), (8, 9), BICUBIC).shape == (8, 9, 3)
    assert slide(Image.fromarray(noise(20, 30)), "x", 0.1, 0.0, BICUBIC, FILL).size == (30, 20)


slopes = st.floats(-0.3, 0.3) | st.sampled_from([0.0, 0.24, -0.24, 0.25, 0.27, -0.27, 0.12, 1e-9, -1e-17])
shifts = st.floats(-70, 70) | st.sampled_from([0.0, 0.5, -0.5, 1.0, 20.16, 90.72, 64.0, 1e-15])


def pillows(image: Image.Image, axis: str, slope: float, shift: float, resample: Resampling) -> Image.Image:
    coefficients = (1, slope, shift, 0, 1, 0) if axis == "x" else (1, 0, 0, slope, 1, shift)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample, fillcolor=FILL)


@given(
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    slope=slopes,
    shift=shifts,
    seed=st.integers(0, 9),
    flat=st.booleans(),
    resample=st.sampled_from([BICUBIC, BILINEAR]),
)
def test_sliding_is_pillows_affine_transform(
    size: tuple[int, int], slope: float, shift: float, seed: int, flat: bool, resample: Resampling
) -> None:
    image = Image.fromarray(noise(*size, seed, flat=flat))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORTHWHILE", 0)
        for axis in ("x", "y"):
            expected = pillows(image, axis, slope, shift, resample)
            assert_array_equal(slide(image, axis, slope, shift, resample, FILL), expected)


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize(("slope", "shift"), [(0.27, 0.0), (-0.2713, 3.3), (0.0, 90.72), (0.0, -100.8), (0.1, 300.0)])
def test_sliding_at_full_size(
    axis: Literal["x", "y"], slope: float, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(noise(64, 64)).resize((224, 224), Image.Resampling.NEAREST)
    expected = pillows(image, axis, slope, shift, BICUBIC)
    monkeypatch.setattr(module, "_pillows_slide", lambda *_: pytest.fail("Pillow was asked"))
    assert_array_equal(slide(image, axis, slope, shift, BICUBIC, FILL), expected)


@pytest.mark.parametrize("slope", [0.144, 0.288, -0.272])
def test_rows_that_rounding_tears_apart(slope: float) -> None:
    """A row lands on whole pixels but for the last bit, which columns far to the right no longer hold."""
    image = Image.fromarray(noise(224, 224))
    assert kernels.slide(module._read_only(np.asarray(image)), slope, 0.0, FILL)[1]
    assert_array_equal(slide(image, "x", slope, 0.0, BICUBIC, FILL), pillows(image, "x", slope, 0.0, BICUBIC))


def both() -> tuple[np.ndarray, np.ndarray]:
    pixels = noise(140, 120)
    return resized(pixels, (3, 4, 111, 133), (96, 96), BICUBIC), np.asarray(
        slide(Image.fromarray(pixels), "y", 0.2, 1.7, BICUBIC, FILL)
    )


def test_without_numba_it_is_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = both()
    monkeypatch.setattr(module, "_kernels", module._kernels.__wrapped__)
    monkeypatch.setitem(sys.modules, "beit_jax.train.augmentation.kernels", None)
    monkeypatch.delattr("beit_jax.train.augmentation.kernels")
    assert module._kernels() is None
    for found, wanted in zip(both(), expected, strict=True):
        assert_array_equal(found, wanted)


@pytest.mark.parametrize("which", ["resize", "slide"])
def test_another_pillow_is_not_replaced(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One level of one pixel differs."""
    correct = getattr(kernels, which)

    def differs(*arguments: object) -> object:
        found = correct(*arguments)
        (found if which == "resize" else found[0])[-1, -1, -1] ^= 1
        return found

    assert module._agree(kernels)
    monkeypatch.setattr(kernels, which, differs)
    assert not module._agree(kernels)


def test_small_images_do_not_load_numba() -> None:
    check = (
        "import sys, numpy as np; from beit_jax.train.augmentation.classification import train_transform;"
        "from beit_jax.train.recipe import AugmentOptions;"
        "transform = train_transform(AugmentOptions(), (64, 64), (0.5, 0.5, 0.5));"
        "[transform(np.zeros((80, 90, 3), np.uint8), np.random.default_rng(i)) for i in range(20)];"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_threads_share_the_loops() -> None:
    pixels = noise(150, 160)
    boxes = [(i, i, 160 - i, 150 - 2 * i) for i in range(40)]
    expected = [resized(pixels, box, (100, 110), BICUBIC) for box in boxes]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda box: resized(pixels, box, (100, 110), BICUBIC), boxes))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_loops_are_compiled_where_they_cannot_be_kept() -> None:
    """Neither the package nor the user's cache can be written, as in some containers."""
    script = (
        "from numba.core import caching; caching.CompileResultCacheImpl._locator_classes = []\n"
        "from beit_jax.train.augmentation import resample; assert resample._kernels() is not None"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
