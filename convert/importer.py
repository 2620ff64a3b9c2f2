"""A PyTorch checkpoint becomes Flax parameters: everything is planned and checked by name and shape, then bytes move.

Nothing is guessed: every tensor of the source is used or known to be derived, every leaf is filled exactly once.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from beit_jax.config import BeitConfig, hf_notes
from beit_jax.errors import BeitJaxError, printable
from beit_jax.heads import param_shapes
from beit_jax.hub import Source
from beit_jax.images import ImageProcessor, preset
from beit_jax.json_file import read_json
from beit_jax.output import check_destination, new_directory
from beit_jax.weights import (
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    LeafSpec,
    NativeCheckpoint,
    Progress,
    no_progress,
    save_json,
    verify,
    write_tensors,
)

from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
from .fit import FLOATS, check_fit
from .rules import Step, steps
from .tables import Naming, recognise

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = 1 << 21  # bytes laid out, hashed and written at a time: they stay in a core's cache between the three


@dataclass(frozen=True)
class Plan:
    """What an import will do, decided before any tensor is read.

    Attributes:
        steps, specs: for every leaf of the model, what fills it, and its shape and dtype.
        dropped: tensors of the source that are computed, not learned.
        notes: lines the user should see.
    """

    source: Source
    config: BeitConfig
    processor: ImageProcessor
    checkpoint: Checkpoint
    naming: Naming
    prefix: str
    steps: Mapping[str, Step]
    specs: Mapping[str, LeafSpec]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def provenance(self) -> dict[str, Any]:
        """What the native checkpoint records about its origin."""
        from beit_jax import __version__

        return {
            "source": self.source.name,
            "revision": self.source.revision,
            "files": [file.name for file in self.checkpoint.files],
            "format": self.checkpoint.format,
            "naming": self.naming.name,
            "converter": f"beit-jax {__version__}",
        }


def plan(source: Source, *, processor: ImageProcessor | None = None) -> Plan:
    """Reads names, shapes and configuration of a checkpoint in Hugging Face format and checks that they fit together.

    Args:
        processor: instead of the source's ``preprocessor_config.json``.

    Raises:
        BeitJaxError: unreadable files; a configuration of another family; tensors that are missing, unexpected, of
            another shape than the configuration says, or not floating point. Names the file and the tensors.
    """
    raw = read_json(source.directory / CONFIG)
    notes = hf_notes(raw, file=str(source.directory / CONFIG))
    checkpoint = open_checkpoint(source.path)
    naming, prefix = recognise(checkpoint.tensors.keys(), str(source.path))
    config = _complete_config(source, raw, checkpoint, prefix)
    planned = steps(_present(naming, config, prefix), param_shapes(config))
    dropped = tuple(name for name in checkpoint.tensors if naming.derived.search(name))
    expected = {name: shape for step in planned.values() for name, shape in step.torch_shapes()}
    check_fit(
        expected, checkpoint.tensors, set(dropped), config, f"{source.path}: does not fit {source.directory / CONFIG}"
    )
    specs = {path: LeafSpec(step.shape, _leaf_dtype(step, checkpoint.tensors)) for path, step in planned.items()}
    notes += [*checkpoint.notes, *_dtype_notes(planned, checkpoint.tensors)]
    if processor is None:
        processor, note = _processor(source, config)
        notes += note
    return Plan(source, config, processor, checkpoint, naming, prefix, planned, specs, dropped, tuple(notes))


def convert(
    source: Source,
    destination: Path,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    processor: ImageProcessor | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """Converts a checkpoint into a native one at `destination`, streaming: memory stays near one layer's tensors.

    The result is written aside, read back and compared with its digests, and only then renamed.

    Args:
        overwrite: replace an existing destination, which stays whole until the new one is complete.
        allow_nonfinite: accept NaN and infinite weights.
        progress: opened with the bytes to move, told of those done: every tensor is written once and verified once.

    Raises:
        BeitJaxError: as `plan`; NaN or infinite weights; a destination that cannot be written. Nothing is left behind.
    """
    check_destination(destination, overwrite=overwrite)
    decided = plan(source, processor=processor)
    with (
        decided.checkpoint,
        new_directory(destination, overwrite=overwrite, need_bytes=decided.nbytes) as directory,
        progress(2 * decided.nbytes) as advance,
    ):
        reader = _Reader(decided, allow_nonfinite)
        save_json(directory, decided.config, decided.processor)
        write_tensors(directory / WEIGHTS, decided.specs, reader.chunks, decided.provenance(), advance)
        verify(directory / WEIGHTS, advance)
    return decided


def load(source: Source, *, allow_nonfinite: bool = False) -> NativeCheckpoint:
    """Converts a checkpoint in memory.

    Raises:
        BeitJaxError: as `convert`.
    """
    decided = plan(source)
    with decided.checkpoint:
        reader = _Reader(decided, allow_nonfinite)
        params = {path: reader.leaf(path) for path in decided.steps}
    return NativeCheckpoint(decided.config, decided.processor, params, decided.provenance())


def _complete_config(source: Source, raw: dict[str, Any], checkpoint: Checkpoint, prefix: str) -> BeitConfig:
    """The configuration, with what ``config.json`` leaves open read from the tensors' names."""
    names, file = checkpoint.tensors.keys(), str(source.directory / CONFIG)
    if not raw.get("architectures"):
        family = "Data2VecVision" if raw.get("model_type") == "data2vec-vision" else "Beit"
        heads = {"classifier.weight": "ForImageClassification", "lm_head.weight": "ForMaskedImageModeling"}
        raw = raw | {"architectures": [family + next((heads[name] for name in heads if name in names), "Model")]}
    config = BeitConfig.from_hf(raw, file=file)
    # Only names can tell whether a bare encoder that pools the mean was saved with its pooling layer.
    if config.task == "features" and config.pooling == "mean":
        config = replace(config, add_pooling_layer=f"{prefix}pooler.layernorm.weight" in names)
    return config


