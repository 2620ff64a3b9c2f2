"""Prepared data sets: a split is opened once, and records are read from it by index."""

import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypedDict, TypeVar, cast

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from jaxtyping import Int64
from tensorflow_datasets.proto import tf_example_pb2

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.label_maps import (
    ADE20K_CLASSES,
    IGNORED,
    LabelMap,
    check_labels,
    decode_label_map,
    ignored_number,
    reduce_labels,
)
from beit_jax.json_file import Fields, read_json, read_text

from ..augmentation.decode import RGB, Pixels, Reading
from ..labels.targets import Label, Target, found_target
from .shards import INFO, MASKS, METADATA, check_shards

PIPELINE: Final = 1
"""Part of a run's contract; goes up when the same data and seed would give other batches."""


class Record(TypedDict):
    """An image file, what the data set says about it (`targets.Label`), and the file's original name."""

    image: bytes
    label: Any
    file_name: str


class SegmentationRecord(TypedDict):
    """An image file, the PNG file of its label map, and the image file's original name."""

    image: bytes
    segmentation: bytes
    file_name: str


@dataclass(frozen=True)
class Shard:
    """A file of a split: its name, its size, and which of its records belong to the split: `take` after `skip`."""

    name: str
    skip: int
    take: int
    nbytes: int


