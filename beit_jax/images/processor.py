"""Images to `pixel_values` [b, h, w, c] float32, bit for bit as the references compute them from PIL images.

The same arithmetic serves every preset. transformers (image_transforms.rescale, normalize) multiplies uint8 by the
factor in float64 and rounds to float32. torchvision's ToTensor, which unilm and timm use, divides by 255 in float32.
For the factor 1/255 both give the same float32 for all 256 values, and both apply mean and std in float32. They differ
in the centre crop, for which there is the field `crop_rounding`.

Images of other types than uint8 are resized in float32, every channel by Pillow's kernels, and are not rounded.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from jaxtyping import Float32, Shaped
from PIL import Image

from beit_jax.config import PresetName
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bands import Selection, load
from beit_jax.images.files import MAX_PIXELS, ImageLike, image_list, image_name, open_image, to_rgb
from beit_jax.images.preprocessor_config import RESAMPLES, ROUNDINGS, Resample, Rounding, Within, processor_fields
from beit_jax.images.scaling import rescale_factor, resized, scaled
from beit_jax.json_file import read_json
from beit_jax.resize import linear_taps

__all__ = [
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRESETS",
    "ImageProcessor",
    "Within",
    "ade20k_processor",
    "for_channels",
    "open_image",
    "preset",
    "to_rgb",
]


PRESETS: Final[tuple[PresetName, ...]] = get_args(PresetName)
HALF: Final = (0.5, 0.5, 0.5)
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
MOST_CHANNELS: Final = 65536


@dataclass(frozen=True)
class ImageProcessor:
    """Computes pixel_values [b, h, w, num_channels] float32 from paths, PIL images or arrays.

    The steps: decode the bands of the image (`beit_jax.images.bands`), pictures as RGB, or as greyscale if
    `num_channels` is 1 (`open_image`, `to_rgb`); resize with Pillow's kernels; centre crop; multiply by
    `rescale_factor`; subtract `mean` and divide by `std`. A step whose field is None is skipped.

    Attributes:
        resize: (height, width); or the length of the shortest edge, the long edge being int(length * long / short); or
            `Within` two limits.
        antialias: shrinking averages, as Pillow does. Otherwise it samples, as OpenCV's bilinear resize does, and the
            result differs from OpenCV's by at most one of the 255 levels.
        crop: (height, width); a smaller image is padded with zeros, before rescaling.
        crop_rounding: where the crop starts if the number of spare pixels is odd. "floor": at floor(spare / 2), also
            for a negative number, which means padding (transformers' center_crop). "half_even": at round(spare / 2) as
            Python rounds, truncated if it means padding (torchvision's).
        rescale_factor: of the pixels' values. 1/255 brings images of every type to the same scale: uint8 is divided by
            255, uint16 by 65535, int16 by 32767, and floats stay as they are. Any other factor is that of all types.
        mean, std: of the rescaled values, one number for every channel.
        bands: the bands of the file that are the channels, counted from 1; None: all, in their order.
        do_reduce_labels: of a segmentation model, whether label maps count its classes from 1, and 0 is no class, as
            ADE20K's do; None: nobody said. It changes no pixels, and two processors that differ in it are equal.

    Raises:
        BeitJaxError: a value out of range.
    """

    resize: tuple[int, int] | int | Within | None = (224, 224)
    resample: Resample = "bilinear"
    crop: tuple[int, int] | None = None
    crop_rounding: Rounding = "floor"
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = HALF
    std: tuple[float, ...] | None = HALF
    num_channels: int = 3
    antialias: bool = True
    bands: Selection = None
    do_reduce_labels: bool | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        count, edges = self.num_channels, f"positive lengths, at most {MAX_PIXELS} pixels"
        for key, valid, expected in (
            ("num_channels", 1 <= count <= MOST_CHANNELS, f"1 to {MOST_CHANNELS}"),
            ("bands", self.bands is None or _are_bands(self.bands, count), f"{count} numbers from 1 on"),
            ("resize", _bounded(self.resize), edges),
            ("crop", _bounded(self.crop), edges),
            ("resample", self.resample in RESAMPLES, f"one of {', '.join(RESAMPLES)}"),
            ("resample", self.antialias or self.resample == "bilinear", "bilinear, as antialias is false"),
            ("crop_rounding", self.crop_rounding in ROUNDINGS, f"one of {', '.join(ROUNDINGS)}"),
            ("rescale_factor", self.rescale_factor is None or 1e-30 < self.rescale_factor < 1e30, "a positive number"),
            ("mean", self.mean is None or (len(self.mean) == count and _within(self.mean, -1e30)), f"{count} numbers"),
            ("std", self.std is None or (len(self.std) == count and _within(self.std, 1e-30)), f"{count} positives"),
            ("std", (self.std is None) == (self.mean is None), "mean and std, or neither"),
        ):
            if not valid:
                raise BeitJaxError(f"image processor: {key} is {printable(getattr(self, key))}, expected {expected}")

    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> Float32[np.ndarray, "b h w c"]:
        """Computes the pixel values of one image (b = 1) or of several.

        Args:
            images: paths (EXIF orientation is applied), PIL images (it is not, as in transformers), or arrays [h, w]
                or [h, w, channels], uint8, uint16, int16 or float32; or an array [b, h, w, channels] of several.

        Raises:
            BeitJaxError: an image of another type, an unreadable file, or images whose results differ in size.
        """
        listed, _ = image_list(images)
        return batch_of([self.one(image, image_name(image, place)) for place, image in enumerate(listed)])

    def one(self, image: ImageLike, name: str) -> Float32[np.ndarray, "h w c"]:
        """Computes the pixel values of one image.

        Args:
            name: of the image, for errors.

        Raises:
            BeitJaxError: an image of another type, or an unreadable file.
        """
        found = load(image, self.num_channels, name, select=self.bands)
        dtype = np.dtype(np.uint8) if isinstance(found, Image.Image) else found.dtype
        if self.resize is not None:
            height, width = (found.height, found.width) if isinstance(found, Image.Image) else found.shape[:2]
            target, filter = target_size(self.resize, height, width, name), Image.Resampling[self.resample.upper()]
            if not self.antialias:
                found = _sampled(np.asarray(found), target)
            elif isinstance(found, Image.Image):
                found = found.resize(target[::-1], filter)
            else:
                found = resized(found, target, filter)
        pixels = np.asarray(found)
        pixels = pixels.reshape(*pixels.shape[:2], self.num_channels)
        if self.crop is not None:
            pixels = centre_crop(pixels, self.crop, self.crop_rounding)
        return self.normalised(pixels, dtype)

    def normalised(self, pixels: Shaped[np.ndarray, "h w c"], dtype: np.dtype[Any]) -> Float32[np.ndarray, "h w c"]:
        """The last steps of `one`: the values of resized and cropped pixels, multiplied, shifted and divided.

        Args:
            dtype: of the image before it was resized.
        """
        values = scaled(np.ascontiguousarray(pixels), rescale_factor(self.rescale_factor, dtype))
        if self.mean is not None:
            # One long row of all columns and channels: NumPy's loops over three channels alone take four times as long.
            rows, columns = values.reshape(len(values), -1), pixels.shape[1]
            rows -= np.tile(np.array(self.mean, np.float32), columns)
            rows /= np.tile(np.array(self.std, np.float32), columns)
        return values

    def for_channels(self, channels: int, origin: tuple[int, ...] | None = None) -> "ImageProcessor":
        """The processor of the same steps for another number of channels.

        Args:
            origin: for every channel the channel, from 0, whose mean and std it takes; by default all take the average,
                as timm records it.
        """
        if channels == self.num_channels and origin is None:
            return self
        if self.mean is None or self.std is None:
            return replace(self, num_channels=channels, bands=None)
        mean, std = (for_channels(values, channels, origin) for values in (self.mean, self.std))
        return replace(self, num_channels=channels, bands=None, mean=mean, std=std)

    def resized(self, size: tuple[int, int]) -> "ImageProcessor":
        """The processor of the same steps for another (height, width). A crop keeps its share of the resized image.

        Raises:
            BeitJaxError: the size has other proportions than the crop.
        """
        if isinstance(self.resize, Within):  # the model cuts its windows from the result, which grows with them
            longest = round(self.resize.long * min(size) / self.resize.short)
            return replace(self, resize=Within(min(size), longest))
        if self.crop is None:
            return self if self.resize is None else replace(self, resize=size)
        factor = size[0] / self.crop[0]
        if size[1] != self.crop[1] * factor:
            old, new = f"{self.crop[0]}x{self.crop[1]}", f"{size[0]}x{size[1]}"
            raise BeitJaxError(f"image processor: a crop of {old} cannot become {new}; take another image preset")
        edges = self.resize if isinstance(self.resize, tuple) else (self.resize or 0,)
        scaled = tuple(round(edge * factor) for edge in edges)
        resize = None if self.resize is None else scaled[0] if len(scaled) == 1 else (scaled[0], scaled[1])
        return replace(self, resize=resize, crop=size)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "preprocessor_config.json") -> "ImageProcessor":
        """Reads a parsed `preprocessor_config.json`. Pixels are those of transformers' BeitImageProcessorPil.

        The files of transformers 4 (feature extractor, slow, fast) and 5 are read. `size` and `crop_size` may be an
        int, a [height, width] list or a dict. Absent and null keys take the default of the recorded type. Of the
        settings for label maps only `do_reduce_labels` is read; those for torch change no pixels. `do_convert_rgb` is
        not read either: images are always converted, and alpha is dropped, as transformers does with files. (With that
        setting, 5.x blends PIL images in memory onto white.)

        Raises:
            BeitJaxError: begins with `source`; another type of processor, or a value of the wrong type.
        """
        fields = processor_fields(config, source)
        try:
            return cls(**fields)
        except BeitJaxError as error:
            raise BeitJaxError(f"{source}: {error}; correct the file") from error

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "ImageProcessor":
        """Reads a JSON file by `from_hf`.

        Raises:
            BeitJaxError: names the file; it is missing, no JSON object, or refused.
        """
        return cls.from_hf(read_json(Path(path)), printable(os.fspath(path)))

    def to_hf(self) -> dict[str, Any]:
        """The `preprocessor_config.json` of this processor: `from_hf(p.to_hf()) == p`.

        BeitImageProcessorPil loads it and computes the same pixels, with these exceptions. It multiplies images of all
        types by the same factor, and knows no `bands`. It ignores `Within` and `antialias` false. With `crop_rounding`
        "half_even" its crop may start one pixel off, if the number of spare pixels is odd.
        """
        sizes = {
            key: _written(edges)
            for key, edges in (("size", self.resize), ("crop_size", self.crop))
            if edges is not None
        }
        labels = {} if self.do_reduce_labels is None else {"do_reduce_labels": self.do_reduce_labels}
        return (
            sizes
            | labels
            | {
                "image_processor_type": "BeitImageProcessor",
                "do_resize": self.resize is not None,
                "resample": RESAMPLES.index(self.resample),
                "antialias": self.antialias,
                "max_longest_edge": self.resize.long if isinstance(self.resize, Within) else None,
                "do_center_crop": self.crop is not None,
                "crop_rounding": self.crop_rounding,
                "do_rescale": self.rescale_factor is not None,
                "rescale_factor": self.rescale_factor,
                "do_normalize": self.mean is not None,
                "image_mean": list(self.mean or HALF[:1] * self.num_channels),
                "image_std": list(self.std or HALF[:1] * self.num_channels),
            }
            | ({} if self.bands is None else {"bands": list(self.bands)})
        )

    def describe(self) -> str:
        """One line for people; sizes are height x width: "resize 224x224 bilinear, /255, mean 0.5 std 0.5"."""
        steps = {1: ["greyscale"], 3: []}.get(self.num_channels, [f"{self.num_channels} channels"])
        if self.bands is not None:
            steps = [f"bands {' '.join(map(str, self.bands))}"]
        if self.resize is not None:
            steps.append(f"resize {_spoken(self.resize)} {self.resample}{'' if self.antialias else ' (sampled)'}")
        if self.crop is not None:
            steps.append("centre crop {}x{}".format(*self.crop))
        if self.rescale_factor is not None:
            steps.append(f"/{1 / self.rescale_factor:g}")
        if self.mean is not None and self.std is not None:
            steps.append(f"mean {_brief(self.mean)} std {_brief(self.std)}")
        return ", ".join(steps) or "pixels as they are"


def batch_of(pixels: Sequence[Float32[np.ndarray, "h w c"]]) -> Float32[np.ndarray, "b h w c"]:
    """Puts the pixel values of images together.

    Raises:
        BeitJaxError: there are none, or their sizes differ.
    """
    sizes = sorted({values.shape[:2] for values in pixels})
    if len(sizes) != 1:
        found = ", ".join(f"{height}x{width}" for height, width in sizes[:4]) or "no images"
        raise BeitJaxError(f"images: expected at least one, all of one size, found {found}; resize or crop them")
    return np.stack(pixels)


def for_channels(values: tuple[float, ...], channels: int, origin: tuple[int, ...] | None = None) -> tuple[float, ...]:
    """Means or standard deviations for another number of channels: the average for each, as timm's ``save_for_hf``.

    Args:
        origin: for every channel the one, from 0, whose value it takes.
    """
    if origin is not None:
        return tuple(values[channel] for channel in origin)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def preset(
    name: PresetName,
    size: int | tuple[int, int] = 224,
    *,
    mean: tuple[float, ...] = HALF,
    std: tuple[float, ...] = HALF,
    crop_pct: float | None = None,
    num_channels: int | None = None,
) -> ImageProcessor:
    """The image processors of the three families of code, by name.

    - hf: resize to (height, width) without regard to proportions, bilinear, as the hub's BEiT checkpoints record.
    - unilm_eval: resize the shortest edge to int(size / crop_pct), bicubic, and crop the centre as torchvision does.
      crop_pct is 224/256 below 384 pixels, and 1 from 384 on (unilm beit/datasets.py, build_transform). The originals
      are square. For another size both edges are resized, each to int(size / crop_pct), as training stretches its crops
      and as transformers' processor can do it.
    - timm: the same with crop_pct 0.9 below 384. Some tags differ (beitv2_large .95, beit3 1.0), for which there is the
      argument. This is timm's path for PIL images; its GPU prefetcher normalises with other roundings.

    Args:
        mean, std: a number for every channel. IMAGENET_MEAN and IMAGENET_STD for BEiT v2, and for Data2Vec-Vision as
            pre-trained.
        num_channels: by default as many as `mean` has numbers; where it has another number of them, all channels take
            their average.

    Raises:
        BeitJaxError: an unknown name, timm's crop of a size that is not square, or a crop_pct outside (0, 1].
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    if num_channels is not None:
        mean, std = (for_channels(values, num_channels) for values in (mean, std))
    if name == "hf" and crop_pct is None:
        return ImageProcessor((height, width), "bilinear", mean=mean, std=std, num_channels=len(mean))
    percents = {"unilm_eval": 224 / 256, "timm": 0.9}
    if name not in percents:
        raise BeitJaxError(f"image preset {printable(name)}, expected one of {', '.join(PRESETS)}, hf without crop_pct")
    if height != width and name == "timm":
        raise BeitJaxError(
            f"image preset {name}: size {height}x{width}, expected a square; hf and unilm_eval take any size"
        )
    if crop_pct is None:
        crop_pct = 1.0 if min(height, width) >= 384 else percents[name]
    if not 0 < crop_pct <= 1:
        raise BeitJaxError(f"image preset {name}: crop_pct {crop_pct}, expected above 0 and at most 1")
    whole, crop = (int(height / crop_pct), int(width / crop_pct)), (height, width)
    if height != width:
        return ImageProcessor(whole, "bicubic", crop, mean=mean, std=std, num_channels=len(mean))
    return ImageProcessor(
        whole[0], "bicubic", crop, crop_rounding="half_even", mean=mean, std=std, num_channels=len(mean)
    )


def ade20k_processor(size: int = 640) -> ImageProcessor:
    """The processor with which BEiT's ADE20K models were trained.

    The short edge becomes `size`, the crop of training, unless the long edge would exceed four times that. Mean and
    standard deviation are ImageNet's. The checkpoints on the hub record `preset("hf", 640)` with bicubic resampling
    instead.
    Source: microsoft/unilm@768a3c8 beit/semantic_segmentation/configs/_base_/datasets/ade20k_640x640.py.
    """
    limits = Within(size, 4 * size)
    return ImageProcessor(
        limits, "bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD, antialias=False, do_reduce_labels=True
    )


def target_size(resize: tuple[int, int] | int | Within, height: int, width: int, name: str) -> tuple[int, int]:
    """The (height, width) that an image of a size is resized to.

    Args:
        name: of the image, for errors.

    Raises:
        BeitJaxError: the result would be larger than MAX_PIXELS.
    """
    if isinstance(resize, tuple):
        return resize
    if isinstance(resize, Within):
        scale = min(resize.long / max(height, width), resize.short / min(height, width))
        rows, columns = (max(1, int(side * scale + 0.5)) for side in (height, width))
        if rows * columns > MAX_PIXELS:
            raise BeitJaxError(
                f"{name}: {height}x{width} becomes {rows}x{columns}, expected at most {MAX_PIXELS} pixels"
            )
        return rows, columns
    long = int(resize * max(height, width) / min(height, width))
    if resize * long > MAX_PIXELS:
        found = f"{height}x{width} becomes {resize * long} pixels at shortest edge {resize}"
        raise BeitJaxError(f"{name}: {found}, expected at most {MAX_PIXELS}; crop it first")
    return (long, resize) if width <= height else (resize, long)


def _sampled(pixels: Shaped[np.ndarray, "h w *c"], size: tuple[int, int]) -> Shaped[np.ndarray, "h2 w2 *c"]:
    """Bilinear interpolation between the four nearest pixels, also when shrinking. uint8 is rounded half up."""
    values = pixels.astype(np.float32)
    for axis, target in enumerate(size):
        lower, upper, weight = linear_taps(values.shape[axis], target)
        weight = weight.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        values = values.take(lower, axis) * (1 - weight) + values.take(upper, axis) * weight
    return np.floor(values + np.float32(0.5)).astype(np.uint8) if pixels.dtype == np.uint8 else values


def _written(edges: tuple[int, int] | int | Within) -> dict[str, int]:
    if isinstance(edges, Within):
        return {"shortest_edge": edges.short}
    return {"shortest_edge": edges} if isinstance(edges, int) else {"height": edges[0], "width": edges[1]}


def _spoken(edges: tuple[int, int] | int | Within) -> str:
    if isinstance(edges, Within):
        return f"within {edges.short}x{edges.long}"
    return f"shortest edge {edges}" if isinstance(edges, int) else "{}x{}".format(*edges)


def centre_crop(
    pixels: Shaped[np.ndarray, "h w c"], size: tuple[int, int], rounding: Rounding
) -> Shaped[np.ndarray, "crop_h crop_w c"]:
    """The middle of an image, (height, width), as `ImageProcessor.crop` and `crop_rounding` say; padded with zeros."""

    def start(length: int, cropped: int) -> int:
        spare = length - cropped
        if rounding == "floor":
            return spare // 2
        return round(spare / 2) if spare >= 0 else -(-spare // 2)

    (height, width), (top, left) = size, map(start, pixels.shape[:2], size)
    inside = pixels[max(top, 0) : top + height, max(left, 0) : left + width]
    canvas = np.zeros((height, width, pixels.shape[2]), pixels.dtype)
    top, left = max(-top, 0), max(-left, 0)
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return canvas


def _bounded(edges: tuple[int, int] | int | Within | None) -> bool:
    if edges is None:
        return True
    if isinstance(edges, Within):
        return 0 < edges.short <= edges.long <= MAX_PIXELS
    height, width = edges if isinstance(edges, tuple) else (edges, edges)
    return min(height, width) > 0 and height * width <= MAX_PIXELS


def _are_bands(bands: tuple[int, ...], count: int) -> bool:
    return len(bands) == count and all(1 <= band <= MOST_CHANNELS for band in bands)


def _brief(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else f"({', '.join(f'{value:g}' for value in values)})"


def _within(values: tuple[float, ...], low: float) -> bool:
    return all(low < value < 1e30 for value in values)
