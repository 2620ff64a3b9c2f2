"""Source formats: one page a format, with its names, how it is recognised, its images and its layout for export.

A page is a module here with ``FORMATS``, a tuple of `SourceFormat`; a line in `PAGES` adds it. `format` holds the parts
of a page, `rules` the operations on its tensors, `segmentation` the names of UperNet, and `writing` the files of an
export. May import: the ground of `beit_jax`, its images and weights, `models.attention`, and types of `..files`.
The pages are loaded when ``FORMATS`` is first used: the command line reads `LAYOUTS`, and may not wait for NumPy.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .format import SourceFormat

# The module of a page, with its package where it lies in one, and the layout of `beit-jax export --to` that it writes,
# or None. A file is of the first format that fits, and the first that can hold a model writes it. A special case
# therefore stands before the general one.
PAGES: Mapping[str, str | None] = {
    "transformers": "hf",
    "openmmlab.mmseg": "original",
    "cae.paddle": None,
    "cae.original": None,
    "torchscale": "original",
    "vit": "timm",
    "timm": "timm",
    "unilm": "original",
    "openmmlab.mmsegmentation": "mmseg",
    "openmmlab.mmpretrain": "mmpretrain",
    "flax": None,
    "tensorflow": None,
    "kecam": None,
}

LAYOUTS = tuple(dict.fromkeys(layout for layout in PAGES.values() if layout))
"""The layouts of models for ``beit-jax export --to``; the first is the default."""

PEFT = "peft"
"""One more value: the adapter of which a model is the merger, `..adapters`."""

if TYPE_CHECKING:
    Layout = str
    FORMATS: tuple[SourceFormat, ...]
else:
    Layout = Literal[(*LAYOUTS, PEFT)]


def writers(layout: str) -> tuple["SourceFormat", ...]:
    """Returns the formats that write a layout, in the order in which they are asked."""
    return tuple(each for page in PAGES if PAGES[page] == layout for each in _page(page) if each.write)


def _page(name: str) -> tuple["SourceFormat", ...]:
    formats: tuple[SourceFormat, ...] = import_module(f"{__name__}.{name}").FORMATS
    return formats


def __getattr__(name: str) -> Any:
    if name != "FORMATS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = tuple(each for page in PAGES for each in _page(page))
    return globals()[name]
