"""Rows for images by the outputs of a model: prepared ahead, computed in batches, in order."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from typing import Any, Final

import numpy as np

from beit_jax.bulk.decoding import MANY, batches, default_workers
from beit_jax.bulk.images import Stored
from beit_jax.bulk.inputs import Listing
from beit_jax.bulk.tasks import Computing, Task
from beit_jax.errors import BeitJaxError
from beit_jax.images.bad_images import BadImages
from beit_jax.tables.schema import Part, Schema
from beit_jax.terminal import Progress, no_progress
from beit_jax.version import __version__

CHUNK: Final = 512  # images: some seconds of an accelerator, some minutes of a processor
CHUNK_BYTES: Final = 1 << 26  # of values in a chunk, which this process holds


@dataclass(frozen=True)
class Options:
    """How images are read and computed.

    Attributes:
        batch_size: images computed at once.
        chunk: images of a chunk, by default about `CHUNK`; a multiple of the batch size is taken.
        workers: processes that prepare images; None: half of the cores, none for few images.
        max_bad: the share of images that may be left out; 0: the first one that cannot be read is an error.
    """

    batch_size: int = 8
    chunk: int | None = None
    workers: int | None = None
    max_bad: float = 0.0


@dataclass(frozen=True)
class Work:
    """A task over images by a model."""

    computing: Computing
    task: Task
    listing: Listing
    options: Options = field(default_factory=Options)
    progress: Progress = no_progress

    @property
    def size(self) -> int:
        """Images of a batch."""
        return self.computing.size(self.options.batch_size, len(self.listing))

    @property
    def length(self) -> int:
        """Images of a chunk: a multiple of the batch size that is asked for, whatever devices there are."""
        asked = self.computing.batch or self.options.batch_size
        most = self.options.chunk
        if most is None:
            most = min(CHUNK, CHUNK_BYTES // max(1, 4 * prod(self.shape or ())))
        return max(1, -(-most // asked)) * asked

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the values of a row; None: it has none. Images of any size are taken to be of the model's."""
        config, processor = self.computing.config, self.computing.processor
        height, width = processor.crop or (
            processor.resize if isinstance(processor.resize, tuple) else config.image_size
        )
        tokens = 1 + (height // config.patch_size[0]) * (width // config.patch_size[1])
        full = (tokens, config.hidden_size) if self.task.output == "tokens" else (config.hidden_size,)
        return self.task.shape(full)

    def schema(self, shape: tuple[int, ...] | None) -> Schema:
        """The schema of the table."""
        metadata = {**self.computing.facts, **self.task.facts(), "version": __version__}
        if shape is not None:
            metadata["shape"] = list(shape)
        return Schema(self.task.columns, shape, self.options.max_bad > 0, metadata)

    @property
    def max_bad(self) -> float:
        """The share of images that may be left out."""
        return self.options.max_bad

    def contract(self) -> dict[str, Any]:
        """What rows depend on besides the schema's metadata and the images."""
        return {"batch size": self.size}

    # --- Rows -----------------------------------------------------------------------------------------------------

    def parts(self, ranges: Iterable[tuple[int, int]], bad: BadImages) -> Generator[Part, None, None]:
        """Computes the rows of these places; yields a part for every range.

        Args:
            bad: notes images that cannot be read, or raises.
        """
        asked = list(ranges)
        workers = self.options.workers
        images = sum(stop - start for start, stop in asked)
        found: list[Part] = []
        ends = iter(asked)
        start, stop = next(ends, (0, 0))
        done = start
        groups = (group for each in asked for group in self._groups(*each))
        prepared = batches(
            self.computing.processor,
            groups,
            size=self.size,
            workers=default_workers(images) if workers is None else workers,
            quick=images >= MANY,
        )
        with self.progress(images) as advance:
            for names, errors, outputs in self._outputs(prepared):
                for place, error in enumerate(errors, done):
                    if error is not None:
                        bad.note(place, BeitJaxError(error))
                found.append(self.task.part(names, errors, outputs))
                done += len(names)
                advance(len(names))
                if done == stop:
                    yield _joined(found)
                    found = []
                    start, stop = next(ends, (0, 0))
                    done = start

    def _groups(self, start: int, stop: int) -> Iterator[list[Stored]]:
        images = self.listing.images(start, stop)
        while group := list(islice(images, self.size)):
            yield group

    def _outputs(self, prepared: Iterator[Any]) -> Iterator[tuple[Sequence[str], Sequence[str | None], np.ndarray]]:
        """The outputs of every batch; the next batch is sent before an output is waited for."""
        pending: deque[tuple[Any, Any]] = deque()
        for batch in prepared:
            readable = any(error is None for error in batch.errors)
            output = self.computing.compute(batch.pixels, self.task.output) if readable else None
            pending.append((batch, output))
            if len(pending) > 1:
                yield self._fetched(*pending.popleft())
        while pending:
            yield self._fetched(*pending.popleft())

    def _fetched(self, batch: Any, output: Any) -> tuple[Sequence[str], Sequence[str | None], np.ndarray]:
        if output is None:  # no image of the batch can be read
            return batch.names, batch.errors, np.zeros((len(batch), *(self.shape or (1,))), np.float32)
        return batch.names, batch.errors, np.asarray(output)[: len(batch)]


def _joined(parts: Sequence[Part]) -> Part:
    """The rows of several batches.

    Raises:
        BeitJaxError: their values differ in shape, because the images do.
    """
    rows = [row for part in parts for row in part.rows]
    if parts[0].values is None:
        return Part(rows)
    shapes = sorted({part.values.shape[1:] for part in parts if part.values is not None and len(part.kept())})
    if len(shapes) > 1:
        found = " and ".join(str(list(shape)) for shape in shapes[:3])
        raise BeitJaxError(f"images: expected features of one shape, found {found}; resize or crop the images")
    shape = shapes[0] if shapes else parts[0].values.shape[1:]
    values = [np.zeros((len(part), *shape), np.float32) if not len(part.kept()) else part.values for part in parts]
    return Part(rows, np.concatenate([part for part in values if part is not None]))
