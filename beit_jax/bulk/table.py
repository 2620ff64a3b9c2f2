"""Makes the chunks of a table that are this process's, and joins all of them where none is missing."""

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from beit_jax.atomic import check_file, check_place
from beit_jax.bulk.chunks import Chunks, Header, explained, folder_of, is_begun
from beit_jax.bulk.inputs import Listing
from beit_jax.errors import BeitJaxError, Note, printable
from beit_jax.images.bad_images import BadImages, check_bad
from beit_jax.lock import InUse, exclusive
from beit_jax.tables.schema import Part, Schema
from beit_jax.tables.writing import format_of
from beit_jax.terminal import say

PAUSE: Final = 0.5  # seconds between two looks for the chunks of other processes


class Making(Protocol):
    """Makes the rows of a table."""

    @property
    def listing(self) -> Listing: ...

    @property
    def length(self) -> int:
        """Images of a chunk."""

    @property
    def max_bad(self) -> float:
        """The share of images that may be left out; 0: none."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the values of a row; None: it has none."""

    def schema(self, shape: tuple[int, ...] | None) -> Schema:
        """The schema of the table."""

    def contract(self) -> Mapping[str, Any]:
        """What rows depend on besides the schema's metadata and the images, for JSON."""

    def parts(self, ranges: Sequence[tuple[int, int]], bad: BadImages) -> Generator[Part, None, None]:
        """Makes the rows of these places, and yields a part for every range.

        Args:
            bad: notes images that cannot be read, or raises.
        """


