"""Opens published weights, one file or a directory in Hugging Face format, and reads single tensors from them.

Opening checks everything that names, shapes, dtypes and layout can tell; no tensor is read for it. No file needs torch.
"""

import copy
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal, Self

import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import WEIGHTS as NATIVE

from ..pickles.state import names_part
from ..strangers.file_names import of_folder, of_name
from ..strangers.heads import of_bytes
from . import adapters, distributed_folder
from .array_pickle import ArrayPickle
from .h5_file import H5File
from .keras_archive import is_keras, open_keras
from .msgpack_file import MsgpackFile
from .safetensors_file import SafetensorsFile
from .shard_index import INDEX_SUFFIX, ShardIndex
from .torch_container import is_legacy
from .torch_file import PickleFile
from .weight_file import RandomAccessFile, TensorInfo, WeightFile

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

Format = Literal["safetensors", "pytorch", "flax", "tensorflow"]

# In transformers' order: the first that is there is taken.
WEIGHT_NAMES: Mapping[str, Format] = {
    "model.safetensors": "safetensors",
    "model.safetensors" + INDEX_SUFFIX: "safetensors",
    "pytorch_model.bin": "pytorch",
    "pytorch_model.bin" + INDEX_SUFFIX: "pytorch",
    "flax_model.msgpack": "flax",
    "flax_model.msgpack" + INDEX_SUFFIX: "flax",
    "tf_model.h5": "tensorflow",
    "tf_model.h5" + INDEX_SUFFIX: "tensorflow",
    "model.weights.h5": "tensorflow",
}

Kind = Literal["safetensors", "zip", "pickle", "arrays", "msgpack", "hdf5", "keras"]

# Parallel training, torch.compile, Lightning and transformers' wrapper of timm's models put one of these before every
# name of a model. No known format begins with one.
_WRAPPED = ("module.", "_orig_mod.", "model.", "timm_model.")

# torch.compile, FSDP and activation checkpointing of single modules put these into the middle of names.
_INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_Owner = tuple[WeightFile, str]  # the file of a tensor, and its name there


