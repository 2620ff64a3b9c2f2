"""Images to labels and features by a given forward pass. Imports no Flax, which `program_cache` does without."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images.files import ImageLike
from beit_jax.images.processor import ImageProcessor
from beit_jax.weights.native import NativeCheckpoint

Pooling = Literal["pooled", "mean", "cls", "tokens"]
OutputName = Pooling | Literal["logits"]


def float32_params(checkpoint: NativeCheckpoint) -> dict[str, Array]:
    """The parameters of a checkpoint, flat and float32, as every forward pass takes them; bfloat16 is widened."""
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in checkpoint.params.items()}


@dataclass(frozen=True)
class Guess:
    """One class for one image: its index, its name, and its softmax probability."""

    index: int
    label: str
    probability: float


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

    def classify(self, images: Sequence[ImageLike], *, top: int, batch_size: int) -> list[list[Guess]]:
        """The same as `beit_jax.classify`."""
        labels = self.config.labels
        if self.config.task != "image_classification" or not labels:
            raise BeitJaxError(f"this model has no classifier (its task is {self.config.task}); use features instead")
        guesses = []
        for logits in self._run(images, batch_size, "logits"):
            powers = np.exp(logits - logits.max())  # NumPy, because JAX would have to compile it
            probabilities = powers / powers.sum()
            best = np.argsort(-probabilities, kind="stable")[:top]
            guesses.append([Guess(int(i), labels[i], float(probabilities[i])) for i in best])
        return guesses

    def features(
        self, images: Sequence[ImageLike], *, pooling: Pooling, batch_size: int
    ) -> Float[np.ndarray, "images *tokens d"]:
        """The same as `beit_jax.features`."""
        return np.stack(list(self._run(images, batch_size, pooling)))

    def _run(self, images: Sequence[ImageLike], batch_size: int, output: OutputName) -> Iterator[np.ndarray]:
        """Yields the output of one image after the other. The last batch is padded: one program serves all."""
        size = max(1, min(batch_size, len(images)))
        for start in range(0, len(images), size):
            batch = list(images[start : start + size])
            padded = np.pad(self.processor(batch), [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
            yield from np.asarray(self.compute(padded, output))[: len(batch)]
