"""Runs that learn from images alone: visual tokens, a teacher's features, and tokenizers."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key, UInt8

from beit_jax.config import BeitConfig
from beit_jax.config import Task as Architecture
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor
from beit_jax.looking.reconstruct import grid_picture, reconstruct
from beit_jax.models.build import build_model
from beit_jax.terminal import Advance
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeDecoderConfig, DvaeEncoderConfig
from beit_jax.tokenizers.tokenizer import TokenizerCheckpoint, TokenizerConfig, abstract_tokenizer, build_tokenizer
from beit_jax.tokenizers.vqkd import VqkdConfig, VqkdTokenizer
from beit_jax.tree import Nested, flatten, unflatten

from ..augmentation.masking import BlockMask
from ..augmentation.views import ViewsTransform
from ..costs.estimate import traced_activations, traced_flops, with_one_block
from ..data.batches import Dataset, open_dataset, train_batches
from ..distributed.collectives import on_host
from ..distributed.sharding import batch_rows, put_batch
from ..recipe import Recipe
from ..step.objective import Batch, Metrics, Objective
from ..step.state import State, divided, variables
from .dvae import abstract_dvae, configs, decoder_params, dvae, encoder_params, initial_dvae
from .model_config import image_processor, model_config
from .pretraining import collapse, data2vec, masked_tokens, visual_tokens
from .task import Begin, Images, Quiet, Result, Shapes, Sources, Start, Whole
from .teachers import abstract_teacher, teacher_params
from .vqkd import initial_tokenizer, tokenizer_config, tokenizer_statistics, vqkd

VALIDATION_SEED = 0  # of the crops and masks of evaluation: the same in every evaluation of every run
PICTURED = 4  # images of the grid that a run shows


class _Unlabelled(Quiet):
    """What all of these have in common: images without labels, and the loss of unseen ones as the score."""

    recipe: Recipe
    config: BeitConfig
    sources: Sources

    if TYPE_CHECKING:  # what the classes below have, some of them from `Whole`, which this must not hide

        @property
        def graph(self) -> nnx.GraphDef[Any]: ...
        @property
        def objective(self) -> Objective: ...
        def shapes(self) -> Start: ...

    @staticmethod
    def open(directory: Path, split: str) -> Images:
        return open_dataset(directory, split)

    @property
    def views(self) -> ViewsTransform:
        """What of an image training and evaluation may need."""
        return ViewsTransform(self.recipe.augment, self.config.image_size, None, "bicubic", self.mask)

    @property
    def transform(self) -> Callable[..., Any]:
        return self.views

    @property
    def mask(self) -> BlockMask | None:
        """What is hidden; None: nothing."""
        return BlockMask(self.config.grid, self.recipe.mask)

    def batch(self, size: int) -> Shapes:
        shapes = {"image": jax.ShapeDtypeStruct((size, *self.config.image_size, 3), jnp.uint8)}
        if self.mask is not None:
            rows, columns = self.config.grid
            shapes["mask"] = jax.ShapeDtypeStruct((size, rows * columns), jnp.bool_)
        return shapes

    def warnings(self, metrics: Mapping[str, float]) -> list[str]:
        return collapse(metrics)

    def scores(
        self, state: State, images: Images, processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        """Means of the objective's metrics over the validation images, in whole batches, without dropout.

        Crops and masks are drawn as in training, and are the same in every evaluation.
        """
        assert isinstance(images, Dataset)
        size = self.recipe.eval_batch_size
        count, totals = len(images) // size, dict[str, float]()
        with train_batches(
            images,
            replace(self.recipe.data, batch_size=size),
            self.views,
            seed=VALIDATION_SEED,
            start_step=0,
            rows=batch_rows(mesh, size),
        ) as batches:
            for _, batch in zip(range(count), batches, strict=False):
                found = jax.device_get(self._measure(state, self.frozen(state), put_batch(batch, mesh)))
                for name, value in found.items():
                    totals[name] = totals.get(name, 0.0) + float(value) / count
                advance(size)
        # A compiled function returns names in alphabetical order.
        return {f"validation_{name}": totals[name] for name in sorted(totals, key=lambda name: (name != "loss", name))}

    def frozen(self, state: State) -> Nested:
        """What evaluation has as teacher."""
        return state.ema

    @property
    def evaluated(self) -> Objective:
        """The objective whose metrics are the scores."""
        return self.objective

    @cached_property
    def _measure(self) -> Callable[[State, Nested, Batch], Metrics]:
        graph, objective = self.graph, self.evaluated

        def measure(state: State, teacher: Nested, batch: Batch) -> Metrics:
            model = nnx.merge(graph, variables(state.params, state.stats))
            prepared = {**objective.prepare(batch, jax.random.key(VALIDATION_SEED)), **objective.schedule(state.step)}
            loss, metrics = objective.loss(model, prepared, None, teacher or None)
            return {"loss": loss, **metrics}

        return jax.jit(measure)

    @property
    def flops(self) -> float:
        return traced_flops(self._remembering()._loss, self.shapes().params)  # what is computed again counts once

    @property
    def activations(self) -> int:
        kept = traced_activations(self._loss, self.shapes().params)
        if self.recipe.model.remat == "none":
            return kept
        whole = traced_activations(self._remembering()._loss, self.shapes().params)
        return with_one_block(kept, whole, self.config.num_hidden_layers)

    def _remembering(self) -> Any:
        """This task without computing anything again."""
        model = replace(self.recipe.model, remat="none")
        return replace(cast(Any, self), recipe=replace(self.recipe, model=model))

    def _loss(self, images: int, params: Nested) -> Array:
        """The training loss of so many images, for tracing."""
        shapes, objective, key = self.shapes(), self.objective, jax.random.key(0)
        batch = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in self.batch(images).items()}
        prepared = {**objective.prepare(batch, key), **objective.schedule(jnp.zeros((), jnp.int32))}
        fixed, beside = (jax.tree.map(_zeros, tree) for tree in (shapes.stats, shapes.beside))
        model = nnx.merge(self.graph, variables(params, fixed))
        return objective.loss(model, prepared, key, beside or None)[0]


def _zeros(shape: jax.ShapeDtypeStruct) -> Array:
    return jnp.zeros(shape.shape, shape.dtype)


@dataclass(frozen=True)
class MaskedTokens(_Unlabelled, Whole):
    """BEiT: the visual tokens of hidden patches. The tokenizer lies beside the model, unless tokens are stored."""

    architecture: ClassVar[Architecture] = "masked_image_modeling"

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        if sources.tokenizer is None:
            raise BeitJaxError(f"{recipe.objective} needs a tokenizer: give --tokenizer DIR")
        if isinstance(sources.tokenizer.config, DvaeDecoderConfig):
            raise BeitJaxError("--tokenizer: expected an encoder, found a decoder; give that as --decoder")
        if sources.decoder is not None:
            _check_decoder(sources.decoder.config, sources.tokenizer.config)
        config = replace(
            super().configure(recipe, labels, sources),
            vocab_size=sources.tokenizer.config.vocab_size,
            aggregate_from=recipe.tokens.aggregate_from,
            aggregation_layers=recipe.tokens.aggregation_layers,
        )
        BlockMask(config.grid, recipe.mask)  # refuses what cannot be hidden before a run begins
        return config

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
        return shapes if view is None else shapes | {"token_image": jax.ShapeDtypeStruct((size, *view, 3), jnp.uint8)}

    @property
    def objective(self) -> Objective:
        return masked_tokens(self.recipe, None if self.sources.tokens is not None else self.tokenizer_graph)

    @property
    def evaluated(self) -> Objective:
        return masked_tokens(self.recipe, self.tokenizer_graph)

    def frozen(self, state: State) -> Nested:
        """The tokenizer."""
        return state.ema if self.sources.tokens is None else self._resident

    def shapes(self) -> Start:
        frozen = {} if self.sources.tokens is not None else abstract_tokenizer(self.tokenizer.config)[1]
        return replace(super().shapes(), beside=frozen)

    def first(self, key: Key[Array, ""]) -> Begin:
        frozen = {} if self.sources.tokens is not None else unflatten(self.tokenizer.params)
        return replace(super().first(key), beside=frozen)

    @cached_property
    def _resident(self) -> Nested:
        """The tokenizer's parameters on a device."""
        return jax.tree.map(jnp.asarray, unflatten(self.tokenizer.params))

    def tokens_of(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tokens [b, patches] of a training batch, as a step computes them."""
        return np.asarray(self._tokens(self._resident, batch.get("token_image", batch["image"])))

    @cached_property
    def _tokens(self) -> Callable[[Nested, Any], Array]:
        graph = self.tokenizer_graph
        return jax.jit(lambda params, images: visual_tokens(nnx.merge(graph, params), images))

    def pictures(self, state: State, images: Images) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
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
        processor = image_processor(self.recipe, self.config)
        return grid_picture(reconstruct(model, processor, tokenizer, pixels, chosen, masks))

    def results(self, state: State) -> dict[str, Result]:
        """The model without its aggregation layers, which only pre-training has a use for."""
        config = replace(self.config, aggregate_from=0, aggregation_layers=0)
        kept = {name: leaf for name, leaf in flatten(state.params).items() if not name.startswith("aggregation/")}
        return {"model": Result(config, unflatten(kept))}


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


@dataclass(frozen=True)
class Data2vec(_Unlabelled, Whole):
    """data2vec: what the average of the model makes of hidden patches when it sees them."""

    architecture: ClassVar[Architecture] = "masked_image_modeling"

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        config = super().configure(recipe, labels, sources)
        if recipe.data2vec.target_layers > config.num_hidden_layers:
            raise BeitJaxError(
                f"--data2vec.target-layers: expected at most the {config.num_hidden_layers} blocks, "
                f"found {recipe.data2vec.target_layers}"
            )
        BlockMask(config.grid, recipe.mask)  # refuses what cannot be hidden before a run begins
        return replace(config, vocab_size=config.hidden_size)  # the head maps features to features

    @property
    def objective(self) -> Objective:
        return data2vec(self.recipe, self.graph)

    def results(self, state: State) -> dict[str, Result]:
        """Student and teacher as the released models are, encoders with their final norm; and the whole student, which
        a second stage goes on from."""
        config = replace(
            self.config,
            task="features",
            pooling="cls",
            use_mask_token=True,
            add_pooling_layer=self.config.model_type == "beit",
        )

        def encoder(params: Nested) -> Nested:
            flat = flatten(params)
            kept = {name: leaf for name, leaf in flat.items() if not name.startswith("lm_head/")}
            return unflatten({name.removeprefix("beit/"): leaf for name, leaf in kept.items()})

        return {
            "model": Result(config, encoder(state.params)),
            "model-ema": Result(config, encoder(state.ema)),
            "student": Result(self.config, state.params),
        }


@dataclass(frozen=True)
class _Tokenizing(_Unlabelled):
    """A tokenizer learns; nothing is hidden from it."""

    recipe: Recipe
    config: BeitConfig
    sources: Sources
    steps: int
    mask = None


class Vqkd(_Tokenizing):
    """BEiT v2's tokenizer, from a teacher's features. The teacher lies beside it."""

    @staticmethod
    def configure(recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        if sources.teacher is None:
            raise BeitJaxError("vqkd needs a teacher: give --teacher CHECKPOINT")
        config = model_config(recipe.model, (), task="features")
        grid = sources.teacher.config.grid
        if grid != config.grid:
            raise BeitJaxError(
                f"--teacher: its grid of patches is {grid}, the tokenizer's {config.grid}; "
                "choose another --model.variant"
            )
        tokenizer_config(recipe, config, sources.teacher.config.hidden_size)  # refuses what it cannot be
        return config

    @cached_property
    def tokenizer(self) -> VqkdConfig:
        teacher = self.sources.teacher
        assert teacher is not None
        return tokenizer_config(self.recipe, self.config, teacher.config.hidden_size)

    @property
    def graph(self) -> nnx.GraphDef[VqkdTokenizer]:
        graph = abstract_tokenizer(self.tokenizer, dtype=jnp.dtype(self.recipe.model.dtype))[0]
        return cast("nnx.GraphDef[VqkdTokenizer]", graph)

    @property
    def objective(self) -> Objective:
        return vqkd(self.recipe, self._teacher(jnp.dtype(self.recipe.model.dtype))[0])

    def shapes(self) -> Start:
        params, stats = self._split(abstract_tokenizer(self.tokenizer)[1])
        return Start(params, stats, self._teacher(jnp.dtype(jnp.float32))[1])

    def first(self, key: Key[Array, ""]) -> Begin:
        assert self.sources.teacher is not None

        def part(index: int) -> Nested:
            return self._split(initial_tokenizer(self.tokenizer, key))[index]

        return Begin(partial(part, 0), partial(part, 1), teacher_params(self.sources.teacher))

    def results(self, state: State) -> dict[str, Result]:
        return {"tokenizer": Result(self.tokenizer, variables(state.params, state.stats))}

    def _split(self, tree: Nested) -> tuple[Nested, Nested]:
        return divided(tree, tokenizer_statistics(self.tokenizer))

    def _teacher(self, dtype: np.dtype[Any]) -> tuple[nnx.GraphDef[Any], Nested]:
        teacher = self.sources.teacher
        assert teacher is not None
        return abstract_teacher(teacher.config, teacher.processor.mean, teacher.processor.std, dtype=dtype)


class Dvae(_Tokenizing):
    """A tokenizer of DALL-E's kind, and its decoder, from images alone."""

    @staticmethod
    def configure(recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        """Of a model that would have these tokens for patches: all that counts of it is the image's size."""
        if recipe.model.image_size is None:
            raise BeitJaxError("--model.image-size: expected pixels of the tokenizer's images, found None")
        side = recipe.model.image_size
        encoder, _ = configs(recipe.dvae, (side, side))
        return BeitConfig(image_size=(side, side), patch_size=(encoder.stride, encoder.stride))

    @property
    def graph(self) -> nnx.GraphDef[Any]:
        dtype = jnp.dtype(self.recipe.model.dtype)
        return abstract_dvae(self.recipe.dvae, self.config.image_size, dtype=dtype)[0]

    @property
    def objective(self) -> Objective:
        return dvae(self.recipe, self.steps)

    def shapes(self) -> Start:
        return Start(abstract_dvae(self.recipe.dvae, self.config.image_size)[1], {}, {})

    def first(self, key: Key[Array, ""]) -> Begin:
        return Begin(partial(initial_dvae, self.recipe.dvae, self.config.image_size, key), {}, {})

    def results(self, state: State) -> dict[str, Result]:
        encoder, decoder = configs(self.recipe.dvae, self.config.image_size)
        return {
            "tokenizer": Result(encoder, encoder_params(state.params)),
            "decoder": Result(decoder, decoder_params(state.params)),
        }
