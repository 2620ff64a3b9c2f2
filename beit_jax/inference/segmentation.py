"""Images of any size to label maps: whole or by overlapping windows, averaged over scales and mirrored images.

Windows are padded to one size and run in batches of one size (or of all windows, if there are fewer). So the model is
compiled for few shapes, whatever the sizes of the images. The logits of a window stay at the model's own resolution.
Three steps follow: upsampling to the window, averaging where windows overlap, resizing to the image. Together they are
linear and separable, so one matrix per axis does all three, for `BAND` rows of the image at a time. Full-size logits
of all classes never exist at once.

Source: microsoft/unilm@768a3c8 beit/semantic_segmentation, whose mmseg 0.11 slides windows, resizes logits, and
averages the probabilities of scales and flips.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from PIL import Image

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images.bands import load
from beit_jax.images.files import MAX_PIXELS, ImageLike, image_list, image_name
from beit_jax.images.label_maps import LabelMap
from beit_jax.images.processor import ImageProcessor, Within
from beit_jax.models.build import Model
from beit_jax.models.segmenter import BeitForSemanticSegmentation
from beit_jax.resize import linear_matrix

Mode: TypeAlias = Literal["slide", "whole"]
MapKind: TypeAlias = Literal["labels", "logits", "probabilities"]

BAND = 64  # rows of the image whose logits exist at a time
MAX_SIDE = 1 << 16  # pixels: a band and the matrices of `Axis` grow with the sides, not with the area
WIDTH_STEP = 128  # pixels: widths are padded to a multiple, so that images of similar widths share a program
WHOLE_STEP = 4  # patches: a whole image is padded to a multiple of them, for the same reason


@dataclass(frozen=True)
class Inference:
    """How an image goes through the model.

    Attributes:
        mode: "slide" (windows of the model's native size) or "whole" (the image at once). By default "whole" if the
            processor makes images of the native size, "slide" otherwise.
        stride: pixels from one window to the next, (rows, columns); by default two thirds of the window (426 of 640,
            341 of 512).
        scales: sizes to average over, as multiples of the processor's size. At any other scale than 1, the short edge
            is at least the window's, and the long edge has no limit, as in the published multi-scale evaluation.
        flip: average over the mirrored image too.
        batch_size: windows run at once.
    """

    mode: Mode | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 2

    def __post_init__(self) -> None:
        if not self.scales or not all(0.0 < scale <= 16.0 for scale in self.scales):
            raise BeitJaxError(f"scales: expected numbers above 0 and at most 16, found {list(self.scales)}")
        if self.stride is not None and min(self.stride) < 1:
            raise BeitJaxError(f"stride: expected positive pixels, found {self.stride}")
        if self.batch_size < 1:
            raise BeitJaxError(f"batch size: expected a positive integer, found {self.batch_size}")

    @property
    def averages(self) -> bool:
        """True if several views of an image are averaged."""
        return len(self.scales) * (1 + self.flip) > 1


DEFAULT = Inference()


@overload
def segment(  # type: ignore[overload-overlap]  # text is a path, and not a sequence of images
    model: Model, processor: ImageProcessor, image: ImageLike, how: Inference = DEFAULT
) -> LabelMap: ...


@overload
def segment(
    model: Model, processor: ImageProcessor, image: Iterable[ImageLike], how: Inference = DEFAULT
) -> list[LabelMap]: ...


def segment(
    model: Model, processor: ImageProcessor, image: ImageLike | Iterable[ImageLike], how: Inference = DEFAULT
) -> LabelMap | list[LabelMap]:
    """The most probable class of every pixel of an image, [h, w] int32; or a list of such maps.

    Args:
        image: one image: a path, a PIL image or a uint8 array [h, w], [h, w, 1] or [h, w, 3]; or several of them of any
            sizes, or an array [b, h, w, c].

    Returns:
        For one image its map, for several a list of maps.

    Raises:
        BeitJaxError: a model for another task, a processor that crops, or an image that cannot be read.
    """
    images, one = image_list(image)
    found = [_labels(model, processor, single, image_name(single, place), how) for place, single in enumerate(images)]
    return found[0] if one else found


def _labels(model: Model, processor: ImageProcessor, image: ImageLike, name: str, how: Inference) -> LabelMap:
    if how.averages:
        return _map(model, processor, image, name, how, "probabilities").argmax(axis=-1).astype(np.int32)
    return _map(model, processor, image, name, how, "labels")


def class_logits(
    model: Model, processor: ImageProcessor, image: ImageLike, how: Inference = DEFAULT
) -> Float32[np.ndarray, "h w classes"]:
    """The logits of every pixel of one image, at one scale and without flip. 150 classes take 600 bytes a pixel.

    Raises:
        BeitJaxError: as `segment`; several scales or flips were asked for, and logits are not averaged.
    """
    if how.averages:
        raise BeitJaxError("logits of several scales or flips are not averaged: ask for probabilities")
    return _map(model, processor, image, image_name(image, 0), how, "logits")


def class_probabilities(
    model: Model, processor: ImageProcessor, image: ImageLike, how: Inference = DEFAULT
) -> Float32[np.ndarray, "h w classes"]:
    """The probabilities of every pixel of one image, averaged over scales and flips. As large as `class_logits`.

    Raises:
        BeitJaxError: as `segment`.
    """
    return _map(model, processor, image, image_name(image, 0), how, "probabilities")


def _map(
    model: Model, processor: ImageProcessor, image: ImageLike, name: str, how: Inference, kind: MapKind
) -> np.ndarray:
    """The map of one kind for the whole image: the mean over its views."""
    picture, size, processor = _read(model, processor, image, name)
    views = list(_views(processor, how, model.config))
    shape = size if kind == "labels" else (*size, model.config.num_labels)
    total = np.zeros(shape, np.int32 if kind == "labels" else np.float32)
    for view, flip in views:
        for start, place in _bands(*_mosaic(model, view, picture, flip, how), size, flip):
            band = np.asarray(_band(*place, kind))[: size[0] - start, : size[1]]
            total[start : start + len(band)] += band
    return total if len(views) == 1 else total / np.float32(len(views))


def labels_and_losses(
    model: Model,
    processor: ImageProcessor,
    image: ImageLike,
    truth: LabelMap,
    *,
    ignored: int,
    how: Inference = DEFAULT,
) -> tuple[LabelMap, Float32[np.ndarray, "h w"]]:
    """The class of every pixel of one image, as `segment` finds it, and the cross entropy of the class that is true.

    Args:
        truth: the true classes, [h, w] integers.
        ignored: the number of pixels without a class; their loss is 0.

    Raises:
        BeitJaxError: as `segment`; a map of another size; several scales or flips, whose logits are not averaged.
    """
    if how.averages:
        raise BeitJaxError("losses of several scales or flips are not defined: their probabilities are averaged")
    name = image_name(image, 0)
    picture, size, processor = _read(model, processor, image, name)
    if truth.shape != size:
        raise BeitJaxError(f"{name}: expected true classes [{size[0]}, {size[1]}], found {list(truth.shape)}")
    labels, losses = np.zeros(size, np.int32), np.zeros(size, np.float32)
    for start, place in _bands(*_mosaic(model, processor, picture, False, how), size, False):
        rows = truth[start : start + BAND].astype(np.int32)
        spare = [(0, BAND - len(rows)), (0, len(place[-1]) - size[1])]
        found = _scored_band(*place, jnp.asarray(np.pad(rows, spare, constant_values=ignored)), ignored)
        for whole, band in zip((labels, losses), found, strict=True):
            whole[start : start + len(rows)] = np.asarray(band)[: len(rows), : size[1]]
    return labels, losses


Picture: TypeAlias = Image.Image | np.ndarray


def _read(
    model: Model, processor: ImageProcessor, image: ImageLike, name: str
) -> tuple[Picture, tuple[int, int], ImageProcessor]:
    """The image, if it can be segmented; its height and width; and the processor of what was read."""
    if not isinstance(model, BeitForSemanticSegmentation):
        raise BeitJaxError(f"this model does not segment (its task is {model.config.task})")
    if processor.crop is not None:
        raise BeitJaxError(
            "the image processor crops, so part of the image would have no label; set do_center_crop false"
        )
    picture = load(image, processor.num_channels, name, select=processor.bands)
    height, width = (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise BeitJaxError(f"{name}: {width}x{height} pixels, expected sides of at most {MAX_SIDE}; cut it")
    return picture, (height, width), replace(processor, bands=None)


def _views(processor: ImageProcessor, how: Inference, config: BeitConfig) -> Iterator[tuple[ImageProcessor, bool]]:
    """Yields (processor, flip) for every view of the image that is averaged."""
    for scale, flip in product(how.scales, (False, True) if how.flip else (False,)):
        yield (processor if how.scales == (1.0,) else _scaled(processor, scale, config.image_size)), flip


def _scaled(processor: ImageProcessor, scale: float, crop: tuple[int, int]) -> ImageProcessor:
    edges, least = processor.resize, min(crop)
    if isinstance(edges, Within):
        return replace(processor, resize=Within(max(int(edges.short * scale + 0.5), least), MAX_PIXELS))
    if isinstance(edges, int):
        return replace(processor, resize=max(int(edges * scale + 0.5), least))
    if isinstance(edges, tuple):
        height, width = (max(int(edge * scale + 0.5), side) for edge, side in zip(edges, crop, strict=True))
        return replace(processor, resize=(height, width))
    raise BeitJaxError("scales need an image processor that resizes (do_resize true)")


@dataclass(frozen=True)
class Axis:
    """Windows along one axis of a prepared image.

    Attributes:
        size: pixels of the prepared image.
        window: pixels of a window; beyond `size` it is padding.
        starts: first pixel of each window.
        outputs: positions of a window's logits.
    """

    size: int
    window: int
    starts: tuple[int, ...]
    outputs: int

    def matrix(self, length: int) -> Float[np.ndarray, "length positions"]:
        """The matrix from the logits of all windows, side by side, to `length` pixels of the original image.

        It upsamples every window to its pixels (padding left out), takes the mean where windows overlap, and resizes
        the result. Both interpolations are bilinear, as torch's.
        """
        upsample = linear_matrix(self.outputs, self.window)[: self.size]
        whole = np.zeros((self.size, len(self.starts), self.outputs))
        count = np.zeros((self.size, 1, 1))
        for i, start in enumerate(self.starts):
            whole[start : start + self.window, i] = upsample
            count[start : start + self.window] += 1.0
        return linear_matrix(self.size, length) @ (whole / count).reshape(self.size, -1)


def _axes(config: BeitConfig, how: Inference, view: ImageProcessor, size: tuple[int, int]) -> tuple[Axis, Axis]:
    """The windows of a prepared image of this size."""
    native = config.image_size
    mode = how.mode or ("whole" if view.resize == native else "slide")
    stride = how.stride or (native[0] * 2 // 3, native[1] * 2 // 3)
    if mode == "slide" and any(step > window for step, window in zip(stride, native, strict=True)):
        raise BeitJaxError(
            f"stride {stride}: expected at most the window {native}, or pixels between windows are missed"
        )

    def axis(i: int) -> Axis:
        patch = config.patch_size[i]
        if mode == "whole":
            step = patch * WHOLE_STEP
            window = size[i] if size[i] == native[i] else -(-size[i] // step) * step
            return Axis(size[i], window, (0,), 4 * window // patch)
        window = native[i]
        count = -(-max(size[i] - window, 0) // stride[i]) + 1
        starts = tuple(max(min(k * stride[i], size[i] - window), 0) for k in range(count))
        return Axis(size[i], window, starts, 4 * window // patch)

    return axis(0), axis(1)


@jax.jit
def _forward(model: BeitForSemanticSegmentation, pixel_values: Array) -> Array:
    logits = model(pixel_values).logits
    assert logits is not None  # a segmentation model always has logits
    return logits


def _mosaic(
    model: Model, view: ImageProcessor, picture: Picture, flip: bool, how: Inference
) -> tuple[Float32[np.ndarray, "rows columns classes"], tuple[Axis, Axis]]:
    """The logits of all windows of a view, side by side, and the windows.

    Memory: the windows' pixels / 16 times the classes, and one batch.
    """
    pixels = view(picture)[0]
    rows, columns = axes = _axes(model.config, how, view, (pixels.shape[0], pixels.shape[1]))
    pixels, batch_size = pixels[:, ::-1] if flip else pixels, how.batch_size
    spare = [(0, max(axis.window - axis.size, 0)) for axis in axes]
    padded = np.pad(pixels, [*spare, (0, 0)])  # with zeros: the mean colour, as in training
    places = list(product(range(len(rows.starts)), range(len(columns.starts))))
    mosaic = np.empty(
        (len(rows.starts) * rows.outputs, len(columns.starts) * columns.outputs, model.config.num_labels), np.float32
    )
    for first in range(0, len(places), batch_size):
        chosen = places[first : first + batch_size]
        batch = np.zeros((min(batch_size, len(places)), rows.window, columns.window, pixels.shape[-1]), np.float32)
        for k, (i, j) in enumerate(chosen):
            top, left = rows.starts[i], columns.starts[j]
            batch[k] = padded[top : top + rows.window, left : left + columns.window]
        logits = np.asarray(_forward(model, jnp.asarray(batch)))
        for k, (i, j) in enumerate(chosen):
            mosaic[i * rows.outputs : (i + 1) * rows.outputs, j * columns.outputs : (j + 1) * columns.outputs] = logits[
                k
            ]
    return mosaic, axes


@partial(jax.jit, static_argnames="kind")
def _band(mosaic: Array, rows: Array, columns: Array, kind: MapKind) -> Array:
    logits = jnp.einsum("ym,mnk,xn->yxk", rows, mosaic, columns, precision="highest")
    if kind == "labels":
        return logits.argmax(axis=-1).astype(jnp.int32)
    return jax.nn.softmax(logits) if kind == "probabilities" else logits


@partial(jax.jit, static_argnames="ignored")
def _scored_band(mosaic: Array, rows: Array, columns: Array, truth: Array, ignored: int) -> tuple[Array, Array]:
    logits = _band(mosaic, rows, columns, "logits")
    counted = truth != ignored
    true = jnp.take_along_axis(logits, jnp.where(counted, truth, 0)[..., None], axis=-1)[..., 0]
    return (
        logits.argmax(axis=-1).astype(jnp.int32),
        jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - true, 0.0),
    )


def _bands(
    mosaic: np.ndarray, axes: tuple[Axis, Axis], size: tuple[int, int], flip: bool
) -> Iterator[tuple[int, tuple[Array, Array, Array]]]:
    """Yields what the map of every `BAND` rows is made of: the first row; the mosaic, and a matrix for either axis.

    Their products have `BAND` rows, and columns to a multiple of `WIDTH_STEP`: more than the image has.
    """
    (height, width), device = size, jnp.asarray(mosaic)
    rows, columns = (axis.matrix(length) for axis, length in zip(axes, size, strict=True))
    columns = columns[::-1] if flip else columns
    across = jnp.asarray(np.pad(columns, [(0, -width % WIDTH_STEP), (0, 0)]), jnp.float32)
    for start in range(0, height, BAND):
        band = rows[start : start + BAND]
        down = jnp.asarray(np.pad(band, [(0, BAND - len(band)), (0, 0)]), jnp.float32)
        yield start, (device, down, across)
