"""Reads bare pickles of NumPy arrays, as `paddle.save` writes them, without running anything in them.

The pickle holds the bytes of the arrays, so it is as long as the weights. They are stepped over when the file is
opened, and read by position when a tensor is asked for.
"""

import codecs
import io
from typing import BinaryIO, cast

import numpy as np

from beit_jax.errors import BeitJaxError, printable

from ..pickles.arrays import LONGEST, MARK, TABLE, Arrays, Piece
from ..pickles.machine import PickleMachine
from ..pickles.names import STORAGE_DTYPES, Blob, PickledTensor, PickleError, UnsupportedTensor
from ..pickles.refusals import refused
from ..pickles.state import Tensor, select_state
from ..strangers.contents import of_entries
from .torch_container import run_outer
from .weight_file import MAX_TENSORS, RandomAccessFile, TensorInfo, WeightFile, checked_info
from .zip_archive import FileStream

_CHUNK = 1 << 20  # bytes of text that are decoded at once


class ArrayPickle(WeightFile):
    """The arrays in a pickled dict, or in an entry of it.

    Args:
        prefer: see `select_state`.

    Raises:
        BeitJaxError: the file is damaged, mentions a name that no such file needs, holds no arrays, or an array of a
            dtype that is not read.
    """

    def __init__(self, file: RandomAccessFile, prefer: str | None = None) -> None:
        stream = cast(BinaryIO, io.BufferedReader(FileStream(file), 1 << 16))
        machine = PickleMachine(TABLE, longest=LONGEST)
        top, forbidden = run_outer(file, stream, machine, "paddle.save or torch.save")
        entries: dict[object, object] = top if isinstance(top, dict) else {}
        stranger = of_entries(entries, forbidden)
        if stranger is not None:
            raise BeitJaxError(f"{file.label} is {stranger}")
        if forbidden:
            raise refused(file.label, forbidden)
        if (behind := file.size - stream.tell()) > 0:
            raise BeitJaxError(f"{file.label} has {behind} bytes behind its pickle; expected none: download it again")
        try:
            arrays = Arrays(top)
        except PickleError as error:
            raise BeitJaxError(f"the pickle in {file.label} {printable(error, 300)}; download it again") from None
        if not isinstance(arrays.top, dict) or not arrays.pieces or machine.storages:
            raise BeitJaxError(
                f"{file.label} is a pickle that torch.save did not write; expected a state dict of tensors"
            )
        super().__init__(file, "paddle pickle" if arrays.by_paddle else "pickle of arrays")
        state = select_state({key: value for key, value in arrays.top.items() if key != MARK}, prefer, file.label)
        if len(state.tensors) > MAX_TENSORS:
            raise BeitJaxError(f"{file.label} lists {len(state.tensors)} tensors; expected at most {MAX_TENSORS}")
        self.metadata, self.notes = dict(state.metadata), list(state.notes)
        self._arrays: dict[str, tuple[PickledTensor, tuple[Piece, ...]]] = {}
        for name in sorted(state.tensors):
            self._add(name, state.tensors[name], arrays)

    def _add(self, name: str, tensor: Tensor, arrays: Arrays) -> None:
        try:
            if isinstance(tensor, UnsupportedTensor):
                raise PickleError(f"is {tensor.kind}; expected an array of numbers")
            if tensor.storage.key not in arrays.pieces:
                raise PickleError("lies outside its file")
            info = checked_info(name, tensor.shape, STORAGE_DTYPES[tensor.storage.kind], self.file.path)
            pieces = arrays.pieces[tensor.storage.key]
            for piece in pieces:
                _check_length(piece)
        except PickleError as error:
            raise BeitJaxError(
                f"tensor {printable(name)} in {self.file.label} {printable(error, 300)}; download it again"
            ) from None
        self.tensors[name], self._arrays[name] = info, (tensor, pieces)

    def _fill(self, info: TensorInfo, flat: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        tensor, pieces = self._arrays[info.name]
        by_rows = tensor.strides == _strides(info.shape)
        stored = flat if by_rows else np.empty(info.nbytes, np.uint8)
        start = 0
        for piece in pieces:
            self._read(piece, stored.data[start : start + piece.nbytes], f"tensor {printable(info.name)}")
            start += piece.nbytes
        if not by_rows:  # Fortran's order, which NumPy keeps
            columns = stored.view(info.dtype).reshape(info.shape[::-1])
            np.copyto(flat.view(info.dtype).reshape(info.shape), columns.T)

    def _read(self, piece: Piece, into: memoryview, what: str) -> None:
        """Copies the bytes of a piece, and turns text into the bytes that it stands for."""
        data = piece.data
        if isinstance(data, bytes):
            into[:] = data
        elif not data.text:
            self.file.read_into(data.offset, into, what)
        else:
            self._decode(data, into, what)

    def _decode(self, blob: Blob, into: memoryview, what: str) -> None:
        decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
        try:
            for at in range(0, blob.nbytes, _CHUNK):
                size = min(_CHUNK, blob.nbytes - at)
                text = decoder.decode(self.file.read(blob.offset + at, size, what), final=at + size == blob.nbytes)
                part = text.encode("latin-1")
                into[done : done + len(part)] = part
                done += len(part)
        except ValueError:  # no UTF-8, no latin-1, or more bytes than the array has
            done = -1
        if done != len(into):
            raise BeitJaxError(f"{self.file.label} is damaged: {what} is no text of its bytes; download it again")


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array by rows, in elements."""
    found, stride = [], 1
    for size in reversed(shape):
        found.append(stride)
        stride *= size
    return tuple(reversed(found))


def _check_length(piece: Piece) -> None:
    """Refuses a piece that has not as many bytes as its array; of text, a byte takes one or two."""
    data = piece.data
    has = len(data) if isinstance(data, bytes) else data.nbytes
    most = 2 * piece.nbytes if isinstance(data, Blob) and data.text else piece.nbytes
    if not piece.nbytes <= has <= most:
        raise PickleError(f"has {has} bytes, its shape and dtype ask for {piece.nbytes}")
