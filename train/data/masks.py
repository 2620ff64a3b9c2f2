"""Somebody's images and masks as a data set to prepare: classes from 0, whatever the masks counted from.

A record holds the image's file as it is, and the mask as a PNG of the model's class numbers (`MaskClasses.read`): of 8
bits, and 255 for no class; of 16 bits and 65535 where 255 is a class.
"""

import io
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int64
from PIL import ExifTags, Image

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import decode_image, in_one_line
from beit_jax.images.label_maps import (
    IGNORED,
    LOSSY_SUFFIXES,
    MAP_SUFFIXES,
    LabelMap,
    decode_label_map,
    write_label_map,
)
from beit_jax.images.listing import SUFFIXES
from beit_jax.images.mask_classes import MaskClasses, mask_classes

from .listing import check_folder, files_of, matched, split_folders
from .shards import MASKS
from .sources import Example, Source, Split, check_share, image_size, name_hash, read_bytes, utf8

HELD_OUT: Final = 0.1
_MOST_UNNAMED: Final = 4096  # numbers without names beyond this are of instances, not of classes


@dataclass(frozen=True)
class MaskFiles:
    """What a user says of masks.

    Attributes:
        labels, colours, ignore, from_one, binary: as for `mask_classes`.
        image_suffix, mask_suffix: the ends of names of images and of masks, which their pairs do not share. Files
            without them are left out.
        only_annotated: leave out images without a mask.
    """

    labels: Path | None = None
    colours: Path | None = None
    ignore: tuple[str, ...] = ()
    from_one: bool = False
    binary: bool = False
    image_suffix: str = ""
    mask_suffix: str = ""
    only_annotated: bool = False

    def classes(self, highest: int | None = None) -> MaskClasses:
        """What the numbers of masks mean; `highest` and errors as of `mask_classes`."""
        return mask_classes(
            self.labels,
            self.colours,
            ignore=self.ignore,
            from_one=self.from_one,
            binary=self.binary,
            highest=highest,
        )


PLAIN: Final = MaskFiles()


def masks(images: Path, annotations: Path, files: MaskFiles = PLAIN, held_out: float | None = None) -> Source:
    """Images and their masks, which have their names: below folders of splits (`splits.SPLIT_FOLDERS`), or not.

    Args:
        annotations: a folder of masks, in the kinds of `label_maps`; it may be `images`.
        held_out: the share that becomes the validation split where there is none, by default `HELD_OUT`: the images
            whose names have the smallest hashes. 0: none.

    Raises:
        BeitJaxError: folders that are missing or empty, an image without a mask, files of names that cannot be used, a
            share to hold out of a tree that has a validation split; from the examples, what is wrong with a mask.
    """
    share = HELD_OUT if held_out is None else held_out
    check_share(share)
    check_folder(images)
    check_folder(annotations)
    pairs, notes = _pairs(images, annotations, files)
    splits = _splits(pairs, images, held_out, share)
    named = files.labels or files.colours or files.binary
    classes = files.classes(None if named else _highest([mask for _, mask in pairs], files))
    made = _Records(classes, images)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "segmentation": tfds.features.LabeledImage(
                labels=list(classes.names),
                shape=(None, None, 1),
                dtype=np.uint8 if classes.no_class == IGNORED else np.uint16,
                encoding_format="png",
            ),
            "file_name": tfds.features.Text(),
        }
    )
    return Source(
        name="masks",
        description=f"Images with masks of {len(classes.names)} classes.",
        labels=classes.names,
        features=features,
        splits={split: _split(split, found) for split, found in splits.items()},
        nbytes=sum(path.stat().st_size for pair in pairs for path in pair),
        check=lambda example: None,
        record=made.record,
        metadata=made.metadata,
        notes=lambda: [*notes, *made.notes()],
    )


def _split(split: str, pairs: Sequence[tuple[Path, Path]]) -> Split:
    return Split(len(pairs), ({"split": split, "image": image, "mask": mask} for image, mask in pairs))


# --- Files


