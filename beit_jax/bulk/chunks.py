"""Finished parts of a table that is being made, in a folder beside it: ``features.parquet.partial``.

The images are cut into chunks of equal length. The rows of a chunk are in one file, which appears when they are
complete. So a task that was stopped goes on after its finished chunks, several processes share them, and the table that
is joined from them is the same whoever made them, and when.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from beit_jax import atomic
from beit_jax.bulk.inputs import Listing
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import changes, read_json
from beit_jax.tables.schema import ERROR, Part

MAGIC: Final = b"beit-jax chunk 1\n"
SUFFIX: Final = ".partial"
MANIFEST: Final = "manifest.json"
_CHUNK: Final = re.compile(r"\d{7,}\.chunk")


@dataclass(frozen=True)
class Header:
    """What a chunk says before its values.

    Attributes:
        inputs: the digest of its images' names and stamps.
        rows: of the table, without values.
        shape: of the values, which only rows without an error have; None: rows have no values.
        digest: of the values' bytes.
    """

    inputs: str
    rows: tuple[Mapping[str, Any], ...]
    shape: tuple[int, ...] | None
    digest: str

    @property
    def bad(self) -> dict[int, str]:
        """Why images could not be read, by their places in the chunk."""
        return {place: row[ERROR] for place, row in enumerate(self.rows) if row.get(ERROR) is not None}


@dataclass(frozen=True)
class Chunks:
    """The folder of a table's finished chunks.

    Attributes:
        output: the table.
        listing: its images.
        length: images of a chunk.
    """

    output: Path
    listing: Listing
    length: int

    @property
    def folder(self) -> Path:
        return folder_of(self.output)

    @property
    def begun(self) -> bool:
        """As `is_begun`."""
        return is_begun(self.output)

    def __len__(self) -> int:
        return -(-len(self.listing) // self.length)

    def range(self, chunk: int) -> tuple[int, int]:
        """The places of a chunk's images: the first one, and the one after the last."""
        return chunk * self.length, min(len(self.listing), (chunk + 1) * self.length)

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:07d}.chunk"

    # --- Opening ---

    def open(self, facts: Mapping[str, Any]) -> bool:
        """Makes the folder, or goes on in the one that is there.

        Args:
            facts: all that rows depend on, for JSON.

        Returns:
            True if the folder was there.

        Raises:
            BeitJaxError: what is there was made with other facts, or is no such folder; says what differs.
        """
        atomic.check_place(self.folder)
        known = self.folder / MANIFEST
        with explained(self.output):
            self.folder.mkdir(exist_ok=True)
            there = known.exists()
            if not there:
                names = [name for name in os.listdir(self.folder) if not name.startswith(".")]
                if strangers := [name for name in names if not _CHUNK.fullmatch(name)]:
                    raise BeitJaxError(
                        f"{printable(self.folder)}: holds {printable(strangers[0])} and no {MANIFEST}, expected what "
                        "an unfinished table left; move it away or choose another name"
                    )
                for name in names:  # of a finished table, whose parts were being removed when its process was stopped
                    (self.folder / name).unlink(missing_ok=True)
                own = self._aside(MANIFEST)
                own.write_text(json.dumps(facts, indent=1, sort_keys=True))
                try:
                    os.link(own, known)  # fails if another process was faster
                    own.unlink()
                except FileExistsError:
                    own.unlink()
                except OSError:  # a file system without links
                    os.replace(own, known)
        found = read_json(known, advice="remove the folder to begin anew")
        for name, before, now in changes(found, json.loads(json.dumps(dict(facts)))):
            raise BeitJaxError(
                f"{printable(self.folder)}: begun with {name} {printable(before)}, found {printable(now)}; give the "
                "same options and images to go on, or remove the folder to begin anew"
            )
        return there

    def _aside(self, name: str) -> Path:
        """A name that only this process writes."""
        return self.folder / f".{name}.{socket.gethostname()[:64]}-{os.getpid()}"

    # --- One chunk ---

    def header(self, chunk: int, *, unchanged: bool = True) -> Header | None:
        """What a finished chunk says; None if it is not there or not whole.

        Args:
            unchanged: None too if its images have changed since, each of which is looked at for that.
        """
        try:
            with self.path(chunk).open("rb") as file:
                found = _read_header(file)
                start = file.tell()
                size = os.fstat(file.fileno()).st_size
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if size != start + 4 * int(np.prod(found.shape or (0,))):
            return None
        if unchanged and found.inputs != self.listing.digest(*self.range(chunk)):
            return None
        return found

    def write(self, chunk: int, part: Part, inputs: str) -> None:
        """Writes a finished chunk.

        Args:
            inputs: the digest of its images.

        Raises:
            BeitJaxError: it cannot be written, as on a full disk.
        """
        values = None if part.values is None else part.kept().values
        content = b"" if values is None else np.ascontiguousarray(values, "<f4").tobytes()
        header = {
            "inputs": inputs,
            "rows": list(part.rows),
            "shape": None if values is None else list(values.shape),
            "digest": xxhash.xxh3_128_hexdigest(content),
        }
        text = json.dumps(header).encode()
        own = self._aside(self.path(chunk).name)
        try:
            with explained(self.output):
                with own.open("wb") as file:
                    file.write(MAGIC + xxhash.xxh3_128_hexdigest(text).encode() + b"\n" + text + b"\n" + content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(own, self.path(chunk))
        finally:
            own.unlink(missing_ok=True)

    def read(self, chunk: int, shape: tuple[int, ...] | None) -> Part:
        """The rows of a finished chunk.

        Args:
            shape: of the values of a row; None: rows have none.

        Raises:
            BeitJaxError: the file is damaged; it is removed, and starting again makes it anew.
        """
        path = self.path(chunk)
        try:
            with path.open("rb") as file:
                found = _read_header(file)
                content = file.read()
            if xxhash.xxh3_128_hexdigest(content) != found.digest:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)
            raise BeitJaxError(f"{printable(path)}: damaged, and removed; start again to compute it anew") from None
        if shape is None:
            return Part(found.rows)
        values = np.frombuffer(content, "<f4").reshape(found.shape or (0,))
        if len(values) == len(found.rows):
            return Part(found.rows, values)
        padded = np.zeros((len(found.rows), *shape), np.float32)
        padded[[place for place, row in enumerate(found.rows) if row.get(ERROR) is None]] = values
        return Part(found.rows, padded)

    # --- All chunks ---

    def parts(self, shape: tuple[int, ...] | None) -> Iterator[Part]:
        """The rows of all chunks, in order."""
        return (self.read(chunk, shape) for chunk in range(len(self)))

    def missing(self) -> list[int]:
        """The chunks whose files are not there."""
        with explained(self.output):
            there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [chunk for chunk in range(len(self)) if self.path(chunk).name not in there]

    def remove(self) -> None:
        """Removes the folder; the manifest first, by whose absence other processes see that all is done."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        with suppress(OSError):
            shutil.rmtree(self.folder)


def folder_of(output: Path) -> Path:
    """Where the finished chunks of a table are."""
    return output.with_name(output.name + SUFFIX)


def is_begun(output: Path) -> bool:
    """True if a table is being made: neither before the work begins, nor when the table is joined."""
    return (folder_of(output) / MANIFEST).exists()


def _read_header(file: Any) -> Header:
    if file.readline(64) != MAGIC:
        raise ValueError
    digest, text = file.readline(64).strip(), file.readline()
    if not text.endswith(b"\n") or xxhash.xxh3_128_hexdigest(text[:-1]).encode() != digest:
        raise ValueError
    found = json.loads(text)
    shape = None if found["shape"] is None else tuple(found["shape"])
    return Header(found["inputs"], tuple(found["rows"]), shape, found["digest"])


def explained(output: Path) -> AbstractContextManager[None]:
    """`beit_jax.atomic.explained` of what is written for a table; `Table` says what a full disk leaves."""
    return atomic.explained(output, place=folder_of(output), left="")
