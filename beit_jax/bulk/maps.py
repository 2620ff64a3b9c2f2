"""Rows for images whose every pixel gets a class: the areas of the classes, with a picture and a label map aside."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from beit_jax.bulk.inputs import Listing
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.bands import decode
from beit_jax.images.label_maps import LabelMap
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.segmentation import Inference, segment
from beit_jax.looking.pictures import areas
from beit_jax.models.build import Model
from beit_jax.tables.schema import ERROR, IMAGE, Part, Schema
from beit_jax.terminal import Progress
from beit_jax.version import __version__

CHUNK: Final = 16  # images: large ones take seconds each
COLUMNS: Final = {
    "height": "integer",
    "width": "integer",
    "classes": {"index": "integer", "label": "text", "share": "number"},
}

Keep = Callable[[str, Any, LabelMap], None]
"""Writes what belongs to an image: its name, the picture as it was read, the class of every pixel."""


@dataclass(frozen=True)
class Maps:
    """Segments images, as `beit_jax.bulk.table.Making`.

    Attributes:
        facts: what the model is, for JSON.
        keep: called for every image that was segmented.
        chunk: images of a chunk; None: `CHUNK`.
    """

    model: Model
    processor: ImageProcessor
    how: Inference
    listing: Listing
    facts: Mapping[str, Any]
    keep: Keep
    progress: Progress
    max_bad: float = 0.0
    chunk: int | None = None

    @property
    def shape(self) -> None:
        """Rows have no values."""

    @property
    def length(self) -> int:
        """Images of a chunk."""
        return self.chunk or CHUNK

    def schema(self, shape: tuple[int, ...] | None) -> Schema:
        """The schema of the table."""
        metadata = {**self.facts, "format": "beit-jax areas 1", "version": __version__}
        return Schema(COLUMNS, None, self.max_bad > 0, metadata)  # type: ignore[arg-type]  # literals

    def contract(self) -> dict[str, Any]:
        """What rows depend on besides: how images go through the model."""
        return asdict(self.how)

    def parts(self, ranges: Sequence[tuple[int, int]], bad: BadImages) -> Iterator[Part]:
        """Segments the images of these places; as `Making.parts`."""
        with self.progress(sum(stop - start for start, stop in ranges)) as advance:
            for start, stop in ranges:
                rows = []
                for place, image in enumerate(self.listing.images(start, stop), start):
                    rows.append(self._row(place, image, bad))
                    advance(1)
                yield Part(rows)

    def _row(self, place: int, image: Any, bad: BadImages) -> dict[str, Any]:
        name, processor = printable(Path(image.name)), self.processor
        try:
            picture = decode(image.read(), name, processor.num_channels, select=processor.bands)
        except BeitJaxError as error:
            bad.note(place, error)
            return {IMAGE: image.name, ERROR: str(error)}
        labels = segment(self.model, replace(processor, bands=None), picture, self.how)
        self.keep(image.name, picture, labels)
        found = [asdict(area) for area in areas(labels, self.model.config.labels)]
        return {IMAGE: image.name, "height": labels.shape[0], "width": labels.shape[1], "classes": found}


@dataclass(frozen=True)
class Folder:
    """A folder of pictures that belongs to a table: it has another name until the table is complete.

    Attributes:
        place: its name.
        begun: the table was begun before, and its pictures may be there.
    """

    place: Path
    begun: bool

    def __post_init__(self) -> None:
        if self.begun:
            return
        for path in (self.place, self.partial):
            if os.path.lexists(path):
                raise BeitJaxError(f"{printable(path)}: already exists; of a new table, name a new folder")

    @property
    def partial(self) -> Path:
        """The folder until the table is complete."""
        return self.place.with_name(f"{self.place.name}.partial")

    def file(self, name: str) -> Path:
        """Where the picture of an image is written."""
        self.partial.mkdir(exist_ok=True)
        return self.partial / f"{Path(name).stem}.png"

    def finish(self) -> None:
        """Gives the folder its name.

        Raises:
            BeitJaxError: something of this name has come meanwhile.
        """
        if self.partial.is_dir():
            if os.path.lexists(self.place):
                raise BeitJaxError(f"{printable(self.place)}: already exists; move it away, and start again")
            self.partial.rename(self.place)
