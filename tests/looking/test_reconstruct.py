"""Reconstructions show what the model saw, what its tokens stand for and what it predicted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageFont

from beit_jax.bulk.inputs import list_images
from beit_jax.bulk.reconstructing import Reconstructing
from beit_jax.bulk.table import Table
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, preset
from beit_jax.images.bad_images import BadImages
from beit_jax.looking.reconstruct import (
    BATCH,
    CAPTIONS,
    CELL,
    GREY,
    Reconstruction,
    grid_picture,
    reconstruct,
    reconstruct_files,
)
from beit_jax.models.classifier import BeitForImageClassification
from beit_jax.models.interface import BeitOutput
from beit_jax.models.masked_image_modeling import BeitForMaskedImageModeling
from beit_jax.terminal import no_progress
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeDecoderConfig, DvaeEncoder, DvaeEncoderConfig
from beit_jax.tokenizers.vqkd import VqkdConfig, VqkdTokenizer

VOCABULARY, PATCHES = 24, 16
SMALL: dict[str, Any] = {
    "image_size": (32, 32),
    "patch_size": (8, 8),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": VOCABULARY,
}
STUDENT = BeitConfig(**SMALL, task="masked_image_modeling", use_mask_token=True, initializer_range=0.5)
VQKD = VqkdConfig(
    **SMALL,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=16,
)
ENCODER = DvaeEncoderConfig(n_hid=8, vocab_size=VOCABULARY, group_count=3, n_blk_per_group=1, image_size=(16, 16))
DECODER = DvaeDecoderConfig(n_init=8, n_hid=8, vocab_size=VOCABULARY, group_count=3, n_blk_per_group=1)
SQUASH = preset("hf", 32)
CROP = replace(preset("unilm_eval", 32, mean=IMAGENET_MEAN, std=IMAGENET_STD), crop=(32, 32))


@dataclass(frozen=True)
class Parts:
    model: BeitForMaskedImageModeling
    tokenizer: DvaeEncoder
    decoder: DvaeDecoder

    def __call__(self, images: Any, masks: Any, processor: ImageProcessor = SQUASH, **others: Any) -> Reconstruction:
        parts = {"model": self.model, "tokenizer": self.tokenizer, "decoder": self.decoder} | others
        return reconstruct(processor=processor, images=images, masks=masks, **parts)


@pytest.fixture(scope="module")
def parts() -> Parts:
    encoder = DvaeEncoder(ENCODER, rngs=nnx.Rngs(1))
    bias = encoder.output.bias
    views = np.stack([view(image, SQUASH) for image in pictures(8)])
    bias[...] = bias[...] - encoder(views / np.float32(255)).mean((0, 1, 2))  # or one token would win everywhere
    decoder = DvaeDecoder(DECODER, rngs=nnx.Rngs(2))
    decoder.output.kernel[...] *= 20  # or all would be grey
    return Parts(BeitForMaskedImageModeling(STUDENT, rngs=nnx.Rngs(0)), encoder, decoder)


def pictures(count: int, size: tuple[int, int] = (50, 40)) -> list[Image.Image]:
    """Of random colours in large squares."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in small]


def drawn_masks(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, PATCHES)) < 0.4


def seen(image: Image.Image, processor: ImageProcessor) -> np.ndarray:
    """What the model sees, without the processor: squashed, or a centre crop of the shorter edge's size."""
    if processor is SQUASH:
        return np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    assert image.size == (50, 40)
    resized = image.resize((int(36 * 50 / 40), 36), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 32) / 2), 2
    return np.asarray(resized.crop((left, top, left + 32, top + 32)))


def view(image: Image.Image, processor: ImageProcessor) -> np.ndarray:
    """What the tokenizer sees."""
    source = image if processor is SQUASH else Image.fromarray(seen(image, processor))
    return np.asarray(source.resize((16, 16), Image.Resampling.LANCZOS))


def as_bytes(values: Any) -> np.ndarray:
    return np.asarray(jnp.round(values * 255)).astype(np.uint8)


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    """Up to rounding to 255 levels."""
    assert found.dtype == expected.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("processor", [SQUASH, CROP], ids=["squash", "crop"])
