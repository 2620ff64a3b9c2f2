"""A PyTorch checkpoint becomes Flax parameters: first a plan, checked by names and shapes, and then the bytes.

Nothing is guessed: every tensor of the source is used, or known to be computed and not learned, and every leaf is
filled exactly once.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from beit_jax.atomic import check_destination, new_directory
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import WEIGHTS, Source, recorded_sha256
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.adapt import Adaptation, adaptations
from beit_jax.models.build import param_shapes
from beit_jax.terminal import Progress, no_progress
from beit_jax.weights.native import MODEL, NativeCheckpoint, save_json
from beit_jax.weights.tensors import LeafSpec, verify, write_tensors

from . import formats
from .files.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from .formats.format import SourceFormat
from .formats.rules import Step, steps
from .identify import identify
from .options import DEFAULT, Options
from .provenance import provenance
from .validation import FLOATS, check_tensors

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = 1 << 21  # bytes that are laid out, hashed and written while they are in the cache of a core
_HUGE = 1 << 23  # from this many bytes on, NumPy's memory comes in huge pages where the system has them


@dataclass(frozen=True)
class Plan:
    """The plan of an import, made before any tensor is read.

    Attributes:
        config: the model of the result.
        naming: the source format, a page of `formats`.
        prefix: what stands before the names of the backbone.
        steps: for every leaf of the model as it lies in the file, the tensors that fill it.
        specs: shape and dtype of every leaf of the result.
        adaptations: the leaves of the result that are made from other leaves, see `beit_jax.models.adapt`.
        dropped: tensors of the source that are computed and not learned, or that belong to a model around it.
        notes: lines for the user.
        digests: SHA-256 of every weight file, if it was asked for or is known.
    """

    source: Source
    config: BeitConfig
    processor: ImageProcessor
    checkpoint: Checkpoint
    naming: SourceFormat
    prefix: str
    steps: Mapping[str, Step]
    specs: Mapping[str, LeafSpec]
    adaptations: Mapping[str, tuple[tuple[str, ...], Adaptation]]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    options: Options
    digests: Mapping[str, str | None]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def provenance(self) -> dict[str, Any]:
        """Returns the origin of the weights, as the native checkpoint records it."""
        return provenance(self.source, self.checkpoint, self.naming.name, self.digests, self.options.asked())


def plan(source: Source, options: Options = DEFAULT) -> Plan:
    """Reads names, shapes and configuration of a checkpoint, and checks that they belong together.

    Raises:
        BeitJaxError: a file cannot be read; the model is of another family; tensors are missing, unexpected, of another
            shape than the configuration says, or not floating point. The message names the file and the tensors.
    """
    checkpoint = open_checkpoint(source.path, prefer=options.weights, format=options.format)
    try:
        return _plan(source, checkpoint, options)
    except BaseException:
        checkpoint.close()
        raise


def _plan(source: Source, checkpoint: Checkpoint, options: Options) -> Plan:
    digests = _digests(checkpoint, options)
    tensors = checkpoint.tensors
    found = identify(source, checkpoint, formats.FORMATS, variant=options.variant, image_preset=options.image_preset)
    naming, prefix = found.naming, found.prefix
    shapes = param_shapes(found.config)
    planned = steps([rule for rule in naming.rules(found.config, prefix) if rule.flax in shapes], shapes)
    dropped, notes = _left_out(naming, prefix, tensors)
    check_tensors(planned, tensors, set(dropped), found.config, str(source.path))
    target = _target(found.config, options)
    adapted = adaptations(found.config, target)
    specs = {
        path: LeafSpec(shape, _leaf_dtype([planned[name] for name in adapted.get(path, ((path,),))[0]], tensors))
        for path, shape in param_shapes(target).items()
    }
    processor = (
        found.processor.resized(target.image_size) if target.image_size != found.config.image_size else found.processor
    )
    notes = [*found.seen, *notes, *checkpoint.notes, *_dtype_notes(planned, tensors)]
    return Plan(
        source,
        target,
        processor,
        checkpoint,
        naming,
        prefix,
        planned,
        specs,
        adapted,
        dropped,
        tuple(notes),
        options,
        digests,
    )


def convert(
    source: Source,
    destination: Path,
    options: Options = DEFAULT,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Plan:
    """Converts a checkpoint into a native one at `destination`. Memory holds the tensors of one layer at a time.

    The result is written beside its destination, read back, compared with its digests, and then renamed.

    Args:
        overwrite: replace an existing destination, which stays whole until the new one is complete.
        progress: opened with the number of bytes to move, and called with each number of bytes that was moved. Every
            tensor counts twice: it is written and verified.

    Raises:
        BeitJaxError: as `plan`; NaN or infinite weights; a destination that cannot be written, or that is no model or
            holds the source. Nothing is left behind.
    """
    check_destination(destination, overwrite=overwrite, contents=MODEL, source=source.path)
    decided = plan(source, options)
    with (
        decided.checkpoint,
        new_directory(destination, overwrite=overwrite, contents=MODEL, need_bytes=decided.nbytes) as directory,
        progress(2 * decided.nbytes) as advance,
    ):
        save_json(directory, decided.config, decided.processor)
        write_tensors(directory / WEIGHTS, decided.specs, _Reader(decided).layers, decided.provenance(), advance)
        verify(directory / WEIGHTS, advance)
    return decided


def load(source: Source, options: Options = DEFAULT) -> NativeCheckpoint:
    """Converts a checkpoint in memory.

    Raises:
        BeitJaxError: as `convert`.
    """
    decided = plan(source, options)
    with decided.checkpoint:
        reader = _Reader(decided)
        params = {path: reader.leaf(path) for path in decided.specs}
    return NativeCheckpoint(decided.config, decided.processor, params, decided.provenance())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digests(checkpoint: Checkpoint, options: Options) -> dict[str, str | None]:
    """SHA-256 of the weight files. Only an expected digest can show a flipped bit in a safetensors file."""
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


def _target(config: BeitConfig, options: Options) -> BeitConfig:
    """The configuration of the result."""
    changes: dict[str, Any] = {}
    if options.position_bias:
        changes["position_bias"] = options.position_bias
    if options.position_resize:
        changes["position_resize"] = options.position_resize
    if options.patch_size:
        changes["patch_size"] = _pair(options.patch_size)
        changes["image_size"] = tuple(n * p for n, p in zip(config.grid, changes["patch_size"], strict=True))
    if options.image_size:
        changes["image_size"] = _pair(options.image_size)
    return replace(config, **changes)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _left_out(
    naming: SourceFormat, prefix: str, tensors: Mapping[str, TensorInfo]
) -> tuple[tuple[str, ...], list[str]]:
    """Tensors that are not this model's, and notes for the user about those that were learned."""
    derived = [name for name in tensors if naming.derived.search(name)]
    foreign = [name for name in tensors if naming.foreign.search(name)]
    host = [name for name in tensors if prefix in naming.hosts and not name.startswith(prefix)]
    notes = []
    if foreign:
        notes.append(f"{len(foreign)} tensors of heads that do not exist here left out: {printable(foreign[0])}, ...")
    if host:
        notes.append(f"encoder taken from {prefix!r}; {len(host)} tensors of the model around it left out")
    return tuple(sorted({*derived, *foreign, *host})), notes


