"""transformers 4's TFData2VecVision, in ``tf_model.h5`` and in ``model.safetensors`` with TensorFlow's names.

Kernels lie [in, out] as in Flax. Source: transformers 4.57.6 models/data2vec/modeling_tf_data2vec_vision.py.
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .flax import FLAX
from .format import Description, Sighting, SourceFormat, describe_by_config
from .rules import CONV_TRANSPOSE, KEEP, SWAPPED, Rule, Rules
from .segmentation import SegmentationNames

if TYPE_CHECKING:
    from beit_jax.config import BeitConfig

_LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def _tf_names(found: Rule) -> Rule:
    """The names of TensorFlow for a rule of Flax: other words for layers and norms, and the number of the output."""
    norm = "norm" in found.flax.rpartition("/")[0].rpartition("/")[2]
    names = [name.replace("encoder/layer/{i}/", "encoder/layer_._{i}/") for name in found.torch]
    parts = [(name.rpartition("/")[0], name.rpartition("/")[2]) for name in names]
    named = [f"{layer}/{_LEAVES.get(leaf, leaf) if norm else leaf}:0".lstrip("/") for layer, leaf in parts]
    return replace(found, torch=tuple(named))


def _dense_names(found: Rule) -> Rule:
    """The name of TensorFlow for a rule of mmseg's words: a number stays with its word, ``decode_head/fpn_convs.0``."""
    layer = re.sub(r"\.(?!\d)", "/", found.torch[0].rpartition(".")[0]).replace("psp_modules.", "psp_modules/")
    layer = re.sub(r"(?<=^auxiliary_head/)convs\.([1-9]\d*)", lambda match: f"conv_module_{int(match[1]) + 1}", layer)
    parent, _, leaf = found.flax.rpartition("/")
    name = _LEAVES[leaf] if parent.endswith("norm") else leaf
    return replace(found, torch=(f"{layer}/{name}:0",), op=SWAPPED if found.op is CONV_TRANSPOSE else KEEP)


@dataclass(frozen=True)
class _Names(SegmentationNames):
    """mmseg's words with TensorFlow's separators and leaves."""

    def pyramid_rules(self) -> Rules:
        return tuple(map(_dense_names, super().pyramid_rules()))

    def head_rules(self, config: "BeitConfig") -> Rules:
        return tuple(map(_dense_names, super().head_rules(config)))


def _describe(sighting: Sighting) -> Description:
    found = describe_by_config(sighting)
    if found.config.task != "semantic_segmentation" or len(found.config.pool_scales) == 1:
        return found
    told = (
        "every scale of its pooling reads the output of the one before, as TensorFlow's code computed it: models of "
        "PyTorch pool the map itself"
    )
    return replace(found, config=replace(found.config, chained_pooling=True), seen=(*found.seen, told))


TF = SourceFormat(
    name="transformers 4 TensorFlow",
    backbone=tuple(map(_tf_names, FLAX.backbone)),
    heads=tuple(map(_tf_names, FLAX.heads)),
    marker="encoder/layer_._0/attention/attention/query/kernel:0",
    prefixes=("data2vec_vision/", ""),
    segmentation=_Names(),
    derived=re.compile(r"(^|/)relative_position_index:0$"),
    describe=_describe,
)

FORMATS = (TF,)