def _present(naming: Naming, config: BeitConfig, prefix: str) -> Sequence[Any]:
    shapes = param_shapes(config)
    return [rule for rule in naming.rules(config, prefix) if rule.flax in shapes]


def _leaf_dtype(step: Step, tensors: Mapping[str, TensorInfo]) -> np.dtype[Any]:
    """bfloat16 stays; everything else is computed and kept in float32, which holds every float16 exactly."""
    stored = {tensors[name].dtype for names in step.layers for name in names}
    return _BFLOAT16 if stored == {_BFLOAT16} else np.dtype(np.float32)


def _dtype_notes(planned: Mapping[str, Step], tensors: Mapping[str, TensorInfo]) -> list[str]:
    used = [tensors[name] for step in planned.values() for names in step.layers for name in names]
    count = {dtype: sum(tensor.dtype == dtype for tensor in used) for dtype in FLOATS}
    said = {
        np.float16: "float16 widened to float32",
        np.float64: "float64 rounded to float32",
        _BFLOAT16: "kept bfloat16",
    }
    return [f"{count[np.dtype(dtype)]} tensors {what}" for dtype, what in said.items() if count[np.dtype(dtype)]]


def _processor(source: Source, config: BeitConfig) -> tuple[ImageProcessor, list[str]]:
    path = source.directory / PROCESSOR
    if path.exists():
        return ImageProcessor.from_file(path), []
    processor = preset("hf", config.image_size)
    return processor, [
        f"{path}: no such file; images will be prepared as published BEiT models: {processor.describe()}"
    ]


class _Reader:
    """Reads planned leaves layer by layer into reused buffers, one set per thread: fresh memory costs page faults."""

    def __init__(self, decided: Plan, allow_nonfinite: bool):
        self.plan, self.allow_nonfinite = decided, allow_nonfinite
        self.buffers = threading.local()

    def leaf(self, path: str) -> np.ndarray:
        """A whole leaf."""
        step, spec = self.plan.steps[path], self.plan.specs[path]
        out = np.empty(spec.shape, spec.dtype)
        for names, layer in zip(step.layers, out if step.rule.stacked else [out], strict=True):
            step.rule.op.load(self.parts(names, spec.dtype), 0, layer)
        return out

    def chunks(self, path: str) -> Iterator[np.ndarray]:
        """A leaf in pieces of some rows of a layer, always in the same buffer."""
        step, spec = self.plan.steps[path], self.plan.specs[path]
        count, *rest = step.layer_shape
        row_bytes = LeafSpec(tuple(rest), spec.dtype).nbytes
        size = max(1, _CHUNK // row_bytes)
        buffer = self.buffer("chunk", min(size, count) * row_bytes)
        for names in step.layers:
            parts = self.parts(names, spec.dtype)
            for start in range(0, count, size):
                rows = min(size, count - start)
                chunk = buffer[: rows * row_bytes].view(spec.dtype).reshape(rows, *rest)
                step.rule.op.load(parts, start, chunk)
                yield chunk

    def parts(self, names: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        """The torch tensors of one layer of a leaf, checked."""
        return [self.tensor(name, f"part {i}", dtype) for i, name in enumerate(names)]

    def tensor(self, name: str, buffer: str, dtype: np.dtype[Any]) -> np.ndarray:
        info = self.plan.checkpoint.tensors[name]
        size = LeafSpec(info.shape, info.dtype).nbytes
        stored = self.plan.checkpoint.read(name, self.buffer(buffer, size))
        if not self.allow_nonfinite:
            _check_finite(stored, name, info)
        if stored.dtype == dtype:
            return stored
        with np.errstate(over="ignore"):
            cast = stored.astype(dtype)
        if not self.allow_nonfinite and not _all_finite(cast):
            raise BeitJaxError(f"{info.file}: {printable(name)}: {stored.dtype} values beyond the range of {dtype}")
        return cast

    def buffer(self, name: str, size: int) -> np.ndarray:
        """A flat uint8 buffer of `size` bytes; valid until this thread asks for one of the same name again."""
        have: np.ndarray | None = getattr(self.buffers, name, None)
        if have is None or have.nbytes < size:
            have = np.empty(size, np.uint8)
            setattr(self.buffers, name, have)
        return have[:size]


def _all_finite(array: np.ndarray) -> bool:
    if array.dtype == np.float32:
        # One pass at memory speed; squares of finite values overflow only beyond 1e19, and then the slow way decides.
        flat = array.reshape(-1)
        if np.isfinite(np.dot(flat, flat)):
            return True
    return bool(np.isfinite(array.astype(np.float32) if array.dtype == _BFLOAT16 else array).all())


def _check_finite(array: np.ndarray, name: str, info: TensorInfo) -> None:
    if _all_finite(array):
        return
    bad = ~np.isfinite(array.astype(np.float64)).reshape(-1)
    first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))
    raise BeitJaxError(
        f"{info.file}: {printable(name)}: {int(bad.sum())} of {array.size} values are NaN or infinite, "
        f"the first at {list(first)}; repair the file, or pass --allow-nonfinite"
    )
