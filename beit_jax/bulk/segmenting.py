"""Segments any number of images: rows with the areas of the classes, and pictures and label maps aside."""

import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from beit_jax.atomic import check_file
from beit_jax.bulk.chunks import folder_of, is_begun
from beit_jax.bulk.inputs import Listing, list_images
from beit_jax.bulk.table import Host, Outcome, Table, check_output
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.bands import check_bands, decode, visible
from beit_jax.images.files import read_image_file
from beit_jax.images.label_maps import LabelMap, write_label_map
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.segmentation import Inference, segment
from beit_jax.looking import pictures
from beit_jax.looking.segmented import Outputs, Place
from beit_jax.models.build import Model
from beit_jax.tables.schema import ERROR, IMAGE, Part, Schema
from beit_jax.terminal import Progress, image_progress, print_json, print_lines, print_table
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
        aside: what `keep` writes and where, for JSON.
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
    aside: Mapping[str, Any] = field(default_factory=dict)

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
        """What rows depend on besides: how images go through the model; and what is written aside."""
        return {**asdict(self.how), **self.aside}

    def parts(self, ranges: Sequence[tuple[int, int]], bad: BadImages) -> Generator[Part, None, None]:
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
        found = [asdict(area) for area in pictures.areas(labels, self.model.config.labels)]
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

    def save(self, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Writes the picture of an image."""
        Image.fromarray(picture).save(self.file(name), format="PNG")

    def discard(self) -> None:
        """Removes what was written before anything was finished."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self) -> None:
        """Gives the folder its name.

        Raises:
            BeitJaxError: something of this name has come meanwhile.
        """
        if self.partial.is_dir():
            if os.path.lexists(self.place):
                raise BeitJaxError(f"{printable(self.place)}: already exists; move it away, and start again")
            self.partial.rename(self.place)


Loaded: TypeAlias = tuple[Mapping[str, Any], Model, ImageProcessor, Inference]
"""What the model is, for JSON; the model, its image processor, and how images go through it."""


@dataclass(frozen=True)
class Written:
    """What is written for images besides a table.

    Attributes:
        picture, mask: a file each, or a folder each for several images; None: nothing.
        opacity: of the colours in pictures.
    """

    picture: Path | None
    mask: Path | None
    opacity: float

    def keep(self, picture_of: Place | None, mask_of: Place | None, form: str, labels: tuple[str, ...]) -> Keep:
        """What writes them to these places, pictures in Pillow's format `form`."""

        def keep(name: str, picture: Any, found: LabelMap) -> None:
            if picture_of is not None:
                drawn = pictures.overlay(visible(picture), found, labels, opacity=self.opacity)
                drawn.save(picture_of(Path(name)), format=form)
            if mask_of is not None:
                write_label_map(found, mask_of(Path(name)))

        return keep


@dataclass(frozen=True)
class Segmenting:
    """Segments images by a model.

    Attributes:
        load: reads the model; called after everything else that can be refused.
        max_bad: the share of images that may be left out.
        members: endings of images in archives.
        chunk: images of a chunk; None: as `Maps` has it.
    """

    load: Callable[[], Loaded]
    max_bad: float
    members: tuple[str, ...] = ()
    chunk: int | None = None

    def printed(self, images: tuple[str, ...], written: Written, *, json: bool) -> int:
        """Segments images and prints what was found."""
        listing = self._listed(images)
        files = [Path(name) for source in listing.sources for name in source.names()]
        several = len(files) > 1 or str(files[0]) != str(Path(images[0]))
        outputs = Outputs(written.picture, written.mask, files, folders=several)
        bad = BadImages(len(files), self.max_bad)
        if not several:
            check_bands(read_image_file(files[0]), printable(files[0]))  # before a checkpoint is fetched for nothing
        with outputs.open() as places:
            maps = self._maps(listing)
            maps = replace(maps, keep=written.keep(*places, outputs.format, maps.model.config.labels))
            (part,) = maps.parts([(0, len(files))], bad)
        found = [dict(row) for row in part.rows if "classes" in row]
        if json:
            rows = [*found, *(dict(row) for row in part.rows if "classes" not in row)]
            print_json(rows if several else rows[0])
            return 0
        head = ["image"] if several else []
        rows_of_areas = [row[1 - len(head) :] for entry in found for row in _area_rows(entry)]
        print_table([*head, "class", "area"], rows_of_areas)
        lines = [f"written      {printable(path)}" for path in (written.picture, written.mask) if path is not None]
        print_lines(bad.lines() + lines)
        return 0

    def to_table(
        self,
        images: tuple[str, ...],
        table: Path,
        written: Written,
        hosts: AbstractContextManager[Host],
        *,
        shared: bool,
    ) -> Outcome:
        """Writes a table, and folders of pictures and masks that are complete when it is.

        Args:
            hosts: gives the process that this is.
            shared: other processes may have begun.
        """
        check_file(table)
        places = [path for path in (written.picture, written.mask) if path is not None]
        listing = self._listed(
            images, folder_of(table), *places, *(path.with_name(f"{path.name}.partial") for path in places)
        )
        files = [Path(name) for source in listing.sources for name in source.names()]
        check_output(table, listing)
        begun = is_begun(table)
        if not begun:
            Outputs(written.picture, written.mask, files, folders=True)  # refuses images of one name
        picture, mask = (
            None if place is None else Folder(place, begun or shared) for place in (written.picture, written.mask)
        )
        with hosts as host:
            maps = self._maps(listing)
            folders = [folder for folder in (picture, mask) if folder is not None]

            def all_of(method: str) -> None:
                for folder in folders:
                    getattr(folder, method)()

            keep = written.keep(_place(picture), _place(mask), "PNG", maps.model.config.labels)
            aside = {"--output": _text(written.picture), "--mask": _text(written.mask), "opacity": written.opacity}
            making = replace(maps, keep=keep, aside=aside)
            return Table(making, table, host, partial(all_of, "finish"), partial(all_of, "discard")).make()

    def _listed(self, images: tuple[str, ...], *leave_out: Path) -> Listing:
        return list_images(images, members=self.members, leave_out=leave_out)

    def _maps(self, listing: Listing) -> Maps:
        facts, model, processor, how = self.load()
        facts = {**facts, "processor": processor.to_hf()}
        progress = partial(image_progress, first="compiling")
        return Maps(model, processor, how, listing, facts, lambda *_: None, progress, self.max_bad, self.chunk)


def _place(folder: Folder | None) -> Place | None:
    return None if folder is None else lambda image: folder.file(str(image))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _area_rows(entry: dict[str, Any]) -> list[list[str]]:
    """The rows of an image: its name, once, and the name and the area of every class."""
    return [
        [
            printable(entry["image"], 1024) if i == 0 else "",
            printable(area["label"], 1024),
            f"{100 * area['share']:.1f} %",
        ]
        for i, area in enumerate(entry["classes"])
    ]
