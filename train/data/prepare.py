"""Writes data sets for training: TFDS data sets in ArrayRecord files, made without TensorFlow.

TFDS reads these data sets (``tfds.builder_from_directory(directory).as_data_source()``). A data set that TFDS itself
prepared with ``--file_format=array_record`` needs no preparation. TFDS' writer is not used, for three reasons: beyond
1 GB it sorts by temporary files that it opens with TensorFlow; its parquet format loses records; its ArrayRecords are
compressed, which makes reading a JPEG take seven times as long and saves nothing. Records are written in the order in
which they are read. Training shuffles all of them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from beit_jax.atomic import Contents, check_destination, new_directory
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import MAX_BAD, check_bad
from beit_jax.json_file import has_value
from beit_jax.terminal import Advance, Progress, no_progress

from ..labels.meaning import TableOptions
from .ade20k import ade20k
from .digits import digits
from .image_folders import folder, images
from .imagenet import imagenet, imagenet22k
from .masks import PLAIN, MaskFiles, masks
from .shards import INFO, METADATA, ShardWriter, check_shards
from .sources import Example, Source
from .tables import table

VERSION: Final = "1.0.0"
CONTENTS: Final = Contents(
    "data set",
    (INFO, METADATA, "features.json", "*.array_record-*", "*.labels.txt"),
    lambda directory: has_value(directory / INFO, "moduleName", __name__),  # TFDS's own data sets are somebody's
)
_AHEAD: Final = 64  # examples that are checked while others are written


@dataclass(frozen=True)
class Prepared:
    """A data set that was written.

    Attributes:
        splits: the number of records by name of the split.
        labels: the names of the classes; empty for ADE20K.
        unit: what `labels` names.
        left_out: one line for each example that could not be used.
        notes: a line for everything else that people should know of the data.
    """

    directory: Path
    splits: dict[str, int]
    labels: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unit: str = "classes"


Kind = Literal["folder", "images", "imagenet", "imagenet22k", "ade20k"]
_WITH_SPLITS: Mapping[str, Callable[[Path], Source]] = {"imagenet": imagenet, "ade20k": ade20k}
_WITHOUT_SPLITS: Mapping[str, Callable[..., Source]] = {
    "folder": folder,
    "images": images,
    "imagenet22k": imagenet22k,
}
"""The functions that find a data set, by kind; these also take the share to hold out for validation."""


def prepare_digits(dest: str | Path, progress: Progress = no_progress, *, overwrite: bool = False) -> Prepared:
    """Writes scikit-learn's handwritten digits (`digits.digits`); raises as `write` does."""
    return write(digits(), Path(dest), progress, overwrite=overwrite)


def prepare_table(
    source: str | Path,
    dest: str | Path,
    options: TableOptions | None = None,
    progress: Progress = no_progress,
    *,
    held_out: float | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
    max_bad: float = MAX_BAD,
) -> Prepared:
    """Writes the images that a table names, with what it says about them (`tables.table`).

    Raises:
        BeitJaxError: as `tables.table` and `write` do.
    """
    found = table(Path(source), options, held_out, allow_missing=skip_bad)
    return write(found, Path(dest), progress, overwrite=overwrite, skip_bad=skip_bad, max_bad=max_bad)


def prepare(
    kind: Kind,
    source: str | Path,
    dest: str | Path,
    progress: Progress = no_progress,
    *,
    held_out: float | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
    max_bad: float = MAX_BAD,
) -> Prepared:
    """Writes the data set of a kind that lies at `source`.

    Args:
        kind: "folder" and "images" (`image_folders`), "imagenet" and "imagenet22k" (`imagenet`), "ade20k" (`ade20k`).
        held_out: the share of images that becomes the validation split; None: the default of the kind. ImageNet-1k and
            ADE20K have a validation split: for them it must be None.

    Raises:
        BeitJaxError: as the function of the kind and `write` do.
    """
    source, dest = Path(source), Path(dest)
    if kind in _WITH_SPLITS:
        if held_out is not None:
            raise BeitJaxError(f"--held-out {held_out}: {kind} has a validation split; leave the option out")
        found = _WITH_SPLITS[kind](source)
    elif held_out is None:
        found = _WITHOUT_SPLITS[kind](source)
    else:
        found = _WITHOUT_SPLITS[kind](source, held_out)
    return write(found, dest, progress, overwrite=overwrite, skip_bad=skip_bad, max_bad=max_bad)


