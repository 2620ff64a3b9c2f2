"""The predictions of a masked image model for hidden patches: its tokens, decoded to pixels for people to see.

There are two decoded images. One has the tokenizer's tokens everywhere; no prediction can be better. The other has the
predicted tokens in the hidden places.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from beit_jax.atomic import new_file
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import ImageLike, image_list, image_name, load_image, open_image
from beit_jax.images.processor import ImageProcessor
from beit_jax.looking.written import png_info
from beit_jax.models.build import Model
from beit_jax.models.interface import patch_grid
from beit_jax.models.masked_image_modeling import BeitForMaskedImageModeling
from beit_jax.models.position import Grid
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeEncoder
from beit_jax.tokenizers.interface import Tokenizer

BATCH: Final = 8  # images computed at once
GREY: Final = 128  # value of the pixels of hidden patches
CAPTIONS: Final = ("as the model sees it", "with hidden patches", "its tokens, decoded", "predicted, decoded")
CELL: Final = 160  # least pixels of an image's shorter side in a picture, so that the captions fit
_GAP, _CAPTION, _FONT = 4, 20, 13


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Images with hidden patches, and the predictions for these patches; a single image has no axis b.

    Attributes:
        original: the images in the model's size, before normalisation.
        masked: the same with hidden patches in grey.
        tokenizer: the decoded tokens of the whole image.
        predicted: the same with the model's most probable tokens in the hidden places.
        hidden: number of hidden tokens of every image.
        right: number of hidden tokens of every image that were predicted right.
    """

    original: UInt8[np.ndarray, "*b h w 3"]
    masked: UInt8[np.ndarray, "*b h w 3"]
    tokenizer: UInt8[np.ndarray, "*b h2 w2 3"]
    predicted: UInt8[np.ndarray, "*b h2 w2 3"]
    hidden: Int[np.ndarray, "*b"]
    right: Int[np.ndarray, "*b"]

    @property
    def correct(self) -> float:
        """The share of all hidden tokens that were predicted right."""
        return float(self.right.sum() / self.hidden.sum())

    def part(self, number: int) -> "Reconstruction":
        """The reconstruction of one of several images, which has no axis of images."""
        return Reconstruction(
            *(
                np.asarray(array[number])
                for array in (self.original, self.masked, self.tokenizer, self.predicted, self.hidden, self.right)
            )
        )

    def as_dict(self, names: Sequence[Path]) -> dict[str, Any]:
        """The numbers for JSON, with the names of the images."""
        counts = zip(names, self.hidden.tolist(), self.right.tolist(), strict=True)
        images = [{"image": str(name), "hidden": hidden, "right": right} for name, hidden, right in counts]
        return {"images": images, "correct": self.correct}


def reconstruct(
    model: Model,
    processor: ImageProcessor,
    tokenizer: Tokenizer,
    decoder: DvaeDecoder,
    images: ImageLike | Iterable[ImageLike],
    masks: Bool[np.ndarray, "*b patches"],
) -> Reconstruction:
    """Hides patches of an image, or of several, from a model and decodes the tokens that the model predicts for them.

    The tokenizer gets the images resized to its own pixels per token by Pillow's Lanczos filter. If the processor
    crops, the tokenizer gets the crop in the model's size instead.

    Args:
        model: a masked image model that was trained on the tokens of `tokenizer`.
        images: one image: a path, a PIL image or a uint8 array [h, w], [h, w, 1] or [h, w, 3]; or several of them, or
            an array [b, h, w, c].
        masks: True where a patch is hidden; row by row from the top. For one image [patches].

    Returns:
        For one image its reconstruction, whose arrays have no axis of images; for several, one with that axis.

    Raises:
        BeitJaxError: the model has another task; the tokens of the tokenizer do not stand for pixels; model, tokenizer
            and decoder do not fit each other; the masks have another shape or hide nothing; `processor` refuses an
            image.
    """
    student, encoder = _check_parts(model, tokenizer, decoder)
    listed, one = image_list(images)
    loaded = [load_image(image, "RGB", image_name(image, place)) for place, image in enumerate(listed)]
    masks = masks[None] if one and masks.ndim == 1 else masks
    original = replace(processor, rescale_factor=None, mean=None, std=None)(loaded).astype(np.uint8)
    grid = patch_grid(student.config, original.shape)
    _check_masks(masks, (len(loaded), grid[0] * grid[1]))
    size = grid[0] * encoder.patch_size[0], grid[1] * encoder.patch_size[1]
    views = _resized(loaded if processor.crop is None else [Image.fromarray(crop) for crop in original], size)
    pixels = processor(loaded)
    parts = []
    for start in range(0, len(loaded), BATCH):
        chosen = slice(start, start + BATCH)
        padded = (_padded(array[chosen], min(BATCH, len(loaded))) for array in (pixels, views, masks))
        parts.append([np.asarray(part) for part in _decoded(student, encoder, decoder, *padded)])
    decoded, predicted, right = (np.concatenate(part)[: len(loaded)] for part in zip(*parts, strict=True))
    hidden = _spread(masks, grid, student.config.patch_size)[..., None]
    masked = np.where(hidden, np.uint8(GREY), original)
    arrays = (original, masked, decoded, predicted, masks.sum(axis=1), right)
    return Reconstruction(*(np.asarray(array[0]) for array in arrays) if one else arrays)