class Checkpoint:
    """Open weights. A context manager; `close` closes the files.

    Attributes:
        path: the directory or file that the user named.
        format: the file type for people, such as ``safetensors, 3 shards``.
        files: the weight files.
        tensors: every tensor by name, sorted.
        outside: the names of tensors that are another model's, see `within`.
        notes: lines for the user.
        metadata: plain data that lay beside the weights.
    """

    def __init__(self, path: Path, parts: Sequence[WeightFile], notes: Sequence[str] = ()) -> None:
        """`parts` hold no name twice."""
        self._parts = tuple(parts)
        stored = {name: (part, name) for part in parts for name in part.tensors}
        removed = _wrapping(stored)
        self._owner, unwrapped = _unwrapped({name.removeprefix(removed): owner for name, owner in stored.items()})
        self.outside: tuple[str, ...] = ()
        self.path = path
        self.files = tuple(path for part in parts for path in part.paths)
        formats = " and ".join(sorted({part.format for part in parts}))
        self.format = formats if len(parts) == 1 else f"{formats}, {len(parts)} shards"
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: part.tensors[stored] for name, (part, stored) in sorted(self._owner.items())}
        )
        self.notes = (*notes, *(note for part in parts for note in part.notes))
        self.notes += (f"prefix {removed!r} removed from every name",) * bool(removed)
        self.notes += (f"{', '.join(map(repr, unwrapped))} removed from within names",) * bool(unwrapped)
        self.metadata: Mapping[str, object] = MappingProxyType(
            {key: value for part in parts for key, value in part.metadata.items()}
        )

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """Returns one tensor, C-contiguous, in its stored dtype. Several threads may call it at once.

        Args:
            name: a key of `tensors`.
            out: a flat uint8 buffer [bytes], at least as long as the tensor. The result is then a view of it. A buffer
                that is used again saves the page faults of fresh memory.

        Raises:
            BeitJaxError: the bytes are damaged, or the file was changed or cut short since it was opened.
        """
        if name not in self._owner:
            raise BeitJaxError(f"{printable(self.path, 1024)} holds no tensor {printable(name)}")
        part, stored = self._owner[name]
        return part.read(stored, out)

    def within(self, prefix: str) -> "Checkpoint":
        """Returns the part whose names begin with `prefix`, by their names without it. It shares the open files."""
        part = copy.copy(self)
        part._owner = {n.removeprefix(prefix): owner for n, owner in self._owner.items() if n.startswith(prefix)}
        part.tensors = MappingProxyType({name: self.tensors[prefix + name] for name in part._owner})
        part.outside = tuple(name for name in self.tensors if not name.startswith(prefix))
        return part

    def close(self) -> None:
        """Closes all files."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _wrapping(names: Collection[str]) -> str:
    """What wrappers have put before every name, "" if nothing; nested wrappers come one behind the other."""
    found, bare = "", names
    while bare and (prefix := next((each for each in _WRAPPED if all(n.startswith(each) for n in bare)), "")):
        found, bare = found + prefix, {name.removeprefix(prefix) for name in bare}
    return found


def _unwrapped(stored: Mapping[str, _Owner]) -> tuple[Mapping[str, _Owner], list[str]]:
    """The names without what wrappers of single modules have put into them, and what that was."""
    found = sorted({match[0] for name in stored for match in _INSIDE.finditer(name)})
    bare = {_INSIDE.sub("", name): owner for name, owner in stored.items()}
    return (bare, found) if len(bare) == len(stored) else (stored, [])


def open_weights(path: Path) -> Checkpoint:
    """Opens one weight file, whatever lies beside it.

    Raises:
        BeitJaxError: as `open_checkpoint`.
    """
    return Checkpoint(path, [_open_file(path, None)])


def open_checkpoint(
    path: Path, *, prefer: str | None = None, format: Format | None = None, adapter: Path | None = None
) -> Checkpoint:
    """Opens a directory in Hugging Face format, or one weight file of a format recognised by its content.

    Args:
        path: of a directory the first of `WEIGHT_NAMES` is opened.
        prefer: the set of weights to take from a training checkpoint with several: "model", "ema", or the name of an
            entry.
        format: take only weights of this file type from a directory; refused with one file.
        adapter: the directory of an adapter that is applied to these weights; beside them it is no mistake.

    Raises:
        BeitJaxError: there is nothing, or no weights; a file is damaged or unsafe; it has several sets of weights, and
            `prefer` chooses none; an adapter lies beside the weights.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, no exception for a name the system refuses
        if path.name in WEIGHT_NAMES or path.name in adapters.WEIGHTS:
            adapters.refuse_adapter(path.parent, adapter)
        if path.name.endswith(INDEX_SUFFIX):
            return _open_shards(path, path, prefer, ())
        if path.name == distributed_folder.METADATA:
            return _open_folder(path, path.parent, prefer)
        if path.name == NATIVE:
            raise BeitJaxError(f"{printable(path, 1024)}: of a native checkpoint; give its directory")
        if format is not None and os.path.lexists(path):
            raise BeitJaxError(
                f"--format {format}: {printable(path, 1024)} is one file, not a directory of several formats; leave "
                "the option out"
            )
        return Checkpoint(path, [_open_file(path, prefer)])
    adapters.refuse_adapter(path, adapter)
    wanted = [name for name in WEIGHT_NAMES if format in (None, WEIGHT_NAMES[name])]
    present = [name for name in wanted if os.path.lexists(path / name)]  # a broken link is an error, not absence
    if not present and format in (None, "pytorch") and (folder := distributed_folder.within(path)) is not None:
        return _open_folder(path, folder, prefer)
    if not present:
        raise BeitJaxError(_nothing_found(path, wanted))
    chosen, *others = present
    notes = [f"{name} ignored: {chosen} is preferred" for name in others]
    if chosen.endswith(INDEX_SUFFIX):
        return _open_shards(path, path / chosen, prefer, notes)
    return Checkpoint(path, [_open_file(path / chosen, prefer)], notes)


def holds_weights(directory: Path) -> bool:
    """True if `open_checkpoint` would open weights in a directory, whole or not."""
    names = (*WEIGHT_NAMES, NATIVE, distributed_folder.METADATA, *adapters.WEIGHTS)
    return any(os.path.lexists(directory / name) for name in names)


