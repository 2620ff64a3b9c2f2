"""Reads the folders of torch.distributed.checkpoint: FSDP's and DTensor's tensors, in parts from many processes.

``.metadata`` says which box of which tensor is where in which ``*.distcp`` file; there each is one complete archive of
`torch.save`. Without torch, and without running anything: both pickles go through the closed reader.
"""

import io
import math
from itertools import pairwise
from pathlib import Path

import numpy as np

from beit_jax.errors import BeitJaxError, printable

from ..pickles.distributed import MAX_OPCODES, TABLE, Part, Tensor, tensors
from ..pickles.machine import MAX_PICKLE, PickleMachine
from ..pickles.names import STORAGE_DTYPES, PickleError
from ..pickles.state import Tensor as Pickled
from .shard_index import check_inside, is_plain
from .torch_container import ZipContainer, run_pickle
from .torch_file import StoredTensors
from .weight_file import MAX_TENSORS, FileWindow, RandomAccessFile, TensorInfo, WeightFile, checked_info

METADATA = ".metadata"
FSDP = "pytorch_model_fsdp_0"
"""The folder in which accelerate keeps the model, beside that of the optimizer."""

_DTYPES = {str(dtype): dtype for dtype in STORAGE_DTYPES.values()}  # torch and NumPy have the same words
_MAX_PARTS = 4096  # of one tensor: a part for each process


def within(directory: Path) -> Path | None:
    """Returns the folder of a distributed checkpoint that a directory is, or that accelerate keeps in it.

    Raises:
        BeitJaxError: its record is missing, without which nothing says what the other files hold.
    """
    for folder in (directory, directory / FSDP):
        if (folder / METADATA).is_file():
            return folder
        if any(folder.glob("__*.distcp")):
            raise BeitJaxError(
                f"{printable(folder, 1024)} holds .distcp files of torch.distributed.checkpoint and no {METADATA}, "
                "which is written last: copy it too, or take an earlier checkpoint"
            )
    return None


