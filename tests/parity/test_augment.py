"""Training images against timm and torchvision: the same pixels from the same draws, and draws from the same laws.

Run with ``pytest -m timm`` where timm is installed; it needs torchvision, which needs its own build of torch.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy import stats

from beit_jax.train.augmentation import mixing
from beit_jax.train.augmentation.classification import Draws, draw_box, train_transform
from beit_jax.train.augmentation.mixing import (
    Mixing,
    apply_mixing,
    cut_box,
    draw_erasing,
    draw_mixing,
    normalise,
    soft_targets,
)
from beit_jax.train.augmentation.randaugment import OPERATIONS, Operation, RandAugment, argument, perform
from beit_jax.train.recipe import AugmentOptions

timm_data = pytest.importorskip("timm.data", reason="timm is not installed; see pyproject.toml, extra timm")
torch = pytest.importorskip("torch")

from timm.data import auto_augment, mixup, random_erasing, transforms  # noqa: E402
from torchvision.transforms import InterpolationMode, functional  # noqa: E402

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings("ignore")]  # the reference warns of its own code

LIKELY = 1e-3  # p-value below which draws of a fixed seed would not be of one law
ROUNDING = 1e-6  # of float32 numbers of magnitude 1
FILL = (124, 116, 104)
MEAN = (0.485, 0.456, 0.406)
MODES = {
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
}
WITHOUT_VARIANTS = {name for name in OPERATIONS if f"{name}Increasing" not in auto_augment.NAME_TO_OP}


def picture(width: int, height: int) -> Image.Image:
    """Slopes, edges, saturated areas and noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 7 + columns / 11), np.cos(columns / 5), np.sin(rows * columns / 300)], axis=-1)
    pixels = 128 + 110 * waves + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, : width // 2] = (255, 0, 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def timm_name(name: str, increasing: bool) -> str:
    return f"{name}Increasing" if increasing and name not in WITHOUT_VARIANTS else name


def timm_pixels(image: Image.Image, operation: Operation, increasing: bool) -> np.ndarray:
    """timm's function of the operation, given its argument."""
    function = auto_augment.NAME_TO_OP[timm_name(operation.name, increasing)]
    if operation.name == "Posterize" and operation.argument < 1:
        return np.zeros((image.height, image.width, 3), np.uint8)  # as before Pillow 13, which raises
    plain = operation.name in ("AutoContrast", "Equalize", "Invert")
    arguments = () if plain else (operation.argument,)
    return np.asarray(function(image, *arguments, fillcolor=FILL, resample=operation.resample))


# RandAugment


