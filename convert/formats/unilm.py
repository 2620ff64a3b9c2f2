"""The original code: unilm's BEiT, BEiT v2 and DiT, and data2vec_vision. timm has the same names.

Source: microsoft/unilm@768a3c8 beit/modeling_pretrain.py and modeling_finetune.py;
facebookresearch/data2vec_vision@af9a363 beit/modeling_cyclical.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.attention import relative_position_index

from .format import Description, Sighting, SourceFormat, describe_by_config
from .rules import CONV, FLAT, FUSED_QKV, LINEAR, Rules, affine, linear, rule
from .writing import write_pth

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

    from ..files.weight_file import TensorInfo

HEAD_DIM = 64
"""Channels of an attention head in every published model; they say how many heads there are where no table does."""

BACKBONE: Rules = (
    rule("cls_token", "embeddings/cls_token"),
    rule("mask_token", "embeddings/mask_token"),
    rule("pos_embed", "embeddings/position_embeddings"),
    rule("patch_embed.proj.weight", "embeddings/patch_kernel", CONV),
    rule("patch_embed.proj.bias", "embeddings/patch_bias"),
    rule("rel_pos_bias.relative_position_bias_table", "shared_bias_table"),
    *affine("blocks.{i}.norm1", "blocks/norm1"),
    rule("blocks.{i}.attn.qkv.weight", "blocks/attention/qkv_kernel", FUSED_QKV),
    rule("blocks.{i}.attn.q_bias", "blocks/attention/q_bias", FLAT),
    rule("blocks.{i}.attn.v_bias", "blocks/attention/v_bias", FLAT),
    rule("blocks.{i}.attn.relative_position_bias_table", "blocks/attention/bias_table"),
    rule("blocks.{i}.attn.proj.weight", "blocks/attention/out_kernel", LINEAR),
    rule("blocks.{i}.attn.proj.bias", "blocks/attention/out_bias"),
    rule("blocks.{i}.gamma_1", "blocks/gamma_1"),
    *affine("blocks.{i}.norm2", "blocks/norm2"),
    *linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
    *linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
    rule("blocks.{i}.gamma_2", "blocks/gamma_2"),
    *affine("norm", "norm"),
    *affine("fc_norm", "pooler_norm"),
)
HEADS: Rules = (
    *affine("norm", "norm"),
    *linear("lm_head", "lm_head"),
    *linear("head", "classifier"),
)


def describe_by_tensors(sighting: Sighting) -> Description:
    """Describes the model that names and shapes leave no doubt about; says what they do not tell and was assumed.

    Raises:
        BeitJaxError: a tensor is missing without which the model cannot be recognised; the number of heads or the grid
            of patches is open.
    """
    tensors, every, file = sighting.backbone, sighting.tensors, sighting.file

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise BeitJaxError(f"{file}: no tensor {name}; without it the model cannot be recognised: pass --variant")
        return tensors[name].shape

    seen = []
    hidden, channels, *patch = shape("patch_embed.proj.weight")
    shared, layer = "rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table"
    table = next((tensors[name].shape for name in (shared, layer) if name in tensors), None)
    heads = table[1] if table else hidden // HEAD_DIM
    if not table and hidden % HEAD_DIM:
        raise BeitJaxError(f"{file}: nothing in it tells the number of attention heads; pass --variant")
    if not table:
        seen.append(f"{heads} heads: of {HEAD_DIM} channels, as in every published model")
    grid = _grid(table, tensors, file)
    if grid is None:
        seen.append("image size 224: nothing in the file says it")
    side = grid or 224 // patch[0]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    task, labels, vocabulary = "features", 0, 8192
    if "lm_head.weight" in every:
        task, vocabulary = "masked_image_modeling", every["lm_head.weight"].shape[0]
        seen.append(f"masked image modelling: lm_head of {vocabulary}")
    elif "head.weight" in every:
        task, labels = "image_classification", every["head.weight"].shape[0]
        seen.append(f"classification: head of {labels}")
    regression = task == "masked_image_modeling" and vocabulary == hidden
    if regression:
        seen.append("data2vec: its head predicts features of the encoder's own width")
    gamma = "blocks.0.gamma_1" in tensors
    config = BeitConfig(
        model_type="data2vec-vision" if regression else "beit",
        task=task,  # type: ignore[arg-type]
        image_size=(side * patch[0], side * patch[1]),
        patch_size=(patch[0], patch[1]),
        num_channels=channels,
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=shape("blocks.0.mlp.fc1.weight")[0],
        layer_norm_eps=1e-6,
        pooling="cls" if "norm.weight" in tensors and task != "masked_image_modeling" else "mean",
        add_pooling_layer="fc_norm.weight" in tensors,
        position_bias={(0, 0): "none", (1, 0): "shared", (0, 1): "per_layer", (1, 1): "both"}[  # type: ignore[arg-type]
            shared in tensors, layer in tensors
        ],
        position_resize="geometric",
        use_absolute_position_embeddings="pos_embed" in tensors,
        use_mask_token="mask_token" in tensors,
        # Only an initial value, from which trained weights have moved away: that of the published models of this size.
        layer_scale_init_value=(0.1 if hidden <= 768 else 1e-5) if gamma else 0.0,
        vocab_size=vocabulary,
        labels=tuple(f"LABEL_{i}" for i in range(labels)),
    )
    return Description(config, ("names and shapes of the tensors", *seen), image_preset="unilm_eval")


def _grid(table: tuple[int, ...] | None, tensors: Mapping[str, "TensorInfo"], file: str) -> int | None:
    """Patches a side, from the rows of a bias table or the number of absolute positions; None if there is neither."""
    if table:
        side = ((table[0] - 3) ** 0.5 + 1) / 2
    elif "pos_embed" in tensors:
        side = (tensors["pos_embed"].shape[1] - 1) ** 0.5
    else:
        return None
    if not side.is_integer():
        raise BeitJaxError(f"{file}: its positions are not of a square grid; pass --variant, or give it a config.json")
    return int(side)


def _describe(sighting: Sighting) -> Description:
    return describe_by_tensors(sighting) if sighting.content is None else describe_by_config(sighting)


def position_indices(config: BeitConfig) -> dict[str, np.ndarray]:
    """Returns the index buffers that the original's state dicts hold, recomputed."""
    index = relative_position_index(config.grid).astype(np.int64)
    shared = {"rel_pos_bias.relative_position_index": index} if config.has_shared_bias else {}
    layers = range(config.num_hidden_layers if config.has_layer_bias else 0)
    return shared | {f"blocks.{i}.attn.relative_position_index": index for i in layers}


NOT_WRITTEN = "images and labels have no place in this layout; see the checkpoint it was exported from"


def _write(naming: SourceFormat, directory: Path, checkpoint: "NativeCheckpoint") -> list[str]:
    """``checkpoint.pth``, ``{"model": state dict}``, for unilm's scripts."""
    tensors = naming.to_torch(checkpoint.config, checkpoint.params) | position_indices(checkpoint.config)
    write_pth(directory / "checkpoint.pth", "model", tensors)
    return [NOT_WRITTEN]


UNILM = SourceFormat(
    name="original (unilm, data2vec_vision) and timm",
    backbone=BACKBONE,
    heads=HEADS,
    marker="blocks.0.attn.qkv.weight",
    prefixes=("",),
    hosts=("pretrained.model.", "backbone.", "encoder."),
    # BEiT v2's second prediction, from an intermediate layer (beit2/modeling_pretrain.py).
    foreign=re.compile(r"^cls_pt_(layers|norm|lm_head)\."),
    describe=_describe,
    write=_write,
)

FORMATS = (UNILM,)
