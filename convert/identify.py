"""Recognises a checkpoint: its format, the first of a list that fits, and the model it holds."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beit_jax.config import BeitConfig, PresetName
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR, Source
from beit_jax.images.processor import ImageProcessor, preset
from beit_jax.json_file import read_json
from beit_jax.variants import VARIANTS

from .files.checkpoint import Checkpoint
from .formats.format import Description, Sighting, SourceFormat, default_preset


@dataclass(frozen=True)
class Identity:
    """A checkpoint that was recognised.

    Attributes:
        naming: the format of the file.
        prefix: what stands before the names of the backbone.
        config: the model as it lies in the file, before any resizing.
        seen: lines for people that say how each part was recognised.
    """

    naming: SourceFormat
    prefix: str
    config: BeitConfig
    processor: ImageProcessor
    seen: tuple[str, ...]


def identify(
    source: Source,
    checkpoint: Checkpoint,
    formats: Sequence[SourceFormat],
    *,
    variant: str | None = None,
    image_preset: PresetName | None = None,
) -> Identity:
    """Recognises a checkpoint.

    Args:
        formats: the known formats, in the order in which they are asked.
        variant: a row of `VARIANTS` that is taken instead of ``config.json`` and of guesses.
        image_preset: taken instead of what the source says about images.

    Raises:
        BeitJaxError: names of no format, another family of models, an unknown variant, or names that leave the model
            open.
    """
    config_file = source.directory / CONFIG

    def content() -> Mapping[str, Any] | None:
        return read_json(config_file) if variant is None and config_file.exists() else None

    naming, prefix, found = recognise(checkpoint.tensors.keys(), formats, str(source.path), content)
    if variant is None:
        description = naming.describe(
            Sighting(naming, prefix, checkpoint.tensors, checkpoint.metadata, found, str(source.path), config_file)
        )
    elif variant in VARIANTS:
        config = VARIANTS[variant]
        description = Description(config, ("the variant that was named",), image_preset=default_preset(config))
    else:
        raise BeitJaxError(f"--variant {printable(variant)}: expected one of {', '.join(VARIANTS)}")
    processor, seen = _processor(source, description, image_preset)
    return Identity(naming, prefix, description.config, processor, (*description.seen, *seen))


def recognise(
    names: Collection[str],
    formats: Sequence[SourceFormat],
    file: str,
    content: Callable[[], Mapping[str, Any] | None] = lambda: None,
) -> tuple[SourceFormat, str, Mapping[str, Any] | None]:
    """Returns the format of a file, the prefix of its backbone, and the content of its ``config.json``.

    Args:
        names: the names of all tensors in the file.
        formats: the known formats, in the order in which they are asked.
        file: the weights, for messages.
        content: reads ``config.json``; called when the names are those of some format. Returns None if there is none.

    Raises:
        BeitJaxError: the names are of no format. The message shows a few of them.
    """
    possible = [(each, prefix) for each in formats if (prefix := each.prefix_in(names)) is not None]
    if possible:
        found = content()
        for naming, prefix in possible:
            if naming.matches(found):
                return naming, prefix, found
    shown = ", ".join(printable(name, 60) for name in sorted(names)[:3])
    known = ", ".join(each.name for each in formats)
    raise BeitJaxError(f"{file}: no BEiT names (known: {known}) among those of its {len(names)} tensors: {shown}, ...")


def _processor(source: Source, found: Description, wanted: PresetName | None) -> tuple[ImageProcessor, tuple[str, ...]]:
    path = source.directory / PROCESSOR
    size = found.config.image_size
    if wanted is not None:
        return preset(wanted, size), (f"images by the preset {wanted}",)
    if found.processor is not None:
        return found.processor, ()
    if path.exists():
        return ImageProcessor.from_file(path), ()
    name = found.image_preset
    processor = preset(name, size)
    if name == "hf" and found.config.task == "semantic_segmentation":
        processor = replace(processor, resample="bicubic")  # as the hub's ADE20K checkpoints record it
    return processor, (f"{path}: no such file; images will be prepared by the preset {name}: {processor.describe()}",)
