"""Batches of evaluation: every record once, in order, prepared by an image processor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import grain
import numpy as np

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages

from ..augmentation.decode import decode_own
from ..labels.targets import Target
from .workers import Batch, BatchStream

if TYPE_CHECKING:  # imports SciPy: a third of the time in which a worker process starts
    from beit_jax.images.bands import Selection
    from beit_jax.images.processor import ImageProcessor


class Images(Protocol):
    """Images to evaluate: a `datasets.Dataset`, or anything else that gives records by index."""

    @property
    def directory(self) -> Path: ...

    @property
    def target(self) -> Target: ...

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
    bad: BadImages | None = None,
) -> Iterator[Batch]:
    """Batches with every record once, in order. Every host gets equally many; the last batch is filled up.

    Args:
        batch_size: images of a step over all hosts.
        workers: as `DataOptions.workers`.
        bad: notes the records that cannot be read, whose rows are not valid; by default the first one is an error.

    Yields:
        "image" float32 [local, h, w, c], "label" (a `targets.Label` for every image: int32 [local], uint8 [local,
        classes] or float32 [local, values]), "index" int32 [local] (the record's; -1 in a row that only fills up),
        "valid" bool [local] (False in such a row); local = batch size / hosts.

    Raises:
        BeitJaxError: the hosts cannot share the batch size, or the processor gives images of different sizes; from
            iterating, a record cannot be read, or more than `bad` allows: a score must not leave one out silently.
    """
    local = _share(batch_size, process_index, process_count)
    if processor.crop is None and not isinstance(processor.resize, tuple):
        raise BeitJaxError(f"evaluation: images of one size make a batch, found: {processor.describe()}; add a crop")
    steps = -(-len(images) // batch_size)
    mine = grain.MapDataset.range(steps * batch_size)[process_index::process_count]
    leave_out = bad is not None and bad.share > 0
    read = _Evaluate(images, replace(processor, bands=None), processor.bands, leave_out)
    return _until_closed(mine.map(read).batch(local, drop_remainder=True), workers, read, bad)


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
    bands: "Selection"
    leave_out: bool

    def __call__(self, element: int) -> dict[str, Any]:
        fills = element >= len(self.images)
        index = int(element) % len(self.images)
        try:
            image, label, readable = *self._read(index), True
        except BeitJaxError:
            if not self.leave_out:
                raise
            image = self.processor(np.zeros((1, 1, self.processor.num_channels), np.uint8))[0]
            label, readable = self.images.target.nothing, False
        return {
            "image": image,
            "label": np.asarray(label, self.images.target.dtype),
            "index": np.int32(-1 if fills else element),
            "valid": np.bool_(readable and not fills),
        }

    def _read(self, index: int) -> tuple[np.ndarray, Any]:
        record = self.images[index]
        name = printable(record["file_name"])
        pixels = decode_own(record["image"], name, self.processor.num_channels, self.bands)
        return self.processor.one(pixels, name), record["label"]

    def reason(self, index: int) -> BeitJaxError:
        """Why a record cannot be read. Workers only say which: this process reads it again."""
        try:
            self._read(index)
        except BeitJaxError as error:
            return error
        return BeitJaxError(
            f"{printable(self.images.directory)}: image {index} could not be read at first, and can be read now, so no "
            "score would be repeatable; check the storage and the memory"
        )


def _until_closed(batches: Any, workers: int | None, read: "_Evaluate", bad: BadImages | None) -> Iterator[Batch]:
    stream = BatchStream(batches, workers, read.images.directory)
    try:
        for batch in stream:
            for index in batch["index"][~batch["valid"] & (batch["index"] >= 0)]:
                assert bad is not None  # else the worker has raised
                bad.note(int(index), read.reason(int(index)))
            yield batch
    finally:
        stream.close()
