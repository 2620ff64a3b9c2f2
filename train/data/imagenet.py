"""ImageNet-1k and ImageNet-22k as data sets to prepare, from the archives of image-net.org."""

import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from beit_jax.errors import BeitJaxError, printable

from .sources import Example, Source, Split, check_share, classification_features, name_hash, read_bytes, utf8

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, META, TRUTH = "ILSVRC2012_devkit_t12", "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
WHOLE_TAR: Final = "fall11_whole.tar"
BYTES_PER_IMAGE: Final = 92_000  # ImageNet-22k: 1.31 TB in 14,197,122 images
_CLASS_TAR: Final = re.compile(r"n\d{8}\.tar")


def imagenet(source: Path) -> Source:
    """ImageNet-1k (ILSVRC 2012) from the archives of image-net.org, which are read in place and not unpacked.

    - ILSVRC2012_img_train.tar holds a tar per class and becomes "train"; ILSVRC2012_img_val.tar becomes "validation".
      One of the two is enough.
    - ILSVRC2012_devkit_t12.tar.gz is always needed, packed or unpacked. Its ``data/meta.mat`` lists the classes, and
      its ``data/ILSVRC2012_validation_ground_truth.txt`` has the class of every validation image. The text alone is not
      enough: it numbers classes as meta.mat does, and models number them in another order.

    Labels are the 1000 WordNet ids ("n01440764" ...) in sorted order, which is the order of every model's logits.

    Raises:
        BeitJaxError: a file is missing, is no archive, or does not fit the others.
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


def imagenet22k(source: Path, held_out: float = 0.0) -> Source:
    """ImageNet-22k, the whole of ImageNet, from image-net.org's archives, which are read in place and not unpacked.

    `source` is a folder with a tar per class (n00004475.tar ...), a folder with fall11_whole.tar, which is a tar of
    such tars, or a tar of such tars. Other files in a folder are ignored. Labels are the WordNet ids in sorted order;
    images are named n00004475/n00004475_6590.JPEG.

    Reading the archives takes hours, so they are not listed first. The number of images is therefore an estimate, and
    whether an image is held out follows from its name alone. The archives are read once for each split.

    Args:
        held_out: the share of images that becomes the split "validation", about. 0: there is no such split.

    Raises:
        BeitJaxError: no such file or folder, no archives, or an archive that is damaged or holds something else.
    """
    check_share(held_out)
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
            yield {"image": data, "label": number, "file_name": utf8(f"{labels[number]}/{file_name}")}

    def is_held(file_name: str) -> bool:
        return name_hash(file_name) < held_out * 2**64

    count = max(1, nbytes // BYTES_PER_IMAGE)
    splits = {"train": Split(round(count * (1 - held_out)), examples(lambda file_name: not is_held(file_name)))}
    if held_out > 0:
        splits["validation"] = Split(round(count * held_out), examples(is_held))
    features = classification_features(labels)
    return Source("imagenet22k", "ImageNet-22k: https://image-net.org", labels, features, splits, nbytes)


@dataclass(frozen=True)
class _Devkit:
    """The development kit.

    Attributes:
        labels: WordNet ids, sorted.
        truth: at i, the class of validation image i + 1 as an index into `labels`.
    """

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
    except Exception as error:  # SciPy's reader raises whatever its parsing meets
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
            return read_bytes(root / META), read_bytes(root / TRUTH).decode("ascii", "replace"), printable(root)
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
    """Reads an archive of a tar per class: the number of the class, the name and the content of each wanted file."""
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
    """Reads separate tars, one per class; yields the same as `_nested`."""
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
        if file is not None:  # None for a folder
            yield name, file.read()


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All members of an archive, with a check that the archive is complete.

    tarfile stops silently at a damaged header, and where a file is cut off between members. A complete archive ends
    with two blocks of zeros. tarfile has read the first of them.

    Raises:
        tarfile.ReadError: the second block of zeros is missing.
    """
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
