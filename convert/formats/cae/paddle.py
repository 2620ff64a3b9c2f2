"""PaddleClas: CAE, which has the original's names, and BEiTv2 and CAE among its foundation models.

Weights of linear layers lie [in, out], as in Flax; that tells these files from the original's, whatever container holds
them. Source: PaddleClas 2.6.0 ppcls/arch/backbone/model_zoo/cae.py and foundation_vit.py.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from beit_jax.errors import BeitJaxError

from .. import unilm
from ..format import Description, Place, Sighting, SourceFormat, describe_by_config
from ..rules import (
    ABSENT,
    FLAX_HEADS,
    FLAX_ONE_QKV,
    FUSED_QKV,
    KEEP,
    LINEAR,
    QUERIES_OF_THREE,
    VALUES_OF_THREE,
    Rule,
    Rules,
    linear,
    rule,
)

if TYPE_CHECKING:
    from ...files.weight_file import TensorInfo

_QKV, _PATCHES = "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"
_OPERATIONS = {LINEAR: KEEP, FUSED_QKV: FLAX_ONE_QKV}


def _turned(found: Rule) -> Rule:
    """The rule of a tensor of the original's for one that lies [in, out]."""
    op = FLAX_HEADS if found.flax.endswith("attention/out_kernel") else _OPERATIONS.get(found.op, found.op)
    return replace(found, op=op)


BACKBONE: Rules = tuple(map(_turned, unilm.BACKBONE))
HEADS: Rules = tuple(map(_turned, unilm.HEADS))

# One bias of queries, keys and values, and none of the patches. Softmax gives the same weights whatever is added to all
# scores of a query, and a bias of the keys adds the same to all of them: query . (key + bias) = query . key + constant.
_ONE_BIAS = "blocks.{i}.attn.qkv.bias"
_ELSEWHERE = ("embeddings/patch_bias", "blocks/attention/q_bias", "blocks/attention/v_bias")
FOUNDATION_BACKBONE: Rules = (
    *(each for each in BACKBONE if each.flax not in _ELSEWHERE),
    Rule((), "embeddings/patch_bias", ABSENT),
    rule(_ONE_BIAS, "blocks/attention/q_bias", QUERIES_OF_THREE),
    rule(_ONE_BIAS, "blocks/attention/v_bias", VALUES_OF_THREE),
)
FOUNDATION_HEADS: Rules = linear("head.fc_head", "classifier", KEEP)


def _lies_turned(tensors: Mapping[str, "TensorInfo"], place: Place, _: object) -> bool:
    """True if the weights of linear layers lie [in, out]: no matrix for three is square, so its shape says it."""
    qkv, patches = tensors[place.before + _QKV].shape, tensors.get(place.before + _PATCHES)
    width = patches.shape[0] if patches is not None and patches.shape else 0
    return len(qkv) == 2 and qkv[0] == width and qkv[1] != width


def _as_torch(sighting: Sighting) -> Sighting:
    """The same file as the original's code would have written it: its names, with the shapes of torch."""
    found = {}
    for name, info in sighting.tensors.items():
        turned = len(info.shape) == 2 and name.endswith(".weight")
        found[name.replace("head.fc_head.", "head.")] = replace(info, shape=info.shape[::-1]) if turned else info
    return replace(sighting, format=unilm.UNILM, tensors=found)


def _describe(sighting: Sighting) -> Description:
    if sighting.content is not None:
        return describe_by_config(sighting)
    found = unilm.describe_by_tensors(_as_torch(sighting))
    told = f"{sighting.format.name}: names and shapes of the tensors; weights of linear layers lie [in, out]"
    return replace(found, seen=(told, *found.seen[1:]))


def _describe_foundation(sighting: Sighting) -> Description:
    names = {name for name in sighting.tensors if re.fullmatch(r"blocks\.0\.(gamma_1|attn\.relative_\w+_table)", name)}
    if len(names) < 2:
        raise BeitJaxError(
            f"{sighting.file}: one of PaddleClas' foundation models without BEiT's position biases and layer scale "
            "(MAE, MoCo v3, EVA, CLIP): a relative of BEiT, which nothing here computes"
        )
    queries = {name.replace(".qkv.bias", ".q_bias"): info for name, info in sighting.tensors.items()}
    found = _describe(replace(sighting, tensors=queries))
    keys = "qkv.bias: its part of the keys left out, which adds the same to all scores of a query: softmax ignores it"
    return replace(found, seen=(*found.seen, keys))


CAE = SourceFormat(
    name="PaddleClas CAE",
    backbone=BACKBONE,
    heads=HEADS,
    marker=_QKV,
    prefixes=("",),
    copies=("teacher_network.", "alignment_encoder."),
    fits=_lies_turned,
    describe=_describe,
)
FOUNDATION = replace(
    CAE,
    name="PaddleClas BEiTv2",
    backbone=FOUNDATION_BACKBONE,
    heads=FOUNDATION_HEADS,
    head_marker="blocks.0.attn.qkv.bias",
    foreign=re.compile(r"^proj$"),  # CLIP's projection, which a classifier has and does not use
    describe=_describe_foundation,
)

FORMATS = (FOUNDATION, CAE)