def test_against_one_image_at_a_time(processor: ImageProcessor, parts: Parts) -> None:
    """Every step written out, without batches, padding and compilation; the images fill one batch and a part."""
    images, masks = pictures(BATCH + 2), drawn_masks(BATCH + 2)
    found = parts(images, masks, processor)
    mean, std = (np.array(values, np.float32) for values in (processor.mean, processor.std))
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        original, small = seen(image, processor), view(image, processor)
        np.testing.assert_array_equal(found.original[i], original)
        tokens = np.asarray(parts.tokenizer.tokens(small[None] / np.float32(255)))
        pixels = (original / np.float32(255) - mean) / std
        guesses = np.asarray(parts.model(pixels[None], mask[None]).logits).argmax(-1).reshape(1, 4, 4)
        hidden = mask.reshape(1, 4, 4)
        assert found.hidden[i] == hidden.sum() and found.right[i] == (guesses == tokens)[hidden].sum()
        assert_alike(found.tokenizer[i], as_bytes(parts.decoder.decode(tokens))[0])
        assert_alike(found.predicted[i], as_bytes(parts.decoder.decode(np.where(hidden, guesses, tokens)))[0])
    assert found.correct == found.right.sum() / masks.sum()
    assert found.tokenizer.std() > 5, "pictures that are all alike prove nothing"
    assert (found.tokenizer != found.predicted).mean() > 0.1


def test_one_image_has_no_axis_of_images(parts: Parts) -> None:
    (image,), masks = pictures(1), drawn_masks(1)
    batch = parts([image], masks)
    for one, mask in ((image, masks[0]), (np.asarray(image), masks[0]), (image, masks)):
        found = parts(one, mask)
        assert found.original.shape == (32, 32, 3) and (found.hidden, found.right) == (batch.hidden[0], batch.right[0])
        assert_alike(found.predicted, batch.predicted[0])
        assert found.correct == batch.correct
        assert np.array_equal(grid_picture(found), grid_picture(batch))


