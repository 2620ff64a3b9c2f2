"""Recognises a checkpoint: its format, the first of a list that fits, and the model it holds."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, Source
from beit_jax.json_file import parse_json, read_json
from beit_jax.variants import VARIANTS

from .files.adapters import MERGE, are_adapted
from .files.checkpoint import Checkpoint
from .formats.format import Description, Sighting, SourceFormat, default_preset
from .options import Options


@dataclass(frozen=True)
class Identity:
    """A checkpoint that was recognised.

    Attributes:
        naming: the format of the file.
        prefix: what stands before the names of the backbone.
        described: the model as it lies in the file, before any resizing, and how each part was recognised.
    """

    naming: SourceFormat
    prefix: str
    described: Description


def identify(source: Source, checkpoint: Checkpoint, formats: Sequence[SourceFormat], options: Options) -> Identity:
    """Recognises a checkpoint.

    Args:
        formats: the known formats, in the order in which they are asked.
        options: `variant` is taken instead of ``config.json``. `num_heads` and `aggregate_from` say what the source
            does not, and may not contradict it.

    Raises:
        BeitJaxError: names of no format, another family of models, an unknown variant, names that leave the model
            open, or an option that contradicts the source.
    """
    config_file, variant = source.directory / CONFIG, options.variant

    def content() -> Mapping[str, Any] | None:
        if variant is not None:
            return None
        return read_json(config_file) if os.path.lexists(config_file) else json_inside(checkpoint, CONFIG)

    naming, prefix, found = recognise(checkpoint.tensors.keys(), formats, str(source.path), content)
    if variant is None:
        inside = found is not None and not os.path.lexists(config_file)
        description = naming.describe(
            Sighting(
                format=naming,
                prefix=prefix,
                tensors=checkpoint.tensors,
                metadata=checkpoint.metadata,
                content=found,
                file=str(source.path),
                config_file=f"{source.path}: {CONFIG} in it" if inside else str(config_file),
                num_heads=options.num_heads,
                aggregate_from=options.aggregate_from,
            )
        )
    else:
        config, seen = VARIANTS[variant], ("the variant that was named",)
        description = Description(config, seen, image_preset=default_preset(config), origin=f"--variant {variant}")
    if options.aggregate_from == 0:  # a choice, and no statement about the file
        without = replace(description.config, aggregate_from=0, aggregation_layers=0)
        description = replace(description, config=without)
    _check_stated(options, description)
    return Identity(naming, prefix, description)


def _check_stated(options: Options, found: Description) -> None:
    """Refuses an option that states another model than the source, because one of the two is wrong."""
    for option, stated, known in (
        ("--num-heads", options.num_heads, found.config.num_attention_heads),
        ("--aggregate-from", options.aggregate_from, found.config.aggregate_from),
    ):
        if stated is not None and stated != known:
            said = found.origin or "the file"
            raise BeitJaxError(f"{option} {stated}: {said} says {known}; leave the option out, or correct {said}")


def json_inside(checkpoint: Checkpoint, name: str) -> Mapping[str, Any] | None:
    """Returns a JSON file that `export` has put as text into the file of the weights; None if it is not there."""
    text = checkpoint.metadata.get(name)
    if not isinstance(text, str):
        return None
    try:
        content = parse_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise BeitJaxError(
            f"{checkpoint.path}: {name} in it is no JSON ({printable(error)}); export it again"
        ) from None
    if not isinstance(content, dict):
        raise BeitJaxError(f"{checkpoint.path}: {name} in it: expected an object, found a {type(content).__name__}")
    return content


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
        BeitJaxError: the names are of no format, or an adapter's. The message shows a few of them.
    """
    possible = [(each, prefix) for each in formats if (prefix := each.prefix_in(names)) is not None]
    if possible:
        found = content()
        for naming, prefix in possible:
            if naming.matches(found):
                return naming, prefix, found
    if are_adapted(names):
        raise BeitJaxError(f"{file}: it holds an adapter, or weights with one that is not merged: {MERGE}")
    shown = ", ".join(printable(name, 60) for name in sorted(names)[:3])
    known = ", ".join(each.name for each in formats)
    raise BeitJaxError(f"{file}: no BEiT names (known: {known}) among those of its {len(names)} tensors: {shown}, ...")
