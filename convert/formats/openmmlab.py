"""Open-MMLab 2.x: mmpretrain's BEiT (classes, pre-training, BEiT v2) and mmsegmentation 1.x' UperNet on it.

Source: mmpretrain 1.2.0 models/backbones/beit.py, selfsup/beit.py, necks/beitv2_neck.py; mmsegmentation 1.2.2
models/necks/featurepyramid.py. The names of a model become the original's, and the original's page describes it.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import ade20k_processor

from . import mmseg, unilm
from .format import Description, Sighting, SourceFormat, describe_by_config
from .rules import Rules, affine, linear, renamed
from .segmentation import SegmentationNames

_RENAMES = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.{i}.norm1.", "layers.{i}.ln1."),
    ("blocks.{i}.norm2.", "layers.{i}.ln2."),
    ("blocks.{i}.mlp.fc1.", "layers.{i}.ffn.layers.0.0."),
    ("blocks.{i}.mlp.fc2.", "layers.{i}.ffn.layers.1."),
    ("blocks.{i}.", "layers.{i}."),
    ("fc_norm.", "ln2."),
    ("norm.", "ln1."),
)
_AGGREGATION = "neck.patch_aggregation.{i}."
_INTO_NECK = tuple(
    (old.replace("blocks.{i}.", "cls_pt_layers.{i}."), new.replace("layers.{i}.", _AGGREGATION, 1))
    for old, new in _RENAMES
    if old.startswith("blocks.")
)

BACKBONE: Rules = renamed(unilm.BACKBONE, _RENAMES)
HEADS: Rules = (*affine("backbone.ln1", "norm"), *linear("head.cls_head", "lm_head"), *linear("head.fc", "classifier"))
HEADS_V2: Rules = (
    *affine("neck.norm", "norm"),
    *linear("head.cls_head", "lm_head"),
    *renamed([each for each in unilm.HEADS if each.flax.startswith("aggregation/")], _INTO_NECK),
)
_ORIGINAL = {"head.fc": "head", "head.cls_head": "lm_head", "neck.norm": "norm"}
_OUT_INDICES = r"out_indices\s*=\s*[\[(]\s*(-?\d{1,4})\s*,\s*(-?\d{1,4})\s*,?\s*[\])]"


def _to_original(name: str) -> str:
    """The name that the original's code gives a tensor of a model without what stands before its backbone."""
    for theirs, original in _ORIGINAL.items():
        if name.startswith(f"{theirs}."):
            return original + name.removeprefix(theirs)
    for old, new in (*_INTO_NECK, *_RENAMES):
        pattern = re.escape(new).replace(r"\{i\}", r"(\d{1,6})")
        if match := re.match(pattern, name):
            return old.replace("{i}", match[1] if match.groups() else "") + name[match.end() :]
    return name


def _as_original(sighting: Sighting) -> Sighting:
    """The same file under the original's names."""
    bare = {name.removeprefix(sighting.prefix): info for name, info in sighting.tensors.items()}
    tensors = {_to_original(name): info for name, info in bare.items()}
    return replace(sighting, format=unilm.UNILM, prefix="", tensors=tensors, metadata=_stated(sighting))


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
    if sighting.content is not None:
        return describe_by_config(sighting)
    original = _as_original(sighting)
    found = unilm.describe_by_tensors(original)
    norms = "norm.weight" in original.backbone, "fc_norm.weight" in original.backbone
    if found.config.task == "image_classification" and norms[0] == norms[1]:
        both = "ln1 and ln2, a final norm and one of the mean" if norms[0] else "neither ln1 nor ln2"
        raise BeitJaxError(
            f"{sighting.file}: its backbone has {both}; BEiT's classifiers have one of them: train it with final_norm "
            "for the class token, or without for the mean of the patches"
        )
    labels = _labels(sighting.metadata, found.config.num_labels) or found.config.labels
    seen = (f"{sighting.format.name}: names and shapes of the tensors", *found.seen[1:])
    return replace(found, config=replace(found.config, labels=labels), seen=seen)


def _describe_segmentation(sighting: Sighting) -> Description:
    if sighting.content is not None:
        return mmseg.describe(sighting)
    original = _as_original(sighting)
    found = unilm.describe_by_tensors(replace(original, hosted=True))
    config = mmseg.upernet_config(found.config, sighting)
    labels = _labels(sighting.metadata, config.num_labels) or config.labels
    seen = (f"{sighting.format.name}: UperNet by names and shapes, images as it was trained", *found.seen[1:])
    prepare = partial(ade20k_processor, config.image_size[0])
    return replace(found, config=replace(config, labels=labels), seen=seen, processor=prepare)


def _labels(metadata: Mapping[str, object], count: int) -> tuple[str, ...]:
    """The names of the classes, as mmengine keeps them of its data set; nothing where they are not there."""
    meta: Any = metadata.get("meta")
    data = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    names = (data.get("classes") or data.get("CLASSES")) if isinstance(data, Mapping) else None
    if isinstance(names, list | tuple) and count and len(names) == count:
        return tuple(printable(name) for name in names)
    return ()


MMPRETRAIN = SourceFormat(
    name="mmpretrain",
    backbone=BACKBONE,
    heads=HEADS,
    marker="layers.0.ffn.layers.0.0.weight",
    prefixes=("backbone.", ""),
    copies=("target_generator.encoder.",),  # BEiT v2's tokenizer, of the same blocks
    foreign=re.compile(r"^(target_generator|data_preprocessor)\."),
    describe=_describe,
)
MMPRETRAIN_V2 = replace(MMPRETRAIN, name="mmpretrain BEiT v2", heads=HEADS_V2, head_marker="neck.norm.weight")
MMSEG_1 = replace(
    MMPRETRAIN,
    name="mmsegmentation 1.x",
    heads=(),
    segmentation=SegmentationNames(
        pyramid=("neck.upsample_4x.0", "neck.upsample_4x.1", "neck.upsample_4x.3", "neck.upsample_2x.0"),
        classifier="conv_seg",
    ),
    head_marker="decode_head.conv_seg.weight",
    describe=_describe_segmentation,
)

FORMATS = (MMSEG_1, MMPRETRAIN_V2, MMPRETRAIN)
