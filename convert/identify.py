"""Recognises a checkpoint: its format, the first of a list that fits, and the model it holds."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, Source
from beit_jax.json_file import parse_json, read_json
from beit_jax.variants import VARIANTS

from .files.adapters import MERGE, are_adapted
from .formats.format import Description, Place, Sighting, SourceFormat, default_preset
from .options import Options
from .strangers.tensor_names import certainly_of_names, of_names

if TYPE_CHECKING:
    from .files.checkpoint import Checkpoint, TensorInfo


@dataclass(frozen=True)
class Identity:
    """A checkpoint that was recognised.

    Attributes:
        place: the format of the file, and what stands before the names of the model and of its backbone.
        hosted: the file is another model's, which holds the encoder.
        part: the tensors of the model, by the names that its format gives them.
        described: the model as it lies in the file, before any resizing, and how each part was recognised.
    """

    place: Place
    hosted: bool
    part: "Checkpoint"
    described: Description


def identify(source: Source, checkpoint: "Checkpoint", formats: Sequence[SourceFormat], options: Options) -> Identity:
    """Recognises a checkpoint.

    Args:
        formats: the known formats, in the order in which they are asked.
        options: `variant` is taken instead of ``config.json``. `num_heads` and `aggregate_from` say what the source
            does not, and may not contradict it.

    Raises:
        BeitJaxError: names of no format, another family of models, an unknown variant, names that leave the model
            open, or an option that contradicts the source.
    """
    config_file, variant = options.config or source.directory / CONFIG, options.variant

    def content() -> Mapping[str, Any] | None:
        if variant is not None:
            return None
        if options.config is None and not os.path.lexists(config_file):
            return json_inside(checkpoint, CONFIG)
        return read_json(config_file)

    place, found = recognise(checkpoint.tensors, formats, str(source.path), content, options.weights)
    part = checkpoint.within(place.outer)
    hosted = bool(part.outside) and place.format.is_hosted(place.outer)
    if options.keep_head and not (hosted and place.format.classifier & part.tensors.keys()):
        raise BeitJaxError(
            f"--keep-head: {source.path} holds no encoder within another model that carries a classifier; leave the "
            "option out"
        )
    if variant is None:
        inside = found is not None and not os.path.lexists(config_file)
        description = place.format.describe(
            Sighting(
                format=place.format,
                prefix=place.prefix,
                tensors=part.tensors,
                metadata=checkpoint.metadata,
                content=found,
                file=str(source.path),
                config_file=f"{source.path}: {CONFIG} in it" if inside else str(config_file),
                num_heads=options.num_heads,
                aggregate_from=options.aggregate_from,
                hosted=hosted,
                keep_head=options.keep_head,
            )
        )
    else:
        config, seen = VARIANTS[variant], ("the variant that was named",)
        description = Description(config, seen, image_preset=default_preset(config), origin=f"--variant {variant}")
    if hosted and place.format.is_bilinear(place.outer):
        description = replace(description, config=replace(description.config, position_resize="bilinear"))
    if options.aggregate_from == 0:  # a choice, and no statement about the file
        description = replace(description, config=description.config.without_aggregation())
    _check_stated(options, description)
    return Identity(place, hosted, part, description)


def _check_stated(options: Options, found: Description) -> None:
    """Refuses an option that states another model than the source, because one of the two is wrong."""
    for option, stated, known in (
        ("--num-heads", options.num_heads, found.config.num_attention_heads),
        ("--aggregate-from", options.aggregate_from, found.config.aggregate_from),
    ):
        if stated is not None and stated != known:
            said = found.origin or "the file"
            raise BeitJaxError(f"{option} {stated}: {said} says {known}; leave the option out, or correct {said}")


def json_inside(checkpoint: "Checkpoint", name: str) -> Mapping[str, Any] | None:
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
    names: Mapping[str, "TensorInfo"],
    formats: Sequence[SourceFormat],
    file: str,
    content: Callable[[], Mapping[str, Any] | None] = lambda: None,
    weights: str | None = None,
) -> tuple[Place, Mapping[str, Any] | None]:
    """Returns where the encoder of a file stands, and the content of its ``config.json``.

    Args:
        names: all tensors in the file by their names.
        formats: the known formats, in the order in which they are asked.
        file: the weights, for messages.
        content: reads ``config.json``; called when the names are those of some format. Returns None if there is none.
        weights: the part of the file to take, where it holds several encoders.

    Raises:
        BeitJaxError: the names are of no format, or an adapter's; there are several encoders, and `weights` chooses
            none. The message shows a few of them.
    """
    if (changed := certainly_of_names(names)) is not None:
        raise BeitJaxError(f"{file}: {changed}")
    possible = [place for each in formats for place in each.places_in(names)]
    if possible:
        chosen = _one_encoder(sorted({place.before for place in possible}), names, file, weights)
        found = content()
        for place in possible:
            if place.before == chosen and place.format.fits(names, place, found) and place.format.matches(found):
                return place, found
    if are_adapted(names):
        raise BeitJaxError(f"{file}: it holds an adapter, or weights with one that is not merged: {MERGE}")
    stranger = of_names(names)
    if stranger is not None:
        raise BeitJaxError(f"{file}: {stranger}")
    kind = (content() or {}).get("model_type")
    if kind is not None and kind not in ("beit", "data2vec-vision"):
        raise BeitJaxError(f"{file}: {printable(kind)}, as its config.json says; nothing here computes that model")
    shown = ", ".join(printable(name, 60) for name in sorted(names)[:3])
    known = ", ".join(each.name for each in formats)
    raise BeitJaxError(f"{file}: no BEiT names (known: {known}) among those of its {len(names)} tensors: {shown}, ...")


def _one_encoder(places: Sequence[str], names: Collection[str], file: str, weights: str | None) -> str:
    """The place of the encoder that is wanted. Raises `BeitJaxError` where that is open."""
    wanted = [place for place in places if weights is not None and f"{place}.".startswith(f"{weights}.")]
    if weights == "model" and not wanted and "" in places:
        wanted = [""]
    if weights is not None and not wanted and any(name.startswith(f"{weights}.") for name in names):
        listed = " and ".join(printable(place) for place in places)
        raise BeitJaxError(f"{file}: --weights {printable(weights)}: no encoder there, found one under {listed}")
    fitting = wanted or places
    if len(fitting) > 1:
        listed = " and ".join(f"{printable(place)!r}" for place in fitting[:5])
        more = f" and {len(fitting) - 5} more" if len(fitting) > 5 else ""
        ways = " or ".join(printable(place).rstrip("./") or "model" for place in fitting[:5])
        raise BeitJaxError(
            f"{file}: holds {len(fitting)} encoders, under {listed}{more}: choose one of them, --weights {ways}"
        )
    return fitting[0]


def groups(names: Collection[str], outer: str) -> str:
    """Tensors of the model around an encoder by its parts, with their numbers: ``decode_head (12), scratch (3)``.

    Args:
        outer: what stands before the names of the encoder, whose neighbours are parts of their own.
    """
    counts: Counter[str] = Counter()
    beside = re.split(r"[./]", outer.rstrip("./"))  # Keras and Flax write slashes
    for name in names:
        path = re.split(r"[./]", name)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path[:-1], beside, strict=False)))
        counts[".".join(path[: shared + 1])] += 1
    shown = [f"{printable(part, 60)} ({count})" for part, count in sorted(counts.items())[:_GROUPS]]
    return ", ".join(shown) + (f" and {len(counts) - _GROUPS} parts more" if len(counts) > _GROUPS else "")


_GROUPS = 12
