"""Pickles of NumPy arrays, `paddle.save`'s above all: every array becomes a tensor whose bytes stay in the file.

A name may be an array's, a dtype's, or one of `names.CONSTRUCTORS`; any other is refused. Source: numpy 1 and 2,
``ndarray.__reduce_ex__``; paddle 3.3.1 framework/io.py and io_utils.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from .names import (
    CONSTRUCTORS,
    Args,
    Blob,
    Constructor,
    Global,
    NumpyDtype,
    PickledTensor,
    PickleError,
    Record,
    Storage,
    UnsupportedTensor,
)

LONGEST = 256
"""Longer strings are bytes of arrays, and stay in the file; names and settings are shorter."""

MARK = "StructuredToParameterName@@"
"""The entry of a state dict that `paddle.save` wrote: the names of its parameters in Paddle's programs."""

_CHUNKED = "UnpackBigParamInfor@@"  # Paddle's spelling
_DEEPEST = 100

# NumPy has no bfloat16: Paddle gives its bits as unsigned integers.
_KINDS: Mapping[str, str] = {
    **{"f8": "DoubleStorage", "f4": "FloatStorage", "f2": "HalfStorage", "u2": "BFloat16Storage", "b1": "BoolStorage"},
    **{"i8": "LongStorage", "i4": "IntStorage", "i2": "ShortStorage", "i1": "CharStorage", "u1": "ByteStorage"},
}


@dataclass(frozen=True)
class Piece:
    """A run of an array's bytes: in memory where it is short, or in the file. `nbytes` is what the array needs."""

    data: bytes | Blob
    nbytes: int


def _array(args: Args) -> object:
    """A record in place of an empty array, whose shape, dtype and bytes follow in BUILD."""
    match args:
        case (Global(name="numpy.ndarray"), tuple(), _):
            return Record("array")
    raise PickleError("makes an array of a class of its own")


def _buffer(args: Args) -> object:
    """Protocol 5 writes the bytes first."""
    match args:
        case (data, NumpyDtype() as dtype, tuple() as shape, "C" | "F" as order):
            return Record("array", {"state": (1, shape, dtype, order == "F", data)})
    raise PickleError("makes an array of something other than bytes")


def _bytes(args: Args) -> object:
    """Protocol 2 has no bytes: they are written as text and an encoding."""
    match args:
        case (Blob(text=True) as blob, "latin1"):
            return blob
    return CONSTRUCTORS["_codecs.encode"](args)


def _no_bytes(args: Args) -> object:
    """Protocol 2 writes none at all as a call."""
    if args:
        raise PickleError("makes bytes of something")
    return b""


def _uncalled(kind: str, args: Args) -> object:
    raise PickleError(f"calls {kind}")


TABLE: Mapping[str, Constructor] = {
    **CONSTRUCTORS,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _buffer for core in ("core", "_core")},
    "numpy.ndarray": partial(_uncalled, "numpy.ndarray"),
    "_codecs.encode": _bytes,
    "builtins.bytes": _no_bytes,
    "builtins.tuple": lambda args: args[0],  # `paddle.save` writes a tensor within other data as (name, array)
}
"""What the stream may call."""


class Arrays:
    """The object of a pickle with its arrays as tensors.

    Attributes:
        top: the object.
        pieces: the bytes of every tensor, by the key of its storage.
        by_paddle: `paddle.save` wrote the pickle.

    Raises:
        PickleError: an array is not what NumPy writes, or parts of a chunked tensor do not make the whole.
    """

    def __init__(self, top: object) -> None:
        self.pieces: dict[str, tuple[Piece, ...]] = {}
        self._done: dict[int, object] = {}  # what a container became: a pickle may be a graph
        self.by_paddle = isinstance(top, dict) and MARK in top
        self.top = self._resolved(top, 0)
        if isinstance(self.top, dict) and isinstance(chunked := self.top.pop(_CHUNKED, None), dict):
            self._join(self.top, chunked)

    def _resolved(self, value: object, depth: int) -> object:
        if depth > _DEEPEST:
            raise PickleError(f"nests its entries more than {_DEEPEST} deep")
        if isinstance(value, Record | dict | list | tuple) and id(value) in self._done:
            return self._done[id(value)]
        match value:
            case Record():
                self._done[id(value)] = self._tensor(value)
            case (str(), Record() as record) if isinstance(value, tuple):
                self._done[id(value)] = self._resolved(record, depth + 1)
                self.by_paddle = True  # its tensors within other data are (name, array)
            case dict() | list():
                self._done[id(value)] = value  # first, because it may hold itself
                for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    value[key] = self._resolved(entry, depth + 1)
            case tuple():
                self._done[id(value)] = tuple(self._resolved(entry, depth + 1) for entry in value)
            case _:
                return value
        return self._done[id(value)]

    def _tensor(self, record: Record) -> PickledTensor | UnsupportedTensor:
        match record.values.get("state"):
            case (*_, tuple() as shape, NumpyDtype() as dtype, bool(fortran), bytes() | bytearray() | Blob() as data):
                pass
            case (*_, list()):
                return UnsupportedTensor("an array of Python objects")
            case _:
                raise PickleError("holds an array that NumPy did not write")
        if not _is_shape(shape):
            raise PickleError("holds an array whose shape is no list of sizes")
        kind = _KINDS.get(dtype.code)
        if kind is None or dtype.order == ">":
            return UnsupportedTensor(f"an array of dtype {dtype.order}{dtype.code}")
        sizes = shape if fortran else shape[::-1]
        strides = tuple(accumulate(sizes[:-1], lambda stride, size: stride * size, initial=1))[: len(shape)]
        piece = Piece(data if isinstance(data, Blob) else bytes(data), math.prod(shape) * int(dtype.code[1:]))
        return PickledTensor(self._stored(kind, (piece,)), 0, shape, strides if fortran else strides[::-1])

    def _stored(self, kind: str, pieces: tuple[Piece, ...]) -> Storage:
        key = f"array {len(self.pieces)}"  # nothing is ever taken out of `pieces`
        self.pieces[key] = pieces
        return Storage(kind, key, sum(piece.nbytes for piece in pieces) // int(_SIZES[kind]))

    def _join(self, entries: dict[object, object], chunked: dict[object, object]) -> None:
        """Puts a tensor in the place of its parts: with protocols 2 and 3 Paddle cuts those of a gibibyte or more."""
        for name, entry in chunked.items():
            match entry:
                case {"OriginShape": tuple() as shape, "slices": list() as names} if _is_shape(shape):
                    parts = [entries.pop(part, None) for part in names if isinstance(part, str)]
                case _:
                    raise PickleError(f"says nothing readable of the parts of {name}")
            found = [part for part in parts if isinstance(part, PickledTensor) and len(part.shape) == 1]
            kinds = {part.storage.kind for part in found}
            numel = sum(part.storage.numel for part in found)
            if len(found) != len(names) or len(kinds) != 1 or name in entries or numel != math.prod(shape):
                raise PickleError(f"has parts of {name} that do not make a tensor of shape {list(shape)}")
            pieces = tuple(piece for part in found for piece in self.pieces[part.storage.key])
            strides = tuple(accumulate(shape[:0:-1], lambda stride, size: stride * size, initial=1))[::-1]
            entries[name] = PickledTensor(self._stored(kinds.pop(), pieces), 0, shape, strides)


def _is_shape(shape: tuple[object, ...]) -> bool:
    return all(type(size) is int and size >= 0 for size in shape)


_SIZES = {kind: code[1:] for code, kind in _KINDS.items()}
