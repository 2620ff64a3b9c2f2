"""Training of BEiT v2's tokenizer by vector-quantised knowledge distillation (VQ-KD).

Its tokens must be enough for a shallow decoder to rebuild a teacher's features. Source: microsoft/unilm@768a3c8
beit2/modeling_vqkd.py, norm_ema_quantizer.py and run_vqkd_training.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.segmenter import batch_statistics
from beit_jax.tokenizers.build import abstract_tokenizer
from beit_jax.tokenizers.configs import VqkdConfig
from beit_jax.tokenizers.vqkd import Codebook, TaskLayer, VqkdTokenizer, l2_normalised
from beit_jax.tree import Nested, flatten
from beit_jax.weights.native import NativeCheckpoint

from ..initial.model_config import model_config
from ..initial.parameters import initial_params
from ..initial.pixels import require_rgb
from ..recipe import LAYERS, NOT_NEGATIVE, RATE, SIZE, Recipe
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import Initial, Parts, State, divided, variables
from .codebook import averaged, counts, kmeans, perplexity
from .objective import Result, Sources
from .teachers import Teacher, abstract_teacher, teacher_params
from .unlabelled import UnlabelledImages, UnlabelledRecipe

# Both transformers are BEiT v2's in everything but their sizes.
_FIXED = (
    "channels activation absolute_positions epsilon position_bias position_resize initializer_range family residual"
).split()
_ABSENT = ("drop_path", "dropout", "attention_dropout", "layer_scale")


@dataclass(frozen=True)
class VqkdOptions:
    """Training of BEiT v2's tokenizer. Source: unilm beit2/modeling_vqkd.py and norm_ema_quantizer.py."""

    vocab_size: Annotated[int, SIZE] = 8192
    codebook_dim: Annotated[int, SIZE] = 32
    decoder_layers: Annotated[int, LAYERS] = 3
    decay: Annotated[float, RATE] = 0.99
    """Decay of the moving averages that are the codes."""
    commitment: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the distance between features and their codes."""
    kmeans: bool = True
    """Start with codes that are clusters of the first batch's features, not with random ones."""


@dataclass(frozen=True)
class VqkdRecipe(UnlabelledRecipe):
    """A run that trains a tokenizer of BEiT v2's kind."""

    objective: ClassVar[str] = "vqkd"
    vqkd: VqkdOptions = field(default_factory=VqkdOptions)

    def check(self) -> None:
        super().check()
        self.check_without_average()
        self.check_without_freezing()
        self.check_without_layers()
        self.check_without(*_FIXED)


@dataclass(frozen=True)
class Vqkd(UnlabelledImages[VqkdRecipe]):
    """BEiT v2's tokenizer learns to rebuild a teacher's features. The teacher is the state's frozen network."""

    reads = frozenset({"teacher"})

    @classmethod
    def configure(cls, recipe: Recipe, labels: tuple[str, ...], sources: Sources) -> BeitConfig:
        assert isinstance(recipe, VqkdRecipe)
        if sources.teacher is None:
            raise BeitJaxError("vqkd needs a teacher: give --teacher CHECKPOINT")
        config = model_config(recipe, (), task="features")
        require_rgb(recipe, config)
        grid = sources.teacher.config.grid
        if grid != config.grid:
            raise BeitJaxError(
                f"--teacher: its grid of patches is {grid}, the tokenizer's {config.grid}; "
                "choose another --model.variant"
            )
        tokenizer_config(recipe, config, sources.teacher.config.hidden_size)  # refuses what it cannot be
        return config

    @classmethod
    def abstract_sources(cls, recipe: Recipe, labels: tuple[str, ...]) -> Sources:
        """A teacher of the tokenizer's own size."""
        config = model_config(recipe, (), task="features")
        return Sources(teacher=NativeCheckpoint(config, cls.processor(recipe, config), {}))

    @cached_property
    def tokenizer(self) -> VqkdConfig:
        teacher = self.sources.teacher
        assert teacher is not None
        return tokenizer_config(self.recipe, self.config, teacher.config.hidden_size)

    @property
    def network(self) -> Mapping[str, Any]:
        return vars(self.tokenizer)

    @property
    def graph(self) -> nnx.GraphDef[VqkdTokenizer]:
        graph = abstract_tokenizer(self.tokenizer, dtype=jnp.dtype(self.recipe.model.dtype))[0]
        return cast("nnx.GraphDef[VqkdTokenizer]", graph)

    @property
    def criterion(self) -> Criterion:
        return vqkd(self.recipe, self._teacher(jnp.dtype(self.recipe.model.dtype))[0])

    def shapes(self) -> Parts:
        params, stats = self._split(abstract_tokenizer(self.tokenizer)[1])
        return Parts(params, stats, self._teacher(jnp.dtype(jnp.float32))[1])

    def initial(self, key: Key[Array, ""]) -> Initial:
        assert self.sources.teacher is not None

        def part(index: int) -> Nested:
            return self._split(initial_tokenizer(self.tokenizer, key))[index]

        return Initial(partial(part, 0), partial(part, 1), teacher_params(self.sources.teacher))

    def results(self, state: State) -> dict[str, Result]:
        return {"tokenizer": Result(self.tokenizer, variables(state.params, state.stats))}

    def _split(self, tree: Nested) -> tuple[Nested, Nested]:
        return divided(tree, tokenizer_statistics(self.tokenizer))

    def _teacher(self, dtype: np.dtype[Any]) -> tuple[nnx.GraphDef[Any], Nested]:
        teacher = self.sources.teacher
        assert teacher is not None
        return abstract_teacher(teacher.config, teacher.processor.mean, teacher.processor.std, dtype=dtype)