@dataclass(frozen=True)
class Host:
    """Which of the processes this is that share a task; chunk k is that of process k mod `count`.

    Attributes:
        waits: the processes end together: 0 joins the table when all chunks are there, the others wait for it.
            Otherwise whoever makes the last chunk joins it.
    """

    index: int = 0
    count: int = 1
    waits: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a table.

    Attributes:
        images: of all processes.
        shape: of the values of all rows that have some, [n, ...]; None: rows have none.
        bad: why images could not be read, in order.
        missing: chunks that other processes have not made yet; the table exists if there are none.
    """

    images: int
    shape: tuple[int, ...] | None
    bad: Sequence[str] = ()
    missing: Sequence[int] = ()


@dataclass(frozen=True)
class Table:
    """A table in a file.

    Attributes:
        making: makes its rows.
        output: the file.
        finish: called before the table gets its name, as what belongs to it should be there first.
        discard: called where nothing is kept after an error.
    """

    making: Making
    output: Path
    host: Host = field(default_factory=Host)
    finish: Callable[[], None] = lambda: None
    discard: Callable[[], None] = lambda: None

    @property
    def listing(self) -> Listing:
        """The images."""
        return self.making.listing

    def make(self) -> Outcome:
        """Makes the table, or goes on with it: this process's chunks, and the table itself if no other is missing.

        Raises:
            BeitJaxError: the output cannot be written, was begun with other options or images, or is being made by
                another process; an image cannot be read, or more than `max_bad` allows.
        """
        output = self.output
        check_output(output, self.listing)
        format_of(output).checked(printable(output), self.making.schema(self.making.shape))
        if self.host.count > 1 and output.exists() and not is_begun(output):
            raise BeitJaxError(
                f"{printable(output)}: already exists, and other processes may be done with it; remove it or choose "
                "another name"
            )
        chunks = Chunks(output, self.listing, self.making.length)
        there = chunks.open(self._contract())
        try:
            lock = chunks.folder / f".process-{self.host.index}-of-{self.host.count}.lock"
            with explained(output), exclusive(lock, output, remove=True):
                self._own(chunks, there)
        except (BeitJaxError, KeyboardInterrupt) as error:
            self._explain(chunks, error)
            raise
        return self._end(chunks)

    def _contract(self) -> dict[str, Any]:
        """All that the chunks depend on."""
        return {
            **self.making.schema(None).metadata,
            "images": len(self.listing),
            "names": self.listing.names_digest(),
            **self.making.contract(),
            "chunk": self.making.length,
        }

    def _own(self, chunks: Chunks, there: bool) -> None:
        """Makes those chunks of this process that are not there."""
        bad = BadImages(len(self.listing), self.making.max_bad)
        todo, done = [], 0
        for chunk in range(self.host.index, len(chunks), self.host.count):
            start, stop = chunks.range(chunk)
            header = chunks.header(chunk) if there else None
            if header is None or (header.bad and not self.making.max_bad):
                todo.append(chunk)
                continue
            done += stop - start
            bad.reasons.update({start + place: reason for place, reason in header.bad.items()})
        if done:
            say(f"{printable(chunks.output)}: going on after {done:,} images that are done")
        inputs = (chunks.listing.digest(*chunks.range(chunk)) for chunk in todo)
        with closing(self.making.parts([chunks.range(chunk) for chunk in todo], bad)) as made:
            for chunk, part in zip(todo, made, strict=True):
                chunks.write(chunk, part, next(inputs))

    def _explain(self, chunks: Chunks, error: BaseException) -> None:
        """Says after an error what is kept; keeps nothing if nothing is done."""
        kept = len(chunks) - len(chunks.missing())
        if not kept and self.host.count == 1 and not isinstance(error, InUse):
            chunks.remove()
            self.discard()
        elif kept:
            where = printable(chunks.folder)
            error.add_note(Note(f"{kept:,} of {len(chunks):,} parts are kept in {where}: the same command goes on"))

    def _end(self, chunks: Chunks) -> Outcome:
        """Joins the table where all chunks are there, or says which are missing."""
        images = len(self.listing)
        while missing := chunks.missing():
            if not chunks.begun:
                return Outcome(images, None)
            if not self.host.waits:
                return Outcome(images, None, missing=tuple(missing))
            time.sleep(PAUSE)
        while self.host.waits and self.host.index and chunks.begun:
            time.sleep(PAUSE)
        if not chunks.begun:
            return Outcome(images, None)
        try:
            with explained(chunks.output), exclusive(chunks.folder / ".join.lock", chunks.output, remove=False):
                return self._join(chunks)
        except InUse:  # another process joins the table
            return Outcome(images, None)
        except BeitJaxError:
            if chunks.begun:
                raise
            return Outcome(images, None)  # another process has joined the table

    def _join(self, chunks: Chunks) -> Outcome:
        headers = (chunks.header(chunk, unchanged=False) for chunk in range(len(chunks)))
        bad: list[str] = []
        shape, count = self.making.shape, 0
        for chunk, header in enumerate(headers):
            if header is None:
                chunks.path(chunk).unlink(missing_ok=True)
                raise BeitJaxError(
                    f"{printable(chunks.path(chunk))}: damaged, and removed; start again to make it anew"
                )
            shape, count = _shape_of(header, shape, first=not count), count + len(header.rows) - len(header.bad)
            bad += header.bad.values()
        if bad and not self.making.max_bad:  # of a process that left them out
            raise BeitJaxError(bad[0])
        if bad:
            check_bad(len(bad), len(self.listing), self.making.max_bad, bad[-1])
        schema = self.making.schema(shape)
        found = format_of(chunks.output)
        own = chunks.folder / f".{chunks.output.name}"
        try:
            with explained(chunks.output):
                written = found.write(own, schema, lambda: chunks.parts(shape))
                if written != len(self.listing):
                    raise BeitJaxError(f"{printable(own)}: {written} images written, expected {len(self.listing)}")
                self.finish()
                own.replace(chunks.output)
        finally:
            own.unlink(missing_ok=True)
        chunks.remove()
        return Outcome(len(self.listing), None if shape is None else (count, *shape), tuple(bad))


def check_output(output: Path, listing: Listing) -> None:
    """Refuses a table that cannot be written, before a model is read for nothing.

    Raises:
        BeitJaxError: no format has such a name, the place cannot be written, or the file is one of the images.
    """
    format_of(output)
    check_file(output, inputs=listing.paths() if os.path.exists(output) else ())
    check_place(folder_of(output))


def _shape_of(header: Header, shape: tuple[int, ...] | None, *, first: bool) -> tuple[int, ...] | None:
    if header.shape is None or header.shape[0] == 0 or header.shape[1:] == shape:
        return shape
    if first:  # images of a processor without a fixed size
        return header.shape[1:]
    sizes = f"{list(shape or ())} and {list(header.shape[1:])}"
    raise BeitJaxError(f"images: expected features of one shape, found {sizes}; resize or crop the images")
