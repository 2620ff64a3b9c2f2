"""A tokenizer of DALL-E's kind, learned from one's own images: a discrete variational autoencoder.

The encoder gives every place of its grid a distribution over the vocabulary, the decoder gives every value of every
pixel a distribution, and both are learned together, through codes that are relaxed from one-hot vectors to
probabilities.

Source: arXiv 2102.12092 ("the paper" here), section 2.1 and appendix A. The code of its training was never published;
the networks are those of `beit_jax.tokenizers.dvae`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.interface import abstract_module
from beit_jax.tokenizers.configs import DvaeDecoderConfig, DvaeEncoderConfig
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeEncoder, map_pixels, unmap_pixels
from beit_jax.tree import Nested

from ..augmentation.mixing import scaled
from ..recipe import LAYERS, NOT_NEGATIVE, SHARE, SIZE, TWO_POSITIVE, Recipe
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import Initial, Parts, State
from .codebook import counts, perplexity
from .objective import Result, Sources
from .unlabelled import UnlabelledImages, UnlabelledRecipe

# A convolutional network has nothing of a transformer's; of `model` it reads the size of images and how to compute.
_ABSENT = (
    "variant patch_size hidden_size depth heads mlp activation absolute_positions epsilon position_bias "
    "position_resize initializer_range family dropout attention_dropout layer_scale residual"
).split()


@dataclass(frozen=True)
class DvaeOptions:
    """Training of a tokenizer of DALL-E's kind. Source: arXiv 2102.12092, appendix A."""

    vocab_size: Annotated[int, SIZE] = 8192
    width: Annotated[int, SIZE] = 256
    """Channels of the encoder's first group and of the decoder's last."""
    groups: Annotated[int, LAYERS] = 4
    """Groups of blocks; a token covers 2 ** (groups - 1) pixels along each axis."""
    blocks: Annotated[int, LAYERS] = 2
    """Residual blocks of a group."""
    embedding: Annotated[int, SIZE] = 128
    """Channels of a token's embedding in the decoder."""
    temperature: Annotated[tuple[float, float], TWO_POSITIVE] = (1.0, 1 / 16)
    """Temperature of the relaxed one-hot codes, at the start and at the end of its cosine."""
    temperature_share: Annotated[float, SHARE] = 0.5
    """Share of the run over which the temperature falls; in the paper 150,000 of 3,000,000 steps."""
    divergence: Annotated[float, NOT_NEGATIVE] = 6.6
    """Final weight of the Kullback-Leibler divergence of a token's distribution from the uniform one."""
    divergence_share: Annotated[float, SHARE] = 0.1
    """Share of the run over which that weight grows from zero; in the paper 5,000 of its steps."""


@dataclass(frozen=True)
class DvaeRecipe(UnlabelledRecipe):
    """A run that trains a tokenizer of DALL-E's kind, with its decoder."""

    objective: ClassVar[str] = "dvae"
    dvae: DvaeOptions = field(default_factory=DvaeOptions)

    def check(self) -> None:
        super().check()
        self.check_without_average()
        self.check_without_freezing()
        self.check_without_layers()
        self.check_without(*_ABSENT)

    def for_tpus(self) -> "DvaeRecipe":
        """A convolutional network has no blocks to compute again; its feature maps want many chips."""
        recipe = super().for_tpus()
        return replace(recipe, topology="v5e:8x8", model=replace(recipe.model, remat="none"))


