"""Images through a forward pass, whoever computes it, to labels and features. Imports no Flax: see `beit_jax.inference.program_cache`."""

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
Wanted = Pooling | Literal["logits"]


def parameters(checkpoint: NativeCheckpoint) -> dict[str, Array]:
    """Of a checkpoint, flat and float32, as every forward pass takes them; bfloat16 is widened."""
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in checkpoint.params.items()}


@dataclass(frozen=True)
class Guess:
    """One class for one image: its index, its name, and its softmax probability."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Predictor:
    """What `beit_jax.classify` and `beit_jax.features` do, of a model or of a program that was compiled before.

    Attributes:
        compute: of pixel_values [b, h, w, c] float32, what is wanted [b, ...]; compiled.
    """

    config: BeitConfig
    processor: ImageProcessor
    compute: Callable[[ArrayLike, Wanted], Array]

    def classify(self, images: Sequence[ImageLike], *, top: int, batch_size: int) -> list[list[Guess]]:
        """As `beit_jax.classify`."""
        labels = self.config.labels
        if self.config.task != "image_classification" or not labels:
            raise BeitJaxError(f"this model has no classifier (its task is {self.config.task}); use features instead")
        guesses = []
        for logits in self._run(images, batch_size, "logits"):
            powers = np.exp(logits - logits.max())  # by NumPy: JAX would compile it first
            probabilities = powers / powers.sum()
            best = np.argsort(-probabilities, kind="stable")[:top]
            guesses.append([Guess(int(i), labels[i], float(probabilities[i])) for i in best])
        return guesses

    def features(
        self, images: Sequence[ImageLike], *, pooling: Pooling, batch_size: int
    ) -> Float[np.ndarray, "images *tokens d"]:
        """As `beit_jax.features`."""
        return np.stack(list(self._run(images, batch_size, pooling)))

    def _run(self, images: Sequence[ImageLike], batch_size: int, wanted: Wanted) -> Iterator[np.ndarray]:
        """What is wanted, image by image. The last batch is padded, so that one compilation serves all."""
        size = max(1, min(batch_size, len(images)))
        for start in range(0, len(images), size):
            batch = list(images[start : start + size])
            padded = np.pad(self.processor(batch), [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
            yield from np.asarray(self.compute(padded, wanted))[: len(batch)]
