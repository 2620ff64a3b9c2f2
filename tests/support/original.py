"""Files as the original code, timm and transformers 4's Flax saved them, made from a transformers model by renaming.

The renames are written out from the descriptions (microsoft/unilm@768a3c8 beit/modeling_*.py; the conversion scripts of
transformers 4.20), independent of the tables under test.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import serialization

Tensors = dict[str, torch.Tensor]

_BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "lambda_1": "gamma_1",
    "lambda_2": "gamma_2",
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
    "attention.attention.relative_position_bias.relative_position_bias_table": "attn.relative_position_bias_table",
}
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "encoder.relative_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
    "pooler.layernorm.weight": "fc_norm.weight",
    "pooler.layernorm.bias": "fc_norm.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "classifier.weight": "head.weight",
    "classifier.bias": "head.bias",
    "lm_head.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}


def original_names(files: Tensors, *, indices: bool = False) -> Tensors:
    """A state dict under unilm's names, from one under the names transformers writes to files."""
    bare = {re.sub(r"^(beit|data2vec_vision)\.", "", name): tensor for name, tensor in files.items()}
    result: Tensors = {}
    for name, tensor in bare.items():
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if not match:
            result[_TOP[name]] = tensor
            continue
        layer, rest = match.groups()
        if rest == "attention.attention.query.weight":
            parts = [
                bare[f"encoder.layer.{layer}.attention.attention.{part}.weight"] for part in ("query", "key", "value")
            ]
            result[f"blocks.{layer}.attn.qkv.weight"] = torch.cat(parts)
        elif rest not in ("attention.attention.key.weight", "attention.attention.value.weight"):
            stem, _, leaf = rest.rpartition(".")
            renamed = _BLOCK.get(rest) or f"{_BLOCK[stem]}.{leaf}"
            result[f"blocks.{layer}.{renamed}"] = tensor
    if indices:  # as an averaged model holds them: wrong
        for name in [name for name in result if name.endswith("relative_position_bias_table")]:
            result[name.replace("bias_table", "index")] = torch.full((17, 17), 7, dtype=torch.int64)
    return result


def flax_names(files: Tensors) -> dict[str, Any]:
    """transformers 4's FlaxBeit parameters, nested, with its kernels in [in, out] order."""
    tree: dict[str, Any] = {}
    for name, tensor in files.items():
        array = tensor.numpy()
        *parents, leaf = name.split(".")
        if leaf == "weight" and parents[-1].startswith("layernorm"):
            leaf = "scale"
        elif leaf == "weight":
            leaf, array = "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = np.ascontiguousarray(array)
    return tree


def save_msgpack(files: Tensors, path: Path) -> None:
    path.write_bytes(serialization.to_bytes(flax_names(files)))


def training_file(state: Tensors, **entries: Any) -> dict[str, Any]:
    """What unilm's save_model writes: the model among optimizer state, counters and the command's arguments."""
    return {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(1000, 64)}}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="beit_base_patch16_224", drop_path=0.1, output_dir=Path("out")),
        **entries,
    }
