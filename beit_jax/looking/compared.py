"""Images beside what is true of them and what a model found: one row an image, colours by class, one legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Num
from PIL import Image, ImageDraw, ImageFont

from beit_jax.atomic import new_directory, new_file
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.label_maps import LabelMap, resize_labels

from .pictures import legend, painted

PANEL = 384  # pixels of the longer side of a panel; a smaller image is enlarged by a whole factor
GAP = 6


@dataclass(frozen=True)
class Compared:
    """An image with its label map and the one that was found.

    Attributes:
        title: stands above the row.
        image: PIL's, or an array [h, w, c].
        truth, found: [h, w] class numbers; what is no class has no colour.
    """

    title: str
    image: Image.Image | np.ndarray
    truth: LabelMap
    found: LabelMap


def comparison(rows: Sequence[Compared], names: Sequence[str]) -> Image.Image:
    """The image, the truth and what was found, side by side, a row for each, with a legend of the classes in them."""
    font = ImageFont.load_default(size=14)
    sheets = [_titled(row.title, _panels(row, names), font) for row in rows]
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    sheet, top = Image.new("RGB", (width, height), "white"), 0
    for part in sheets:
        sheet.paste(part, (0, top))
        top += part.height
    seen = np.concatenate([values.ravel() for row in rows for values in (row.truth, row.found)])
    return legend(sheet, seen[:, None], names)


def write_comparisons(rows: Sequence[Compared], names: Sequence[str], destination: Path) -> None:
    """Writes the comparison of all rows as a PNG file, or, of a name without .png, one of each row in a new folder.

    Raises:
        BeitJaxError: there are no rows; the destination cannot be written.
    """
    if not rows:
        raise BeitJaxError(f"{printable(destination)}: no image has a labelled pixel, so there is nothing to draw")
    if destination.suffix.lower() == ".png":
        with new_file(destination) as partial:
            comparison(rows, names).save(partial, format="PNG")
        return
    with new_directory(destination) as directory:
        for rank, row in enumerate(rows, start=1):
            comparison([row], names).save(directory / f"{rank:03}.png", format="PNG")


def _panels(row: Compared, names: Sequence[str]) -> list[Image.Image]:
    height, width = row.truth.shape
    factor = PANEL / max(height, width)
    factor = max(1, int(factor)) if factor >= 1 else factor
    size = max(1, round(width * factor)), max(1, round(height * factor))
    picture = as_picture(row.image).resize(size, Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX)
    maps = (resize_labels(values, (size[1], size[0])) for values in (row.truth, row.found))
    return [picture, *(painted(picture, values, names, opacity=0.6) for values in maps)]


def _titled(
    title: str, panels: Sequence[Image.Image], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Image.Image:
    line = 22
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    words = printable(title, max(20, width // 8))
    row = Image.new("RGB", (width, panels[0].height + line + GAP), "white")
    ImageDraw.Draw(row).text((2, 2), words, fill="black", font=font)
    left = 0
    for panel in panels:
        row.paste(panel, (left, line))
        left += panel.width + GAP
    return row


def as_picture(image: Image.Image | Num[np.ndarray, "h w c"]) -> Image.Image:
    """An image of any bands as RGB: its first three, or its first one in grey; not of 8 bits, by its own range."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    bands = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
    if bands.dtype != np.uint8:
        values = np.nan_to_num(bands.astype(np.float64))
        low, high = values.min(), values.max()
        bands = np.round(255 * (values - low) / (high - low if high > low else 1.0)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(bands))