def test_the_operations_are_timms() -> None:
    assert list(OPERATIONS) == auto_augment._RAND_TRANSFORMS
    assert [timm_name(name, True) for name in OPERATIONS] == auto_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_level_gives_the_same_argument(name: str, increasing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    function = auto_augment.LEVEL_TO_ARG[timm_name(name, increasing)]
    for negative in (False, True):
        monkeypatch.setattr(auto_augment.random, "random", lambda negative=negative: float(negative))
        for level in np.linspace(0, 10, 401):
            expected = (0,) if function is None else function(level, {})
            assert (argument(name, level, negative, increasing=increasing),) == expected


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("resample", MODES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_argument_gives_the_same_pixels(name: str, resample: Any, increasing: bool) -> None:
    for image in (picture(50, 37), picture(64, 64)):
        for level in [*np.linspace(0, 10, 26), 9.3718, 8.0, 4.8]:
            for negative in (False, True):
                operation = Operation(name, argument(name, level, negative, increasing=increasing), resample)
                assert_array_equal(perform(image, operation, FILL), timm_pixels(image, operation, increasing))


@pytest.mark.parametrize(
    "name", ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Sharpness", "Equalize"]
)
def test_pixels_at_full_size(name: str) -> None:
    image = picture(224, 224)
    for level in (0.7, 4.8, 8.0, 9.0, 9.6, 10.0):
        for negative in (False, True):
            operation = Operation(name, argument(name, level, negative, increasing=True))
            assert_array_equal(perform(image, operation, FILL), timm_pixels(image, operation, True))


def test_policies_draw_alike() -> None:
    text, count = "rand-m9-mstd0.5-inc1", 5000
    theirs, ours = list[tuple[str, float]](), list[tuple[str, float]]()
    reference = auto_augment.rand_augment_transform(text, {"img_mean": FILL})
    for op in reference.ops:
        name = op.name.removesuffix("Increasing")
        op.aug_fn = lambda image, *given, name=name, **_: theirs.append((name, float(*given or (0,)))) or image
    np.random.seed(0)
    auto_augment.random.seed(0)
    for _ in range(count):
        reference(None)
    policy, rng = RandAugment.parse(text), np.random.default_rng(0)
    for _ in range(count):
        ours += [(operation.name, operation.argument) for operation in policy.draw(rng, (Image.Resampling.BICUBIC,))]
    table = [[Counter(name for name, _ in drawn)[name] for name in OPERATIONS] for drawn in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > LIKELY
    for name in OPERATIONS:
        first, second = ([amount for found, amount in drawn if found == name] for drawn in (ours, theirs))
        assert stats.ks_2samp(first, second).pvalue > LIKELY, name


# Crop, flip, jitter: whole transforms


def reference_box(rng: np.random.Generator, image: Image.Image, options: AugmentOptions, patch: Any) -> tuple[int, ...]:
    """timm's box of the generator's numbers."""
    source = SimpleNamespace(uniform=rng.uniform, randint=lambda low, high: int(rng.integers(low, high + 1)))
    patch.setattr(transforms, "random", source)
    crop = transforms.RandomResizedCropAndInterpolation
    top, left, height, width = crop.get_params(image, options.crop_scale, options.crop_ratio)
    return left, top, left + width, top + height


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (30, 900), (900, 31), (7, 5)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_the_same_numbers_give_the_same_crop(
    size: tuple[int, int], scale: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, image = AugmentOptions(crop_scale=scale), Image.new("RGB", size)
    for seed in range(200):
        ours = draw_box(size, scale, options.crop_ratio, np.random.default_rng(seed))
        assert ours == reference_box(np.random.default_rng(seed), image, options, monkeypatch)


@pytest.mark.parametrize("size", [(500, 375), (200, 375)])
def test_crops_are_drawn_alike(size: tuple[int, int]) -> None:
    rng, image = np.random.default_rng(0), Image.new("RGB", size)
    scale, ratio = AugmentOptions().crop_scale, AugmentOptions().crop_ratio
    transforms.random.seed(0)
    ours = np.array([draw_box(size, scale, ratio, rng) for _ in range(4000)])
    crop = transforms.RandomResizedCropAndInterpolation
    theirs = np.array([crop.get_params(image, scale, ratio) for _ in range(4000)])
    columns, rows = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    for first, second in (
        (ours[:, 1], theirs[:, 0]),
        (ours[:, 0], theirs[:, 1]),
        (rows, theirs[:, 2]),
        (columns, theirs[:, 3]),
    ):
        assert stats.ks_2samp(first, second).pvalue > LIKELY
    assert stats.ks_2samp(rows * columns, theirs[:, 2] * theirs[:, 3]).pvalue > LIKELY


def reference_pixels(image: Image.Image, draws: Draws, size: tuple[int, int]) -> np.ndarray:
    """timm's and torchvision's functions, given what was drawn."""
    left, top, right, bottom = draws.box
    mode = MODES[draws.resample]
    image = functional.resized_crop(image, top, left, bottom - top, right - left, list(size), mode)
    if draws.flip:
        image = functional.hflip(image)
    for operation in draws.operations:
        image = Image.fromarray(timm_pixels(image, operation, True))
    return np.asarray(image)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_whole_transforms_give_the_same_pixels(interpolation: Any) -> None:
    options = AugmentOptions(interpolation=interpolation, randaugment="rand-m9-mstd0.5-inc1-p0.8")
    ours, image = train_transform(options, (64, 48), MEAN), picture(130, 97)
    for seed in range(60):
        draws = ours.draw(image.size, np.random.default_rng(seed))
        expected = reference_pixels(image, draws, (64, 48))
        assert_array_equal(ours(image, np.random.default_rng(seed)), expected)


def test_create_transform_has_the_same_steps() -> None:
    """timm's own assembly: nothing is left out, and fill and interpolation are what ours takes from the options."""
    options: dict[str, Any] = {"is_training": True, "use_prefetcher": True, "color_jitter": 0.4}
    theirs = timm_data.create_transform(
        64, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", mean=MEAN, **options
    )
    crop, flip, policy, _ = theirs.transforms
    ours = train_transform(AugmentOptions(color_jitter=0.4), (64, 64), MEAN)
    assert (crop.scale, crop.ratio, flip.p) == (ours.options.crop_scale, ours.options.crop_ratio, ours.options.flip)
    assert crop.interpolation == InterpolationMode.BICUBIC
    assert ours.policy is not None and policy.num_layers == ours.policy.count
    for op in policy.ops:
        assert op.kwargs == {"fillcolor": ours.fill, "resample": Image.Resampling.BICUBIC}
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)


def test_jitter_gives_the_same_pixels() -> None:
    functions = {
        "Brightness": functional.adjust_brightness,
        "Contrast": functional.adjust_contrast,
        "Color": functional.adjust_saturation,
    }
    ours = train_transform(AugmentOptions(color_jitter=0.7, randaugment=None), (48, 64), MEAN)
    image = picture(64, 48)
    for seed in range(20):
        draws = replace(ours.draw(image.size, np.random.default_rng(seed)), box=(0, 0, 64, 48), flip=False)
        expected = image
        for operation in draws.operations:
            expected = functions[operation.name](expected, operation.argument)
        assert_array_equal(ours.apply(image, draws), expected)


def test_normalised_pixels() -> None:
    image = picture(50, 37)
    for statistics, (mean, deviation) in mixing.STATISTICS.items():
        expected = functional.normalize(functional.to_tensor(image), mean, deviation).permute(1, 2, 0)
        ours = normalise(jnp.asarray(image)[None], statistics)[0]
        assert_allclose(ours, expected, rtol=0, atol=ROUNDING)


# Erasing


class Scripted:
    """timm's random numbers of one image from given ones of [0, 1]: chance, places, then area and aspect in turn."""

    def __init__(self, chance: float, places: list[float], shapes: Iterator[float]) -> None:
        self.random = lambda: chance
        self.places = iter(places)
        self.shapes = shapes

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.shapes)

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self.places) * (high - low + 1))


