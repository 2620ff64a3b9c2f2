"""Lists the images of a tree with a folder per class, or with annotations; for `prepare` and for `evaluate`."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.listing import SUFFIXES, image_files, is_foreign

SPLIT_FOLDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}
"""The names that the folder of a split may have."""


def class_folders(root: Path) -> list[Path]:
    """The folders of a tree with a folder per class, sorted by name. Foreign ones (`is_foreign`) are left out.

    Raises:
        BeitJaxError: `root` is no folder.
    """
    check_folder(root)
    return sorted(path for path in root.iterdir() if path.is_dir() and not is_foreign(path.name))


def class_images(root: Path) -> dict[str, list[Path]]:
    """The images of every class, by the name of its folder: classes sorted by name, images by path.

    Raises:
        BeitJaxError: `root` is no folder, has no folder for a class, or the folder of a class has no image.
    """
    classes = {folder: image_files(folder) for folder in class_folders(root)}
    if not classes:
        raise BeitJaxError(f"{printable(root)}: expected a folder per class, found none")
    for folder, images in classes.items():
        if not images:
            suffixes = ", ".join(sorted(SUFFIXES))
            raise BeitJaxError(
                f"{printable(folder)}: the folder of a class without images; expected {suffixes}; fill or remove it"
            )
    return {folder.name: images for folder, images in classes.items()}


def annotated_images(images: Path, annotations: Path) -> list[tuple[Path, Path]]:
    """Every image of a folder with its annotation, the PNG of the same name in another folder; sorted by path.

    In folders below these, names are compared with their folders; where no two files share a name, without them.

    Raises:
        BeitJaxError: a folder is missing or has no files of its kind, or an image has no annotation.
    """
    pairs, alone = images_with_maps(images, annotations)
    if alone:
        raise BeitJaxError(f"{alone[0]}; {len(alone)} of {len(pairs) + len(alone)} images have none")
    return pairs


def images_with_maps(images: Path, annotations: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """The pairs of `annotated_images`, and for every image without an annotation a line that says so.

    Raises:
        BeitJaxError: a folder is missing or has no files of its kind.
    """
    found = []
    for folder, kind, suffixes in ((images, "images", SUFFIXES), (annotations, "annotations (.png)", {".png"})):
        check_folder(folder, kind)
        found.append([path for path in image_files(folder) if path.suffix.lower() in suffixes])
        if not found[-1]:
            raise BeitJaxError(f"{printable(folder)}: no {kind} in this folder")
    pictures, maps = found
    known = {path.relative_to(annotations).with_suffix(""): path for path in maps}
    counts = Counter(path.stem for path in maps), Counter(path.stem for path in pictures)
    alike = {path.stem: path for path in maps if max(count[path.stem] for count in counts) == 1}
    pairs, alone = [], []
    for path in pictures:
        name = path.relative_to(images).with_suffix("")
        annotation = known.get(name, alike.get(path.stem))
        if annotation is not None:
            pairs.append((path, annotation))
        else:
            missing = printable(annotations / f"{name}.png")
            alone.append(f"{missing}: no such file, the annotation of {printable(path.name)}")
    return pairs, alone


def check_folder(root: Path, kind: str = "") -> None:
    """Refuses a path that is no folder.

    Args:
        kind: what the folder should hold, for the error.

    Raises:
        BeitJaxError: `root` is a file, or does not exist.
    """
    if not root.is_dir():
        expected, found = f"a folder of {kind}" if kind else "a folder", "a file" if root.exists() else "nothing"
        raise BeitJaxError(f"{printable(root)}: expected {expected}, found {found}")
