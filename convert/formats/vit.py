"""ViTs with one bias of queries, keys and values: DeiT, MAE, DINO, iBOT, EVA-L, ViT, and BEiT-3 as timm names it.

They are BEiT without relative positions and with a bias of the keys. What timm's other ViTs add is refused by its name.
Source: huggingface/pytorch-image-models timm/models/vision_transformer.py, 1.0.31; facebookresearch/{deit, mae, dino}.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import IMAGENET_MEAN, IMAGENET_STD, ImageProcessor, preset
from beit_jax.json_file import Fields

from . import timm, torchscale, unilm
from .format import Description, Place, Sighting, SourceFormat, describe_by_config
from .rules import FLAT, NO_CLASS_ROW, Rules, affine, linear, rule

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

    from ..files.weight_file import TensorInfo

_ELSEWHERE = (
    "blocks/attention/q_bias", "blocks/attention/v_bias", "blocks/attention/bias_table", "shared_bias_table",
    "blocks/gamma_1", "blocks/gamma_2", "embeddings/mask_token",
)  # fmt: skip
BACKBONE: Rules = (
    *(each for each in unilm.BACKBONE if each.flax not in _ELSEWHERE),
    rule("blocks.{i}.attn.qkv.bias", "blocks/attention/qkv_bias", FLAT),
    *affine("blocks.{i}.attn.norm", "blocks/attention/norm"),
    *affine("blocks.{i}.mlp.norm", "blocks/mlp/norm"),
    rule("blocks.{i}.ls1.gamma", "blocks/gamma_1"),
    rule("blocks.{i}.ls2.gamma", "blocks/gamma_2"),
)
HEADS: Rules = linear("head", "classifier")

_B = r"blocks\.0\."
_REFUSED: Mapping[str, str] = {
    r"dist_token|head_dist\..*": "a distillation token and its head, as in DeiT's distilled models",
    r"reg_token|register_tokens|storage_tokens": "register tokens, as in DINOv2's and DINOv3's later models",
    r"norm_pre\..*": "a norm before the first block, as in CLIP",
    r"attn_pool\..*": "pooling by attention, as in SigLIP",
    _B + r"attn\.[qk]_norm\..*": "norms of queries and keys",
    _B + r"attn\.(gate\..*|lambda_\w+|rel_pos\w*|sink\w*)": "attention of another kind",
    _B + r"mlp\.(fc1_g|fc1_x|w1|w12|gate)\..*": "a gated MLP, as in DINOv2's giant model and EVA-02",
    _B + r"(gamma_1|attn\.rel_pos_h)": "what timm's Eva and SAM add: rotary or relative positions",
    r"rope\..*|freqs\w*": "rotary positions",
    r"patch_embed\.(norm|backbone|conv1|proj\.\d+)\..*": "another embedding of patches",
}
"""What ViTs have that no model here computes, by names of tensors."""

_NEEDED: Mapping[str, str] = {
    r"blocks\.\d+\.attn\.proj\.bias": "linear layers without biases",
    r"blocks\.\d+\.norm1\.bias": "norms without biases, as in RMSNorm",
    r"norm\..*|fc_norm\..*": "no norm after the last block",
}
"""What no tensor of some ViTs is called."""

_SETTINGS: Mapping[str, tuple[object, ...]] = {
    "act_layer": ("gelu",),
    "norm_layer": ("layernorm",),
    "pool_include_prefix": (False,),
    "embed_norm_layer": (),
    "attn_layer": ("", "attn"),
    "final_norm": (True,),
}
"""The arguments of timm's ViT of which no tensor tells, and what they may say."""

_OTHER_FUNCTIONS = re.compile(r"quickgelu|rope|_gelu_tanh|naflex")


def _row_of_class(tensors: Mapping[str, "TensorInfo"], place: Place, content: Mapping[str, Any] | None) -> bool:
    """True if the class token has a position: a row more than patches.

    timm's ``config.json`` says how many patches there are. Without it there are as many as in a square: 25 rows are 5x5
    patches and not 4x6 and a class token.
    """
    found = tensors.get(place.before + "pos_embed")
    if found is None or len(found.shape) != 3:
        return True
    rows, kernel = found.shape[1], tensors.get(place.before + "patch_embed.proj.weight")
    patch = kernel.shape[2:] if kernel is not None else ()
    if content is not None and timm.matches(content) and patch and all(patch):
        patches = [math.prod(map(int.__floordiv__, size, patch)) for size in timm.stated_sizes(content)]
        if (known := next((each for each in patches if rows - each in (0, 1)), None)) is not None:
            return rows > known
    return math.isqrt(rows) ** 2 != rows


def _describe(sighting: Sighting) -> Description:
    _refuse(sighting)
    content = sighting.content
    as_beit = _as_beit(sighting)
    if content is None:
        return _of_tensors(as_beit, unilm.describe_by_tensors(as_beit))
    if timm.matches(content):
        _refuse_settings(sighting, content)
        return _of_tensors(as_beit, timm.describe(as_beit), _epsilon(content))
    return describe_by_config(sighting)


def _epsilon(content: Mapping[str, Any]) -> float:
    """The epsilon of timm's norms: only the architecture's name says it, unless an argument names a kind of norm."""
    arguments = content.get("model_args") or {}
    return 1e-5 if str(content["architecture"]).startswith("beit3") and not arguments.get("norm_layer") else 1e-6


