"""Visual tokenizers: the one interface that pre-training needs, and their native checkpoints.

A native tokenizer is a directory of ``config.json`` and ``flax_model.safetensors``, with digests and provenance as
native models have them (`beit_jax.weights.native`).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, WEIGHTS
from beit_jax.json_file import Fields, read_json
from beit_jax.models.interface import ArrayLike
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeDecoderConfig, DvaeEncoder, DvaeEncoderConfig
from beit_jax.tokenizers.vqkd import VqkdConfig, VqkdTokenizer
from beit_jax.tree import Nested, flatten, unflatten
from beit_jax.weights.tensors import LeafSpec, read_metadata, verify, write_tensors


@runtime_checkable
class Tokenizer(Protocol):
    """Images to visual tokens.

    Attributes:
        vocab_size: tokens are in [0, vocab_size).
        patch_size: pixels of one token, (height, width): a student with a grid of (rows, columns) patches wants its
            tokens from images of (rows, columns) * patch_size.
        image_size: (height, width) it was made for.
        value_range: of the pixels it wants, which are otherwise as they come from the file.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def patch_size(self) -> tuple[int, int]: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def value_range(self) -> tuple[float, float]: ...

    def tokens(self, pixel_values: Float[ArrayLike, "b height width c"]) -> Int[Array, "b h w"]:
        """One token per patch, int32, rows from the top. May be traced.

        Raises:
            BeitJaxError: images of a shape that it cannot read.
        """


TokenizerConfig = DvaeEncoderConfig | DvaeDecoderConfig | VqkdConfig
TokenizerModel = DvaeEncoder | DvaeDecoder | VqkdTokenizer

MODELS: Mapping[type, type[TokenizerModel]] = {
    DvaeEncoderConfig: DvaeEncoder,
    DvaeDecoderConfig: DvaeDecoder,
    VqkdConfig: VqkdTokenizer,
}
_CONFIGS: Mapping[str, type[TokenizerConfig]] = {kind.model_type: kind for kind in MODELS}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TokenizerCheckpoint:
    """A tokenizer, or a decoder of tokens, at rest.

    Attributes:
        params: flat name to float32 array.
        provenance: where the weights came from, as the converter recorded it.
    """

    config: TokenizerConfig
    params: dict[str, np.ndarray]
    provenance: dict[str, Any] = field(default_factory=dict)


def abstract_tokenizer(
    config: TokenizerConfig, *, dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef[TokenizerModel], Nested]:
    """A model without memory: what `nnx.merge` needs besides the parameters, and the parameters' shapes, nested."""
    model = nnx.eval_shape(lambda: MODELS[type(config)](config, dtype=dtype, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


@lru_cache(maxsize=8)
def tokenizer_shapes(config: TokenizerConfig) -> Mapping[str, tuple[int, ...]]:
    """Flat name to shape of every parameter."""
    return {name: leaf.shape for name, leaf in flatten(abstract_tokenizer(config)[1]).items()}


def is_native_tokenizer(directory: Path) -> bool:
    """Whether a native checkpoint holds a tokenizer, by its ``config.json``."""
    return read_json(directory / CONFIG).get("model_type") in _CONFIGS


def build_tokenizer(config: TokenizerConfig, params: Nested, *, dtype: DTypeLike = jnp.float32) -> TokenizerModel:
    """The model with these (nested) parameters; works inside `jax.jit` as well."""
    return nnx.merge(abstract_tokenizer(config, dtype=dtype)[0], params)


def save_tokenizer(directory: Path, checkpoint: TokenizerCheckpoint) -> None:
    """Writes both files into an existing directory (see `beit_jax.atomic.new_directory`) and verifies the weights."""
    content = {"model_type": checkpoint.config.model_type} | dataclasses.asdict(checkpoint.config)
    (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    specs = {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in checkpoint.params.items()}
    write_tensors(directory / WEIGHTS, specs, lambda name: [[checkpoint.params[name]]], checkpoint.provenance)
    verify(directory / WEIGHTS)


def read_tokenizer(directory: Path) -> TokenizerCheckpoint:
    """Reads a native tokenizer or decoder and checks every tensor against its recorded digest.

    Raises:
        BeitJaxError: a file is missing, damaged, or does not fit the other, naming the file and the tensor.
    """
    path = directory / WEIGHTS
    config = _read_config(directory / CONFIG)
    provenance = json.loads(read_metadata(path)["provenance"])
    verify(path)
    params = load_file(path)
    _check_shapes(path, config, params)
    return TokenizerCheckpoint(config, params, provenance)


def load_tokenizer(directory: Path, *, dtype: DTypeLike = jnp.float32) -> DvaeEncoder | VqkdTokenizer:
    """The tokenizer in a native directory, a `Tokenizer`.

    Raises:
        BeitJaxError: as `read_tokenizer`, or the directory holds a decoder.
    """
    model = _load(directory, dtype)
    if isinstance(model, DvaeDecoder):
        raise BeitJaxError(f"{directory}: expected a tokenizer, found {model.config.model_type}; give the encoder")
    return model


def load_decoder(directory: Path, *, dtype: DTypeLike = jnp.float32) -> DvaeDecoder:
    """The decoder from tokens to images in a native directory.

    Raises:
        BeitJaxError: as `read_tokenizer`, or the directory holds something else.
    """
    model = _load(directory, dtype)
    if not isinstance(model, DvaeDecoder):
        raise BeitJaxError(
            f"{directory}: expected {DvaeDecoderConfig.model_type}, found {model.config.model_type}; give the decoder"
        )
    return model


def _load(directory: Path, dtype: DTypeLike) -> TokenizerModel:
    checkpoint = read_tokenizer(directory)
    params = {name: jnp.asarray(leaf) for name, leaf in checkpoint.params.items()}
    return build_tokenizer(checkpoint.config, unflatten(params), dtype=dtype)


def _read_config(path: Path) -> TokenizerConfig:
    content = read_json(path)
    read = Fields(content, str(path))
    kind = _CONFIGS[read.choice("model_type", tuple(_CONFIGS), None)]
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    different = sorted(content.keys() ^ {"model_type", *known})
    if different:
        problem = "unknown" if different[0] in content else "missing"
        raise BeitJaxError(f"{path}: {problem} key {printable(different[0])}; expected model_type, {', '.join(known)}")
    values: dict[str, Any] = {
        name: read.typed(name, int, None) if isinstance(entry.default, int) else read.pair(name, 0)
        for name, entry in known.items()
    }
    try:
        return kind(**values)
    except BeitJaxError as error:
        raise BeitJaxError(f"{path}: {error}") from None


def _check_shapes(path: Path, config: TokenizerConfig, params: Mapping[str, np.ndarray]) -> None:
    expected = tokenizer_shapes(config)
    for name in sorted(expected.keys() | params.keys()):
        want = expected.get(name)
        have = params[name].shape if name in params else None
        if want != have:
            raise BeitJaxError(
                f"{path}: {printable(name)}: expected {_shape(want)} by {CONFIG}, found {_shape(have)}; convert again"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {list(shape)}"