def tokenizer_config(recipe: VqkdRecipe, variant: BeitConfig, target_size: int) -> VqkdConfig:
    """The tokenizer of a recipe: an encoder of the variant's size, and a decoder as wide, of fewer blocks.

    Args:
        target_size: the teacher's.

    Raises:
        BeitJaxError: options of the model that these transformers, which nothing is dropped from, do not have; numbers
            that describe no model.
    """
    for name in _ABSENT:
        value = getattr(recipe.model, name)
        if value:
            option = name.replace("_", "-")
            raise BeitJaxError(f"--model.{option}: a tokenizer of this kind has none; expected 0, found {value}")
    return VqkdConfig(
        image_size=variant.image_size,
        patch_size=variant.patch_size,
        hidden_size=variant.hidden_size,
        num_hidden_layers=variant.num_hidden_layers,
        num_attention_heads=variant.num_attention_heads,
        intermediate_size=variant.intermediate_size,
        decoder_hidden_size=variant.hidden_size,
        decoder_num_hidden_layers=recipe.vqkd.decoder_layers,
        decoder_num_attention_heads=variant.num_attention_heads,
        decoder_intermediate_size=variant.intermediate_size,
        vocab_size=recipe.vqkd.vocab_size,
        codebook_dim=recipe.vqkd.codebook_dim,
        target_size=target_size,
    )


def tokenizer_statistics(config: VqkdConfig) -> frozenset[str]:
    """Flat names of what no gradient moves: the codebook, and what is counted of it."""
    model = nnx.eval_shape(lambda: VqkdTokenizer(config, rngs=nnx.Rngs(0)))
    return frozenset(flatten(batch_statistics(model)))


def initial_tokenizer(config: VqkdConfig, key: Key[Array, ""]) -> Nested:
    """All parameters and the codebook, float32. Traceable: jit it with ``out_shardings``.

    Both transformers are drawn as BEiT v2's fine-tuning models, whose classes they are, and the two small networks
    normal, with biases of zero. Codes are random directions, until the first step makes them clusters.
    """
    encoder, encode_task, codes, decoder, decode_task = jax.random.split(key, 5)

    def drawn(module: nnx.Module) -> Nested:
        return nnx.to_pure_dict(nnx.state(module))

    return {
        "encoder": initial_params(config.encoder, "finetune", encoder),
        "encode_task": drawn(TaskLayer(config.hidden_size, config.codebook_dim, nnx.Rngs(encode_task))),
        "codebook": drawn(Codebook(config.vocab_size, config.codebook_dim, nnx.Rngs(codes))),
        "decoder": initial_params(config.decoder, "finetune", decoder),
        "decode_task": drawn(TaskLayer(config.decoder_hidden_size, config.target_size, nnx.Rngs(decode_task))),
    }


