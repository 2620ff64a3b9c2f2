"""The options of every training run: frozen dataclasses, each option with the range of its values.

An objective's own options stand in its file (`beit_jax.train.objectives`), the published runs in
`beit_jax.train.recipes`. Nothing here imports JAX. May import: the ground.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_type_hints

from beit_jax.choices import Activation, ModelType, PositionBias, PositionResize
from beit_jax.errors import BeitJaxError

Resume = Literal["auto", "must", "never"]
Statistics = Literal["half", "imagenet"]
PixelType = Literal["uint8", "float32"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "random"]
RecipeT = TypeVar("RecipeT", bound="Recipe")

STATISTICS: Mapping[Statistics, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of RGB values in [0, 1]."""


@dataclass(frozen=True)
class Range:
    """The values that an option may have, as ``Annotated[float, RATE]``. An option that may be None may always be None.

    Attributes:
        expected: the values in words, for the message that refuses another one.
        holds: tells whether a value is one of them.
    """

    expected: str
    holds: Callable[[Any], bool]


MOST = 2**32 - 1
"""The largest number that any option may be. A larger one is a slip, and would end as an overflow far from here."""

RATE = Range("a number in [0, 1)", lambda value: 0.0 <= value < 1.0)
SHARE = Range("a number in [0, 1]", lambda value: 0.0 <= value <= 1.0)
PART = Range("a number in (0, 1]", lambda value: 0.0 < value <= 1.0)
POSITIVE = Range("a positive number", lambda value: value > 0)
NOT_NEGATIVE = Range("a number >= 0", lambda value: value >= 0)
COUNT = Range("a positive integer", lambda value: value >= 1)
WHOLE = Range("an integer >= 0", lambda value: value >= 0)
SIZE = Range("a positive integer up to 65536", lambda value: 1 <= value <= 65536)
WIDTH = Range("a positive integer up to 1048576", lambda value: 1 <= value <= 1 << 20)
SIDES = Range(
    "a positive integer up to 65536, or two: height and width",
    lambda sides: all(1 <= side <= 65536 for side in (sides if isinstance(sides, tuple) else (sides,))),
)
EPSILON = Range("a number in [0, 1]", lambda value: 0.0 <= value <= 1.0)
LAYERS = Range("a positive integer up to 256", lambda value: 1 <= value <= 256)
WORKERS = Range("an integer from 0 to 1024", lambda value: 0 <= value <= 1024)
GROWING = Range("two growing positive numbers", lambda pair: 0 < pair[0] <= pair[1])
TWO_POSITIVE = Range("two positive numbers", lambda pair: pair[0] > 0 and pair[1] > 0)
POSITIVES = Range("positive numbers", lambda values: len(values) > 0 and all(value > 0 for value in values))
CHANNELS = Range("channels from 0", lambda numbers: len(numbers) > 0 and all(0 <= n < 65536 for n in numbers))
BANDS = Range("numbers of bands, from 1", lambda bands: len(bands) > 0 and all(1 <= band <= 65536 for band in bands))
SCALES = Range("positive integers", lambda scales: len(scales) > 0 and all(1 <= scale <= 65536 for scale in scales))
EDGES = Range("pixels of the long edge and of the short one", lambda pair: 65536 >= pair[0] >= pair[1] >= 1)
AXES = Range("positive numbers, one of which may be -1", lambda axes: all(axis == -1 or axis >= 1 for axis in axes))


# --- Groups of options that every run has