def _of_tensors(as_beit: Sighting, found: Description, epsilon: float | None = None) -> Description:
    """The description of the BEiT with the same tensors, and what a ViT has besides.

    Args:
        epsilon: of the norms, where something states it; else norms within the branches, BEiT-3's, say it.
    """
    tensors = as_beit.backbone
    norms = sum(f"blocks.0.{part}.norm.weight" in tensors for part in ("attn", "mlp"))
    if norms == 1:
        raise BeitJaxError(
            f"{as_beit.file}: expected a norm in attention and in the MLP of a block, as in BEiT-3, or none, found one"
        )
    epsilon = epsilon or (1e-5 if norms else 1e-6)
    config = replace(
        found.config,
        use_key_bias=True,
        use_sub_norm=bool(norms),
        layer_norm_eps=epsilon,
        use_mask_token=False,
        add_pooling_layer=found.config.add_pooling_layer or found.config.pooling == "cls",
        position_resize="geometric_linear",
    )
    kind = f"BEiT-3 as timm names it, epsilon {epsilon:g}" if norms else "a ViT: one bias of queries, keys and values"
    images = torchscale.images if norms else _images
    return replace(found, config=config, seen=(*found.seen, kind), assumed=lambda: images(config))


def _images(config: BeitConfig) -> ImageProcessor:
    mean, std = IMAGENET_MEAN, IMAGENET_STD  # the evaluations of DeiT, MAE, DINO and iBOT
    return preset("unilm_eval", config.image_size, mean=mean, std=std, num_channels=config.num_channels)


def _as_beit(sighting: Sighting) -> Sighting:
    """The same file under BEiT's names, with a position for the class token."""
    found = {}
    for name, info in sighting.tensors.items():
        if name == f"{sighting.prefix}pos_embed" and sighting.format is OPEN and len(info.shape) == 3:
            info = replace(info, shape=(info.shape[0], info.shape[1] + 1, info.shape[2]))
        if name != f"{sighting.prefix}mask_token":
            found[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)] = info
    return replace(sighting, tensors=found, format=unilm.UNILM)


def _refuse(sighting: Sighting) -> None:
    """Refuses a ViT that adds something, by its name.

    Raises:
        BeitJaxError: names the tensor.
    """
    names = sighting.backbone
    for pattern, what in _REFUSED.items():
        found = next((name for name in names if re.fullmatch(pattern, name)), None)
        if found is not None:
            raise _stranger(sighting, f"{printable(found)}: {what}")
    for pattern, what in _NEEDED.items():
        if not any(re.fullmatch(pattern, name) for name in names):
            raise _stranger(sighting, what)
    if "cls_token" not in names:
        raise _stranger(sighting, "no cls_token")
    if "pos_embed" not in names:
        raise _stranger(sighting, "no pos_embed: its positions are rotary, or it has none")


def _refuse_settings(sighting: Sighting, content: Mapping[str, Any]) -> None:
    """Refuses what timm's config.json says of a model whose tensors look like a plain ViT's."""
    file = sighting.config_file
    name, told = str(content.get("architecture")), Fields(content, file)
    arguments = Fields({k: v for k, v in content.items() if v is not None}, file).typed("model_args", dict, {})
    if _OTHER_FUNCTIONS.search(name):
        raise _stranger(sighting, f"{printable(name)} of {told.file}")
    for key, allowed in _SETTINGS.items():
        if arguments.get(key) is not None and arguments[key] not in allowed:
            raise _stranger(sighting, f"{key} {printable(arguments[key])} of {told.file}")
    pooling = arguments.get("global_pool", content.get("global_pool"))
    expected = "token" if "norm.weight" in sighting.backbone else "avg"
    if pooling not in (None, "", expected):
        raise _stranger(sighting, f"global_pool {printable(pooling)} of {told.file} with this norm")


def _stranger(sighting: Sighting, what: str) -> BeitJaxError:
    return BeitJaxError(f"{sighting.file}: {what}: a ViT, a relative of BEiT, which nothing here computes")


# --- Export -----------------------------------------------------------------------------------------------------------


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``model.safetensors`` and ``config.json``, for ``timm.create_model("local-dir:...")``."""
    config = checkpoint.config
    # Only the name says the epsilon, and everything else is an argument.
    name = "vit_base_patch16_224" if config.layer_norm_eps == 1e-6 else "beit3_base_patch16_224"
    arguments = {
        "scale_attn_norm": config.use_sub_norm,
        "scale_mlp_norm": config.use_sub_norm,
        "pos_embed": "learn" if config.use_absolute_position_embeddings else "none",
    }
    return timm.write_directory(naming, directory, checkpoint, name, arguments)


VIT = SourceFormat(
    name="ViT, DeiT, MAE, DINO, EVA-L (timm and the originals)",
    backbone=BACKBONE,
    heads=HEADS,
    marker="blocks.0.attn.qkv.bias",
    prefixes=("",),
    # MAE's decoder and the tokens of masked patches, iBOT's too.
    foreign=re.compile(r"^(decoder_\w+(\..*)?|mask_token|masked_embed)$"),
    fits=_row_of_class,
    describe=_describe,
    write=_write,
    refusal=timm.refused_as_vit,
)
OPEN = replace(
    VIT,
    name="ViT without a position of the class token (timm, DeiT III)",
    backbone=tuple(replace(each, op=NO_CLASS_ROW) if each.torch == ("pos_embed",) else each for each in BACKBONE),
    fits=lambda *found: not _row_of_class(*found),
    write=None,
)

FORMATS = (VIT, OPEN)
