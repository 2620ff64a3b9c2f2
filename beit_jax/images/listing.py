"""The images below a folder: one rule for every command."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from beit_jax.errors import BeitJaxError, printable

SUFFIXES: Final = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .ppm .pgm .pbm .pnm .tif .tiff "
        ".jp2 .j2k .j2c .jpc .jpf .jpx .avif .npy .npz"
    ).split()
)
"""The endings of the formats in `beit_jax.images.files.FORMATS`, and of arrays."""

_FOREIGN_FOLDERS: Final = frozenset({"__MACOSX", "@eaDir"})  # of macOS's archives, of Synology's thumbnails


def image_files(root: Path, suffixes: frozenset[str] = SUFFIXES) -> list[Path]:
    """The images at any depth below a folder, sorted by path.

    A file is an image if its suffix is one of `suffixes`. Links to folders are followed, as torchvision does. What
    `is_foreign` names is left out.

    Raises:
        BeitJaxError: a folder cannot be read.
    """
    return [Path(path) for path in walk(root, suffixes)]


def walk(
    root: str | os.PathLike[str], suffixes: frozenset[str] = SUFFIXES, leave_out: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Yields the images of `image_files` one by one, so that a folder of millions need not fit into memory as objects.

    Args:
        leave_out: real paths of files and folders that are passed over.

    Raises:
        BeitJaxError: a folder cannot be read.
    """
    # Sorted folder by folder, names come in the order of sorted paths, which compare part by part.
    yield from _below(str(Path(root)), suffixes, frozenset({os.path.realpath(root)}), leave_out)


def is_foreign(name: str) -> bool:
    """True for what other programs put between a person's files: hidden ones, as macOS's ``._cat.png``, and folders."""
    return name.startswith(".") or name in _FOREIGN_FOLDERS


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


def _below(folder: str, suffixes: frozenset[str], chain: frozenset[str], leave_out: frozenset[str]) -> Iterator[str]:
    """The images below a folder. The chain holds the real places of the folders above, so that no link leads round."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted((entry.name, entry.is_dir()) for entry in scanned if not is_foreign(entry.name))
    except OSError as error:
        place = printable(Path(folder))
        raise BeitJaxError(f"{place}: cannot be read ({error.strerror}); check its permissions") from None
    for name, is_folder in entries:
        path = name if folder == "." else os.path.join(folder, name)
        wanted = is_folder or os.path.splitext(name)[1].lower() in suffixes
        if not wanted or (leave_out and os.path.realpath(path) in leave_out):
            continue
        if not is_folder:
            if os.path.isfile(path):
                yield path
        elif (place := os.path.realpath(path)) not in chain:
            yield from _below(path, suffixes, chain | {place}, leave_out)
