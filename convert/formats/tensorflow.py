"""TensorFlow: transformers 4's TFData2VecVision, and the BEiT of keras_cv_attention_models.

Kernels lie [in, out] as in Flax. Source: transformers 4.57.6 models/data2vec/modeling_tf_data2vec_vision.py;
keras_cv_attention_models 1.4.3 beit/beit.py.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from . import unilm
from .flax import FLAX
from .format import Description, Sighting, SourceFormat, describe_by_config
from .rules import FLAT, FLAX_HEADS, FLAX_ONE_QKV, LINEAR, Rule, Rules, rule

if TYPE_CHECKING:
    from ..files.weight_file import TensorInfo

_LEAVES = {"scale": "gamma", "bias": "beta"}


def _tf_names(found: Rule) -> Rule:
    """The names of TensorFlow for a rule of Flax: other words for layers and norms, and the number of the output."""
    norm = "norm" in found.flax.rpartition("/")[0].rpartition("/")[2]
    names = [name.replace("encoder/layer/{i}/", "encoder/layer_._{i}/") for name in found.torch]
    parts = [(name.rpartition("/")[0], name.rpartition("/")[2]) for name in names]
    named = [f"{layer}/{_LEAVES.get(leaf, leaf) if norm else leaf}:0".lstrip("/") for layer, leaf in parts]
    return replace(found, torch=tuple(named))


TF = SourceFormat(
    name="transformers 4 TensorFlow",
    backbone=tuple(map(_tf_names, FLAX.backbone)),
    heads=tuple(map(_tf_names, FLAX.heads)),
    marker="encoder/layer_._0/attention/attention/query/kernel:0",
    prefixes=("data2vec_vision/", ""),
    derived=re.compile(r"(^|/)relative_position_index:0$"),
)

_B = "block{i}_"


def _layer(theirs: str, flax: str, *leaves: str) -> Rules:
    """Rules of a layer whose leaves are named in Keras and here: ``gamma=scale``."""
    pairs = [leaf.split("=") for leaf in leaves]
    return tuple(rule(f"{theirs}/{keras}:0", f"{flax}/{ours}") for keras, ours in pairs)


_NORM, _DENSE = ("gamma=scale", "beta=bias"), ("kernel=kernel", "bias=bias")
KECAM_BACKBONE: Rules = (
    rule("cls_token/tokens:0", "embeddings/cls_token"),
    rule("stem_conv/kernel:0", "embeddings/patch_kernel"),
    rule("stem_conv/bias:0", "embeddings/patch_bias"),
    *_layer(_B + "attn_ln", "blocks/norm1", *_NORM),
    rule(_B + "attn_qkv/kernel:0", "blocks/attention/qkv_kernel", FLAX_ONE_QKV),
    rule(_B + "attn_query_bias/bias:0", "blocks/attention/q_bias", FLAT),
    rule(_B + "attn_value_bias/bias:0", "blocks/attention/v_bias", FLAT),
    rule(_B + "attn_pos_emb/positional_embedding:0", "blocks/attention/bias_table", LINEAR),
    rule(_B + "attn_output/kernel:0", "blocks/attention/out_kernel", FLAX_HEADS),
    rule(_B + "attn_output/bias:0", "blocks/attention/out_bias"),
    rule(_B + "attn_gamma/weight:0", "blocks/gamma_1"),
    *_layer(_B + "mlp_ln", "blocks/norm2", *_NORM),
    *_layer(_B + "mlp_dense_1", "blocks/mlp/fc1", *_DENSE),
    *_layer(_B + "mlp_dense_2", "blocks/mlp/fc2", *_DENSE),
    rule(_B + "mlp_gamma/weight:0", "blocks/gamma_2"),
    *_layer("out_ln", "pooler_norm", *_NORM),
)
KECAM_HEADS: Rules = _layer("predictions", "classifier", *_DENSE)

# The original's name of every leaf, by which its page describes a model.
_ORIGINAL: Mapping[str, str] = {each.flax: each.torch[0] for each in (*unilm.BACKBONE, *unilm.HEADS)}
_PATTERNS = tuple(
    (re.compile(re.escape(each.torch[0]).replace(r"\{i\}", r"(\d{1,6})")), _ORIGINAL[each.flax])
    for each in (*KECAM_BACKBONE, *KECAM_HEADS)
)


def _as_torch(tensors: Mapping[str, "TensorInfo"]) -> dict[str, "TensorInfo"]:
    """The tensors under the original's names, with the shapes that they have in torch."""
    found = {}
    for name, info in tensors.items():
        for pattern, original in _PATTERNS:
            if match := pattern.fullmatch(name):
                shape = info.shape
                turned = (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1] if len(shape) == 2 else shape
                found[original.replace("{i}", match[1] if match.groups() else "")] = replace(info, shape=turned)
    return found


def _describe_kecam(sighting: Sighting) -> Description:
    if sighting.content is not None:
        return describe_by_config(sighting)
    found = unilm.describe_by_tensors(replace(sighting, format=unilm.UNILM, tensors=_as_torch(sighting.tensors)))
    told = "keras_cv_attention_models: names and shapes of the tensors"
    softmax = "its model ends with a softmax, which is no part of the weights: logits are computed here"
    return replace(found, seen=(told, *found.seen[1:], *[softmax] * (found.config.task == "image_classification")))


KECAM = SourceFormat(
    name="keras_cv_attention_models",
    backbone=KECAM_BACKBONE,
    heads=KECAM_HEADS,
    marker="block0_attn_qkv/kernel:0",
    prefixes=("",),
    describe=_describe_kecam,
)

FORMATS = (TF, KECAM)
