"""ADE20K's semantic segmentation as a data set to prepare."""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.label_maps import ADE20K_CLASSES, read_label_map

from ..augmentation.decode import decode
from .listing import annotated_images
from .sources import Example, Source, Split, read_bytes


def ade20k(source: Path) -> Source:
    """ADE20K's semantic segmentation from ADEChallengeData2016 (images/ and annotations/, each training/, validation/).

    A record is {image, segmentation, file_name}. Segmentations stay as they are: 0 for none, then 150 classes from 1.

    Raises:
        BeitJaxError: a folder is missing or an image has no annotation.
    """
    splits, nbytes = {}, 0
    for split, part in (("train", "training"), ("validation", "validation")):
        images, annotations = (_existing(source / folder / part) for folder in ("images", "annotations"))
        pairs = annotated_images(images, annotations)
        splits[split] = Split(len(pairs), (_example(image, annotation, source) for image, annotation in pairs))
        nbytes += sum(path.stat().st_size for pair in pairs for path in pair)

    def check(example: Example) -> None:
        height, width, _ = decode(example["image"], printable(example["file_name"])).shape
        _check_map(source / "annotations" / Path(example["file_name"]).with_suffix(".png"), (width, height))

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "segmentation": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "file_name": tfds.features.Text(),
        }
    )
    description = "ADE20K, semantic: ADEChallengeData2016, 0 for none and 150 classes from 1."
    return Source("ade20k_semantic", description, (), features, splits, nbytes, check)


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise BeitJaxError(f"{printable(root)}: no such folder; give the folder that holds images/ and annotations/")
    return root


def _example(image: Path, annotation: Path, source: Path) -> Example:
    name = image.relative_to(source / "images").as_posix()
    return {"image": read_bytes(image), "segmentation": read_bytes(annotation), "file_name": name}


def _check_map(path: Path, size: tuple[int, int]) -> None:
    labels = read_label_map(path)
    if labels.shape != size[::-1]:
        found = f"{labels.shape[1]}x{labels.shape[0]}"
        raise BeitJaxError(f"{printable(path)}: {found} pixels, expected {size[0]}x{size[1]} as its image")
    wrong = np.argwhere(labels > ADE20K_CLASSES)
    if len(wrong):
        row, column = (int(i) for i in wrong[0])
        raise BeitJaxError(
            f"{printable(path)}: label {labels[row, column]} at row {row}, column {column}, expected 0 (none) to "
            f"{ADE20K_CLASSES}; {len(wrong)} such pixels"
        )
