"""Layers on feature maps [b, h, w, c]: resizing and pooling as in torch, batch norm, convolutions.

Running statistics are variables of type `nnx.BatchStat`. In checkpoints they stand among the parameters, as ``mean``
and ``var``. Convolutions read `dtype`; everything else is float32.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from beit_jax.errors import BeitJaxError
from beit_jax.resize import linear_matrix

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # the share of the new batch, as torch defines it
HEAD_DROPOUT = 0.1  # of whole channels before the classifiers, in training, as in mmseg; transformers has none


def map_size(x: Float[Array, "b h w c"]) -> tuple[int, int]:
    """(height, width)."""
    return x.shape[1], x.shape[2]


def resize_bilinear(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """torch's ``interpolate(mode="bilinear", align_corners=False)``: no antialiasing when shrinking."""
    if x.shape[1:3] == size:
        return x
    rows, columns = (jnp.asarray(linear_matrix(old, new), x.dtype) for old, new in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("ty,byxc,sx->btsc", rows, x, columns, precision="highest")


def adaptive_average_pool(x: Float[Array, "b h w c"], bins: int) -> Float[Array, "b bins bins c"]:
    """torch's ``AdaptiveAvgPool2d``: bins of equal size, rounded outwards, so that neighbouring bins overlap."""
    rows, columns = (jnp.asarray(_average_matrix(side, bins), x.dtype) for side in x.shape[1:3])
    return jnp.einsum("ty,byxc,sx->btsc", rows, x, columns, precision="highest")


@lru_cache(maxsize=64)
def _average_matrix(size: int, bins: int) -> np.ndarray:
    """[bins, size]: each row averages the positions from floor(i * size / bins) to ceil((i + 1) * size / bins)."""
    matrix = np.zeros((bins, size))
    for i in range(bins):
        start, end = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:end] = 1.0 / (end - start)
    return matrix


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The maximum of every 2 x 2 positions. The last row or column of an odd size is left out, as in torch."""
    batch, height, width, channels = x.shape
    even = x[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class BatchNorm(nnx.Module):
    """torch's BatchNorm2d in float32: training normalises by the batch and moves the running statistics.

    Training normalises by the biased variance. The running variance is the unbiased one (times n / (n - 1)). The
    statistics of a sharded batch are global, as in torch's SyncBatchNorm.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.mean = nnx.BatchStat(jnp.zeros((features,)))
        self.var = nnx.BatchStat(jnp.ones((features,)))

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        mean, var = self.updated(x) if train else (self.mean[...], self.var[...])
        spread = jax.lax.rsqrt(var.astype(jnp.float32) + BATCH_NORM_EPSILON)
        return (x - mean) * spread * self.scale[...] + self.bias[...]

    def updated(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """The mean and the biased variance of the batch. The running statistics take their share of both first.

        Raises:
            BeitJaxError: the batch has a single value per channel.
        """
        count = x.size // x.shape[-1]
        if count < 2:
            raise BeitJaxError("training: batch statistics need two values per channel, found 1; use a batch of 2")
        mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        for running, new in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            new = jax.lax.stop_gradient(new)
            running[...] = (1.0 - BATCH_NORM_MOMENTUM) * running[...] + BATCH_NORM_MOMENTUM * new
        return mean, var


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm, ReLU; the map keeps its size."""

    def __init__(self, inputs: int, outputs: int, side: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        kaiming = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")  # as mmseg's ConvModule
        self.kernel = nnx.Param(kaiming(rngs.params(), (side, side, inputs, outputs)))
        self.norm = BatchNorm(outputs)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w d"]:
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(self.norm(x.astype(jnp.float32), train))


class Upsample(nnx.Module):
    """torch's ConvTranspose2d with kernel and stride 2: every position becomes 2 x 2 positions, without overlap."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(normal(rngs.params(), (2, 2, features, features)))
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        batch, height, width, _ = x.shape
        kernel = self.kernel[...].astype(self.dtype)
        x = jnp.einsum("bhwc,ijcd->bhiwjd", x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return x.reshape(batch, 2 * height, 2 * width, -1) + self.bias[...]


class PixelClassifier(nnx.Module):
    """A linear classifier of every position, after dropout of channels in training."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal(0.01)(rngs.params(), (1, 1, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""] | None) -> Float[Array, "b h w classes"]:
        if key is not None:
            keep = jax.random.bernoulli(key, 1.0 - HEAD_DROPOUT, (x.shape[0], 1, 1, x.shape[3]))
            x = jnp.where(keep, x / (1.0 - HEAD_DROPOUT), 0.0)
        kernel = self.kernel[0, 0].astype(self.dtype)
        logits = jnp.einsum("bhwc,cd->bhwd", x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return logits + self.bias[...]