@dataclass(frozen=True)
class Records:
    """A split of a prepared data set. Subclasses say what a record holds.

    Attributes:
        name: the name and version in TFDS.
        labels: the names of the classes, by number.
        reading: how images are decoded.
    """

    directory: Path
    name: str
    split: str
    labels: tuple[str, ...]
    shards: tuple[Shard, ...]
    _source: Any = field(repr=False, compare=False)
    reading: Reading = field(default=RGB, kw_only=True)

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((shard.take for shard in self.shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        """The shard of a record and its number there, for messages."""
        place = bisect_right(self._starts, index) - 1
        shard = self.shards[place]
        return f"{printable(shard.name)}: record {index - self._starts[place] + shard.skip}"

    def contract(self) -> dict[str, Any]:
        """The facts, for JSON, that must be the same when a run is resumed with this data."""
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
            lists: by name of a feature, the list of ``tf.train.Feature`` that holds its values.
        """

        def first(found: Mapping[str, Any]) -> dict[str, Any]:
            return {name: getattr(found[name], held).value[0] for name, held in lists.items()}

        return self._parsed(index, kind, first)

    def _parsed(self, index: int, kind: str, parse: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """What `parse` makes of a record's features, by name, and the file name; `kind` as for `_values`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            data = self._source[index]
        except RuntimeError as error:
            if "Corrupted" not in str(error):  # Riegeli's word for a damaged file; all else is a failure of the storage
                raise
            raise BeitJaxError(f"{self.where(index)}: damaged ({printable(error)}); copy it again") from error
        try:
            # TFDS' own parser would take as long as decoding a small image.
            found = tf_example_pb2.Example.FromString(data).features.feature
            values = parse(found)
        except (DecodeError, IndexError) as error:
            raise BeitJaxError(f"{self.where(index)}: no {kind} ({printable(error)})") from error
        name = b"".join(found["file_name"].bytes_list.value).decode("utf-8", "replace")
        return values | {"file_name": name or self.where(index)}

    def _called(self, index: int, file_name: str) -> str:
        return f"{self.where(index)} ({printable(file_name)})"


@dataclass(frozen=True)
class ImageRecords(Records):
    """A split of images of which nothing else is asked. Indexing reads a record."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The ``image``, the bytes of its file, and the ``file_name`` of the record at `index`.

        Raises:
            BeitJaxError: the record is damaged, or is no image.
            RuntimeError: the storage failed.
            IndexError: no record has this index.
        """
        return self._values(index, "image", image="bytes_list")


@dataclass(frozen=True)
class Dataset(Records):
    """A split of images of which the data say something: see `targets`. Indexing reads a record.

    Attributes:
        target: what they say; `labels` are its names.
    """

    target: Target

    def __getitem__(self, index: int) -> Record:
        """The record at `index`.

        Raises:
            BeitJaxError: the record is damaged, is no such image, or its label is out of range.
            RuntimeError: the storage failed.
            IndexError: no record has this index.
        """
        target = self.target

        def parse(found: Mapping[str, Any]) -> dict[str, Any]:
            image = found["image"].bytes_list.value[0]
            return {"image": image, "label": target.read(found[target.feature], self.where(index))}

        return cast("Record", self._parsed(index, target.kind, parse))

    def said(self) -> Iterator[Label]:
        """What the data say about each image, in order, without those whose records are damaged: training names them.

        Every record is read; no image is decoded.

        Raises:
            RuntimeError: the storage failed.
        """
        for index in range(len(self)):
            try:
                yield self[index]["label"]
            except BeitJaxError:
                continue

    def load(self, index: int) -> tuple[Pixels, Any]:
        """The decoded image, uint8 [h, w, 3] or as `reading` says, and its label.

        Raises:
            BeitJaxError: as indexing and `reading` do, naming the record.
        """
        record = self[index]
        return self.reading(record["image"], self._called(index, record["file_name"])), record["label"]


@dataclass(frozen=True)
class SegmentationDataset(Records):
    """A split of images with label maps. Indexing reads a record.

    Attributes:
        reduced: records hold classes from 1, and 0 for none, as ADE20K's do; else the model's class numbers.
        do_reduce_labels: of a model of this data: whether the maps that the data were made of count from 1; None where
            they counted in a way of their own.
        pixels: of each class in this split; None where the data set does not say it.
    """

    reduced: bool
    do_reduce_labels: bool | None
    pixels: tuple[int, ...] | None = None

    @property
    def no_class(self) -> int:
        """The number of pixels of no class."""
        return ignored_number(len(self.labels))

    def __getitem__(self, index: int) -> SegmentationRecord:
        """The record at `index`.

        Raises:
            BeitJaxError: the record is damaged, or is no image with a segmentation.
            RuntimeError: the storage failed.
            IndexError: no record has this index.
        """
        values = self._values(index, "image with a segmentation", image="bytes_list", segmentation="bytes_list")
        image, segmentation, file_name = values["image"], values["segmentation"], values["file_name"]
        return SegmentationRecord(image=image, segmentation=segmentation, file_name=file_name)

    def load(self, index: int) -> tuple[Pixels, LabelMap]:
        """The decoded image, as `reading` says, and its labels [h, w]: classes from 0, and `no_class`.

        Labels are uint8, or int32 where 255 is a class.

        Raises:
            BeitJaxError: as indexing, `reading` and `decode_label_map` do; the sizes differ, or a class is out of
                range. The error names the record.
        """
        record = self[index]
        name = self._called(index, record["file_name"])
        image = self.reading(record["image"], name)
        labels = decode_label_map(record["segmentation"], f"{name}: segmentation")
        if labels.shape != image.shape[:2]:
            found, expected = (f"{width}x{height}" for height, width in (labels.shape, image.shape[:2]))
            raise BeitJaxError(f"{name}: segmentation of {found} pixels, expected {expected} as its image")
        labels = self._numbered(labels, name)
        return image, labels.astype(np.uint8) if self.no_class == IGNORED else labels

    def count_pixels(self) -> Int64[np.ndarray, " classes"]:
        """The pixels of each class: as the data set says, or else counted, which reads all label maps.

        Raises:
            BeitJaxError: a label map cannot be read.
        """
        if self.pixels is not None:
            return np.array(self.pixels, np.int64)
        count = len(self.labels)
        found = np.zeros(count, np.int64)
        for index in range(len(self)):
            labels = self.load_labels(index)
            found += np.bincount(labels[labels != self.no_class], minlength=count)
        return found

    def load_labels(self, index: int) -> LabelMap:
        """The labels alone, as `load` gives them, without looking at the image."""
        name = self.where(index)
        return self._numbered(decode_label_map(self[index]["segmentation"], f"{name}: segmentation"), name)

    def _numbered(self, stored: LabelMap, name: str) -> LabelMap:
        """The model's class numbers of a stored map."""
        labels = reduce_labels(stored) if self.reduced else stored
        kind = "reduced segmentation" if self.reduced else "segmentation"
        check_labels(labels, self.labels, f"{name}: {kind}", ignored=self.no_class)
        return labels


_Kind = TypeVar("_Kind", bound=Records)


def open_dataset(directory: Path, split: str) -> Dataset:
    """Opens a split of a data set that `beit-jax prepare`, or TFDS with ``--file_format=array_record``, has written.

    Args:
        directory: the directory that holds dataset_info.json.
        split: "train", "validation" ..., or a part of one in TFDS' notation: "train[:1%]".

    Raises:
        BeitJaxError: no data set there, another format, no such split, no images with labels; a file of the split is
            missing, cut off or not the one that was written.
    """
    return _open(Dataset, directory, split, _with_target)


def open_images(directory: Path, split: str) -> ImageRecords:
    """Opens the images of a split, whatever else the data set says about them.

    Args:
        directory, split: as for `open_dataset`.

    Raises:
        BeitJaxError: as `open_dataset`; no images.
    """
    return _open(ImageRecords, directory, split, _with_images)


def open_segmentation(directory: Path, split: str) -> SegmentationDataset:
    """Opens a split that ``beit-jax prepare segmentation`` or ``ade20k`` has written. ADE20K's classes have no names.

    A data set of TFDS with `tfds.features.LabeledImage` counts classes from 0, too, and 255 for none.

    Args:
        directory, split: as for `open_dataset`.

    Raises:
        BeitJaxError: as `open_dataset`; no images with segmentations.
    """
    opened = _open(SegmentationDataset, directory, split, _with_maps)
    if opened.reduced:
        return opened
    facts = _metadata(directory).inside(MASKS)
    counts = facts.inside("pixels").content.get(split)
    known = isinstance(counts, list) and len(counts) == len(opened.labels) and all(type(n) is int for n in counts)
    return replace(opened, pixels=tuple(counts) if known and counts else None)


def holds_label_maps(directory: Path) -> bool:
    """True for a prepared data set of images with label maps; False for another one, and for any other directory.

    Raises:
        BeitJaxError: a data set that is damaged.
    """
    return (directory / INFO).is_file() and "segmentation" in _builder(directory).info.features


def _open(
    kind: type[_Kind], directory: Path, split: str, described: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]]
) -> _Kind:
    """A split of a data set.

    Args:
        described: what the features say: ``labels``, and the fields that `kind` has besides those of `Records`.
    """
    builder = _builder(directory)
    fields = described(directory, builder.info.features)
    instructions = _instructions(directory, builder.info.splits, split)
    check_shards(instructions)
    shards = (
        Shard(Path(part.filename).name, part.skip, part.take, os.stat(part.filename).st_size) for part in instructions
    )
    name = f"{builder.info.name} {builder.info.version}"
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return kind(directory=directory, name=name, split=split, shards=tuple(shards), _source=source, **fields)


