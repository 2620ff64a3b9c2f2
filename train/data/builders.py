"""What `prepare` writes: the images, labels and names of the data sets people train on, read from where they lie.

A `Source` is found (folders listed, archives and labels checked) before anything is written; its examples are read
one after the other while they are written.
"""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tensorflow_datasets as tfds
import xxhash
from PIL import Image

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.label_maps import read_label_map

from ..augmentation.decode import decode

Example = Mapping[str, Any]  # the values of a record, by feature
Labelled = Sequence[tuple[Path, int]]

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNLABELLED: Final = "unlabelled"
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, META, TRUTH = "ILSVRC2012_devkit_t12", "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
WHOLE_TAR: Final = "fall11_whole.tar"
BYTES_PER_IMAGE: Final = 92_000  # of ImageNet-22k: 1.31 TB of 14,197,122 images
ADE20K_CLASSES: Final = 150
_CLASS_TAR: Final = re.compile(r"n\d{8}\.tar")


@dataclass(frozen=True)
class Split:
    """Part of a data set: how many examples it should have (for progress), and the examples."""

    count: int
    examples: Iterable[Example]


def check_image(example: Example) -> None:
    """Decodes the image and forgets it.

    Raises:
        BeitJaxError: it cannot be decoded.
    """
    decode(example["image"], printable(example["file_name"]))


@dataclass(frozen=True)
class Source:
    """A data set before it is written.

    Attributes:
        labels: names of the classes; empty where images have no label.
        features: the schema, TFDS' own: {image, label, file_name}.
        nbytes: about how much space it takes.
        check: raises BeitJaxError for an example that cannot be used; called from several threads.
    """

    name: str
    description: str
    labels: tuple[str, ...]
    features: tfds.features.FeaturesDict
    splits: Mapping[str, Split]
    nbytes: int
    check: Callable[[Example], None] = check_image


