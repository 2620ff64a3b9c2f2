"""The ArrayRecord files of a prepared data set: written one after the other, and checked before they are read."""

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from beit_jax.errors import BeitJaxError, printable

INFO: Final = "dataset_info.json"
"""The file that makes a directory a prepared data set."""
METADATA: Final = "metadata.json"
"""The file of what TFDS calls a data set's metadata."""
MASKS: Final = "segmentation"
"""The key there of what `masks` says about a data set of label maps."""
SHARD_BYTES: Final = 1 << 30
_OPTIONS: Final = "group_size:1,uncompressed"  # a record at a time, at any place; pictures are compressed already


class ShardWriter:
    """Writes records to files of about SHARD_BYTES. The files get their names once their number is known."""

    def __init__(self, template: tfds.core.ShardedFileTemplate):
        self.template = template
        self.lengths: list[int] = []
        self.nbytes = 0
        self._writer: Any = None
        self._room = 0

    def add(self, record: bytes) -> None:
        """Appends a record to the file that is open, or to a new one.

        Raises:
            OSError: the file cannot be written.
        """
        if self._writer is None:
            with self._explained():
                self._writer = ArrayRecordWriter(str(self._partial(len(self.lengths))), _OPTIONS)
            self.lengths.append(0)
            self._room = SHARD_BYTES
        with self._explained():
            self._writer.write(record)
        self.lengths[-1] += 1
        self.nbytes += len(record)
        self._room -= len(record)
        if self._room <= 0:
            self.close()

    def close(self) -> None:
        """Ends the file that is open.

        Raises:
            OSError: the file cannot be written.
        """
        if self._writer is not None:
            with self._explained():
                self._writer.close()
            self._writer = None

    def name(self) -> None:
        """Gives all files the names by which TFDS finds them."""
        for index in range(len(self.lengths)):
            self._partial(index).rename(self.template.sharded_filepath(shard_index=index, num_shards=len(self.lengths)))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Gives the writer's errors, which say only in their text what the system said, the system's numbers."""
        try:
            yield
        except RuntimeError as error:
            full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            code = next((code for code in full if os.strerror(code) in str(error)), errno.EIO)
            raise OSError(code, printable(error), self.template.data_dir) from error

    def _partial(self, index: int) -> Path:
        return Path(self.template.data_dir) / f"{self.template.split}-{index}.partial"


def check_shards(instructions: Sequence[Any]) -> None:
    """Compares the number of records in every file with the number it was written with.

    The reader itself reports no fault, and zero records, for a file that is cut off or is something else.

    Args:
        instructions: TFDS' FileInstructions, with filename and examples_in_shard.

    Raises:
        BeitJaxError: a file is missing, cut off or not the one that was written; the error names the first such file.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:  # on a network file system, requests take long
        found = list(pool.map(lambda instruction: _records_in(Path(instruction.filename)), instructions))
    for instruction, count in zip(instructions, found, strict=True):
        if count != instruction.examples_in_shard:
            raise BeitJaxError(
                f"{printable(instruction.filename)}: expected {instruction.examples_in_shard} records, found "
                f"{count or 'none: cut off, or no ArrayRecord file'}; copy or prepare it again"
            )


def _records_in(path: Path) -> int:
    if not path.is_file():
        raise BeitJaxError(f"{printable(path)}: no such file, a part of the data set; copy or prepare it again")
    reader = ArrayRecordReader(str(path))
    try:
        count = int(reader.num_records())
        reader.close()
    except RuntimeError:  # the reader says only at closing that it could not read the file
        return 0
    return count
