"""Pictures of label maps: colours over the image, and a legend."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from beit_jax.errors import printable
from beit_jax.images.label_maps import LabelMap

LEGEND_ROWS = 40  # classes with a name in the legend; of further classes it gives the number
_GOLDEN = 0.6180339887498949  # golden ratio: hues in such steps stay far apart for long


@dataclass(frozen=True)
class Area:
    """A class that occurs in a label map, and its share of the pixels."""

    index: int
    label: str
    share: float


def palette(count: int) -> UInt8[np.ndarray, "count 3"]:
    """A colour for every class number. The colours are all different, and the same in every call."""
    colours = [
        colorsys.hsv_to_rgb(i * _GOLDEN % 1.0, (0.9, 0.55, 0.75)[i % 3], (0.95, 0.7, 0.85, 0.5)[i % 4])
        for i in range(count)
    ]
    return np.round(np.array(colours).reshape(count, 3) * 255).astype(np.uint8)


def areas(labels: LabelMap, names: Sequence[str]) -> list[Area]:
    """The classes that occur in a label map, the largest first."""
    counts = np.bincount(labels[(labels >= 0) & (labels < len(names))].reshape(-1), minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    return [Area(int(i), names[i], float(counts[i] / labels.size)) for i in order if counts[i]]


def overlay(image: Image.Image, labels: LabelMap, names: Sequence[str], *, opacity: float = 0.5) -> Image.Image:
    """Draws the image under the colours of its classes, and a legend with their names and areas beside it.

    Args:
        image: RGB, in the size of `labels`.
        opacity: of the colours, 0 to 1.
    """
    return legend(painted(image, labels, names, opacity=opacity), labels, names)


def painted(image: Image.Image, labels: LabelMap, names: Sequence[str], *, opacity: float) -> Image.Image:
    """The image under the colours of its classes, as `overlay` without the legend."""
    colours = palette(len(names))
    known = (labels >= 0) & (labels < len(names))
    paint = np.where(known[..., None], colours[np.where(known, labels, 0)], np.asarray(image))
    mixed = np.asarray(image) * (1.0 - opacity) + paint * opacity
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def legend(picture: Image.Image, labels: LabelMap, names: Sequence[str]) -> Image.Image:
    """The picture with the names, colours and areas of the classes in a label map beside it."""
    return _with_legend(picture, areas(labels, names), palette(len(names)))


def _with_legend(picture: Image.Image, found: Sequence[Area], colours: np.ndarray) -> Image.Image:
    line = max(14, min(28, picture.height // 24))
    font = ImageFont.load_default(size=round(line * 0.7))
    entries = [(area.index, f"{100 * area.share:4.1f} %  {printable(area.label, 40)}") for area in found[:LEGEND_ROWS]]
    rest = len(found) - len(entries)
    texts = [text for _, text in entries] + ([f"and {rest} more"] if rest else [])
    width = round(max((font.getlength(text) for text in texts), default=0)) + 3 * line
    height = max(picture.height, (len(texts) + 1) * line)
    canvas = Image.new("RGB", (picture.width + width, height), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(texts):
        left, top = picture.width + line // 2, line // 2 + row * line
        if row < len(entries):
            colour = tuple(int(value) for value in colours[entries[row][0]])
            draw.rectangle((left, top, left + line - 4, top + line - 4), fill=colour, outline="black")
        draw.text((left + line + line // 2, top - 2), text, fill="black", font=font)
    return canvas
