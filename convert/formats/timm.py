"""timm's directories: the original's names, and a ``config.json`` that says how images are prepared.

A timm file without this ``config.json`` is read as an original file.
Source: huggingface/pytorch-image-models timm/models/beit.py and timm/models/_hub.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from beit_jax.config import BeitConfig, ProblemType
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG
from beit_jax.images.preprocessor_config import RESAMPLES
from beit_jax.images.processor import HALF, ImageProcessor, for_channels
from beit_jax.json_file import Fields, write_json
from beit_jax.version import __version__

from .format import Description, Sighting, SourceFormat
from .heads import stated_by_architecture
from .unilm import UNILM, describe_by_tensors, refuse_unbiased
from .writing import write_safetensors

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint


def matches(content: Mapping[str, Any] | None) -> bool:
    """timm's own file, or transformers' of a model that it lets timm build."""
    return content is not None and "architecture" in content and content.get("model_type") in (None, "timm_wrapper")


def describe(sighting: Sighting) -> Description:
    """The model from the tensors and ``model_args``, the images from ``pretrained_cfg``."""
    file = sighting.config_file
    assert sighting.content is not None  # `matches`
    refuse_unbiased(sighting)
    if "enormous" in str(sighting.content["architecture"]):  # EVA-02's: post-norm, which no tensor shows
        raise BeitJaxError(
            f"{sighting.file}: {printable(sighting.content['architecture'])} of {file}: its norms follow what BEiT's "
            "precede: a relative of BEiT, which nothing here computes"
        )
    content = {key: value for key, value in sighting.content.items() if value is not None}
    arguments = Fields(content, file).typed("model_args", dict, {})
    images = Fields(content, file).typed("pretrained_cfg", dict, {})
    found = describe_by_tensors(
        sighting,
        heads=lambda size: stated_by_architecture(content["architecture"], arguments, size, f"{file}: model_args."),
        image_sizes=stated_sizes(content),
        origin=file,
    )
    labels = content.get("label_names")
    config = replace(
        found.config, position_resize="geometric_linear", problem_type=_problem_type(Fields(content, file))
    )
    if isinstance(labels, list) and len(labels) == config.num_labels:
        config = replace(config, labels=tuple(map(str, labels)))
    seen = (f"timm's {printable(content['architecture'])}, images by its pretrained_cfg", *found.seen)
    prepare = partial(images_of, images, config, f"{file}: pretrained_cfg")
    return replace(found, config=config, seen=seen, processor=prepare)


def _problem_type(read: Fields) -> ProblemType | None:
    """What an export of a model that is no usual classifier says; timm has no word for it, and does not read it."""
    stated = "problem_type" in read.content
    return read.choice("problem_type", get_args(ProblemType), None) if stated else None


def stated_sizes(content: Mapping[str, Any]) -> list[tuple[int, int]]:
    """What timm's configuration may state as (height, width), the most reliable first."""
    parts = [content.get(key) for key in ("model_args", "pretrained_cfg")]
    arguments, images = (part if isinstance(part, dict) else {} for part in parts)
    argument, channels_and_size = arguments.get("img_size"), images.get("input_size")
    written: list[list[object]] = [argument if isinstance(argument, list) else [argument, argument]]
    if isinstance(channels_and_size, list):
        written.append(channels_and_size[1:])
    sides = [[side for side in size if type(side) is int and side > 0] for size in written]
    return [(size[0], size[1]) for size in sides if len(size) == 2]


def images_of(content: Mapping[str, Any], config: BeitConfig, file: str) -> ImageProcessor:
    """Returns how timm prepares images by a ``pretrained_cfg``; config says their size and channels.

    Raises:
        BeitJaxError: a value of the wrong type, or a way of cropping that is not computed here.
    """
    read, (height, width) = Fields(content, file), config.image_size
    mode = content.get("crop_mode", "center")
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise BeitJaxError(
            f"{file}: crop_mode: expected squash, or center for square images, found {printable(mode)} for "
            f"{height}x{width}"
        )
    pct = read.typed("crop_pct", float, 0.9)
    if not 0.01 <= pct <= 1:
        raise read.error("crop_pct", "a number from 0.01 to 1")
    mean, std = (read.content.get(key, HALF[:1]) for key in ("mean", "std"))
    for key, values in (("mean", mean), ("std", std)):
        if not isinstance(values, list | tuple) or not values or not all(type(v) in (int, float) for v in values):
            raise read.error(key, "a list of numbers")
    scaled = int(height / pct), int(width / pct)
    return ImageProcessor(
        resize=scaled[0] if mode == "center" else scaled,
        resample=read.choice("interpolation", RESAMPLES, "bicubic"),
        crop=None if mode == "squash" and scaled == (height, width) else (height, width),
        crop_rounding="floor" if mode == "squash" and scaled == (height, width) else "half_even",
        mean=for_channels(tuple(mean), config.num_channels),  # averaged where timm keeps the means of RGB
        std=for_channels(tuple(std), config.num_channels),
        num_channels=config.num_channels,
    )


def _refusal(config: BeitConfig) -> str | None:
    if config.use_key_bias or config.use_sub_norm:
        return refused_as_vit(config) or "timm's BEiT has no bias of the keys and no norms within its branches"
    return _refused(config)


