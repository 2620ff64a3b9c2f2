"""The options of an import. This module imports little, because the command line reads it before NumPy is there."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from beit_jax.config import PositionResize, PresetName


@dataclass(frozen=True)
class Options:
    """How to read a checkpoint. By default it is read as it is."""

    weights: Literal["model", "ema"] | None = None
    """Which to take where a training checkpoint holds both: the trained weights or their moving average."""
    variant: str | None = None
    """A published model (see beit-jax list) to take a file for, instead of recognising it."""
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

    def asked(self) -> dict[str, Any]:
        """Returns the options that differ from their defaults, for the record in the result."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


DEFAULT = Options()