class DistributedFolder(WeightFile):
    """The tensors of a distributed checkpoint, by the names in it (``model.blocks.0...``).

    Raises:
        BeitJaxError: ``.metadata`` is damaged or mentions names that no such record needs; parts of a tensor overlap or
            do not cover it; a file is missing, or shorter than the record says.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(RandomAccessFile(folder / METADATA), "torch.distributed.checkpoint")
        self._folder = folder
        self._parts: dict[str, tuple[Part, ...]] = {}
        try:
            for name, tensor in sorted(self._record().items()):
                self.tensors[name] = self._checked(name, tensor)
                self._parts[name] = tensor.parts
            self._sizes = {file: self._size(file) for file in sorted({p.file for x in self._parts.values() for p in x})}
            for name, parts in self._parts.items():
                for part in parts:
                    self._check_place(name, part)
        except BaseException:
            self.close()
            raise
        if len(self._sizes) > 1:
            self.format += f", {len(self._sizes)} files"

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.file.path, *(self._folder / name for name in self._sizes))

    def _record(self) -> dict[str, Tensor]:
        label = self.file.label
        if self.file.size > MAX_PICKLE:
            raise BeitJaxError(f"{label} has {self.file.size} bytes; expected at most {MAX_PICKLE}")
        stream = io.BytesIO(self.file.read(0, self.file.size, "the record"))
        top = run_pickle(self.file, stream, PickleMachine(TABLE, MAX_OPCODES))
        try:
            found = dict(tensors(top))
        except PickleError as error:
            raise BeitJaxError(f"the record in {label} {printable(error, 300)}") from None
        if not 0 < len(found) <= MAX_TENSORS:
            raise BeitJaxError(f"{label} lists {len(found)} tensors; expected 1 to {MAX_TENSORS}")
        return found

    def _checked(self, name: str, tensor: Tensor) -> TensorInfo:
        where = f"tensor {printable(name)} in {self.file.label}"
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise BeitJaxError(f"{where} has dtype {printable(tensor.dtype)}, which is not converted")
        info = checked_info(name, tensor.shape, dtype, self.file.path)
        flaw = _uncovered(info.shape, tensor.parts)
        if flaw:
            raise BeitJaxError(f"{where}: its parts {flaw}; expected every element once: save it again")
        return info

    def _size(self, name: str) -> int:
        if not is_plain(name):
            raise BeitJaxError(f"{self.file.label} names the file {printable(name)}; expected one beside it")
        path = self._folder / name
        if not path.exists():
            raise BeitJaxError(f"{self.file.label} needs {printable(name)}, which is not there: copy it too")
        check_inside(self._folder, path, self.file.label)
        file = RandomAccessFile(path)
        file.close()
        return file.size

    def _check_place(self, name: str, part: Part) -> None:
        if part.start < 0 or part.nbytes <= 0 or part.start + part.nbytes > self._sizes[part.file]:
            raise BeitJaxError(
                f"{printable(self._folder / part.file, 1024)} is truncated: a part of tensor {printable(name)} ends at "
                f"byte {part.start + part.nbytes}, the file has {self._sizes[part.file]}; copy it again"
            )

    def _fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        parts = self._parts[info.name]
        if len(parts) == 1:
            self._read(info, parts[0], flat)
            return
        whole = flat.view(info.dtype).reshape(info.shape)
        for part in parts:
            if part.sizes[1:] == info.shape[1:]:  # whole rows, as FSDP divides: they lie together
                row = math.prod(part.sizes[1:]) * info.dtype.itemsize
                self._read(info, part, flat[part.offsets[0] * row : (part.offsets[0] + part.sizes[0]) * row])
                continue
            box = np.empty(math.prod(part.sizes) * info.dtype.itemsize, np.uint8)
            self._read(info, part, box)
            place = tuple(slice(first, first + count) for first, count in zip(part.offsets, part.sizes, strict=True))
            whole[place] = box.view(info.dtype).reshape(part.sizes)

    def _read(self, info: TensorInfo, part: Part, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        file = RandomAccessFile(self._folder / part.file)
        try:
            window = FileWindow(file, part.start, part.nbytes)
            container = ZipContainer(window)
            if container.forbidden or not isinstance(container.top, Pickled):
                raise BeitJaxError(f"{file.label}: the part of {printable(info.name)} is no tensor; save it again")
            stored = StoredTensors(window, container, {info.name: container.top})
            found = stored.infos[info.name]
            if (found.shape, found.dtype) != (part.sizes, info.dtype):
                raise BeitJaxError(
                    f"{file.label}: a part of {printable(info.name)} is {found.dtype} {list(found.shape)}, {METADATA} "
                    f"says {info.dtype} {list(part.sizes)}; save it again"
                )
            stored.fill(found, flat)
        finally:
            file.close()


def _uncovered(shape: tuple[int, ...], parts: tuple[Part, ...]) -> str | None:
    """What is wrong with boxes that should cover a tensor, each element once; None if nothing."""
    if len(parts) > _MAX_PARTS:
        return f"are {len(parts)}, more than the {_MAX_PARTS} that are read"
    for part in parts:
        if any(first + count > size for first, count, size in zip(part.offsets, part.sizes, shape, strict=True)):
            return f"reach beyond its shape {list(shape)}"
    held, expected = sum(math.prod(part.sizes) for part in parts), math.prod(shape)
    if held != expected or not parts:
        return f"hold {held} of its {expected} elements"
    # As many elements as the tensor has, in boxes within it: without an overlap they cover it.
    filled = [part for part in parts if math.prod(part.sizes)]
    return "overlap" if _overlap(filled, 0, len(shape)) else None


def _overlap(parts: list[Part], axis: int, rank: int) -> bool:
    """True if two boxes share an element. Boxes are told apart along one axis after the other."""
    if len(parts) < 2:
        return False
    if axis == rank:
        return True
    cuts = sorted({edge for part in parts for edge in (part.offsets[axis], part.offsets[axis] + part.sizes[axis])})
    if len(cuts) == 2:
        return _overlap(parts, axis + 1, rank)
    ordered = sorted(parts, key=lambda part: part.offsets[axis])
    if all(a.offsets[axis] + a.sizes[axis] <= b.offsets[axis] for a, b in pairwise(ordered)):
        return False
    slabs = ([p for p in parts if p.offsets[axis] < end and p.offsets[axis] + p.sizes[axis] > start]
             for start, end in pairwise(cuts))  # fmt: skip
    return any(_overlap(slab, axis + 1, rank) for slab in slabs)
