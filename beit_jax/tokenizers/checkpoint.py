"""Native checkpoints of tokenizers.

A native tokenizer is a directory of ``config.json`` and ``flax_model.safetensors``. It has digests and provenance, as
native models have them (`beit_jax.weights.native`).
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, WEIGHTS
from beit_jax.json_file import Fields, read_json, write_json
from beit_jax.tokenizers.build import TokenizerModel, build_tokenizer, tokenizer_shapes
from beit_jax.tokenizers.configs import KINDS, DvaeDecoderConfig, TokenizerConfig
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeEncoder
from beit_jax.tokenizers.vqkd import VqkdTokenizer
from beit_jax.tree import unflatten
from beit_jax.weights.sizes import check_sizes
from beit_jax.weights.tensors import LeafSpec, read_metadata, read_specs, read_tensors, verify, write_tensors


@dataclass(frozen=True)
class TokenizerCheckpoint:
    """The content of a native directory: a tokenizer, or a decoder of tokens.

    Attributes:
        params: flat name to float32 array.
        provenance: the origin of the weights, as the converter recorded it.
    """

    config: TokenizerConfig
    params: dict[str, np.ndarray]
    provenance: dict[str, Any] = field(default_factory=dict)


def save_tokenizer(directory: str | Path, checkpoint: TokenizerCheckpoint) -> None:
    """Writes both files into an existing directory (see `beit_jax.atomic.new_directory`) and verifies the weights."""
    directory = Path(directory)
    save_config(directory, checkpoint.config)
    specs = {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in checkpoint.params.items()}
    write_tensors(directory / WEIGHTS, specs, lambda name: [[checkpoint.params[name]]], checkpoint.provenance)
    verify(directory / WEIGHTS)


def save_config(directory: Path, config: TokenizerConfig) -> None:
    """Writes the ``config.json`` of a native tokenizer."""
    write_json(directory / CONFIG, {"model_type": config.model_type} | dataclasses.asdict(config))


def read_tokenizer(directory: str | Path) -> TokenizerCheckpoint:
    """Reads a native tokenizer or decoder and checks every tensor against its recorded digest.

    Raises:
        BeitJaxError: a file is missing, damaged, or does not fit the other, naming the file and the tensor.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG)
    _check_header(directory, config)
    params, provenance = read_tensors(directory / WEIGHTS)
    return TokenizerCheckpoint(config, params, provenance)


def load_tokenizer(
    source: str | Path | TokenizerCheckpoint, *, dtype: DTypeLike = jnp.float32
) -> DvaeEncoder | VqkdTokenizer:
    """The tokenizer in a native directory, or of a checkpoint that is read already; a `Tokenizer`.

    Raises:
        BeitJaxError: as `read_tokenizer`, or the directory holds a decoder.
    """
    model = _load(source, dtype)
    if isinstance(model, DvaeDecoder):
        found = model.config.model_type
        raise BeitJaxError(f"{_name(source)}: expected a tokenizer, found {found}; give the encoder")
    return model


def load_decoder(source: str | Path | TokenizerCheckpoint, *, dtype: DTypeLike = jnp.float32) -> DvaeDecoder:
    """The decoder from tokens to images, given as `load_tokenizer`'s tokenizer.

    Raises:
        BeitJaxError: as `read_tokenizer`, or the directory holds something else.
    """
    model = _load(source, dtype)
    if not isinstance(model, DvaeDecoder):
        found = model.config.model_type
        raise BeitJaxError(f"{_name(source)}: expected {DvaeDecoderConfig.model_type}, found {found}; give the decoder")
    return model


def _name(source: str | Path | TokenizerCheckpoint) -> str:
    """What a message calls the source of a tokenizer."""
    return printable(source.provenance.get("source") if isinstance(source, TokenizerCheckpoint) else source, 1024)


def _load(source: str | Path | TokenizerCheckpoint, dtype: DTypeLike) -> TokenizerModel:
    checkpoint = source if isinstance(source, TokenizerCheckpoint) else read_tokenizer(source)
    params = {name: jnp.asarray(leaf) for name, leaf in checkpoint.params.items()}
    return build_tokenizer(checkpoint.config, unflatten(params), dtype=dtype)


def _read_config(path: Path) -> TokenizerConfig:
    content = read_json(path)
    read = Fields(content, str(path))
    kind = KINDS[read.choice("model_type", tuple(KINDS), None)]
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


def _check_header(directory: Path, config: TokenizerConfig) -> None:
    """Compares a configuration with the names and shapes of the tensors beside it; no tensor is read."""
    path = directory / WEIGHTS
    read_metadata(path)
    shapes = {name: shape for name, (shape, _) in read_specs(path).items()}
    check_sizes(config, shapes, str(directory / CONFIG), str(path))
    expected = tokenizer_shapes(config)
    for name in sorted(expected.keys() | shapes.keys()):
        want, have = expected.get(name), shapes.get(name)
        if want != have:
            raise BeitJaxError(
                f"{path}: {printable(name)}: expected {_shape(want)} by {CONFIG}, found {_shape(have)}; convert again"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {list(shape)}"