def prepare_segmentation(
    images: str | Path,
    annotations: str | Path,
    dest: str | Path,
    files: MaskFiles = PLAIN,
    progress: Progress = no_progress,
    *,
    held_out: float | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
    max_bad: float = MAX_BAD,
) -> Prepared:
    """Writes somebody's images and masks (`masks.masks`).

    Args:
        files: what the numbers or colours of masks mean, and how pairs are named.
        held_out: the share that becomes the validation split where there is none; None: `masks.HELD_OUT`.

    Raises:
        BeitJaxError: as `masks.masks` and `write` do.
    """
    found = masks(Path(images), Path(annotations), files, held_out)
    return write(found, Path(dest), progress, overwrite=overwrite, skip_bad=skip_bad, max_bad=max_bad)


prepare_folder = partial(prepare, "folder")
prepare_images = partial(prepare, "images")
prepare_ade20k = partial(prepare, "ade20k")


def write(
    source: Source,
    dest: Path,
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
    skip_bad: bool = False,
    max_bad: float = MAX_BAD,
) -> Prepared:
    """Writes a data set beside `dest`, checks it and renames it to `dest`.

    Every example is decoded before it is written. With `skip_bad`, an example that cannot be used is left out, up to
    the share `max_bad` of all. Without it, the other examples are still checked, and then nothing is kept.

    Raises:
        BeitJaxError: `dest` exists and is not to be replaced, or holds something else than a data set; examples cannot
            be used; a split has no examples; the disk is full; what was written reads back differently.
    """
    check_destination(dest, overwrite=overwrite, contents=CONTENTS)
    left_out: list[str] = []
    with new_directory(dest, overwrite=overwrite, contents=CONTENTS, need_bytes=source.nbytes) as partial:
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
        if left_out:
            check_bad(len(left_out), len(left_out) + sum(counts.values()), max_bad, left_out[-1])
        _write_info(source, partial, infos)
        _verify(partial, counts)
    return Prepared(dest, counts, source.labels, tuple(left_out), tuple(source.notes()), source.unit)


def _usable(source: Source, examples: Iterable[Example], left_out: list[str], advance: Advance) -> Iterator[Example]:
    """Records of the examples that pass the source's check, in order. Every other adds a line to `left_out`."""

    def checked(example: Example) -> Example | str:
        try:
            source.check(example)
            return source.record(example)
        except BeitJaxError as error:
            return str(error)

    waiting: deque[Future[Example | str]] = deque()

    def next_usable() -> Iterator[Example]:
        found = waiting.popleft().result()
        advance(1)
        if isinstance(found, str):
            left_out.append(found)
        else:
            yield found

    with ThreadPoolExecutor() as pool:  # decoders run outside the interpreter's lock
        for example in examples:
            waiting.append(pool.submit(checked, example))
            if len(waiting) == _AHEAD:
                yield from next_usable()
        while waiting:
            yield from next_usable()


def _write_split(source: Source, split: str, directory: Path, examples: Iterator[Example]) -> tfds.core.SplitInfo:
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=source.name, split=split, filetype_suffix="array_record"
    )
    shards = ShardWriter(template)
    for example in examples:
        shards.add(source.features.serialize_example(example))
    shards.close()
    shards.name()
    return tfds.core.SplitInfo(
        name=split, shard_lengths=shards.lengths, num_bytes=shards.nbytes, filename_template=template
    )


def _write_info(source: Source, directory: Path, splits: Sequence[tfds.core.SplitInfo]) -> None:
    identity = DatasetIdentity(
        name=source.name, version=tfds.core.Version(VERSION), data_dir=str(directory), module_name=__name__
    )
    metadata = tfds.core.MetadataDict(source.metadata())
    info = tfds.core.DatasetInfo(
        builder=identity, description=source.description, features=source.features, metadata=metadata or None
    )
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
