"""Random single-byte changes of small files of every kind that is read: refused, without effect, or a known lack.

    python benchmarks/mutations.py [--kinds zip png] [--changes 1000000] [--seed 0] [--json FILE]

Needs torch. A change gives one byte another value. Every changed file is read as users read it:
- "refused": one line says why (`BeitJaxError`);
- "equal": what is read is what the file held before the change;
- "unchecked": what is read differs where the format has nothing to tell it by. `UNCHECKED` names these places.
Everything else is a fault, and so are another exception, five seconds without an answer, and a process that dies. The
exit code is 1 if there was a fault. A change follows from the seed and its index; `--first INDEX --changes 1` repeats
one.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from beit_jax import BeitConfig, NativeCheckpoint, load, open_image, preset, save
from beit_jax.convert import export
from beit_jax.convert import load as load_foreign
from beit_jax.convert.files.checkpoint import open_checkpoint
from beit_jax.errors import BeitJaxError
from beit_jax.hub import CONFIG, WEIGHTS, Source
from beit_jax.models.build import param_shapes

PATIENCE = 5.0  # seconds without an answer
START = 120.0  # seconds until a new process has imported everything
SHOWN = 3  # faults of a kind that are printed
UNCHECKED = {
    "safetensors": "bytes of tensors",
    "legacy": "bytes of tensors",
    "zip": "nothing",
    "config": "numbers and names that no tensor contradicts",
    "png": "nothing",
    "native": "nothing",
    "native_config": "numbers and names that no tensor contradicts",
}
# What a config.json of a classifier says and none of its tensors can contradict.
FREE = {
    "layer_norm_eps", "labels", "drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "initializer_range", "layer_scale_init_value", "vocab_size",
}  # fmt: skip


class Subject(Protocol):
    """A file that is changed.

    Attributes:
        path: the file.
    """

    path: Path

    def judge(self) -> str:
        """Reads the file as it is now and compares it with what it held."""


class Weights:
    """A weight file of PyTorch in a directory of transformers' layout."""

    def __init__(self, directory: Path, kind: str) -> None:
        export(tiny(), directory, "hf")
        self.path = directory / "model.safetensors"
        if kind != "safetensors":
            state = load_file(self.path)
            self.path.unlink()
            self.path = directory / "pytorch_model.bin"
            torch.save(state, self.path, _use_new_zipfile_serialization=kind == "zip")
        self.source = Source(directory, directory.name)
        self.tensors, self.checked = self._tensors(), kind == "zip"
        self.loaded = load_foreign(self.source)

    def _tensors(self) -> dict[str, np.ndarray]:
        with open_checkpoint(self.source.path) as checkpoint:
            return {name: checkpoint.read(name) for name in checkpoint.tensors}

    def judge(self) -> str:
        found = self._tensors()
        different = _different_bytes(found, self.tensors)
        if different == 0:
            return "equal"
        if different == 1 and not self.checked:  # a name, a shape or a place that changed moves more than one byte
            return "unchecked"
        return _verdict(load_foreign(self.source), self.loaded)


class Native:
    """The tensors of a native checkpoint, or its config.json."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir()
        save(directory, tiny())
        self.directory, self.path = directory, directory / name
        self.loaded = load(directory)

    def judge(self) -> str:
        return _verdict(load(self.directory), self.loaded)


class Config:
    """The config.json of a directory in transformers' layout."""

    def __init__(self, directory: Path) -> None:
        export(tiny(), directory, "hf")
        self.path, self.source = directory / CONFIG, Source(directory, directory.name)
        self.loaded = load_foreign(self.source)
        self.config = BeitConfig.from_file(self.path)

    def judge(self) -> str:
        if BeitConfig.from_file(self.path) == self.config:
            return "equal"
        return _verdict(load_foreign(self.source), self.loaded)


