"""What a training run is: frozen dataclasses, all the way down. `recipes` holds the published runs as values of them.

Nothing here imports JAX: the command line builds its help from these classes.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from beit_jax.errors import BeitJaxError

Objective = Literal["classification", "linear_probe", "segmentation"]
Resume = Literal["auto", "must", "never"]
Statistics = Literal["half", "imagenet"]
Interpolation = Literal["bilinear", "bicubic", "random"]

STATISTICS: Mapping[Statistics, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of RGB values in [0, 1]."""


@dataclass(frozen=True)
class ModelOptions:
    """The architecture and how it computes."""

    variant: str = "beit_base_patch16_224"
    """A row of `beit-jax list`, or "digits" for the small model of the digits recipes."""
    image_size: int | None = None
    """Pixels of a side; by default the variant's."""
    drop_path: float = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    dropout: float = 0.0
    """Of tokens and of the outputs of attention and MLP."""
    attention_dropout: float = 0.0
    """Of attention probabilities."""
    layer_scale: float | None = None
    """Initial layer scale of a model drawn at random; by default the variant's. A checkpoint brings its own."""
    pooling: Literal["mean", "cls"] = "mean"
    """What the classifier sees: the mean patch token, or the class token."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What matrix products compute in. Parameters, optimizer and residual stream are float32 always."""
    remat: Literal["none", "block", "dots"] = "none"
    """What the backward pass computes again: nothing, whole blocks, or blocks without their matrix products."""


@dataclass(frozen=True)
class DataOptions:
    """Batches and how they are read."""

    batch_size: int = 1024
    """Images of one optimizer step, over all hosts and devices, accumulation included."""
    eval_batch_size: int | None = None
    """Images of one evaluation step; by default the batch size divided by the accumulation."""
    statistics: Statistics = "half"
    """Mean and standard deviation of pixels."""
    workers: int | None = None
    """Processes that decode and augment; 0: threads of this one. By default half of this host's cores, at most 16."""
    max_bad: float = 0.001
    """Share of records that may be unreadable: each is named and replaced; beyond that the run stops."""


@dataclass(frozen=True)
class AugmentOptions:
    """What happens to training images, in this order. Source: timm 0.3.2 `create_transform`, unilm beit/datasets.py."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop, as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    interpolation: Interpolation = "bicubic"
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter; timm ignores it where RandAugment is on."""
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation; None for none."""
    erasing: float = 0.25
    """Probability of erasing a rectangle (2 % to 1/3 of the area) by normal noise."""
    mixup: float = 0.0
    """Alpha of mixup's beta distribution; 0 for none."""
    cutmix: float = 0.0
    """Alpha of cutmix's beta distribution; 0 for none."""
    mix_probability: float = 1.0
    """Share of batches that are mixed."""
    mix_switch: float = 0.5
    """Share of mixed batches that are cut where both are on."""
    smoothing: float = 0.1
    """Label smoothing."""


@dataclass(frozen=True)
class SegmentationOptions:
    """What happens to training images and their label maps, in this order, and how validation images are run.

    Source: microsoft/unilm@768a3c8 beit/semantic_segmentation/configs/_base_/datasets/ade20k.py.
    """

    scale: tuple[int, int] = (2048, 512)
    """Bounds of the long and the short edge that images are resized to; the evaluation's, and training's at ratio 1."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Range of the factor of both bounds, drawn for every training image."""
    max_class_share: float = 0.75
    """Crops of which one class takes more than this share are drawn again, up to ten times; 1 for no limit."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Whether brightness, contrast, saturation and hue are distorted."""
    mode: Literal["slide", "whole"] = "slide"
    """Validation images: windows of the crop's size over each, two thirds of it apart, or each in one piece."""


@dataclass(frozen=True)
class OptimOptions:
    """AdamW as BEiT uses it."""

    lr: float = 5e-4
    """Peak learning rate, absolute: not scaled by the batch size."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    epochs: float = 30.0
    warmup_epochs: float = 5.0
    """Linear warmup from `warmup_lr`."""
    warmup_lr: float = 0.0
    schedule: Literal["cosine", "poly"] = "cosine"
    """After the warmup: half a cosine, or a straight line (a polynomial of power 1)."""
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    """Learning rate of each layer over that of the next; 1 for none."""
    decay_bias_tables: bool = True
    """Whether weight decay applies to relative position bias tables of blocks."""
    decay_class_token: bool = False
    """Whether weight decay applies to the class token; the original's does so in segmentation only."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float | None = None
    """Largest global norm of the gradient."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other."""
    ema: float | None = None
    """Decay of the moving average of parameters; None keeps none."""
    max_bad_steps: int = 10
    """Steps in a row without a finite loss and gradient after which the run stops. Each is skipped."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes what it computes, except `seed` and `mesh` (rounding)."""

    seed: int = 0
    mesh: tuple[int, int, int] = (-1, 1, 1)
    """Devices along (data, fsdp, tensor); -1: all that are left."""
    log_every: int = 50
    """Steps between log lines."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    eval_every_epochs: float = 1.0
    """Epochs between evaluations."""
    hang_minutes: float = 30.0
    """Minutes without a step after which the run prints its stacks and stops."""
    profile_steps: int = 0
    """Steps, after the first ten, that a profiler trace covers."""


@dataclass(frozen=True)
class Recipe:
    """A training run. Source, hardware and expected result of the published ones stand beside them in `recipes`."""

    name: str
    objective: Objective = "classification"
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    segment: SegmentationOptions = field(default_factory=SegmentationOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: nested dicts of numbers and strings."""
        return dataclasses.asdict(self)


