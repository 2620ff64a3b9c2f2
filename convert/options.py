"""The options of an import. This module imports little, because the command line reads it before NumPy is there."""

import difflib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from beit_jax.config import PositionResize, PresetName, ProblemType
from beit_jax.config_file import MOST_LABELS
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
    or the name of an entry, or of one of several models in it."""
    checkpoint: str | None = None
    """Which checkpoint of a transformers Trainer's output directory: latest (the default), best, or the number of its
    step."""
    config: Path | None = None
    """The config.json that describes the model, where none lies beside the weights, as with accelerate's save_state."""
    base: str | None = None
    """The model that an adapter changes, where the source is an adapter that peft wrote (LoRA or DoRA): a directory, a
    weight file, a native checkpoint or a hub name. The adapter is merged in float32."""
    variant: str | None = None
    """A published model (see beit-jax list) to take a file for, instead of recognising it."""
    num_heads: int | None = None
    """The number of attention heads, where neither a bias table nor a configuration beside the weights states it."""
    keep_head: bool = False
    """Of an encoder within another model, such as MiDaS or ZoeDepth, keep the classifier that it carries. These models
    do not use it; where they trained the encoder further, it no longer fits."""
    aggregate_from: int | None = None
    """BEiT v2's pre-training files: the block, counted from 1, whose patches the extra blocks read (its early_layers),
    where the file does not say it. 0 leaves these blocks out."""
    image_size: int | tuple[int, int] | None = None
    """Resize position tables for this input: one side or height and width, in pixels."""
    patch_size: int | tuple[int, int] | None = None
    """Resample the patch projection, as FlexiViT does; the grid stays unless --image-size says otherwise."""
    channels: int | None = None
    """Adapt the patch projection to images of so many channels, as timm does: the old channels are repeated in their
    order and scaled, or summed for one channel."""
    channels_from: tuple[int, ...] | None = None
    """For every channel the old one that it comes from, counted from 0, instead of that order: 0 1 2 0."""
    bands: tuple[int, ...] | None = None
    """The bands of image files, counted from 1, that are the channels of an image: 4 1 2. By default all of them."""
    position_bias: Literal["per_layer"] | None = None
    """Give every layer its own copy of a shared bias table, as fine-tuning starts."""
    position_resize: PositionResize | None = None
    """How bias tables are resized, now and later: geometric as the original, geometric_linear as timm, bilinear as
    transformers. By default as the source does."""
    labels: Path | None = None
    """The classes: a file of names or numbers, one a line, or JSON. Classes of the checkpoint keep their weights, so a
    part of them cuts its head; any other names start a new head."""
    num_labels: int | None = None
    """Start a new head of so many classes without names, instead of --labels."""
    problem_type: ProblemType | None = None
    """What a classifier's outputs are: classes of which an image has one, or several; or values."""
    seed: int | None = None
    """Draws what is new in a head, by default 0."""
    image_preset: PresetName | None = None
    """Prepare images by a preset instead of what the source says."""
    allow_nonfinite: bool = False
    """Accept NaN and infinite weights."""
    format: Literal["safetensors", "pytorch", "flax", "tensorflow"] | None = None
    """Which of a directory's weights to read, where it has several formats; safetensors by default."""
    expect_sha256: str | None = None
    """Refuse a weight file whose SHA-256 does not begin with this, as published names and pages give it."""
    sha256: bool = False
    """Record the SHA-256 of local source files too (a second per gigabyte); the hub's cache knows those of its own."""

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "channels", "num_heads")
        for name, low in (*((name, 1) for name in sizes), ("aggregate_from", 0)):
            value = getattr(self, name)
            sides = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(low <= side <= LARGEST for side in sides):
                flag = f"--{name.replace('_', '-')}"
                raise BeitJaxError(f"{flag}: expected {low} to {LARGEST}, found {printable(value)}")
        _check_channels(self)
        if self.variant is not None and self.variant not in VARIANTS:
            near = difflib.get_close_matches(self.variant, VARIANTS, n=1)
            known = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VARIANTS)}"
            raise BeitJaxError(f"--variant {printable(self.variant)}: no such variant; {known}")
        if self.config is not None:  # a directory stands for the file in it
            file = Path(self.config)
            object.__setattr__(self, "config", file / "config.json" if file.is_dir() else file)
        if self.config is not None and self.variant is not None:
            raise BeitJaxError("--config and --variant both say what the model is; leave one out")
        if self.checkpoint is not None and not re.fullmatch(r"latest|best|\d{1,12}", self.checkpoint):
            raise BeitJaxError(
                f"--checkpoint: expected latest, best or the number of a step, found {printable(self.checkpoint)}"
            )
        if isinstance(self.labels, str):
            object.__setattr__(self, "labels", Path(self.labels))
        if self.labels is not None and self.num_labels is not None:
            raise BeitJaxError("--labels and --num-labels both say what the classes are; give one")
        if self.seed is not None and self.labels is None and self.num_labels is None:
            raise BeitJaxError("--seed draws a new head, for which --labels or --num-labels asks; give one of them too")
        if self.num_labels is not None and not 1 <= self.num_labels <= MOST_LABELS:
            raise BeitJaxError(f"--num-labels: expected 1 to {MOST_LABELS}, found {self.num_labels}")
        if self.expect_sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{6,64}", self.expect_sha256):
            raise BeitJaxError(
                f"--expect-sha256 {printable(self.expect_sha256)}: expected the first 6 to 64 hexadecimal digits"
            )

    def asked(self) -> dict[str, Any]:
        """Returns the options that differ from their defaults, for the record in the result; a path as text."""
        chosen = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}
        return {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}


def _check_channels(options: Options) -> None:
    """Refuses channels and bands that no image has, or that contradict each other."""
    count = options.channels
    for flag, numbers, low in (("--channels-from", options.channels_from, 0), ("--bands", options.bands, 1)):
        if numbers is None:
            continue
        if not numbers or not all(low <= number <= LARGEST for number in numbers):
            raise BeitJaxError(f"{flag}: expected numbers from {low} to {LARGEST}, found {printable(numbers)}")
        if count is not None and len(numbers) != count:
            raise BeitJaxError(f"{flag}: expected {count} numbers, as --channels says, found {len(numbers)}")


DEFAULT = Options()
