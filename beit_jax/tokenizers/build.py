"""The tokenizer of a configuration: its class, the shapes of its parameters, and the model built from parameters."""

from collections.abc import Mapping
from functools import lru_cache

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from beit_jax.models.interface import abstract_module
from beit_jax.tokenizers.configs import DvaeDecoderConfig, DvaeEncoderConfig, TokenizerConfig, VqkdConfig
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeEncoder
from beit_jax.tokenizers.vqkd import VqkdTokenizer
from beit_jax.tree import Nested, flatten

TokenizerModel = DvaeEncoder | DvaeDecoder | VqkdTokenizer

MODELS: Mapping[type, type[TokenizerModel]] = {
    DvaeEncoderConfig: DvaeEncoder,
    DvaeDecoderConfig: DvaeDecoder,
    VqkdConfig: VqkdTokenizer,
}


def abstract_tokenizer(
    config: TokenizerConfig, *, dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef[TokenizerModel], Nested]:
    """A tokenizer without arrays, see `beit_jax.models.interface.abstract_module`."""
    return abstract_module(lambda: MODELS[type(config)](config, dtype=dtype, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def tokenizer_shapes(config: TokenizerConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter by its flat name."""
    return {name: leaf.shape for name, leaf in flatten(abstract_tokenizer(config)[1]).items()}


def build_tokenizer(config: TokenizerConfig, params: Nested, *, dtype: DTypeLike = jnp.float32) -> TokenizerModel:
    """The tokenizer with these (nested) parameters; works inside `jax.jit` as well."""
    return nnx.merge(abstract_tokenizer(config, dtype=dtype)[0], params)
