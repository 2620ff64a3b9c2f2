"""Images to labels and features by a given forward pass. Imports no Flax, which `program_cache` does without."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol, get_args, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from beit_jax.choices import nearest
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.files import ImageLike, image_list, image_name
from beit_jax.images.processor import ImageProcessor, batch_of
from beit_jax.terminal import Advance
from beit_jax.weights.native import NativeCheckpoint

Pooling = Literal["pooled", "mean", "cls", "tokens"]
OutputName = Pooling | Literal["logits"]


@runtime_checkable
class Outputs(Protocol):
    """What a model gives: `beit_jax.models.interface.BeitOutput`."""

    @property
    def last_hidden_state(self) -> Array: ...

    @property
    def pooler_output(self) -> Array | None: ...

    @property
    def logits(self) -> Array | None: ...


def named(outputs: Outputs, name: OutputName) -> Float[Array, "b ..."]:
    """The logits of a model, or one of its features; without pooling "pooled" is the "mean" of the patch tokens."""
    tokens = outputs.last_hidden_state
    found = {"logits": outputs.logits, "pooled": outputs.pooler_output, "cls": tokens[:, 0], "tokens": tokens}.get(name)
    return tokens[:, 1:].mean(axis=1) if found is None else found


def ignore(done: int) -> None:
    """Shows no progress."""


def params_of(checkpoint: NativeCheckpoint, dtype: DTypeLike = jnp.float32) -> dict[str, Array]:
    """The parameters of a checkpoint, flat and of one dtype: bfloat16 is widened to float32, or float32 rounded."""
    return {name: jnp.asarray(leaf, dtype) for name, leaf in checkpoint.params.items()}


@dataclass(frozen=True)
class Guess:
    """One class for one image.

    Attributes:
        index, label: its number and its name.
        probability: by softmax, or by sigmoid where an image may have several classes
            (`BeitConfig.score_function`); None for regression.
        value: the output itself, for regression, whose outputs are no classes; None otherwise.
    """

    index: int
    label: str
    probability: float | None
    value: float | None = None


def guesses_of(config: BeitConfig, logits: Float[np.ndarray, " classes"], top: int) -> list[Guess]:
    """The `top` most probable classes, most probable first; for regression all values, in the order of the outputs.

    It computes by NumPy, because JAX would have to compile it.
    """
    labels, kind = config.labels, config.score_function
    if kind is None:
        return [Guess(i, label, None, float(logits[i])) for i, label in enumerate(labels)]
    if kind == "softmax":
        powers = np.exp(logits - logits.max())
        probabilities = powers / powers.sum()
    else:
        probabilities = np.exp(-np.logaddexp(0.0, -logits))
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [Guess(int(i), labels[i], float(probabilities[i])) for i in best]


@dataclass(frozen=True)
class Predictor:
    """Computes `beit_jax.classify` and `beit_jax.features`, by a model or by a stored program.

    Attributes:
        compute: the compiled forward pass; takes pixel_values [b, h, w, c] float32 and the name of an output, returns
            that output [b, ...].
    """

    config: BeitConfig
    processor: ImageProcessor
    compute: Callable[[ArrayLike, OutputName], Array]

    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        top: int,
        batch_size: int,
        bad: BadImages | None = None,
        advance: Advance = ignore,
    ) -> list[Guess] | list[list[Guess]]:
        """The same as `beit_jax.classify`; arguments as those of `outputs`."""
        check_counts(top=top, batch_size=batch_size)
        if self.config.task != "image_classification" or not self.config.labels:
            raise BeitJaxError(f"this model has no classifier (its task is {self.config.task}); use features instead")
        listed, one = image_list(images)
        guesses = []
        for logits in self.outputs(listed, "logits", batch_size=batch_size, bad=bad, advance=advance):
            guesses.append(guesses_of(self.config, logits, top))
        return guesses[0] if one else guesses

    def features(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        pooling: Pooling,
        batch_size: int,
        bad: BadImages | None = None,
        advance: Advance = ignore,
    ) -> Float[np.ndarray, "*images d"]:
        """The same as `beit_jax.features`; arguments as those of `outputs`."""
        check_counts(batch_size=batch_size)
        if pooling not in get_args(Pooling):
            near = nearest(str(pooling), get_args(Pooling))
            advice = f"; did you mean {near}?" if near else ""
            raise BeitJaxError(
                f"pooling: expected {' or '.join(get_args(Pooling))}, found {printable(pooling)}{advice}"
            )
        listed, one = image_list(images)
        found = list(self.outputs(listed, pooling, batch_size=batch_size, bad=bad, advance=advance))
        if one:
            return found[0]
        return np.stack(found) if found else np.zeros((0, *self._feature_shape(pooling)), np.float32)

    def _feature_shape(self, pooling: Pooling) -> tuple[int, ...]:
        """The shape of the features of an image of the model's own size."""
        (rows, columns), width = self.config.grid, self.config.hidden_size
        return (1 + rows * columns, width) if pooling == "tokens" else (width,)

    def outputs(
        self,
        images: Sequence[ImageLike],
        output: OutputName,
        *,
        batch_size: int,
        bad: BadImages | None = None,
        advance: Advance = ignore,
    ) -> Iterator[np.ndarray]:
        """Yields the output of one image after the other. The last batch is padded: one program serves all.

        Args:
            bad: notes the images that cannot be read, which are left out; by default the first one is an error.
            advance: called with the number of images after every batch, with those that were left out.

        Raises:
            BeitJaxError: an image cannot be read and is not left out.
        """
        size = max(1, min(batch_size, len(images)))
        places = iter(range(len(images)))
        done = 0
        while batch := list(islice(self._readable(images, places, bad), size)):
            pixels = batch_of([values for _, values in batch])
            padded = np.pad(pixels, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
            yield from np.asarray(self.compute(padded, output))[: len(batch)]
            last = batch[-1][0] + 1
            advance(last - done)
            done = last
        advance(len(images) - done)  # the last ones may all be bad

    def _readable(
        self, images: Sequence[ImageLike], places: Iterator[int], bad: BadImages | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the place and the pixel values of the next images that can be read."""
        for place in places:
            image = images[place]
            try:
                yield place, self.processor.one(image, image_name(image, place))
            except BeitJaxError as error:
                if bad is None:
                    raise
                bad.note(place, error)


def check_counts(**counts: int) -> None:
    """Refuses numbers that must be at least 1, by their names: ``top``, ``batch_size``.

    Raises:
        BeitJaxError: names the first such number.
    """
    for name, count in counts.items():
        if count < 1:
            raise BeitJaxError(f"{name}: expected an integer of at least 1, found {count}")
