"""BEiT v2's tokenizer, vector-quantised knowledge distillation (VQ-KD, arXiv:2208.06366).

The encoder is a vision transformer and a small network down to 32 dimensions. The token of a patch is the nearest of
8192 unit vectors. The decoder is a shallow transformer from those vectors to the features of the teacher (CLIP or DINO)
that the tokenizer was trained with.

Source: microsoft/unilm@768a3c8 beit2/modeling_vqkd.py, norm_ema_quantizer.py and modeling_finetune.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from beit_jax.models.encoder import BeitModel
from beit_jax.models.interface import ArrayLike, Remat, patch_grid
from beit_jax.tokenizers.configs import VqkdConfig

_EXACT = jax.lax.Precision.HIGHEST  # as the reference, without mixed precision: small differences change tokens


class TaskLayer(nnx.Module):
    """Dense, tanh, dense, in float32."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.fc1 = nnx.Linear(inputs, inputs, precision=_EXACT, kernel_init=init, rngs=rngs)
        self.fc2 = nnx.Linear(inputs, outputs, precision=_EXACT, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        return self.fc2(jnp.tanh(self.fc1(x)))


class Codebook(nnx.Module):
    """Unit vectors, one per token, and the statistics that training moves them by.

    Training moves the vectors by averages, never by gradients. So all variables are `nnx.BatchStat`.

    Attributes:
        embedding: [vocab, d], normalised when it was stored.
        usage: [vocab], moving average of the number of times that a batch draws each token.
        cluster_size, embedding_average: [vocab] and [vocab, d], accumulators that the reference stores.
        initialised: [1], 1 if the vectors come from training or a checkpoint.
    """

    def __init__(self, vocab_size: int, dim: int, rngs: nnx.Rngs):
        self.embedding = nnx.BatchStat(l2_normalised(jax.random.normal(rngs.params(), (vocab_size, dim))))
        self.usage = nnx.BatchStat(jnp.zeros((vocab_size,)))
        self.cluster_size = nnx.BatchStat(jnp.zeros((vocab_size,)))
        self.embedding_average = nnx.BatchStat(jnp.copy(self.embedding[...]))  # a buffer cannot be donated twice
        self.initialised = nnx.BatchStat(jnp.zeros((1,)))

    def nearest(self, features: Float[Array, "b h w d"]) -> Int[Array, "b h w"]:
        """The token of every feature, int32: the vector nearest to the normalised feature."""
        embedding = self.embedding[...]
        products = jnp.einsum("bhwd,vd->bhwv", l2_normalised(features), embedding, precision=_EXACT)
        distances = jnp.sum(embedding**2, axis=-1) - 2.0 * products
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def l2_normalised(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """`x` divided by its Euclidean norm, or by 1e-12 if the norm is less (torch's ``F.normalize``)."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def patch_features(
    model: BeitModel, pixel_values: Float[ArrayLike, "b height width c"], remat: Remat = "none"
) -> Float[Array, "b h w d"]:
    """The normalised output of every patch, as a map. The norm is the pooler's, applied to every patch."""
    rows, columns = patch_grid(model.config, pixel_values.shape)
    patches = model.pooler_norm(model(pixel_values, remat=remat).last_hidden_state[:, 1:])
    return patches.reshape(len(patches), rows, columns, -1)


class VqkdTokenizer(nnx.Module):
    """Images to tokens, and tokens to the teacher's features. A `Tokenizer` (see `beit_jax.tokenizers.interface`).

    Args:
        dtype: the dtype that the matrix products of both transformers compute in; codes are float32.
        rngs: draws the initial parameters; loading a checkpoint never draws any.
    """

    def __init__(self, config: VqkdConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.encoder = BeitModel(config.encoder, dtype=dtype, rngs=rngs)
        self.encode_task = TaskLayer(config.hidden_size, config.codebook_dim, rngs)
        self.codebook = Codebook(config.vocab_size, config.codebook_dim, rngs)
        self.decoder = BeitModel(config.decoder, dtype=dtype, rngs=rngs)
        self.decode_task = TaskLayer(config.decoder_hidden_size, config.target_size, rngs)
        self.config = config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.image_size

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.config.patch_size

    @property
    def value_range(self) -> tuple[float, float]:
        return 0.0, 1.0

    def encode(
        self, pixel_values: Float[ArrayLike, "b height width c"], *, remat: Remat = "none"
    ) -> Float[Array, "b h w d"]:
        """The features that `tokens` compares with the codes, un-normalised.

        Args:
            pixel_values: in [0, 1], not normalised. The reference also takes [0, 255], if a batch's maximum is above 1.
            remat: as in `BeitModel.__call__`.

        Raises:
            BeitJaxError: wrong shapes, see `beit_jax.models.interface.patch_grid`.
        """
        patch_grid(self.config.encoder, pixel_values.shape)
        return self.encode_task(patch_features(self.encoder, 2.0 * jnp.asarray(pixel_values) - 1.0, remat))

    def tokens(self, pixel_values: Float[ArrayLike, "b height width c"]) -> Int[Array, "b h w"]:
        """The nearest code of every patch, int32; arguments and errors as in `encode`."""
        return self.codebook.nearest(self.encode(pixel_values))

    def decode(self, tokens: Int[ArrayLike, "b h w"]) -> Float[Array, "b h w t"]:
        """The teacher's features, as the decoder predicts them from tokens in [0, vocab_size)."""
        return self.decode_codes(self.codebook.embedding[...][jnp.asarray(tokens)])

    def decode_codes(self, codes: Float[ArrayLike, "b h w d"], *, remat: Remat = "none") -> Float[Array, "b h w t"]:
        """As `decode`, from codes instead of tokens: training differentiates by the codes."""
        return self.decode_task(patch_features(self.decoder, codes, remat))