def digits() -> Source:
    """scikit-learn's handwritten digits: 1797 greyscale images of 8x8 pixels, in ten classes.

    A quarter, stratified by class, is the split "validation". The pixels (0..16 scaled to 0..255) and the split are
    those the checkpoint inside this package was trained and tested with (tests/reference/make_digits.py).

    Raises:
        BeitJaxError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise BeitJaxError("digits: scikit-learn holds them and is not installed; pip install scikit-learn") from None
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(range(len(pixels)), test_size=0.25, random_state=0, stratify=data.target)

    def example(index: int) -> Example:
        buffer = io.BytesIO()
        Image.fromarray(pixels[index]).save(buffer, format="PNG")
        return {"image": buffer.getvalue(), "label": int(data.target[index]), "file_name": f"digit_{index:04d}.png"}

    splits = {
        name: Split(len(part), map(example, part)) for name, part in zip(("train", "validation"), parts, strict=True)
    }
    description = "Handwritten digits of UCI's optical recognition set, as scikit-learn has them."
    return Source("digits", description, DIGITS, classification_features(DIGITS), splits, len(pixels) * 512)


def folder(source: Path, held_out: float) -> Source:
    """A tree with a folder per class, in one of two forms.

    ``train/CLASS/...`` with ``val`` or ``validation`` and perhaps ``test`` beside ``train``; or ``CLASS/...``. Classes
    are numbered in the order of their sorted names, as torchvision's ImageFolder does. Images lie at any depth below
    their class; files with other suffixes than SUFFIXES, and hidden ones, or what hidden folders hold, are not images.

    Args:
        held_out: of data without a validation split, the share of each class that becomes one: the same files every
            time, chosen by their names. 0: none does.

    Raises:
        BeitJaxError: no such folder, no classes, a class without images, or one that only validation has.
    """
    _check_folder(source)
    _check_share(held_out)
    roots = _split_roots(source)
    labels = tuple(path.name for path in _folders(roots["train"]))
    for name in labels:
        if not name.isprintable():
            raise BeitJaxError(f"{printable(roots['train'] / name)}: a class needs a printable name; rename it")
    files = {split: _labelled(root, labels) for split, root in roots.items()}
    if "validation" not in files and held_out > 0:
        files["train"], files["validation"] = _hold_out(files["train"], source, held_out)
    return _of_files("image_folder", f"Images of {len(labels)} folders.", labels, files, source)


def images(source: Path, held_out: float) -> Source:
    """All images of a folder, at any depth: one class, "unlabelled".

    What is an image, and the meaning of `held_out`, are those of `folder`.

    Raises:
        BeitJaxError: no such folder, or no images in it.
    """
    _check_folder(source)
    _check_share(held_out)
    found = [(path, 0) for path in _images(source)]
    if not found:
        raise BeitJaxError(f"{printable(source)}: expected images ({', '.join(sorted(SUFFIXES))}), found none")
    files = {"train": found}
    if held_out > 0:
        files["train"], files["validation"] = _hold_out(found, source, held_out)
    return _of_files("images", "Images without labels.", (UNLABELLED,), files, source)


def imagenet(source: Path) -> Source:
    """ImageNet-1k (ILSVRC 2012) from the archives of image-net.org, which are read where they lie, not unpacked.

    - ILSVRC2012_img_train.tar, of a tar per class, becomes "train"; ILSVRC2012_img_val.tar becomes "validation". One
      of them is enough.
    - ILSVRC2012_devkit_t12.tar.gz is always needed, packed or unpacked: its ``data/meta.mat`` says which classes there
      are, and ``data/ILSVRC2012_validation_ground_truth.txt`` those of the validation images. The text alone does not
      do: it counts classes as meta.mat does, in another order than models.

    Labels are the 1000 WordNet ids ("n01440764" ...) in sorted order, which is the order of every model's logits.

    Raises:
        BeitJaxError: a file is missing, no archive, or does not fit the others.
    """
    devkit = _read_devkit(source)
    sizes = {tar: (source / tar).stat().st_size for tar in (TRAIN_TAR, VALIDATION_TAR) if (source / tar).is_file()}
    if not sizes:
        raise BeitJaxError(f"{printable(source)}: expected {TRAIN_TAR} or {VALIDATION_TAR} or both, found neither")
    splits = {}
    if TRAIN_TAR in sizes:
        splits["train"] = Split(devkit.training_images, _training(source / TRAIN_TAR, devkit.labels))
    if VALIDATION_TAR in sizes:
        splits["validation"] = Split(len(devkit.truth), _validation(source / VALIDATION_TAR, devkit))
    description = "ImageNet-1k, ILSVRC 2012: https://image-net.org"
    features = classification_features(devkit.labels)
    return Source("imagenet2012", description, devkit.labels, features, splits, sum(sizes.values()))


def imagenet22k(source: Path, held_out: float) -> Source:
    """ImageNet-22k, the whole of ImageNet, from image-net.org's archives, which are read where they lie, not unpacked.

    `source` is a folder of a tar per class (n00004475.tar ...), or one that holds fall11_whole.tar, a tar of such tars,
    or a tar of such tars itself. Other files of the folder do not matter. Labels are the WordNet ids in sorted order;
    images are named n00004475/n00004475_6590.JPEG.

    How many there are is an estimate, and which are held out follows from the name of each alone: archives are not
    listed before they are read, which takes hours. They are read once for each split.

    Args:
        held_out: about the share of images that becomes the split "validation". 0: there is none.

    Raises:
        BeitJaxError: no such file or folder, no archives, or one that is damaged or that holds something else.
    """
    _check_share(held_out)
    whole = source / WHOLE_TAR if source.is_dir() else source
    tars = {} if whole == source else {path.stem: path for path in source.iterdir() if _CLASS_TAR.fullmatch(path.name)}
    if not tars and not whole.is_file():
        expected = f"a tar per class such as n00004475.tar, or {WHOLE_TAR}"
        raise BeitJaxError(f"{printable(source)}: expected {expected}, found neither")
    labels = tuple(sorted(tars)) if tars else _class_names(whole)
    nbytes = sum(path.stat().st_size for path in tars.values() or [whole])

    def examples(wanted: Callable[[str], bool]) -> Iterator[Example]:
        found = _separate(tars, labels, wanted) if tars else _nested(whole, labels, wanted)
        for number, file_name, data in found:
            yield {"image": data, "label": number, "file_name": _text(f"{labels[number]}/{file_name}")}

    def is_held(file_name: str) -> bool:
        return _hash(file_name) < held_out * 2**64

    count = max(1, nbytes // BYTES_PER_IMAGE)
    splits = {"train": Split(round(count * (1 - held_out)), examples(lambda file_name: not is_held(file_name)))}
    if held_out > 0:
        splits["validation"] = Split(round(count * held_out), examples(is_held))
    features = classification_features(labels)
    return Source("imagenet22k", "ImageNet-22k: https://image-net.org", labels, features, splits, nbytes)


def ade20k(source: Path) -> Source:
    """ADE20K's semantic segmentation from ADEChallengeData2016 (images/ and annotations/, each training/, validation/).

    Segmentations are kept as they are: 0 for none, then the 150 classes from 1. {image, segmentation, file_name}.

    Raises:
        BeitJaxError: a folder is missing or an image has no annotation.
    """
    splits, nbytes = {}, 0
    for split, part in (("train", "training"), ("validation", "validation")):
        images = _images(_existing(source / "images" / part))
        maps = {path.stem: path for path in _images(_existing(source / "annotations" / part))}
        alone = [path.name for path in images if path.stem not in maps]
        if not images or alone:
            found = f"none for {printable(alone[0])}" if alone else "no images"
            raise BeitJaxError(f"{printable(source)}: {part}: expected images with annotations, found {found}")
        pairs = [(path, maps[path.stem]) for path in images]
        splits[split] = Split(len(pairs), (_segmented(image, map_, source) for image, map_ in pairs))
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


def classification_features(labels: Sequence[str]) -> tfds.features.FeaturesDict:
    """The schema of a classified image; that of TFDS' own imagenet2012."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(labels)),
            "file_name": tfds.features.Text(),
        }
    )


