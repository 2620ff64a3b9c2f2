"""The files that segmentation writes: a picture and a label map for one image, folders of them for several."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from beit_jax.atomic import new_directory, new_file
from beit_jax.errors import BeitJaxError, printable

FORMATS: Final = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
Place = Callable[[Path], Path]  # from an image to the file that is written for it


@dataclass(frozen=True)
class Outputs:
    """What is written for images, and where.

    Attributes:
        picture, mask: a file each, or a new folder each of PNG files named as the images; None: nothing.
        images: what is segmented.
        folders: True if `picture` and `mask` are folders.

    Raises:
        BeitJaxError: a name has the wrong ending, both names are the same place, a folder exists, or two images would
            have one name.
    """

    picture: Path | None
    mask: Path | None
    images: Sequence[Path]
    folders: bool

    def __post_init__(self) -> None:
        if self.picture and self.mask and os.path.realpath(self.picture) == os.path.realpath(self.mask):
            raise BeitJaxError(f"{printable(self.mask)}: --output and --mask name the same place; give two")
        if self.folders:
            for folder in filter(None, (self.picture, self.mask)):
                if os.path.lexists(folder):
                    raise BeitJaxError(f"{printable(folder)}: already exists; of several images, name a new folder")
            self._check_names()
        elif self.picture is not None and self.picture.suffix.lower() not in FORMATS:
            raise BeitJaxError(f"{printable(self.picture)}: expected a name ending in .png, .jpg or .webp")
        elif self.mask is not None and self.mask.suffix.lower() != ".png":
            raise BeitJaxError(f"{printable(self.mask)}: expected a name ending in .png")

    def _check_names(self) -> None:
        first: dict[str, Path] = {}
        for image in self.images if self.picture or self.mask else ():
            other = first.setdefault(image.stem, image)
            if other != image:
                raise BeitJaxError(
                    f"{printable(image)}: would be written under the same name as {printable(other)}; segment them "
                    "in two calls"
                )

    @property
    def format(self) -> str:
        """Pillow's name of the format of pictures."""
        return "PNG" if self.folders or self.picture is None else FORMATS[self.picture.suffix.lower()]

    @contextmanager
    def open(self) -> Iterator[tuple[Place | None, Place | None]]:
        """Yields the places of pictures and of masks. All appear when the block ends without an exception, or none.

        Raises:
            BeitJaxError: as `beit_jax.atomic.new_file` and `new_directory`; an image would be replaced.
        """
        with self._opened(self.picture) as pictures, self._opened(self.mask) as masks:
            yield pictures, masks

    @contextmanager
    def _opened(self, destination: Path | None) -> Iterator[Place | None]:
        if destination is None:
            yield None
        elif self.folders:
            with new_directory(destination) as directory:
                yield lambda image: directory / f"{image.stem}.png"
        else:
            with new_file(destination, inputs=self.images) as partial:
                yield lambda image: partial
