"""Reads damaged copies of files that other libraries wrote, in a process of its own: a reader in C may take it down.

    python tests/support/damage.py FOLDER TRUNCATIONS CHANGES < kinds

FOLDER is ``tests/convert/foreign``. A line of input names a file in it. For each damage of the file a line is written:
``[file, damage, verdict]``, where a verdict is "refused", "equal", "number" (one element of one tensor differs),
"order" (one tensor has its elements in another order), "data" (only the configuration differs), or what is wrong. A
damage follows from the file's name, its content and the index.
"""

import json
import re
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.convert import Options, load
from beit_jax.convert.files.checkpoint import open_checkpoint, open_weights
from beit_jax.errors import BeitJaxError
from beit_jax.hub import Source, resolve
from beit_jax.weights.native import NativeCheckpoint

MEMORY = 2**30  # bytes that a reader may have beyond the process that has read the whole file
PATIENCE = 5.0  # seconds for one file
IN_DIRECTORIES = (
    "model.safetensors",
    "tf_model.h5",
    "pytorch_model.bin",
    "flax_model.msgpack",
    ".index.json",
    ".metadata",
)
"""Files that are read by their directory, by the ends of their names."""


def files(folder: Path) -> list[str]:
    """Every file of weights in a folder, by its path in it; no arrays of NumPy, configurations, code, or state."""
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in found if is_weights(name)]


def is_weights(name: str) -> bool:
    """True for a file that holds weights, or says where they lie."""
    file = name.rpartition("/")[2]
    if file.endswith((".npy", ".py", ".pyc", ".pkl", ".txt", ".md")) or file == "optimizer.bin":
        return False
    return not file.endswith(".json") or file.endswith(".index.json")


def source_of(file: Path) -> Path:
    """What a user gives to read a file: the file, or its directory."""
    if file.name.endswith((".distcp", *IN_DIRECTORIES)) or list(file.parent.glob("*.index.json")):
        return file.parent
    return file


def options_of(file: Path) -> Options | None:
    """The options by which a file is read: those that its errors name; None for the part of something else."""
    options = Options()
    for _ in range(4):
        try:
            load(resolve(source_of(file)), options)
        except BeitJaxError as error:
            step = way_out(str(error), file)
            if step is None:
                return None
            options = replace(options, **step)
        else:
            return options
    return None


def way_out(error: str, file: Path) -> dict[str, Any] | None:
    """What an error says is missing; every model of these files has two heads."""
    if weights := re.search(r"--weights (\w+) or", error):
        return {"weights": weights[1]}
    if "--num-heads N" in error:
        return {"num_heads": 2}
    if "--config FILE" in error:
        return {"config": file.parents[1] / "config.json"}
    return None


@dataclass(frozen=True)
class Reading:
    """A file as it was read: a checkpoint, or tensors alone where it is the part of another."""

    options: Options | None
    held: NativeCheckpoint | dict[str, np.ndarray]
    opened: "Opened | None" = None


@dataclass(frozen=True)
class Opened:
    """The tensors of a file by its own names, and the plain data beside them: all that a conversion is planned by."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, object]


def read(file: Path, options: Options | None) -> NativeCheckpoint | dict[str, np.ndarray]:
    if options is not None:
        source = source_of(file)
        return load(Source(source, source.name), options)
    with open_weights(file) as weights:
        return {name: weights.read(name) for name in weights.tensors}


def opened(file: Path, options: Options) -> Opened:
    with open_checkpoint(source_of(file), prefer=options.weights) as weights:
        return Opened({name: weights.read(name).copy() for name in weights.tensors}, dict(weights.metadata))


def judged(file: Path, whole: Reading) -> str:
    """The verdict of a damaged file. A conversion is not repeated where nothing changed that plans it."""
    if whole.options is not None and whole.opened is not None:
        now = opened(file, whole.options)
        if now.metadata == whole.opened.metadata and (seen := verdict(now.tensors, whole.opened.tensors)) in _SMALL:
            return seen
    return verdict(read(file, whole.options), whole.held)


_SMALL = ("equal", "number")


def first(file: Path) -> Reading:
    """Reads a whole file; nothing of one that is told to be no weights."""
    options = options_of(file)
    try:
        return Reading(options, read(file, options), opened(file, options) if options is not None else None)
    except BeitJaxError:
        return Reading(options, {})


def verdict(found: NativeCheckpoint | dict[str, np.ndarray], old: NativeCheckpoint | dict[str, np.ndarray]) -> str:
    arrays = [each if isinstance(each, dict) else dict(each.params) for each in (found, old)]
    kinds = [{name: (array.shape, array.dtype) for name, array in each.items()} for each in arrays]
    if kinds[0] != kinds[1]:
        return "different: names, shapes or types"
    pairs = [(_bits(array), _bits(arrays[1][name])) for name, array in arrays[0].items()]
    changed = [(new, past, int((new != past).any(-1).sum())) for new, past in pairs if (new != past).any()]
    if changed:
        total = sum(count for *_, count in changed)
        same_values = len(changed) == 1 and sorted(map(bytes, changed[0][0])) == sorted(map(bytes, changed[0][1]))
        return "number" if total == 1 else "order" if same_values else f"different: {total} numbers"
    same = (
        isinstance(found, dict)
        or isinstance(old, dict)
        or (found.config, found.processor) == (old.config, old.processor)
    )
    return "equal" if same else "data"


def _bits(array: np.ndarray) -> np.ndarray:
    """[elements, bytes of one]"""
    return np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8)


def damages(name: str, content: bytes, truncations: int, changes: int) -> Iterator[tuple[str, bytes]]:
    """Yields what was done to a file, and what it is then."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    for length in draw.integers(1, len(content), truncations):
        yield f"cut to {length} bytes", content[:length]
    for _ in range(changes):
        at, more = int(draw.integers(len(content))), int(draw.integers(1, 256))
        yield f"byte {at} changed", content[:at] + bytes([(content[at] + more) % 256]) + content[at + 1 :]


def main(folder: Path, truncations: int, changes: int) -> None:
    for name in map(str.strip, sys.stdin):
        with tempfile.TemporaryDirectory() as scratch:
            top = Path(name).parts[0]
            shutil.copytree(folder / top, Path(scratch) / top)
            file = Path(scratch) / name
            content = file.read_bytes()
            whole = first(file)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
            for damage, damaged in damages(name, content, truncations, changes):
                print(json.dumps([name, damage, "begun"]), flush=True)
                file.unlink()
                file.write_bytes(damaged)
                started = time.process_time()
                try:
                    found = judged(file, whole)
                except BeitJaxError as error:
                    found = "refused" if "\n" not in str(error) else "a message of several lines"
                except Exception as error:
                    found = f"{type(error).__name__}: {error}"[:200]
                if time.process_time() - started > PATIENCE:
                    found = "too slow"
                print(json.dumps([name, damage, found]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
