"""``flax_adapter.safetensors``: the factors of which a native checkpoint is the merger, in the directory beside it.

The checkpoint alone is a whole model. With this file it can be given back as an adapter (``export --to peft``). The
format is that of ``flax_model.safetensors``; the metadata say how the model was adapted.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.adapters.low_rank import ALSO, PROJECTIONS, Adapter, factor_shapes
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import ADAPTER_WEIGHTS
from beit_jax.json_file import Fields
from beit_jax.weights.tensors import LeafSpec, read_tensors, write_tensors


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter as it was trained.

    Attributes:
        factors: flat name to array, float32, of the host or of devices.
        whole: flat names of the model's parameters that are not those of the base: trained themselves, or changed
            before training started. They are in the checkpoint.
        base: the origin of the base, as its native checkpoint recorded it.
    """

    adapter: Adapter
    factors: Mapping[str, Any]
    whole: tuple[str, ...]
    base: Mapping[str, Any] = field(default_factory=dict)


def save_adapter(directory: Path, record: AdapterRecord) -> None:
    """Writes the file into the directory of a native checkpoint that is being written."""
    specs = {name: LeafSpec(leaf.shape, leaf.dtype) for name, leaf in record.factors.items()}
    told = {"adapter": asdict(record.adapter), "whole": list(record.whole), "base": dict(record.base)}
    factors = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in record.factors.items()}
    write_tensors(directory / ADAPTER_WEIGHTS, specs, lambda name: [[factors[name]]], told)


def load_adapter(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> AdapterRecord:
    """Reads the adapter of a native checkpoint.

    Args:
        shapes: of the checkpoint's parameters, by their flat names.

    Raises:
        BeitJaxError: there is none; the file is damaged, or belongs to another model.
    """
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise BeitJaxError(
            f"{printable(directory)}: holds no {ADAPTER_WEIGHTS}: the model was not trained with an adapter "
            "(train --adapter.rank)"
        )
    factors, told = read_tensors(path)
    fields = Fields(told, f"{path}: provenance")
    adapter = _adapter(fields.inside("adapter"))
    whole = told.get("whole")
    if not isinstance(whole, list) or not set(whole) <= shapes.keys():
        raise fields.error("whole", "names of the model's parameters")
    expected = factor_shapes(adapter, shapes)
    found = {name: leaf.shape for name, leaf in factors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise BeitJaxError(
                f"{path}: {printable(name)}: expected {_shape(expected.get(name))} by the model beside it, found "
                f"{_shape(found.get(name))}; use the file that was written with this model"
            )
    return AdapterRecord(adapter, factors, tuple(whole), fields.typed("base", dict, {}))


def _adapter(fields: Fields) -> Adapter:
    def names(key: str, known: Mapping[str, Any]) -> tuple[str, ...]:
        value = fields.content.get(key)
        if not isinstance(value, list) or not all(item in known for item in value):
            raise fields.error(key, f"names among {', '.join(known)}")
        return tuple(value)

    rank = fields.typed("rank", int, 0)
    if rank < 1:
        raise fields.error("rank", "a positive integer")
    return Adapter(
        rank=rank,
        targets=names("targets", PROJECTIONS),
        alpha=fields.typed("alpha", float, 0.0),
        rslora=fields.typed("rslora", bool, False),
        dropout=fields.typed("dropout", float, 0.0),
        dora=fields.typed("dora", bool, False),
        also=names("also", ALSO),
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
