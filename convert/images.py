"""How the images of a checkpoint are prepared: by what its source says, by its format, or by a preset.

Nothing of it touches the weights. What is wrong with it is therefore an error only for those who prepare images.
"""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, size_near
from beit_jax.hub import PROCESSOR, Source
from beit_jax.images.processor import ImageProcessor, preset

from .formats.format import Description
from .identify import json_inside
from .options import Options

if TYPE_CHECKING:
    from .files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Images:
    """How images are prepared, or why nobody knows.

    Attributes:
        found: the processor, or the error for whoever asks for it.
        notes: lines for the user.
    """

    found: ImageProcessor | BeitJaxError
    notes: tuple[str, ...] = ()

    @property
    def processor(self) -> ImageProcessor:
        """The processor.

        Raises:
            BeitJaxError: there is none.
        """
        if isinstance(self.found, BeitJaxError):
            raise self.found
        return self.found


def find_images(
    source: Source, checkpoint: "Checkpoint", described: Description, target: BeitConfig, options: Options
) -> Images:
    """Returns how images are prepared for the model of the result.

    Args:
        described: the model as it lies in the file.
        target: the model of the result, which may be for another image size.

    Raises:
        BeitJaxError: the preset or the bands that the user asks for do not fit the model.
    """
    if options.bands is not None and len(options.bands) != target.num_channels:
        raise BeitJaxError(
            f"--bands: the model takes {target.num_channels} channels, expected as many numbers, found "
            f"{len(options.bands)}; --channels adapts the model"
        )
    if options.image_preset is not None:
        size = target.image_size
        chosen = replace(preset(options.image_preset, size, num_channels=target.num_channels), bands=options.bands)
        return Images(chosen, (f"images by the preset {options.image_preset}", *_notes(chosen, target)))
    try:
        processor, notes = _stated(source, checkpoint, described, options)
        processor, more = _with_channels(processor, described.config, target, options)
        notes = (*notes, *more)
        if target.image_size != described.config.image_size:
            processor = processor.resized(target.image_size)
        _check(processor, target, str(source.directory / PROCESSOR))
    except BeitJaxError as error:
        way = "beit-jax convert --image-preset hf prepares images by the model's size alone"
        return Images(BeitJaxError(f"{error}. {way}"))
    return Images(processor, (*notes, *_notes(processor, target)))


def _stated(
    source: Source, checkpoint: "Checkpoint", described: Description, options: Options
) -> tuple[ImageProcessor, tuple[str, ...]]:
    path, config = source.directory / PROCESSOR, described.config
    if described.processor is not None:
        return described.processor(), ()
    if os.path.lexists(path):  # a broken link is an error, not absence
        return ImageProcessor.from_file(path), ()
    if options.config is not None and os.path.lexists(beside := options.config.parent / PROCESSOR):
        return ImageProcessor.from_file(beside), (f"images by {beside}, which lies beside --config",)
    inside = json_inside(checkpoint, PROCESSOR)
    if inside is not None:
        return ImageProcessor.from_hf(inside, f"{checkpoint.path}: {PROCESSOR} in it"), ()
    if described.assumed is not None:
        processor = described.assumed()
        told = f"images will be prepared as the code that trained such models does: {processor.describe()}"
        return processor, (f"{path}: no such file; {told}",)
    name = described.image_preset
    processor = preset(name, config.image_size, num_channels=config.num_channels)
    if name == "hf" and config.task == "semantic_segmentation":
        processor = replace(processor, resample="bicubic")  # as the hub's ADE20K checkpoints record it
    return processor, (f"{path}: no such file; images will be prepared by the preset {name}: {processor.describe()}",)


def _with_channels(
    processor: ImageProcessor, found: BeitConfig, target: BeitConfig, options: Options
) -> tuple[ImageProcessor, tuple[str, ...]]:
    """The processor for the channels and the bands of the result.

    Where the source states means of 3 channels for a model of neither 3 nor 1, as transformers writes them by default,
    every channel takes their average. For a model of 3 or 1 that is a mistake, and stays one.
    """
    notes: tuple[str, ...] = ()
    count = processor.num_channels
    if count != found.num_channels and found.num_channels not in (1, 3) and count == 3:
        processor = processor.for_channels(found.num_channels)
        notes = (f"images prepared with means of {count} channels, the model takes {found.num_channels}: averaged",)
    if processor.num_channels == found.num_channels:
        processor = processor.for_channels(target.num_channels, options.channels_from)
    return processor if options.bands is None else replace(processor, bands=options.bands), notes


def _size(processor: ImageProcessor) -> tuple[int, int] | None:
    """The (height, width) of all prepared images; None if it depends on the image."""
    if processor.crop is not None:
        return processor.crop
    return processor.resize if isinstance(processor.resize, tuple) else None


def _check(processor: ImageProcessor, config: BeitConfig, file: str) -> None:
    """Refuses images that the model cannot take.

    Raises:
        BeitJaxError: names what was expected and found.
    """
    size, patch = _size(processor), config.patch_size
    if size is not None and any(side % step for side, step in zip(size, patch, strict=True)):
        raise BeitJaxError(
            f"{file}: images of {size[0]}x{size[1]} are not multiples of the model's patch {patch[0]}x{patch[1]}, as "
            f"{'x'.join(map(str, size_near(size, patch)))} would be; correct the file"
        )
    if processor.num_channels != config.num_channels:
        raise BeitJaxError(
            f"{file}: images of {processor.num_channels} channels, the model takes {config.num_channels}; "
            "correct the file"
        )


def _notes(processor: ImageProcessor, config: BeitConfig) -> tuple[str, ...]:
    size, native = _size(processor), config.image_size
    notes = []
    if size is not None and size != native and config.task != "semantic_segmentation":
        notes.append(
            f"images are prepared as {size[0]}x{size[1]}, the model is of {native[0]}x{native[1]}: its positions are "
            "resized to them, every time"
        )
    return tuple(notes)
