"""transformers: names in files, which are those of transformers 4, and names in memory of transformers 5.

Source: transformers 5.23 models/beit, models/data2vec and conversion_mapping.py ("BeitModel" and "ViTModel").
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR
from beit_jax.images.processor import ImageProcessor
from beit_jax.images.scaling import BY_TYPE
from beit_jax.json_file import write_json

from .format import TRANSPOSED, Description, Sighting, SourceFormat, describe_by_config, is_transposed
from .rules import CONV, FLAT, LINEAR, QKV, Rules, affine, linear, renamed, rule
from .segmentation import SegmentationNames
from .writing import write_safetensors

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

_TABLE = "relative_position_bias.relative_position_bias_table"
_LAYER = "encoder.layer.{i}."
_ATTENTION = _LAYER + "attention.attention."

BACKBONE: Rules = (
    rule("embeddings.cls_token", "embeddings/cls_token"),
    rule("embeddings.mask_token", "embeddings/mask_token"),
    rule("embeddings.position_embeddings", "embeddings/position_embeddings"),
    rule("embeddings.patch_embeddings.projection.weight", "embeddings/patch_kernel", CONV),
    rule("embeddings.patch_embeddings.projection.bias", "embeddings/patch_bias"),
    rule(f"encoder.{_TABLE}", "shared_bias_table"),
    *affine(_LAYER + "layernorm_before", "blocks/norm1"),
    rule(
        (_ATTENTION + "query.weight", _ATTENTION + "key.weight", _ATTENTION + "value.weight"),
        "blocks/attention/qkv_kernel",
        QKV,
    ),
    rule(_ATTENTION + "query.bias", "blocks/attention/q_bias", FLAT),
    rule(_ATTENTION + "value.bias", "blocks/attention/v_bias", FLAT),
    rule(_ATTENTION + _TABLE, "blocks/attention/bias_table"),
    rule(_LAYER + "attention.output.dense.weight", "blocks/attention/out_kernel", LINEAR),
    rule(_LAYER + "attention.output.dense.bias", "blocks/attention/out_bias"),
    rule(_LAYER + "lambda_1", "blocks/gamma_1"),
    *affine(_LAYER + "layernorm_after", "blocks/norm2"),
    *linear(_LAYER + "intermediate.dense", "blocks/mlp/fc1"),
    *linear(_LAYER + "output.dense", "blocks/mlp/fc2"),
    rule(_LAYER + "lambda_2", "blocks/gamma_2"),
    *affine("layernorm", "norm"),
    *affine("pooler.layernorm", "pooler_norm"),
)
HEADS: Rules = (
    *affine("layernorm", "norm"),
    *linear("lm_head", "lm_head"),
    *linear("classifier", "classifier"),
)

# transformers 5 renamed BEiT's tensors in memory (``model.state_dict()``); Data2VecVision kept the old names.
_RENAMES = (
    (_ATTENTION + _TABLE, f"layers.{{i}}.{_TABLE}"),
    (f"encoder.{_TABLE}", "shared_position_bias.relative_position_bias_table"),
    (_ATTENTION + "query.", "layers.{i}.attention.q_proj."),
    (_ATTENTION + "key.", "layers.{i}.attention.k_proj."),
    (_ATTENTION + "value.", "layers.{i}.attention.v_proj."),
    (_LAYER + "attention.output.dense.", "layers.{i}.attention.o_proj."),
    (_LAYER + "intermediate.dense.", "layers.{i}.mlp.fc1."),
    (_LAYER + "output.dense.", "layers.{i}.mlp.fc2."),
    (_LAYER, "layers.{i}."),
)
_SEGMENTATION = SegmentationNames(
    conv="convolution", norm="normalization", bottleneck="psp_bottleneck", pool="psp_modules.blocks.{k}.conv"
)
_PYRAMID = ("fpn.fpn1.conv_transpose1", "fpn.fpn1.normalization", "fpn.fpn1.conv_transpose2", "fpn.fpn2")


_ELSEWHERE = (None, "vit", "vit_mae", "dinov2", "vit_msn")
"""Kinds of ViTs of which there are files under other names that are read."""

_MORE = {
    "embeddings.distillation_token": "a distillation token",
    "embeddings.register_tokens": "register tokens",
    "encoder.layer.0.mlp.weights_in.weight": "a gated MLP",
    "layers.0.mlp.weights_in.weight": "a gated MLP",
}
_KEY_BIASES = ("encoder.layer.0.attention.attention.key.bias", "layers.0.attention.k_proj.bias")

EXCHANGED = (
    "transformers 5's from_pretrained exchanges the encoder's norm and the head's norm of a pre-training model with "
    "use_mean_pooling false; docs/converting.md, section 6, says how to load it right"
)


def _describe(sighting: Sighting) -> Description:
    biased = [name for name in _KEY_BIASES if name in sighting.backbone]
    if biased:
        stated = (sighting.content or {}).get("model_type")
        kind = "a ViT" if stated is None else printable(stated)
        more = [what for name, what in _MORE.items() if name in sighting.backbone]
        lacks = [] if "embeddings.cls_token" in sighting.backbone else ["no class token"]
        if more or lacks or stated not in _ELSEWHERE:
            has = f", with {' and '.join((*more, *lacks))}" if more or lacks else ""
            raise BeitJaxError(
                f"{sighting.file}: {biased[0]}: {kind} as transformers names it{has}: a relative of BEiT, which "
                "nothing here computes"
            )
        raise BeitJaxError(
            f"{sighting.file}: {biased[0]}: {kind} as transformers names it, whose keys have a bias; ViT, MAE and "
            "DINOv2 are read under timm's names and those of their own code: give that file of it"
        )
    found = describe_by_config(sighting)
    return replace(found, seen=(*found.seen, TRANSPOSED)) if is_transposed(found.config) else found


def _refusal(config: BeitConfig) -> str | None:
    more = {
        "bias of the keys": config.use_key_bias,
        "norms within its branches": config.use_sub_norm,
        "embedding of images": config.embedding_size > 0,
    }
    if any(more.values()):
        return f"transformers' BEiT has no {' and no '.join(what for what, is_there in more.items() if is_there)}"
    (height, width), patch = config.image_size, config.patch_size
    if config.use_absolute_position_embeddings and height != width:
        return "transformers computes absolute position embeddings of square images only"
    if config.position_bias != "none" and patch[0] != patch[1]:
        return "transformers computes position biases of square patches only"
    if config.aggregation_layers:
        return "transformers has no patch aggregation, the extra blocks that convert --aggregate-from 0 leaves out"
    if config.model_type == "data2vec-vision" and config.task == "masked_image_modeling":
        return "transformers has no Data2VecVision model with a pre-training head"
    return None


def _refusal_data2vec(config: BeitConfig) -> str | None:
    if config.model_type == "data2vec-vision" and config.task == "semantic_segmentation":
        return _refusal(config)
    return "only Data2VecVision's segmentation models have these names"


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``model.safetensors``, ``config.json`` and ``preprocessor_config.json``, for `from_pretrained`."""
    write_safetensors(directory / "model.safetensors", naming.to_torch(checkpoint.config, checkpoint.params))
    write_json(directory / CONFIG, checkpoint.config.to_hf())
    write_json(directory / PROCESSOR, checkpoint.processor.to_hf())
    config = checkpoint.config
    exchanged = config.task == "masked_image_modeling" and config.pooling == "cls"
    return [EXCHANGED] * exchanged + [TRANSPOSED] * is_transposed(config) + _image_notes(checkpoint.processor)


