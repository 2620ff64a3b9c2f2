"""Batches of evaluation: every record once, in order, prepared by an image processor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import grain
import numpy as np

from beit_jax.errors import BeitJaxError, printable

from ..augmentation.decode import decode
from .workers import Batch, BatchStream

if TYPE_CHECKING:  # imports SciPy: a third of the time in which a worker process starts
    from beit_jax.images.processor import ImageProcessor


class Images(Protocol):
    """Images to evaluate: a `datasets.Dataset`, or anything else that gives records by index."""

    @property
    def directory(self) -> Path: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def eval_batches(
    images: Images,
    processor: "ImageProcessor",
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Batches with every record once, in order. Every host gets equally many; the last batch is filled up.

    Args:
        batch_size: images of a step over all hosts.
        workers: as `DataOptions.workers`.

    Yields:
        "image" float32 [local, h, w, c], "label" int32 [local], "index" int32 [local] (the record's; -1 in a row that
        only fills up), "valid" bool [local] (False in such a row); local = batch size / hosts.

    Raises:
        BeitJaxError: the hosts cannot share the batch size, or the processor gives images of different sizes; from
            iterating, a record cannot be read: a score must not leave one out.
    """
    local = _share(batch_size, process_index, process_count)
    if processor.crop is None and not isinstance(processor.resize, tuple):
        raise BeitJaxError(f"evaluation: images of one size make a batch, found: {processor.describe()}; add a crop")
    steps = -(-len(images) // batch_size)
    mine = grain.MapDataset.range(steps * batch_size)[process_index::process_count]
    batches = mine.map(_Evaluate(images, processor)).batch(local, drop_remainder=True)
    return _until_closed(batches, workers, images.directory)


def _share(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise BeitJaxError(f"host {process_index}: expected 0 to {process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        raise BeitJaxError(f"a batch of {batch_size}: expected a multiple of the {process_count} hosts")
    return batch_size // process_count


@dataclass(frozen=True)
class _Evaluate:
    images: Images
    processor: "ImageProcessor"

    def __call__(self, element: int) -> dict[str, Any]:
        count = len(self.images)
        record, valid = self.images[int(element) % count], element < count
        image = decode(record["image"], printable(record["file_name"]))
        return {
            "image": self.processor(image)[0],
            "label": np.int32(record["label"]),
            "index": np.int32(element if valid else -1),
            "valid": np.bool_(valid),
        }


def _until_closed(batches: Any, workers: int | None, directory: Path) -> Iterator[Batch]:
    stream = BatchStream(batches, workers, directory)
    try:
        yield from stream
    finally:
        stream.close()