def test_hidden_patches_are_grey_and_the_others_as_they_were(parts: Parts) -> None:
    masks = np.zeros((1, PATCHES), bool)
    masks[0, [1, 4, 15]] = True  # (row, column): (0, 1), (1, 0), (3, 3)
    found = parts(pictures(1), masks)
    expected = found.original.copy()
    for row, column in ((0, 1), (1, 0), (3, 3)):
        expected[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = GREY
    np.testing.assert_array_equal(found.masked, expected)
    assert found.hidden.tolist() == [3]


class Knowing(BeitForMaskedImageModeling):
    """Predicts these tokens [b, patches], whatever it sees."""

    def __init__(self, tokens: np.ndarray):
        super().__init__(STUDENT, rngs=nnx.Rngs(0))
        self.answers = nnx.Param(jax.nn.one_hot(tokens, VOCABULARY))

    def __call__(self, pixel_values: Any, bool_masked_pos: Any = None, **options: Any) -> BeitOutput:
        return BeitOutput(jnp.zeros((len(pixel_values), 1 + PATCHES, 16)), logits=self.answers[...])


def test_a_perfect_prediction_looks_like_the_tokens(parts: Parts) -> None:
    images, masks = pictures(3), drawn_masks(3)
    views = np.stack([view(image, SQUASH) for image in images])
    tokens = np.asarray(parts.tokenizer.tokens(views / np.float32(255))).reshape(3, PATCHES)
    found = parts(images, masks, model=Knowing(tokens))
    assert found.correct == 1.0 and (found.right == masks.sum(axis=1)).all()
    np.testing.assert_array_equal(found.predicted, found.tokenizer)

    other = parts(images, masks, model=Knowing((tokens + 1) % VOCABULARY))
    assert other.correct == 0.0
    np.testing.assert_array_equal(other.tokenizer, found.tokenizer)
    assert (other.predicted != other.tokenizer).any()

    seen_only = parts(images, masks, model=Knowing(np.where(masks, tokens, 0)))
    assert seen_only.correct == 1.0
    np.testing.assert_array_equal(seen_only.predicted, found.tokenizer)


def test_images_of_any_mode_and_size(parts: Parts) -> None:
    grey, tall = pictures(1)[0].convert("L"), pictures(1, (21, 77))[0]
    found = parts([grey, tall], drawn_masks(2))
    np.testing.assert_array_equal(found.original[0, ..., 0], found.original[0, ..., 2])
    np.testing.assert_array_equal(found.original[1], seen(tall, SQUASH))


# Parts that do not fit


def fit(**changes: Any) -> dict[str, Any]:
    """A decoder and an encoder, changed alike."""
    return {
        "tokenizer": DvaeEncoder(replace(ENCODER, **changes), rngs=nnx.Rngs(0)),
        "decoder": DvaeDecoder(replace(DECODER, **changes), rngs=nnx.Rngs(0)),
    }


def classifier() -> BeitForImageClassification:
    return BeitForImageClassification(BeitConfig(**SMALL, task="image_classification"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: fit(vocab_size=25), "tokens: expected one number, found model 24, tokenizer 25, decoder 25; give"),
        (lambda: {"decoder": fit(vocab_size=7)["decoder"]}, "tokens: .* found model 24, tokenizer 24, decoder 7"),
        (lambda: {"decoder": fit(group_count=2)["decoder"]}, "pixels per token: .* found tokenizer 4, decoder 2"),
        (
            lambda: {"decoder": DvaeDecoder(replace(DECODER, output_channels=1), rngs=nnx.Rngs(0))},
            "channels: expected one number, found model 3, tokenizer 3, decoder 1, a colour picture 3",
        ),
        (
            lambda: {"model": classifier()},
            r"this model predicts no tokens \(its task is image_classification\)",
        ),
        (
            lambda: {"tokenizer": VqkdTokenizer(VQKD, rngs=nnx.Rngs(0))},
            "the tokens of VqkdTokenizer stand for a teacher's features, not for pixels",
        ),
    ],
    ids=["vocabulary", "vocabulary of the decoder", "pixels per token", "channels", "task", "VQ-KD"],
)
def test_parts_that_do_not_fit(change: Callable[[], dict[str, Any]], message: str, parts: Parts) -> None:
    with pytest.raises(BeitJaxError, match=message) as error:
        parts(pictures(1), drawn_masks(1), **change())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (drawn_masks(2), r"masks: expected \[1, 16\] \(images, patches\), found \[2, 16\]"),
        (drawn_masks(1)[:, 1:], r"found \[1, 15\]"),
        (np.zeros((1, PATCHES), bool), "no patch is hidden"),
    ],
)
def test_masks_that_do_not_fit(masks: np.ndarray, message: str, parts: Parts) -> None:
    with pytest.raises(BeitJaxError, match=message):
        parts(pictures(1), masks)


def test_a_processor_of_another_size(parts: Parts) -> None:
    with pytest.raises(BeitJaxError, match=r"not multiples of the patch .*, as \(\d+, \d+\) would be"):
        parts(pictures(1), drawn_masks(1), preset("hf", 30))
    with pytest.raises(BeitJaxError, match=r"expected \[1, 64\] \(images, patches\), found \[1, 16\]"):
        parts(pictures(1), drawn_masks(1), preset("hf", 64))


# The picture


def random_reconstruction(count: int, size: tuple[int, int], small: tuple[int, int]) -> Reconstruction:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (count, *side, 3), dtype=np.uint8) for side in (size, size, small, small)]
    return Reconstruction(*arrays, np.full(count, 5), np.full(count, 2))