def _of_files(
    name: str, description: str, labels: tuple[str, ...], files: Mapping[str, Labelled], root: Path
) -> Source:
    def example(path: Path, label: int) -> Example:
        return {"image": _read(path), "label": label, "file_name": _text(path.relative_to(root).as_posix())}

    splits = {split: Split(len(found), (example(*pair) for pair in found)) for split, found in files.items()}
    nbytes = sum(path.stat().st_size for found in files.values() for path, _ in found)
    return Source(name, description, labels, classification_features(labels), splits, nbytes)


# Folders


def _check_folder(source: Path) -> None:
    if not source.is_dir():
        found = "a file" if source.exists() else "nothing"
        raise BeitJaxError(f"{printable(source)}: expected a folder, found {found}")


def _check_share(held_out: float) -> None:
    if not 0 <= held_out < 1:
        raise BeitJaxError(f"held-out share: expected a number in [0, 1), found {held_out}")


def _split_roots(source: Path) -> dict[str, Path]:
    folders = {path.name: path for path in _folders(source)}
    if "train" not in folders or not set(folders) <= {"train", "val", "validation", "test"}:
        return {"train": source}
    if {"val", "validation"} <= set(folders):
        raise BeitJaxError(f"{printable(source)}: expected val or validation, found both; remove one")
    return {"validation" if name == "val" else name: path for name, path in folders.items()}


def _folders(root: Path) -> list[Path]:
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise BeitJaxError(f"{printable(root)}: expected a folder per class, found none")
    return found


def _labelled(root: Path, labels: tuple[str, ...]) -> list[tuple[Path, int]]:
    numbers = {name: number for number, name in enumerate(labels)}
    files = []
    for path in _folders(root):
        if path.name not in numbers:
            raise BeitJaxError(f"{printable(path)}: a class that training does not have; remove it, or add it there")
        images = _images(path)
        if not images:
            raise BeitJaxError(f"{printable(path)}: a class without images; expected {', '.join(sorted(SUFFIXES))}")
        files += [(image, numbers[path.name]) for image in images]
    return files


def _hold_out(files: Labelled, source: Path, share: float) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    by_class: dict[int, list[Path]] = {}
    for path, label in files:
        by_class.setdefault(label, []).append(path)
    held: set[Path] = set()
    for paths in by_class.values():
        count = min(max(1, round(share * len(paths))), len(paths) - 1)  # a class stays in training whatever its size
        by_hash = sorted(paths, key=lambda path: _hash(path.relative_to(source)))
        held.update(by_hash[:count])
    if not held:
        raise BeitJaxError(f"{printable(source)}: every class has one image only, none can be held out; pass 0")
    return [pair for pair in files if pair[0] not in held], [pair for pair in files if pair[0] in held]


def _hash(name: str | Path) -> int:
    return xxhash.xxh3_64_intdigest(os.fsencode(name))


