"""A picture of images and their neighbours: a row for every image, the nearest first."""

from collections.abc import Mapping, Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from beit_jax.errors import printable
from beit_jax.search.index import Neighbour

SIDE: Final = 160  # pixels of an image
MOST: Final = 64  # rows and columns of a sheet
_GAP, _LINE, _LETTERS = 8, 18, 24
_MISSING, _RULE = "lightgrey", "black"

Row = tuple[str, Sequence[Neighbour]]


def neighbour_sheet(rows: Sequence[Row], images: Mapping[str, Image.Image]) -> Image.Image:
    """Draws every query, and to the right of a line its neighbours with their scores.

    Args:
        rows: names of queries with their neighbours.
        images: pictures of at most SIDE pixels, by name; a name without one is drawn as a grey field.
    """
    columns = max((len(found) for _, found in rows), default=0)
    cell, height = SIDE + _GAP, SIDE + _LINE + _GAP
    sheet = Image.new("RGB", ((1 + columns) * cell + 2 * _GAP, max(1, len(rows)) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)

    def put(left: int, top: int, picture: Image.Image | None, text: str) -> None:
        if picture is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=_MISSING)
        else:
            sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        draw.text((left, top + SIDE + 1), printable(text, _LETTERS), fill="black", font=font)

    for number, (name, found) in enumerate(rows):
        top = _GAP + number * height
        put(_GAP, top, images.get(name), _short(name))
        for place, neighbour in enumerate(found):
            text = f"{neighbour.score:.4g}  {_short(neighbour.image)}"
            put(2 * _GAP + (1 + place) * cell, top, images.get(neighbour.image), text)
    draw.line((_GAP + cell, _GAP, _GAP + cell, sheet.height - _GAP), fill=_RULE)
    return sheet


def _short(name: str) -> str:
    """The end of a name, which tells images of one folder apart."""
    return name.rpartition("/")[2]