def _leaf_dtype(steps: Sequence[Step], tensors: Mapping[str, TensorInfo]) -> np.dtype[Any]:
    """bfloat16 stays bfloat16. Any other dtype becomes float32, which holds every float16 exactly."""
    stored = {tensors[name].dtype for step in steps for names in step.layers for name in names}
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


class _Reader:
    """Reads planned leaves layer by layer. Threads use their buffers again, because fresh memory costs page faults."""

    def __init__(self, decided: Plan):
        self.plan, self.allow_nonfinite = decided, decided.options.allow_nonfinite
        self.buffers = threading.local()

    def leaf(self, path: str) -> np.ndarray:
        """Returns a whole leaf of the result."""
        if path in self.plan.adaptations:
            sources, adapt = self.plan.adaptations[path]
            return adapt({name: self.stored(name, self.plan.specs[path].dtype) for name in sources})
        return self.stored(path, self.plan.specs[path].dtype)

    def stored(self, path: str, dtype: np.dtype[Any]) -> np.ndarray:
        """Returns a whole leaf as it lies in the file."""
        step = self.plan.steps[path]
        out = np.empty(step.shape, dtype)
        for names, layer in zip(step.layers, out if step.rule.stacked else [out], strict=True):
            self.fill(step, names, self.parts(names, dtype), 0, layer)
        return out

    def layers(self, path: str) -> Iterator[Iterable[np.ndarray]]:
        """Yields the layers of a leaf of the result, each as pieces of some rows."""
        spec = self.plan.specs[path]
        if path in self.plan.adaptations or spec.nbytes <= _CHUNK:
            yield [self.leaf(path)]
            return
        step = self.plan.steps[path]
        for names in step.layers:
            yield self.chunks(step, names, spec.dtype)

    def chunks(self, step: Step, names: Sequence[str], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
        """Yields a layer of a leaf in pieces of some rows, always in the same buffer."""
        count, *rest = step.layer_shape
        row_bytes = LeafSpec(tuple(rest), dtype).nbytes
        size = max(1, _CHUNK // row_bytes)
        buffer = self.buffer("chunk", min(size, count) * row_bytes)
        parts = self.parts(names, dtype)
        for start in range(0, count, size):
            rows = min(size, count - start)
            chunk = buffer[: rows * row_bytes].view(dtype).reshape(rows, *rest)
            self.fill(step, names, parts, start, chunk)
            yield chunk

    def fill(self, step: Step, names: Sequence[str], parts: Sequence[np.ndarray], start: int, rows: np.ndarray) -> None:
        """Fills `rows` with a layer from row `start` on, and checks them while they are in the cache of a core."""
        step.rule.op.load(parts, start, rows)
        if self.allow_nonfinite or _all_finite(rows):
            return
        for name, part in zip(names, parts, strict=True):
            _check_finite(part, name, self.plan.checkpoint.tensors[name])

    def parts(self, names: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        """Reads the torch tensors of one layer of a leaf, one behind the other in the same buffer."""
        ends = list(accumulate(self.plan.checkpoint.tensors[name].nbytes for name in names))
        buffer = self.buffer("parts", ends[-1])
        return [
            self.tensor(name, buffer[start:end], dtype)
            for name, start, end in zip(names, [0, *ends], ends, strict=False)
        ]

    def tensor(self, name: str, buffer: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        info = self.plan.checkpoint.tensors[name]
        stored = self.plan.checkpoint.read(name, buffer)
        if stored.dtype == dtype:
            return stored
        if not self.allow_nonfinite:
            _check_finite(stored, name, info)
        with np.errstate(over="ignore"):
            cast = stored.astype(dtype)
        if not self.allow_nonfinite and not _all_finite(cast):
            raise BeitJaxError(f"{info.file}: {printable(name)}: {stored.dtype} values beyond the range of {dtype}")
        return cast

    def buffer(self, name: str, size: int) -> np.ndarray:
        """Returns a flat uint8 buffer of `size` bytes. The thread's next call with this name uses it again."""
        have: np.ndarray | None = getattr(self.buffers, name, None)
        if have is None or have.nbytes < size:
            have = np.empty(max(size, _HUGE), np.uint8)
            setattr(self.buffers, name, have)
        return have[:size]


def _all_finite(array: np.ndarray) -> bool:
    # `einsum` makes one pass at the speed of the cache, and without BLAS, whose threads would disturb the two of the
    # writer. A sum of finite values may overflow where values exceed 1e30; the slow way decides then.
    if array.dtype == np.float32 and np.isfinite(np.einsum("i->", array.reshape(-1))):
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
