"""mmpretrain 1.x: classifiers, pre-training of BEiT, and BEiT v2 with its patch aggregation.

Source: mmpretrain 1.2.0 models/backbones/beit.py, selfsup/beit.py, necks/beitv2_neck.py, heads/beitv1_head.py.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor, Within

from .. import unilm
from ..format import Description, Sighting, SourceFormat, describe_by_config
from ..rules import Rules, affine, linear, renamed
from ..writing import PTH, SETTINGS
from . import settings
from .names import BACKBONE, COPIES, FOREIGN, INTO_NECK, MARKER, PREFIXES, as_original, labels

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

HEADS: Rules = (*affine("backbone.ln1", "norm"), *linear("head.cls_head", "lm_head"), *linear("head.fc", "classifier"))
HEADS_V2: Rules = (
    *affine("neck.norm", "norm"),
    *linear("head.cls_head", "lm_head"),
    *renamed([each for each in unilm.HEADS if each.flax.startswith("aggregation/blocks/")], INTO_NECK),
)
_OUT_INDICES = r"out_indices\s*=\s*[\[(]\s*(-?\d{1,4})\s*,\s*(-?\d{1,4})\s*,?\s*[\])]"


def _config_text(metadata: Mapping[str, object]) -> str:
    """The training's configuration, which mmengine keeps as the text of a Python file."""
    meta: Any = metadata.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    return text if isinstance(text, str) else ""


def _stated(sighting: Sighting) -> dict[str, object]:
    """What lay beside the weights, and by the original's word the block that BEiT v2's neck reads.

    mmpretrain's own ``early_layers`` counts for the rates of stochastic depth only; the blocks are ``out_indices``.
    """
    found = set(re.findall(_OUT_INDICES, _config_text(sighting.metadata)))
    if len(found) != 1:
        return dict(sighting.metadata)
    first = int(found.pop()[0])
    depth = len({match[1] for name in sighting.backbone if (match := re.match(r"layers\.(\d{1,6})\.", name))})
    return {**sighting.metadata, "early_layers": (first + depth if first < 0 else first) + 1}


def _describe(sighting: Sighting) -> Description:
    if "layers.0.attn.qkv.bias" in sighting.backbone:
        raise BeitJaxError(
            f"{sighting.file}: layers.0.attn.qkv.bias: ViT, DeiT 3 or EVA of mmpretrain, whose keys have a bias: a "
            "relative of BEiT, which is read under timm's names and those of its own code"
        )
    if sighting.content is not None:
        return describe_by_config(sighting)
    original = as_original(sighting, _stated(sighting))
    found = unilm.describe_by_tensors(original)
    norms = "norm.weight" in original.backbone, "fc_norm.weight" in original.backbone
    if found.config.task == "image_classification" and norms[0] == norms[1]:
        both = "ln1 and ln2, a final norm and one of the mean" if norms[0] else "neither ln1 nor ln2"
        raise BeitJaxError(
            f"{sighting.file}: its backbone has {both}; BEiT's classifiers have one of them: train it with final_norm "
            "for the class token, or without for the mean of the patches"
        )
    names = labels(sighting.metadata, found.config.num_labels) or found.config.labels
    seen = (f"{sighting.format.name}: names and shapes of the tensors", *found.seen[1:])
    return replace(found, config=replace(found.config, labels=names), seen=seen)


def _refusal(config: BeitConfig) -> str | None:
    masked = config.task == "masked_image_modeling"
    problems = {
        "the norms of BEiT-3": config.use_sub_norm,
        "an embedding of the pooled output": config.embedding_size > 0,
        "a bias of keys": config.use_key_bias,
        "segmentation": config.task in ("semantic_segmentation", "backbone"),
        "shared and per-layer position biases at once": config.position_bias == "both",
        "a classifier with a mask token": config.task == "image_classification" and config.use_mask_token,
        "pre-training without a mask token": masked and not config.use_mask_token,
        "a second norm before the pre-training head": masked and config.pooling == "cls",
        "data2vec's regression of features": masked and config.model_type == "data2vec-vision",
        "position biases in each layer of the patch aggregation": config.aggregation_layers > 0
        and config.position_bias == "per_layer",
        "a head of the patch aggregation's own": config.own_aggregation_head,
        "aggregation of the last block": config.aggregation_layers > 0
        and config.aggregate_from == config.num_hidden_layers,
        f"the activation {config.hidden_act} in the patch aggregation": config.aggregation_layers > 0
        and config.hidden_act != "gelu",
    }
    found = [what for what, is_there in problems.items() if is_there]
    return f"mmpretrain's BEiT has no place for {' and '.join(found)}" if found else None


def _refusal_v1(config: BeitConfig) -> str | None:
    return _refusal(config) or ("the aggregation is BEiT v2's" if config.aggregation_layers else None)