def _image_notes(processor: ImageProcessor) -> list[str]:
    """What transformers computes otherwise of images that are not 8-bit RGB or grey."""
    notes = []
    if processor.bands is not None:
        notes.append(f"transformers selects no bands: give it arrays of bands {' '.join(map(str, processor.bands))}")
    if processor.num_channels not in (1, 3) and processor.rescale_factor == BY_TYPE:
        notes.append("transformers multiplies values of every type by 1/255; here that is the scale of 8 bits alone")
    return notes


HF = SourceFormat(
    name="transformers",
    backbone=BACKBONE,
    heads=HEADS,
    marker="encoder.layer.0.attention.attention.query.weight",
    prefixes=("beit.", "data2vec_vision.", ""),
    # transformers 5 writes a model that gives feature maps without prefix, except for this norm.
    unused_norm_prefix="beit.",
    hosts=("backbone.",),
    foreign=re.compile(r"^fpn[1-4]?\."),  # the pyramid of a backbone in another model, of which the encoder is taken
    describe=_describe,
    write=_write,
    refusal=_refusal,
)
# The heads of Data2VecVision follow BEiT's since transformers 5, but nothing renames their tensors when it saves them.
HF5_DATA2VEC = replace(
    HF,
    name="transformers 5 (Data2VecVision segmentation)",
    hosts=(),
    segmentation=_SEGMENTATION,
    head_marker="decode_head.psp_bottleneck.convolution.weight",
    refusal=_refusal_data2vec,
)
HF5 = replace(
    HF,
    name="transformers 5 in memory",
    backbone=renamed(BACKBONE, _RENAMES),
    marker="layers.0.attention.q_proj.weight",
    segmentation=replace(_SEGMENTATION, pyramid=_PYRAMID),
    write=None,
)

FORMATS = (HF5_DATA2VEC, HF, HF5)
