"""What goes on inside a model, as arrays: attention in an image, its rollout, and the bias that attention gets.

Blocks and heads are counted from 1, as `beit-jax parity` and the scores of probes count them, and so are the rows and
columns of patches, from the top left.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, UInt8

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import ImageLike
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.build import Model
from beit_jax.models.encoder import BeitModel
from beit_jax.models.interface import patch_grid
from beit_jax.models.position import Grid


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """What every token of an image attends to, in every block and head.

    Attributes:
        image: as the model sees it, before normalisation; greyscale three times over.
        probabilities: rows sum to 1; token 0 is the class token, the patches follow row by row.
        grid: (rows, columns) of patches.
        name: of the image, for titles.
    """

    image: UInt8[np.ndarray, "height width 3"]
    probabilities: Float[np.ndarray, "depth heads n n"]
    grid: Grid
    name: str = "image"

    @property
    def depth(self) -> int:
        return len(self.probabilities)

    def head_maps(
        self, block: int | None = None, patch: tuple[int, int] | None = None
    ) -> Float[np.ndarray, "heads rows columns"]:
        """What share of its attention a token of a block spends on every patch; the rest is the class token's.

        Args:
            block: by default the last.
            patch: the (row, column) of the token; by default the class token.

        Raises:
            BeitJaxError: no such block or patch.
        """
        rows = self.probabilities[checked_block(block, self.depth) - 1, :, self.token(patch), 1:]
        return rows.reshape(-1, *self.grid)

    def rollout_map(self, patch: tuple[int, int] | None = None) -> Float64[np.ndarray, "rows columns"]:
        """How much of every patch reaches a token (by default the class token) after all blocks, by `rollout`.

        Raises:
            BeitJaxError: no such patch.
        """
        return rollout(self.probabilities)[self.token(patch), 1:].reshape(self.grid)

    def token(self, patch: tuple[int, int] | None) -> int:
        """The index of a patch among the tokens; of None, the class token's.

        Raises:
            BeitJaxError: no such patch.
        """
        if patch is None:
            return 0
        (row, column), (rows, columns) = patch, self.grid
        if not (1 <= row <= rows and 1 <= column <= columns):
            raise BeitJaxError(f"patch: expected a row 1 to {rows} and a column 1 to {columns}, found {row} {column}")
        return 1 + (row - 1) * columns + (column - 1)


@dataclass(frozen=True, eq=False)
class PositionBias:
    """What a model adds to the scaled attention scores of every head for where two tokens lie.

    Attributes:
        offsets: [head, dy + rows - 1, dx + columns - 1] where the attended patch lies dy rows below the one that
            attends and dx columns to its right.
        cls_to_patch, patch_to_cls, cls_to_cls: of the class token, which has no place: it attends to a patch, a patch
            to it, and it to itself.
        table: which table it is: "shared", "block 3" or, the sum of both, "block 3 + shared".
    """

    offsets: Float[np.ndarray, "heads y x"]
    cls_to_patch: Float[np.ndarray, " heads"]
    patch_to_cls: Float[np.ndarray, " heads"]
    cls_to_cls: Float[np.ndarray, " heads"]
    table: str

    def class_entries(self) -> dict[str, list[float]]:
        """The numbers of the class token by head, for JSON."""
        return {name: getattr(self, name).tolist() for name in ("cls_to_patch", "patch_to_cls", "cls_to_cls")}


def image_attention(model: Model, processor: ImageProcessor, image: ImageLike) -> ImageAttention:
    """Runs an image through a model and keeps the attention of all blocks: depth x heads x n^2 numbers.

    Raises:
        BeitJaxError: an image that cannot be read, or that does not come out in a size the model takes.
    """
    seen = replace(processor, rescale_factor=None, mean=None, std=None)(image)[0].astype(np.uint8)
    pixels = processor(image)
    grid = patch_grid(model.config, pixels.shape)
    probabilities = np.asarray(_attentions(_encoder(model), jnp.asarray(pixels)))[:, 0]
    name = printable(Path(image).name, 40) if isinstance(image, str | os.PathLike) else "image"
    return ImageAttention(np.broadcast_to(seen, (*seen.shape[:2], 3)), probabilities, grid, name)


def rollout(probabilities: Float[np.ndarray, "depth heads n n"]) -> Float64[np.ndarray, "n n"]:
    """Attention rollout: how much of every input token is in every output token; rows sum to 1.

    The heads' mean and the residual connection count for a half each, in every block: W = (A + I) / 2, rows normalised;
    the result is the product of all W, the last block's to the left. What values, MLPs and layer scale do is not seen.

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
        block: all that this block adds: its own table, the shared one, or the sum of both. By default the shared table
            alone, or, where there is none, the last block's.

    Raises:
        BeitJaxError: the model has no relative position bias, or not so many blocks.
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
    # A table's rows count from the attended patch to the attending one: backwards.
    offsets = np.moveaxis(table[:-3].reshape(*sides, -1)[::-1, ::-1], -1, 0)
    cls_to_patch, patch_to_cls, cls_to_cls = table[-3:]
    return PositionBias(offsets, cls_to_patch, patch_to_cls, cls_to_cls, " + ".join(words))


def checked_block(block: int | None, depth: int) -> int:
    """`block`, or the last.

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
