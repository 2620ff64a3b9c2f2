"""The names that a pickled checkpoint may mention, and the inert records and plain data that they become.

A name from a file is looked up in the closed table `CONSTRUCTORS`; nothing is imported for it. The table holds the
names that torch 0.4 to 2.x and numpy 1 and 2 write.
"""

import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

# torch writes a dtype as the name of its storage.
STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

# Bytes of an item. Storages of further types may lie beside the weights, and the reader must step over them.
ITEM_SIZES = {
    **{kind: dtype.itemsize for kind, dtype in STORAGE_DTYPES.items()},
    **{"ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "UntypedStorage": 1},
    **{"QInt8Storage": 1, "QUInt8Storage": 1, "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1},
}

Args = tuple[object, ...]
Constructor = Callable[[Args], object]


class PickleError(ValueError):
    """The stream is damaged, or asks for what no checkpoint needs."""


@dataclass(frozen=True)
class Global:
    """A name in the stream that is known here. It is never imported."""

    name: str


@dataclass(frozen=True)
class Forbidden:
    """A name in the stream that no checkpoint needs, or the object that the stream would have made of it."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Bytes outside the pickle: `numel` elements under `key`, of the type `kind` as torch spells it (FloatStorage)."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A strided view of a storage, counted in elements, as the stream states it. Nothing about it is checked yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class UnsupportedTensor:
    """A tensor of a kind that is never converted; `kind` says which (``sparse``)."""

    kind: str


@dataclass(frozen=True)
class Namespace:
    """The values of an `argparse.Namespace`."""

    values: dict[object, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """The attributes of a pickled `torch.nn.Module` of a class in `MODULES`, without its behaviour."""

    kind: str
    attributes: dict[object, object] = field(default_factory=dict)


def key_of(name: str, offset: tuple[int, ...] | None) -> str:
    """The text of torch.distributed.checkpoint's ``MetadataIndex``, without the part's number, which is a hint only."""
    return f"{name}\0{offset}"


@dataclass(frozen=True)
class Record:
    """The fields of an object of a class that a table of its own knows (`distributed`), without its behaviour."""

    kind: str
    values: dict[object, object] = field(default_factory=dict)

    def text(self) -> str:
        """The record as the key of a dict: as text, whose hashes nobody can make collide. See `key_of`.

        Raises:
            PickleError: it is no name with an offset, the one kind of record that is a key.
        """
        match self.values.get("fqn"), self.values.get("offset"):
            case str(name), None:
                return key_of(name, None)
            case str(name), tuple() as offset if all(type(number) is int for number in offset):
                return key_of(name, offset)
        raise PickleError(f"has a dictionary key of type {self.kind}")


@dataclass(frozen=True)
class Blob:
    """The bytes of a string that stay in the stream: `nbytes` from `offset` on.

    Attributes:
        text: the string is text in UTF-8.
    """

    offset: int
    nbytes: int
    text: bool


@dataclass
class NumpyDtype:
    """A numpy dtype by its code (``f8``) and byte order."""

    code: str
    order: str = "<"


def _tensor(args: Args) -> object:
    match args:
        case (Storage() as storage, int(offset), tuple() as shape, tuple() as strides, *_):
            if all(type(number) is int for number in (offset, *shape, *strides)):
                return PickledTensor(storage, offset, shape, strides)
    return UnsupportedTensor("malformed")


def _first(args: Args) -> object:
    return args[0]


def _empty_dict(args: Args) -> object:
    """Returns the dict for an OrderedDict or a defaultdict with its factory; the items follow in SETITEMS."""
    if len(args) > 1 or not all(isinstance(arg, Global | Forbidden | None) for arg in args):
        raise PickleError("fills a dictionary in the way of Python 2")
    return {}


def _text(args: Args) -> object:
    """``torch.device('cuda', 0)`` -> ``cuda:0``."""
    return ":".join(str(arg) for arg in args if isinstance(arg, str | int))


def _path(args: Args) -> object:
    return str(PurePosixPath(*(str(part) for part in args if isinstance(part, str))))


def _latin1(args: Args) -> object:
    """Protocol 2 has no bytes: they are written as text and an encoding."""
    match args:
        case (str(text), "latin1"):
            return text.encode("latin-1")
    raise PickleError("calls _codecs.encode on something other than latin-1 text")


def _module(kind: str, args: Args) -> object:
    """Returns a record in place of ``cls.__new__(cls)``; the attributes follow in BUILD."""
    if args:
        raise PickleError(f"makes a {kind} from arguments")
    return Module(kind)


def _numpy_dtype(args: Args) -> object:
    match args:
        case (str(code), *_):
            return NumpyDtype(code)
    raise PickleError("holds a numpy dtype without a code")


def _other_dtype(args: Args) -> object:
    """``_rebuild_tensor_v3`` makes tensors whose dtype has no storage type; its seventh argument is the dtype."""
    match args:
        case (_, _, _, _, _, _, Global(name=name), *_):
            return UnsupportedTensor(name)
    return UnsupportedTensor("malformed")


def _numpy_scalar(args: Args) -> object:
    match args:
        case (NumpyDtype(code=code, order=order), bytes(data)) if re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            return np.frombuffer(data, np.dtype(order + code))[0].item()
    raise PickleError("holds a numpy scalar that is not a plain number")


# OpenAI's ``encoder.pkl`` and ``decoder.pkl`` are modules of these classes, not state dicts. Their objects are read as
# records (`Module`); a pickled module that needs any other class is refused.
MODULES = (
    *("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.utils.Conv2d"),
    *("dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock"),
    *("torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU", "torch.nn.modules.linear.Identity"),
    *("torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.upsampling.Upsample"),
)

CONSTRUCTORS: dict[str, Callable[[Args], object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_sparse_tensor": lambda args: UnsupportedTensor("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": lambda args: UnsupportedTensor("sparse"),
    "torch._utils._rebuild_qtensor": lambda args: UnsupportedTensor("quantised"),
    "torch._utils._rebuild_nested_tensor": lambda args: UnsupportedTensor("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda args: UnsupportedTensor("meta (without data)"),
    "torch._utils._rebuild_tensor_v3": _other_dtype,
    "torch._tensor._rebuild_from_type_v2": lambda args: UnsupportedTensor("subclassed"),
    "torch.Size": _first,
    "torch.device": _text,
    "torch.serialization._get_layout": _first,
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": _empty_dict,
    "collections.Counter": _first,
    "argparse.Namespace": lambda args: Namespace(),
    "builtins.set": _first,
    "builtins.frozenset": _first,
    "_codecs.encode": _latin1,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "datetime.datetime": lambda args: datetime.datetime(*args),  # type: ignore[arg-type]
    "datetime.date": lambda args: datetime.date(*args),  # type: ignore[arg-type]
    "datetime.time": lambda args: datetime.time(*args),  # type: ignore[arg-type]
    "datetime.timedelta": lambda args: datetime.timedelta(*args),  # type: ignore[arg-type]
    "datetime.timezone": lambda args: datetime.timezone(*args),  # type: ignore[arg-type]
    **{
        f"{module}.{kind}Path": _path
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows", "PurePosix", "PureWindows")
    },
    **{kind: partial(_module, kind) for kind in MODULES},
}

# Names that stand for themselves: storage types, torch dtypes and layouts, factories of a defaultdict.
_NAMES = re.compile(
    rf"torch\.(storage\.)?({'|'.join(ITEM_SIZES)})"
    r"|torch\.(bool|u?int\d+|b?float\d+\w*|complex\d+|per_\w+_affine\w*|strided|sparse_\w+|contiguous_format)"
    r"|builtins\.(list|dict|int|float|str|bool|tuple)"
)


def is_plain_name(name: str) -> bool:
    """True if `name` stands for itself in any checkpoint."""
    return _NAMES.fullmatch(name) is not None
