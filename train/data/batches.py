"""Batches of training and evaluation: prepared data sets read through Grain.

The batch of step s is a pure function of (seed, s). Hosts, worker processes and threads only divide the work: they
change neither which images make up a batch nor how these are augmented nor their order. To resume, the step is enough.
"""

import hashlib
import itertools
import os
import signal
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypedDict, TypeVar, Union, cast, overload

import grain
import numpy as np
import tensorflow_datasets as tfds
import xxhash
from absl import flags
from google.protobuf.message import DecodeError
from jaxtyping import Int
from tensorflow_datasets.proto import tf_example_pb2

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.label_maps import LabelMap, check_labels, decode_label_map, reduce_labels

from ..augmentation.augment import Transform
from ..augmentation.decode import Pixels, decode
from ..augmentation.views import ViewsTransform
from ..recipe import DataOptions
from .builders import ADE20K_CLASSES
from .prepare import INFO, check_shards

if TYPE_CHECKING:  # they import SciPy: a third of the time in which a worker process starts
    from beit_jax.images.processor import ImageProcessor

    from ..augmentation.segmentation import SegmentationTransform

PIPELINE: Final = 1  # goes up when the same data and seed would give other batches
REPLACEMENTS: Final = 16  # records tried in the place of one that cannot be read
_AHEAD: Final = 4  # batches that a thread of this process is ahead

Batch = dict[str, np.ndarray]
AnyTransform = Union[Transform, ViewsTransform, "SegmentationTransform"]


class Record(TypedDict):
    """An image file, the number of its class, and the name it came with."""

    image: bytes
    label: int
    file_name: str


class SegmentationRecord(TypedDict):
    """An image file, the PNG file of its label map (0 for none, classes from 1), and the name they came with."""

    image: bytes
    segmentation: bytes
    file_name: str


class Images(Protocol):
    """What can be evaluated: a `Dataset`, or anything else that gives records by index."""

    @property
    def directory(self) -> Path: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Shard:
    """A file: its name, the records of the split in it (from `skip` on `take`), and its size."""

    name: str
    skip: int
    take: int
    nbytes: int