def _pairs(images: Path, annotations: Path, files: MaskFiles) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Every image with its mask, and notes of what was left out."""
    pictures, maps = _listed(images, annotations, files)
    if split_folders(annotations) and not split_folders(images):
        raise BeitJaxError(
            f"{printable(annotations)}: has folders of splits, but {printable(images)} has none; give both trees the "
            "same folders"
        )
    found = matched(images, pictures, annotations, maps, (files.image_suffix, files.mask_suffix))
    alone = [image for image, mask in zip(pictures, found, strict=True) if mask is None]
    pairs = [(image, mask) for image, mask in zip(pictures, found, strict=True) if mask is not None]
    if alone and (not files.only_annotated or not pairs):
        raise BeitJaxError(
            f"{printable(alone[0])}: no mask of this name below {printable(annotations)}; {len(alone)} of "
            f"{len(pictures)} images have none; {_suggestion(alone[0], maps, files)}"
        )
    notes = [f"{len(alone):,} images have no mask and are left out, the first: {printable(alone[0])}"] if alone else []
    used = {mask for _, mask in pairs}
    unused = [mask for mask in maps if mask not in used]
    if unused:
        notes.append(f"{len(unused):,} masks have no image and are left out, the first: {printable(unused[0])}")
    return pairs, notes


def _listed(images: Path, annotations: Path, files: MaskFiles) -> tuple[list[Path], list[Path]]:
    """The images and the masks, without what the ends of names exclude."""
    suffixes = MAP_SUFFIXES | LOSSY_SUFFIXES if files.binary else MAP_SUFFIXES
    together = images.resolve() == annotations.resolve()
    found = files_of(annotations, "files", suffixes | LOSSY_SUFFIXES)
    maps = [path for path in found if path.suffix.lower() in suffixes and path.stem.endswith(files.mask_suffix)]
    pictures = [path for path in files_of(images, "images", SUFFIXES) if path.stem.endswith(files.image_suffix)]
    if together:
        taken = set(maps)
        pictures = [path for path in pictures if path not in taken]
    for kind, paths, end, option in (
        ("images", pictures, files.image_suffix, "--image-suffix"),
        ("masks", maps, files.mask_suffix, "--mask-suffix"),
    ):
        if not paths:
            where = printable(images if kind == "images" else annotations)
            if end:
                raise BeitJaxError(f"{where}: no {kind} whose names end in {printable(end)} ({option})")
            raise BeitJaxError(
                f"{where}: no {kind} ({', '.join(sorted(SUFFIXES if kind == 'images' else suffixes))})"
                + (
                    "; where images and masks share a folder, say how masks end: --mask-suffix _mask"
                    if together
                    else ""
                )
                + ("; JPEG smears class numbers: with two classes pass --binary" if kind == "masks" and found else "")
            )
    return pictures, maps


def _suggestion(image: Path, maps: Sequence[Path], files: MaskFiles) -> str:
    """The way out for an image without a mask."""
    stem = image.stem.removesuffix(files.image_suffix)
    longer = [path.stem.removeprefix(stem) for path in maps if path.stem.startswith(stem) and path.stem != stem]
    if longer and not files.mask_suffix:
        return f"if {printable(stem + longer[0])} is its mask, pass --mask-suffix={printable(longer[0])}"
    return "add the masks, or leave these images out with --only-annotated"


def _splits(
    pairs: Sequence[tuple[Path, Path]], images: Path, held_out: float | None, share: float
) -> dict[str, list[tuple[Path, Path]]]:
    folders = split_folders(images)
    if folders:
        place = {folder.name: split for split, folder in folders.items()}
        found: dict[str, list[tuple[Path, Path]]] = {split: [] for split in ("train", "validation", "test")}
        for image, mask in pairs:
            name = image.relative_to(images).parts[0]
            if name not in place:
                raise BeitJaxError(
                    f"{printable(image)}: lies in none of the splits' folders, {', '.join(sorted(place))}; move it"
                )
            found[place[name]].append((image, mask))
        found = {split: listed for split, listed in found.items() if listed}
    else:
        found = {"train": list(pairs)}
    if "validation" in found:
        if held_out:
            raise BeitJaxError(
                f"--held-out {held_out}: {printable(folders['validation'])} is the validation split; leave the option "
                "out"
            )
    elif share > 0:
        training = found["train"]
        if len(training) < 2:
            raise BeitJaxError(f"{printable(images)}: one image, none can be held out; pass --held-out 0")
        count = min(max(1, round(share * len(training))), len(training) - 1)
        ordered = sorted(training, key=lambda pair: name_hash(pair[0].relative_to(images)))
        held = set(ordered[:count])
        found["train"] = [pair for pair in training if pair not in held]
        found["validation"] = [pair for pair in training if pair in held]
    return found


def _highest(maps: Sequence[Path], files: MaskFiles) -> int:
    """The largest number in masks whose classes have no names."""
    ignored = [IGNORED] + [int(word) for word in files.ignore if word.lstrip("-").isdecimal()]

    def largest(path: Path) -> tuple[int, Path]:
        try:
            numbers = decode_label_map(read_bytes(path), printable(path), grey_colours=True)
        except BeitJaxError:
            return -1, path  # the mask's record says what is wrong
        return int(np.max(numbers, initial=-1, where=~np.isin(numbers, ignored))), path

    with ThreadPoolExecutor() as pool:
        highest, path = max(pool.map(largest, maps), key=lambda pair: pair[0])
    if highest > _MOST_UNNAMED:
        raise BeitJaxError(
            f"{printable(path)}: number {highest} without a name: instances are no classes; name the classes in "
            "--labels FILE, and the others in --ignore"
        )
    return max(highest, 1)


# --- Records


@dataclass
class _Records:
    """Makes records, and counts pixels.

    Attributes:
        counts: of each split, the pixels of each class, and last those of no class.
    """

    classes: MaskClasses
    root: Path
    counts: dict[str, Int64[np.ndarray, " classes_and_none"]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, example: Example) -> Example:
        """The record of {split, image, mask}, by their paths; raises BeitJaxError where they cannot be used."""
        image, mask = example["image"], example["mask"]
        data, name = read_bytes(image), utf8(image.relative_to(self.root).as_posix())
        labels = self.classes.read(read_bytes(mask), printable(mask))
        height, width = image_size({"image": data, "file_name": name})
        upright = _upright(data, printable(image), labels.shape)
        if upright is not data:
            data = upright
            height, width = image_size({"image": data, "file_name": name})
        if labels.shape != (height, width):
            raise BeitJaxError(
                f"{printable(mask)}: {labels.shape[1]}x{labels.shape[0]} pixels, but {printable(image)} has "
                f"{width}x{height}; use the mask of this image, in its size"
            )
        self._count(example["split"], labels)
        return {"image": data, "segmentation": _png(labels), "file_name": name}

    def _count(self, split: str, labels: LabelMap) -> None:
        count = len(self.classes.names)
        found = np.bincount(np.where(labels == self.classes.no_class, count, labels).ravel(), minlength=count + 1)
        with self._lock:
            self.counts[split] = self.counts.get(split, 0) + found

    def metadata(self) -> Mapping[str, Any]:
        """For `datasets.open_segmentation`; raises BeitJaxError where there is nothing to learn."""
        for split, counts in self.counts.items():
            if split != "train" and not counts[:-1].any():
                raise BeitJaxError(
                    f"{printable(self.root)}: the masks of the split {split} have no labelled pixel, so nothing can be "
                    "scored; give it others"
                )
        found = self.counts["train"]
        if np.count_nonzero(found[:-1]) < 2:
            name = "no class" if not found[:-1].any() else printable(self.classes.names[int(found[:-1].argmax())], 40)
            maybe = (
                "255 is no class: pass --binary if it is the second one"
                if found[-1] and IGNORED in self.classes.ignored
                else "see how the masks count classes"
            )
            raise BeitJaxError(
                f"{printable(self.root)}: every labelled pixel of the training masks is {name}, so there is nothing to "
                f"learn; {maybe}"
            )
        return {
            MASKS: {
                "reduces": self.classes.reduces,
                "numbers": list(self.classes.numbers),
                "ignored": sorted(self.classes.ignored),
                "pixels": {split: counts[:-1].tolist() for split, counts in self.counts.items()},
            }
        }

    def notes(self) -> Iterator[str]:
        for split, counts in self.counts.items():
            missing = [
                printable(name, 40) for name, pixels in zip(self.classes.names, counts, strict=False) if not pixels
            ]
            if missing and split == "train":
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                yield f"no pixel of the split {split} is of {', '.join(missing[:3])}{more}"


def _png(labels: LabelMap) -> bytes:
    buffer = io.BytesIO()
    write_label_map(labels, buffer)
    return buffer.getvalue()


def _upright(data: bytes, name: str, size: tuple[int, ...]) -> bytes:
    """The file, or, if its EXIF data turn it, a PNG of what people see: masks are drawn on that.

    Raises:
        BeitJaxError: the mask fits the image as it is stored only.
    """
    if not data.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF")):
        return data
    with in_one_line(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of strange EXIF data
        image = Image.open(io.BytesIO(data))
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return data
    stored = (image.height, image.width)
    upright = decode_image(data, name)
    if (upright.height, upright.width) != size and stored == size:
        raise BeitJaxError(f"{name}: EXIF data turn it, and its mask was drawn unturned; store the image without them")
    buffer = io.BytesIO()
    upright.save(buffer, "PNG")
    return buffer.getvalue()
