"""Batches of training: a prepared data set in shuffled order, augmented, read through Grain.

The batch of step s is a pure function of (seed, s). Hosts, worker processes and threads only divide the work: the
images of a batch, their augmentation and their order do not depend on them. A run resumes from its step alone.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Union, cast, overload

import grain
import numpy as np
import xxhash
from jaxtyping import Int

from beit_jax.errors import BeitJaxError
from beit_jax.images.label_maps import LabelMap

from ..augmentation.classification import Transform
from ..augmentation.decode import Pixels
from ..augmentation.views import ViewsTransform
from ..recipe import DataOptions
from .datasets import Dataset, SegmentationDataset
from .workers import Batch, BatchStream

if TYPE_CHECKING:  # imports SciPy: a third of the time in which a worker process starts
    from ..augmentation.segmentation import SegmentationTransform

REPLACEMENTS: Final = 16
"""Records that are tried in place of one that cannot be read."""

AnyTransform = Union[Transform, ViewsTransform, "SegmentationTransform"]


@dataclass
class BadRecords:
    """The records that could not be read so far.

    Attributes:
        limit: the number of records that may be unreadable.
        reasons: by index of an unreadable record, one line that names it; in the order in which they were found.
        replaced: how many images were replaced by others; an unreadable record counts once an epoch.
    """

    limit: int
    reasons: dict[int, str] = field(default_factory=dict)
    replaced: int = 0


class Batches(Iterator[Batch]):
    """Training batches of this host, without end. `bad` lists the records that had to be replaced.

    After an error the iterator stays ended: going on would silently shift every later batch.
    """

    def __init__(self, stream: BatchStream, dataset: Dataset | SegmentationDataset, max_bad: float):
        self.bad = BadRecords(int(max_bad * len(dataset)))
        self._stream, self._dataset, self._max_bad = stream, dataset, max_bad

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            BeitJaxError: more records are unreadable than allowed, or reading failed.
        """
        batch = next(self._stream)
        indices, failures = batch.pop("index"), batch.pop("failures")
        for slot in np.flatnonzero(failures):
            tried = itertools.islice(_candidates(int(indices[slot]), len(self._dataset)), int(failures[slot]))
            for record in tried:
                self._note(record)
            self.bad.replaced += 1
        return batch

    def _note(self, record: int) -> None:
        bad = self.bad
        if record in bad.reasons:
            return
        bad.reasons[record] = reason = self._reason(record)
        if len(bad.reasons) > bad.limit:
            self._stream.close()
            count = f"{len(bad.reasons)} of {len(self._dataset)} records cannot be read"
            raise BeitJaxError(f"{count}, --data.max-bad {self._max_bad:g} allows {bad.limit}; the last: {reason}")

    def _reason(self, record: int) -> str:
        try:
            self._dataset.load(record)
        except BeitJaxError as error:
            return str(error)
        self._stream.close()
        raise BeitJaxError(
            f"{self._dataset.where(record)}: could not be read at first, and can be read now, so no run would be "
            "repeatable; check the storage and the memory"
        )


@overload
def train_batches(
    dataset: Dataset,
    options: DataOptions,
    transform: Transform | ViewsTransform,
    *,
    seed: int,
    start_step: int,
    rows: Int[np.ndarray, " local"] | None = None,
) -> AbstractContextManager[Batches]: ...


@overload
def train_batches(
    dataset: SegmentationDataset,
    options: DataOptions,
    transform: "SegmentationTransform",
    *,
    seed: int,
    start_step: int,
    rows: Int[np.ndarray, " local"] | None = None,
) -> AbstractContextManager[Batches]: ...


