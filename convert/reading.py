"""The bytes of an import: leaves are read from their tensors, checked, and written as a native weight file.

Models and tokenizers are imported by this module alike.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.adapt import Adaptation
from beit_jax.terminal import Advance
from beit_jax.weights.tensors import LeafSpec, verify, write_tensors

from .files.weight_file import TensorInfo
from .formats.rules import Step

if TYPE_CHECKING:
    from .files.checkpoint import Checkpoint

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CHUNK = 1 << 22  # bytes that are laid out, hashed and written while they are in the cache
_TILES = 256  # rows of a piece are a multiple of this: a transposition by whole tiles takes two thirds of the time
_HUGE = 1 << 23  # from this many bytes on, NumPy's memory comes in huge pages where the system has them


@dataclass(frozen=True)
class LeafReader:
    """Reads planned leaves layer by layer. Threads use their buffers again, because fresh memory costs page faults.

    Attributes:
        steps: for every leaf of the model as it lies in the file, the tensors that fill it.
        specs: shape and dtype of every leaf of the result.
        adaptations: the leaves of the result that are made from other leaves, see `beit_jax.models.adapt`.
        allow_nonfinite: accept NaN and infinite weights.
    """

    checkpoint: "Checkpoint"
    steps: Mapping[str, Step]
    specs: Mapping[str, LeafSpec]
    adaptations: Mapping[str, tuple[tuple[str, ...], Adaptation]] = field(default_factory=dict)
    allow_nonfinite: bool = False
    _buffers: threading.local = field(default_factory=threading.local, repr=False)

    def write(self, path: Path, provenance: Mapping[str, Any], advance: Advance) -> None:
        """Writes all leaves as a native weight file, reads it back and compares it with its digests.

        Args:
            advance: is called with the number of bytes of each piece twice: when it is written and when it is verified.
        """
        write_tensors(path, self.specs, self.layers, provenance, advance)
        verify(path, advance)

    def params(self) -> dict[str, np.ndarray]:
        """Returns all leaves of the result in memory."""
        return {path: self.leaf(path) for path in self.specs}

    def leaf(self, path: str) -> np.ndarray:
        """Returns a whole leaf of the result."""
        if path in self.adaptations:
            sources, adapt = self.adaptations[path]
            return adapt({name: self._stored(name, self.specs[path].dtype) for name in sources})
        return self._stored(path, self.specs[path].dtype)

    def _stored(self, path: str, dtype: np.dtype[Any]) -> np.ndarray:
        """Returns a whole leaf as it lies in the file."""
        step = self.steps[path]
        out = np.empty(step.shape, dtype)
        for names, layer in zip(step.layers, out if step.rule.stacked else [out], strict=True):
            self._fill(step, names, self._parts(names, dtype), 0, layer)
        return out

    def layers(self, path: str) -> Iterator[Iterable[np.ndarray]]:
        """Yields the layers of a leaf of the result, each as pieces of some rows."""
        spec = self.specs[path]
        if path in self.adaptations or spec.nbytes <= _CHUNK:
            yield [self.leaf(path)]
            return
        step = self.steps[path]
        for names in step.layers:
            yield self._chunks(step, names, spec.dtype)

    def _chunks(self, step: Step, names: Sequence[str], dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
        """Yields a layer of a leaf in pieces of some rows, always in the same buffer."""
        count, *rest = step.layer_shape
        row_bytes = LeafSpec(tuple(rest), dtype).nbytes
        size = max(1, _CHUNK // row_bytes)
        size -= size % _TILES if size > _TILES else 0
        buffer = self._buffer("chunk", min(size, count) * row_bytes)
        parts = self._parts(names, dtype)
        for start in range(0, count, size):
            rows = min(size, count - start)
            chunk = buffer[: rows * row_bytes].view(dtype).reshape(rows, *rest)
            self._fill(step, names, parts, start, chunk)
            yield chunk

    def _fill(
        self, step: Step, names: Sequence[str], parts: Sequence[np.ndarray], start: int, rows: np.ndarray
    ) -> None:
        """Fills `rows` with a layer from row `start` on, and checks them while they are in the cache of a core."""
        step.rule.op.load(parts, start, rows)
        if self.allow_nonfinite or _all_finite(rows):
            return
        for name, part in zip(names, parts, strict=True):
            _check_finite(part, name, self.checkpoint.tensors[name])

    def _parts(self, names: Sequence[str], dtype: np.dtype[Any]) -> list[np.ndarray]:
        """Reads the torch tensors of one layer of a leaf, one behind the other in the same buffer."""
        ends = list(accumulate(self.checkpoint.tensors[name].nbytes for name in names))
        buffer = self._buffer("parts", sum(ends[-1:]))
        return [
            self._tensor(name, buffer[start:end], dtype)
            for name, start, end in zip(names, [0, *ends], ends, strict=False)
        ]

    def _tensor(self, name: str, buffer: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        info = self.checkpoint.tensors[name]
        stored = self.checkpoint.read(name, buffer)
        if stored.dtype == dtype:
            return stored
        if not self.allow_nonfinite:
            _check_finite(stored, name, info)
        with np.errstate(over="ignore"):
            cast = stored.astype(dtype)
        if not self.allow_nonfinite and not _all_finite(cast):
            raise BeitJaxError(f"{info.file}: {printable(name)}: {stored.dtype} values beyond the range of {dtype}")
        return cast

    def _buffer(self, name: str, size: int) -> np.ndarray:
        """Returns a flat uint8 buffer of `size` bytes. The thread's next call with this name uses it again."""
        have: np.ndarray | None = getattr(self._buffers, name, None)
        if have is None or have.nbytes < size:
            have = np.empty(max(size, _HUGE), np.uint8)
            setattr(self._buffers, name, have)
        return have[:size]


def _all_finite(array: np.ndarray) -> bool:
    # `einsum` makes one pass at the speed of the cache, and without BLAS, whose threads would disturb the two of the
    # writer. A sum of finite values may overflow where values exceed 1e30; the slow way decides then.
    if array.dtype == np.float32 and np.isfinite(np.einsum("i->", array.reshape(-1))):
        return True
    return bool(np.isfinite(array.astype(np.float32) if array.dtype == BFLOAT16 else array).all())


def _check_finite(array: np.ndarray, name: str, info: TensorInfo) -> None:
    if _all_finite(array):
        return
    with np.errstate(invalid="ignore"):  # a signalling NaN, which a warning would tell beside the error
        bad = ~np.isfinite(array.astype(np.float64)).reshape(-1)
    first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))
    raise BeitJaxError(
        f"{info.file}: {printable(name)}: {int(bad.sum())} of {array.size} values are NaN or infinite, "
        f"the first at {list(first)}; repair the file, or pass --allow-nonfinite"
    )