def _text(name: str) -> str:
    """As records hold it: in UTF-8, which names of files need not be."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _images(root: Path) -> list[Path]:
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and not _is_hidden(path, root))
    return sorted(path for path in found if path.is_file())


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise BeitJaxError(f"{printable(root)}: no such folder; give the folder that holds images/ and annotations/")
    return root


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BeitJaxError(f"{printable(path)}: cannot be read ({error.strerror})") from error


# Segmentation


def _segmented(image: Path, annotation: Path, source: Path) -> Example:
    name = image.relative_to(source / "images").as_posix()
    return {"image": _read(image), "segmentation": _read(annotation), "file_name": name}


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


# ImageNet


@dataclass(frozen=True)
class _Devkit:
    """labels: sorted WordNet ids. truth: of validation image i + 1, the place of its class among `labels`."""

    labels: tuple[str, ...]
    truth: tuple[int, ...]
    training_images: int


def _read_devkit(source: Path) -> _Devkit:
    from scipy.io import loadmat

    meta, text, where = _devkit_files(source)
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        classes = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        total = int(sum(leaves["num_train_images"]))
    except Exception as error:  # SciPy's reader lets out whatever its parsing hits
        found = printable(f"{type(error).__name__}: {error}")
        raise BeitJaxError(f"{where}: {META} is not that of ILSVRC 2012 ({found}); fetch it again") from error
    labels = tuple(sorted(classes.values()))
    places = {number: labels.index(name) for number, name in classes.items()}
    truth = []
    for line, word in enumerate(text.split(), start=1):
        if not word.isdecimal() or int(word) not in places:
            expected = f"a class from 1 to {len(places)}"
            raise BeitJaxError(f"{where}: {TRUTH}: line {line}: expected {expected}, found {printable(word)}")
        truth.append(places[int(word)])
    return _Devkit(labels, tuple(truth), total)


def _devkit_files(source: Path) -> tuple[bytes, str, str]:
    for root in (source / DEVKIT / "data", source):
        if (root / META).is_file() and (root / TRUTH).is_file():
            return _read(root / META), _read(root / TRUTH).decode("ascii", "replace"), printable(root)
    archive = source / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        raise BeitJaxError(
            f"{printable(archive)}: no such file; it holds the labels ({META} and {TRUTH}, both are needed): put it "
            "there as image-net.org offers it, or unpacked"
        )
    with _archive(archive) as tar:
        found = {}
        for name in (META, TRUTH):
            try:
                member = tar.extractfile(f"{DEVKIT}/data/{name}")
            except KeyError:
                member = None
            if member is None:
                raise BeitJaxError(f"{printable(archive)}: holds no {DEVKIT}/data/{name}; fetch it again")
            found[name] = member.read()
    return found[META], found[TRUTH].decode("ascii", "replace"), printable(archive)


def _training(path: Path, labels: tuple[str, ...]) -> Iterator[Example]:
    for number, file_name, data in _nested(path, labels, lambda file_name: True):
        yield {"image": data, "label": number, "file_name": file_name}


def _nested(path: Path, labels: tuple[str, ...], wanted: Callable[[str], bool]) -> Iterator[tuple[int, str, bytes]]:
    """Of an archive of a tar per class: number of the class, name and content of each wanted file."""
    numbers = {name: number for number, name in enumerate(labels)}
    missing = set(labels)
    with _archive(path) as outer:
        for member in _members(outer):
            name = Path(member.name).stem
            if member.isdir():
                continue
            if not member.isfile() or name not in numbers:
                found = printable(member.name)
                raise BeitJaxError(f"{printable(path)}: expected a tar per class of {META}, found {found}")
            missing.discard(name)
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for file_name, data in _files(inner, wanted):
                    yield numbers[name], file_name, data
    if missing:
        raise BeitJaxError(
            f"{printable(path)}: {len(labels) - len(missing)} of {len(labels)} classes, {min(missing)} is missing; "
            "the archive is incomplete, fetch it again"
        )


def _separate(
    tars: Mapping[str, Path], labels: tuple[str, ...], wanted: Callable[[str], bool]
) -> Iterator[tuple[int, str, bytes]]:
    """The same of a tar per class that lie beside each other."""
    for number, name in enumerate(labels):
        with _archive(tars[name]) as tar:
            for file_name, data in _files(tar, wanted):
                yield number, file_name, data


def _class_names(path: Path) -> tuple[str, ...]:
    with _archive(path) as tar:
        tars = [Path(member.name) for member in _members(tar) if not member.isdir()]
    wrong = [tar.name for tar in tars if not _CLASS_TAR.fullmatch(tar.name)]
    if wrong or not tars:
        found = printable(wrong[0]) if wrong else "none"
        raise BeitJaxError(f"{printable(path)}: expected a tar per class such as n00004475.tar, found {found}")
    return tuple(sorted({tar.stem for tar in tars}))


def _validation(path: Path, devkit: _Devkit) -> Iterator[Example]:
    count = 0
    with _archive(path) as tar:
        for file_name, data in _files(tar, lambda file_name: True):
            match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", file_name)
            number = int(match[1]) if match else 0
            if not 1 <= number <= len(devkit.truth):
                expected = f"ILSVRC2012_val_00000001.JPEG to {len(devkit.truth):08d}"
                raise BeitJaxError(f"{printable(path)}: expected {expected}, found {printable(file_name)}")
            count += 1
            yield {"image": data, "label": devkit.truth[number - 1], "file_name": file_name}
    if count != len(devkit.truth):
        raise BeitJaxError(f"{printable(path)}: {count} images, expected {len(devkit.truth)}; fetch it again")


def _files(tar: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for member in _members(tar):
        name = Path(member.name).name
        file = tar.extractfile(member) if wanted(name) else None
        if file is not None:  # a folder
            yield name, file.read()


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All of them. tarfile stops without a word at a damaged header and at the end of a file that is cut off there;
    archives end with two blocks of zeros, of which it has read one."""
    yield from tar
    if tar.fileobj is None or tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("damaged header, or cut off")


@contextmanager
def _archive(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise BeitJaxError(
            f"{printable(path)}: damaged or incomplete archive ({printable(error)}); fetch it again"
        ) from error
