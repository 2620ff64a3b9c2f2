"""BEiT-3's vision tower under the original's names: torchscale's encoder, of which half A sees images.

Half B reads texts; it is left out, and so are the heads that read images and texts together.
Source: microsoft/unilm@768a3c8 beit3/modeling_finetune.py; torchscale 0.3.0 model/BEiT3.py.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.config import BeitConfig
from beit_jax.images.processor import HALF, IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, for_channels, preset

from . import unilm
from .format import Description, Sighting, SourceFormat, describe_by_config
from .rules import CONV, FAIRSEQ_POSITIONS, LINEAR, QKV, QKV_FLAT, Rules, affine, linear, rule
from .writing import write_pth

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

_LAYER = "encoder.layers.{i}."
_ATTENTION = _LAYER + "self_attn."
_PROJECTIONS = tuple(f"{_ATTENTION}{name}_proj.A." for name in "qkv")

BACKBONE: Rules = (
    rule("vision_embed.cls_token", "embeddings/cls_token"),
    rule("vision_embed.mask_token", "embeddings/mask_token"),
    rule("encoder.embed_positions.A.weight", "embeddings/position_embeddings", FAIRSEQ_POSITIONS),
    rule("vision_embed.proj.weight", "embeddings/patch_kernel", CONV),
    rule("vision_embed.proj.bias", "embeddings/patch_bias"),
    *affine(_LAYER + "self_attn_layer_norm.A", "blocks/norm1"),
    rule(tuple(f"{name}weight" for name in _PROJECTIONS), "blocks/attention/qkv_kernel", QKV),
    rule(tuple(f"{name}bias" for name in _PROJECTIONS), "blocks/attention/qkv_bias", QKV_FLAT),
    *affine(_ATTENTION + "inner_attn_ln.A", "blocks/attention/norm"),
    rule(_ATTENTION + "out_proj.A.weight", "blocks/attention/out_kernel", LINEAR),
    rule(_ATTENTION + "out_proj.A.bias", "blocks/attention/out_bias"),
    *affine(_LAYER + "final_layer_norm.A", "blocks/norm2"),
    *linear(_LAYER + "ffn.A.fc1", "blocks/mlp/fc1"),
    *affine(_LAYER + "ffn.A.ffn_layernorm", "blocks/mlp/norm"),
    *linear(_LAYER + "ffn.A.fc2", "blocks/mlp/fc2"),
    *affine("encoder.layer_norm.A", "norm"),
)
POOLED: Rules = (*affine("fc_norm", "pooler_norm"), rule("vision_head.weight", "embedding_head/kernel", LINEAR))

# What describes a model, under BEiT's names.
_AS_BEIT = (
    (r"vision_embed\.proj\.", "patch_embed.proj."),
    (r"vision_embed\.", ""),
    (r"encoder\.embed_positions\.A\.weight", "pos_embed"),
    (r"encoder\.layers\.(\d+)\.ffn\.A\.fc", r"blocks.\1.mlp.fc"),
    (r"encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"encoder\.layer_norm\.A\.", "norm."),
)


def _describe(sighting: Sighting) -> Description:
    if sighting.content is not None:
        return describe_by_config(sighting)
    as_beit = _as_beit(sighting)
    found = unilm.describe_by_tensors(as_beit)
    head = sighting.tensors.get("vision_head.weight")
    config = replace(
        found.config,
        layer_norm_eps=1e-5,
        use_key_bias=True,
        use_sub_norm="blocks.0.self_attn.inner_attn_ln.A.weight" in as_beit.backbone,
        add_pooling_layer=found.config.pooling == "cls" or "fc_norm.weight" in sighting.tensors,
        embedding_size=0 if head is None or sighting.hosted else head.shape[0],
    )
    seen = [*found.seen, "the half of BEiT-3 that sees images, epsilon 1e-05"]
    if config.embedding_size:
        seen.append(f"retrieval: the embedding of {config.embedding_size} numbers by vision_head")
    return replace(found, config=config, seen=tuple(seen), assumed=lambda: images(config))


def _as_beit(sighting: Sighting) -> Sighting:
    found = {}
    for name, info in sighting.tensors.items():
        bare = name.removeprefix(sighting.prefix)
        for pattern, new in _AS_BEIT:
            bare = re.sub(f"^{pattern}", new, bare)
        if bare == "pos_embed" and len(info.shape) == 2:
            info = replace(info, shape=(1, info.shape[0] - 2, info.shape[1]))
        if bare not in ("lm_head.weight", "head.weight") or len(info.shape) == 2:
            found[bare] = info
    return replace(sighting, tensors=found, prefix="", format=unilm.UNILM)


def images(config: BeitConfig) -> ImageProcessor:
    """ImageNet's classifiers see the centre of an image, all others the whole (beit3/datasets.py)."""
    if config.task == "image_classification":
        channels, size = config.num_channels, config.image_size
        return preset("unilm_eval", size, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=1.0, num_channels=channels)
    half = for_channels(HALF, config.num_channels)
    return ImageProcessor(config.image_size, "bicubic", mean=half, std=half, num_channels=config.num_channels)


def _refusal(config: BeitConfig) -> str | None:
    needs: dict[str, Any] = {
        "a bias of the keys and norms within its branches": config.use_key_bias and config.use_sub_norm,
        "a position for every patch": config.use_absolute_position_embeddings and config.position_bias == "none",
        "no layer scale": config.layer_scale_init_value <= 0,
        "square images": config.image_size[0] == config.image_size[1] and config.patch_size[0] == config.patch_size[1],
        "heads for classes or embeddings": config.task in ("features", "image_classification"),
        "epsilon 1e-05 and gelu": config.layer_norm_eps == 1e-5 and config.hidden_act == "gelu",
    }
    lacking = [what for what, there in needs.items() if not there]
    return f"BEiT-3 has {' and '.join(lacking)}, and this model is another" if lacking else None


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``checkpoint.pth``, ``{"model": state dict}``, for unilm's beit3."""
    write_pth(directory / "checkpoint.pth", "model", naming.to_torch(checkpoint.config, checkpoint.params), checkpoint)
    return [
        "BEiT-3's code reads tensors only; configuration, labels and images lie in the file for beit-jax",
        "the half of BEiT-3 that reads texts is not in the file: its code starts that half anew",
    ]


TORCHSCALE = SourceFormat(
    name="BEiT-3 (torchscale)",
    backbone=BACKBONE,
    heads=linear("head", "classifier"),
    pooled=POOLED,
    marker="encoder.layers.0.self_attn.q_proj.A.weight",
    prefixes=("beit3.", ""),
    written_prefix="beit3.",
    # Half B, what reads texts, and the heads of both together: answers, reasoning, captions, pre-training.
    foreign=re.compile(
        r"\.B\.|(^|\.)text_embed\.|^(language_head|mlm_head|mim_head|pooler)\.|^logit_scale$|^head\.(\d|norm\d|dense\d)"
    ),
    describe=_describe,
    write=_write,
    refusal=_refusal,
)

FORMATS = (TORCHSCALE,)
