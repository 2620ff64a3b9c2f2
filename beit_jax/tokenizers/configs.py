"""The configurations of tokenizers, without their networks: what describes one needs no JAX, which takes a second."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable, size_near
from beit_jax.hub import CONFIG
from beit_jax.json_file import read_json

_MAX_GROUPS, _MAX_BLOCKS = 8, 64  # widths double from group to group: a small file could describe a huge model


@dataclass(frozen=True)
class DvaeEncoderConfig:
    """The configuration of DALL-E's encoder; the defaults are those of the published one.

    Attributes:
        n_hid: width of the first group; every further group has twice the width.
        group_count: groups of blocks; between two groups the sides of the image are halved.
        image_size: (height, width) of the images that give the tokens of a student with 224 pixels. Any multiple of the
            stride works.

    Raises:
        BeitJaxError: for values that describe no model.
    """

    model_type: ClassVar[str] = "dalle-dvae-encoder"
    n_hid: int = 256
    vocab_size: int = 8192
    group_count: int = 4
    n_blk_per_group: int = 2
    input_channels: int = 3
    image_size: tuple[int, int] = (112, 112)

    def __post_init__(self) -> None:
        _check(self)
        if any(side % self.stride for side in self.image_size):
            near = list(size_near(self.image_size, (self.stride, self.stride)))
            raise BeitJaxError(
                f"image_size: expected multiples of {self.stride}, such as {near}, found {list(self.image_size)}"
            )

    @property
    def stride(self) -> int:
        """Pixels of one token, along each axis."""
        return 2 ** (self.group_count - 1)


@dataclass(frozen=True)
class DvaeDecoderConfig:
    """The configuration of DALL-E's decoder; the defaults are those of the published one.

    Attributes:
        n_init: width of the token embeddings.
        n_hid: width of the last group; every other group has twice the width of the next group.
        output_channels: channels of the image; the network returns a mean and a scale for each.

    Raises:
        BeitJaxError: for values that describe no model.
    """

    model_type: ClassVar[str] = "dalle-dvae-decoder"
    n_init: int = 128
    n_hid: int = 256
    vocab_size: int = 8192
    group_count: int = 4
    n_blk_per_group: int = 2
    output_channels: int = 3

    def __post_init__(self) -> None:
        _check(self)


def _check(config: DvaeEncoderConfig | DvaeDecoderConfig) -> None:
    for name, value in vars(config).items():
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise BeitJaxError(f"{name}: expected a positive integer, found {printable(value)}")
    if config.n_hid % 4:
        raise BeitJaxError(f"n_hid: expected a multiple of 4, found {config.n_hid}")
    for name, most in (("group_count", _MAX_GROUPS), ("n_blk_per_group", _MAX_BLOCKS)):
        if getattr(config, name) > most:
            raise BeitJaxError(f"{name}: expected at most {most}, found {getattr(config, name)}")


@dataclass(frozen=True)
class VqkdConfig:
    """The configuration of BEiT v2's tokenizer; the defaults are those of ``vqkd_encoder_base_decoder_3x768x12_clip``.

    Attributes:
        image_size, patch_size: pixels, (height, width). Other input sizes work: positions are resized.
        decoder_*: the decoder's transformer, which reads one code per token.
        codebook_dim: dimensions of a code.
        target_size: dimensions of the teacher's features: 512 for CLIP, 768 for DINO.

    Raises:
        BeitJaxError: for values that describe no model.
    """

    model_type: ClassVar[str] = "beit2-vqkd"
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    decoder_hidden_size: int = 768
    decoder_num_hidden_layers: int = 3
    decoder_num_attention_heads: int = 12
    decoder_intermediate_size: int = 3072
    vocab_size: int = 8192
    codebook_dim: int = 32
    target_size: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise BeitJaxError(f"{name}: expected a positive integer, found {printable(value)}")
        _ = self.encoder, self.decoder  # raises for values that describe no transformer

    @property
    def encoder(self) -> BeitConfig:
        """The transformer from pixels to patch features."""
        return BeitConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            use_absolute_position_embeddings=True,
            layer_scale_init_value=0.0,
            drop_path_rate=0.0,
        )

    @property
    def decoder(self) -> BeitConfig:
        """The transformer from codes to features. It reads the codes as an image with patches of one pixel."""
        return BeitConfig(
            image_size=self.encoder.grid,
            patch_size=(1, 1),
            num_channels=self.codebook_dim,
            hidden_size=self.decoder_hidden_size,
            num_hidden_layers=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads,
            intermediate_size=self.decoder_intermediate_size,
            use_absolute_position_embeddings=True,
            layer_scale_init_value=0.0,
            drop_path_rate=0.0,
        )


TokenizerConfig = DvaeEncoderConfig | DvaeDecoderConfig | VqkdConfig

KINDS: Mapping[str, type[TokenizerConfig]] = {
    kind.model_type: kind for kind in (DvaeEncoderConfig, DvaeDecoderConfig, VqkdConfig)
}
"""The class of a configuration by its ``model_type``."""


def is_native_tokenizer(directory: str | Path) -> bool:
    """Returns True if a native checkpoint holds a tokenizer or a decoder, by its ``config.json``."""
    kind = read_json(Path(directory) / CONFIG).get("model_type")
    return isinstance(kind, str) and kind in KINDS