@pytest.mark.parametrize("size", [(64, 48), (7, 30), (224, 224)])
def test_the_same_numbers_erase_the_same_rectangle(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rng, count = np.random.default_rng(0), 200
    shapes = rng.random((2, count, mixing.ATTEMPTS), np.float32)
    places = rng.random((3, count), np.float32)
    given = iter((shapes, places))
    with monkeypatch.context() as patch:
        patch.setattr(mixing.jax.random, "uniform", lambda key, shape: jnp.asarray(next(given)))
        boxes = draw_erasing(jax.random.key(0), size, count, 0.7)
    ours = np.asarray(boxes.contain(*size))
    theirs = random_erasing.RandomErasing(0.7, mode="pixel", device="cpu")
    for index in range(count):
        numbers = iter(shapes[:, index].T.ravel().tolist())
        script = Scripted(float(places[0, index]), places[1:, index].tolist(), numbers)
        monkeypatch.setattr(random_erasing, "random", script)
        erased = theirs(torch.zeros(3, *size)).ne(0).any(dim=0)
        assert_array_equal(ours[index], erased)


@pytest.mark.parametrize("size", [(48, 64), (16, 60)])
def test_rectangles_are_drawn_alike(size: tuple[int, int]) -> None:
    count = 3000
    random_erasing.random.seed(0)
    torch.manual_seed(0)
    reference = random_erasing.RandomErasing(0.6, mode="pixel", device="cpu")
    theirs = []
    for _ in range(count):
        erased = reference(torch.zeros(3, *size))[0].ne(0)
        rows, columns = erased.any(dim=1).nonzero(), erased.any(dim=0).nonzero()
        if len(rows):
            theirs.append([int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1])
    ours = np.stack(draw_erasing(jax.random.key(0), size, count, 0.6), axis=1)
    ours = ours[ours[:, 1] > ours[:, 0]]
    table = [[len(drawn), count - len(drawn)] for drawn in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > LIKELY
    measures: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda box: box[:, 0],
        lambda box: box[:, 2],
        lambda box: box[:, 1] - box[:, 0],
        lambda box: box[:, 3] - box[:, 2],
        lambda box: (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]),
    ]
    for measure in measures:
        assert stats.ks_2samp(measure(ours), measure(np.array(theirs))).pvalue > LIKELY


