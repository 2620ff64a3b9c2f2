"""The origin of converted weights, as a native checkpoint records it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, Source, recorded_sha256
from beit_jax.json_file import read_json
from beit_jax.version import __version__

from .options import Options

if TYPE_CHECKING:
    from .files.checkpoint import Checkpoint


def provenance(
    source: Source,
    checkpoint: "Checkpoint",
    naming: str,
    digests: Mapping[str, str | None],
    options: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Returns the record.

    Args:
        naming: the name of the source format.
        digests: SHA-256 of every weight file by its name, None where it is not known.
        options: the options that differ from their defaults.
    """
    return {
        "source": source.name,
        "revision": source.revision,
        "files": dict(digests),
        "format": checkpoint.format,
        "naming": naming,
        "options": dict(options),
        "converter": f"beit-jax {__version__}",
    }


def written_by(source: Source, checkpoint: "Checkpoint") -> str | None:
    """Returns the program that wrote a source, as far as its files say it; None where nothing does."""
    file, metadata = source.directory / CONFIG, checkpoint.metadata
    meta: Any = metadata.get("meta")
    content = read_json(file) if file.is_file() else {}
    versions: Any = {**metadata, **content, **(meta if isinstance(meta, Mapping) else {})}
    for key, program in _PROGRAMS.items():
        if key in versions:
            number = _COMMIT.sub("", versions[key]) if isinstance(versions[key], str) else ""
            return f"{program} {printable(number, 40)}" if number else program
    beside = [program for pattern, program in _BESIDE.items() if any(source.directory.glob(pattern))]
    named = [program for format, program in _LIBRARIES.items() if checkpoint.format.startswith(format)]
    framework = _FRAMEWORKS.get(str(metadata.get("format")))
    return next(iter([*beside, *named]), framework)


_COMMIT = re.compile(r"\+.*|[0-9a-f]{40}$", re.DOTALL)  # mmengine writes its own right behind the version
# By an entry of a file, or of its metadata; the value is the version.
_PROGRAMS = {
    "pytorch-lightning_version": "Lightning",
    "mmengine_version": "mmengine",
    "mmcv_version": "mmcv",
    "ds_version": "DeepSpeed",
    "transformers_version": "transformers",
    "keras_version": "Keras",
    "pretrained_cfg": "timm",
}
# By a file beside the weights.
_BESIDE = {
    "trainer_state.json": "transformers' Trainer",
    "random_states_*.pkl": "accelerate's save_state",
    ".metadata": "torch.distributed.checkpoint",
}

# By the type of the file, where no program names itself in it; by what safetensors' metadata calls the framework.
_LIBRARIES = {
    "pytorch": "PyTorch (torch.save)",
    "paddle": "Paddle (paddle.save)",
    "flax": "Flax",
    "pickle of arrays": "pickle, with arrays of NumPy",
}
_FRAMEWORKS = {
    "pt": "safetensors, from PyTorch",
    "tf": "safetensors, from TensorFlow",
    "np": "safetensors, from NumPy",
    "flax": "safetensors, from Flax",
    "pd": "safetensors, from Paddle",
}


def digests(checkpoint: "Checkpoint", options: Options) -> dict[str, str | None]:
    """Returns the SHA-256 of every weight file by its name, None where it is neither asked for nor known.

    Only an expected digest can show a flipped bit in a safetensors file.

    Raises:
        BeitJaxError: the digest of the file is not the expected one.
    """
    asked = options.sha256 or options.expect_sha256 is not None
    found = {file.name: _sha256(file) if asked else recorded_sha256(file) for file in checkpoint.files}
    expected = options.expect_sha256
    if expected is None:
        return found
    if len(found) > 1:
        raise BeitJaxError(f"{checkpoint.path}: --expect-sha256 is of one file, found {len(found)} shards")
    digest = found[checkpoint.files[0].name]
    if not expected or digest is None or not digest.startswith(expected.lower()):
        raise BeitJaxError(
            f"{checkpoint.files[0]}: sha256 {printable(expected)} expected, {digest} found; download the file again"
        )
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
