"""Reads the files of `torch.save` (.bin, .pth, .pt) without torch, and without running anything in them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from beit_jax.errors import BeitJaxError, printable

from ..pickles.names import STORAGE_DTYPES, PickledTensor, PickleError, UnsupportedTensor
from ..pickles.refusals import passed_over
from ..pickles.state import Tensor, select_state
from ..strangers.contents import of_entries, sharded_by_zero
from .torch_container import Container, LegacyContainer, ZipContainer
from .weight_file import MAX_TENSORS, Extent, RandomAccessFile, TensorInfo, WeightFile, checked_info, read_checked


@dataclass(frozen=True)
class _View:
    """The place of a tensor: `start` and `span` within its storage, and `strides`, all in bytes."""

    storage: Extent
    start: int
    span: int
    strides: tuple[int, ...]
    contiguous: bool


class PickleFile(WeightFile):
    """The state dict of a PyTorch file. Storages are read, and compared with their CRC, when a tensor is asked for.

    Args:
        zipped: True for the zip archive that torch writes since 1.6, False for the older consecutive pickles.
        prefer: see `select_state`.

    Raises:
        BeitJaxError: the file is damaged, mentions a name that no checkpoint needs, or holds a tensor of a kind or
            layout that is not read.
    """

    def __init__(self, file: RandomAccessFile, *, zipped: bool, prefer: str | None = None) -> None:
        container: Container = ZipContainer(file) if zipped else LegacyContainer(file)
        super().__init__(file, container.format)
        entries: dict[object, object] = container.top if isinstance(container.top, dict) else {}
        stranger = of_entries(entries, container.forbidden)
        if stranger is not None:
            raise BeitJaxError(f"{file.label} is {stranger}")
        passed = passed_over(container.top, container.forbidden, file.label)
        state = select_state(container.top, prefer, file.label)
        if len(state.tensors) > MAX_TENSORS:
            raise BeitJaxError(f"{file.label} lists {len(state.tensors)} tensors; expected at most {MAX_TENSORS}")
        self.metadata = dict(state.metadata)
        self.notes = [*state.notes, *passed]
        empty = sharded_by_zero((t.shape for t in state.tensors.values() if isinstance(t, PickledTensor)), entries)
        if empty is not None:
            raise BeitJaxError(f"{file.label} is {empty}")
        self._stored = StoredTensors(file, container, state.tensors)
        self.tensors = self._stored.infos

    def _fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        self._stored.fill(info, flat)


class StoredTensors:
    """Tensors of an opened container. The place of each is checked against its storage before a byte is read.

    Attributes:
        infos: name, shape and dtype of every tensor, sorted by name.

    Raises:
        BeitJaxError: a tensor of a kind or layout that is not read, or one that leaves its storage.
    """

    def __init__(self, file: RandomAccessFile, container: Container, tensors: Mapping[str, Tensor]) -> None:
        self.file = file
        self.infos: dict[str, TensorInfo] = {}
        self._views: dict[str, _View] = {}
        self._verified: set[int] = set()  # offsets of storages with a right CRC; threads may add to a set at once
        for name in sorted(tensors):
            self.infos[name], self._views[name] = _resolve(file, container, name, tensors[name])

    def fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Writes the C-ordered bytes of one tensor into `flat` [bytes]; see `WeightFile.read`."""
        view = self._views[info.name]
        what = f"tensor {printable(info.name)}"
        if view.contiguous and info.nbytes == view.storage.nbytes:
            read_checked(self.file, view.storage, what, flat.data)
            return
        if view.storage.crc is not None and view.storage.offset not in self._verified:
            read_checked(self.file, view.storage, what)
            self._verified.add(view.storage.offset)
        start = view.storage.offset + view.start
        if view.contiguous:
            self.file.read_into(start, flat.data, what)
            return
        span = np.empty(view.span, np.uint8)
        self.file.read_into(start, span.data, what)
        source: np.ndarray[Any, Any] = np.ndarray(info.shape, info.dtype, span.data, strides=view.strides)
        np.copyto(flat.view(info.dtype).reshape(info.shape), source)


def _resolve(file: RandomAccessFile, container: Container, name: str, tensor: Tensor) -> tuple[TensorInfo, _View]:
    try:
        if isinstance(tensor, UnsupportedTensor):
            raise PickleError(f"is {tensor.kind}; expected a dense tensor, as to_dense() or dequantize() gives")
        dtype = STORAGE_DTYPES.get(tensor.storage.kind)
        if dtype is None:
            raise PickleError(f"has dtype {tensor.storage.kind.removesuffix('Storage')}, which is not converted")
        info = checked_info(name, tensor.shape, dtype, file.path)
        return info, _view(info, tensor, container.locate(tensor.storage))
    except PickleError as error:
        raise BeitJaxError(f"tensor {printable(name)} in {file.label} {printable(error, 300)}") from None


def _view(info: TensorInfo, tensor: PickledTensor, storage: Extent) -> _View:
    """Checks a strided view against its storage, so that a read never leaves the storage."""
    offset, strides = tensor.offset, tensor.strides
    if min((offset, *strides)) < 0 or len(strides) != len(info.shape):
        raise PickleError(f"has offset {offset} and strides {list(strides)} for shape {list(info.shape)}")
    numel, stored = math.prod(info.shape), tensor.storage.numel
    if _overlaps(info.shape, strides) or numel > stored:
        raise PickleError(
            f"repeats elements: shape {list(info.shape)}, strides {list(strides)}, storage of {stored} elements"
        )
    reach = sum((size - 1) * stride for stride, size in zip(strides, info.shape, strict=True)) + 1 if numel else 0
    if offset + reach > stored:
        raise PickleError(f"reaches element {offset + reach} of a storage of {stored} elements")
    item = info.dtype.itemsize
    return _View(
        storage=storage,
        start=offset * item,
        span=reach * item,
        strides=tuple(stride * item for stride in strides),
        contiguous=numel == 0 or _is_contiguous(info.shape, strides),
    )


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if two indices may name one element: learned tensors have none, so a stride is damaged."""
    inner = 0  # the furthest element that the axes of smaller strides reach
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= inner:
            return True
        inner += (size - 1) * stride
    return False


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
