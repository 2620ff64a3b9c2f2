"""Files of an exported checkpoint: safetensors as torch libraries expect them, and ``.pth``."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from beit_jax.errors import BeitJaxError


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes contiguous tensors with the metadata that transformers asks for, readable as the umask says."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # the library writes for the owner alone


def write_pth(path: Path, wrapper: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes ``{wrapper: state dict}`` by `torch.save`.

    Raises:
        BeitJaxError: torch is not installed.
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
    torch.save({wrapper: as_torch}, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
