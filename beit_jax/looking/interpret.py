"""The inside of a model as arrays: attention in an image, attention rollout, and relative position bias.

Blocks and heads are counted from 1, as in `beit-jax parity` and in the scores of probes. Rows and columns of patches
are counted from 1 too, from the top left. What attends is by default what the model pools: the class token, or the mean
of all patches, whose attention is the mean of theirs.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, UInt8

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bands import visible
from beit_jax.images.files import ImageLike
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.build import Model
from beit_jax.models.encoder import BeitModel
from beit_jax.models.interface import patch_grid
from beit_jax.models.position import Grid

Attending: TypeAlias = tuple[int, int] | Literal["class"] | None
"""What attends: (row, column) of a patch, "class" for the class token, or None for what the model pools."""


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """The attention of every token of an image to every other, in all blocks and heads.

    Attributes:
        image: the image as the model sees it, before normalisation; a greyscale image is repeated three times.
        probabilities: rows sum to 1. Token 0 is the class token; the patches follow row by row.
        grid: patches, (rows, columns).
        name: of the image, for titles.
        pools_patches: the model pools the mean of the patches, and not the class token.
    """

    image: UInt8[np.ndarray, "height width 3"]
    probabilities: Float[np.ndarray, "depth heads n n"]
    grid: Grid
    name: str = "image"
    pools_patches: bool = False

    @property
    def depth(self) -> int:
        return len(self.probabilities)

    def head_maps(self, block: int | None = None, patch: Attending = None) -> Float[np.ndarray, "heads rows columns"]:
        """The share of the attention of `patch` that each patch gets in a block; the rest goes to the class token.

        Args:
            block: by default the last.
            patch: (row, column) of a patch, or "class" for the class token; by default what the model pools.

        Raises:
            BeitJaxError: no such block or patch.
        """
        return self._rows(block, patch)[:, 1:].reshape(-1, *self.grid)

    def class_shares(self, block: int | None = None, patch: Attending = None) -> Float[np.ndarray, " heads"]:
        """The share of the attention of `patch` that the class token gets; arguments and errors as of `head_maps`."""
        return self._rows(block, patch)[:, 0]

    def _rows(self, block: int | None, patch: Attending) -> Float[np.ndarray, "heads n"]:
        return self.probabilities[checked_block(block, self.depth) - 1][:, self.tokens(patch)].mean(axis=1)

    def rollout_map(self, patch: Attending = None) -> Float64[np.ndarray, "rows columns"]:
        """The share of each patch in `patch`, as in `head_maps`, after all blocks, by `rollout`.

        Raises:
            BeitJaxError: no such patch.
        """
        return rollout(self.probabilities)[self.tokens(patch), 1:].mean(axis=0).reshape(self.grid)

    def tokens(self, patch: Attending) -> list[int]:
        """The indices of the tokens that are `patch`: of one, or of all patches.

        Raises:
            BeitJaxError: no such patch.
        """
        if patch is None and self.pools_patches:
            return list(range(1, 1 + self.grid[0] * self.grid[1]))
        return [0 if patch is None or patch == "class" else self._patch(patch)]

    def named(self, patch: Attending) -> str:
        """The words for `patch` in titles and JSON."""
        if patch is None and self.pools_patches:
            return "the mean of all patches, which the model pools"
        if patch is None or patch == "class":
            return "the class token"
        return f"the patch in row {patch[0]}, column {patch[1]}"

    def _patch(self, patch: tuple[int, int]) -> int:
        (row, column), (rows, columns) = patch, self.grid
        if not (1 <= row <= rows and 1 <= column <= columns):
            raise BeitJaxError(f"patch: expected a row 1 to {rows} and a column 1 to {columns}, found {row} {column}")
        return 1 + (row - 1) * columns + (column - 1)


@dataclass(frozen=True, eq=False)
class PositionBias:
    """The relative position bias: what a model adds to the scaled attention scores, by the offset of two tokens.

    Attributes:
        offsets: at [head, dy + rows - 1, dx + columns - 1] is the bias for a patch dy rows below the attending patch
            and dx columns to its right.
        cls_to_patch, patch_to_cls, cls_to_cls: the class token has no position. These are its biases when it attends
            to a patch, when a patch attends to it, and when it attends to itself.
        table: the table's name: "shared", "block 3", or "block 3 + shared" for the sum of both.
    """

    offsets: Float[np.ndarray, "heads y x"]
    cls_to_patch: Float[np.ndarray, " heads"]
    patch_to_cls: Float[np.ndarray, " heads"]
    cls_to_cls: Float[np.ndarray, " heads"]
    table: str

    def class_entries(self) -> dict[str, list[float]]:
        """The biases of the class token by head, for JSON."""
        return {name: getattr(self, name).tolist() for name in ("cls_to_patch", "patch_to_cls", "cls_to_cls")}


def image_attention(model: Model, processor: ImageProcessor, image: ImageLike) -> ImageAttention:
    """Runs an image through a model and returns the attention of all blocks: depth x heads x n^2 numbers.

    Raises:
        BeitJaxError: the image cannot be read, or the model does not take its size.
    """
    raw = replace(processor, rescale_factor=None, mean=None, std=None)(image)[0]
    levels = raw.shape[-1] in (1, 3) and bool(((raw >= 0) & (raw <= 255) & (raw == np.floor(raw))).all())
    seen = np.asarray(visible(raw.astype(np.uint8) if levels else raw))
    pixels = processor(image)
    grid = patch_grid(model.config, pixels.shape)
    probabilities = np.asarray(_attentions(_encoder(model), jnp.asarray(pixels)))[:, 0]
    name = printable(Path(image).name, 40) if isinstance(image, str | os.PathLike) else "image"
    pools_patches = model.config.has_pooler and model.config.pooling == "mean"
    return ImageAttention(seen, probabilities, grid, name, pools_patches)


def rollout(probabilities: Float[np.ndarray, "depth heads n n"]) -> Float64[np.ndarray, "n n"]:
    """Attention rollout: the share of every input token in every output token. Rows sum to 1.

    In every block, the mean over heads A and the residual connection I count for a half each: W = (A + I) / 2, with
    normalised rows. The result is the product of all W, the last block's to the left. Rollout leaves out the effects of
    values, MLPs and layer scale.

    Source: Abnar and Zuidema 2020, arXiv 2005.00928, section 3.
    """
    joint = np.eye(probabilities.shape[-1])
    for heads in probabilities:
        mixed = 0.5 * (heads.mean(axis=0, dtype=np.float64) + np.eye(len(joint)))
        joint = mixed / mixed.sum(axis=1, keepdims=True) @ joint
    return joint


def position_bias(model: Model, block: int | None = None) -> PositionBias:
    """The relative position bias of a model, at its native patch grid.

    Args:
        block: the block whose bias is returned: its own table, the shared table, or the sum of both. By default the
            shared table alone, or the last block's if there is no shared table.

    Raises:
        BeitJaxError: the model has no relative position bias, or no such block.
    """
    encoder, config = _encoder(model), model.config
    if config.position_bias == "none":
        raise BeitJaxError("this model has no relative position bias (position_bias is none)")
    number = checked_block(block, config.num_hidden_layers)
    parts, words = [], []
    if config.has_layer_bias and not (block is None and config.has_shared_bias):
        parts.append(encoder.blocks.attention.bias_table[number - 1])
        words.append(f"block {number}")
    if config.has_shared_bias:
        parts.append(encoder.shared_bias_table[...])
        words.append("shared")
    table = np.sum([np.asarray(part) for part in parts], axis=0)
    sides = [2 * side - 1 for side in config.grid]
    # The tables count offsets from the attended patch to the attending patch, so both axes are reversed.
    offsets = np.moveaxis(table[:-3].reshape(*sides, -1)[::-1, ::-1], -1, 0)
    cls_to_patch, patch_to_cls, cls_to_cls = table[-3:]
    return PositionBias(offsets, cls_to_patch, patch_to_cls, cls_to_cls, " + ".join(words))


def checked_block(block: int | None, depth: int) -> int:
    """Returns `block`, or the last block for None.

    Raises:
        BeitJaxError: there is no such block.
    """
    if block is not None and not 1 <= block <= depth:
        raise BeitJaxError(f"block: expected 1 to {depth}, found {block}")
    return depth if block is None else block


def _encoder(model: Model) -> BeitModel:
    return model if isinstance(model, BeitModel) else model.beit


@jax.jit
def _attentions(encoder: Any, pixel_values: Float[Array, "b h w c"]) -> Float[Array, "depth b heads n n"]:
    return encoder(pixel_values, output_attentions=True).attentions