@pytest.mark.parametrize(
    ("size", "small", "factors"),
    [
        ((32, 32), (16, 16), (5, 10)),
        ((32, 32), (64, 64), (6, 3)),
        ((224, 224), (112, 112), (1, 2)),
        ((32, 64), (16, 32), (5, 10)),
    ],
)
def test_every_pixel_is_in_the_picture(size: Any, small: Any, factors: tuple[int, int]) -> None:
    """Each as a square; cells are found by their content, between white gaps."""
    found = random_reconstruction(2, size, small)
    picture = grid_picture(found)
    height, width = (side * factors[0] for side in size)
    assert min(height, width) >= CELL
    gap = (picture.shape[1] - 4 * width) // 5
    top = picture.shape[0] - 2 * (height + gap)
    assert 0 < gap < 10 and 0 < top < 30
    free = np.ones(picture.shape[:2], bool)
    for column, part in enumerate((found.original, found.masked, found.tokenizer, found.predicted)):
        factor = factors[column // 2]
        for row, image in enumerate(part):
            box = np.s_[top + row * (height + gap) :, gap + column * (width + gap) :]
            cell = picture[box][:height, :width]
            np.testing.assert_array_equal(cell, image.repeat(factor, axis=0).repeat(factor, axis=1))
            free[box][:height, :width] = False
    free[:top] = False
    assert (picture[free] == 255).all()
    captions = picture[:top].min(axis=(0, 2)) < 128
    assert all(captions[gap + i * (width + gap) :][:width].any() for i in range(4))


def test_captions_fit_into_the_smallest_cell() -> None:
    font = ImageFont.load_default(size=13)
    assert max(font.getlength(caption) for caption in CAPTIONS) <= CELL


# Files


def test_files(parts: Parts, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, pictures(2), strict=True):
        image.save(path)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.random(PATCHES) < 0.4

    def run(seed: int, output: Path, names: list[Path] = paths) -> Reconstruction:
        return reconstruct_files(
            parts.model, SQUASH, parts.tokenizer, parts.decoder, names, draw, seed=seed, output=output
        )

    found = run(7, tmp_path / "out.png")
    expected = parts(pictures(2), np.random.default_rng(7).random((2, PATCHES)) < 0.4)
    np.testing.assert_array_equal(found.masked, expected.masked)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), grid_picture(expected))
    assert found.as_dict(paths) == {
        "images": [
            {"image": str(path), "hidden": int(expected.hidden[i]), "right": int(expected.right[i])}
            for i, path in enumerate(paths)
        ],
        "correct": expected.correct,
    }
    assert (run(8, tmp_path / "out.png").masked != found.masked).any()
    for output, names, message in (
        (tmp_path / "out.jpg", paths, "expected a name ending in .png"),
        (tmp_path / "other.png", [], "no images given"),
        (tmp_path / "other.png", [tmp_path / "none.png"], "no such file"),
        (tmp_path / "nowhere" / "other.png", paths, "does not exist"),
    ):
        with pytest.raises(BeitJaxError, match=message):
            run(0, output, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "out.png"]


def test_a_table_has_the_same_masks_and_numbers(parts: Parts, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i:02d}.png" for i in range(11)]
    for path, image in zip(paths, pictures(11), strict=True):
        image.save(path)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")

    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.random(PATCHES) < 0.4

    found = reconstruct_files(
        parts.model, SQUASH, parts.tokenizer, parts.decoder, paths, draw, seed=7, output=tmp_path / "out.png"
    )
    drawn: dict[str, np.ndarray] = {}
    making = Reconstructing(
        parts.model, SQUASH, parts.tokenizer, parts.decoder, draw, 7, list_images([*paths, bad]), {}, drawn.__setitem__,
        no_progress, max_bad=0.5, chunk=1,
    )  # fmt: skip
    assert making.length == BATCH
    (part,) = making.parts([(8, 12)], BadImages(12, 0.5))  # what is left after the first chunk
    assert [dict(row) for row in part.rows[:3]] == found.as_dict(paths)["images"][8:]
    assert "not a readable image" in part.rows[3]["error"]
    assert list(drawn) == [str(path) for path in paths[8:]]
    np.testing.assert_array_equal(drawn[str(paths[9])], grid_picture(found.part(9)))
    outcome = Table(making, tmp_path / "t.csv").make()
    assert outcome.images == 12 and len(outcome.bad) == 1
