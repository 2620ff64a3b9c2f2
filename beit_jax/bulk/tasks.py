"""What a model computes, and what becomes of it: rows of features, or rows of classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol, get_args

import numpy as np
from jaxtyping import Float32

from beit_jax.choices import nearest
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.predictor import OutputName, Pooling, guesses_of
from beit_jax.tables.schema import ERROR, IMAGE, Column, Part

FORMAT: Final = "beit-jax features 1"


Compute = Callable[[np.ndarray, OutputName], Any]


@dataclass(frozen=True)
class Computing:
    """A model that computes batches.

    Attributes:
        compute: takes pixel values [b, h, w, c] float32 and the name of an output, and returns it [b, ...]. It may
            return before the output is computed.
        devices: that share a batch, whose size must be a multiple of their number.
        batch: the only size of a batch, for programs that have one; None: any size.
        facts: what the outputs depend on, for JSON: the name of the model, its weights' digest, the preprocessing.
    """

    config: BeitConfig
    processor: ImageProcessor
    compute: Compute
    facts: Mapping[str, Any]
    devices: int = 1
    batch: int | None = None

    def size(self, asked: int, images: int) -> int:
        """The size of all batches: no larger than asked, unless the devices need one more image each."""
        if self.batch is not None:
            return self.batch
        return -(-max(1, min(asked, images)) // self.devices) * self.devices


class Task(Protocol):
    """What is computed of every image, and the rows that are made of it."""

    @property
    def output(self) -> OutputName:
        """The output of the model."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """Of the table, after the image."""

    def shape(self, output: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the values of a row, of an output of that shape; None: rows have no values."""

    def part(
        self, names: Sequence[str], errors: Sequence[str | None], outputs: Float32[np.ndarray, "images ..."]
    ) -> Part:
        """The rows of some images.

        Args:
            errors: of images that could not be read, whose outputs mean nothing.
            outputs: [images, ...] float32.
        """

    def facts(self) -> dict[str, Any]:
        """What the rows depend on besides the model and the images, for JSON."""


@dataclass(frozen=True)
class Features:
    """The features of images.

    Raises:
        BeitJaxError: no such pooling.
    """

    pooling: Pooling = "pooled"

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            near = nearest(str(self.pooling), get_args(Pooling))
            advice = f"; did you mean {near}?" if near else ""
            expected = " or ".join(get_args(Pooling))
            raise BeitJaxError(f"pooling: expected {expected}, found {printable(self.pooling)}{advice}")

    @property
    def output(self) -> OutputName:
        return self.pooling

    @property
    def columns(self) -> Mapping[str, Column]:
        return {}

    def shape(self, output: tuple[int, ...]) -> tuple[int, ...] | None:
        return output

    def part(
        self, names: Sequence[str], errors: Sequence[str | None], outputs: Float32[np.ndarray, "images ..."]
    ) -> Part:
        return Part([_row(name, error) for name, error in zip(names, errors, strict=True)], outputs)

    def facts(self) -> dict[str, Any]:
        return {"format": FORMAT, "pooling": self.pooling}


@dataclass(frozen=True)
class Classes:
    """The most probable classes of images; of a model of regression all its values.

    Attributes:
        top: classes of an image.

    Raises:
        BeitJaxError: a model without a classifier.
    """

    config: BeitConfig
    top: int = 5

    def __post_init__(self) -> None:
        if self.config.task != "image_classification" or not self.config.labels:
            raise BeitJaxError(f"this model has no classifier (its task is {self.config.task}); use features instead")

    @property
    def output(self) -> OutputName:
        return "logits"

    @property
    def score(self) -> str:
        """The name of the number that a class has."""
        return "value" if self.config.score_function is None else "probability"

    @property
    def columns(self) -> Mapping[str, Column]:
        return {"classes": {"index": "integer", "label": "text", self.score: "number"}}

    def shape(self, output: tuple[int, ...]) -> tuple[int, ...] | None:
        return None

    def part(
        self, names: Sequence[str], errors: Sequence[str | None], outputs: Float32[np.ndarray, "images ..."]
    ) -> Part:
        rows = []
        for name, error, logits in zip(names, errors, outputs, strict=True):
            guesses = [] if error is not None else guesses_of(self.config, logits, self.top)
            listed = [{key: value for key, value in asdict(guess).items() if value is not None} for guess in guesses]
            rows.append({IMAGE: name, "classes": listed} if error is None else _row(name, error))
        return Part(rows)

    def facts(self) -> dict[str, Any]:
        return {"format": "beit-jax classes 1", "top": self.top}


def _row(name: str, error: str | None) -> dict[str, Any]:
    return {IMAGE: name} if error is None else {IMAGE: name, ERROR: error}