@dataclass(frozen=True)
class ModelOptions:
    """The architecture and how it computes."""

    variant: str | None = None
    """A row of `beit-jax list`, or "digits" for the small model of the digits recipes; by default the architecture of
    --init, and without that the recipe's. A variant that is named must be the checkpoint's."""
    image_size: Annotated[int | tuple[int, int] | None, SIDES] = None
    """Pixels of a side, or height and width; by default the variant's, or the checkpoint's own."""
    patch_size: Annotated[int | tuple[int, int] | None, SIDES] = None
    """Pixels of a patch's side, or height and width. The patch projection of a checkpoint is resized."""
    channels: Annotated[int | None, SIZE] = None
    """Channels of an image. The patch projection of a checkpoint is adapted: its channels are repeated in their order
    and scaled, or summed for one."""
    channels_from: Annotated[tuple[int, ...] | None, CHANNELS] = None
    """For every channel the checkpoint's that it comes from, counted from 0, instead of that order: 0 1 2 0."""
    hidden_size: Annotated[int | None, SIZE] = None
    """Width of a token, of a model drawn at random; a checkpoint has its own, as of the options down to `epsilon`."""
    depth: Annotated[int | None, LAYERS] = None
    """Blocks of a model drawn at random."""
    heads: Annotated[int | None, SIZE] = None
    """Attention heads, which divide the width."""
    mlp: Annotated[int | None, WIDTH] = None
    """Width of the hidden layer of a block's MLP."""
    activation: Activation | None = None
    """Of the MLP."""
    absolute_positions: bool | None = None
    """Learned position embeddings, which are added to the patches."""
    epsilon: Annotated[float | None, EPSILON] = None
    """Of LayerNorm."""
    position_bias: PositionBias | None = None
    """Relative position bias: none, one table shared by all blocks, one per layer, or both. A checkpoint's shared table
    can become one per layer, and does so by default where the variant has that."""
    position_resize: PositionResize | None = None
    """How bias tables are resized to other image sizes: as the original code, as timm, or (bilinear) transformers."""
    initializer_range: Annotated[float | None, POSITIVE] = None
    """Standard deviation of weights that are drawn."""
    family: ModelType | None = None
    """Under whose name the result is known to transformers; the mathematics is the same."""
    drop_path: Annotated[float, RATE] = 0.1
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    dropout: Annotated[float, RATE] = 0.0
    """Dropout rate of tokens and of the outputs of attention and MLP."""
    attention_dropout: Annotated[float, RATE] = 0.0
    """Dropout rate of attention probabilities."""
    layer_scale: Annotated[float | None, NOT_NEGATIVE] = None
    """Initial layer scale of a model drawn at random, 0 for none; by default the variant's. A checkpoint brings its
    own."""
    pooling: Literal["mean", "cls"] = "mean"
    """The features that the classifier reads: the mean patch token, or the class token."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The dtype of matrix products. Parameters and optimizer are always float32."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the residual stream between the encoder's blocks, as PyTorch has it under autocast, or rounded after
    each branch to bfloat16, which moves fewer bytes. LayerNorm and softmax compute in float32 in any case."""
    remat: Literal["none", "block", "dots"] = "dots"
    """The backward pass computes nothing again, whole blocks, or blocks without the products with parameters. The last
    costs little time if any, because keeping and reading the rest takes time too."""


