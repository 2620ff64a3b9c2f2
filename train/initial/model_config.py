"""From a recipe, the data's labels and maybe a checkpoint to the configuration of the model that is trained."""

from dataclasses import replace
from importlib.resources import as_file, files

from beit_jax.config import BeitConfig, Task
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import ImageProcessor, preset
from beit_jax.variants import VARIANTS

from ..recipe import STATISTICS, ModelOptions, Recipe

DIGITS = "digits"
_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def model_config(
    options: ModelOptions,
    labels: tuple[str, ...],
    start: BeitConfig | None = None,
    *,
    task: Task = "image_classification",
) -> BeitConfig:
    """The model that is trained.

    Args:
        labels: of the data; they name the outputs. Masked image modelling has none.
        start: configuration of the checkpoint that training starts from. It decides what a checkpoint brings along:
            family, patch, LayerNorm's epsilon, layer scale, kind of positions. Sizes must be the variant's. A position
            bias that pre-training shared becomes one per layer where the variant has that, as in BEiT's fine-tuning.
        task: which head it has. What a segmentation head reads of the encoder is the variant's to say.

    Raises:
        BeitJaxError: no such variant, one that does not segment for a model that shall, or a checkpoint of another
            size.
    """
    named = _variant(options.variant)
    if task == "semantic_segmentation" and named.task != task:
        known = " or ".join(name for name, config in VARIANTS.items() if config.task == task)
        raise BeitJaxError(f"--model.variant: {printable(options.variant)} does not segment; choose {known}")
    masked = task == "masked_image_modeling"
    variant = replace(named, task=task, labels=() if masked else labels, use_mask_token=masked)
    if masked and variant.position_bias == "per_layer":  # one table for all layers, as every pre-trained model has
        variant = replace(variant, position_bias="shared")
    config = variant if start is None else _continued(variant, start)
    size = variant.image_size if options.image_size is None else (options.image_size, options.image_size)
    config = replace(
        config,
        image_size=size,
        pooling=options.pooling,
        drop_path_rate=options.drop_path,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.attention_dropout,
    )
    if options.layer_scale is None or start is not None:
        return config
    return replace(config, layer_scale_init_value=options.layer_scale)


def image_processor(recipe: Recipe, config: BeitConfig) -> ImageProcessor:
    """How images are prepared for evaluation and use: the original's resize and crop, the recipe's statistics.

    The shorter side is resized to the size over 0.875, then the centre is cut; from 384 pixels on nothing is cut.
    Source: microsoft/unilm@768a3c8 beit/datasets.py `build_transform`. Digits are resized as they are.
    """
    mean, std = STATISTICS[recipe.data.statistics]
    if recipe.model.variant == DIGITS:
        return ImageProcessor(resize=config.image_size, resample="bilinear", mean=mean, std=std)
    return preset("unilm_eval", config.image_size, mean=mean, std=std)


def _variant(name: str) -> BeitConfig:
    if name == DIGITS:
        with as_file(files("beit_jax") / "digits" / "config.json") as path:
            return BeitConfig.from_file(path)
    if name not in VARIANTS:
        raise BeitJaxError(f"--model.variant: no variant is called {printable(name)}; beit-jax list shows all")
    return VARIANTS[name]


def _continued(variant: BeitConfig, start: BeitConfig) -> BeitConfig:
    """The variant with what the checkpoint brings along."""
    for name in _SHAPE:
        if getattr(start, name) != getattr(variant, name):
            raise BeitJaxError(
                f"--init: {name} {getattr(start, name)}, but --model.variant has {getattr(variant, name)}; "
                "choose the variant of the checkpoint"
            )
    bias = start.position_bias
    if (bias, variant.position_bias) == ("shared", "per_layer"):
        bias = "per_layer"
    return replace(
        variant,
        model_type=start.model_type,
        patch_size=start.patch_size,
        num_channels=start.num_channels,
        hidden_act=start.hidden_act,
        layer_norm_eps=start.layer_norm_eps,
        layer_scale_init_value=start.layer_scale_init_value,
        use_absolute_position_embeddings=start.use_absolute_position_embeddings,
        position_bias=bias,
    )
