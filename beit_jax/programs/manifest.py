"""``program.json``: what a program is, for people, for other programs, and for `beit_jax.load_program`.

It holds the SHA-256 of every other file of the program's directory, and its own. It imports no JAX.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from beit_jax.atomic import Contents
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR
from beit_jax.json_file import read_json, write_json

FORMAT: Final = "beit-jax program 1"
MANIFEST: Final = "program.json"
EXPORTED: Final = "program.jax_export"
WEIGHTS: Final = "weights.safetensors"
DIGESTED: Final = (EXPORTED, WEIGHTS, CONFIG, PROCESSOR)

_AGAIN: Final = "copy the directory again, or export the model again"


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Attributes:
        shape: numbers; names where a size is free ("b"); products of both ("16*h").
    """

    shape: tuple[int | str, ...]
    dtype: str

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.shape))}] {self.dtype}"


@dataclass(frozen=True)
class Manifest:
    """What a program is.

    Attributes:
        task: as in `BeitConfig`.
        dtype: what matrix products compute in. Weights are float32.
        inputs, outputs: by name. The weights come before the inputs.
        platforms: as `jax.export` names them.
        jax: the version that wrote the program.
        oldest_jax: the oldest version that can call it.
        calling_convention: as `jax.export` counts them.
        labels: the classes, in the order of the outputs.
        origin: where the weights are from, as far as it is public: hub name, revision, digests.
        files: the SHA-256 of every file, by its name.
    """

    task: str
    dtype: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    platforms: tuple[str, ...]
    jax: str
    oldest_jax: str
    calling_convention: int
    labels: tuple[str, ...]
    origin: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def batch(self) -> int | None:
        """The number of images of every call; None if it is free."""
        size = next(iter(self.inputs.values())).shape[0]
        return size if isinstance(size, int) else None


def size_of(dim: int | str, sizes: Mapping[str, int]) -> int:
    """A size of a shape, where the free ones are known: "16*h"."""
    found = 1
    for factor in str(dim).split("*"):
        found *= int(factor) if factor.isdecimal() else sizes[factor]
    return found


def is_program(path: str | Path) -> bool:
    """True if `path` is a directory that holds a program."""
    return (Path(path) / MANIFEST).is_file()


PROGRAM = Contents("program", (MANIFEST, *DIGESTED), is_program)
"""What an export of a program may replace."""


def write(directory: Path, manifest: Manifest) -> None:
    """Writes ``program.json`` with its own digest."""
    content = {"format": FORMAT, **asdict(manifest)}
    write_json(directory / MANIFEST, {**content, "digest": _digest(content)})


def read(directory: str | Path) -> Manifest:
    """Reads ``program.json``.

    Raises:
        BeitJaxError: it is missing, is of another format, was changed, or is not of the form that `write` gives it.
    """
    path = Path(directory) / MANIFEST
    if not is_program(directory):
        raise BeitJaxError(
            f"{printable(Path(directory))}: not a program (no {MANIFEST} in it); beit-jax export NATIVE DEST --to "
            "stablehlo writes one"
        )
    content = read_json(path)
    found = content.pop("digest", None)
    if content.get("format") != FORMAT:
        said = printable(content.get("format", "none"), 60)
        raise BeitJaxError(f'{printable(path)}: expected the format "{FORMAT}", found "{said}"; export the model again')
    if found != _digest(content):
        raise BeitJaxError(f"{printable(path)}: changed since it was written (its digest is another); {_AGAIN}")
    values: dict[str, Any] = {item.name: content.get(item.name) for item in fields(Manifest)}
    try:
        for side in ("inputs", "outputs"):
            values[side] = {name: Tensor(tuple(t["shape"]), t["dtype"]) for name, t in values[side].items()}
        for name in ("labels", "platforms"):
            values[name] = tuple(values[name])
        return Manifest(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise BeitJaxError(f"{printable(path)}: damaged ({printable(repr(error))}); {_AGAIN}") from None


def check_files(directory: str | Path, manifest: Manifest) -> None:
    """Compares every file with its recorded digest.

    Raises:
        BeitJaxError: a file is missing or is another one; names the first.
    """
    for name in DIGESTED:
        path, expected = Path(directory) / name, manifest.files.get(name)
        try:
            found = sha256(path)
        except OSError as error:
            raise BeitJaxError(f"{printable(path)}: cannot be read ({error.strerror}); {_AGAIN}") from None
        if found != expected:
            raise BeitJaxError(
                f"{printable(path)}: sha256 {printable(expected, 12)} expected, {found[:12]} found: damaged, or of "
                f"another program; {_AGAIN}"
            )


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
