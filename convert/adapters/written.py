"""A native checkpoint with its factors as PEFT's directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

The modules are named as in the memory of transformers 5, so that ``PeftModel.from_pretrained`` and ``load_adapter`` put
every tensor where it belongs. The model's configuration lies beside them, because PEFT's file does not say labels.
Source: peft 0.21, `LoraConfig` and `get_peft_model_state_dict`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beit_jax.adapters.file import AdapterRecord
from beit_jax.adapters.low_rank import MAGNITUDE, PROJECTIONS, A, B, kernels
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR
from beit_jax.json_file import write_json
from beit_jax.weights.leaves import shapes as param_shapes

from ..files.adapters import CONFIG as ADAPTER_CONFIG
from ..files.adapters import WEIGHTS
from ..formats import writing
from ..formats.format import SourceFormat
from ..formats.transformers import HF, HF5, HF5_DATA2VEC

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint

_EMBEDDINGS = re.compile(r"(beit/)?embeddings/\w+")
PREFIX = "base_model.model."
"""Before every name: a `PeftModel` holds a tuner, which holds the model."""


FILES = (ADAPTER_CONFIG, WEIGHTS[0])
"""What PEFT reads of the directory."""


def is_written_here(directory: Path) -> bool:
    """Returns True if the adapter in a directory is an export, unchanged by other programs."""
    return writing.is_written_here(directory, WEIGHTS)


def in_memory(config: BeitConfig) -> SourceFormat:
    """The format with the names that transformers 5 has in memory."""
    if config.model_type == "beit":
        return HF5
    return HF5_DATA2VEC if config.task == "semantic_segmentation" else HF


def refusal(config: BeitConfig) -> str | None:
    """Why transformers has no such model; None if it has."""
    naming = HF5_DATA2VEC if in_memory(config) is HF5_DATA2VEC else HF
    return None if naming.refusal is None else naming.refusal(config)


def peft_tensors(checkpoint: "NativeCheckpoint", record: AdapterRecord) -> dict[str, np.ndarray]:
    """The tensors of ``adapter_model.safetensors``, float32 and contiguous.

    Raises:
        BeitJaxError: a parameter that differs from the base's lies in no module, and PEFT saves modules.
    """
    config, naming = checkpoint.config, in_memory(checkpoint.config)
    tensors: dict[str, np.ndarray] = {}
    for module, factors in _modules(config, record):
        tensors |= {f"{PREFIX}{module}.{name}": np.ascontiguousarray(leaf) for name, leaf in factors.items()}
    saved = naming.to_torch(config, _whole(checkpoint, record))
    for name in saved:
        _module_of(name, naming.own_prefix(config))
    return tensors | {PREFIX + name: leaf for name, leaf in saved.items()}


def peft_config(checkpoint: "NativeCheckpoint", record: AdapterRecord) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    config, adapter = checkpoint.config, record.adapter
    naming = in_memory(config)
    prefix = naming.own_prefix(config)
    whole = naming.to_torch(config, _whole(checkpoint, record))
    base = record.base.get("source")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted({module for module, _ in _modules(config, record)}, key=_by_number),
        "modules_to_save": sorted({_module_of(name, prefix) for name in whole}, key=_by_number) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def write_peft(
    directory: Path, checkpoint: "NativeCheckpoint", record: AdapterRecord, tensors: Mapping[str, np.ndarray]
) -> list[str]:
    """Writes PEFT's directory. Returns notes for the user.

    Args:
        tensors: as `peft_tensors` makes them.
    """
    writing.write_safetensors(directory / WEIGHTS[0], tensors)
    write_json(directory / ADAPTER_CONFIG, peft_config(checkpoint, record))
    write_json(directory / CONFIG, checkpoint.config.to_hf())
    write_json(directory / PROCESSOR, checkpoint.processor.to_hf())
    base = record.base.get("source")
    named = printable(base) if isinstance(base, str) else "the model it was trained on"
    return [f"the adapter belongs to {named}, with the configuration that is written beside it"]


def _modules(config: BeitConfig, record: AdapterRecord) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The module of every adapted projection of every block, with its tensors by PEFT's names in it."""
    naming, shapes = in_memory(config), param_shapes(config)
    rules = {rule.flax: rule for rule in naming.rules(config, naming.own_prefix(config))}
    for target, kernel, prefix in kernels(shapes, record.adapter.targets):
        name = rules[kernel].torch[PROJECTIONS[target].part or 0].removesuffix(".weight")
        for i in range(shapes[kernel][0]):
            a, b = (record.factors[f"{prefix}/{which}"][i] for which in (A, B))
            found = {
                "lora_A.weight": a.reshape(-1, record.adapter.rank).T,
                "lora_B.weight": b.reshape(record.adapter.rank, -1).T,
            }
            if record.adapter.dora:
                # peft itself writes no ".weight", and reads both; transformers 5's load_adapter finds only this one.
                found["lora_magnitude_vector.weight"] = record.factors[f"{prefix}/{MAGNITUDE}"][i].reshape(-1)
            yield name.replace("{i}", str(i)), found


def _whole(checkpoint: "NativeCheckpoint", record: AdapterRecord) -> dict[str, np.ndarray]:
    """What PEFT saves whole: what is not the base's, and of the embeddings, which are one module, all or nothing."""
    names = set(record.whole)
    if any(_EMBEDDINGS.fullmatch(name) for name in names):
        names |= {name for name in checkpoint.params if _EMBEDDINGS.fullmatch(name)}
    return {name: checkpoint.params[name] for name in sorted(names)}


def _module_of(name: str, prefix: str) -> str:
    """What PEFT saves a tensor with: its module; of a head, all of the head.

    Raises:
        BeitJaxError: the tensor is a parameter of a whole block or model.
    """
    module, _, _ = name.rpartition(".")
    if not name.startswith(prefix):
        return module.partition(".")[0]
    inner = module.removeprefix(prefix)
    if inner.startswith("embeddings"):
        return f"{prefix}embeddings"
    if not inner or re.fullmatch(r"(encoder\.layer|layers)\.\d+", inner):
        raise BeitJaxError(
            f"{printable(name)}: differs from the base, and PEFT saves no parameter of a block alone: give the merged "
            "model back instead (--to hf)"
        )
    return module


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
