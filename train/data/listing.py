"""Lists the images of a tree with a folder per class, or with label maps; for `prepare` and for `evaluate`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.label_maps import MAP_SUFFIXES
from beit_jax.images.listing import SUFFIXES, image_files, is_foreign

from ..labels.splits import SPLIT_FOLDERS, split_named


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
    """Every image of a folder with its annotation, the map of the same name in another folder; sorted by path.

    In folders below these, names are compared with their folders; where no two files share a name, without them.

    Raises:
        BeitJaxError: a folder is missing or has no files of its kind, an image has no annotation or several.
    """
    pairs, alone = images_with_maps(images, annotations)
    if alone:
        raise BeitJaxError(f"{alone[0]}; {len(alone)} of {len(pairs) + len(alone)} images have none")
    return pairs


def images_with_maps(images: Path, annotations: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """The pairs of `annotated_images`, and for every image without an annotation a line that says so.

    Raises:
        BeitJaxError: a folder is missing or has no files of its kind, or an image has several annotations.
    """
    pictures, maps = files_of(images, "images", SUFFIXES), files_of(annotations, "annotations (.png)", MAP_SUFFIXES)
    found = {image: path for image, path in zip(pictures, matched(images, pictures, annotations, maps), strict=True)}
    alone = [
        f"{printable(annotations / path.relative_to(images).with_suffix('.png'))}: no such file, the annotation of "
        f"{printable(path.name)}"
        for path, annotation in found.items()
        if annotation is None
    ]
    return [(image, annotation) for image, annotation in found.items() if annotation is not None], alone


def files_of(folder: Path, kind: str, suffixes: frozenset[str]) -> list[Path]:
    """The files below a folder with these endings, sorted by path.

    Args:
        kind: what the files are, for the error.

    Raises:
        BeitJaxError: `folder` is no folder, or holds no such file.
    """
    check_folder(folder, kind)
    found = image_files(folder, suffixes)
    if not found:
        raise BeitJaxError(f"{printable(folder)}: no {kind} in this folder")
    return found


def matched(
    images: Path, pictures: Sequence[Path], annotations: Path, maps: Sequence[Path], endings: tuple[str, str] = ("", "")
) -> list[Path | None]:
    """The map of every picture: the one of the same name, without `endings`, in the same folder below the roots.

    Names of splits are equal in all their forms, and may be missing below `annotations`. Where no two files share a
    name, folders are not compared.

    Args:
        endings: of the names of pictures and of maps, before their suffixes: ("_leftImg8bit", "_gtFine_labelIds").

    Raises:
        BeitJaxError: two maps for one picture, or two pictures for one map.
    """
    names = [
        [_below(root, path, ending) for path in paths]
        for root, paths, ending in ((images, pictures, endings[0]), (annotations, maps, endings[1]))
    ]
    for paths, keys in zip((pictures, maps), names, strict=True):
        first: dict[Path, Path] = {}
        for path, key in zip(paths, keys, strict=True):
            other = first.setdefault(key, path)
            if other != path:
                raise BeitJaxError(
                    f"{printable(path)}: has the name of {printable(other)}, so it is not clear which one of them is "
                    "meant; remove one"
                )
    known = dict(zip(names[1], maps, strict=True))
    counts = [Counter(key.name for key in keys) for keys in names]
    alike = {key.name: path for key, path in known.items() if max(count[key.name] for count in counts) == 1}
    without = {} if split_folders(annotations) else known
    return [known.get(key, without.get(_no_split(key), alike.get(key.name))) for key in names[0]]


def _below(root: Path, path: Path, ending: str) -> Path:
    """The name of a file below a root without its ending and suffix, and with the usual name of its split."""
    inner = path.relative_to(root)
    split = split_named(inner.parts[0]) if len(inner.parts) > 1 else None
    stem = inner.with_name(inner.stem.removesuffix(ending))
    return stem if split is None else Path(split, *stem.parts[1:])


def _no_split(name: Path) -> Path:
    return Path(*name.parts[1:]) if len(name.parts) > 1 and name.parts[0] in SPLIT_FOLDERS else name


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of splits directly below a root, by split; empty where there is none for training.

    Raises:
        BeitJaxError: two folders for one split.
    """
    found: dict[str, Path] = {}
    for path in class_folders(root):
        split = split_named(path.name)
        if split is not None and found.setdefault(split, path) != path:
            raise BeitJaxError(
                f"{printable(root)}: expected {found[split].name} or {path.name}, found both; remove one"
            )
    return found if "train" in found else {}


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
