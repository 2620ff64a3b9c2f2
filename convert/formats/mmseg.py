"""mmseg's checkpoints of BEiT with UperNet: the original's names under ``backbone.``, and no configuration of ours.

Source: microsoft/unilm@768a3c8 beit/semantic_segmentation, configs and backbone.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import ade20k_processor

from .format import Description, Sighting, SourceFormat, describe_by_config
from .segmentation import SegmentationNames
from .unilm import BACKBONE, NOT_WRITTEN, position_indices
from .writing import write_pth

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

    from ..files.weight_file import TensorInfo

TAPS: Mapping[int, tuple[int, ...]] = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}
"""The published models' ``out_indices`` by depth."""


def _describe(sighting: Sighting) -> Description:
    if sighting.content is None:
        config = _config(sighting.tensors, sighting.metadata, sighting.file)
        seen = ("mmseg's UperNet by the names and shapes of the tensors, images as it was trained",)
        return Description(config, seen, ade20k_processor(config.image_size[0]))
    found = describe_by_config(sighting)
    if "feature_taps" in sighting.content.get("beit_jax", {}):
        return found
    return replace(found, config=replace(found.config, feature_taps="original"))


def _config(tensors: Mapping[str, "TensorInfo"], metadata: Mapping[str, object], file: str) -> BeitConfig:
    """The configuration that the tensors imply; class names from the checkpoint's ``meta`` where it has them.

    Raises:
        BeitJaxError: tensors are missing that every published file has, or the depth is not a published one.
    """
    table = _shape(tensors, "backbone.blocks.0.attn.relative_position_bias_table", 2, file)
    patch = _shape(tensors, "backbone.patch_embed.proj.weight", 4, file)
    classifier = _shape(tensors, "decode_head.conv_seg.weight", 4, file)
    fc1 = _shape(tensors, "backbone.blocks.0.mlp.fc1.weight", 2, file)
    depth = _count(tensors, r"backbone\.blocks\.(\d+)\.norm1\.weight")
    if depth not in TAPS:
        raise BeitJaxError(
            f"{file}: {depth} blocks; the blocks that feed the head are known for 12 and 24 only: write a config.json"
        )
    side = round(max(table[0] - 3, 0) ** 0.5)
    if side * side + 3 != table[0] or side % 2 == 0:
        raise BeitJaxError(f"{file}: a position bias table of {table[0]} rows, expected that of a square image")
    auxiliary = tensors.get("auxiliary_head.conv_seg.weight")
    return BeitConfig(
        task="semantic_segmentation",
        image_size=((side + 1) // 2 * patch[2], (side + 1) // 2 * patch[3]),
        patch_size=(patch[2], patch[3]),
        num_channels=patch[1],
        hidden_size=patch[0],
        num_hidden_layers=depth,
        num_attention_heads=table[1],
        intermediate_size=fc1[0],
        position_bias="both" if "backbone.rel_pos_bias.relative_position_bias_table" in tensors else "per_layer",
        position_resize="geometric",
        use_absolute_position_embeddings="backbone.pos_embed" in tensors,
        layer_scale_init_value=0.1 if "backbone.blocks.0.gamma_1" in tensors else 0.0,
        labels=_labels(metadata, classifier[0]),
        out_indices=TAPS[depth],
        feature_taps="original",
        use_auxiliary_head=auxiliary is not None,
        auxiliary_channels=256 if auxiliary is None else auxiliary.shape[1],
        auxiliary_num_convs=max(1, _count(tensors, r"auxiliary_head\.convs\.(\d+)\.conv\.weight")),
        auxiliary_concat_input="auxiliary_head.conv_cat.conv.weight" in tensors,
    )


def _shape(tensors: Mapping[str, "TensorInfo"], name: str, axes: int, file: str) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) != axes:
        found = "nothing" if name not in tensors else list(tensors[name].shape)
        raise BeitJaxError(f"{file}: {name}: expected a tensor of {axes} axes, found {found}; is it mmseg's BEiT?")
    return tensors[name].shape


def _count(tensors: Mapping[str, "TensorInfo"], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in tensors)


def _labels(metadata: Mapping[str, object], count: int) -> tuple[str, ...]:
    meta: Any = metadata.get("meta")
    names = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if isinstance(names, list | tuple) and len(names) == count:
        return tuple(printable(name) for name in names)
    return tuple(f"LABEL_{i}" for i in range(count))


def _refusal(config: BeitConfig) -> str | None:
    return None if config.task == "semantic_segmentation" else "mmseg has segmentation models only"


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``checkpoint.pth``, ``{"state_dict": state dict}``, for mmseg."""
    indices = {f"backbone.{name}": index for name, index in position_indices(checkpoint.config).items()}
    tensors = naming.to_torch(checkpoint.config, checkpoint.params) | indices
    write_pth(directory / "checkpoint.pth", "state_dict", tensors)
    return [NOT_WRITTEN]


MMSEG = SourceFormat(
    name="mmseg",
    backbone=BACKBONE,
    heads=(),
    marker="blocks.0.attn.qkv.weight",
    prefixes=("backbone.",),
    segmentation=SegmentationNames(
        pyramid=("backbone.fpn1.0", "backbone.fpn1.1", "backbone.fpn1.3", "backbone.fpn2.0"), classifier="conv_seg"
    ),
    head_marker="decode_head.conv_seg.weight",
    describe=_describe,
    write=_write,
    refusal=_refusal,
)

FORMATS = (MMSEG,)
