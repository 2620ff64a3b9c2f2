"""Writes data sets for training: TFDS datasets in ArrayRecord files, made without TensorFlow.

TFDS reads them (``tfds.builder_from_directory(directory).as_data_source()``), and what TFDS itself prepared with
``--file_format=array_record`` needs no preparation. Its own writer is not used: beyond 1 GB it sorts through
temporary files that it opens with TensorFlow, its parquet format loses records, and its ArrayRecords are compressed,
which multiplies the time to read a JPEG by seven and saves nothing. Records stand in the order they are read in;
training shuffles all of them.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from beit_jax.atomic import check_destination, new_directory
from beit_jax.errors import BeitJaxError, printable
from beit_jax.terminal import Advance, Progress, no_progress

from . import builders
from .builders import Example, Source

INFO: Final = "dataset_info.json"
VERSION: Final = "1.0.0"
SHARD_BYTES: Final = 1 << 30
_OPTIONS: Final = "group_size:1,uncompressed"  # a record at a time, at any place; pictures are compressed already
_AHEAD: Final = 64  # examples that are checked while others are written


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        splits: name to number of records.
        labels: names of the classes; empty for segmentation.
        left_out: one line for each example that could not be used.
    """

    directory: Path
    splits: dict[str, int]
    labels: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def prepare_digits(dest: Path, progress: Progress = no_progress, *, overwrite: bool = False) -> Prepared:
    """Writes scikit-learn's handwritten digits (`builders.digits`); raises as `write` does."""
    return write(builders.digits(), dest, progress, overwrite=overwrite)


def prepare_folder(
    source: Path,
    dest: Path,
    progress: Progress = no_progress,
    *,
    held_out: float = 0.1,
    overwrite: bool = False,
    skip_bad: bool = False,
) -> Prepared:
    """Writes a tree with a folder per class (`builders.folder`); raises as it and `write` do."""
    return write(builders.folder(source, held_out), dest, progress, overwrite=overwrite, skip_bad=skip_bad)


def prepare_images(
    source: Path,
    dest: Path,
    progress: Progress = no_progress,
    *,
    held_out: float = 0.0,
    overwrite: bool = False,
    skip_bad: bool = False,
) -> Prepared:
    """Writes all images of a folder, without labels (`builders.images`); raises as it and `write` do."""
    return write(builders.images(source, held_out), dest, progress, overwrite=overwrite, skip_bad=skip_bad)


def prepare_imagenet(
    source: Path, dest: Path, progress: Progress = no_progress, *, overwrite: bool = False, skip_bad: bool = False
) -> Prepared:
    """Writes ImageNet-1k from image-net.org's archives (`builders.imagenet`); raises as it and `write` do."""
    return write(builders.imagenet(source), dest, progress, overwrite=overwrite, skip_bad=skip_bad)


def prepare_imagenet22k(
    source: Path,
    dest: Path,
    progress: Progress = no_progress,
    *,
    held_out: float = 0.0,
    overwrite: bool = False,
    skip_bad: bool = False,
) -> Prepared:
    """Writes ImageNet-22k from image-net.org's archives (`builders.imagenet22k`); raises as it and `write` do."""
    return write(builders.imagenet22k(source, held_out), dest, progress, overwrite=overwrite, skip_bad=skip_bad)


def prepare_ade20k(
    source: Path, dest: Path, progress: Progress = no_progress, *, overwrite: bool = False, skip_bad: bool = False
) -> Prepared:
    """Writes ADE20K's images with their segmentations (`builders.ade20k`); raises as it and `write` do."""
    return write(builders.ade20k(source), dest, progress, overwrite=overwrite, skip_bad=skip_bad)


def write(
    source: Source,
    dest: Path,
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
    skip_bad: bool = False,
) -> Prepared:
    """Writes a data set beside `dest`, checks it and renames it.

    Every example is decoded before it is written. One that cannot be used is left out if `skip_bad`; otherwise all are
    still looked at, and then nothing is kept.

    Raises:
        BeitJaxError: `dest` exists and is not to be replaced, or holds something else than a data set; examples that
            cannot be used; a split without examples; the disk is full; what was written reads back otherwise.
    """
    check_destination(dest, overwrite=overwrite)
    if dest.is_dir() and any(dest.iterdir()) and not (dest / INFO).is_file():
        raise BeitJaxError(f"{printable(dest)}: holds no data set; --overwrite replaces only data sets")
    left_out: list[str] = []
    with new_directory(dest, overwrite=overwrite, need_bytes=source.nbytes) as partial:
        with progress(sum(split.count for split in source.splits.values())) as advance:
            infos = [
                _write_split(source, split, partial, _usable(source, content.examples, left_out, advance))
                for split, content in source.splits.items()
            ]
        counts = {info.name: info.num_examples for info in infos}
        if left_out and not skip_bad:
            raise BeitJaxError(
                f"{len(left_out)} of {len(left_out) + sum(counts.values())} examples cannot be used, the first: "
                f"{left_out[0]}; repair them, or leave them out with --skip-bad"
            )
        for split, count in counts.items():
            if not count:
                raise BeitJaxError(f"{printable(source.name)}: the split {split} has no examples that can be used")
        _write_info(source, partial, infos)
        _verify(partial, counts)
    return Prepared(dest, counts, source.labels, tuple(left_out))


