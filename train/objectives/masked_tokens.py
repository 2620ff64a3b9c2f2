"""Masked image modelling on visual tokens: BEiT, and BEiT v2 with its patch aggregation."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd, prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, Key, UInt8

from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.errors import BeitJaxError
from beit_jax.kernels.elements import for_accelerators, in_order
from beit_jax.looking.reconstruct import grid_picture, reconstruct
from beit_jax.models.build import build_model
from beit_jax.models.masked_image_modeling import BeitForMaskedImageModeling
from beit_jax.models.partition import shards_of
from beit_jax.terminal import Progress, no_progress
from beit_jax.tokenizers.build import abstract_tokenizer, build_tokenizer
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
from beit_jax.tokenizers.configs import DvaeDecoderConfig, DvaeEncoderConfig, TokenizerConfig, VqkdConfig
from beit_jax.tokenizers.dvae import DvaeDecoder
from beit_jax.tree import Nested, flatten, unflatten

from ..augmentation.labels import ArrayLike, class_numbers, cross_entropy
from ..augmentation.masking import BlockMask
from ..augmentation.mixing import normalise, scaled
from ..augmentation.views import ViewsTransform
from ..data.batches import train_batches
from ..data.datasets import Dataset
from ..data.stored_tokens import StoredTokens, token_contract, write_tokens
from ..distributed.collectives import on_host
from ..recipe import WHOLE, Recipe
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import Initial, Parts, State
from .codebook import perplexity
from .hidden_patches import hidden_patches, weighted_mean
from .objective import Result, Shapes, Sources, WholeModel
from .unlabelled import VALIDATION_SEED, MaskedImages, MaskedRecipe

if TYPE_CHECKING:
    from .objective import Images

PICTURED = 4  # images of the grid that a run shows


@dataclass(frozen=True)
class TokenOptions:
    """Pre-training on visual tokens: what is predicted, and by what. Source: unilm beit and beit2."""

    interpolation: Literal["bicubic", "lanczos"] = "lanczos"
    """How the crop becomes the tokenizer's view."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the tokenizer. OpenAI's dVAE ran in float16 on GPUs; near ties may then fall otherwise."""
    aggregate_from: Annotated[int, WHOLE] = 0
    """BEiT v2: the block whose patches the aggregation layers read with the final class token; 0: none."""
    aggregation_layers: Annotated[int, WHOLE] = 0
    """BEiT v2: blocks that must predict the tokens once more, from that class token and those early patches."""
    own_head: bool | None = None
    """BEiT v2: a norm and a head for these blocks alone; by default as in --init, and the model's own otherwise."""


@dataclass(frozen=True)
class MaskedTokensRecipe(MaskedRecipe):
    """A run that pre-trains a model on visual tokens."""

    objective: ClassVar[str] = "masked_tokens"
    tokens: TokenOptions = field(default_factory=TokenOptions)

    def check(self) -> None:
        super().check()
        self.check_without_average()
        if bool(self.tokens.aggregate_from) != bool(self.tokens.aggregation_layers):
            raise BeitJaxError("--tokens.aggregate-from and --tokens.aggregation-layers: expected both or none")
        if self.tokens.own_head and not self.tokens.aggregation_layers:
            raise BeitJaxError("--tokens.own-head: of aggregation layers; give --tokens.aggregation-layers as well")