def _refusal_v2(config: BeitConfig) -> str | None:
    return _refusal(config) or (None if config.aggregation_layers else "only BEiT v2 has a neck")


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``checkpoint.pth`` and ``config.py``, for ``mmpretrain.get_model``."""
    config, processor = checkpoint.config, checkpoint.processor
    use = f'mmpretrain.get_model("{SETTINGS}", pretrained="{PTH}")'
    settings.write(naming, directory, checkpoint, mmpretrain_settings(config, processor), use)
    notes = []
    if config.task == "masked_image_modeling":
        notes.append("to train it on, add mmpretrain's target_generator to config.py: the tokenizer is not written")
    if config.problem_type == "regression":
        notes.append("mmpretrain has no head of values: its predictions are a softmax of them")
    if not _says_images(processor):
        notes.append(f"mmpretrain cannot say how images are prepared here ({processor.describe()}): config.py is near")
    return notes


def mmpretrain_settings(config: BeitConfig, processor: ImageProcessor) -> dict[str, Any]:
    """Returns the variables of ``config.py``: the model, and how images are prepared."""
    numbers = settings.image_numbers(processor) | {"to_rgb": processor.num_channels == 3}
    if config.task in ("image_classification", "features") and not config.use_mask_token:
        numbers = {"type": "ClsDataPreprocessor", **numbers}
        model = {"type": "ImageClassifier", "backbone": _backbone(config), "neck": None, "head": _head(config)}
    else:
        numbers = {"type": "SelfSupDataPreprocessor", **numbers}
        model = {"type": "BEiT", "backbone": _backbone(config), "neck": _neck(config), "head": _head(config)}
    pipeline = [settings.load(processor), *_steps(processor), {"type": "PackInputs"}]
    return {
        "default_scope": "mmpretrain",
        "model": model | {"data_preprocessor": numbers},
        "test_pipeline": pipeline,
        "test_dataloader": {"dataset": {"type": "CustomDataset", "pipeline": pipeline}},
    }


def _arch(config: BeitConfig) -> dict[str, Any]:
    return {
        "embed_dims": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "feedforward_channels": config.intermediate_size,
    }


def _backbone(config: BeitConfig) -> dict[str, Any]:
    masked, last = config.task == "masked_image_modeling", config.num_hidden_layers - 1
    pooled = config.has_pooler and not masked
    kind = {"mean": "avg_featmap", "cls": "cls_token"}[config.pooling] if pooled else "raw"
    one_norm = masked and not config.aggregation_layers  # BEiT v2's stands in its neck
    found: dict[str, Any] = {
        "type": "BEiTPretrainViT" if config.use_mask_token else "BEiTViT",
        "arch": _arch(config),
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_channels": config.num_channels,
        "out_indices": [config.aggregate_from - 1, last] if config.aggregation_layers else [last],
        "drop_rate": config.hidden_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "norm_cfg": {"type": "LN", "eps": config.layer_norm_eps},
        "final_norm": one_norm or (not masked and config.pooling == "cls"),
        "out_type": kind,
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rel_pos_bias": config.has_layer_bias,
        "use_shared_rel_pos_bias": config.has_shared_bias,
        "layer_scale_init_value": config.layer_scale_init_value,
    }
    if config.hidden_act != "gelu":
        found["layer_cfgs"] = {"act_cfg": settings.activation(config)}
    return found


def _neck(config: BeitConfig) -> dict[str, Any] | None:
    if not config.aggregation_layers:
        return None
    return {
        "type": "BEiTV2Neck",
        "num_layers": config.aggregation_layers,
        "early_layers": config.aggregate_from,
        "backbone_arch": _arch(config) | {"depth": config.num_hidden_layers},
        "drop_path_rate": config.drop_path_rate,
        "layer_scale_init_value": config.layer_scale_init_value,
        "norm_cfg": {"type": "LN", "eps": config.layer_norm_eps},
    }


def _head(config: BeitConfig) -> dict[str, Any] | None:
    if config.task == "image_classification" and config.labels:
        several = config.problem_type == "multi_label_classification"
        kind = "MultiLabelLinearClsHead" if several else "LinearClsHead"
        return {"type": kind, "num_classes": config.num_labels, "in_channels": config.hidden_size}
    if config.task != "masked_image_modeling":
        return None
    return {
        "type": "BEiTV2Head" if config.aggregation_layers else "BEiTV1Head",
        "embed_dims": config.hidden_size,
        "num_embed": config.vocab_size,
        "loss": {"type": "CrossEntropyLoss"},
    }


def _steps(processor: ImageProcessor) -> list[dict[str, Any]]:
    """How an image gets its size, as near as mmpretrain can come, see `_says_images`."""
    steps = settings.resize(processor)
    if isinstance(processor.resize, int):
        edge = {"type": "ResizeEdge", "scale": processor.resize, "edge": "short"}
        steps = [edge | {"backend": "pillow", "interpolation": processor.resample}]
    if processor.crop is not None and processor.crop != processor.resize:
        steps.append({"type": "CenterCrop", "crop_size": processor.crop[::-1]})
    return steps


def _says_images(processor: ImageProcessor) -> bool:
    """True if mmpretrain's steps give the same pixels: it rounds a crop's place to even, and pads none."""
    size, crop = processor.resize, processor.crop
    if processor.num_channels not in (1, 3) or processor.bands is not None:
        return False
    if isinstance(size, Within) or (crop is not None and size is None):
        return False
    if isinstance(size, int) and not processor.antialias:
        return False
    if crop is None or crop == size:
        return True
    edges = (size, size) if isinstance(size, int) else size
    assert edges is not None
    spare = [edge - side for edge, side in zip(edges, crop, strict=True)]
    known = isinstance(size, tuple) and all(each % 2 == 0 for each in spare)
    return min(spare) >= 0 and (processor.crop_rounding == "half_even" or known)


MMPRETRAIN = SourceFormat(
    name="mmpretrain",
    backbone=BACKBONE,
    heads=HEADS,
    marker=MARKER,
    prefixes=PREFIXES,
    written_prefix="backbone.",
    copies=COPIES,
    foreign=FOREIGN,
    describe=_describe,
    write=_write,
    refusal=_refusal_v1,
)
MMPRETRAIN_V2 = replace(
    MMPRETRAIN,
    name="mmpretrain BEiT v2",
    heads=HEADS_V2,
    head_marker="neck.norm.weight",
    refusal=_refusal_v2,
)

FORMATS = (MMPRETRAIN_V2, MMPRETRAIN)