def check_shards(instructions: Sequence[Any]) -> None:
    """Compares the number of records in every file with the number it was written with.

    The reader itself finds zero records, and no fault, in a file that is cut off or that is something else.

    Args:
        instructions: TFDS' FileInstructions: filename, examples_in_shard.

    Raises:
        BeitJaxError: naming the first file that is missing, cut off or another one.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:  # for file systems far away
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
    except RuntimeError:  # closing is when it admits that it could not read the file
        return 0
    return count


def _usable(source: Source, examples: Iterable[Example], left_out: list[str], advance: Advance) -> Iterator[Example]:
    """The examples that pass the source's check, in order; complaints about the others go to `left_out`."""

    def complaint(example: Example) -> str | None:
        try:
            source.check(example)
        except BeitJaxError as error:
            return str(error)
        return None

    waiting: deque[tuple[Example, Future[str | None]]] = deque()

    def next_usable() -> Iterator[Example]:
        example, checked = waiting.popleft()
        found = checked.result()
        advance(1)
        if found is None:
            yield example
        else:
            left_out.append(found)

    with ThreadPoolExecutor() as pool:  # decoders run outside the interpreter's lock
        for example in examples:
            waiting.append((example, pool.submit(complaint, example)))
            if len(waiting) == _AHEAD:
                yield from next_usable()
        while waiting:
            yield from next_usable()


class _Shards:
    """ArrayRecord files of about SHARD_BYTES; they get their names when their number is known."""

    def __init__(self, template: tfds.core.ShardedFileTemplate):
        self.template = template
        self.lengths: list[int] = []
        self.nbytes = 0
        self._writer: Any = None
        self._room = 0

    def add(self, record: bytes) -> None:
        if self._writer is None:
            self._writer = ArrayRecordWriter(str(self._partial(len(self.lengths))), _OPTIONS)
            self.lengths.append(0)
            self._room = SHARD_BYTES
        self._writer.write(record)
        self.lengths[-1] += 1
        self.nbytes += len(record)
        self._room -= len(record)
        if self._room <= 0:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def name(self) -> None:
        for index in range(len(self.lengths)):
            self._partial(index).rename(self.template.sharded_filepath(shard_index=index, num_shards=len(self.lengths)))

    def _partial(self, index: int) -> Path:
        return Path(self.template.data_dir) / f"{self.template.split}-{index}.partial"


def _write_split(source: Source, split: str, directory: Path, examples: Iterator[Example]) -> tfds.core.SplitInfo:
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=source.name, split=split, filetype_suffix="array_record"
    )
    shards = _Shards(template)
    for example in examples:
        record = source.features.serialize_example(example)
        try:
            shards.add(record)
        except RuntimeError as error:
            raise _unwritten(directory, error) from error
    try:
        shards.close()
    except RuntimeError as error:
        raise _unwritten(directory, error) from error
    shards.name()
    return tfds.core.SplitInfo(
        name=split, shard_lengths=shards.lengths, num_bytes=shards.nbytes, filename_template=template
    )


def _unwritten(directory: Path, error: RuntimeError) -> BeitJaxError:
    return BeitJaxError(f"{printable(directory)}: cannot be written ({printable(error)}); free space and run again")


def _write_info(source: Source, directory: Path, splits: Sequence[tfds.core.SplitInfo]) -> None:
    identity = DatasetIdentity(
        name=source.name, version=tfds.core.Version(VERSION), data_dir=str(directory), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, description=source.description, features=source.features)
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(directory)


def _verify(directory: Path, counts: Mapping[str, int]) -> None:
    splits = tfds.builder_from_directory(directory).info.splits
    found = {name: info.num_examples for name, info in splits.items()}
    if found != counts:
        raise BeitJaxError(f"{printable(directory)}: wrote {dict(counts)}, read back {found}; the disk may be failing")
    for info in splits.values():
        check_shards(info.file_instructions)
