"""mmseg's checkpoints of BEiT with UperNet: the original's names under ``backbone.``, and no configuration of ours.

Source: microsoft/unilm@768a3c8 beit/semantic_segmentation, configs and backbone.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import ade20k_processor
from beit_jax.json_file import Fields

from ..format import Description, Sighting, SourceFormat, describe_by_config
from ..segmentation import SegmentationNames
from ..unilm import BACKBONE, describe_by_tensors, original_notes, position_indices
from ..writing import write_pth

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

TAPS: Mapping[int, tuple[int, ...]] = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}
"""The published models' ``out_indices`` by depth."""
_CLASSIFIER, _AUXILIARY = "decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight"
_AUXILIARY_CONV = r"auxiliary_head\.convs\.(\d+)\.conv\.weight"
_OUT_INDICES = r"out_indices\s*=\s*[\[(]([\d,\s]{1,100})[\])]"


def describe(sighting: Sighting) -> Description:
    """The model by a ``config.json`` beside it, or by the names and shapes of its tensors.

    Raises:
        BeitJaxError: as `describe_by_tensors` and `upernet_config`.
    """
    content = sighting.content
    if content is None:
        found = describe_by_tensors(sighting)
        config = upernet_config(found.config, sighting)
        seen = ("mmseg's UperNet by the names and shapes of the tensors, images as it was trained", *found.seen[1:])
        return replace(found, config=config, seen=seen, processor=partial(ade20k_processor, config.image_size[0]))
    # The model reads the blocks it was trained on, whatever transformers would read for the same indices.
    own = Fields(content, sighting.config_file).typed("beit_jax", dict, {})
    return describe_by_config(replace(sighting, content={**content, "beit_jax": {"feature_taps": "original"} | own}))


def upernet_config(encoder: BeitConfig, sighting: Sighting) -> BeitConfig:
    """The configuration that the tensors imply; class names from the checkpoint's ``meta`` where it has them.

    Raises:
        BeitJaxError: a tensor has another number of axes than mmseg's, or nothing says which blocks feed the head.
    """
    tensors, depth = sighting.tensors, encoder.num_hidden_layers
    for name in (_CLASSIFIER, _AUXILIARY):
        if name in tensors and len(tensors[name].shape) != 4:
            found = list(tensors[name].shape)
            raise BeitJaxError(f"{sighting.file}: {name}: expected a tensor of 4 axes, found {found}; is it mmseg's?")
    taps = _taps(sighting.metadata) or TAPS.get(depth)
    if taps is None:
        raise BeitJaxError(
            f"{sighting.file}: {depth} blocks; which of them feed the head is known for 12 and 24 only: put a "
            'config.json of transformers beside it, with "out_indices" as mmseg counts them'
        )
    auxiliary = tensors.get(_AUXILIARY)
    return replace(
        encoder,
        task="semantic_segmentation",
        labels=_labels(sighting.metadata, tensors[_CLASSIFIER].shape[0]),
        add_pooling_layer=True,
        out_indices=taps,
        feature_taps="original",
        use_auxiliary_head=auxiliary is not None,
        auxiliary_channels=256 if auxiliary is None else auxiliary.shape[1],
        auxiliary_num_convs=max(1, sum(re.fullmatch(_AUXILIARY_CONV, name) is not None for name in tensors)),
        auxiliary_concat_input="auxiliary_head.conv_cat.conv.weight" in tensors,
    )


def _taps(metadata: Mapping[str, object]) -> tuple[int, ...] | None:
    """``out_indices`` of the training's configuration, which mmcv keeps as text, where they stand in it once."""
    meta: Any = metadata.get("meta")
    texts = [meta.get(key) for key in ("config", "cfg")] if isinstance(meta, Mapping) else []
    found = {match for text in texts if isinstance(text, str) for match in re.findall(_OUT_INDICES, text)}
    return tuple(map(int, re.findall(r"\d{1,4}", found.pop()))) if len(found) == 1 else None


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
    write_pth(directory / "checkpoint.pth", "state_dict", tensors, checkpoint)
    return original_notes(checkpoint.config)


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
    describe=describe,
    write=_write,
    refusal=_refusal,
)

FORMATS = (MMSEG,)
