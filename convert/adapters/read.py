"""PEFT's adapter files: what they say, and which changes of which tensors they hold. Source: peft 0.21 `LoraConfig`.

A file is read whole: an adapter is small, and every tensor in it has a use or is refused by name.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import Fields, read_json

from ..files.adapters import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from ..files.checkpoint import Checkpoint

# Settings with which a module computes something else than LoRA or DoRA, or the base is another than the one named.
_OTHERS = (
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "target_parameters",
    "trainable_token_indices", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
_HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(\.\w+)??(\.(weight|bias))?")
_WHOLE = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")


@dataclass
class LowRank:
    """The factors of one module, float32: A [rank, inputs...], B [outputs, rank, ...], the magnitude [..outputs..]."""

    scale: float
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    def merged(self, weight: np.ndarray) -> np.ndarray:
        """``W + s B A``, with DoRA ``(m / n) (W + s B A)``, float32; of a Linear or a Conv2d."""
        assert self.a is not None and self.b is not None
        changed = weight + self.scale * np.tensordot(self.b.reshape(len(self.b), -1), self.a, 1).reshape(weight.shape)
        if self.magnitude is None:
            return changed
        norms = np.sqrt(np.square(changed).reshape(len(changed), -1).sum(axis=1, keepdims=True))
        share = self.magnitude.reshape(-1, 1) / norms
        return share.reshape(-1, *[1] * (weight.ndim - 1)) * changed


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as PEFT saved it.

    Attributes:
        path: its directory or its file of weights.
        factors: by the names of modules, as the adapted model calls them.
        whole: tensors that replace the base's, by their names, float32.
        added: what is added to tensors of the base, by their names, float32.
        content: of a ``config.json`` beside it, which says how the model differs from its base; None without one.
    """

    path: Path
    factors: Mapping[str, LowRank]
    whole: Mapping[str, np.ndarray]
    added: Mapping[str, np.ndarray] = field(default_factory=dict)
    content: Mapping[str, Any] | None = None

    @property
    def directory(self) -> Path:
        """The directory in which it lies."""
        return self.path if os.path.isdir(self.path) else self.path.parent


def read_adapter(path: Path, open_weights: Callable[[Path], "Checkpoint"]) -> PeftAdapter:
    """Reads an adapter: its directory, or its file of weights with ``adapter_config.json`` beside it.

    Args:
        open_weights: opens one file of weights, `..files.checkpoint.open_weights`.

    Raises:
        BeitJaxError: there is none; it is of another kind than LoRA or DoRA; a tensor fits no rule.
    """
    directory = path if os.path.isdir(path) else path.parent
    config = directory / CONFIG
    _check_one(directory)
    content = read_json(config, advice="with --base the source is an adapter, whose scale stands there")
    fields = Fields(content, str(config))
    _check_kind(fields)
    weights = path if directory != path else _weights(directory)
    with open_weights(weights) as checkpoint:
        tensors = {name: _float32(checkpoint.read(name), weights, name) for name in checkpoint.tensors}
    return _sorted(tensors, fields, path, weights)


def holds_adapter(directory: Path) -> bool:
    """True for a directory that has an adapter itself."""
    return os.path.lexists(directory / CONFIG)


def _check_one(directory: Path) -> None:
    """Refuses a directory of several adapters, as peft saves those with names: a directory for each."""
    if os.path.lexists(directory / CONFIG) or not directory.is_dir():
        return
    names = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    if names:
        raise BeitJaxError(
            f"{printable(directory)}: holds adapters by name, {', '.join(map(printable, names))}; name one, "
            f"{printable(directory / names[0])}"
        )


def _weights(directory: Path) -> Path:
    for name in WEIGHTS:
        if os.path.lexists(directory / name):
            return directory / name
    raise BeitJaxError(f"{printable(directory)}: {CONFIG} without weights: expected {' or '.join(WEIGHTS)} beside it")


def _float32(leaf: np.ndarray, file: Path, name: str) -> np.ndarray:
    if leaf.dtype.kind not in "fV" and leaf.dtype.name != "bfloat16" and not name.endswith("num_batches_tracked"):
        raise BeitJaxError(f"{printable(file)}: {printable(name)}: expected floating point, found {leaf.dtype}")
    wide = leaf.astype(np.float32)
    if not np.isfinite(wide).all():
        raise BeitJaxError(f"{printable(file)}: {printable(name)}: holds NaN or infinite numbers; train it again")
    return wide


