"""Folders of images as data sets to prepare: a folder per class, or images without labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.listing import SUFFIXES, image_files

from ..labels.splits import SPLIT_FOLDERS
from .listing import check_folder, class_folders, class_images
from .sources import Example, Source, Split, check_share, classification_features, name_hash, read_bytes, utf8

Labelled = Sequence[tuple[Path, int]]

UNLABELLED: Final = "unlabelled"


HELD_OUT: Final = 0.1


def folder(source: Path, held_out: float | None = None) -> Source:
    """A tree with a folder per class, in one of two forms.

    Either ``train/CLASS/...`` with ``val`` or ``validation``, and perhaps ``test``, beside ``train``; all names are in
    `splits.SPLIT_FOLDERS`. Or ``CLASS/...``. `listing.class_images` says which files are images. Classes are numbered
    in the order of their sorted names, as torchvision's ImageFolder numbers them.

    Args:
        held_out: the share of each class that becomes the validation split of a tree that has none, by default
            HELD_OUT. The files are chosen by their names: the same ones every time. 0: none.

    Raises:
        BeitJaxError: no such folder, no classes, a class without images, or a class that only validation has; a share
            to hold out of a tree that has a validation split.
    """
    check_folder(source)
    share = HELD_OUT if held_out is None else held_out
    check_share(share)
    roots = _split_roots(source)
    listed = {split: class_images(root) for split, root in roots.items()}
    labels = tuple(listed["train"])
    for name in labels:
        if not name.isprintable():
            raise BeitJaxError(f"{printable(roots['train'] / name)}: a class needs a printable name; rename it")
    files = {split: _numbered(images, labels, roots[split]) for split, images in listed.items()}
    if "validation" in files and held_out:
        raise BeitJaxError(
            f"--held-out {held_out}: {printable(roots['validation'])} is the validation split; leave the option out"
        )
    if "validation" not in files and share > 0:
        files["train"], files["validation"] = _hold_out(files["train"], source, share)
    return _source("image_folder", f"Images of {len(labels)} folders.", labels, files, source)


def images(source: Path, held_out: float = 0.0) -> Source:
    """All images of a folder, at any depth, as one class, "unlabelled".

    Args:
        held_out: as for `folder`.

    Raises:
        BeitJaxError: no such folder, or no images in it.
    """
    check_folder(source)
    check_share(held_out)
    found = [(path, 0) for path in image_files(source)]
    if not found:
        raise BeitJaxError(f"{printable(source)}: expected images ({', '.join(sorted(SUFFIXES))}), found none")
    files = {"train": found}
    if held_out > 0:
        files["train"], files["validation"] = _hold_out(found, source, held_out)
    return _source("images", "Images without labels.", (UNLABELLED,), files, source)


def _source(name: str, description: str, labels: tuple[str, ...], files: Mapping[str, Labelled], root: Path) -> Source:
    def example(path: Path, label: int) -> Example:
        return {"image": read_bytes(path), "label": label, "file_name": utf8(path.relative_to(root).as_posix())}

    splits = {split: Split(len(found), (example(*pair) for pair in found)) for split, found in files.items()}
    nbytes = sum(path.stat().st_size for found in files.values() for path, _ in found)
    return Source(name, description, labels, classification_features(labels), splits, nbytes)


def _split_roots(source: Path) -> dict[str, Path]:
    """The folder of each split. Without a training folder, or with folders that are no splits, all of it is "train"."""
    split_of = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
    folders = class_folders(source)
    if not any(split_of.get(path.name) == "train" for path in folders) or any(
        path.name not in split_of for path in folders
    ):
        return {"train": source}
    roots: dict[str, Path] = {}
    for path in folders:
        first = roots.setdefault(split_of[path.name], path)
        if first != path:
            raise BeitJaxError(f"{printable(source)}: expected {first.name} or {path.name}, found both; remove one")
    return roots


def _numbered(classes: Mapping[str, list[Path]], labels: tuple[str, ...], root: Path) -> list[tuple[Path, int]]:
    """All images of the classes below `root`, with the numbers of their classes."""
    numbers = {name: number for number, name in enumerate(labels)}
    files: list[tuple[Path, int]] = []
    for name, images in classes.items():
        if name not in numbers:
            raise BeitJaxError(
                f"{printable(root / name)}: a class that training does not have; remove it, or add it there"
            )
        files += [(image, numbers[name]) for image in images]
    return files


def _hold_out(files: Labelled, source: Path, share: float) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Divides files into training and validation: of each class the share whose names have the smallest hashes."""
    by_class: dict[int, list[Path]] = {}
    for path, label in files:
        by_class.setdefault(label, []).append(path)
    held: set[Path] = set()
    for paths in by_class.values():
        count = min(max(1, round(share * len(paths))), len(paths) - 1)  # a class stays in training whatever its size
        by_hash = sorted(paths, key=lambda path: name_hash(path.relative_to(source)))
        held.update(by_hash[:count])
    if not held:
        raise BeitJaxError(f"{printable(source)}: every class has one image only, none can be held out; pass 0")
    return [pair for pair in files if pair[0] not in held], [pair for pair in files if pair[0] in held]
