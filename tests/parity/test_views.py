"""Views of pre-training images against torchvision's functions, which are what the original calls, on PIL images.

Run with ``pytest -m timm`` where timm is installed; it needs torchvision, which needs its own build of torch.
"""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from scipy import stats

from beit_jax.train.augmentation.classification import Draws
from beit_jax.train.augmentation.views import ViewsTransform
from beit_jax.train.recipe import AugmentOptions

pytest.importorskip("timm", reason="timm is not installed; see pyproject.toml, extra timm")
torch = pytest.importorskip("torch")
transforms = pytest.importorskip("torchvision.transforms")

from torchvision.transforms import InterpolationMode, functional  # noqa: E402

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings("ignore")]  # the reference warns of its own code

LIKELY = 1e-3  # p-value below which draws of a fixed seed would not be of one law
MODES = {
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
    Image.Resampling.LANCZOS: InterpolationMode.LANCZOS,
}
ADJUST = {
    "Brightness": functional.adjust_brightness,
    "Contrast": functional.adjust_contrast,
    "Color": functional.adjust_saturation,
}


def picture(width: int, height: int) -> Image.Image:
    """Slopes, edges, saturated areas and noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 7 + columns / 11), np.cos(columns / 5), np.sin(rows * columns / 300)], axis=-1)
    pixels = 128 + 110 * waves + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, : width // 2] = (255, 0, 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def reference(image: Image.Image, draws: Draws, transform: ViewsTransform) -> dict[str, np.ndarray]:
    """Jitter, flip, then both views of one crop, as beit/datasets.py chains them, given what was drawn."""
    for operation in draws.operations:
        image = ADJUST[operation.name](image, operation.argument)
    if draws.flip:
        image = functional.hflip(image)
    left, top, right, bottom = draws.box
    box = (top, left, bottom - top, right - left)
    views = {"image": functional.resized_crop(image, *box, list(transform.size), MODES[draws.resample])}
    if transform.token_size is not None:
        mode = InterpolationMode(transform.token_interpolation)
        views["token_image"] = functional.resized_crop(image, *box, list(transform.token_size), mode)
    return {name: np.asarray(view) for name, view in views.items()}


@pytest.mark.parametrize("token_interpolation", ["bicubic", "lanczos"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "random"])
def test_the_same_draws_give_the_same_pixels(interpolation: Any, token_interpolation: Any) -> None:
    options = AugmentOptions(randaugment=None, color_jitter=0.4, interpolation=interpolation)
    transform = ViewsTransform(options, (64, 48), (32, 24), token_interpolation, None)
    flips = set()
    for size in ((130, 97), (40, 61), (9, 200)):
        image = picture(*size)
        for seed in range(20):
            draws = transform.draw(size, np.random.default_rng(seed))
            views, expected = transform(image, np.random.default_rng(seed)), reference(image, draws, transform)
            assert set(views) == set(expected)
            for name, view in views.items():
                assert_array_equal(view, expected[name])
            flips.add(draws.flip)
    assert flips == {False, True}


def test_published_sizes() -> None:
    """BEiT's 224 bicubic beside 112 Lanczos."""
    options = AugmentOptions(randaugment=None, color_jitter=0.4)
    transform, image = ViewsTransform(options, (224, 224), (112, 112), "lanczos", None), picture(500, 375)
    for seed in range(6):
        draws = transform.draw(image.size, np.random.default_rng(seed))
        for name, view in reference(image, draws, transform).items():
            assert_array_equal(transform.apply(image, draws)[name], view)


def test_jitter_flip_and_crop_are_drawn_alike() -> None:
    count, size = 3000, (500, 375)
    options = AugmentOptions(randaugment=None, color_jitter=0.4)
    transform, rng = ViewsTransform(options, (224, 224), None, "lanczos", None), np.random.default_rng(0)
    ours = [transform.draw(size, rng) for _ in range(count)]
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
    drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(count)]
    for number, name in enumerate(ADJUST):
        factors = [operation.argument for draws in ours for operation in draws.operations if operation.name == name]
        assert stats.ks_2samp(factors, [params[1 + number] for params in drawn]).pvalue > LIKELY, name
    firsts = [[draws.operations[0].name for draws in ours].count(name) for name in ADJUST]
    theirs = [[next(i for i in params[0].tolist() if i < 3) for params in drawn].count(number) for number in range(3)]
    assert stats.chi2_contingency([firsts, theirs]).pvalue > LIKELY
    crop = transforms.RandomResizedCrop(224)  # scale and ratio by default those of the original
    image = Image.new("RGB", size)
    boxes = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(count)])
    left, top, right, bottom = np.array([draws.box for draws in ours]).T
    for number, values in enumerate((top, left, bottom - top, right - left)):
        assert stats.ks_2samp(values, boxes[:, number]).pvalue > LIKELY, number
    assert stats.binomtest(sum(draws.flip for draws in ours), count).pvalue > LIKELY