def splits(directory: Path) -> tuple[str, ...]:
    """The names of the splits of a prepared data set.

    Raises:
        BeitJaxError: no data set there, or another format.
    """
    return tuple(sorted(_builder(directory).info.splits))


def _builder(directory: Path) -> Any:
    if not (directory / INFO).is_file():
        below = sorted(path.parent for depth in ("*", "*/*") for path in directory.glob(f"{depth}/{INFO}"))
        hint = f"did you mean {printable(below[0])}?" if below else "write one: beit-jax prepare --help"
        raise BeitJaxError(f"{printable(directory)}: no data set here (no {INFO}); {hint}")
    _check_texts(directory)
    try:
        builder = tfds.builder_from_directory(directory)
        file_format = builder.info.file_format
    except Exception as error:  # TFDS raises whatever its parsing of the JSON meets
        found = printable(f"{type(error).__name__}: {error}")
        raise BeitJaxError(f"{printable(directory / INFO)}: damaged ({found}); prepare the data again") from error
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = file_format.value if file_format else "none"
        raise BeitJaxError(
            f"{printable(directory)}: expected array_record files, found {found}; convert them: tfds convert_format"
        )
    return builder


def _check_texts(directory: Path) -> None:
    """Reads the texts before TFDS does, which waits for a pipe for ever, and passes over names that are no UTF-8.

    Raises:
        BeitJaxError: names the file.
    """
    for path in (directory / INFO, directory / "features.json", *sorted(directory.glob("*.labels.txt"))):
        if os.path.lexists(path):
            read_text(path, advice="correct it, or prepare the data again")


def _with_images(directory: Path, features: Mapping[str, Any]) -> dict[str, Any]:
    _check_features(directory, features, {"image": tfds.features.Image})
    return {"labels": ()}


def _with_target(directory: Path, features: Mapping[str, Any]) -> dict[str, Any]:
    target = found_target(directory, dict(features.items()), _metadata(directory).content)
    return {"labels": target.names, "target": target}


def _with_maps(directory: Path, features: Mapping[str, Any]) -> dict[str, Any]:
    _check_features(directory, features, {"image": tfds.features.Image, "segmentation": tfds.features.Image})
    if not isinstance(features["segmentation"], tfds.features.LabeledImage):
        labels = tuple(f"LABEL_{number}" for number in range(ADE20K_CLASSES))
        return {"labels": labels, "reduced": True, "do_reduce_labels": True}
    facts = _metadata(directory).inside(MASKS)
    reduces = facts.content.get("reduces", False)
    if reduces is not None and not isinstance(reduces, bool):
        raise facts.error("reduces", "true, false or null")
    names = features["segmentation"].names
    return {"labels": tuple(names), "reduced": False, "do_reduce_labels": reduces}


def _metadata(directory: Path) -> Fields:
    """What TFDS calls a data set's metadata; none where there is no such file."""
    path = directory / METADATA
    found = read_json(path, advice="prepare the data again") if os.path.lexists(path) else {}
    return Fields(found, printable(path))


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
