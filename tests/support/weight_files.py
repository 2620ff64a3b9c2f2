"""Weight files built byte by byte, good and broken, and what a refusal must look like."""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_jax.convert.files.checkpoint import Checkpoint, open_checkpoint
from beit_jax.errors import BeitJaxError


def read_all(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def refusal(path: Path, *needles: object, prefer: str | None = None) -> str:
    """The message with which opening, or at the latest reading, is refused: one printable line with all `needles`.

    A needle of text must stand outside the folders of `path`, which pytest names after the test.
    """
    with pytest.raises(BeitJaxError) as caught:
        read_all(open_checkpoint(path, prefer=prefer))
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 2000
    said = message
    for folder in (path, *path.parents[:-1]):
        said = said.replace(f"{folder}/", "")
    for needle in needles:
        assert str(needle) in (message if isinstance(needle, Path) else said)
    return said


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_bytes(header: Mapping[str, Any] | str | bytes, data: bytes = b"") -> bytes:
    """A file with this header, written as it is if it is text."""
    raw = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = raw.encode() if isinstance(raw, str) else raw
    return len(raw).to_bytes(8, "little") + raw + data


@dataclass
class Strided:
    """Pickles as the torch tensor that these numbers describe, whatever nonsense they are."""

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    numel: int
    offset: Any = 0
    key: str = "0"
    storage: type = torch.FloatStorage


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return ("storage", obj.storage, obj.key, "cpu", obj.numel) if isinstance(obj, _Bytes) else None

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, Strided):
            return NotImplemented
        storage = _Bytes(obj.storage, obj.key, obj.numel)
        return torch._utils._rebuild_tensor_v2, (storage, obj.offset, obj.shape, obj.strides, False, {})


@dataclass
class _Bytes:
    storage: type
    key: str
    numel: int


def torch_pickle(value: object, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(value)
    return stream.getvalue()


def write_zip(path: Path, pickled: bytes, storages: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path
