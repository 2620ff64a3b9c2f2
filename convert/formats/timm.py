"""timm's directories: the original's names, and a ``config.json`` that says how images are prepared.

A timm file without this ``config.json`` is read as an original file.
Source: huggingface/pytorch-image-models timm/models/beit.py and timm/models/_hub.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.config import BeitConfig
from beit_jax.errors import printable
from beit_jax.hub import CONFIG
from beit_jax.images.processor import HALF, ImageProcessor, preset
from beit_jax.json_file import Fields, write_json
from beit_jax.version import __version__

from .format import Description, Sighting, SourceFormat
from .unilm import UNILM, describe_by_tensors
from .writing import write_safetensors

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint


def _matches(content: Mapping[str, Any] | None) -> bool:
    return content is not None and "architecture" in content and "model_type" not in content


def _describe(sighting: Sighting) -> Description:
    """The model from the tensors, the images from ``pretrained_cfg``."""
    assert sighting.content is not None  # `_matches`
    file = str(sighting.config_file)
    found = describe_by_tensors(replace(sighting, file=file))
    images = Fields(Fields(sighting.content, file).typed("pretrained_cfg", dict, {}), f"{file}: pretrained_cfg")
    images.choice("interpolation", ("bicubic",), "bicubic")
    images.choice("crop_mode", ("center",), "center")
    mean, std = (tuple(images.content.get(key, HALF)) for key in ("mean", "std"))
    crop_pct = images.typed("crop_pct", float, 0.9)
    processor = preset("timm", found.config.image_size, mean=mean, std=std, crop_pct=crop_pct)
    labels = sighting.content.get("label_names")
    config = replace(found.config, position_resize="geometric_linear")
    if isinstance(labels, list) and len(labels) == config.num_labels:
        config = replace(config, labels=tuple(map(str, labels)))
    seen = (f"timm's {printable(sighting.content['architecture'])}, images by its pretrained_cfg", *found.seen)
    return Description(config, seen, processor)


def _refusal(config: BeitConfig) -> str | None:
    problems = {
        "a masked-image head": config.task == "masked_image_modeling",
        "segmentation": config.task in ("semantic_segmentation", "backbone"),
        "a mask token": config.use_mask_token,
        f"layer norm epsilon {config.layer_norm_eps:g} (timm's is 1e-06)": config.layer_norm_eps != 1e-6,
        f"the activation {config.hidden_act}": config.hidden_act != "gelu",
    }
    found = [what for what, is_there in problems.items() if is_there]
    return f"timm's BEiT has no place for {' and '.join(found)}: export --to hf or original" if found else None


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``model.safetensors`` and ``config.json``, for ``timm.create_model("local-dir:...")``."""
    write_safetensors(directory / "model.safetensors", naming.to_torch(checkpoint.config, checkpoint.params))
    write_json(directory / CONFIG, timm_config(checkpoint.config, checkpoint.processor))
    return []


def timm_config(config: BeitConfig, processor: ImageProcessor) -> dict[str, Any]:
    """Returns timm's ``config.json``: the model to build, its arguments, and how it prepares images."""
    size = {768: "base", 1024: "large"}.get(config.hidden_size, "base")
    arguments: dict[str, Any] = {
        "img_size": list(config.image_size),
        "patch_size": list(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "init_values": config.layer_scale_init_value or None,
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rel_pos_bias": config.has_layer_bias,
        "use_shared_rel_pos_bias": config.has_shared_bias,
        "global_pool": "avg" if config.pooling == "mean" else "token",
    }
    edge = processor.resize if isinstance(processor.resize, int) else config.image_size[0]
    return {
        "architecture": f"beit_{size}_patch16_224",
        "num_classes": config.num_labels,
        "model_args": arguments,
        "label_names": list(config.labels),
        "pretrained_cfg": {
            "num_classes": config.num_labels,
            "input_size": [config.num_channels, *config.image_size],
            "fixed_input_size": True,
            "interpolation": processor.resample,
            "crop_pct": config.image_size[0] / edge,
            "crop_mode": "center" if processor.crop else "squash",
            "mean": processor.mean,
            "std": processor.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "beit_jax": __version__,
    }


TIMM = replace(UNILM, name="timm", matches=_matches, describe=_describe, write=_write, refusal=_refusal)

FORMATS = (TIMM,)