class Picture:
    """A PNG of 8x8 pixels."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.path = directory / "digit.png"
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.path)
        self.pixels = np.asarray(open_image(self.path))

    def judge(self) -> str:
        return "equal" if np.array_equal(np.asarray(open_image(self.path)), self.pixels) else "different"


def subject(kind: str, scratch: Path) -> Subject:
    directory = scratch / kind
    if kind == "png":
        return Picture(directory)
    if kind == "config":
        return Config(directory)
    if kind.startswith("native"):
        return Native(directory, CONFIG if kind == "native_config" else WEIGHTS)
    return Weights(directory, kind)


def tiny() -> NativeCheckpoint:
    """A classifier of a few thousand random numbers."""
    config = BeitConfig(
        task="image_classification", image_size=(8, 8), patch_size=(4, 4), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=8, position_bias="per_layer", labels=("cat", "dog", "owl"),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in param_shapes(config).items()}
    return NativeCheckpoint(config, preset("hf", size=8), params)


def _different_bytes(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> int | None:
    """How many bytes of the tensors differ; None if their names, shapes or dtypes do."""
    kinds = [{name: (a.shape, a.dtype) for name, a in arrays.items()} for arrays in (found, expected)]
    if kinds[0] != kinds[1]:
        return None
    return sum(int(np.sum(a.view(np.uint8) != expected[name].view(np.uint8))) for name, a in found.items())


def _verdict(found: NativeCheckpoint, expected: NativeCheckpoint) -> str:
    """What a change of the file made of the model."""
    if _different_bytes(found.params, expected.params) != 0:
        return "different: tensors"
    configs = found.config, expected.config
    changed = {field.name for field in fields(BeitConfig) if len({getattr(c, field.name) for c in configs}) > 1}
    if found.processor != expected.processor:
        return "different: processor"
    if not changed:
        return "equal"
    return "unchecked" if changed <= FREE else f"different: {', '.join(sorted(changed - FREE))}"


@dataclass(frozen=True)
class Changes:
    """A stretch of the sequence of changes that a seed gives."""

    seed: int
    first: int
    count: int

    def of(self, content: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Returns the place and the new value of every change."""
        places, values = np.random.default_rng([self.seed, len(content)]).random((2, self.first + self.count))
        at = (places * len(content)).astype(np.int64)[self.first :]
        old = np.frombuffer(content, np.uint8)[at].astype(np.int64)
        return at, (old + 1 + (values[self.first :] * 255).astype(np.int64)) % 256


def work(kind: str, changes: Changes, answers: Connection) -> None:
    """Sends a verdict for every change, in order; a process of its own, because a reader may hang or die."""
    with tempfile.TemporaryDirectory() as scratch:
        target = subject(kind, Path(scratch))
        content = target.path.read_bytes()
        answers.send("ready")
        with open(target.path, "r+b", buffering=0) as file:
            for at, value in zip(*changes.of(content), strict=True):
                file.seek(at)
                file.write(bytes([value]))
                try:
                    verdict = target.judge()
                except BeitJaxError:
                    verdict = "refused"
                except Exception:
                    verdict = "exception: " + traceback.format_exc(limit=-3)
                file.seek(at)
                file.write(content[at : at + 1])
                answers.send((verdict, int(at)))


def measure(kind: str, seed: int, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """Counts the verdicts of all changes, and describes the faults."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    context = multiprocessing.get_context("spawn")
    index, started, shown = first, time.monotonic(), time.monotonic()
    while index < first + count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(kind, Changes(seed, index, first + count - index), theirs))
        process.start()
        theirs.close()
        trouble = "" if ours.poll(START) and ours.recv() == "ready" else "no start"
        while not trouble and index < first + count:
            if not ours.poll(PATIENCE):
                trouble = "hang"
                break
            try:
                verdict, at = ours.recv()
            except EOFError:
                trouble = "death"
                break
            name = verdict.partition(":")[0]
            counts[name] += 1
            if name in ("different", "exception"):
                faults.append(f"{kind}, change {index}, byte {at}: {verdict}")
            index += 1
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                rate = (index - first) / (shown - started)
                print(f"{kind}: {index - first:,} of {count:,}, {rate:.0f}/s, {dict(counts)}", file=sys.stderr)
        process.kill() if trouble else process.join()
        if trouble == "no start":
            raise SystemExit(f"{kind}: the process that reads it did not start")
        if trouble:
            counts[trouble] += 1
            faults.append(f"{kind}, change {index}: {trouble}")
            index += 1
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description="Read files with one changed byte.")
    parser.add_argument("--kinds", nargs="+", default=list(UNCHECKED), choices=list(UNCHECKED))
    parser.add_argument("--changes", type=int, default=1_000_000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="index of the first change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    bad = 0
    for kind in options.kinds:
        counts, faults = measure(kind, options.seed, options.first, options.changes)
        found[kind] = {"verdicts": dict(counts), "faults": faults[:100], "unchecked": UNCHECKED[kind]}
        allowed = {"refused", "equal"} | ({"unchecked"} if UNCHECKED[kind] != "nothing" else set())
        bad += sum(number for name, number in counts.items() if name not in allowed)
        print(f"{kind}: " + ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items())))
        for fault in faults[:SHOWN]:
            print("  " + fault.replace("\n", "\n    "))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
