"""mmsegmentation 1.x: UperNet on BEiT, with the pyramid in a neck of its own.

Source: mmsegmentation 1.2.2 models/backbones/beit.py, necks/featurepyramid.py, configs/_base_/models/upernet_beit.py.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.config import BeitConfig
from beit_jax.images.processor import ImageProcessor, ade20k_processor

from .. import unilm
from ..format import Description, Sighting, SourceFormat
from ..segmentation import SegmentationNames
from ..writing import PTH, SETTINGS
from . import mmseg, settings
from .names import BACKBONE, COPIES, FOREIGN, MARKER, PREFIXES, as_original, labels

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint


def _describe(sighting: Sighting) -> Description:
    if sighting.content is not None:
        return mmseg.describe(sighting)
    original = as_original(sighting, sighting.metadata)
    found = unilm.describe_by_tensors(replace(original, hosted=True))
    config = mmseg.upernet_config(found.config, sighting)
    names = labels(sighting.metadata, config.num_labels) or config.labels
    seen = (f"{sighting.format.name}: UperNet by names and shapes, images as it was trained", *found.seen[1:])
    prepare = partial(ade20k_processor, config.image_size[0])
    return replace(found, config=replace(config, labels=names), seen=seen, processor=prepare)


def _refusal(config: BeitConfig) -> str | None:
    if config.task != "semantic_segmentation":
        return "mmsegmentation has segmentation models only"
    problems = {
        "another position bias than one of each layer": config.position_bias != "per_layer",
        "absolute position embeddings": config.use_absolute_position_embeddings,
        "a mask token": config.use_mask_token,
        "a bias of keys": config.use_key_bias,
        "the norms of BEiT-3": config.use_sub_norm,
        "blocks without layer scale": config.layer_scale_init_value == 0,
        "oblong patches": config.patch_size[0] != config.patch_size[1],
        f"an MLP of {config.intermediate_size}, which is no multiple of {config.hidden_size}": config.intermediate_size
        % config.hidden_size
        != 0,
        "maps that are not normalised behind a last norm": config.pooling == "cls",
        "a head that reads the embeddings": 0 in config.tapped_states,
    }
    found = [what for what, is_there in problems.items() if is_there]
    return f"mmsegmentation's BEiT has no place for {' and '.join(found)}" if found else None


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``checkpoint.pth`` and ``config.py``, for ``mmseg.apis.init_model``."""
    config, processor = checkpoint.config, checkpoint.processor
    use = f'mmseg.apis.init_model("{SETTINGS}", "{PTH}")'
    settings.write(naming, directory, checkpoint, mmseg_settings(config, processor), use)
    if processor.num_channels in (1, 3) and processor.bands is None and processor.crop is None:
        return []
    return [f"mmsegmentation cannot say how images are prepared here ({processor.describe()}): config.py is near"]


def mmseg_settings(config: BeitConfig, processor: ImageProcessor) -> dict[str, Any]:
    """Returns the variables of ``config.py``: the model, and how images are prepared."""
    height, width = config.image_size
    norm = {"type": "BN", "requires_grad": True}
    head = {"num_classes": config.num_labels, "norm_cfg": norm, "align_corners": False}
    sliding = {"mode": "slide", "crop_size": (height, width), "stride": (height * 2 // 3, width * 2 // 3)}
    model: dict[str, Any] = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            **settings.image_numbers(processor),
            "bgr_to_rgb": processor.num_channels == 3,
            "pad_val": 0,
            "seg_pad_val": config.semantic_loss_ignore_index,
            "size": (height, width),
        },
        "pretrained": None,
        "backbone": _backbone(config),
        "neck": {"type": "Feature2Pyramid", "embed_dim": config.hidden_size, "rescales": [4, 2, 1, 0.5],
                 "norm_cfg": norm},
        "decode_head": {
            "type": "UPerHead",
            "in_channels": [config.hidden_size] * 4,
            "in_index": [0, 1, 2, 3],
            "pool_scales": config.pool_scales,
            "channels": config.hidden_size,
            "dropout_ratio": 0.1,
            **head,
            "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        },
        "auxiliary_head": _auxiliary(config, head),
        "train_cfg": {},
        "test_cfg": sliding,
    }  # fmt: skip
    steps = settings.resize(processor)
    if isinstance(processor.resize, int):
        longest = 64 * processor.resize  # the library wants a bound of the long edge
        steps = [{"type": "ResizeShortestEdge", "scale": processor.resize, "max_size": longest}]
    pipeline = [settings.load(processor), *steps, {"type": "PackSegInputs"}]
    return {"default_scope": "mmseg", "model": model, "test_pipeline": pipeline}


def _backbone(config: BeitConfig) -> dict[str, Any]:
    return {
        "type": "BEiT",
        "img_size": config.image_size,
        "patch_size": config.patch_size[0],
        "in_channels": config.num_channels,
        "embed_dims": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size // config.hidden_size,
        "out_indices": tuple(state - 1 for state in config.tapped_states),
        "qv_bias": True,
        "attn_drop_rate": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "norm_cfg": {"type": "LN", "eps": config.layer_norm_eps},
        "act_cfg": settings.activation(config),
        "init_values": config.layer_scale_init_value,
    }


def _auxiliary(config: BeitConfig, head: dict[str, Any]) -> dict[str, Any] | None:
    if not config.has_auxiliary_head:
        return None
    return {
        "type": "FCNHead",
        "in_channels": config.hidden_size,
        "in_index": 2,
        "channels": config.auxiliary_channels,
        "num_convs": config.auxiliary_num_convs,
        "concat_input": config.auxiliary_concat_input,
        "dropout_ratio": 0.1,
        **head,
        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": config.auxiliary_loss_weight},
    }


MMSEG_1 = SourceFormat(
    name="mmsegmentation 1.x",
    backbone=BACKBONE,
    heads=(),
    marker=MARKER,
    prefixes=PREFIXES,
    written_prefix="backbone.",
    segmentation=SegmentationNames(
        pyramid=("neck.upsample_4x.0", "neck.upsample_4x.1", "neck.upsample_4x.3", "neck.upsample_2x.0"),
        classifier="conv_seg",
    ),
    head_marker="decode_head.conv_seg.weight",
    copies=COPIES,
    foreign=FOREIGN,
    describe=_describe,
    write=_write,
    refusal=_refusal,
)

FORMATS = (MMSEG_1,)
