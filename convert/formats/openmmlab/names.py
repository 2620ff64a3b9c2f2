"""Names of tensors in Open-MMLab's files, which become the original's, and what their metadata says.

Source: mmpretrain 1.2.0 models/backbones/beit.py; mmsegmentation 1.2.2 models/backbones/beit.py. Both have one encoder.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.errors import printable

from .. import unilm
from ..format import Sighting
from ..rules import Rules, renamed

RENAMES = (
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
INTO_NECK = tuple(
    (old.replace("blocks.{i}.", "cls_pt_layers.{i}."), new.replace("layers.{i}.", _AGGREGATION, 1))
    for old, new in RENAMES
    if old.startswith("blocks.")
)
_ORIGINAL = {"head.fc": "head", "head.cls_head": "lm_head", "neck.norm": "norm"}

BACKBONE: Rules = renamed(unilm.BACKBONE, RENAMES)
MARKER = "layers.0.ffn.layers.0.0.weight"
PREFIXES = ("backbone.", "")
COPIES = ("target_generator.encoder.",)
"""BEiT v2's tokenizer, of the same blocks."""
FOREIGN = re.compile(r"^(target_generator|data_preprocessor)\.")


def as_original(sighting: Sighting, metadata: Mapping[str, object]) -> Sighting:
    """Returns the same file under the original's names, with other metadata."""
    bare = {name.removeprefix(sighting.prefix): info for name, info in sighting.tensors.items()}
    tensors = {_to_original(name): info for name, info in bare.items()}
    return replace(sighting, format=unilm.UNILM, prefix="", tensors=tensors, metadata=metadata)


def _to_original(name: str) -> str:
    """The name that the original's code gives a tensor of a model without what stands before its backbone."""
    for theirs, original in _ORIGINAL.items():
        if name.startswith(f"{theirs}."):
            return original + name.removeprefix(theirs)
    for old, new in (*INTO_NECK, *RENAMES):
        pattern = re.escape(new).replace(r"\{i\}", r"(\d{1,6})")
        if match := re.match(pattern, name):
            return old.replace("{i}", match[1] if match.groups() else "") + name[match.end() :]
    return name


def labels(metadata: Mapping[str, object], count: int) -> tuple[str, ...]:
    """Returns the names of the classes, as mmengine keeps them of its data set; nothing where they are not there."""
    meta: Any = metadata.get("meta")
    data = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    names = (data.get("classes") or data.get("CLASSES")) if isinstance(data, Mapping) else None
    if isinstance(names, list | tuple) and count and len(names) == count:
        return tuple(printable(name) for name in names)
    return ()


def position_indices(config: BeitConfig) -> dict[str, np.ndarray]:
    """Returns the index buffers of both libraries' state dicts, by their names."""
    found = {}
    for name, index in unilm.position_indices(config).items():
        found["backbone." + re.sub(r"^blocks\.", "layers.", name)] = index
    return found
