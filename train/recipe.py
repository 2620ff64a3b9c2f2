"""What a training run is: frozen dataclasses, all the way down. `recipes` holds the published runs as values of them.

Nothing here imports JAX: the command line builds its help from these classes.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from beit_jax.errors import BeitJaxError

Objective = Literal["classification", "linear_probe", "segmentation", "masked_tokens", "data2vec", "vqkd", "dvae"]
Resume = Literal["auto", "must", "never"]
Statistics = Literal["half", "imagenet"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "random"]

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
    remat: Literal["none", "block", "dots"] = "dots"
    """What the backward pass computes again: nothing, whole blocks, or blocks without the products with parameters,
    which costs little time if any: keeping and reading the rest takes time too."""


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


NOTHING = AugmentOptions(randaugment=None, erasing=0.0, smoothing=0.0)
"""Crops and flips alone, which is what pre-training builds on."""


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
class MaskOptions:
    """Which patches pre-training hides: blocks, until enough are hidden. Source: unilm beit/masking_generator.py."""

    patches: int = 75
    """Patches to hide, of one image."""
    min_block: int = 16
    """Smallest area of a block, in patches."""
    max_block: int | None = None
    """Patches that one block may newly hide; by default as many as are still to be hidden."""
    min_aspect: float = 0.3
    """Smallest height over width of a block; the largest is its inverse."""
    exact: bool = False
    """Whether single patches make up the exact number in the end, as in BEiT v2; BEiT's count varies a little."""


@dataclass(frozen=True)
class TokenOptions:
    """Pre-training on visual tokens: what is predicted, and by what. Source: unilm beit and beit2."""

    interpolation: Literal["bicubic", "lanczos"] = "lanczos"
    """How the crop becomes the tokenizer's view."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the tokenizer computes in. OpenAI's dVAE ran in float16 on GPUs; near ties may then fall otherwise."""
    aggregate_from: int = 0
    """BEiT v2: the block whose patches the aggregation layers read beside the final class token; 0: none."""
    aggregation_layers: int = 0
    """BEiT v2: blocks that must predict the tokens once more, from that class token and those early patches."""


@dataclass(frozen=True)
class Data2vecOptions:
    """Pre-training on a teacher's features. Source: facebookresearch/data2vec_vision beit/engine_for_cyclical.py."""

    target_layers: int = 6
    """Last blocks of the teacher whose outputs, normalised, are averaged."""
    normalise_mean: bool = True
    """Whether the average is normalised once more, as in every published run."""
    beta: float = 2.0
    """Where the loss turns from quadratic to linear."""


@dataclass(frozen=True)
class VqkdOptions:
    """Training of BEiT v2's tokenizer. Source: unilm beit2/modeling_vqkd.py and norm_ema_quantizer.py."""

    vocab_size: int = 8192
    codebook_dim: int = 32
    decoder_layers: int = 3
    decay: float = 0.99
    """Of the moving averages that are the codes."""
    commitment: float = 1.0
    """Weight of the distance between features and their codes."""
    kmeans: bool = True
    """Whether the codes start as clusters of the first batch's features; at random otherwise."""


@dataclass(frozen=True)
class DvaeOptions:
    """Training of a tokenizer of DALL-E's kind. Source: arXiv 2102.12092, appendix A."""

    vocab_size: int = 8192
    width: int = 256
    """Channels of the encoder's first group and of the decoder's last."""
    groups: int = 4
    """Groups of blocks; a token covers 2 ** (groups - 1) pixels along each axis."""
    blocks: int = 2
    """Residual blocks of a group."""
    embedding: int = 128
    """Channels of a token's embedding in the decoder."""
    temperature: tuple[float, float] = (1.0, 1 / 16)
    """Of the relaxed one-hot codes, at the start and at the end of its cosine."""
    temperature_share: float = 0.5
    """Share of the run over which the temperature falls; in the paper 150,000 of 3,000,000 steps."""
    divergence: float = 6.6
    """Final weight of the Kullback-Leibler divergence of a token's distribution from the uniform one."""
    divergence_share: float = 0.1
    """Share of the run over which that weight grows from zero; in the paper 5,000 of its steps."""


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
    """Decay of the moving average of parameters, data2vec's teacher; None keeps none."""
    ema_start: float | None = None
    """Decay at the first step, from which it grows linearly to `ema`; None: constant."""
    ema_steps: int = 0
    """Steps over which it grows."""
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
class HostOptions:
    """Several processes. TPU VMs, GKE and SLURM say who belongs together; elsewhere name all three of the first."""

    coordinator: str | None = None
    """HOST:PORT where process 0 listens for the others."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which one this is, from 0."""
    alone: bool = False
    """Do not look for others."""
    wait: float = 300.0
    """Seconds for all to come."""
    silence: float = 20.0
    """Seconds without a sign of life after which a process counts as lost."""


