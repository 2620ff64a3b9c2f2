"""The splits of a data set, and the names that people give them."""

from collections.abc import Mapping
from typing import Final

SPLIT_FOLDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}
"""The names that the folder of a split may have, or a cell that says in which split an image is."""


def split_named(name: str) -> str | None:
    """The split of this name, large or small; None where there is none."""
    plain = name.strip().lower()
    return next((split for split, names in SPLIT_FOLDERS.items() if plain in names), None)
