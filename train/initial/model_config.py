"""From a recipe, the data's labels and maybe a checkpoint to the configuration of the model that is trained."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import as_file, files
from typing import Any

from beit_jax.config import BeitConfig, FeatureTaps, Task
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import HALF, ImageProcessor, preset
from beit_jax.images.scaling import BY_TYPE
from beit_jax.variants import VARIANTS

from ..recipe import DataOptions, ModelOptions, Recipe, spelled

DIGITS = "digits"

# Options and the fields that they set. A checkpoint's tensors settle the first kind; it can be adapted to the second.
SETTLED: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "activation": "hidden_act",
    "absolute_positions": "use_absolute_position_embeddings",
    "epsilon": "layer_norm_eps",
}
ADAPTED: Mapping[str, str] = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "position_bias": "position_bias",
    "position_resize": "position_resize",
    "layer_scale": "layer_scale_init_value",
    "initializer_range": "initializer_range",
    "family": "model_type",
}
_SIZES = tuple(SETTLED[name] for name in ("hidden_size", "depth", "heads", "mlp"))
# What a checkpoint brings along, whatever its size.
_BROUGHT = (
    "model_type",
    "patch_size",
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
    "layer_scale_init_value",
    "use_absolute_position_embeddings",
    "use_key_bias",
    "use_sub_norm",
)
# What it brings along, too, where no published run was of its architecture.
_OWN = (*_SIZES, "image_size", "position_resize", "initializer_range")
# Options of a segmentation head.
HEAD: Mapping[str, str] = {
    "out_indices": "out_indices",
    "pool_scales": "pool_scales",
    "auxiliary": "use_auxiliary_head",
    "auxiliary_weight": "auxiliary_loss_weight",
    "auxiliary_channels": "auxiliary_channels",
    "auxiliary_convs": "auxiliary_num_convs",
    "auxiliary_concat": "auxiliary_concat_input",
}
_HEAD = (*HEAD.values(), "feature_taps")
_OPTIONS = {field: f"model.{option}" for option, field in {**SETTLED, **ADAPTED}.items()} | {
    field: f"head.{option}" for option, field in HEAD.items()
}


def model_config(
    recipe: Recipe,
    labels: tuple[str, ...],
    start: BeitConfig | None = None,
    *,
    task: Task = "image_classification",
) -> BeitConfig:
    """The model that is trained.

    Args:
        labels: of the data; they name the outputs. Masked image modelling has none.
        start: configuration of the checkpoint that training starts from. It decides what a checkpoint brings along:
            family, patch, channels, activation, LayerNorm's epsilon, layer scale, kind of positions, a bias of the
            keys, norms within the branches; and its sizes, too, unless a variant is named, which then must have them.
            Where the published run of the recipe was of the same architecture, image size and resizing of positions are
            those of that run, else the checkpoint's. A position bias that pre-training shared becomes one per layer
            where the variant has that, as in BEiT's fine-tuning.
        task: which head it has. What a segmentation head reads of the encoder is the variant's to say, or for encoders
            of another depth `segmentation_taps`; a segmentation model of its own size brings its head along.

    Raises:
        BeitJaxError: no such variant, one that does not segment for a model that shall, a checkpoint of another size
            than the variant that is named, an option that contradicts the checkpoint, or options that describe no
            model; one line naming the option.
    """
    options = recipe.model
    variant = _variant(recipe.variant)
    if task == "semantic_segmentation" and variant.task != task:
        known = " or ".join(name for name, config in VARIANTS.items() if config.task == task)
        raise BeitJaxError(f"--model.variant: {printable(recipe.variant)} does not segment; choose {known}")
    masked = task == "masked_image_modeling"
    bias = variant.position_bias
    if masked and bias == "per_layer":  # one table for all layers, as every pre-trained model has
        bias = "shared"
    fields: dict[str, Any] = {"position_bias": bias}
    if start is not None:
        fields |= _brought(recipe, replace(variant, position_bias=bias), start, task)
        _check(options, start)
    fields |= _chosen(options, start)
    if task == "semantic_segmentation":
        fields |= _chosen_head(recipe, start)
    depth = fields.get("num_hidden_layers", variant.num_hidden_layers)
    if task == "semantic_segmentation" and "out_indices" not in fields and depth != variant.num_hidden_layers:
        fields["out_indices"], fields["feature_taps"] = segmentation_taps(depth)
    try:
        return replace(
            variant,
            **fields,
            task=task,
            labels=() if masked else labels,
            use_mask_token=masked,
            pooling=options.pooling,
            drop_path_rate=options.drop_path,
            hidden_dropout_prob=options.dropout,
            attention_probs_dropout_prob=options.attention_dropout,
        )
    except BeitJaxError as error:
        raise BeitJaxError(_in_options(error)) from None


def architecture(config: BeitConfig) -> dict[str, Any]:
    """The fields of a configuration that say what the network is: those that options set, and its head's."""
    heads = {"semantic_segmentation": _HEAD, "masked_image_modeling": ("vocab_size",)}
    head = heads.get(config.task, ("pooling",))
    return {name: getattr(config, name) for name in (*ADAPTED.values(), *SETTLED.values(), *head)}