@dataclass(frozen=True)
class DataOptions:
    """Batches and how they are read."""

    batch_size: Annotated[int, COUNT] = 1024
    """Images of one optimizer step, over all hosts and devices, accumulation included."""
    eval_batch_size: Annotated[int | None, COUNT] = None
    """Images of one evaluation step; by default the batch size divided by the accumulation."""
    statistics: Literal["half", "imagenet", "checkpoint"] = "half"
    """Mean and standard deviation of pixels: 0.5, or ImageNet's, of which other channels than RGB take the average; or
    those of --init, 0.5 without it. A checkpoint of other channels than RGB brings its own along in any case."""
    mean: tuple[float, ...] | None = None
    """Mean of pixels, one number for all channels or one for each, in place of `statistics`: of values that are scaled
    to [0, 1], or by `scale`."""
    std: Annotated[tuple[float, ...] | None, POSITIVES] = None
    """Standard deviation of pixels; as the mean."""
    scale: Annotated[float | None, POSITIVE] = None
    """The value that becomes 1; by default the largest of the file's type: 255, 65535; floats stay as they are."""
    bands: Annotated[tuple[int, ...] | None, BANDS] = None
    """Bands of the files, counted from 1, that are the channels of an image; by default all, in their order."""
    pixels: PixelType | None = None
    """What an image is until it is normalised: 8 bits, or float32, which holds files of every type. By default 8 bits
    for RGB, float32 for all else."""
    workers: Annotated[int | None, WORKERS] = None
    """Processes that decode and augment; 0: threads of this one. By default half of this host's cores, at most 16."""
    max_bad: Annotated[float, SHARE] = 0.001
    """Share of records that may be unreadable: each is named and replaced; beyond that the run stops."""

    def pixel_type(self, channels: int) -> PixelType:
        """The type of training images of so many channels until they are normalised."""
        return self.pixels or ("uint8" if channels == 3 and self.bands is None else "float32")

    def moments(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of so many channels.

        Raises:
            BeitJaxError: the options have numbers for another number of channels.
        """
        if self.mean is None or self.std is None:
            values = STATISTICS["half" if self.statistics == "checkpoint" else self.statistics]
            mean, std = (own if channels == 3 else (sum(own) / 3,) * channels for own in values)
            return mean, std
        for name, own in (("mean", self.mean), ("std", self.std)):
            expected = f"1 number or {channels}, one for each channel"
            require(len(own) in (1, channels), f"data.{name}", expected, f"{len(own)}")
        mean, std = (own * channels if len(own) == 1 else own for own in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True)
class OptimOptions:
    """AdamW as BEiT uses it."""

    lr: Annotated[float, POSITIVE] = 5e-4
    """Peak learning rate, absolute: not scaled by the batch size."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 1e-6
    """Learning rate at the end."""
    epochs: Annotated[float, POSITIVE] = 30.0
    """Passes over the training images."""
    warmup_epochs: Annotated[float, NOT_NEGATIVE] = 5.0
    """Epochs in which the learning rate grows linearly to its peak."""
    warmup_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate at the first step of the warmup."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """After the warmup: half a cosine, or a straight line (a polynomial of power 1)."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    """AdamW's weight decay, times the learning rate at each step."""
    layer_decay: Annotated[float, PART] = 1.0
    """Learning rate of each layer over that of the next; 1 for none."""
    freeze: str | None = None
    """What stays as it starts, by commas: embeddings, blocks, blocks.3, blocks.0-8 (from 0), norm, encoder, head."""
    decay_bias_tables: bool = True
    """Apply weight decay to the relative position bias tables of blocks."""
    decay_class_token: bool = False
    """Apply weight decay to the class token; the original does so in segmentation only."""
    beta1: Annotated[float, RATE] = 0.9
    """Decay of the moving average of gradients."""
    beta2: Annotated[float, RATE] = 0.999
    """Decay of the moving average of squared gradients."""
    epsilon: Annotated[float, POSITIVE] = 1e-8
    """Added to the root of the squared gradients' average."""
    clip: Annotated[float | None, POSITIVE] = None
    """Largest global norm of the gradient; without it nothing is clipped."""
    accumulate: Annotated[int, COUNT] = 1
    """Parts of a batch that are computed one after the other."""
    ema: Annotated[float | None, RATE] = None
    """Decay of the moving average of parameters, data2vec's teacher; without it none is kept."""
    ema_start: Annotated[float | None, RATE] = None
    """Decay at the first step, from which it grows linearly to that of `ema`; without it the decay is constant."""
    ema_steps: Annotated[int, WHOLE] = 0
    """Steps over which it grows."""
    max_bad_steps: Annotated[int, COUNT] = 10
    """Steps in a row without a finite loss and gradient after which the run stops. Each is skipped."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes what it computes, except `seed` and `mesh` (rounding)."""

    seed: Annotated[int, WHOLE] = 0
    """Of everything that is drawn: parameters, order of images, augmentation, dropout."""
    mesh: Annotated[tuple[int, int, int], AXES] = (-1, 1, 1)
    """Devices along (data, fsdp, tensor); -1: all that are left."""
    log_every: Annotated[int, COUNT] = 50
    """Steps between log lines."""
    save_every: Annotated[int, COUNT] = 1000
    """Steps between checkpoints."""
    keep: Annotated[int, COUNT] = 2
    """Checkpoints that are kept."""
    eval_every_epochs: Annotated[float, POSITIVE] = 1.0
    """Epochs between evaluations."""
    best: str | None = None
    """Score by which the best model is kept in RUN/best, beside the last one: accuracy, loss (of validation) ..."""
    best_is: Literal["lower", "higher"] | None = None
    """Which values are better; by default lower ones where its name ends in loss, mae or mse, else higher ones."""
    patience: Annotated[int | None, COUNT] = None
    """Evaluations in a row without a better score after which the run ends; the score is `best`, or the run's first."""
    hang_minutes: Annotated[float, POSITIVE] = 30.0
    """Minutes without a step after which the run prints its stacks and stops."""
    profile_steps: Annotated[int, WHOLE] = 0
    """Steps, after the first ten, that a profiler trace covers."""


# --- Groups that several objectives share: what the host does to an image


@dataclass(frozen=True)
class CropOptions:
    """How a training image is cropped, flipped and recoloured.

    Source: timm 0.3.2 `create_transform`, unilm beit/datasets.py.
    """

    crop_scale: Annotated[tuple[float, float], GROWING] = (0.08, 1.0)
    """Area of the crop, as a share of the image's."""
    crop_ratio: Annotated[tuple[float, float], GROWING] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    interpolation: Interpolation = "bicubic"
    """How the crop is resized; random: bilinear or bicubic, drawn for every image."""
    flip: Annotated[float, SHARE] = 0.5
    """Probability of a horizontal flip."""
    color_jitter: Annotated[float, NOT_NEGATIVE] = 0.0
    """Strength of brightness, contrast and saturation jitter; timm ignores it where RandAugment is on."""


@dataclass(frozen=True)
class AugmentOptions(CropOptions):
    """The augmentation of a classifier's training images.

    Source: timm 0.3.2 `create_transform`, unilm beit/datasets.py.
    """

    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation; None: no RandAugment."""
    erasing: Annotated[float, SHARE] = 0.25
    """Probability of erasing a rectangle (2 % to 1/3 of the area) by normal noise."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Alpha of mixup's beta distribution; 0 for none."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """Alpha of cutmix's beta distribution; 0 for none."""
    mix_probability: Annotated[float, SHARE] = 1.0
    """Share of batches that are mixed."""
    mix_switch: Annotated[float, SHARE] = 0.5
    """Share of mixed batches that are cut where both are on."""
    smoothing: Annotated[float, RATE] = 0.1
    """Label smoothing."""


@dataclass(frozen=True)
class SceneOptions:
    """The augmentation of training images and their label maps, in this order.

    Source: microsoft/unilm@768a3c8 beit/semantic_segmentation/configs/_base_/datasets/ade20k.py.
    """

    scale: Annotated[tuple[int, int] | None, EDGES] = (2048, 512)
    """Bounds of the long and the short edge that images are resized to; the evaluation's, and training's at ratio 1.
    None: the short edge is the model's, the long edge at most four times as long."""
    ratio: Annotated[tuple[float, float], GROWING] = (0.5, 2.0)
    """Range of the factor of both bounds, drawn for every training image."""
    max_class_share: Annotated[float, PART] = 0.75
    """Crops of which one class takes more than this share are drawn again, up to ten times; 1 for no limit."""
    flip: Annotated[float, SHARE] = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Distort brightness, contrast, saturation and hue."""

    def edges(self, size: tuple[int, int]) -> tuple[int, int]:
        """`scale`, for a model of images of this size."""
        return (4 * min(size), min(size)) if self.scale is None else self.scale


@dataclass(frozen=True)
class MaskOptions:
    """Which patches pre-training hides: blocks, until enough are hidden. Source: unilm beit/masking_generator.py."""

    patches: Annotated[int, COUNT] = 75
    """Patches to hide, of one image."""
    min_block: Annotated[int, COUNT] = 16
    """Smallest area of a block, in patches."""
    max_block: Annotated[int | None, COUNT] = None
    """Patches that one block may newly hide; by default as many as are still to be hidden."""
    min_aspect: Annotated[float, PART] = 0.3
    """Smallest height over width of a block; the largest is its inverse."""
    exact: bool = False
    """Fill up with single patches to the exact number, as BEiT v2 does; BEiT's count varies a little."""


# --- Options of a command, not of a run


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


# --- A run


@dataclass(frozen=True)
class Recipe:
    """A training run. Each objective has a recipe of its own, with the groups of options that the objective reads.

    Attributes:
        objective: name of the objective, which is the name of its module in `beit_jax.train.objectives`.
        fallback: the variant of a model drawn at random where no run was published and none is named.
        topology: TPUs that the batch, split over them, fits: `topology.parse_topology` reads it. Empty: any device.
        published: the variant of the published run, whose image size belongs to the recipe. A checkpoint of its
            architecture trains as published. Empty: no such run, checkpoints of any size keep what they are. A variant
            that somebody asks for stands in `model.variant`.
    """

    objective: ClassVar[str] = ""
    fallback: ClassVar[str] = "beit_base_patch16_224"

    name: str = ""
    topology: str = ""
    published: str = ""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def variant(self) -> str:
        """The variant that is asked for, or else the published run's; of a model drawn at random."""
        return self.model.variant or self.published or self.fallback

    @property
    def eval_batch_size(self) -> int:
        """Images of one evaluation step."""
        return self.data.eval_batch_size or self.data.batch_size // self.optim.accumulate

    @classmethod
    def group_types(cls) -> dict[str, type]:
        """The groups of options of this kind of recipe by name, in the order in which people read them."""
        hints = get_type_hints(cls)
        names = [entry.name for entry in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[entry.name])]
        return {name: hints[name] for name in sorted(names, key=lambda name: name in ("optim", "run"))}

    def groups(self) -> dict[str, Any]:
        """Every group of options by its name."""
        return {name: getattr(self, name) for name in self.group_types()}

    def as_dict(self) -> dict[str, Any]:
        """The recipe as nested dicts of numbers and strings, for JSON."""
        return {"objective": self.objective, **dataclasses.asdict(self)}

    def derive(self, kind: type[RecipeT], **changes: Any) -> RecipeT:
        """A recipe of another objective with the same values in all groups that both kinds have the same type of."""
        shared = {
            name: getattr(self, name)
            for name, group in kind.group_types().items()
            if type(getattr(self, name, None)) is group
        }
        own = {name: getattr(self, name) for name in ("name", "topology", "published")}
        return kind(**(own | shared | changes))

    def for_tpus(self) -> Self:
        """The recipe laid out for the smallest slice of v5e, of 16 GB a chip, on which nothing else has to change.

        Blocks are computed again on the way back. Every chip holds the whole state, which takes the least time wherever
        the state fits (benchmarks/scaling.md). benchmarks/aot.md has what the compiler says; with more memory, 80 GB
        for example, ``--model.remat none`` saves a quarter of the products.
        """
        many = self.data.batch_size >= 4096 or "_large" in self.variant
        model = dataclasses.replace(self.model, remat="block")
        return dataclasses.replace(self, model=model, topology="v5e:8x8" if many else "v5e:4x4")

    def check(self) -> None:
        """Refuses a recipe that cannot be trained. A recipe with rules of its own calls this one first.

        Raises:
            BeitJaxError: a value out of its range, naming the option as the command line spells it.
        """
        for name, value, limits in _options(self):
            if value is not None and limits is not None:
                require(limits.holds(value), name, limits.expected, value)
            for number in value if isinstance(value, tuple) else (value,):
                usual = not isinstance(number, int | float) or abs(number) <= MOST  # which NaN is not
                require(usual, name, f"a number up to {MOST}", value)
        data, optim = self.data, self.optim
        require(optim.warmup_epochs <= optim.epochs, "optim.warmup_epochs", "at most the epochs", optim.warmup_epochs)
        if data.mean is not None or data.std is not None:
            require(None not in (data.mean, data.std), "data.mean", "with --data.std, or neither", data.mean)
            named = data.statistics == "imagenet"
            require(not named, "data.statistics", "half or checkpoint beside --data.mean", data.statistics)
            require(bool(data.mean), "data.mean", "numbers", data.mean)
        if data.batch_size % optim.accumulate:
            parts = f"{optim.accumulate} (--optim.accumulate)"
            raise BeitJaxError(f"--data.batch-size: expected a multiple of {parts}, found {data.batch_size}")
        if optim.ema_start is not None:
            require(optim.ema is not None, "optim.ema_start", "None without --optim.ema", optim.ema_start)
            require(optim.ema_steps > 0, "optim.ema_steps", "steps over which the decay grows", optim.ema_steps)

    def check_pairs(self, augment: AugmentOptions) -> None:
        """Refuses a batch that mixing, which pairs images, cannot divide.

        Raises:
            BeitJaxError: an odd number of images.
        """
        if (augment.mixup or augment.cutmix) and self.data.batch_size % 2:
            raise BeitJaxError(
                f"--data.batch-size: mixing pairs images, expected an even number, found {self.data.batch_size}"
            )

    def check_without_average(self) -> None:
        """Refuses a moving average, for an objective that has no use for one.

        Raises:
            BeitJaxError: `optim.ema` is given.
        """
        require(
            self.optim.ema is None, "optim.ema", f"None, {self.objective} has no use for an average", self.optim.ema
        )

    def check_without_freezing(self) -> None:
        """Refuses frozen parts, for an objective that trains no model as a whole.

        Raises:
            BeitJaxError: `optim.freeze` is given.
        """
        freeze = self.optim.freeze
        require(freeze is None, "optim.freeze", f"None, {self.objective} trains no model as a whole", freeze)

    def check_without_pooling(self) -> None:
        """Refuses a choice of pooling, for an objective that pools nothing.

        Raises:
            BeitJaxError: `model.pooling` is not the default.
        """
        pooling = self.model.pooling
        require(pooling == "mean", "model.pooling", f"mean, {self.objective} pools nothing", pooling)

    def check_without(self, *names: str) -> None:
        """Refuses options of the model, for an objective whose network has no such thing.

        Raises:
            BeitJaxError: one of them is given.
        """
        defaults = {field.name: field.default for field in fields(self.model)}
        for name in names:
            value, default = getattr(self.model, name), defaults[name]
            absent = value is None or value == default or (value == 0 and not isinstance(value, bool))
            wanted = default if isinstance(default, str) else None
            require(absent, f"model.{name}", f"{wanted}, {self.objective} has no use for it", value)

    def check_without_layers(self) -> None:
        """Refuses learning rates by layer, for a model whose layers have no order.

        Raises:
            BeitJaxError: `optim.layer_decay` is not 1.
        """
        decay = self.optim.layer_decay
        require(decay == 1.0, "optim.layer_decay", "1, a tokenizer has no order of layers", decay)


def spelled(name: str) -> str:
    """An option's name as the command line has it."""
    return name.replace("_", "-")


def require(condition: bool, name: str, expected: str, found: object) -> None:
    """Refuses the value of an option.

    Raises:
        BeitJaxError: the condition does not hold; names the option, what was expected and what was found.
    """
    if not condition:
        raise BeitJaxError(f"--{spelled(name)}: expected {expected}, found {found}")


def _options(recipe: Recipe) -> Iterator[tuple[str, Any, Range | None]]:
    """The name, the value and the range, if it has one, of every option."""
    for group, options in recipe.groups().items():
        for name, hint in get_type_hints(type(options), include_extras=True).items():
            limits = [entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Range)]
            yield f"{group}.{name}", getattr(options, name), limits[0] if limits else None