@dataclass(frozen=True)
class Dvae(UnlabelledImages[DvaeRecipe]):
    """A tokenizer of DALL-E's kind and its decoder learn from images alone."""

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        """The configuration of a model that would have these tokens for patches; only its image size counts."""
        assert isinstance(recipe, DvaeRecipe)
        if recipe.model.image_size is None:
            raise BeitJaxError("--model.image-size: expected pixels of the tokenizer's images, found None")
        size = recipe.model.image_size
        sides = size if isinstance(size, tuple) else (size, size)
        channels = recipe.model.channels or 3
        encoder, _ = configs(recipe.dvae, sides, channels)
        return BeitConfig(image_size=sides, patch_size=(encoder.stride, encoder.stride), num_channels=channels)

    @property
    def network(self) -> Mapping[str, Any]:
        encoder, decoder = configs(self.recipe.dvae, self.config.image_size, self.config.num_channels)
        return vars(encoder) | vars(decoder)

    @property
    def graph(self) -> nnx.GraphDef[Any]:
        dtype = jnp.dtype(self.recipe.model.dtype)
        return abstract_dvae(self.recipe.dvae, self.config.image_size, self.config.num_channels, dtype=dtype)[0]

    @property
    def criterion(self) -> Criterion:
        return dvae(self.recipe, self.steps)

    def shapes(self) -> Parts:
        return Parts(abstract_dvae(self.recipe.dvae, self.config.image_size, self.config.num_channels)[1], {}, {})

    def initial(self, key: Key[Array, ""]) -> Initial:
        config = self.config
        draw = partial(initial_dvae, self.recipe.dvae, config.image_size, key, channels=config.num_channels)
        return Initial(draw, {}, {})

    def results(self, state: State) -> dict[str, Result]:
        encoder, decoder = configs(self.recipe.dvae, self.config.image_size, self.config.num_channels)
        return {
            "tokenizer": Result(encoder, encoder_params(state.params)),
            "decoder": Result(decoder, decoder_params(state.params)),
        }


