"""Tables with a row for every image as data sets to prepare: classes, several classes of an image, or numbers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow_datasets as tfds

from beit_jax.errors import BeitJaxError, printable

from ..labels.meaning import TableOptions
from ..labels.table import TableImages, read_images
from ..labels.targets import NAMES_OF_VALUES, Target
from .sources import Example, Source, Split, check_image, check_share, name_hash, read_bytes, utf8

HELD_OUT: Final = 0.1


def table(
    source: Path,
    options: TableOptions | None = None,
    held_out: float | None = None,
    *,
    allow_missing: bool = False,
) -> Source:
    """The images that a table names: a table file, a folder with ``metadata.csv`` or ``metadata.jsonl``, or a folder
    with such folders for its splits. A column says in which split an image is, or the folder; else all are "train".

    Args:
        options: where the table says what; None: by the names that columns usually have.
        held_out: the share of the training images that becomes the validation split where there is none, by default
            HELD_OUT; of images of one class each, the share of each class. They are chosen by their names: the same
            ones every time. 0: none.
        allow_missing: a missing image is an example that cannot be used, and no error here.

    Raises:
        BeitJaxError: as `labels.table.read_images`; a share to hold out where there is a validation split; no training
            images; nothing that can be held out.
    """
    share = HELD_OUT if held_out is None else held_out
    check_share(share)
    images = read_images(source, options or TableOptions(), allow_missing=allow_missing)
    splits: dict[str, list[int]] = {}
    for index, name in enumerate(images.splits or ("train",) * len(images)):
        splits.setdefault(name, []).append(index)
    if "train" not in splits:
        found = ", ".join(sorted(splits))
        raise BeitJaxError(f"{printable(source)}: no image of the split train, found {found}; name some train")
    if "validation" in splits and held_out:
        raise BeitJaxError(f"--held-out {held_out}: {printable(source)} has a validation split; leave the option out")
    if "validation" not in splits and share > 0:
        splits["train"], splits["validation"] = _hold_out(images, splits["train"], share)
    target = images.target
    names: Mapping[str, Any] = {NAMES_OF_VALUES: list(target.names)} if target.problem_type == "regression" else {}
    return Source(
        name="image_table",
        description=f"Images and a table: {images.described}.",
        labels=target.names,
        features=features_of(target),
        splits={name: Split(len(found), _examples(images, found)) for name, found in splits.items()},
        nbytes=sum(path.stat().st_size for path in images.paths if path.is_file()),
        check=_check,
        metadata=lambda: names,
        notes=lambda: (images.described,),
        unit="values" if target.problem_type == "regression" else "classes",
    )


def features_of(target: Target) -> tfds.features.FeaturesDict:
    """The schema of images with such a target."""
    names = list(target.names)
    if target.problem_type == "single_label_classification":
        said = tfds.features.ClassLabel(names=names)
    elif target.problem_type == "multi_label_classification":
        said = tfds.features.Sequence(tfds.features.ClassLabel(names=names))
    else:
        said = tfds.features.Tensor(shape=(len(names),), dtype=np.float32)
    image, file_name = tfds.features.Image(), tfds.features.Text()
    return tfds.features.FeaturesDict({"image": image, target.feature: said, "file_name": file_name})


def _examples(images: TableImages, indices: Sequence[int]) -> Iterator[Example]:
    for index in indices:
        path, raw = images.paths[index], images.raw[index]
        yield {
            "image": read_bytes(path) if path.is_file() else b"",
            images.target.feature: list(raw) if isinstance(raw, tuple) else raw,
            "file_name": utf8(images.names[index]),
        }


def _check(example: Example) -> None:
    if not example["image"]:
        raise BeitJaxError(f"{printable(example['file_name'])}: no such file, or an empty one")
    check_image(example)


def _hold_out(images: TableImages, indices: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Divides images into training and validation: of each group the share whose names have the smallest hashes."""
    single = images.target.problem_type == "single_label_classification"
    groups: dict[Any, list[int]] = {}
    for index in indices:
        groups.setdefault(images.raw[index] if single else None, []).append(index)
    held: set[int] = set()
    for members in groups.values():
        count = min(max(1, round(share * len(members))), len(members) - 1)  # some stay in training whatever the number
        held.update(sorted(members, key=lambda index: name_hash(images.names[index]))[:count])
    if not held:
        raise BeitJaxError(
            f"{printable(images.directory)}: too few images to hold some out; give --held-out 0, or a split column"
        )
    return [index for index in indices if index not in held], sorted(held)
