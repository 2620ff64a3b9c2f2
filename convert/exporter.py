"""Flax parameters become PyTorch checkpoints, through the same tables as the import."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from beit_jax.atomic import check_destination, new_directory
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.hub import CONFIG, PROCESSOR
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.position import relative_position_index
from beit_jax.version import __version__
from beit_jax.weights.native import NativeCheckpoint, check_replaceable

from .formats.rules import export as dump
from .formats.tables import MMSEG, UNILM, Naming, own_naming

_RUNNING_MEAN, _BATCHES = ".running_mean", ".num_batches_tracked"

Layout = Literal["hf", "original", "timm"]


def to_torch(
    config: BeitConfig, params: Mapping[str, np.ndarray], naming: Naming | None = None
) -> dict[str, np.ndarray]:
    """The flat parameters of a model as torch tensors by name, contiguous, in the dtype they have.

    What comes out of a converted checkpoint equals the tensors it was converted from bit for bit, except float16 and
    float64 sources, which are float32 here, and the counters of batches beside running statistics, which nothing reads
    and which are zero here.

    Args:
        naming: by default the one transformers writes for the model.
    """
    naming = own_naming(config) if naming is None else naming
    rules = [rule for rule in naming.rules(config, naming.own_prefix(config)) if rule.flax in params]
    tensors = dump(rules, params)
    layers = [name.removesuffix(_RUNNING_MEAN) for name in tensors if name.endswith(_RUNNING_MEAN)]
    return tensors | {layer + _BATCHES: np.zeros((), np.int64) for layer in layers}


def export(checkpoint: NativeCheckpoint, destination: Path, layout: Layout, *, overwrite: bool = False) -> list[str]:
    """Writes a PyTorch checkpoint as a new directory, whole or not at all.

    hf: ``model.safetensors``, ``config.json``, ``preprocessor_config.json``, for transformers' ``from_pretrained``.
    timm: ``model.safetensors`` and timm's ``config.json``, for ``timm.create_model("local-dir:...")``.
    original: ``checkpoint.pth``, ``{"model": state dict}`` with recomputed ``relative_position_index``, for unilm's
        scripts; a segmentation model as mmseg has it. Needs torch to write.

    Returns:
        Notes for the user: what the layout cannot say.

    Raises:
        BeitJaxError: the layout has no such model; torch is missing; the destination cannot be written.
    """
    config = checkpoint.config
    if layout == "hf":
        _refuse_hf(config)
    elif layout == "timm":
        _refuse_timm(config)
    check_destination(destination, overwrite=overwrite)
    check_replaceable(destination)
    size = sum(leaf.nbytes for leaf in checkpoint.params.values())
    with new_directory(destination, overwrite=overwrite, need_bytes=size) as directory:
        if layout == "original":
            segments = config.task == "semantic_segmentation"
            tensors = to_torch(config, checkpoint.params, MMSEG if segments else UNILM)
            tensors |= {f"{'backbone.' * segments}{name}": index for name, index in _indices(config).items()}
            _save_pth(tensors, "state_dict" if segments else "model", directory / "checkpoint.pth")
            return ["images and labels have no place in this layout; see the checkpoint it was exported from"]
        tensors = to_torch(config, checkpoint.params, own_naming(config) if layout == "hf" else UNILM)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "model.safetensors").chmod(0o666 & ~_umask())  # the library writes for the owner alone
        if layout == "hf":
            _write_json(directory / CONFIG, config.to_hf())
            _write_json(directory / PROCESSOR, checkpoint.processor.to_hf())
        else:
            _write_json(directory / CONFIG, timm_config(config, checkpoint.processor))
    return []


def _refuse_hf(config: BeitConfig) -> None:
    if config.model_type == "data2vec-vision" and config.task == "masked_image_modeling":
        raise BeitJaxError("transformers has no Data2VecVision model with a pre-training head: export --to original")


def _refuse_timm(config: BeitConfig) -> None:
    problems = {
        "a masked-image head": config.task == "masked_image_modeling",
        "segmentation": config.task in ("semantic_segmentation", "backbone"),
        "a mask token": config.use_mask_token,
        f"layer norm epsilon {config.layer_norm_eps:g} (timm's is 1e-06)": config.layer_norm_eps != 1e-6,
        f"the activation {config.hidden_act}": config.hidden_act != "gelu",
    }
    found = [what for what, is_there in problems.items() if is_there]
    if found:
        raise BeitJaxError(f"timm's BEiT has no place for {' and '.join(found)}: export --to hf or original")


def timm_config(config: BeitConfig, processor: ImageProcessor) -> dict[str, Any]:
    """timm's ``config.json``: which of its models to build, with which arguments, and how it prepares images."""
    size = {768: "base", 1024: "large"}.get(config.hidden_size, "base")
    arguments: dict[str, Any] = {
        "img_size": list(config.image_size),
        "patch_size": list(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "init_values": config.layer_scale_init_value or None,
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rel_pos_bias": config.has_layer_bias,
        "use_shared_rel_pos_bias": config.has_shared_bias,
        "global_pool": "avg" if config.pooling == "mean" else "token",
    }
    edge = processor.resize if isinstance(processor.resize, int) else config.image_size[0]
    return {
        "architecture": f"beit_{size}_patch16_224",
        "num_classes": config.num_labels,
        "model_args": arguments,
        "label_names": list(config.labels),
        "pretrained_cfg": {
            "num_classes": config.num_labels,
            "input_size": [config.num_channels, *config.image_size],
            "fixed_input_size": True,
            "interpolation": processor.resample,
            "crop_pct": config.image_size[0] / edge,
            "crop_mode": "center" if processor.crop else "squash",
            "mean": processor.mean,
            "std": processor.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "beit_jax": __version__,
    }


def _indices(config: BeitConfig) -> dict[str, np.ndarray]:
    """The index buffers that the original's state dicts hold, recomputed."""
    index = relative_position_index(config.grid).astype(np.int64)
    shared = {"rel_pos_bias.relative_position_index": index} if config.has_shared_bias else {}
    layers = range(config.num_hidden_layers if config.has_layer_bias else 0)
    return shared | {f"blocks.{i}.attn.relative_position_index": index for i in layers}


def _save_pth(tensors: Mapping[str, np.ndarray], wrapper: str, path: Path) -> None:
    try:
        import torch
    except ImportError as error:
        raise BeitJaxError(f"writing a .pth file needs PyTorch ({error}): pip install 'beit-jax[torch]'") from None
    # torch has no constructor for NumPy's bfloat16: the bits go across as integers.
    as_torch = {
        name: torch.from_numpy(t.view(np.int16)).view(torch.bfloat16)
        if t.dtype.name == "bfloat16"
        else torch.from_numpy(t)
        for name, t in tensors.items()
    }
    torch.save({wrapper: as_torch}, path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
