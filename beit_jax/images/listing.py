"""The images below a folder: one rule for every command."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from beit_jax.errors import BeitJaxError, printable

SUFFIXES: Final = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .ppm .pgm .pbm .pnm .tif .tiff "
        ".jp2 .j2k .j2c .jpc .jpf .jpx .avif"
    ).split()
)
"""The endings of the formats in `beit_jax.images.files.FORMATS`."""


def image_files(root: Path) -> list[Path]:
    """The images at any depth below a folder, sorted by path.

    A file is an image if its suffix is one of `SUFFIXES`. Hidden files, such as macOS's ``._cat.png``, and files in
    hidden folders are left out.
    """
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and not _is_hidden(path, root))
    return sorted(path for path in found if path.is_file())


def named_images(paths: Iterable[Path]) -> list[Path]:
    """The images that a user named: files as they are, and for a folder the images below it.

    Raises:
        BeitJaxError: nothing was named, or a folder holds no image.
    """
    images: list[Path] = []
    for path in paths:
        found = image_files(path) if path.is_dir() else [path]
        if not found:
            raise BeitJaxError(f"{printable(path)}: no images in this folder; expected {', '.join(sorted(SUFFIXES))}")
        images += found
    if not images:
        raise BeitJaxError("no images given; name at least one file or folder")
    return images


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
