"""The options of an import. This module imports little, because the command line reads it before NumPy is there."""

import difflib
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from beit_jax.config import PositionResize, PresetName
from beit_jax.errors import BeitJaxError, printable
from beit_jax.variants import VARIANTS

LARGEST = 1 << 16
"""The largest size that an option may state."""


@dataclass(frozen=True)
class Options:
    """How to read a checkpoint. By default it is read as it is.

    Raises:
        BeitJaxError: a value that fits no checkpoint, at once and not after a download.
    """

    weights: str | None = None
    """Which to take where a training checkpoint holds several: model (the trained weights), ema (their moving average),
    or the name of an entry."""
    variant: str | None = None
    """A published model (see beit-jax list) to take a file for, instead of recognising it."""
    num_heads: int | None = None
    """The number of attention heads, where neither a bias table nor a configuration beside the weights states it."""
    aggregate_from: int | None = None
    """BEiT v2's pre-training files: the block, counted from 1, whose patches the extra blocks read (its early_layers),
    where the file does not say it. 0 leaves these blocks out."""
    image_size: int | tuple[int, int] | None = None
    """Resize position tables for this input: one side or height and width, in pixels."""
    patch_size: int | tuple[int, int] | None = None
    """Resample the patch projection, as FlexiViT does; the grid stays unless --image-size says otherwise."""
    position_bias: Literal["per_layer"] | None = None
    """Give every layer its own copy of a shared bias table, as fine-tuning starts."""
    position_resize: PositionResize | None = None
    """How bias tables are resized, now and later: geometric as the original, geometric_linear as timm, bilinear as
    transformers. By default as the source does."""
    image_preset: PresetName | None = None
    """Prepare images by a preset instead of what the source says."""
    allow_nonfinite: bool = False
    """Accept NaN and infinite weights."""
    format: Literal["safetensors", "pytorch", "flax"] | None = None
    """Which of a directory's weights to read, where it has several formats; safetensors by default."""
    expect_sha256: str | None = None
    """Refuse a weight file whose SHA-256 does not begin with this, as published names and pages give it."""
    sha256: bool = False
    """Record the SHA-256 of local source files too (a second per gigabyte); the hub's cache knows those of its own."""

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "num_heads")
        for name, low in (*((name, 1) for name in sizes), ("aggregate_from", 0)):
            value = getattr(self, name)
            sides = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(low <= side <= LARGEST for side in sides):
                flag = f"--{name.replace('_', '-')}"
                raise BeitJaxError(f"{flag}: expected {low} to {LARGEST}, found {printable(value)}")
        if self.variant is not None and self.variant not in VARIANTS:
            near = difflib.get_close_matches(self.variant, VARIANTS, n=1)
            known = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VARIANTS)}"
            raise BeitJaxError(f"--variant {printable(self.variant)}: no such variant; {known}")
        if self.expect_sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{6,64}", self.expect_sha256):
            raise BeitJaxError(
                f"--expect-sha256 {printable(self.expect_sha256)}: expected the first 6 to 64 hexadecimal digits"
            )

    def asked(self) -> dict[str, Any]:
        """Returns the options that differ from their defaults, for the record in the result."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


DEFAULT = Options()