@dataclass(frozen=True)
class Recipe:
    """A training run. Source, hardware and expected result of the published ones stand beside them in `recipes`."""

    name: str
    topology: str = ""
    """TPUs that the batch, split over them, fits: `topology.parse_topology` reads it. Empty: any device."""
    objective: Objective = "classification"
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    segment: SegmentationOptions = field(default_factory=SegmentationOptions)
    mask: MaskOptions = field(default_factory=MaskOptions)
    tokens: TokenOptions = field(default_factory=TokenOptions)
    data2vec: Data2vecOptions = field(default_factory=Data2vecOptions)
    vqkd: VqkdOptions = field(default_factory=VqkdOptions)
    dvae: DvaeOptions = field(default_factory=DvaeOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def eval_batch_size(self) -> int:
        """Images of one evaluation step."""
        return self.data.eval_batch_size or self.data.batch_size // self.optim.accumulate

    def as_dict(self) -> dict[str, Any]:
        """For JSON: nested dicts of numbers and strings."""
        return dataclasses.asdict(self)


def check(recipe: Recipe) -> None:
    """Refuses what cannot be trained.

    Raises:
        BeitJaxError: a value out of its range, naming the option as the command line spells it.
    """
    for name, ranges in _RANGES.items():
        group, _, option = name.partition(".")
        value = getattr(getattr(recipe, group), option)
        expected, holds = ranges
        _require(value is None or holds(value), name, expected, value)
    model, data, augment, optim = recipe.model, recipe.data, recipe.augment, recipe.optim
    _require(optim.warmup_epochs <= optim.epochs, "optim.warmup_epochs", "at most the epochs", optim.warmup_epochs)
    if data.batch_size % optim.accumulate:
        parts = f"{optim.accumulate} (--optim.accumulate)"
        raise BeitJaxError(f"--data.batch-size: expected a multiple of {parts}, found {data.batch_size}")
    if (augment.mixup or augment.cutmix) and data.batch_size % 2:
        raise BeitJaxError(f"--data.batch-size: mixing pairs images, expected an even number, found {data.batch_size}")
    if recipe.objective == "data2vec":
        _require(optim.ema is not None, "optim.ema", "a decay, data2vec's teacher is the moving average", None)
    elif recipe.objective not in ("classification", "segmentation"):
        _require(optim.ema is None, "optim.ema", f"None, {recipe.objective} keeps something else there", optim.ema)
    if recipe.objective in ("vqkd", "dvae"):
        _require(
            optim.layer_decay == 1.0, "optim.layer_decay", "1, a tokenizer has no order of layers", optim.layer_decay
        )
    if optim.ema_start is not None:
        _require(optim.ema is not None, "optim.ema_start", "None without --optim.ema", optim.ema_start)
        _require(optim.ema_steps > 0, "optim.ema_steps", "steps over which the decay grows", optim.ema_steps)
    if recipe.objective in UNSUPERVISED:
        _require(model.pooling == "mean", "model.pooling", f"mean, {recipe.objective} pools nothing", model.pooling)
    tokens = recipe.tokens
    if bool(tokens.aggregate_from) != bool(tokens.aggregation_layers):
        raise BeitJaxError("--tokens.aggregate-from and --tokens.aggregation-layers: expected both or none")
    _check_unused(recipe)


def _share(value: float) -> bool:
    return 0.0 <= value <= 1.0


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _growing(pair: tuple[float, float]) -> bool:
    return 0 < pair[0] <= pair[1]


_Range = tuple[str, Callable[[Any], bool]]
_RATE: _Range = "a number in [0, 1)", lambda value: 0.0 <= value < 1.0
_SHARE: _Range = "a number in [0, 1]", _share
_POSITIVE: _Range = "a positive number", _positive
_NOT_NEGATIVE: _Range = "a number >= 0", _not_negative
_COUNT: _Range = "a positive integer", lambda value: value >= 1
_COUNT_OR_NONE: _Range = "an integer >= 0", lambda value: value >= 0
_GROWING: _Range = "two growing positive numbers", _growing

_RANGES: Mapping[str, _Range] = {
    "model.drop_path": _RATE,
    "model.dropout": _RATE,
    "model.attention_dropout": _RATE,
    "data.batch_size": _COUNT,
    "data.max_bad": _SHARE,
    "augment.crop_scale": _GROWING,
    "augment.crop_ratio": _GROWING,
    "augment.flip": _SHARE,
    "augment.color_jitter": _NOT_NEGATIVE,
    "augment.erasing": _SHARE,
    "augment.mixup": _NOT_NEGATIVE,
    "augment.cutmix": _NOT_NEGATIVE,
    "augment.mix_probability": _SHARE,
    "augment.mix_switch": _SHARE,
    "augment.smoothing": _RATE,
    "segment.scale": ("pixels of the long edge and of the short one", lambda pair: pair[0] >= pair[1] >= 1),
    "segment.ratio": _GROWING,
    "segment.max_class_share": ("a number in (0, 1]", lambda value: 0.0 < value <= 1.0),
    "segment.flip": _SHARE,
    "mask.patches": _COUNT,
    "mask.min_block": _COUNT,
    "mask.max_block": _COUNT,
    "mask.min_aspect": ("a number in (0, 1]", lambda value: 0.0 < value <= 1.0),
    "tokens.aggregate_from": _COUNT_OR_NONE,
    "tokens.aggregation_layers": _COUNT_OR_NONE,
    "data2vec.target_layers": _COUNT,
    "data2vec.beta": _NOT_NEGATIVE,
    "vqkd.vocab_size": _COUNT,
    "vqkd.codebook_dim": _COUNT,
    "vqkd.decoder_layers": _COUNT,
    "vqkd.decay": _RATE,
    "vqkd.commitment": _NOT_NEGATIVE,
    "dvae.vocab_size": _COUNT,
    "dvae.width": _COUNT,
    "dvae.groups": _COUNT,
    "dvae.blocks": _COUNT,
    "dvae.embedding": _COUNT,
    "dvae.temperature": ("two positive numbers", lambda pair: min(pair) > 0),
    "dvae.temperature_share": _SHARE,
    "dvae.divergence": _NOT_NEGATIVE,
    "dvae.divergence_share": _SHARE,
    "optim.lr": _POSITIVE,
    "optim.min_lr": _NOT_NEGATIVE,
    "optim.epochs": _POSITIVE,
    "optim.warmup_epochs": _NOT_NEGATIVE,
    "optim.warmup_lr": _NOT_NEGATIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.layer_decay": ("a number in (0, 1]", lambda value: 0.0 < value <= 1.0),
    "optim.beta1": _RATE,
    "optim.beta2": _RATE,
    "optim.epsilon": _POSITIVE,
    "optim.clip": ("a positive number or None", lambda value: value > 0),
    "optim.accumulate": _COUNT,
    "optim.ema": ("a number in [0, 1) or None", lambda value: 0.0 <= value < 1.0),
    "optim.ema_start": ("a number in [0, 1) or None", lambda value: 0.0 <= value < 1.0),
    "optim.ema_steps": _COUNT_OR_NONE,
    "optim.max_bad_steps": _COUNT,
    "run.log_every": _COUNT,
    "run.save_every": _COUNT,
    "run.keep": _COUNT,
    "run.eval_every_epochs": _POSITIVE,
    "run.hang_minutes": _POSITIVE,
}
"""What a value must be; None, where an option may be None, always passes."""

UNSUPERVISED: Sequence[Objective] = ("masked_tokens", "data2vec", "vqkd", "dvae")
"""They need no labels, and evaluate by their own loss."""
_CROPS = ("crop_scale", "crop_ratio", "interpolation", "flip", "color_jitter")
_READ: Mapping[Objective, Mapping[str, Sequence[str] | None]] = {
    "classification": {"augment": None},
    "linear_probe": {"augment": None},
    "segmentation": {"segment": None},
    "masked_tokens": {"augment": _CROPS, "mask": None, "tokens": None},
    "data2vec": {"augment": _CROPS, "mask": None, "data2vec": None},
    "vqkd": {"augment": _CROPS, "vqkd": None},
    "dvae": {"augment": _CROPS, "dvae": None},
}
"""Options of these groups that an objective reads; None: all of the group."""


def groups(objective: Objective) -> tuple[str, ...]:
    """Names of the groups of options that an objective reads."""
    return ("model", "data", *_READ[objective], "optim", "run")


def _check_unused(recipe: Recipe) -> None:
    """Refuses options that the objective does not read: whoever set one expects something of it."""
    for group in ("augment", "segment", "mask", "tokens", "data2vec", "vqkd", "dvae"):
        options = getattr(recipe, group)
        read = _READ[recipe.objective].get(group, ())
        idle = NOTHING if recipe.objective in UNSUPERVISED and group == "augment" else type(options)()
        for entry in dataclasses.fields(options):
            value = getattr(options, entry.name)
            if read is not None and entry.name not in read and value != getattr(idle, entry.name):
                name = _spelled(f"{group}.{entry.name}")
                raise BeitJaxError(f"--{name}: {recipe.objective} does not use it, leave it out; found {value}")


def _spelled(name: str) -> str:
    """An option as the command line has it."""
    return name.replace("_", "-")


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise BeitJaxError(f"--{_spelled(name)}: expected {expected}, found {found}")
