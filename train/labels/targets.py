"""What a data set says about each image: its class, several classes, or numbers; and where records hold that."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int32, UInt8

from beit_jax.choices import ProblemType
from beit_jax.errors import BeitJaxError, printable

LABEL, LABELS, VALUES = "label", "labels", "values"
"""The features of a data set of one class for an image, of any number of classes, and of numbers."""
NAMES_OF_VALUES: Final = "names of values"
"""The key under which a data set's metadata has the names of its numbers, as TFDS' tensors have none."""
Label = Int32[np.ndarray, ""] | UInt8[np.ndarray, " classes"] | Float32[np.ndarray, " values"]
"""An image's class; 1 for each of its classes and 0 for the others; or its numbers."""

_WORDS: Mapping[ProblemType, str] = {
    "single_label_classification": "classified image",
    "multi_label_classification": "image with classes",
    "regression": "image with values",
}
_DTYPES: Mapping[ProblemType, type[np.generic]] = {
    "single_label_classification": np.int32,
    "multi_label_classification": np.uint8,
    "regression": np.float32,
}


@dataclass(frozen=True)
class Target:
    """What a data set says about each image.

    Attributes:
        feature: its name in records.
        problem_type: as transformers names it.
        names: of the classes by number, or of the numbers in their order.
        held: the list of ``tf.train.Feature`` that holds it.
        flags: records hold 0 or 1 for every class, not the numbers of the image's classes.
    """

    feature: str
    problem_type: ProblemType
    names: tuple[str, ...]
    held: Literal["int64_list", "float_list"] = "int64_list"
    flags: bool = False

    @property
    def kind(self) -> str:
        """What a record is, for errors."""
        return _WORDS[self.problem_type]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a `Label`."""
        return () if self.problem_type == "single_label_classification" else (len(self.names),)

    @property
    def dtype(self) -> type[np.generic]:
        """The dtype of a `Label`."""
        return _DTYPES[self.problem_type]

    @property
    def nothing(self) -> Label:
        """A label for an image that cannot be read."""
        return np.zeros(self.shape, self.dtype)

    def label(self, raw: Any) -> Label:
        """The `Label` of the number of a class, of the numbers of an image's classes, or of values."""
        if self.problem_type != "multi_label_classification":
            return np.asarray(raw, self.dtype)
        present = np.zeros(self.shape, self.dtype)
        present[np.asarray(raw, np.int64)] = 1
        return present

    def read(self, feature: Any, where: str) -> Label:
        """The `Label` that a record's ``tf.train.Feature`` holds.

        Args:
            where: stands for the record in errors.

        Raises:
            IndexError: a classified image without a class.
            BeitJaxError: a number of a class that is out of range; another number of values; a value that is none.
        """
        values = np.asarray(getattr(feature, self.held).value)
        if self.problem_type == "regression":
            if len(values) != len(self.names) or not np.isfinite(values).all():
                raise BeitJaxError(f"{where}: expected {len(self.names)} finite values, found {values.tolist()}")
            return values.astype(np.float32)
        if self.flags:
            if len(values) != len(self.names):
                raise BeitJaxError(f"{where}: expected 0 or 1 for {len(self.names)} classes, found {len(values)}")
            return values.astype(np.uint8)
        for label in values if self.problem_type == "multi_label_classification" else values[:1]:
            if not 0 <= label < len(self.names):
                raise BeitJaxError(f"{where}: label {label}, expected 0 to {len(self.names) - 1}")
        return self.label(values[0] if self.problem_type == "single_label_classification" else values)


def classes_of(labels: Sequence[str]) -> Target:
    """What a folder for each class says of its images."""
    return Target(LABEL, "single_label_classification", tuple(labels))


def found_target(directory: Path, features: Mapping[str, Any], metadata: Mapping[str, Any]) -> Target:
    """What a data set says about each image: its feature ``label``, else ``labels``, else ``values``, else the only
    one that is such a feature, whatever its name.

    Args:
        features: TFDS' features by name.
        metadata: the data set's, with the names of its values where it has such names.

    Raises:
        BeitJaxError: no image, nothing said about it, or several things of which none has one of these names.
    """
    known = {target.feature: target for target in _targets(features, metadata)}
    named = [known[name] for name in (LABEL, LABELS, VALUES) if name in known]
    if isinstance(features.get("image"), tfds.features.Image):
        if named:
            return named[0]
        if len(known) == 1:
            return next(iter(known.values()))
    found = printable(", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items()))
    several = f"; of {', '.join(sorted(known))}, call the one that counts label, labels or values" if known else ""
    raise BeitJaxError(
        f"{printable(directory)}: expected image (Image) and label (ClassLabel), labels (Sequence of ClassLabel) or "
        f"values (Tensor of numbers), found {found}{several}"
    )


def _targets(features: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[Target]:
    for name, feature in features.items():
        if isinstance(feature, tfds.features.ClassLabel):
            yield Target(name, "single_label_classification", tuple(feature.names))
        elif isinstance(feature, tfds.features.Sequence):
            if isinstance(feature.feature, tfds.features.ClassLabel):
                yield Target(name, "multi_label_classification", tuple(feature.feature.names))
        elif type(feature) in (tfds.features.Tensor, tfds.features.Scalar):  # texts and boxes are tensors, too
            dtype, shape = np.dtype(feature.np_dtype), feature.shape
            if len(shape) > 1 or None in shape or 0 in shape or dtype.kind not in "fiub":
                continue
            names = _names(name, shape, metadata.get(NAMES_OF_VALUES))
            if dtype.kind == "b" and shape:
                yield Target(name, "multi_label_classification", names, flags=True)
            elif dtype.kind == "f" or name == VALUES:
                held: Literal["int64_list", "float_list"] = "float_list" if dtype.kind == "f" else "int64_list"
                yield Target(name, "regression", names, held=held)


def _names(feature: str, shape: tuple[int, ...], given: object) -> tuple[str, ...]:
    """The names of a tensor's numbers: those that the data set keeps for its ``values``, else made of the feature's."""
    count = shape[0] if shape else 1
    if feature == VALUES and isinstance(given, list) and len(given) == count:
        return tuple(map(str, given))
    return tuple(f"{feature}_{number}" for number in range(count)) if shape else (feature,)
