"""Labels and features of images, by a model or from a checkpoint."""

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from beit_jax.choices import ProblemType
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import resolve
from beit_jax.images.files import ImageLike
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference import packing
from beit_jax.inference.predictor import Guess, OutputName, Pooling, Predictor, named, params_of
from beit_jax.inference.reading import read, with_head
from beit_jax.models.build import Model, build_model
from beit_jax.models.heads import Labels
from beit_jax.tree import unflatten
from beit_jax.weights.native import NativeCheckpoint


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    labels: Labels | int | None = None,
    problem_type: ProblemType | None = None,
    seed: int = 0,
    packed: bool = False,
) -> tuple[Model, ImageProcessor]:
    """The model and image processor of a checkpoint.

    >>> model, processor = from_pretrained("./beit-base-pt22k", labels=["cat", "dog"])  # with a new classifier

    Args:
        source: a native checkpoint, whatever `beit-jax convert` reads (converted in memory), or a hub name.
        revision, cache_dir: of a hub name, as huggingface_hub has them.
        dtype: of the matrix products, float32 or bfloat16.
        param_dtype: of the parameters, float32, or bfloat16 for half the memory.
        labels: the classes of a classifier, of a segmentation model, or of a classifier on an encoder without one:
            names, or their count for LABEL_0, LABEL_1, .... Names of the checkpoint's classes keep their weights, in
            this order, and so do numbers of them; of other names the whole head starts new, and a warning says so.
        problem_type: what a classifier's outputs are, which decides how they become scores.
        seed: draws what starts new in a head.
        packed: for many forward passes on one CPU: as `pack` lays kernels out, in the memory that they were read to.

    Returns:
        The model, a pytree that works under `jax.jit`, `jax.grad` and `jax.vmap`; and its `ImageProcessor`.

    Raises:
        BeitJaxError: the source does not exist or cannot be read completely, naming the file or the tensor; classes
            that the checkpoint cannot have.
    """
    dtype, param_dtype = _float("dtype", dtype), _float("param_dtype", param_dtype)
    checkpoint = read(resolve(source, revision=revision, cache_dir=cache_dir))
    if labels is not None or problem_type is not None:
        checkpoint, change = with_head(checkpoint, labels, problem_type, seed=seed)
        if change.drawn:
            warnings.warn(f"{printable(source)}: {'; '.join(change.notes)}", stacklevel=2)
    return build(checkpoint, dtype=dtype, param_dtype=param_dtype, packed=packed), checkpoint.processor


def _float(name: str, value: DTypeLike) -> DTypeLike:
    """A dtype that models compute or keep parameters in."""
    try:
        found = jnp.dtype(value)
    except TypeError:
        found = None
    if found not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise BeitJaxError(f"{name}: expected float32 or bfloat16, found {printable(value)}")
    return found


def build(
    checkpoint: NativeCheckpoint,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    packed: bool = False,
) -> Model:
    """Builds the model of a loaded checkpoint.

    Args:
        packed: of a checkpoint that nobody else uses: parameters are taken out, and their arrays written over, where
            kernels can be packed (`packing.packed`).
    """
    fits = packed and {jnp.dtype(dtype), jnp.dtype(param_dtype)} == {jnp.dtype(jnp.float32)} and jax.device_count() == 1
    params = packing.packed(checkpoint.params) if fits else params_of(checkpoint, param_dtype)
    return build_model(checkpoint.config, unflatten(params), dtype=dtype)


@overload
def classify(  # type: ignore[overload-overlap]  # text is a path, and not a sequence of images
    model: Model, processor: ImageProcessor, images: ImageLike, *, top: int = 5, batch_size: int = 8
) -> list[Guess]: ...


@overload
def classify(
    model: Model, processor: ImageProcessor, images: Iterable[ImageLike], *, top: int = 5, batch_size: int = 8
) -> list[list[Guess]]: ...


def classify(
    model: Model,
    processor: ImageProcessor,
    images: ImageLike | Iterable[ImageLike],
    *,
    top: int = 5,
    batch_size: int = 8,
) -> list[Guess] | list[list[Guess]]:
    """The `top` most probable classes of an image, most probable first; or such a list for every image.

    Args:
        images: one image: a path, a PIL image or a uint8 array [h, w], [h, w, 1] or [h, w, 3]; or several of them, or
            an array [b, h, w, c].

    Returns:
        For one image its classes, for several a list with the classes of each. A model of regression has values instead
        of probabilities: all of them, in the order of its outputs.

    Raises:
        BeitJaxError: a model without a classifier, an image that cannot be read, or a number below 1.
    """
    return predictor(model, processor).classify(images, top=top, batch_size=batch_size)


def features(
    model: Model,
    processor: ImageProcessor,
    images: ImageLike | Iterable[ImageLike],
    *,
    pooling: Pooling = "pooled",
    batch_size: int = 8,
) -> Float[np.ndarray, "*images d"]:
    """Features of an image, or of every image, float32.

    Args:
        images: as in `classify`.
        pooling: "mean" of the patch tokens; the "cls" token; all "tokens", class token first; or "pooled": the model's
            own pooled output, and the mean of the patch tokens if the model pools nothing.

    Returns:
        For one image [d], or [1 + patches, d] of "tokens"; for several the same with a first axis of images, which may
        be none.

    Raises:
        BeitJaxError: an image that cannot be read, images that differ in size, or a batch size below 1.
    """
    return predictor(model, processor).features(images, pooling=pooling, batch_size=batch_size)


def predictor(model: Model, processor: ImageProcessor) -> Predictor:
    """The predictor of a model. The forward pass is traced and compiled when it is first called."""
    return Predictor(model.config, processor, partial(forward, model))


@partial(jax.jit, static_argnames="output")
def forward(model: Model, pixel_values: Float[Array, "b height width c"], output: OutputName) -> Float[Array, "b ..."]:
    """The named output of a model: its logits, or one of its features."""
    return named(model(pixel_values), output)