def check(recipe: Recipe) -> None:
    """Refuses what cannot be trained.

    Raises:
        BeitJaxError: a value out of its range, naming the option as the command line spells it.
    """
    model, data, augment, optim, run = recipe.model, recipe.data, recipe.augment, recipe.optim, recipe.run
    segment = recipe.segment
    rates = {
        "model.drop-path": model.drop_path,
        "model.dropout": model.dropout,
        "model.attention-dropout": model.attention_dropout,
        "optim.beta1": optim.beta1,
        "optim.beta2": optim.beta2,
        "augment.smoothing": augment.smoothing,
    }
    for name, value in rates.items():
        _require(0.0 <= value < 1.0, name, "a number in [0, 1)", value)
    shares = {
        "augment.flip": augment.flip,
        "augment.erasing": augment.erasing,
        "augment.mix-probability": augment.mix_probability,
        "augment.mix-switch": augment.mix_switch,
        "data.max-bad": data.max_bad,
        "segment.flip": segment.flip,
    }
    for name, value in shares.items():
        _require(0.0 <= value <= 1.0, name, "a number in [0, 1]", value)
    positive: dict[str, float] = {
        "optim.lr": optim.lr,
        "optim.epochs": optim.epochs,
        "optim.epsilon": optim.epsilon,
        "run.eval-every-epochs": run.eval_every_epochs,
        "run.hang-minutes": run.hang_minutes,
    }
    for name, value in positive.items():
        _require(math.isfinite(value) and value > 0, name, "a positive number", value)
    not_negative = {
        "optim.min-lr": optim.min_lr,
        "optim.warmup-epochs": optim.warmup_epochs,
        "optim.warmup-lr": optim.warmup_lr,
        "optim.weight-decay": optim.weight_decay,
        "augment.mixup": augment.mixup,
        "augment.cutmix": augment.cutmix,
        "augment.color-jitter": augment.color_jitter,
    }
    for name, value in not_negative.items():
        _require(math.isfinite(value) and value >= 0, name, "a number >= 0", value)
    counts = {
        "data.batch-size": data.batch_size,
        "optim.accumulate": optim.accumulate,
        "optim.max-bad-steps": optim.max_bad_steps,
        "run.log-every": run.log_every,
        "run.save-every": run.save_every,
        "run.keep": run.keep,
    }
    for name, value in counts.items():
        _require(value >= 1, name, "a positive integer", value)
    _require(0.0 < optim.layer_decay <= 1.0, "optim.layer-decay", "a number in (0, 1]", optim.layer_decay)
    _require(optim.warmup_epochs <= optim.epochs, "optim.warmup-epochs", "at most the epochs", optim.warmup_epochs)
    _require(optim.clip is None or optim.clip > 0, "optim.clip", "a positive number or None", optim.clip)
    _require(optim.ema is None or 0 <= optim.ema < 1, "optim.ema", "a number in [0, 1) or None", optim.ema)
    if data.batch_size % optim.accumulate:
        parts = f"{optim.accumulate} (--optim.accumulate)"
        raise BeitJaxError(f"--data.batch-size: expected a multiple of {parts}, found {data.batch_size}")
    if (augment.mixup or augment.cutmix) and data.batch_size % 2:
        raise BeitJaxError(f"--data.batch-size: mixing pairs images, expected an even number, found {data.batch_size}")
    for name, (low, high) in {
        "augment.crop-scale": augment.crop_scale,
        "augment.crop-ratio": augment.crop_ratio,
        "segment.ratio": segment.ratio,
    }.items():
        _require(0 < low <= high, name, "two growing positive numbers", (low, high))
    long, short = segment.scale
    _require(long >= short >= 1, "segment.scale", "pixels of the long edge and of the short one", segment.scale)
    _require(0 < segment.max_class_share <= 1, "segment.max-class-share", "a number in (0, 1]", segment.max_class_share)
    _check_unused(recipe)


def _check_unused(recipe: Recipe) -> None:
    """Refuses options that the objective does not read."""
    unused = "augment" if recipe.objective == "segmentation" else "segment"
    options = getattr(recipe, unused)
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if value != entry.default:
            name = f"{unused}.{entry.name.replace('_', '-')}"
            raise BeitJaxError(f"--{name}: {recipe.objective} does not use it, leave it out; found {value}")


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise BeitJaxError(f"--{name}: expected {expected}, found {found}")
