"""Labelled images to evaluate: prepared data, a table with a row for every image, or a folder per class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import read_image_file

from ..data.datasets import Dataset, open_dataset
from ..data.listing import class_folders, class_images
from ..data.shards import INFO
from ..labels.meaning import TableOptions
from ..labels.splits import SPLIT_FOLDERS
from ..labels.table import TableImages, has_table, read_images
from ..labels.targets import Target, classes_of


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder per class, at any depth below it. They are read like a `datasets.Dataset`.

    Attributes:
        labels: the folders' names, sorted as text. The model's order may be another one: see `class_order`.
        paths, classes: the file of every image, and its class as an index into `labels`; by folder, then by path.
    """

    directory: Path
    labels: tuple[str, ...]
    paths: tuple[Path, ...]
    classes: tuple[int, ...]

    @property
    def target(self) -> Target:
        return classes_of(self.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"image": read_image_file(path), "label": self.classes[index], "file_name": str(path)}


def open_folder(directory: Path, split: str = "validation") -> ImageFolder:
    """A tree with a folder per class, as `listing.class_images` lists it.

    The tree is the folder of the split below `directory` ("val" and the like count, see `splits.SPLIT_FOLDERS`), or
    `directory` itself where there is no such folder.

    Raises:
        BeitJaxError: no such folder, no folder of a class in it, or one without an image.
    """
    inner = [directory / name for name in SPLIT_FOLDERS.get(split, (split,)) if (directory / name).is_dir()]
    root = inner[0] if inner else directory
    if not class_folders(root):
        raise BeitJaxError(f"{printable(root)}: expected prepared data, or a folder of images per class; found neither")
    classes = class_images(root)
    images = [(path, number) for number, paths in enumerate(classes.values()) for path in paths]
    paths, numbers = zip(*images, strict=True)
    return ImageFolder(root, tuple(classes), paths, numbers)


Labelled = Dataset | ImageFolder | TableImages


def open_labelled(
    directory: Path, split: str = "validation", table: TableOptions | None = None, *, allow_missing: bool = False
) -> Labelled:
    """Opens prepared data, a table with a row for every image, or a tree with a folder per class.

    Args:
        directory: prepared data; a table, or a folder with its ``metadata.csv`` or ``metadata.jsonl``; or the tree.
        split: the split of prepared data, or of a table that has splits; or the name of its folder in a tree of
            folders, if there is one.
        table: how a table is read. None: by the names that its columns usually have.
        allow_missing: an image that a table names and that is missing is an error when it is read.

    Raises:
        BeitJaxError: as `open_dataset`, `read_images` or `open_folder`; options of a table for something else.
    """
    prepared = any(next(directory.glob(place), None) for place in (INFO, f"*/{INFO}"))
    if not prepared and (directory.is_file() or has_table(directory)):
        return read_images(directory, table or TableOptions(), allow_missing=allow_missing).of_split(split)
    if table is not None:
        raise BeitJaxError(f"{printable(directory)}: no table, for which the options of columns are; leave them out")
    return open_dataset(directory, split) if prepared else open_folder(directory, split)
