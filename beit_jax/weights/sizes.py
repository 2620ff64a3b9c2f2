"""A bound for every size in a configuration, from the header of the weights that it stands beside.

A model of 10 ** 7 layers, or 10 ** 18 channels, costs memory and minutes before anything can be compared. No size of a
model exceeds both the number of its tensors and the longest of their axes, so this is asked first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from beit_jax.errors import BeitJaxError, printable

# Sides of images have a bound of their own: a model without position tables takes images of any size.
_LARGEST_GRID = 1 << 12  # patches along a side
_NO_SIZES = ("image_size", "semantic_loss_ignore_index", "out_indices")
# Sizes of parts that only some models have, by the field that says so; the defaults of the others mean nothing.
_OF_PARTS: Mapping[str, tuple[str, object]] = {
    "vocab_size": ("task", "masked_image_modeling"),
    "pool_scales": ("task", "semantic_segmentation"),
    "auxiliary_channels": ("has_auxiliary_head", True),
    "auxiliary_num_convs": ("has_auxiliary_head", True),
}


def check_sizes(
    config: Any, shapes: Mapping[str, tuple[int, ...]], config_file: str, weights: str, *, at_least: int = 0
) -> None:
    """Refuses a configuration with a size that no model of these tensors can have.

    Args:
        config: a dataclass of a model's or a tokenizer's sizes.
        shapes: the shape of every tensor by its name.
        at_least: sizes up to this are let pass, because a comparison tensor by tensor follows, which says more.

    Raises:
        BeitJaxError: names the files, the key and the bound.
    """
    longest = max((side for shape in shapes.values() for side in shape), default=0)
    bound = max(longest, len(shapes), at_least)
    for key, size in _sizes(config):
        if size > bound:
            raise BeitJaxError(
                f"{printable(config_file)}: {key} says {printable(size, 40)}, but {printable(weights)} holds "
                f"{len(shapes)} tensors with axes of at most {longest}; correct the first"
            )
    image_size = getattr(config, "image_size", (1, 1))
    for side, patch in zip(image_size, getattr(config, "patch_size", (1, 1)), strict=True):
        if side > patch * max(bound, _LARGEST_GRID):
            raise BeitJaxError(
                f"{printable(config_file)}: image_size says {printable(side, 40)}, expected at most "
                f"{patch * max(bound, _LARGEST_GRID)} for these weights; correct the first"
            )


def _sizes(config: Any) -> Iterator[tuple[str, int]]:
    """The sizes in a configuration by their keys, and the lengths of its lists."""
    for field in fields(config):
        value = getattr(config, field.name)
        part, present = _OF_PARTS.get(field.name, ("", None))
        if field.name in _NO_SIZES or getattr(config, part, present) != present:
            continue
        if type(value) is int:
            yield field.name, value
        elif isinstance(value, tuple) and field.name != "labels":  # a name a class: they are in memory already
            yield field.name, len(value)
            yield from ((field.name, each) for each in value)