def segmentation_taps(depth: int) -> tuple[tuple[int, ...], FeatureTaps]:
    """What UperNet reads, as `BeitConfig.out_indices` and how they are counted: the blocks after which a third, a half,
    two thirds and all of them are done, as published.

    (3, 5, 7, 11) of 12 blocks and (7, 11, 15, 23) of 24, counted from 0. Of three blocks it reads all, and before them
    the embeddings, which have a number as transformers counts.

    Raises:
        BeitJaxError: fewer than three blocks.
    """
    if depth < 3:
        raise BeitJaxError(f"segmentation reads four maps of an encoder: expected at least 3 blocks, found {depth}")
    if depth == 3:
        return (1, 2, 3, 4), "hf"
    return (depth // 3 - 1, depth // 2 - 1, -(-2 * depth // 3) - 1, depth - 1), "original"


def image_processor(recipe: Recipe, config: BeitConfig) -> ImageProcessor:
    """How images are prepared for evaluation and use: the original's resize and crop, the recipe's statistics.

    The shorter side is resized to the size over 0.875, then the centre is cut; from 384 pixels on nothing is cut.
    Source: microsoft/unilm@768a3c8 beit/datasets.py `build_transform`. Digits are resized as they are.
    """
    if recipe.variant == DIGITS:
        half = HALF[:1] * config.num_channels
        found = ImageProcessor(config.image_size, "bilinear", mean=half, std=half, num_channels=config.num_channels)
    else:
        found = preset("unilm_eval", config.image_size, num_channels=config.num_channels)
    return normalised(found, recipe.data)


def normalised(processor: ImageProcessor, data: DataOptions) -> ImageProcessor:
    """A processor of the same steps that reads and normalises images as training does."""
    mean, std = data.moments(processor.num_channels)
    factor = BY_TYPE if data.scale is None else 1 / data.scale
    return replace(processor, mean=mean, std=std, rescale_factor=factor, bands=data.bands)


def _variant(name: str) -> BeitConfig:
    if name == DIGITS:
        with as_file(files("beit_jax") / "digits" / "config.json") as path:
            return BeitConfig.from_file(path)
    if name not in VARIANTS:
        raise BeitJaxError(f"--model.variant: no variant is called {printable(name)}; beit-jax list shows all")
    return VARIANTS[name]


# --- What a checkpoint decides ----------------------------------------------------------------------------------------


def _brought(recipe: Recipe, variant: BeitConfig, start: BeitConfig, task: Task) -> dict[str, Any]:
    """The fields that a checkpoint brings along."""
    if recipe.model.variant is not None:
        for name in _SIZES:
            if getattr(start, name) != getattr(variant, name):
                raise BeitJaxError(
                    f"--init: {name} {getattr(start, name)}, but --model.variant has {getattr(variant, name)}; "
                    "choose the variant of the checkpoint, or leave it out"
                )
    brought: tuple[str, ...] = _BROUGHT
    if recipe.model.variant is None and not _as_published(recipe, variant, start):
        brought += _OWN + (_HEAD if start.task == task == "semantic_segmentation" else ())
    fields = {name: getattr(start, name) for name in brought}
    one_each = (start.position_bias, variant.position_bias) == ("shared", "per_layer")
    return fields | {"position_bias": "per_layer" if one_each else start.position_bias}


def _as_published(recipe: Recipe, variant: BeitConfig, start: BeitConfig) -> bool:
    """Whether a checkpoint is of the architecture of the recipe's published run, for which that has its image size."""
    same = all(getattr(start, name) == getattr(variant, name) for name in (*_SIZES, "patch_size"))
    return bool(recipe.published) and same and start.image_size[0] == start.image_size[1]


def _check(options: ModelOptions, start: BeitConfig) -> None:
    """Refuses an option that contradicts a checkpoint's tensors, or the function that they were learned for."""
    for option, name in SETTLED.items():
        asked, found = getattr(options, option), getattr(start, name)
        if asked is not None and asked != found:
            raise _contradiction(f"model.{option}", asked, found)
    asked, found = options.position_bias, start.position_bias
    if asked is not None and asked != found and (found, asked) != ("shared", "per_layer"):
        raise _contradiction("model.position_bias", asked, found)
    scale = options.layer_scale
    if scale is not None and (scale > 0) != (start.layer_scale_init_value > 0):
        raise _contradiction("model.layer_scale", f"{scale:g}", "one" if start.layer_scale_init_value else "none")


def _contradiction(option: str, asked: object, found: object) -> BeitJaxError:
    return BeitJaxError(
        f"--{spelled(option)}: the checkpoint of --init has {found}, found {asked}; None takes the checkpoint's"
    )


# --- What the options decide ------------------------------------------------------------------------------------------


def _chosen(options: ModelOptions, start: BeitConfig | None) -> dict[str, Any]:
    """The fields that options name. The layer scale of a checkpoint has its values already."""
    named = {field: getattr(options, option) for option, field in {**SETTLED, **ADAPTED}.items()}
    if start is not None:
        del named["layer_scale_init_value"]
    return {field: value for field, value in named.items() if value is not None}


def _chosen_head(recipe: Recipe, start: BeitConfig | None) -> dict[str, Any]:
    """The fields of a segmentation head that options name. A head of the checkpoint keeps its shapes."""
    options = recipe.groups().get("head")
    named = {field: getattr(options, option, None) for option, field in HEAD.items()}
    chosen = {field: value for field, value in named.items() if value is not None}
    if start is not None and start.task == "semantic_segmentation":
        for field in chosen.keys() - {"out_indices", "use_auxiliary_head", "auxiliary_loss_weight"}:
            if chosen[field] != getattr(start, field):
                raise _contradiction(_OPTIONS[field], chosen[field], getattr(start, field))
    return chosen | ({"feature_taps": "original"} if "out_indices" in chosen else {})


def _in_options(error: BeitJaxError) -> str:
    """The message with the options that set the fields it names."""
    first = str(error).split(maxsplit=1)[0].rstrip(":")
    return f"--{spelled(_OPTIONS[first])}: {error}" if first in _OPTIONS else str(error)