def reconstruct_files(
    model: Model,
    processor: ImageProcessor,
    tokenizer: Tokenizer,
    decoder: DvaeDecoder,
    paths: Sequence[Path],
    draw: Callable[[np.random.Generator], Bool[np.ndarray, " patches"]],
    seed: int,
    output: Path,
    images: Sequence[Image.Image] = (),
) -> Reconstruction:
    """Calls `reconstruct` for image files, and writes the picture to a PNG file.

    Args:
        draw: draws the mask of an image.
        images: of these names, where they are no files of their own.

    Raises:
        BeitJaxError: as `reconstruct`; there are no images, or one cannot be read; `output` has another ending than
            .png, or cannot be written.
    """
    check_output(output)
    if not paths:
        raise BeitJaxError("no images given; name at least one file")
    images = images or [open_image(path) for path in paths]
    rng = np.random.default_rng(seed)
    masks = np.stack([draw(rng) for _ in images])
    found = reconstruct(model, processor, tokenizer, decoder, images, masks)
    with new_file(output, inputs=paths) as partial:
        Image.fromarray(grid_picture(found)).save(partial, format="PNG", pnginfo=png_info())
    return found


def check_output(output: Path) -> None:
    """Refuses the name of a picture that does not end in .png, before any model is loaded."""
    if output.suffix.lower() != ".png":
        raise BeitJaxError(f"{printable(output)}: expected a name ending in .png")


def grid_picture(found: Reconstruction) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a row for every image, in four columns with captions. Small images are enlarged by a whole factor."""
    parts = (found.original, found.masked, found.tokenizer, found.predicted)
    columns = [part if part.ndim == 4 else part[None] for part in parts]
    sides = np.max([part.shape[1:3] for part in columns], axis=0)
    height, width = (int(side) * max(1, -(-CELL // int(sides.min()))) for side in sides)
    size = len(columns) * (width + _GAP) + _GAP, len(columns[0]) * (height + _GAP) + _CAPTION
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=_FONT)
    for column, (caption, part) in enumerate(zip(CAPTIONS, columns, strict=True)):
        left = _GAP + column * (width + _GAP)
        draw.text((left, 1), caption, fill="black", font=font)
        for row, image in enumerate(part):
            cell = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left, _CAPTION + row * (height + _GAP)))
    return np.asarray(canvas)


def _check_parts(
    model: Model, tokenizer: Tokenizer, decoder: DvaeDecoder
) -> tuple[BeitForMaskedImageModeling, DvaeEncoder]:
    if not isinstance(model, BeitForMaskedImageModeling):
        raise BeitJaxError(f"this model predicts no tokens (its task is {model.config.task}); give a pre-trained one")
    if not isinstance(tokenizer, DvaeEncoder):
        raise BeitJaxError(
            f"the tokens of {type(tokenizer).__name__} stand for a teacher's features, not for pixels; give a dVAE's "
            "encoder and a model trained on its tokens"
        )
    student, encoder, pixels = model.config, tokenizer.config, decoder.config
    channels = {"model": student.num_channels, "tokenizer": encoder.input_channels, "decoder": pixels.output_channels}
    for what, found in (
        ("tokens", {"model": student.vocab_size, "tokenizer": encoder.vocab_size, "decoder": pixels.vocab_size}),
        ("pixels per token", {"tokenizer": encoder.stride, "decoder": 2 ** (pixels.group_count - 1)}),
        ("channels", channels | {"a colour picture": 3}),
    ):
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name} {number}" for name, number in found.items())
            raise BeitJaxError(f"{what}: expected one number, found {each}; give the model's tokenizer and its decoder")
    return model, tokenizer


def _check_masks(masks: np.ndarray, shape: tuple[int, int]) -> None:
    if masks.shape != shape:
        raise BeitJaxError(f"masks: expected {list(shape)} (images, patches), found {list(masks.shape)}")
    if not masks.any():
        raise BeitJaxError("masks: no patch is hidden, there is nothing to predict; hide at least one")


def _resized(images: Sequence[Image.Image], size: tuple[int, int]) -> UInt8[np.ndarray, "b height width 3"]:
    height, width = size
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)) for image in images])


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    """Pads a batch with zeros to `length`, so that one program serves all batches."""
    return np.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])


def _spread(masks: np.ndarray, grid: Grid, patch: tuple[int, int]) -> Bool[np.ndarray, "b h w"]:
    """Spreads masks of patches to masks of pixels."""
    return masks.reshape(-1, *grid).repeat(patch[0], axis=1).repeat(patch[1], axis=2)


@jax.jit
def _decoded(
    model: BeitForMaskedImageModeling,
    tokenizer: DvaeEncoder,
    decoder: DvaeDecoder,
    pixel_values: Float[Array, "b h w 3"],
    views: UInt8[Array, "b h2 w2 3"],
    masks: Bool[Array, "b patches"],
) -> tuple[UInt8[Array, "b h2 w2 3"], UInt8[Array, "b h2 w2 3"], Int[Array, " b"]]:
    """The decoded tokens, the decoded predictions, and the number of hidden tokens that were predicted right."""
    low, high = tokenizer.value_range
    tokens = tokenizer.tokens(low + (high - low) * views.astype(jnp.float32) / 255)
    logits = model(pixel_values, masks).logits
    assert logits is not None  # a model for masked image modelling always gives them
    guesses = jnp.argmax(logits, axis=-1).astype(tokens.dtype).reshape(tokens.shape)
    hidden = masks.reshape(tokens.shape)
    images = decoder.decode(jnp.concatenate([tokens, jnp.where(hidden, guesses, tokens)]))
    decoded, predicted = jnp.split(jnp.round(images * 255).astype(jnp.uint8), 2)
    return decoded, predicted, jnp.sum(hidden & (guesses == tokens), axis=(1, 2))
