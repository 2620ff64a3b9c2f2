"""Files of an exported checkpoint: safetensors as torch libraries expect them, and ``.pth``."""

import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from beit_jax.errors import BeitJaxError
from beit_jax.hub import CONFIG, PROCESSOR
from beit_jax.version import __version__

if TYPE_CHECKING:
    from beit_jax.weights.native import NativeCheckpoint


SAFETENSORS, PTH = "model.safetensors", "checkpoint.pth"
"""The files of weights; an export has one of them."""

SETTINGS = "config.py"
"""The model and its images as Open-MMLab's libraries read them, beside their weights, which hold its text too."""

_MARK = "beit_jax"
"""In every file of weights, so that an export is known as one. Who trains it further writes a file without it."""


def is_written_here(directory: Path, weights: Sequence[str] = (SAFETENSORS, PTH)) -> bool:
    """Returns True if the weights in a directory are those of an export, and `SETTINGS` is as it was written."""
    present = [directory / name for name in weights if os.path.lexists(directory / name)]
    settings = directory / SETTINGS
    try:
        text = settings.read_bytes() if os.path.lexists(settings) else b""
    except OSError:
        return False
    return bool(present) and all(_is_marked(path, text) for path in present)


def _is_marked(path: Path, text: bytes) -> bool:
    """True if a file of weights bears the mark, and holds a text."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                return _MARK in (file.metadata() or {})
        with zipfile.ZipFile(path) as archive:  # a pickle is not run to find a word in it
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
            read = [archive.read(entry) for entry in pickles if entry.file_size < _LONGEST_PICKLE]
            return any(_MARK.encode() in data and text in data for data in read)
    except (OSError, SafetensorError, zipfile.BadZipFile):
        return False


_LONGEST_PICKLE = 1 << 26  # bytes; it has names and shapes only


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes contiguous tensors with the metadata that transformers asks for, readable as the umask says.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", _MARK: __version__})
    except SafetensorError as error:  # it says only in its text what the system said
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    _sort_metadata(path)
    path.chmod(0o666 & ~_umask())  # the library writes for the owner alone


def _sort_metadata(path: Path) -> None:
    """Gives the metadata of a safetensors file an order: the library's own differs from call to call, and the bytes of
    an export should not."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length
        file.seek(8)
        file.write(text)


def write_pth(
    path: Path,
    wrapper: str,
    tensors: Mapping[str, np.ndarray],
    checkpoint: "NativeCheckpoint",
    entries: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``{wrapper: state dict}`` by `torch.save`, and what no tensor says as the text of two JSON files.

    Without that text the number of attention heads, labels, images and more would be lost.

    Args:
        entries: plain data that the layout keeps beside the weights.

    Raises:
        BeitJaxError: torch is not installed.
        OSError: the file cannot be written.
    """
    try:
        import torch
    except ImportError as error:
        raise BeitJaxError(f"writing a .pth file needs PyTorch ({error}): pip install 'beit-jax[torch]'") from None
    # torch has no constructor for NumPy's bfloat16: the bits go across as integers.
    as_torch = {
        name: torch.from_numpy(t.view(np.int16)).view(torch.bfloat16)
        if t.dtype.name == "bfloat16"
        else torch.from_numpy(t)
        for name, t in tensors.items()
    }
    texts = {CONFIG: json.dumps(checkpoint.config.to_hf()), PROCESSOR: json.dumps(checkpoint.processor.to_hf())}
    try:
        with path.open("wb") as file:
            torch.save({**(entries or {}), wrapper: as_torch, **texts}, file)
    except RuntimeError as error:  # torch's own, after the system's
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
