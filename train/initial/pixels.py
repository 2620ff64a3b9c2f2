"""What images are to a run: how they are read, by what they are normalised, and which augmentations they have."""

from dataclasses import replace
from typing import TypeVar

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor
from beit_jax.images.scaling import BY_TYPE
from beit_jax.models.adapt import channel_kernel
from beit_jax.weights.native import NativeCheckpoint

from ..augmentation.classification import check_colours
from ..augmentation.decode import Reading
from ..recipe import CropOptions, DataOptions, ModelOptions, Recipe, SceneOptions, require

RecipeT = TypeVar("RecipeT", bound=Recipe)


def with_pixels(recipe: RecipeT, config: BeitConfig, start: NativeCheckpoint | None) -> RecipeT:
    """The recipe for the images of a model, checked.

    Where images are not RGB, or the recipe leaves it to the checkpoint (``--data.statistics checkpoint``), and where it
    has no mean of its own, a checkpoint of as many channels brings along how it was trained to see them: mean, standard
    deviation, scale and bands.

    Raises:
        BeitJaxError: means or bands of another number of channels; an augmentation that RGB images of 8 bits have only.
    """
    data, channels = recipe.data, config.num_channels
    brought = channels != 3 or data.statistics == "checkpoint"
    if brought and data.mean is None and start is not None:
        data = _as_trained(data, start.processor) if start.processor.num_channels == channels else data
        recipe = replace(recipe, data=data)
    data.moments(channels)
    if data.bands is not None:
        require(len(data.bands) == channels, "data.bands", f"{channels} numbers, one a channel", len(data.bands))
    pixels = data.pixel_type(channels)
    for group, options in recipe.groups().items():
        if isinstance(options, CropOptions):
            check_colours(options, channels, pixels)
        if isinstance(options, SceneOptions) and options.photometric and (channels, pixels) != (3, "uint8"):
            raise BeitJaxError(
                f"photometric distortion: 8-bit RGB images have colours to change, found {channels} channels of "
                f"{pixels}; pass --{group}.no-photometric"
            )
    return recipe


def with_channels(start: NativeCheckpoint | None, options: ModelOptions) -> NativeCheckpoint | None:
    """The checkpoint with the channels that `options.channels_from` lists; as it is where that is None.

    Raises:
        BeitJaxError: no checkpoint; channels that it does not have; another number of them than `options.channels`.
    """
    origin = options.channels_from
    if origin is None:
        return start
    if start is None:
        raise BeitJaxError("--model.channels-from: the channels of a checkpoint; name it with --init CHECKPOINT")
    count, name = start.config.num_channels, "model.channels_from"
    require(max(origin) < count, name, f"channels of the checkpoint, 0 to {count - 1}", max(origin))
    wanted = options.channels or len(origin)
    require(len(origin) == wanted, name, f"{wanted} numbers, as --model.channels says", len(origin))
    kernel = f"{'' if start.config.task == 'features' else 'beit/'}embeddings/patch_kernel"
    params = {**start.params, kernel: channel_kernel(start.params[kernel], len(origin), origin)}
    config = replace(start.config, num_channels=len(origin))
    return replace(start, config=config, processor=start.processor.for_channels(len(origin), origin), params=params)


def require_rgb(recipe: Recipe, config: BeitConfig) -> None:
    """Refuses images that are not RGB of 8 bits, for an objective that knows no others.

    Raises:
        BeitJaxError: names the channels and the type.
    """
    found = (config.num_channels, recipe.data.pixel_type(config.num_channels))
    if found != (3, "uint8"):
        raise BeitJaxError(
            f"{recipe.objective}: learns from 8-bit RGB images, found {found[0]} channels of {found[1]}; leave "
            "--model.channels, --data.bands and --data.pixels out"
        )


def of_decoded(processor: ImageProcessor, read: Reading) -> ImageProcessor:
    """The processor for images that `read` has decoded: their bands are selected, and floats scaled already."""
    factor = None if read.dtype == "float32" else processor.rescale_factor
    return replace(processor, bands=None, rescale_factor=factor)


def _as_trained(data: DataOptions, processor: ImageProcessor) -> DataOptions:
    scale, factor = data.scale, processor.rescale_factor
    if scale is None and factor != BY_TYPE:
        scale = 1.0 if factor is None else 1 / factor
    if processor.mean is None or processor.std is None:
        mean, std = (0.0,) * processor.num_channels, (1.0,) * processor.num_channels
    else:
        mean, std = processor.mean, processor.std
    return replace(data, mean=mean, std=std, scale=scale, bands=data.bands or processor.bands)