def _check_kind(fields: Fields) -> None:
    """Refuses adapters that compute something else than LoRA and DoRA."""
    kind = fields.content.get("peft_type")
    way = "merge it in peft, and convert what model.merge_and_unload().save_pretrained(DIRECTORY) writes"
    if kind != "LORA":
        raise BeitJaxError(f"{fields.file}: an adapter of the kind {printable(kind)}, expected LORA: {way}")
    for name in _OTHERS:
        if fields.content.get(name):
            raise BeitJaxError(f"{fields.file}: {name} is set, with which LoRA computes something else: {way}")
    start = fields.content.get("init_lora_weights", True)
    if start not in _HARMLESS:
        raise BeitJaxError(f"{fields.file}: init_lora_weights {printable(start)} changes the base itself: {way}")


def _sorted(tensors: Mapping[str, np.ndarray], fields: Fields, path: Path, weights: Path) -> PeftAdapter:
    factors: dict[str, LowRank] = {}
    whole: dict[str, np.ndarray] = {}
    added: dict[str, np.ndarray] = {}
    for stored, leaf in tensors.items():
        name = stored
        while name.startswith("base_model.model."):
            name = name.removeprefix("base_model.model.")
        if ".original_module." in name or name.endswith("num_batches_tracked"):
            continue
        match = _FACTOR.fullmatch(name)
        if match is None:
            if re.search(r"\.(lora|vera|ia3|hada|oft|lokr|boft|randlora)_\w+|\.base_layer\.weight$", name):
                raise BeitJaxError(
                    f"{printable(weights)}: {printable(stored)}: no tensor of LoRA or DoRA on a Linear or a Conv2d; "
                    "merge it in peft, and convert what model.merge_and_unload().save_pretrained(DIRECTORY) writes"
                )
            whole[_WHOLE.sub("", name)] = leaf
            continue
        module, which, kind = match[1], match[2], match[5]
        low_rank = factors.setdefault(module, LowRank(_scale(fields, module)))
        if (which, kind) == ("B", "bias"):
            added[f"{module}.bias"] = low_rank.scale * leaf
        elif which == "magnitude_vector":
            low_rank.magnitude = leaf
        else:
            setattr(low_rank, which.lower(), leaf)
    for module, low_rank in factors.items():
        _check_factors(low_rank, _rank(fields, module), f"{printable(weights)}: {printable(module)}", fields)
    if not factors and not whole:
        raise BeitJaxError(f"{printable(weights)}: holds no tensor of an adapter; train it again")
    beside = (path if os.path.isdir(path) else path.parent) / "config.json"
    content = read_json(beside) if os.path.lexists(beside) else None
    return PeftAdapter(path, factors, whole, added, content)


def _check_factors(found: LowRank, rank: int, where: str, fields: Fields) -> None:
    dora = fields.typed("use_dora", bool, False)
    parts = {"lora_A": found.a, "lora_B": found.b} | ({"lora_magnitude_vector": found.magnitude} if dora else {})
    for name, leaf in parts.items():
        if leaf is None:
            raise BeitJaxError(f"{where}: {name} is missing; use the file that peft wrote")
    if found.magnitude is not None and not dora:
        raise BeitJaxError(f"{where}: has a magnitude, but {fields.file} says use_dora false; correct one of them")
    assert found.a is not None and found.b is not None
    if found.a.ndim not in (2, 4) or found.b.ndim != found.a.ndim or found.b.shape[2:] not in ((), (1, 1)):
        raise BeitJaxError(
            f"{where}: expected factors of a Linear or a Conv2d, found {list(found.a.shape)} and {list(found.b.shape)}"
        )
    if (len(found.a), found.b.shape[1]) != (rank, rank):
        raise BeitJaxError(
            f"{where}: expected factors of rank {rank} by {fields.file}, found {list(found.a.shape)} and "
            f"{list(found.b.shape)}; correct r or rank_pattern"
        )


def _rank(fields: Fields, module: str) -> int:
    rank = _patterned(fields, "rank_pattern", module, fields.typed("r", int, 8))
    if type(rank) is not int or rank < 1:
        raise fields.error("r" if fields.content.get("r") == rank else "rank_pattern", "a positive integer")
    return rank


def _scale(fields: Fields, module: str) -> float:
    alpha = _patterned(fields, "alpha_pattern", module, fields.content.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise fields.error("lora_alpha", "a number")
    rank = _rank(fields, module)
    return float(alpha / sqrt(rank) if fields.typed("use_rslora", bool, False) else alpha / rank)


def _patterned(fields: Fields, key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, from a dot or its start on."""
    patterns = fields.typed(key, dict, {}) if fields.content.get(key) is not None else {}
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error:
            raise BeitJaxError(
                f"{fields.file}: {key}: {printable(pattern)}: no regular expression; correct it"
            ) from None
        if found:
            return value
    return default
