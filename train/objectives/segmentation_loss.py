"""The loss of semantic segmentation: cross entropy of both heads at the labels' size, in bands of rows.

Upsampled logits of a batch of four at 640 pixels and 150 classes are 1 GB in float32, and the loss needs several such
arrays. They are therefore made, used and, in the backward pass, made again band by band.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.segmenter import SegmenterOutput
from beit_jax.resize import linear_matrix

Average = Literal["valid", "all"]
BAND = 32  # rows of labels whose logits exist at a time


def segmentation_loss(
    output: SegmenterOutput, labels: Int[Array, "b height width"], config: BeitConfig, *, average: Average = "valid"
) -> Float[Array, ""]:
    """Cross entropy of the logits plus ``config.auxiliary_loss_weight`` times that of the auxiliary ones.

    Args:
        labels: class numbers; ``config.semantic_loss_ignore_index`` where a pixel does not count.
        average: over the pixels that count, as transformers does, or over all, as mmseg 0.11 trained the models.

    Raises:
        BeitJaxError: labels of another shape than [b, height, width].
    """
    assert output.logits is not None
    ignore = config.semantic_loss_ignore_index
    loss = pixel_cross_entropy(output.logits, labels, ignore, average)
    if output.auxiliary_logits is None:
        return loss
    return loss + config.auxiliary_loss_weight * pixel_cross_entropy(output.auxiliary_logits, labels, ignore, average)


def pixel_cross_entropy(
    logits: Float[Array, "b h w classes"], labels: Int[Array, "n height width"], ignore: int, average: Average
) -> Float[Array, ""]:
    """Mean cross entropy after bilinear resizing of the logits to the labels' size, as torch's ``interpolate``."""
    if labels.ndim != 3 or len(labels) != len(logits):
        raise BeitJaxError(f"labels: expected [{len(logits)}, height, width], found {list(labels.shape)}")
    height, width = labels.shape[1:]
    bands = -(-height // BAND)
    spare = bands * BAND - height
    rows = np.pad(linear_matrix(logits.shape[1], height), [(0, spare), (0, 0)]).reshape(bands, BAND, -1)
    columns = jnp.asarray(linear_matrix(logits.shape[2], width), logits.dtype)
    padded = jnp.pad(labels, [(0, 0), (0, spare), (0, 0)], constant_values=ignore)

    @jax.checkpoint
    def band(rows: Array, labels: Array) -> Array:
        resized = jnp.einsum("ty,byxc,sx->btsc", rows, logits, columns, precision="highest")
        counted = labels != ignore
        chosen = jnp.take_along_axis(resized, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(counted, jax.nn.logsumexp(resized, axis=-1) - chosen, 0.0).sum()

    def add(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        return total + band(*piece), None

    by_band = padded.reshape(len(labels), bands, BAND, width).swapaxes(0, 1)
    total, _ = jax.lax.scan(add, jnp.zeros(()), (jnp.asarray(rows, logits.dtype), by_band))
    return total / (labels.size if average == "all" else (labels != ignore).sum())
