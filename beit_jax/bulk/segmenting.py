"""The work of `beit-jax segment`: for one image, for several, and for any number of them with a table."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from beit_jax.bulk.chunks import folder_of
from beit_jax.bulk.inputs import Listing, list_images
from beit_jax.bulk.maps import Folder, Keep, Maps
from beit_jax.bulk.table import Host, Outcome, Table
from beit_jax.errors import printable
from beit_jax.images.bad_images import BadImages
from beit_jax.images.bands import check_bands, visible
from beit_jax.images.files import read_image_file
from beit_jax.images.label_maps import LabelMap, write_label_map
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.segmentation import Inference
from beit_jax.looking import pictures
from beit_jax.looking.segmented import Outputs, Place
from beit_jax.models.build import Model
from beit_jax.tables.writing import format_of
from beit_jax.terminal import image_progress, print_json, print_lines, print_table

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
        format_of(table)
        places = [path for path in (written.picture, written.mask) if path is not None]
        listing = self._listed(
            images, folder_of(table), *places, *(path.with_name(f"{path.name}.partial") for path in places)
        )
        files = [Path(name) for source in listing.sources for name in source.names()]
        begun = folder_of(table).exists()
        if not begun:
            Outputs(written.picture, written.mask, files, folders=True)  # refuses images of one name
        picture, mask = (
            None if place is None else Folder(place, begun or shared) for place in (written.picture, written.mask)
        )
        with hosts as host:
            maps = self._maps(listing)

            def finish() -> None:
                for folder in filter(None, (picture, mask)):
                    folder.finish()

            files_of = [
                None if folder is None else partial(lambda image, place: place.file(str(image)), place=folder)
                for folder in (picture, mask)
            ]
            maps = replace(maps, keep=written.keep(*files_of, "PNG", maps.model.config.labels))
            return Table(maps, table, host, finish).make()

    def _listed(self, images: tuple[str, ...], *leave_out: Path) -> Listing:
        return list_images(images, members=self.members, leave_out=leave_out)

    def _maps(self, listing: Listing) -> Maps:
        facts, model, processor, how = self.load()
        facts = {**facts, "processor": processor.to_hf()}
        progress = partial(image_progress, first="compiling")
        return Maps(model, processor, how, listing, facts, lambda *_: None, progress, self.max_bad, self.chunk)


def _area_rows(entry: dict[str, Any]) -> list[list[str]]:
    """The rows of an image: its name, once, and the name and the area of every class."""
    return [
        [printable(entry["image"], 1024) if i == 0 else "", printable(area.label, 1024), f"{100 * area.share:.1f} %"]
        for i, area in enumerate(entry["classes"])
    ]