def vqkd(recipe: VqkdRecipe, teacher_graph: nnx.GraphDef[Any]) -> Criterion:
    """A teacher's features from tokens: ``image`` uint8 [b, h, w, 3].

    Its model is a `VqkdTokenizer`. The loss is one minus the cosine of predicted and true features, and the distance
    of the encoder's directions from their codes; the decoder's gradient passes the codes by. In the first step codes
    become clusters of the batch. They move by averaging after they were used. Where gradients are accumulated, a batch
    here is a part of one. Without a key nothing moves: unlike in the original, evaluation counts no usage, and no
    epoch forgets it.

    Metrics: ``rec_loss`` and ``quant_loss``, whose sum is the loss; ``codebook_used``, the share of codes that are
    some patch's in the batch, and ``perplexity``, how many they are as it were, by their frequencies.

    Args:
        teacher_graph: a `Teacher` without parameters. Its parameters are the state's frozen network.
    """
    options = recipe.vqkd

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        return {"image": batch["image"].astype(jnp.float32) / 255}

    def loss(
        model: VqkdTokenizer, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        target = _target(nnx.merge(teacher_graph, teacher or {}), batch["image"])
        features = model.encode(batch["image"], remat=recipe.model.remat)
        directions = l2_normalised(features)
        samples = jax.lax.stop_gradient(directions).reshape(-1, directions.shape[-1])
        if key is not None and options.kmeans:
            _begin(model.codebook, samples, key)
        tokens = model.codebook.nearest(jax.lax.stop_gradient(features))
        codes = model.codebook.embedding[...][tokens]
        sizes = counts(tokens, model.vocab_size)
        if key is not None:
            _move(model.codebook, samples, tokens.ravel(), sizes, options)

        predicted = model.decode_codes(straight_through(directions, codes), remat=recipe.model.remat)
        _check_target(predicted.shape, target.shape)
        reconstruction = cosine_distance(predicted, target)
        quantisation = options.commitment * jnp.square(directions - codes).mean()
        return reconstruction + quantisation, {
            "rec_loss": reconstruction,
            "quant_loss": quantisation,
            "codebook_used": (sizes > 0).mean(),
            "perplexity": perplexity(sizes),
        }

    return Criterion(prepare, loss)


def straight_through(features: Float[Array, "*b d"], codes: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The codes, whose gradient goes to the features as if they were them."""
    return features + jax.lax.stop_gradient(codes - features)


def cosine_distance(predicted: Float[Array, "*b d"], target: Float[Array, "*b d"]) -> Float[Array, ""]:
    """One minus the cosine, mean over all vectors, float32."""
    return 1.0 - (l2_normalised(predicted) * l2_normalised(target)).sum(axis=-1).mean()


def _target(teacher: Teacher, images: Float[Array, "b h w 3"]) -> Float[Array, "b rows columns t"]:
    return jax.lax.stop_gradient(teacher(images).astype(jnp.float32))


def _begin(codebook: Codebook, samples: Float[Array, "n d"], key: Key[Array, ""]) -> None:
    """Makes the codes clusters of samples, unless they have begun already."""
    codebook.embedding[...], codebook.cluster_size[...] = jax.lax.cond(
        codebook.initialised[0] > 0,
        lambda: (codebook.embedding[...], codebook.cluster_size[...]),
        lambda: kmeans(key, samples, len(codebook.embedding)),
    )


def _move(
    codebook: Codebook,
    samples: Float[Array, "n d"],
    tokens: Int[Array, " n"],
    sizes: Float[Array, " codes"],
    options: VqkdOptions,
) -> None:
    """The codebook after the batch whose directions drew these tokens."""
    codebook.embedding[...] = averaged(codebook.embedding[...], samples, tokens, options.decay)
    codebook.usage[...] = options.decay * codebook.usage[...] + (1.0 - options.decay) * sizes
    codebook.initialised[...] = jnp.ones_like(codebook.initialised[...])


def _check_target(predicted: tuple[int, ...], target: tuple[int, ...]) -> None:
    """A teacher of another grid or size than the tokenizer was made for: one line."""
    if predicted != target:
        raise BeitJaxError(
            f"teacher: expected features {list(predicted)} [batch, rows, columns, size] as the tokenizer has them, "
            f"found {list(target)}; take a teacher of the same patch size and features"
        )