@dataclass(frozen=True)
class Records:
    """A split of a prepared data set, whatever its records hold.

    Attributes:
        name: TFDS' name and version.
        labels: names of the classes, by number.
    """

    directory: Path
    name: str
    split: str
    labels: tuple[str, ...]
    shards: tuple[Shard, ...]
    _source: Any = field(repr=False, compare=False)

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((shard.take for shard in self.shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        """A record for people: its shard, and its place there."""
        place = bisect_right(self._starts, index) - 1
        shard = self.shards[place]
        return f"{printable(shard.name)}: record {index - self._starts[place] + shard.skip}"

    def contract(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed with this data, for JSON."""
        files = "\n".join(f"{shard.name} {shard.skip} {shard.take} {shard.nbytes}" for shard in self.shards)
        return {
            "dataset": self.name,
            "split": self.split,
            "records": len(self),
            "files": f"{len(self.shards)} with sizes {_digest(files)}",
            "classes": f"{len(self.labels)} with names {_digest(chr(10).join(self.labels))}",
            "pipeline": PIPELINE,
        }

    def _values(self, index: int, kind: str, **lists: str) -> dict[str, Any]:
        """The first value of each of these features, by name, and the file name.

        Args:
            kind: what a record should be, for errors.
            lists: feature to the list of ``tf.train.Feature`` that holds it.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            data = self._source[index]
        except RuntimeError as error:
            if "Corrupted" not in str(error):  # of the file, as Riegeli finds it; all else is the storage's failure
                raise
            raise BeitJaxError(f"{self.where(index)}: damaged ({printable(error)}); copy it again") from error
        try:
            # Not TFDS' own parser, which takes as long as decoding a small image.
            found = tf_example_pb2.Example.FromString(data).features.feature
            values = {name: getattr(found[name], held).value[0] for name, held in lists.items()}
        except (DecodeError, IndexError) as error:
            raise BeitJaxError(f"{self.where(index)}: no {kind} ({printable(error)})") from error
        name = b"".join(found["file_name"].bytes_list.value).decode("utf-8", "replace")
        return values | {"file_name": name or self.where(index)}

    def _called(self, index: int, file_name: str) -> str:
        return f"{self.where(index)} ({printable(file_name)})"


class Dataset(Records):
    """A split of classified images. Indexing reads one record."""

    def __getitem__(self, index: int) -> Record:
        """The record at `index`.

        Raises:
            BeitJaxError: it is damaged, is no classified image, or its label is out of range.
            RuntimeError: the storage failed.
            IndexError: there is no such record.
        """
        values = self._values(index, "classified image", image="bytes_list", label="int64_list")
        image, label, file_name = values["image"], values["label"], values["file_name"]
        if not 0 <= label < len(self.labels):
            raise BeitJaxError(f"{self.where(index)}: label {label}, expected 0 to {len(self.labels) - 1}")
        return Record(image=image, label=label, file_name=file_name)

    def load(self, index: int) -> tuple[Pixels, int]:
        """The decoded image, uint8 [h, w, 3], and its label; raises as indexing and `decode` do, naming the record."""
        record = self[index]
        return decode(record["image"], self._called(index, record["file_name"])), record["label"]


class SegmentationDataset(Records):
    """A split of images with label maps. Indexing reads one record."""

    def __getitem__(self, index: int) -> SegmentationRecord:
        """The record at `index`.

        Raises:
            BeitJaxError: it is damaged, or is no image with a segmentation.
            RuntimeError: the storage failed.
            IndexError: there is no such record.
        """
        values = self._values(index, "image with a segmentation", image="bytes_list", segmentation="bytes_list")
        image, segmentation, file_name = values["image"], values["segmentation"], values["file_name"]
        return SegmentationRecord(image=image, segmentation=segmentation, file_name=file_name)

    def load(self, index: int) -> tuple[Pixels, LabelMap]:
        """The decoded image, uint8 [h, w, 3], and its labels, uint8 [h, w]: classes from 0, 255 where there is none.

        Raises:
            BeitJaxError: as indexing, `decode` and `decode_label_map` do, or sizes that differ, or a class out of
                range; naming the record.
        """
        record = self[index]
        name = self._called(index, record["file_name"])
        image, labels = decode(record["image"], name), decode_label_map(record["segmentation"], f"{name}: segmentation")
        if labels.shape != image.shape[:2]:
            found, expected = (f"{width}x{height}" for height, width in (labels.shape, image.shape[:2]))
            raise BeitJaxError(f"{name}: segmentation of {found} pixels, expected {expected} as its image")
        labels = reduce_labels(labels)
        check_labels(labels, self.labels, f"{name}: reduced segmentation")
        return image, labels.astype(np.uint8)


_Kind = TypeVar("_Kind", bound=Records)


def open_dataset(directory: Path, split: str) -> Dataset:
    """A split of a data set that `beit-jax prepare`, or TFDS with ``--file_format=array_record``, has written.

    Args:
        directory: the one that holds dataset_info.json.
        split: "train", "validation" ..., or part of one as TFDS writes it: "train[:1%]".

    Raises:
        BeitJaxError: no data set there, another format, no such split, no images with labels; a file of the split is
            missing, cut off or another one.
    """
    return _open(Dataset, directory, split, _class_names)


def open_segmentation(directory: Path, split: str) -> SegmentationDataset:
    """A split of ADE20K that ``beit-jax prepare ade20k`` has written; its 150 classes are called as its models' are.

    Args:
        directory: the one that holds dataset_info.json.
        split: as of `open_dataset`.

    Raises:
        BeitJaxError: as `open_dataset`; no images with segmentations.
    """
    return _open(SegmentationDataset, directory, split, _map_names)


@dataclass
class BadRecords:
    """What could not be read so far.

    Attributes:
        limit: records that may be unreadable.
        reasons: for each record that is, by its index, one line that names it; in the order they were met.
        replaced: images that others stood in for: a record is met once an epoch.
    """

    limit: int
    reasons: dict[int, str] = field(default_factory=dict)
    replaced: int = 0


class Batches(Iterator[Batch]):
    """Training batches of this host, without end. `bad` counts what had to be replaced in them.

    Whatever ends it with an error ends it for good: going on would silently shift every later batch.
    """

    def __init__(self, stream: "_Stream", dataset: Dataset | SegmentationDataset, max_bad: float):
        self.bad = BadRecords(int(max_bad * len(dataset)))
        self._stream, self._dataset, self._max_bad = stream, dataset, max_bad

    def __next__(self) -> Batch:
        """Raises BeitJaxError when more records are unreadable than allowed, and when reading fails."""
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
            f"{self._dataset.where(record)}: could not be read, and then could: no run would be repeatable; check the "
            "storage and the memory"
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
    """Batches from `start_step` on: of each, the rows that this host reads.

    Every epoch is a new permutation of the records, and every image of it is transformed with randomness of its own.
    A batch may reach into the next epoch. A record that cannot be read is replaced by another one, which follows from
    its index alone; `Batches.bad` says which.

    Args:
        rows: places in a batch, `sharding.batch_rows`; by default all of them.

    Yields:
        "image" uint8 [local, h, w, 3] as `transform` makes it, "label" int32 [local], or [local, h, w] of label maps,
        or instead of it the other views that the transform makes; local = len(rows).

    Raises:
        BeitJaxError: a seed out of range; from iterating, more unreadable records than `options.max_bad` or
            REPLACEMENTS of them in a row, or failing storage or workers.
    """
    rows = np.arange(options.batch_size) if rows is None else rows
    if not 0 <= seed < 2**32:
        raise BeitJaxError(f"--run.seed: expected 0 to {2**32 - 1}, found {seed}")
    # Randomness is drawn by the place in the whole sequence, before it is divided: after that, hosts would repeat it.
    images = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat(None)
    images = images.random_map(_Train(dataset, _of_both(dataset, transform)))
    mine = _Rows(images, start_step, options.batch_size, rows)
    stream = _Stream(mine.batch(len(rows), drop_remainder=True), options.workers, dataset.directory)
    try:
        yield Batches(stream, dataset, options.max_bad)
    finally:
        stream.close()


def eval_batches(
    images: Images,
    processor: "ImageProcessor",
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Every record once, in order, in equally many batches on every host; the last one is filled up.

    Args:
        batch_size: images of a step over all hosts.
        workers: as `DataOptions.workers`.

    Yields:
        "image" float32 [local, h, w, c], "label" int32 [local], "index" int32 [local] (of the record; -1 where filled
        up), "valid" bool [local]; local = batch size / hosts.

    Raises:
        BeitJaxError: a batch size that the hosts cannot share, or a processor whose images differ in size; from
            iterating, a record that cannot be read: a score must not leave one out.
    """
    local = _share(batch_size, process_index, process_count)
    if processor.crop is None and not isinstance(processor.resize, tuple):
        raise BeitJaxError(f"evaluation: images of one size make a batch, found: {processor.describe()}; add a crop")
    steps = -(-len(images) // batch_size)
    mine = grain.MapDataset.range(steps * batch_size)[process_index::process_count]
    batches = mine.map(_Evaluate(images, processor)).batch(local, drop_remainder=True)
    return _until_closed(batches, workers, images.directory)


def default_workers() -> int:
    """Half of the cores this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores // 2)


# Opening


def _open(
    kind: type[_Kind], directory: Path, split: str, class_names: Callable[[Path, Mapping[str, Any]], tuple[str, ...]]
) -> _Kind:
    builder = _builder(directory)
    labels = class_names(directory, builder.info.features)
    instructions = _instructions(directory, builder.info.splits, split)
    check_shards(instructions)
    shards = (
        Shard(Path(part.filename).name, part.skip, part.take, os.stat(part.filename).st_size) for part in instructions
    )
    name = f"{builder.info.name} {builder.info.version}"
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return kind(directory, name, split, labels, tuple(shards), source)


def splits(directory: Path) -> tuple[str, ...]:
    """Names of the splits of prepared data.

    Raises:
        BeitJaxError: no data set there, or another format.
    """
    return tuple(sorted(_builder(directory).info.splits))


def _builder(directory: Path) -> Any:
    if not (directory / INFO).is_file():
        below = sorted(path.parent for depth in ("*", "*/*") for path in directory.glob(f"{depth}/{INFO}"))
        hint = f"did you mean {printable(below[0])}?" if below else "write one: beit-jax prepare --help"
        raise BeitJaxError(f"{printable(directory)}: no data set here (no {INFO}); {hint}")
    try:
        builder = tfds.builder_from_directory(directory)
        file_format = builder.info.file_format
    except Exception as error:  # TFDS lets out whatever its parsing of the JSON hits
        found = printable(f"{type(error).__name__}: {error}")
        raise BeitJaxError(f"{printable(directory / INFO)}: damaged ({found}); prepare the data again") from error
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = file_format.value if file_format else "none"
        raise BeitJaxError(
            f"{printable(directory)}: expected array_record files, found {found}; convert them: tfds convert_format"
        )
    return builder


def _class_names(directory: Path, features: Mapping[str, Any]) -> tuple[str, ...]:
    _check_features(directory, features, {"image": tfds.features.Image, "label": tfds.features.ClassLabel})
    return tuple(features["label"].names)


def _map_names(directory: Path, features: Mapping[str, Any]) -> tuple[str, ...]:
    _check_features(directory, features, {"image": tfds.features.Image, "segmentation": tfds.features.Image})
    return tuple(f"LABEL_{number}" for number in range(ADE20K_CLASSES))


def _check_features(directory: Path, features: Mapping[str, Any], wanted: Mapping[str, type]) -> None:
    if not all(name in features and isinstance(features[name], kind) for name, kind in wanted.items()):
        expected = " and ".join(f"{name} ({kind.__name__})" for name, kind in wanted.items())
        found = printable(", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items()))
        raise BeitJaxError(f"{printable(directory)}: expected {expected}, found {found}")


def _instructions(directory: Path, splits: Mapping[str, Any], split: str) -> list[Any]:
    if split.partition("[")[0] not in splits:
        raise BeitJaxError(f"{printable(directory)}: no split {printable(split)}, found {', '.join(sorted(splits))}")
    try:
        instructions = list(splits[split].file_instructions)
    except Exception as error:  # TFDS' parser of "train[:1%]" asserts, and raises ValueError and KeyError
        raise BeitJaxError(f"{printable(directory)}: split {printable(split)}: {printable(error)}") from error
    if not sum(part.take for part in instructions):
        raise BeitJaxError(f"{printable(directory)}: the split {printable(split)} has no records")
    return instructions


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Batches


class _Rows(grain.MapDataset[Any]):  # type: ignore[misc]  # Grain has no types
    """Of a sequence without end, cut into batches, the same rows of every batch from a step on."""

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


def _share(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise BeitJaxError(f"host {process_index}: expected 0 to {process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        raise BeitJaxError(f"a batch of {batch_size}: expected a multiple of the {process_count} hosts")
    return batch_size // process_count


def _candidates(index: int, count: int) -> Iterator[int]:
    """A record and those that stand in for it, in turn."""
    yield index
    for attempt in itertools.count(1):
        yield xxhash.xxh3_64_intdigest(f"{index} {attempt}".encode()) % count


# Of an image and its label or label map, what stands in the batch, by name.
_OfBoth = Callable[[Pixels, Any, np.random.Generator], dict[str, Any]]


@dataclass(frozen=True)
class _OfImage:
    """A transform of the image, beside which its class stays as it is."""

    transform: Transform

    def __call__(self, image: Pixels, label: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"image": self.transform(image, rng), "label": np.int32(label)}


@dataclass(frozen=True)
class _OfMap:
    """A transform of the image and its label map together."""

    transform: "SegmentationTransform"

    def __call__(self, image: Pixels, labels: LabelMap, rng: np.random.Generator) -> dict[str, Any]:
        pixels, changed = self.transform(image, labels, rng)
        return {"image": pixels, "label": changed}


@dataclass(frozen=True)
class _OfViews:
    """Views of the image alone; its class, if it has one, is left behind."""

    transform: ViewsTransform

    def __call__(self, image: Pixels, label: int, rng: np.random.Generator) -> dict[str, Any]:
        return dict(self.transform(image, rng))


def _of_both(dataset: Dataset | SegmentationDataset, transform: AnyTransform) -> _OfBoth:
    if isinstance(dataset, SegmentationDataset):
        return _OfMap(cast("SegmentationTransform", transform))
    if isinstance(transform, ViewsTransform):
        return _OfViews(transform)
    return _OfImage(cast(Transform, transform))


@dataclass(frozen=True)
class _Train:
    dataset: Dataset | SegmentationDataset
    transform: _OfBoth

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
    stream = _Stream(batches, workers, directory)
    try:
        yield from stream
    finally:
        stream.close()


class _Stream(Iterator[Batch]):
    """Grain's batches, made ahead by a thread or by worker processes; every failure is one line and the end."""

    def __init__(self, batches: Any, workers: int | None, directory: Path):
        self._directory = directory
        self._batches = iter(_ahead(batches, default_workers() if workers is None else workers))

    def __next__(self) -> Batch:
        if self._batches is None:
            raise BeitJaxError(f"{printable(self._directory)}: reading has ended; open the batches anew")
        try:
            return dict(next(self._batches))
        except BeitJaxError:
            self.close()
            raise
        except RuntimeError as error:
            self.close()
            hint = "check the storage, the memory, /dev/shm and `ulimit -n`, then run again"
            raise BeitJaxError(f"{printable(self._directory)}: {printable(error)}; {hint}") from error

    def close(self) -> None:
        """Ends the workers. Grain complains at the interpreter's exit about iterators that then still exist."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _ahead(batches: Any, workers: int) -> Any:
    if workers == 0:
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD))
    if not flags.FLAGS.is_parsed():  # Grain reads its flags, which only absl's own programs parse
        flags.FLAGS.mark_as_parsed()
    in_order = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # One finished batch a worker: Grain holds another in the parent, and those of ImageNet recipes have 150 MB.
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return in_order.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(index: int, count: int) -> None:
    """Leaves signals to the parent, which finishes its step and saves; ends when the parent does, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
