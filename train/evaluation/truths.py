"""What is true of images: label maps of files or of prepared data, in the class numbers of a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bands import load
from beit_jax.images.label_maps import (
    ADE20K_CLASSES,
    IGNORED,
    LabelMap,
    check_labels,
    model_labels,
    read_label_map,
)
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.segmentation import Picture

from ..augmentation.decode import decode_own
from ..data.datasets import SegmentationDataset
from .matching import PLACEHOLDER, ClassOrder, class_order


@dataclass(frozen=True)
class Numbering:
    """How annotations count the classes.

    Attributes:
        from_one: they count from 1, and 0 is no class; otherwise from 0. In both, neither 255 beyond the classes nor
            the checkpoint's ``semantic_loss_ignore_index`` is a class.
        source: who says so, for people.
    """

    from_one: bool
    source: str

    @property
    def option(self) -> str:
        """The option of `beit-jax evaluate` that asks for it."""
        return "--labels-from-one" if self.from_one else "--labels-from-zero"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the number of the first class, and who says so."""
        return {"labels_from": int(self.from_one), "labels_from_source": self.source}


def numbering(processor: ImageProcessor, classes: int, reduce: bool | None = None) -> Numbering:
    """How annotations count the classes of a model, by the first of these that says it.

    The caller does; the checkpoint does (`do_reduce_labels` in preprocessor_config.json); the model has ADE20K's 150
    classes, whose annotations count from 1.

    Args:
        reduce: True if annotations count from 1; None: not said.

    Raises:
        BeitJaxError: nothing says it.
    """
    if reduce is not None:
        return Numbering(reduce, "as asked for")
    if processor.do_reduce_labels is not None:
        return Numbering(processor.do_reduce_labels, "do_reduce_labels of the checkpoint")
    if classes == ADE20K_CLASSES:
        return Numbering(True, f"ADE20K's annotations, as the model has {ADE20K_CLASSES} classes")
    raise BeitJaxError(
        f"the checkpoint does not say whether annotations count its {classes} classes from 0 or from 1 "
        "(do_reduce_labels): pass --labels-from-zero, or --labels-from-one if 0 is no class (in Python reduce=False or "
        "True)"
    )


@runtime_checkable
class Truth(Protocol):
    """Images with what is true of them: see `FolderTruth` and `PreparedTruth`."""

    def __len__(self) -> int: ...

    def read(self, place: int, processor: ImageProcessor) -> tuple[Picture, LabelMap]:
        """The image, as the model's processor takes it but for the selection of bands, and its map as it is stored.

        Raises:
            BeitJaxError: one of them cannot be read.
        """
        ...

    def numbered(self, place: int, stored: LabelMap) -> LabelMap:
        """A map in the model's class numbers, with the model's number of pixels of no class.

        Raises:
            BeitJaxError: a number that is no class.
        """
        ...

    def name(self, place: int) -> str:
        """The map's name in errors."""
        ...

    def title(self, place: int) -> str:
        """The image's name for people."""
        ...


@dataclass(frozen=True)
class FolderTruth:
    """Images of a folder with the maps of another one.

    Attributes:
        seen: which of 0, 255 and other numbers the maps hold that were numbered so far.
    """

    pairs: Sequence[tuple[Path, Path]]
    numbering: Numbering
    labels: tuple[str, ...]
    ignored: int
    seen: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, place: int, processor: ImageProcessor) -> tuple[Picture, LabelMap]:
        image, annotation = self.pairs[place]
        picture = load(image, processor.num_channels, printable(image), select=processor.bands)
        return picture, read_label_map(annotation)

    def numbered(self, place: int, stored: LabelMap) -> LabelMap:
        for kind, found in (("0", stored == 0), ("255", stored == IGNORED), ("other", (stored != 0) & (stored != 255))):
            if found.any():
                self.seen.add(kind)
        numbers = self.numbering.from_one
        truth = model_labels(stored, len(self.labels), from_one=numbers, ignored=self.ignored)
        other = replace(self.numbering, from_one=not numbers)
        advice = f"annotations were read as {self.numbering.option} reads them; or do you want {other.option}?"
        check_labels(truth, self.labels, self.name(place), advice, ignored=self.ignored)
        return truth

    def name(self, place: int) -> str:
        return printable(self.pairs[place][1])

    def title(self, place: int) -> str:
        return printable(self.pairs[place][0].name)


@dataclass(frozen=True)
class PreparedTruth:
    """Images of prepared data with their maps.

    Attributes:
        classes: the model's class for every class of the data, and last the model's number of pixels of no class.
    """

    images: SegmentationDataset
    classes: Int[np.ndarray, " classes_and_none"]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, place: int, processor: ImageProcessor) -> tuple[Picture, LabelMap]:
        record, name = self.images[place], self.name(place)
        picture = decode_own(record["image"], name, processor.num_channels, processor.bands)
        return picture, self.images.load_labels(place)

    def numbered(self, place: int, stored: LabelMap) -> LabelMap:
        last = len(self.classes) - 1
        return self.classes[np.where(stored == self.images.no_class, last, stored)]

    def name(self, place: int) -> str:
        return self.images.where(place)

    def title(self, place: int) -> str:
        return printable(self.images[place]["file_name"])


def map_order(images: SegmentationDataset, labels: Sequence[str]) -> ClassOrder:
    """The model's class for every class of label maps.

    Raises:
        BeitJaxError: classes that the model does not have.
    """
    found, source = images.labels, printable(images.directory)
    unnamed = any(all(PLACEHOLDER.fullmatch(name) for name in names) for names in (found, labels))
    if unnamed and len(found) == len(labels) and set(found) != set(labels):
        return ClassOrder(tuple(range(len(labels))), "number")
    if not set(found) <= set(labels):
        strange = next(name for name in found if name not in set(labels))
        raise BeitJaxError(
            f"{source}: class {printable(strange, 40)} is none of the model's {len(labels)}, whose first is "
            f"{printable(labels[0], 40)}; prepare the data with the model's names (--labels), or evaluate another model"
        )
    return class_order(found, labels, source)
