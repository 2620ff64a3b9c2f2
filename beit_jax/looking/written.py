"""Pictures under a name that nobody gave: they say in themselves that beit-jax wrote them, and replace nothing else."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from beit_jax.atomic import check_file
from beit_jax.errors import BeitJaxError, printable

KEY: Final = "Software"  # the PNG specification's keyword
SOFTWARE: Final = "beit-jax"


def png_info() -> PngInfo:
    """The text of a PNG by which `check_picture` knows it again."""
    info = PngInfo()
    info.add_text(KEY, SOFTWARE)
    return info


def check_picture(output: Path, default: str, inputs: Iterable[Path] = ()) -> None:
    """Refuses a picture that cannot be written, before any work is done.

    Args:
        default: the name that a command takes if the user gives none. Under it only a picture of beit-jax is replaced.
        inputs: files that the work reads.

    Raises:
        BeitJaxError: as `beit_jax.atomic.check_file`; or the default name is taken by something else.
    """
    check_file(output, inputs=inputs)
    if output == Path(default) and os.path.lexists(output) and not _is_ours(output):
        raise BeitJaxError(
            f"{printable(output)}: already exists, and beit-jax did not write it; give another name with -o"
        )


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return bool(image.info.get(KEY) == SOFTWARE)
    except Exception:  # Pillow's parsers let out errors of many classes: whatever it is, it is not ours
        return False