@contextmanager
def train_batches(
    dataset: Dataset | SegmentationDataset,
    options: DataOptions,
    transform: AnyTransform,
    *,
    seed: int,
    start_step: int,
    rows: Int[np.ndarray, " local"] | None = None,
) -> Iterator[Batches]:
    """Yields the batches of this host from `start_step` on: the rows of every global batch that this host reads.

    Every epoch is a new permutation of the records. Every image of an epoch is transformed with its own random numbers.
    A batch may reach into the next epoch. A record that cannot be read is replaced by another record, which is a
    function of its index alone; `Batches.bad` names it.

    Args:
        rows: row numbers in a global batch, from `sharding.batch_rows`; by default all rows.

    Yields:
        "image" uint8 [local, h, w, 3] as `transform` makes it, and "label": a `targets.Label` for every image (int32
        [local], uint8 [local, classes] or float32 [local, values]), or int32 [local, h, w] for label maps. A
        `ViewsTransform` makes other views instead of the label. local = len(rows).

    Raises:
        BeitJaxError: a seed out of range; from iterating, more unreadable records than `options.max_bad` or
            REPLACEMENTS in a row, or storage or workers that fail.
    """
    rows = np.arange(options.batch_size) if rows is None else rows
    if not 0 <= seed < 2**32:
        raise BeitJaxError(f"--run.seed: expected 0 to {2**32 - 1}, found {seed}")
    # Random numbers follow from the position in the whole sequence. If the sequence were divided among hosts before
    # that, hosts would repeat each other's numbers.
    images = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat(None)
    images = images.random_map(_LoadAndTransform(dataset, _paired_transform(dataset, transform)))
    mine = _Rows(images, start_step, options.batch_size, rows)
    stream = BatchStream(mine.batch(len(rows), drop_remainder=True), options.workers, dataset.directory)
    try:
        yield Batches(stream, dataset, options.max_bad)
    finally:
        stream.close()


class _Rows(grain.MapDataset[Any]):  # type: ignore[misc]  # Grain has no types
    """An endless sequence of images, cut into batches, of which only some rows are kept, from a step on."""

    def __init__(self, images: Any, start_step: int, batch_size: int, rows: Int[np.ndarray, " local"]):
        super().__init__(images)
        self._start_step, self._batch_size, self._rows = start_step, batch_size, rows

    def __len__(self) -> int:
        return (len(self._parent) // self._batch_size - self._start_step) * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(int(index), len(self._rows))
        return self._parent[(self._start_step + step) * self._batch_size + int(self._rows[row])]


def _candidates(index: int, count: int) -> Iterator[int]:
    """A record, and then the records that replace it, in the order in which they are tried."""
    yield index
    for attempt in itertools.count(1):
        yield xxhash.xxh3_64_intdigest(f"{index} {attempt}".encode()) % count


# (image, its class or label map, generator) -> the arrays of the batch, by name
_PairedTransform = Callable[[Pixels, Any, np.random.Generator], dict[str, Any]]


@dataclass(frozen=True)
class _ImageOnly:
    """Transforms the image and keeps its label, whatever the data say."""

    transform: Transform

    def __call__(self, image: Pixels, label: Any, rng: np.random.Generator) -> dict[str, Any]:
        return {"image": self.transform(image, rng), "label": label}


@dataclass(frozen=True)
class _ImageAndMap:
    """Transforms the image and its label map together."""

    transform: "SegmentationTransform"

    def __call__(self, image: Pixels, labels: LabelMap, rng: np.random.Generator) -> dict[str, Any]:
        pixels, changed = self.transform(image, labels, rng)
        return {"image": pixels, "label": changed}


@dataclass(frozen=True)
class _Views:
    """Makes views of the image, and drops its class."""

    transform: ViewsTransform

    def __call__(self, image: Pixels, label: Any, rng: np.random.Generator) -> dict[str, Any]:
        return dict(self.transform(image, rng))


def _paired_transform(dataset: Dataset | SegmentationDataset, transform: AnyTransform) -> _PairedTransform:
    if isinstance(dataset, SegmentationDataset):
        return _ImageAndMap(cast("SegmentationTransform", transform))
    if isinstance(transform, ViewsTransform):
        return _Views(transform)
    return _ImageOnly(cast(Transform, transform))


@dataclass(frozen=True)
class _LoadAndTransform:
    """Loads the record of an index, or the first of its replacements that can be read, and transforms it."""

    dataset: Dataset | SegmentationDataset
    transform: _PairedTransform

    def __call__(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        index, reason = int(element), ""
        for failures, record in enumerate(itertools.islice(_candidates(index, len(self.dataset)), REPLACEMENTS)):
            try:
                image, label = self.dataset.load(record)
            except BeitJaxError as error:
                reason = str(error)
                continue
            arrays = self.transform(image, label, rng)
            return {**arrays, "index": np.int64(index), "failures": np.int32(failures)}
        raise BeitJaxError(f"{REPLACEMENTS} records in a row cannot be read; the last: {reason}")