# Mixing


SHARES = np.random.default_rng(0).random(40, np.float32).tolist()


@pytest.mark.parametrize("size", [(20, 30), (21, 33), (224, 224)])
def test_the_same_share_cuts_the_same_box(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for share in [*SHARES, 0.75, 0.0, 1.0]:
        centre = [int(rng.integers(side)) for side in size]
        given = iter(centre)
        monkeypatch.setattr(mixup.np.random, "randint", lambda *_, given=given, **__: next(given))
        expected = mixup.rand_bbox((4, 3, *size), share)
        assert tuple(map(int, cut_box(size, jnp.asarray(share), jnp.array(centre)))) == expected


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_same_share_mixes_the_same(cut: bool, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, size, labels = np.random.default_rng(0), (20, 31), np.array([3, 0, 6, 3, 1, 2])
    images = rng.standard_normal((6, *size, 3), np.float32)
    reference = mixup.Mixup(0.8, 1.0, label_smoothing=smoothing, num_classes=7)
    monkeypatch.setattr(mixup.np.random, "rand", lambda: 0.2 if cut else 0.7)
    for share in SHARES[:12]:
        given = iter([3, 17])
        monkeypatch.setattr(mixup.np.random, "beta", lambda *_, share=share: share)
        monkeypatch.setattr(mixup.np.random, "randint", lambda *_, given=given, **__: next(given))
        pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
        expected, targets = reference(pixels, torch.tensor(labels))
        box = cut_box(size, jnp.asarray(share), jnp.array([3, 17]))
        left_over = 1 - (box.bottom - box.top) * (box.right - box.left) / (size[0] * size[1])
        mixed = Mixing(jnp.asarray(left_over if cut else share), jnp.asarray(cut), box)
        found, labelled = apply_mixing(jnp.asarray(images), soft_targets(jnp.asarray(labels), 7, smoothing), mixed)
        assert_allclose(found, expected.permute(0, 2, 3, 1), rtol=0, atol=ROUNDING)
        assert_allclose(labelled, targets, rtol=0, atol=ROUNDING)


def test_soft_targets_are_timms() -> None:
    labels = np.array([3, 0, 6, 3])
    for smoothing in (0.0, 0.1, 1e-5):
        expected = mixup.mixup_target(torch.tensor(labels), 7, smoothing=smoothing)
        assert_allclose(soft_targets(jnp.asarray(labels), 7, smoothing), expected, rtol=0, atol=ROUNDING)


def test_mixings_are_drawn_alike() -> None:
    size, count = (48, 64), 3000
    options = AugmentOptions(mixup=0.4, cutmix=3.0, mix_probability=0.9, mix_switch=0.4)
    reference = mixup.Mixup(0.4, 3.0, prob=0.9, switch_prob=0.4)
    np.random.seed(0)
    theirs = []
    for _ in range(count):
        share, cut = reference._params_per_batch()
        box = (0, 0, 0, 0)
        if cut:
            box, share = mixup.cutmix_bbox_and_lam((4, 3, *size), share)
        theirs.append([cut, share, *box])
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.jit(jax.vmap(lambda key: draw_mixing(key, size, options)))(keys)
    ours = np.stack([drawn.cut, drawn.share, *drawn.box], axis=1)
    kinds = [
        [
            (draws[:, 0] == 1).sum(),
            ((draws[:, 0] == 0) & (draws[:, 1] < 1)).sum(),
            ((draws[:, 0] == 0) & (draws[:, 1] == 1)).sum(),
        ]
        for draws in (ours, np.array(theirs, float))
    ]
    assert stats.chi2_contingency(kinds).pvalue > LIKELY
    for cut in (0, 1):
        first, second = (draws[draws[:, 0] == cut] for draws in (ours, np.array(theirs, float)))
        for column in range(1, 6 if cut else 2):
            assert stats.ks_2samp(first[:, column], second[:, column]).pvalue > LIKELY, (cut, column)