class DiscreteVae(nnx.Module):
    """Encoder and decoder of one vocabulary: parameters ``encoder/...`` and ``decoder/...``.

    Args:
        dtype: what convolutions compute in; the one before the codes and the one after them are float32 always.
        rngs: draws the initial parameters, as the published code does.
    """

    def __init__(
        self, encoder: DvaeEncoderConfig, decoder: DvaeDecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.encoder = DvaeEncoder(encoder, dtype=dtype, rngs=rngs)
        self.decoder = DvaeDecoder(decoder, dtype=dtype, rngs=rngs)


def configs(
    options: DvaeOptions, image_size: tuple[int, int], channels: int = 3
) -> tuple[DvaeEncoderConfig, DvaeDecoderConfig]:
    """Both halves of the model.

    Args:
        image_size: (height, width) of the images; only the encoder's configuration records it.
        channels: of the images.

    Raises:
        BeitJaxError: options that describe no model, or an image size that the token's size does not divide.
    """
    shared = {
        "n_hid": options.width,
        "vocab_size": options.vocab_size,
        "group_count": options.groups,
        "n_blk_per_group": options.blocks,
    }
    encoder = DvaeEncoderConfig(**shared, image_size=image_size, input_channels=channels)
    return encoder, DvaeDecoderConfig(**shared, n_init=options.embedding, output_channels=channels)


def abstract_dvae(
    options: DvaeOptions, image_size: tuple[int, int], channels: int = 3, *, dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef[DiscreteVae], Nested]:
    """The graph of a `DiscreteVae` and the shapes of its parameters, nested."""
    both = configs(options, image_size, channels)
    return abstract_module(lambda: DiscreteVae(*both, dtype=dtype, rngs=nnx.Rngs(0)))


def initial_dvae(
    options: DvaeOptions, image_size: tuple[int, int], key: Key[Array, ""], *, channels: int = 3
) -> Nested:
    """Parameters to start from, float32: biases zero, kernels normal with variance 1 / fan-in. Traceable."""
    return nnx.to_pure_dict(nnx.state(DiscreteVae(*configs(options, image_size, channels), rngs=nnx.Rngs(key))))


def encoder_params(params: Nested) -> Nested:
    """The tokenizer's part of the parameters of a `DiscreteVae`: those of `DvaeEncoder`."""
    return params["encoder"]


def decoder_params(params: Nested) -> Nested:
    """The decoder's part of the parameters of a `DiscreteVae`: those of `DvaeDecoder`."""
    return params["decoder"]


def dvae(recipe: DvaeRecipe, steps: int) -> Criterion:
    """Images themselves: ``image`` [b, h, w, c], which `mixing.scaled` brings to [0, 1].

    The loss is the negative evidence lower bound, in nats, over the number of values of an image (pixels times
    channels), as in the paper's appendix A.2:

        loss = (-sum over values of ln p(x | codes) + beta * sum over tokens of KL(q || uniform)) / values

    averaged over images. A token covers ``4 ** (groups - 1)`` pixels, so that this is the mean of the first term over
    values plus, for RGB, ``beta / (3 * 4 ** (groups - 1))`` times the mean of the second over tokens: the paper's
    beta / 192 for its four groups. `DvaeOptions.divergence` is this beta. q is the encoder's softmax,
    without noise or temperature.

    Training draws relaxed codes. Without a key nothing is drawn: the codes are the most probable tokens, one-hot, and
    beta has its final value whatever the step, so that evaluations of a run can be compared.

    Metrics: ``reconstruction`` (the first term, per value) and ``divergence`` (KL, per token; at most the logarithm of
    the vocabulary), both before weighting; ``mse`` of the distributions' modes, for values in [0, 1];
    ``codebook_used``, the share of the vocabulary that is the most probable token somewhere in the batch (or in the
    part of it that is computed at once); and ``perplexity``, the exponential of the entropy of those tokens'
    frequencies: 1 where one token has replaced all others.

    Args:
        steps: of the whole run; temperature and beta reach their final values after shares of it.
    """
    options = recipe.dvae

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        return {"image": scaled(batch["image"], recipe.data.scale)}

    def loss(
        model: DiscreteVae, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        images = batch["image"]
        logits = model.encoder(images)
        tokens = logits.argmax(axis=-1)
        if key is None:
            codes, weight = jax.nn.one_hot(tokens, options.vocab_size), jnp.asarray(options.divergence)
        else:
            codes = relaxed_codes(logits, code_noise(key, logits.shape), batch["temperature"])
            weight = batch["divergence_weight"]
        mean, log_scale = jnp.split(model.decoder(codes), 2, axis=-1)
        reconstruction = negative_log_likelihood(map_pixels(images), mean, log_scale).mean()
        divergence = divergence_from_uniform(logits).mean()
        sizes = counts(tokens, options.vocab_size)
        metrics = {
            "reconstruction": reconstruction,
            "divergence": divergence,
            "mse": jnp.square(unmap_pixels(jax.nn.sigmoid(mean)) - images).mean(),
            "codebook_used": (sizes > 0).mean(),
            "perplexity": perplexity(sizes),
        }
        return reconstruction + weight * (tokens.size / images.size) * divergence, metrics

    def schedule(step: Int[Array, ""]) -> Metrics:
        return {
            "temperature": _cosine(step, *options.temperature, options.temperature_share * steps),
            "divergence_weight": _cosine(step, 0.0, options.divergence, options.divergence_share * steps),
        }

    return Criterion(prepare, loss, schedule)


def code_noise(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard Gumbel noise, float32: the largest of logits plus it is distributed as their softmax."""
    return jax.random.gumbel(key, shape, jnp.float32)


def relaxed_codes(
    logits: Float[Array, "b h w vocab"], noise: Float[Array, "b h w vocab"], temperature: Float[Array, ""]
) -> Float[Array, "b h w vocab"]:
    """Probabilities that approach a drawn one-hot vector as the temperature approaches zero. Source: 1611.01144."""
    return jax.nn.softmax((logits + noise) / temperature, axis=-1)


def negative_log_likelihood(
    mapped: Float[Array, "*shape"], mean: Float[Array, "*shape"], log_scale: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Minus the logarithm of the logit-Laplace density: that of the sigmoid of a Laplace distributed variable.

    Args:
        mapped: values in (0, 1), by `beit_jax.tokenizers.dvae.map_pixels`.
        mean, log_scale: of the Laplace distribution.

    Source: the paper's appendix A.3.
    """
    log, log_rest = jnp.log(mapped), jnp.log1p(-mapped)
    return jnp.log(2.0) + log_scale + log + log_rest + jnp.abs(log - log_rest - mean) * jnp.exp(-log_scale)


def divergence_from_uniform(logits: Float[Array, "b h w vocab"]) -> Float[Array, "b h w"]:
    """KL divergence of the softmax from the uniform distribution: the vocabulary's logarithm less the entropy."""
    log_share = jax.nn.log_softmax(logits, axis=-1)
    return jnp.log(float(logits.shape[-1])) + (jnp.exp(log_share) * log_share).sum(axis=-1)


def _cosine(step: Int[Array, ""], start: float, end: float, span: float) -> Float[Array, ""]:
    """Half a cosine from `start` at step 0 to `end` at step `span` and after it."""
    progress = jnp.minimum(step / span, 1.0) if span else jnp.ones(())
    return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
