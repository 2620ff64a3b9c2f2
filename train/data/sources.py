"""A data set before it is written: its schema, its splits, and what the modules that find one have in common."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
import xxhash

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bands import check_bands, size_of

from ..augmentation.decode import MAX_PIXELS

Example = Mapping[str, Any]  # the values of a record, by feature


@dataclass(frozen=True)
class Split:
    """A split of a data set: how many examples it should have (for progress), and the examples."""

    count: int
    examples: Iterable[Example]


def as_found(example: Example) -> Example:
    """The example itself is the record."""
    return example


def check_image(example: Example) -> None:
    """Decodes an example's image, of any number of bands, and drops the pixels.

    Raises:
        BeitJaxError: the image cannot be decoded.
    """
    check_bands(example["image"], printable(example["file_name"]), max_pixels=MAX_PIXELS)


def image_size(example: Example) -> tuple[int, int]:
    """Height and width of an example's image, which is decoded for it.

    Raises:
        BeitJaxError: the image cannot be decoded, or is an array of which no axis is that of its bands for certain.
    """
    return size_of(example["image"], printable(example["file_name"]), max_pixels=MAX_PIXELS)


@dataclass(frozen=True)
class Source:
    """A data set before it is written.

    Attributes:
        labels: names of the classes; empty where images have no label.
        features: the schema in TFDS' terms: {image, label, file_name}.
        nbytes: the space that the data set takes, about.
        unit: what `labels` names, for people.
        check: raises BeitJaxError for an example that cannot be used; called from several threads.
        record: the record of an example that was checked, or a BeitJaxError as of `check`; called from several threads.
        metadata: what TFDS calls so, for JSON; called after the last example, and may raise BeitJaxError.
        notes: a line for everything that people should know of the data; called after `metadata`.
    """

    name: str
    description: str
    labels: tuple[str, ...]
    features: tfds.features.FeaturesDict
    splits: Mapping[str, Split]
    nbytes: int
    check: Callable[[Example], None] = check_image
    record: Callable[[Example], Example] = as_found
    metadata: Callable[[], Mapping[str, Any]] = dict
    notes: Callable[[], Sequence[str]] = tuple
    unit: str = "classes"


def classification_features(labels: Sequence[str]) -> tfds.features.FeaturesDict:
    """The schema of a classified image; TFDS' own imagenet2012 has the same."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(labels)),
            "file_name": tfds.features.Text(),
        }
    )


def name_hash(name: str | Path) -> int:
    """A hash of a file's name in [0, 2**64), the same on every machine: it decides what is held out."""
    return xxhash.xxh3_64_intdigest(os.fsencode(name))


def utf8(name: str) -> str:
    """A file's name as records hold it: in UTF-8, which names of files need not be."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        BeitJaxError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BeitJaxError(f"{printable(path)}: cannot be read ({error.strerror})") from error


def check_share(held_out: float) -> None:
    """Refuses a share of images to hold out for validation that is not in [0, 1).

    Raises:
        BeitJaxError: naming the share.
    """
    if not 0 <= held_out < 1:
        raise BeitJaxError(f"held-out share: expected a number in [0, 1), found {held_out}")
