"""DALL-E's discrete VAE: the encoder makes BEiT's visual tokens, and the decoder makes images of tokens.

Precision. Parameters are float32. Convolutions compute in `dtype`, except the last of the encoder and the first of the
decoder, which compute in float32. The reference computes the other convolutions in float16 on CUDA, and in float32 on
the CPU. So BEiT was trained with the tokens of ``dtype=jnp.float16``. Where two logits are nearly equal, the two dtypes
may give different tokens.

Source: openai/DALL-E@5be4b23 dall_e/encoder.py, decoder.py and utils.py.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from beit_jax.errors import BeitJaxError, size_near
from beit_jax.tokenizers.configs import DvaeDecoderConfig, DvaeEncoderConfig

ArrayLike = Array | np.ndarray

LOGIT_LAPLACE_EPS = 0.1


def map_pixels(pixel_values: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Maps [0, 1] to [0.1, 0.9], where the decoder's logit-Laplace distribution is well behaved."""
    return (1.0 - 2.0 * LOGIT_LAPLACE_EPS) * jnp.asarray(pixel_values) + LOGIT_LAPLACE_EPS


def unmap_pixels(mapped: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """The inverse of `map_pixels`, clipped to [0, 1]."""
    return jnp.clip((jnp.asarray(mapped) - LOGIT_LAPLACE_EPS) / (1.0 - 2.0 * LOGIT_LAPLACE_EPS), 0.0, 1.0)


def _conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    """A convolution with bias that keeps the image's size, with the initial weights of the reference."""
    init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
    return nnx.Conv(inputs, outputs, (size, size), padding="SAME", kernel_init=init, rngs=rngs, **options)


# Where the reference computes in float32, TPUs and GPUs must not round the factors of a product either.
_EXACT: Mapping[str, Any] = {"dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}


class DvaeBlock(nnx.Module):
    """Residual block ``shortcut(x) + gain * path(x)``; the path is ReLU and a convolution, for each size in `sizes`."""

    def __init__(
        self, inputs: int, outputs: int, sizes: tuple[int, int, int, int], gain: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        hidden = outputs // 4
        self.shortcut = None if inputs == outputs else _conv(inputs, outputs, 1, rngs, dtype=dtype)
        self.conv_1 = _conv(inputs, hidden, sizes[0], rngs, dtype=dtype)
        self.conv_2 = _conv(hidden, hidden, sizes[1], rngs, dtype=dtype)
        self.conv_3 = _conv(hidden, hidden, sizes[2], rngs, dtype=dtype)
        self.conv_4 = _conv(hidden, outputs, sizes[3], rngs, dtype=dtype)
        self.gain = gain

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        path = x
        for conv in (self.conv_1, self.conv_2, self.conv_3, self.conv_4):
            path = conv(jax.nn.relu(path))
        return (x if self.shortcut is None else self.shortcut(x)) + self.gain * path


class DvaeGroup(nnx.Module):
    """Blocks ``block_1``, ``block_2``, ... of one width."""

    def __init__(self, inputs: int, outputs: int, count: int, **options: Any):
        for i in range(count):
            setattr(self, f"block_{i + 1}", DvaeBlock(inputs if i == 0 else outputs, outputs, **options))
        self.count = count

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        for i in range(self.count):
            x = getattr(self, f"block_{i + 1}")(x)
        return x


def _halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The maximum of every 2 x 2 positions."""
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, np.array(-np.inf, x.dtype), jax.lax.max, window, window, "VALID")


def _doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Every position repeated as 2 x 2 positions."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class DvaeEncoder(nnx.Module):
    """Images to the logits of visual tokens. A `Tokenizer` (see `beit_jax.tokenizers.interface`).

    Args:
        dtype: the dtype that all convolutions but the last compute in.
        rngs: draws the initial parameters; loading a checkpoint never draws any.
    """

    def __init__(self, config: DvaeEncoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        gain = 1.0 / (config.group_count * config.n_blk_per_group) ** 2
        self.input = _conv(config.input_channels, config.n_hid, 7, rngs, dtype=dtype)
        width = config.n_hid
        for i in range(config.group_count):
            outputs = config.n_hid * 2**i
            group = DvaeGroup(
                width, outputs, config.n_blk_per_group, sizes=(3, 3, 3, 1), gain=gain, dtype=dtype, rngs=rngs
            )
            setattr(self, f"group_{i + 1}", group)
            width = outputs
        self.output = _conv(width, config.vocab_size, 1, rngs, **_EXACT)
        self.config = config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.image_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.config.stride, self.config.stride

    @property
    def value_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def __call__(self, pixel_values: Float[ArrayLike, "b height width c"]) -> Float[Array, "b h w vocab"]:
        """Logits, float32.

        Args:
            pixel_values: in [0, 1], not normalised; sides are multiples of the stride.

        Raises:
            BeitJaxError: not [batch, height, width, channels], or sides that the stride does not divide.
        """
        self.check_shape(pixel_values.shape)
        x = self.input(map_pixels(pixel_values))
        for i in range(self.config.group_count):
            if i:
                x = _halved(x)
            x = getattr(self, f"group_{i + 1}")(x)
        return self.output(jax.nn.relu(x).astype(jnp.float32))

    def tokens(self, pixel_values: Float[ArrayLike, "b height width c"]) -> Int[Array, "b h w"]:
        """The most probable token at every position, int32; arguments and errors as in `__call__`."""
        return jnp.argmax(self(pixel_values), axis=-1).astype(jnp.int32)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuses a shape that the convolutions cannot take, or whose border the pooling would cut.

        Raises:
            BeitJaxError: as in `__call__`.
        """
        channels, stride = self.config.input_channels, self.config.stride
        if len(shape) != 4 or shape[-1] != channels:
            raise BeitJaxError(f"pixel_values: expected [batch, height, width, {channels}], found {list(shape)}")
        if any(side % stride or not side for side in shape[1:3]):
            raise BeitJaxError(
                f"pixel_values: height and width {shape[1:3]} are not multiples of the stride {stride}, "
                f"as {size_near(shape[1:3], (stride, stride))} would be"
            )


class DvaeDecoder(nnx.Module):
    """Visual tokens to images.

    Args:
        dtype: the dtype that all convolutions but the first compute in.
        rngs: draws the initial parameters; loading a checkpoint never draws any.
    """

    def __init__(self, config: DvaeDecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        gain = 1.0 / (config.group_count * config.n_blk_per_group) ** 2
        self.input = _conv(config.vocab_size, config.n_init, 1, rngs, **_EXACT)
        width = config.n_init
        for i in range(config.group_count):
            outputs = config.n_hid * 2 ** (config.group_count - 1 - i)
            group = DvaeGroup(
                width, outputs, config.n_blk_per_group, sizes=(1, 3, 3, 3), gain=gain, dtype=dtype, rngs=rngs
            )
            setattr(self, f"group_{i + 1}", group)
            width = outputs
        self.output = _conv(width, 2 * config.output_channels, 1, rngs, dtype=dtype)
        self.config = config

    def __call__(self, codes: Float[ArrayLike, "b h w vocab"]) -> Float[Array, "b height width d"]:
        """Mean and log scale of every pixel's logit-Laplace distribution, float32.

        The last axis has the means of all channels, then the log scales.

        Args:
            codes: a one-hot vector at every position, or probabilities.

        Raises:
            BeitJaxError: not [batch, rows, columns, vocab_size].
        """
        if codes.ndim != 4 or codes.shape[-1] != self.config.vocab_size:
            raise BeitJaxError(
                f"codes: expected [batch, rows, columns, {self.config.vocab_size}], found {list(codes.shape)}"
            )
        return self.from_embedded(self.input(jnp.asarray(codes)))

    def decode(self, tokens: Int[ArrayLike, "b h w"]) -> Float[Array, "b height width c"]:
        """The image of these tokens, in [0, 1]: the mode of the distribution.

        Args:
            tokens: in [0, vocab_size), as `DvaeEncoder.tokens` returns them.
        """
        bias = self.input.bias
        assert bias is not None  # every convolution here has one
        statistics = self.from_embedded(self.input.kernel[...][0, 0][jnp.asarray(tokens)] + bias[...])
        return unmap_pixels(jax.nn.sigmoid(statistics[..., : self.config.output_channels]))

    def from_embedded(self, x: Float[Array, "b h w n"]) -> Float[Array, "b height width d"]:
        """The decoder after its first convolution, which is a look-up for single tokens."""
        for i in range(self.config.group_count):
            if i:
                x = _doubled(x)
            x = getattr(self, f"group_{i + 1}")(x)
        return self.output(jax.nn.relu(x)).astype(jnp.float32)