def _nothing_found(directory: Path, wanted: Sequence[str]) -> str:
    label = printable(directory, 1024)
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise BeitJaxError(f"cannot read {label}: {printable(error.strerror)}") from None
    if NATIVE in names:
        return (
            f"{label} is a native checkpoint, converted already: use it as it is, or convert what it was made of; "
            "beit-jax export makes a Hugging Face directory of it"
        )
    stranger = of_folder(names)
    if stranger is not None and wanted == list(WEIGHT_NAMES):
        return f"{label} holds {stranger}"
    holding = [name for name in names if any(os.path.lexists(directory / name / each) for each in wanted)]
    found = ", ".join(printable(name, 60) for name in names[:10]) or "nothing"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    advice = "A weight file of another name can be given itself"
    if holding:
        advice = f"Give one of its directories: {printable(directory / holding[-1], 1024)}"
    elif wanted != list(WEIGHT_NAMES):
        advice = "Leave --format out, or give a weight file of another name itself"
    return f"{label} holds no weights: expected one of {', '.join(wanted)}; found {found}{more}. {advice}"


def _open_folder(path: Path, folder: Path, prefer: str | None) -> Checkpoint:
    part = distributed_folder.DistributedFolder(folder)
    try:
        _check_prefer(prefer, part.tensors, printable(folder, 1024))
        return Checkpoint(path, [part], [f"weights taken from {printable(folder.name)}"] * (folder != path))
    except BaseException:
        part.close()
        raise


def _open_shards(path: Path, index_path: Path, prefer: str | None, notes: Sequence[str]) -> Checkpoint:
    index = ShardIndex(index_path)
    _check_prefer(prefer, index.owner, printable(index_path, 1024))
    with ExitStack() as stack:
        parts = []
        for shard_path in [index.locate(shard) for shard in index.shards]:
            parts.append(_open_file(shard_path, None))
            stack.callback(parts[-1].close)
        shard_notes = index.check({shard: part.tensors for shard, part in zip(index.shards, parts, strict=True)})
        stack.pop_all()
    return Checkpoint(path, parts, (*notes, *shard_notes))


def _check_prefer(prefer: str | None, names: Collection[str], label: str) -> None:
    """Refuses a choice of weights in a file of one set, unless it is one of the models in it."""
    if prefer is not None and not names_part(prefer, names):
        raise BeitJaxError(f"{label} holds one set of weights, no {printable(prefer)}; leave --weights out")


def _open_file(path: Path, prefer: str | None) -> WeightFile:
    file = RandomAccessFile(path)
    try:
        kind = _recognise(file)
        if kind in ("zip", "pickle"):
            return PickleFile(file, zipped=kind == "zip", prefer=prefer)
        if kind == "arrays":
            return ArrayPickle(file, prefer)
        part = _READERS[kind](file)
        _check_prefer(prefer, part.tensors, file.label)
        if kind == "safetensors" and path.suffix in {".bin", ".pt", ".pth"}:
            part.notes.append(f"{printable(path.name)} is a safetensors file")
        return part
    except BaseException:
        file.close()
        raise


_READERS: Mapping[str, Callable[[RandomAccessFile], WeightFile]] = {
    "safetensors": SafetensorsFile,
    "msgpack": MsgpackFile,
    "hdf5": H5File,
    "keras": open_keras,
}


def _recognise(file: RandomAccessFile) -> Kind:
    """Returns the file type by the first bytes. Raises `BeitJaxError`, which says what other files are."""
    named = of_name(file.path.name)
    if named is not None:
        raise BeitJaxError(f"{file.label} is {named}")
    head = file.read(0, min(file.size, 512), "the first bytes")
    is_safetensors = head[8:9] == b"{" and head[4:8] == bytes(4)  # no text has zeros; no sane header is 4 GiB long
    is_pickle = head[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
    if head[:4] == b"PK\3\4" or (is_pickle and not is_safetensors):
        if file.path.suffix == ".safetensors":
            # The suffix promises that a file is data only.
            raise BeitJaxError(
                f"{file.label} is a PyTorch pickle, not safetensors; rename it to .bin to read it as one"
            )
        if head[:4] == b"PK\3\4":
            return "keras" if is_keras(head) else "zip"
        return "pickle" if is_legacy(head) else "arrays"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if not is_safetensors:
        stranger = of_bytes(head, file.path.suffix)
        if stranger is not None:
            raise BeitJaxError(f"{file.label} is {stranger}: expected a .safetensors or PyTorch weight file")
    if is_safetensors or file.path.suffix == ".safetensors":
        return "safetensors"
    if file.path.suffix == ".msgpack" and (head[0] & 0xF0 == 0x80 or head[0] in (0xDE, 0xDF)):  # a map
        return "msgpack"
    raise BeitJaxError(
        f"{file.label} is not a weight file: it starts with {printable(head[:8])}; "
        "expected safetensors or a file written by torch.save"
    )