def refused_as_vit(config: BeitConfig) -> str | None:
    """The reason why timm's ViT cannot hold a model; None if it can."""
    if not config.use_key_bias:
        return "timm's ViT has a bias of the keys, and this model none"
    if config.position_bias != "none":
        return "timm's ViT has no relative position bias"
    if config.layer_norm_eps not in (1e-6, 1e-5):
        epsilon = f"{config.layer_norm_eps:g}"
        return f"timm's ViT has a layer norm epsilon of 1e-06 or, as BEiT-3, of 1e-05, and this model of {epsilon}"
    return _refused(replace(config, layer_norm_eps=1e-6))


def _refused(config: BeitConfig) -> str | None:
    """What timm's BEiT and ViT both have no place for."""
    problems = {
        "a masked-image head": config.task == "masked_image_modeling",
        "segmentation": config.task in ("semantic_segmentation", "backbone"),
        "a mask token": config.use_mask_token,
        "an embedding": config.embedding_size > 0,
        f"layer norm epsilon {config.layer_norm_eps:g} (timm's is 1e-06)": config.layer_norm_eps != 1e-6,
        f"the activation {config.hidden_act}": config.hidden_act != "gelu",
        "an encoder that neither pools nor normalises": config.task == "features"
        and config.pooling == "mean"
        and not config.add_pooling_layer,
    }
    found = [what for what, is_there in problems.items() if is_there]
    return f"timm's BEiT has no place for {' and '.join(found)}" if found else None


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``model.safetensors`` and ``config.json``, for ``timm.create_model("local-dir:...")``."""
    config = checkpoint.config
    size = {768: "base", 1024: "large"}.get(config.hidden_size, "base")
    arguments = {
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rel_pos_bias": config.has_layer_bias,
        "use_shared_rel_pos_bias": config.has_shared_bias,
    }
    return write_directory(naming, directory, checkpoint, f"beit_{size}_patch16_224", arguments)


def write_directory(
    naming: SourceFormat,
    directory: Path,
    checkpoint: "NativeCheckpoint",
    architecture: str,
    arguments: Mapping[str, Any],
) -> list[str]:
    """Writes a model of timm's, and says what its ``config.json`` cannot say of images.

    Args:
        architecture: of the models of this kind, any; its sizes are arguments.
        arguments: of this kind of models, beside those that timm's ViT and BEiT have in common.
    """
    config, processor = checkpoint.config, checkpoint.processor
    content = timm_config(config, processor, architecture, arguments)
    write_safetensors(directory / "model.safetensors", naming.to_torch(config, checkpoint.params))
    write_json(directory / CONFIG, content)
    if processor.num_channels != config.num_channels:
        return [f"timm prepares images of {config.num_channels} channels in no way that is known here"]
    theirs = images_of(content["pretrained_cfg"], config, CONFIG)
    if theirs == processor:
        return []
    return [f"timm cannot say how images are prepared here ({processor.describe()}): it will {theirs.describe()}"]


def timm_config(
    config: BeitConfig, processor: ImageProcessor, architecture: str, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns timm's ``config.json``: the model to build, its arguments, and how it prepares images."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    mlp_ratio = _nudged(intermediate / hidden, math.inf, lambda ratio: int(hidden * ratio) >= intermediate)
    arguments: dict[str, Any] = {
        "img_size": list(config.image_size),
        "patch_size": list(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio,
        "init_values": config.layer_scale_init_value or None,
        **more,
        "global_pool": "avg" if config.pooling == "mean" else "token",
    }
    return {
        "architecture": architecture,
        "num_classes": config.num_labels,
        "model_args": arguments,
        "label_names": list(config.labels),
        "pretrained_cfg": {
            "num_classes": config.num_labels,
            "input_size": [config.num_channels, *config.image_size],
            "fixed_input_size": True,
            **_image_settings(config, processor),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        **({} if config.problem_type is None else {"problem_type": config.problem_type}),  # not read by timm
        "beit_jax": __version__,
    }


def _image_settings(config: BeitConfig, processor: ImageProcessor) -> dict[str, Any]:
    """The part of ``pretrained_cfg`` on images; as near as timm can come, see `_write`."""
    height, width = config.image_size
    centre = isinstance(processor.resize, int) and height == width
    edge = processor.resize if isinstance(processor.resize, int) else height
    if isinstance(processor.resize, tuple):
        edge = processor.resize[0]
    return {
        "interpolation": processor.resample,
        "crop_pct": min(1.0, _nudged(height / edge, 0.0, lambda pct: int(height / pct) >= edge)),
        "crop_mode": "center" if centre else "squash",
        "mean": list(processor.mean or [0.0] * config.num_channels),
        "std": list(processor.std or [1.0] * config.num_channels),
    }


def _nudged(ratio: float, towards: float, reached: Callable[[float], bool]) -> float:
    """Returns the nearest ratio from which timm, which cuts fractions off, computes the length it stands for."""
    while not reached(ratio):
        ratio = math.nextafter(ratio, towards)
    return ratio


TIMM = replace(UNILM, name="timm", matches=matches, describe=describe, write=_write, refusal=_refusal)

FORMATS = (TIMM,)
