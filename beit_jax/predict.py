"""From a checkpoint and images to labels and features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from beit_jax import weights
from beit_jax.errors import BeitJaxError
from beit_jax.heads import Model, build_model
from beit_jax.hub import Source, resolve
from beit_jax.image_io import ImageLike
from beit_jax.images import ImageProcessor
from beit_jax.tree import unflatten

Pooling = Literal["pooled", "mean", "cls", "tokens"]
Wanted = Pooling | Literal["logits"]


@dataclass(frozen=True)
class Guess:
    """One class for one image: its index, its name, and its softmax probability."""

    index: int
    label: str
    probability: float


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Model, ImageProcessor]:
    """The model and image processor of a checkpoint.

    Args:
        source: a native checkpoint, a directory in Hugging Face format (converted in memory), or a hub name.
        revision, cache_dir: of a hub name, as huggingface_hub has them.
        dtype: what matrix products compute in, float32 or bfloat16.

    Returns:
        The model, a pytree that works under `jax.jit`, `jax.grad` and `jax.vmap`; and its `ImageProcessor`.

    Raises:
        BeitJaxError: no such source, or one that cannot be read completely; one line that says which file or tensor.
    """
    checkpoint = read(resolve(source, revision=revision, cache_dir=cache_dir))
    params = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in checkpoint.params.items()}
    return build_model(checkpoint.config, unflatten(params), dtype=dtype), checkpoint.processor


def read(source: Source) -> weights.NativeCheckpoint:
    """A native checkpoint as it is; any other source through the converter."""
    if source.path.is_dir() and weights.is_native(source.path):
        return weights.load(source.path)
    from beit_jax.convert import importer  # not at the top: reading native checkpoints needs no converter

    return importer.load(source)


def classify(
    model: Model, processor: ImageProcessor, images: Sequence[ImageLike], *, top: int = 5, batch_size: int = 8
) -> list[list[Guess]]:
    """The `top` most probable classes of every image, most probable first.

    Raises:
        BeitJaxError: a model without a classifier, or an image that cannot be read.
    """
    labels = model.config.labels
    if model.config.task != "image_classification" or not labels:
        raise BeitJaxError(f"this model has no classifier (its task is {model.config.task}); use features instead")
    guesses = []
    for logits in _run(model, processor, images, batch_size, "logits"):
        powers = np.exp(logits - logits.max())  # by NumPy: JAX would compile it first
        probabilities = powers / powers.sum()
        best = np.argsort(-probabilities, kind="stable")[:top]
        guesses.append([Guess(int(i), labels[i], float(probabilities[i])) for i in best])
    return guesses


def features(
    model: Model,
    processor: ImageProcessor,
    images: Sequence[ImageLike],
    *,
    pooling: Pooling = "pooled",
    batch_size: int = 8,
) -> Float[np.ndarray, "images *tokens d"]:
    """Features of every image, float32.

    Args:
        pooling: "pooled": what the model itself pools, or the mean of the patch tokens where it pools nothing;
            "mean" of the patch tokens, "cls" token, or all "tokens", class token first.

    Raises:
        BeitJaxError: an image that cannot be read.
    """
    return np.stack(list(_run(model, processor, images, batch_size, pooling)))


@partial(jax.jit, static_argnames="wanted")
def _forward(model: Model, pixel_values: Array, wanted: Wanted) -> Array:
    output = model(pixel_values)
    tokens = output.last_hidden_state
    found = {"logits": output.logits, "pooled": output.pooler_output, "cls": tokens[:, 0], "tokens": tokens}.get(wanted)
    return tokens[:, 1:].mean(axis=1) if found is None else found


def _run(
    model: Model, processor: ImageProcessor, images: Sequence[ImageLike], batch_size: int, wanted: Wanted
) -> Iterator[np.ndarray]:
    """What is wanted, image by image. The last batch is padded, so that one compilation serves all."""
    size = max(1, min(batch_size, len(images)))
    for start in range(0, len(images), size):
        batch = list(images[start : start + size])
        padded = np.pad(processor(batch), [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
        yield from np.asarray(_forward(model, jnp.asarray(padded), wanted))[: len(batch)]
