"""Pytrees of arrays by flat names: copied to host memory, and placed on the devices again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from beit_jax.errors import BeitJaxError, printable

from ..distributed.collectives import is_first
from . import digests
from .digests import ArrayRecord, Part

_CHUNK = 1 << 18  # elements that are checked at a time: the results stay in a core's cache


def named(tree: object) -> dict[str, Any]:
    """Leaves by flat name ("params/beit/norm/scale"), in the order of the tree: fields, keys and positions."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert name not in leaves, f"{name}: two leaves of this name"
        leaves[name] = leaf
    return leaves


@dataclass(frozen=True)
class Snapshot:
    """A copy of arrays.

    Attributes:
        values: the arrays in host memory. Arrays that span processes are not copied; Orbax copies them.
        parts: the boxes of every array for which this process takes digests.
    """

    values: dict[str, Any]
    parts: dict[str, list[Part]]

    def records(self) -> dict[str, ArrayRecord]:
        """The records of the arrays, or of the parts that this process holds."""
        return {
            name: digests.describe(np.dtype(value.dtype), value.shape, self.parts[name])
            for name, value in self.values.items()
        }

    def not_finite(self) -> list[str]:
        """The names of arrays with a NaN or an infinity in the parts that this process holds."""
        return [name for name, parts in self.parts.items() if not all(_is_finite(values) for _, values in parts)]


class HostMemory:
    """Takes snapshots, each into the memory of the previous one.

    Copying into existing pages of memory takes a fraction of the time that new pages from the system take.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def snapshot(self, arrays: Mapping[str, Any]) -> Snapshot:
        """Copies arrays, and overwrites the previous snapshot."""
        for array in arrays.values():
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        copies = {name: self._copy(name, array) for name, array in arrays.items()}
        return Snapshot(
            {name: value for name, (value, _) in copies.items()}, {name: parts for name, (_, parts) in copies.items()}
        )

    def release(self) -> None:
        """Lets go of the memory: the last snapshot will not be overwritten."""
        self._buffers = {}

    def _copy(self, name: str, array: Any) -> tuple[Any, list[Part]]:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            shards = (shard for shard in array.addressable_shards if shard.replica_id == 0)
            return array, [(_start(shard.index), np.asarray(shard.data)) for shard in shards]
        source = np.asarray(array)
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
            buffer = self._buffers[name] = np.empty(source.shape, source.dtype)
        np.copyto(buffer, source)
        return buffer, [((0,) * buffer.ndim, buffer)] if is_first() else []


def _is_finite(values: np.ndarray) -> bool:
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return True
    flat = values.reshape(-1)
    return all(np.isfinite(flat[at : at + _CHUNK]).all() for at in range(0, flat.size, _CHUNK))


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(item.start or 0 for item in index)


def place(array: np.ndarray, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Places an array of any shape on the devices by its sharding; without a sharding, on the first device."""
    sharding = abstract.sharding or SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    assert placed.dtype == abstract.dtype  # float64 and int64 would be narrowed where JAX does not have them enabled
    return placed


def check_same(path: Path, records: Mapping[str, ArrayRecord], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Refuses to restore a state that is not the saved one: nothing is cast, padded or left out.

    Raises:
        BeitJaxError: names, a shape or a dtype differ.
    """
    advice = "resume with the options it began with"
    missing, unknown = sorted(wanted.keys() - records.keys()), sorted(records.keys() - wanted.keys())
    if missing or unknown:
        lacks = f"lacks {_some(missing)}, which the run has" if missing else ""
        has = f"has {_some(unknown)}, which the run lacks" if unknown else ""
        raise BeitJaxError(f"{path}: {' and '.join(filter(None, (lacks, has)))}; {advice}")
    for name, leaf in wanted.items():
        record, dtype = records[name], np.dtype(leaf.dtype).name
        for what, expected, found in (
            ("shape", list(leaf.shape), record["shape"]),
            ("dtype", dtype, record["dtype"]),
        ):
            if expected != found:
                raise BeitJaxError(
                    f"{path}: {printable(name)}: expected the {what} {expected}, found {found}; {advice}"
                )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return printable(names[0]) + rest
