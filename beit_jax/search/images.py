"""The images that a table of features names: files, and members of archives."""

import tarfile
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.images.bands import Selection, decode, visible
from beit_jax.images.files import read_image_file

MOST_BYTES = 1 << 28  # of one member


def small_images(
    names: Iterable[str], folder: Path, side: int, *, channels: int = 3, select: Selection = None
) -> dict[str, Image.Image]:
    """The images of some names as pictures of at most `side` pixels; those that cannot be found are not there.

    Args:
        names: as `beit-jax features` writes them: a path, or ``archive.tar/MEMBER``. Each archive is read once.
        folder: what relative names may also be relative to, besides the folder that the process works in.
        channels, select: the bands of the images, as `beit_jax.images.bands.decode` takes them.
    """

    def add(name: str, data: bytes) -> None:
        with suppress(BeitJaxError):
            image = visible(decode(data, name, channels, select=select))
            image.thumbnail((side, side))
            found[name] = image

    found, archives = dict[str, Image.Image](), defaultdict[Path, dict[str, str]](dict)
    for name in dict.fromkeys(names):
        place = next((path for path in (Path(name), folder / name) if path.is_file()), None)
        if place is not None:
            with suppress(BeitJaxError):
                add(name, read_image_file(place))
        elif (inside := _archive(name, folder)) is not None:
            archives[inside[0]][inside[1]] = name
    for archive, members in archives.items():
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    wanted = members.pop(member.name.removeprefix("./"), None)
                    content = tar.extractfile(member) if wanted and member.size <= MOST_BYTES else None
                    if wanted and content is not None:
                        add(wanted, content.read())
                    if not members:
                        break
        except (tarfile.TarError, OSError, EOFError):
            continue  # the pictures of an archive that is damaged now are missing
    return found


def _archive(name: str, folder: Path) -> tuple[Path, str] | None:
    """The archive that a name begins with, and the rest of it."""
    for path in (Path(name), folder / name):
        for parent in path.parents:
            if parent.is_file():
                return parent, str(path.relative_to(parent))
    return None
