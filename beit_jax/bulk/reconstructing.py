"""Reconstructs any number of images: rows with the numbers of hidden and rightly predicted tokens, pictures aside."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, UInt8

from beit_jax.bulk.images import Stored
from beit_jax.bulk.inputs import Listing
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.files import decode_image
from beit_jax.images.processor import ImageProcessor
from beit_jax.looking.reconstruct import BATCH, grid_picture, reconstruct
from beit_jax.models.build import Model
from beit_jax.tables.schema import ERROR, IMAGE, Part, Schema
from beit_jax.terminal import Progress
from beit_jax.tokenizers.dvae import DvaeDecoder
from beit_jax.tokenizers.interface import Tokenizer
from beit_jax.version import __version__

CHUNK: Final = 64  # images


@dataclass(frozen=True)
class Reconstructing:
    """Reconstructs images, as `beit_jax.bulk.table.Making`. Masks are those of one process that draws them in order.

    Attributes:
        draw: draws the mask of an image.
        facts: what the model, the tokenizer, the decoder and the masks are, for JSON.
        keep: called with the name and the picture of every image, a row of four.
        chunk: images of a chunk; None: `CHUNK`.
        aside: where `keep` writes, for JSON.
    """

    model: Model
    processor: ImageProcessor
    tokenizer: Tokenizer
    decoder: DvaeDecoder
    draw: Callable[[np.random.Generator], Bool[np.ndarray, " patches"]]
    seed: int
    listing: Listing
    facts: Mapping[str, Any]
    keep: Callable[[str, UInt8[np.ndarray, "h w 3"]], None] | None
    progress: Progress
    max_bad: float = 0.0
    chunk: int | None = None
    aside: str | None = None

    @property
    def shape(self) -> None:
        """Rows have no values."""

    @property
    def length(self) -> int:
        """Images of a chunk."""
        return -(-(self.chunk or CHUNK) // BATCH) * BATCH

    def schema(self, shape: tuple[int, ...] | None) -> Schema:
        """The schema of the table."""
        metadata = {**self.facts, "format": "beit-jax tokens 1", "version": __version__}
        return Schema({"hidden": "integer", "right": "integer"}, None, self.max_bad > 0, metadata)

    def contract(self) -> dict[str, Any]:
        """What rows depend on besides: the choice of hidden patches; and what is written aside."""
        return {"seed": self.seed, "--output": self.aside}

    def parts(self, ranges: Sequence[tuple[int, int]], bad: BadImages) -> Generator[Part, None, None]:
        """Reconstructs the images of these places; as `Making.parts`."""
        rng, drawn = np.random.default_rng(self.seed), 0
        with self.progress(sum(stop - start for start, stop in ranges)) as advance:
            for start, stop in ranges:
                for _ in range(drawn, start):
                    self.draw(rng)
                rows: list[dict[str, Any]] = []
                images, place = self.listing.images(start, stop), start
                while group := list(islice(images, BATCH)):
                    rows += self._rows(place, group, np.stack([self.draw(rng) for _ in group]), bad)
                    place += len(group)
                    advance(len(group))
                drawn = stop
                yield Part(rows)

    def _rows(
        self, start: int, group: Sequence[Stored], masks: Bool[np.ndarray, "b patches"], bad: BadImages
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        pictures, readable = [], []
        for place, image in enumerate(group):
            rows.append({IMAGE: image.name})
            try:
                pictures.append(decode_image(image.read(), printable(Path(image.name))))
                readable.append(place)
            except BeitJaxError as error:
                bad.note(start + place, error)
                rows[-1][ERROR] = str(error)
        if readable:
            found = reconstruct(
                self.model, self.processor, self.tokenizer, self.decoder, pictures, masks[np.array(readable)]
            )
            for number, place in enumerate(readable):
                rows[place] |= {"hidden": int(found.hidden[number]), "right": int(found.right[number])}
                if self.keep is not None:
                    self.keep(group[place].name, grid_picture(found.part(number)))
        return rows
