"""The pickle ``.metadata`` of torch.distributed.checkpoint: which part of which tensor is where, as plain data.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.13.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from .names import CONSTRUCTORS, Args, Constructor, Global, PickleError, Record, key_of

MAX_OPCODES = 50_000_000  # a part has about 60; thousands of processes with a thousand tensors are not met here

_CLASSES = (
    *(f"torch.distributed.checkpoint.metadata.{kind}" for kind in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
)  # fmt: skip


def _record(kind: str, args: Args) -> object:
    """A record in place of ``cls.__new__(cls)``, whose fields follow in BUILD, or of an enumeration's number."""
    return Record(kind.rpartition(".")[2], {"arguments": args} if args else {})


TABLE: Mapping[str, Constructor] = {**CONSTRUCTORS, **{kind: partial(_record, kind) for kind in _CLASSES}}


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and its record.

    Attributes:
        offsets, sizes: the first index and the number of indices along every axis.
        file: the name of the file that holds it; `start` and `nbytes` say where.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Tensor:
    """A tensor in parts. `dtype` is torch's word for it, such as ``float32``."""

    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]


def tensors(top: object) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor with its name; entries that are no tensors are stepped over.

    Raises:
        PickleError: the object is no such record, or a field is not what it should be.
    """
    match top:
        case Record("Metadata", {"state_dict_metadata": dict() as entries, "storage_data": dict() as places}):
            pass
        case _:
            raise PickleError("is not that of torch.distributed.checkpoint")
    for name, entry in entries.items():
        match entry:
            case Record("TensorStorageMetadata", {"properties": properties, "size": size, "chunks": list() as chunks}):
                shape = _numbers(size, str(name))
                parts = tuple(_part(str(name), chunk, len(shape), places) for chunk in chunks)
                yield str(name), Tensor(shape, _dtype(properties), parts)
            case Record("BytesStorageMetadata"):
                continue
            case _:
                raise PickleError(f"says nothing readable of {name}")


def _part(name: str, chunk: object, rank: int, places: Mapping[object, object]) -> Part:
    match chunk:
        case Record("ChunkStorageMetadata", {"offsets": offsets, "sizes": sizes}):
            first, count = _numbers(offsets, name), _numbers(sizes, name)
        case _:
            raise PickleError(f"says nothing readable of a part of {name}")
    if len(first) != rank or len(count) != rank:
        raise PickleError(f"gives {name} parts of another number of axes")
    match places.get(key_of(name, first)):
        case Record("_StorageInfo", {"relative_path": str(file), "offset": int(start), "length": int(nbytes)} as place):
            if place.get("transform_descriptors"):
                raise PickleError(f"says that {name} is compressed, which is not read: save it without extensions")
            return Part(first, count, file, start, nbytes)
    raise PickleError(f"does not say where the part of {name} at {list(first)} is: the save was not complete")


def _numbers(value: object, name: str) -> tuple[int, ...]:
    if isinstance(value, tuple) and all(type(number) is int and number >= 0 for number in value):
        return value
    raise PickleError(f"gives {name} a shape or offset that is no list of numbers")


def _dtype(properties: object) -> str:
    """The dtype is a field, or the first of the values that newer versions write."""
    match properties:
        case Record(values={"dtype": Global(name=name)}) | Record(values={"state": (Global(name=name), *_)}):
            return name.removeprefix("torch.")
    raise PickleError("says no dtype")