@dataclass(frozen=True)
class MaskedTokens(MaskedImages[MaskedTokensRecipe], WholeModel[MaskedTokensRecipe]):
    """BEiT: the model predicts the visual tokens of hidden patches.

    The tokenizer is the state's frozen network, unless tokens are stored.
    """

    reads = frozenset({"init", "tokenizer", "decoder", "stored_tokens"})
    architecture: ClassVar[Architecture] = "masked_image_modeling"

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        assert isinstance(recipe, MaskedTokensRecipe)
        if sources.tokenizer is None:
            raise BeitJaxError(f"{recipe.objective} needs a tokenizer: give --tokenizer DIR")
        if isinstance(sources.tokenizer.config, DvaeDecoderConfig):
            raise BeitJaxError("--tokenizer: expected an encoder, found a decoder; give that as --decoder")
        if sources.decoder is not None:
            _check_decoder(sources.decoder.config, sources.tokenizer.config)
        config, first = super().configure(recipe, labels, sources), recipe.tokens.aggregate_from
        if first > config.num_hidden_layers:
            raise BeitJaxError(
                f"--tokens.aggregate-from: expected at most the {config.num_hidden_layers} blocks, found {first}"
            )
        config = replace(
            config,
            vocab_size=sources.tokenizer.config.vocab_size,
            aggregate_from=recipe.tokens.aggregate_from,
            aggregation_layers=recipe.tokens.aggregation_layers,
            own_aggregation_head=_own_head(recipe.tokens, sources),
        )
        _check_channels(sources, config.num_channels)
        BlockMask(config.grid, recipe.mask)  # refuses what cannot be hidden before a run begins
        return config

    @classmethod
    def abstract_sources(cls, recipe: Recipe, labels: tuple[str, ...]) -> Sources:
        """The published tokenizers: BEiT v2's where there are aggregation layers, else DALL-E's."""
        assert isinstance(recipe, MaskedTokensRecipe)
        dvae = DvaeEncoderConfig(input_channels=recipe.model.channels or 3)
        tokenizer = VqkdConfig() if recipe.tokens.aggregate_from else dvae
        return Sources(tokenizer=TokenizerCheckpoint(tokenizer, {}))

    @property
    def tokenizer(self) -> TokenizerCheckpoint:
        assert self.sources.tokenizer is not None  # `configure` saw to it
        return self.sources.tokenizer

    @property
    def tokenizer_graph(self) -> nnx.GraphDef[Any]:
        return abstract_tokenizer(self.tokenizer.config, dtype=jnp.dtype(self.recipe.tokens.dtype))[0]

    @property
    def transform(self) -> Callable[..., Any]:
        return self.views if self.sources.tokens is None else replace(self.views, token_size=None)

    @property
    def views(self) -> ViewsTransform:
        """With the tokenizer's, unless it is the student's."""
        options, tokens = self.recipe.augment, self.recipe.tokens
        config = self.tokenizer.config
        assert not isinstance(config, DvaeDecoderConfig)
        pixels = config.patch_size if isinstance(config, VqkdConfig) else (config.stride, config.stride)
        rows, columns = self.config.grid
        size = rows * pixels[0], columns * pixels[1]
        same = size == self.config.image_size and tokens.interpolation == options.interpolation
        return ViewsTransform(options, self.config.image_size, None if same else size, tokens.interpolation, self.mask)

    def batch(self, size: int) -> Shapes:
        shapes = super().batch(size)
        if self.sources.tokens is not None:
            return shapes | {"tokens": jax.ShapeDtypeStruct((size, shapes["mask"].shape[1]), jnp.int32)}
        view = self.views.token_size
        return shapes if view is None else shapes | {"token_image": self.pixels(size, view)}

    @property
    def criterion(self) -> Criterion:
        return masked_tokens(self.recipe, None if self.sources.tokens is not None else self.tokenizer_graph)

    @property
    def evaluated(self) -> Criterion:
        return masked_tokens(self.recipe, self.tokenizer_graph)

    def second_network(self, state: State) -> Nested:
        """The tokenizer."""
        return state.frozen if self.sources.tokens is None else self._resident

    def shapes(self) -> Parts:
        frozen = {} if self.sources.tokens is not None else abstract_tokenizer(self.tokenizer.config)[1]
        return replace(super().shapes(), frozen=frozen)

    def initial(self, key: Key[Array, ""]) -> Initial:
        frozen = {} if self.sources.tokens is not None else unflatten(self.tokenizer.params)
        return replace(super().initial(key), frozen=frozen)

    @cached_property
    def _resident(self) -> Nested:
        """The tokenizer's parameters on a device."""
        return jax.tree.map(jnp.asarray, unflatten(self.tokenizer.params))

    def extend(self, batch: dict[str, np.ndarray], positions: np.ndarray) -> dict[str, np.ndarray]:
        """The batch with its stored tokens, those of the images at these positions [b]."""
        stored = self.sources.tokens
        return batch if stored is None else batch | {"tokens": stored.at(positions)}

    def with_stored_tokens(self, directory: Path, images: "Images") -> "MaskedTokens":
        tokens = StoredTokens.open(directory, self.token_contract(images))
        needed = self.steps * self.recipe.data.batch_size
        if tokens.positions < needed:
            raise BeitJaxError(
                f"{directory}: tokens of {tokens.positions:,} images ({tokens.epochs:g} epochs) are stored, "
                f"the run sees {needed:,}; store those of more epochs, or train for fewer"
            )
        return self.replaced(sources=replace(self.sources, tokens=tokens))

    def token_contract(self, images: "Images") -> dict[str, Any]:
        """The inputs that tokens of this run must have been computed from, for JSON."""
        recipe = self.recipe
        return token_contract(images.contract(), recipe.run.seed, self.views, self.tokenizer, recipe.tokens.dtype)

    def store_tokens(
        self, images: "Images", directory: Path, progress: Progress = no_progress, *, overwrite: bool = False
    ) -> int:
        if jax.process_count() > 1:
            raise BeitJaxError("tokenize runs on one host; start one process")
        assert isinstance(images, Dataset)
        data = self.recipe.data
        positions = self.steps * data.batch_size
        with train_batches(images, data, self.views, seed=self.recipe.run.seed, start_step=0) as batches:
            write_tokens(
                directory,
                batches,
                self.tokens_of,
                self.token_contract(images),
                positions=positions,
                patches=prod(self.config.grid),
                vocab_size=self.config.vocab_size,
                progress=progress,
                overwrite=overwrite,
            )
        return positions

    def tokens_of(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tokens [b, patches] of a training batch, as a step computes them."""
        return np.asarray(self._tokens(self._resident, batch.get("token_image", batch["image"])))

    @cached_property
    def _tokens(self) -> Callable[[Nested, Any], Array]:
        graph = self.tokenizer_graph
        scale = self.recipe.data.scale
        return jax.jit(lambda params, images: visual_tokens(nnx.merge(graph, params), images, scale))

    def pictures(self, state: State, images: "Images") -> dict[str, UInt8[np.ndarray, "h w 3"]]:
        """Images, what is hidden of them, and both decoded from tokens; for tokenizers with a decoder."""
        if self.sources.decoder is None:
            return {}
        assert isinstance(images, Dataset)
        params = jax.tree.map(on_host, state.params)
        # A thread of its own is outside the mesh, over which so few images could not be spread.
        with ThreadPoolExecutor(1) as thread:
            return {"reconstruction": thread.submit(self._picture, params, self.sources.decoder, images).result()}

    def _picture(self, params: Nested, decoder: TokenizerCheckpoint, images: Dataset) -> UInt8[np.ndarray, "h w 3"]:
        model = build_model(self.config, params, dtype=jnp.dtype(self.recipe.model.dtype))
        tokenizer = cast(Any, build_tokenizer(self.tokenizer.config, unflatten(self.tokenizer.params)))
        pixels = cast(DvaeDecoder, build_tokenizer(decoder.config, unflatten(decoder.params)))
        mask, rng = BlockMask(self.config.grid, self.recipe.mask), np.random.default_rng(VALIDATION_SEED)
        chosen = [images.load(index)[0] for index in range(min(PICTURED, len(images)))]
        masks = np.stack([mask(rng) for _ in chosen])
        processor = self.processor(self.recipe, self.config)
        return grid_picture(reconstruct(model, processor, tokenizer, pixels, chosen, masks))

    def results(self, state: State) -> dict[str, Result]:
        """The model without its aggregation layers, which only pre-training has a use for."""
        config = self.config.without_aggregation()
        kept = {name: leaf for name, leaf in flatten(state.params).items() if not name.startswith("aggregation/")}
        return {"model": Result(config, unflatten(kept))}


def _own_head(tokens: TokenOptions, sources: Sources) -> bool:
    """True if the aggregation layers have a head of their own: as the recipe says, or the checkpoint has it."""
    brought = sources.start is not None and sources.start.config.own_aggregation_head
    return tokens.aggregation_layers > 0 and (brought if tokens.own_head is None else tokens.own_head)


def _check_channels(sources: Sources, channels: int) -> None:
    """Refuses a tokenizer of images of other channels."""
    assert sources.tokenizer is not None
    tokenizer = sources.tokenizer.config
    taken = tokenizer.input_channels if isinstance(tokenizer, DvaeEncoderConfig) else 3
    if taken != channels:
        raise BeitJaxError(
            f"--tokenizer: takes images of {taken} channels, the model of {channels}; train a tokenizer with "
            f"--model.channels {channels} by a recipe of dvae, or pre-train by data2vec, which needs none"
        )
    if sources.decoder is not None and channels != 3:
        raise BeitJaxError(f"--decoder: makes pictures of RGB images, found {channels} channels; leave it out")


def _check_decoder(decoder: TokenizerConfig, tokenizer: TokenizerConfig) -> None:
    """Refuses a decoder of other tokens before the run, not at its first picture."""
    if not isinstance(decoder, DvaeDecoderConfig):
        raise BeitJaxError("--decoder: expected a decoder, found an encoder; leave it out, or give its decoder")
    if not isinstance(tokenizer, DvaeEncoderConfig):
        raise BeitJaxError("--decoder: these tokens stand for a teacher's features, not for pixels; leave it out")
    for what, expected, found in (
        ("tokens", tokenizer.vocab_size, decoder.vocab_size),
        ("pixels per token", tokenizer.stride, 2 ** (decoder.group_count - 1)),
    ):
        if expected != found:
            raise BeitJaxError(
                f"--decoder: expected {expected} {what}, as the tokenizer has, found {found}; "
                "give the one that belongs to it"
            )


def masked_tokens(recipe: MaskedTokensRecipe, tokenizer: nnx.GraphDef[Any] | None) -> Criterion:
    """Cross entropy of the visual tokens of hidden patches, which the model predicts from the other patches.

    The tokenizer is the state's frozen network. It sees ``token_image`` uint8 [b, height, width, 3], or the image where
    there is none.

    Args:
        tokenizer: a `beit_jax.tokenizers.interface.Tokenizer` without parameters; None: batches hold ``tokens`` int32
            [b, patches] instead.

    Source: microsoft/unilm@768a3c8 beit/engine_for_pretraining.py; with aggregation layers beit2's, where their loss is
    added.
    """
    aggregates = recipe.tokens.aggregation_layers > 0

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        ready = {"image": normalise(batch["image"], recipe.data)}
        if tokenizer is None:
            ready["tokens"] = batch["tokens"]
        else:
            ready["token_image"] = batch.get("token_image", batch["image"])
        return ready | hidden_patches(batch["mask"], recipe.mask.patches)

    def loss(
        model: BeitForMaskedImageModeling, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        image = batch["image"]
        if tokenizer is None:
            tokens = batch["tokens"]
        else:
            tokens = visual_tokens(nnx.merge(tokenizer, teacher), batch["token_image"], recipe.data.scale)
            image, tokens = in_order(image, tokens)
        labels = jnp.take_along_axis(tokens, batch["positions"], axis=1)
        output = model(
            image,
            batch["mask"],
            predicted=batch["positions"],
            aggregate=aggregates,
            key=key,
            remat=recipe.model.remat,
        )
        assert output.logits is not None
        value, accuracy = token_loss(output.logits, labels, batch["weights"])
        metrics = {"masked_accuracy": accuracy} | perplexities(output.logits, labels, batch["weights"])
        if output.aggregated_logits is None:
            return value, metrics
        more, accuracy = token_loss(output.aggregated_logits, labels, batch["weights"])
        return value + more, metrics | {
            "loss_patches": value,
            "loss_aggregated": more,
            "masked_accuracy_aggregated": accuracy,
        }

    return Criterion(prepare, loss)


def _of_few_images(
    textbook: Callable[..., Array], tokenizer: Any, images: Array, scale: float | None = None
) -> Int[Array, "b patches"]:
    """`visual_tokens` of a quarter of every device's images at a time. Its arrays, of which nothing is kept, would
    be the largest of the whole step."""
    pieces = gcd(len(images) // (shards_of(len(images)) or 1), 4)
    # A device's images lie together, and each piece takes one of every few neighbours: nothing moves between devices.
    apart = jnp.moveaxis(images.reshape(len(images) // pieces, pieces, *images.shape[1:]), 1, 0)
    tokens = jax.lax.map(lambda piece: textbook(tokenizer, piece, scale), apart)
    return jnp.moveaxis(tokens, 0, 1).reshape(len(images), -1)


@for_accelerators(_of_few_images)
def visual_tokens(tokenizer: Any, images: Array, scale: float | None = None) -> Int[Array, "b patches"]:
    """The tokens of images [b, h, w, c], which `mixing.scaled` brings to [0, 1], row by row."""
    low, high = tokenizer.value_range
    if images.dtype == jnp.uint8 and scale is None:
        tokens = tokenizer.tokens(low + (high - low) * images.astype(jnp.float32) / 255)
    else:
        tokens = tokenizer.tokens(low + (high - low) * scaled(images, scale))
    return tokens.reshape(len(tokens), -1)


def token_loss(
    logits: Float[Array, "b k vocab"], labels: Integer[ArrayLike, "b k"], weights: Float[Array, "b k"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross entropy, and the share of labels that are the most probable token.

    Args:
        labels: tokens, also where the weight is 0.

    Raises:
        BeitJaxError: a label that is no token, where the labels are known; in a compiled function the loss is NaN.
    """
    logits = logits.astype(jnp.float32)
    tokens = class_numbers(labels, logits.shape[-1], logits.shape[:-1])
    best = logits.argmax(axis=-1)
    return weighted_mean(cross_entropy(logits, tokens), weights), weighted_mean(best == tokens, weights)


def perplexities(logits: Float[Array, "b k vocab"], labels: Int[Array, "b k"], weights: Float[Array, "b k"]) -> Metrics:
    """How many tokens occur, as it were, among the predicted ones and among the labels: the exponential of the entropy
    of their frequencies in this batch."""

    def sizes(tokens: Int[Array, "b k"]) -> Float[Array, " vocab"]:
        return jnp.zeros(logits.shape[-1]).at[tokens].add(weights)

    return {
        "predicted_perplexity": perplexity(sizes(logits.argmax(axis=-1))),
        "target_perplexity": perplexity(sizes(labels)),
    }
