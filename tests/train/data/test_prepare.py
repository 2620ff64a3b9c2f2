"""Data sets as they are written: read back by TFDS itself, against what the source holds."""

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from scipy import stats
from scipy.io import savemat

from beit_jax.errors import BeitJaxError
from beit_jax.train.data import imagenet, shards
from beit_jax.train.data.imagenet import DEVKIT, META, TRAIN_TAR, TRUTH, VALIDATION_TAR, WHOLE_TAR
from beit_jax.train.data.prepare import (
    Prepared,
    prepare,
    prepare_ade20k,
    prepare_digits,
    prepare_folder,
    prepare_images,
)
from beit_jax.train.data.shards import ShardWriter

AS_STORED = {"image": tfds.decode.SkipDecoding()}


def picture(kind: str = "PNG", mode: str = "RGB", value: int = 0, size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def records(directory: Path, split: str, decoders: Any = AS_STORED) -> list[dict[str, Any]]:
    """Records as TFDS reads them, without code of this project."""
    return list(tfds.builder_from_directory(directory).as_data_source(split, decoders=decoders))


def named(directory: Path, split: str) -> dict[str, tuple[bytes, int]]:
    return {record["file_name"].decode(): (record["image"], record["label"]) for record in records(directory, split)}


def tree(root: Path, content: Mapping[str, bytes]) -> Path:
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar(content: Mapping[str, bytes], mode: Any = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# Digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare_digits(tmp_path_factory.mktemp("digits") / "data")


def test_digits_are_split_as_the_embedded_checkpoint_was_trained(digits: Prepared) -> None:
    embedded = files("beit_jax") / "digits"
    expected = json.loads((embedded / "expected.json").read_text())
    assert digits.splits == {"train": expected["training_size"], "validation": expected["held_out_size"]}
    assert digits.labels == tuple("zero one two three four five six seven eight nine".split())

    # The package holds the first five of every class in the held-out split's own order.
    found: dict[int, list[np.ndarray]] = {label: [] for label in range(10)}
    for record in records(digits.directory, "validation"):
        found[record["label"]].append(np.asarray(Image.open(io.BytesIO(record["image"]))))
    for name, entry in expected["images"].items():
        image = np.asarray(Image.open(io.BytesIO((embedded / "images" / name).read_bytes())))
        np.testing.assert_array_equal(found[entry["label"]].pop(0), image)


def test_digits_are_all_there_once(digits: Prepared) -> None:
    train, validation = (named(digits.directory, split) for split in ("train", "validation"))
    assert not set(train) & set(validation)
    assert sorted(train | validation) == [f"digit_{index:04d}.png" for index in range(1797)]


def test_tfds_decodes_digits_without_tensorflow(digits: Prepared) -> None:
    record = records(digits.directory, "train[:1]", decoders=None)[0]
    assert record["image"].shape == (8, 8, 3) and record["image"].max() == 255


# Folders


def test_split_folders(tmp_path: Path) -> None:
    content = {
        "train/cat/a.png": picture(value=1),
        "train/cat/deep/er/b.jpg": picture("JPEG", value=2),
        "train/ant/c.PNG": picture(value=3),
        "train/ant/readme.txt": b"no image",
        "train/ant/.hidden.png": b"no image",
        "train/ant/.thumbnails/c.png": b"no image",
        "val/cat/d.webp": picture("WEBP", value=4),
        "test/ant/e.png": picture(value=5),
    }
    source = tree(tmp_path / "tree", content)
    with pytest.raises(BeitJaxError, match="val is the validation split"):
        prepare_folder(source, tmp_path / "data", held_out=0.5)
    done = prepare_folder(source, tmp_path / "data")
    assert done == Prepared(tmp_path / "data", {"test": 1, "train": 3, "validation": 1}, ("ant", "cat"))
    for split, names in {
        "train": {"train/cat/a.png": 1, "train/cat/deep/er/b.jpg": 1, "train/ant/c.PNG": 0},
        "validation": {"val/cat/d.webp": 1},
        "test": {"test/ant/e.png": 0},
    }.items():
        assert named(done.directory, split) == {name: (content[name], label) for name, label in names.items()}


def test_held_out_share_follows_from_names_alone(tmp_path: Path) -> None:
    content = {f"{name}/{i}.png": picture(value=i) for name in ("train", "car", "plane") for i in range(20)}
    forwards = prepare_folder(tree(tmp_path / "a", content), tmp_path / "1", held_out=0.25)
    backwards = prepare_folder(tree(tmp_path / "b", dict(reversed(content.items()))), tmp_path / "2", held_out=0.25)
    assert forwards.splits == {"train": 45, "validation": 15} and forwards.labels == ("car", "plane", "train")
    train, validation = (named(forwards.directory, split) for split in ("train", "validation"))
    assert set(train) | set(validation) == set(content) and not set(train) & set(validation)
    assert [sum(label == number for _, label in validation.values()) for number in range(3)] == [5, 5, 5]
    assert named(backwards.directory, "train") == train
    assert {Path(name).stem for name in validation if "car" in name} != {str(i) for i in range(5)}
    assert prepare_folder(tmp_path / "a", tmp_path / "3", held_out=0).splits == {"train": 60}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"readme.txt": b""}, "expected a folder per class, found none"),
        ({"cat/a.png": b"", "dog/readme.txt": b""}, r"dog: the folder of a class without images"),
        ({"train/cat/a.png": b"", "val/dog/a.png": b""}, r"val/dog: a class that training does not have"),
        ({"train/cat/a.png": b"", "val/cat/a.png": b"", "validation/cat/a.png": b""}, "found both"),
        ({"a\nb/a.png": b""}, r"a\\nb: a class needs a printable name"),
        ({"cat/a.png": b"", "dog/b.png": b""}, "none can be held out"),
    ],
)
def test_folders_that_make_no_data_set(content: Mapping[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=message):
        prepare_folder(tree(tmp_path / "tree", content), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match="expected a folder, found nothing"):
        prepare_folder(tmp_path / "none", tmp_path / "data")
    with pytest.raises(BeitJaxError, match="held-out share"):
        prepare_folder(tmp_path, tmp_path / "data", held_out=1.0)


# Images without labels


def test_images_need_no_folders_and_no_labels(tmp_path: Path) -> None:
    content = {
        "a.png": picture(value=1),
        "deep/er/b.JPG": picture("JPEG", value=2),
        "deep/c.webp": picture("WEBP", value=3),
        "train/cat/d.png": picture(value=4),  # no split, no class
        "val/cat/e.png": picture(value=5),
        "deep/readme.txt": b"no image",
        ".git/f.png": b"no image",
        "deep/.g.png": b"no image",
    }
    done = prepare_images(tree(tmp_path / "tree", content), tmp_path / "data")
    assert done == Prepared(tmp_path / "data", {"train": 5}, ("unlabelled",))
    assert named(done.directory, "train") == {name: (content[name], 0) for name in list(content)[:5]}
    assert tfds.builder_from_directory(done.directory).info.features["label"].names == ["unlabelled"]


def test_the_held_out_share_of_images_follows_from_names_alone(tmp_path: Path) -> None:
    content = {f"{i % 3}/{i}.png": picture(value=i) for i in range(40)}
    forwards = prepare_images(tree(tmp_path / "a", content), tmp_path / "1", held_out=0.2)
    backwards = prepare_images(tree(tmp_path / "b", dict(reversed(content.items()))), tmp_path / "2", held_out=0.2)
    assert forwards.splits == {"train": 32, "validation": 8}
    train, validation = (named(forwards.directory, split) for split in ("train", "validation"))
    assert set(train) | set(validation) == set(content) and not set(train) & set(validation)
    assert named(backwards.directory, "validation") == validation
    labelled = prepare_folder(tree(tmp_path / "c/only", content).parent, tmp_path / "3", held_out=0.2)
    assert len(named(labelled.directory, "validation")) == 8


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")  # Latin-1, as old archives have it
    done = prepare_images(tree(tmp_path / "tree", {name: picture(), "café.png": picture()}), tmp_path / "data")
    assert set(named(done.directory, "train")) == {r"caf\xe9.png", "café.png"}


@pytest.mark.parametrize(
    ("content", "held_out", "message"),
    [
        ({"readme.txt": b""}, 0.0, r"tree: expected images \(.apng, .avif, .*\), found none"),
        ({"a.png": b""}, 1.0, r"held-out share: expected a number in \[0, 1\), found 1.0"),
        ({"a.png": b""}, 0.5, "none can be held out"),
        ({"a.png": b"no image"}, 0.0, "1 of 1 examples cannot be used, the first: a.png"),
    ],
)
def test_images_that_make_no_data_set(
    content: Mapping[str, bytes], held_out: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BeitJaxError, match=message):
        prepare_images(tree(tmp_path / "tree", content), tmp_path / "data", held_out=held_out)
    with pytest.raises(BeitJaxError, match="none: expected a folder, found nothing"):
        prepare_images(tmp_path / "none", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


# ImageNet

# ILSVRC's own numbers do not follow the order of WordNet ids, which is that of labels.
NUMBERS = {1: "n03000000", 2: "n01000000", 3: "n02000000"}
TRUTH_NUMBERS = (3, 1, 2, 2, 1)


def devkit() -> dict[str, bytes]:
    rows = [(number, name, f"words {number}", "gloss", 0, [], 0, 4) for number, name in NUMBERS.items()]
    rows.append((4, "n00000001", "entity", "a parent of the others", 3, [1, 2, 3], 1, 0))
    names = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images".split()
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in names])
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return {META: buffer.getvalue(), TRUTH: "".join(f"{number}\n" for number in TRUTH_NUMBERS).encode()}


def training_images() -> dict[str, dict[str, bytes]]:
    images = {
        name: {f"{name}_{i}.JPEG": picture("JPEG", value=20 * place + i) for i in range(4)}
        for place, name in enumerate(NUMBERS.values())
    }
    images["n02000000"]["n02000000_0.JPEG"] = picture("JPEG", mode="CMYK")  # the real one has 22 of these
    images["n01000000"]["n01000000_1.JPEG"] = picture("PNG")  # and one of these
    return images


def validation_images() -> dict[str, bytes]:
    images = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": picture("JPEG", value=100 + i) for i in range(len(TRUTH_NUMBERS))}
    return dict(reversed(images.items()))  # the archive's order says nothing


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    content = {
        TRAIN_TAR: tar({f"{name}.tar": tar(images) for name, images in training_images().items()}),
        VALIDATION_TAR: tar(validation_images()),
        f"{DEVKIT}.tar.gz": tar({f"{DEVKIT}/data/{name}": data for name, data in devkit().items()}, "w:gz"),
    }
    return tree(tmp_path / "archives", content)


def test_imagenet(archives: Path, tmp_path: Path) -> None:
    done = prepare("imagenet", archives, tmp_path / "data")
    assert done.labels == ("n01000000", "n02000000", "n03000000")
    assert done.splits == {"train": 12, "validation": 5}
    assert named(done.directory, "train") == {
        file_name: (data, done.labels.index(name))
        for name, images in training_images().items()
        for file_name, data in images.items()
    }
    truth = {f"ILSVRC2012_val_{i:08d}.JPEG": NUMBERS[number] for i, number in enumerate(TRUTH_NUMBERS, start=1)}
    assert named(done.directory, "validation") == {
        file_name: (data, done.labels.index(truth[file_name])) for file_name, data in validation_images().items()
    }
    assert tfds.builder_from_directory(done.directory).info.features["label"].names == list(done.labels)


@pytest.mark.parametrize(("absent", "splits"), [(TRAIN_TAR, {"validation": 5}), (VALIDATION_TAR, {"train": 12})])
def test_one_archive_of_imagenet_is_enough(absent: str, splits: dict[str, int], archives: Path, tmp_path: Path) -> None:
    (archives / absent).unlink()
    assert prepare("imagenet", archives, tmp_path / "data").splits == splits


@pytest.mark.parametrize("place", ["", f"{DEVKIT}/data"])
def test_the_devkit_may_be_unpacked(place: str, archives: Path, tmp_path: Path) -> None:
    (archives / f"{DEVKIT}.tar.gz").unlink()
    tree(archives / place, devkit())
    assert prepare("imagenet", archives, tmp_path / "data").splits == {"train": 12, "validation": 5}


def without(names: Mapping[str, bytes], *absent: str) -> dict[str, bytes]:
    return {name: data for name, data in names.items() if name not in absent}


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def retar(name: str, change: Callable[[dict[str, bytes]], Mapping[str, bytes]]) -> Callable[[Path], None]:
    def damage(archives: Path) -> None:
        with tarfile.open(archives / name) as archive:
            content = {member.name: archive.extractfile(member).read() for member in archive}
        (archives / name).write_bytes(tar(change(content), "w:gz" if name.endswith("gz") else "w"))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: (at / f"{DEVKIT}.tar.gz").unlink(), rf"{DEVKIT}.tar.gz: no such file; it holds the labels"),
        (lambda at: cut(at / f"{DEVKIT}.tar.gz", 200), rf"{DEVKIT}.tar.gz: damaged or incomplete archive"),
        (retar(f"{DEVKIT}.tar.gz", lambda c: without(c, f"{DEVKIT}/data/{META}")), f"holds no {DEVKIT}/data/{META}"),
        (
            retar(f"{DEVKIT}.tar.gz", lambda c: c | {f"{DEVKIT}/data/{META}": b"no MATLAB file"}),
            f"{META} is not that of ILSVRC 2012",
        ),
        (
            retar(f"{DEVKIT}.tar.gz", lambda c: c | {f"{DEVKIT}/data/{TRUTH}": b"1\n4\n"}),
            "line 2: expected a class from 1 to 3, found 4",
        ),
        (lambda at: [(at / name).unlink() for name in (TRAIN_TAR, VALIDATION_TAR)], "found neither"),
        (lambda at: cut(at / TRAIN_TAR, 20_000), f"{TRAIN_TAR}: damaged or incomplete archive"),
        (retar(TRAIN_TAR, lambda c: without(c, "n01000000.tar")), "2 of 3 classes, n01000000 is missing"),
        (retar(TRAIN_TAR, lambda c: c | {"dogs.tar": b""}), f"expected a tar per class of {META}, found dogs.tar"),
        (retar(TRAIN_TAR, lambda c: c | {"n01000000.tar": b"no tar" * 200}), f"{TRAIN_TAR}: damaged"),
        (retar(TRAIN_TAR, lambda c: c | {"n01000000.tar": c["n01000000.tar"][:2000]}), f"{TRAIN_TAR}: damaged"),
        (
            retar(VALIDATION_TAR, lambda c: without(c, "ILSVRC2012_val_00000002.JPEG")),
            f"{VALIDATION_TAR}: 4 images, expected 5",
        ),
        (retar(VALIDATION_TAR, lambda c: c | {"x.JPEG": b""}), "to 00000005, found x.JPEG"),
    ],
)
def test_damaged_archives_leave_nothing(
    damage: Callable[[Path], Any], message: str, archives: Path, tmp_path: Path
) -> None:
    damage(archives)
    with pytest.raises(BeitJaxError, match=message) as caught:
        prepare("imagenet", archives, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archives"]


# ImageNet-22k


def synsets() -> dict[str, dict[str, bytes]]:
    """Three classes, not in the order of their numbers."""
    return {
        name: {f"{name}_{i}.JPEG": picture("JPEG", value=80 * place + i) for i in range(count)}
        for place, (name, count) in enumerate({"n03000000": 60, "n00004475": 50, "n01000000": 40}.items())
    }


def class_tars() -> dict[str, bytes]:
    return {f"{name}.tar": tar(content) for name, content in synsets().items()}


SYNSETS = ("n00004475", "n01000000", "n03000000")


def expected_images() -> dict[str, tuple[bytes, int]]:
    return {
        f"{name}/{file_name}": (data, SYNSETS.index(name))
        for name, content in synsets().items()
        for file_name, data in content.items()
    }


def whole_in(root: Path, name: str = WHOLE_TAR, mode: str = "w") -> Path:
    """The tars in a tar, below a folder, which the archive lists too."""
    tree(root / "content/whole", class_tars())
    with tarfile.open(root / name, mode) as archive:  # type: ignore[call-overload]
        archive.add(root / "content", "release")
    return root


@pytest.mark.parametrize("form", ["tars", "whole", "file", "compressed"])
def test_imagenet22k(form: str, tmp_path: Path) -> None:
    if form == "tars":
        source = tree(tmp_path / "source", class_tars() | {"words.txt": b"", "ILSVRC.tar": b"", "n1.tar": b""})
    elif form == "whole":
        source = whole_in(tmp_path)
    elif form == "file":
        source = whole_in(tmp_path, "other.tar") / "other.tar"
    else:
        source = whole_in(tmp_path, "winter21_whole.tar.gz", "w:gz") / "winter21_whole.tar.gz"
    done = prepare("imagenet22k", source, tmp_path / "data")
    assert done == Prepared(tmp_path / "data", {"train": 150}, SYNSETS)
    assert named(done.directory, "train") == expected_images()
    if form == "tars":
        assert list(named(done.directory, "train")) == [
            f"{name}/{file_name}" for name in SYNSETS for file_name in synsets()[name]
        ]


def test_the_held_out_share_of_imagenet22k_follows_from_names_alone(tmp_path: Path) -> None:
    found = []
    for number, source in enumerate((tree(tmp_path / "tars", class_tars()), whole_in(tmp_path))):
        done = prepare("imagenet22k", source, tmp_path / f"{number}", held_out=0.3)
        found.append([named(done.directory, split) for split in ("train", "validation")])
    assert found[0] == found[1]
    train, validation = found[0]
    assert not set(train) & set(validation) and train | validation == expected_images()
    assert stats.binomtest(len(validation), 150, 0.3).pvalue > 1e-3
    assert {label for _, label in validation.values()} == {0, 1, 2}
    more = prepare("imagenet22k", tmp_path / "tars", tmp_path / "2", held_out=0.6)
    assert set(named(more.directory, "validation")) > set(validation)


def test_the_number_of_images_of_imagenet22k_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "BYTES_PER_IMAGE", 500)
    totals: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield lambda done: None

    sources = [tree(tmp_path / "tars", class_tars()), whole_in(tmp_path)]
    for number, source in enumerate(sources):
        prepare("imagenet22k", source, tmp_path / f"{number}", progress, held_out=0.25)
    nbytes = [sum(path.stat().st_size for path in sources[0].iterdir()), (tmp_path / WHOLE_TAR).stat().st_size]
    assert min(totals) > 400 and totals == pytest.approx([count / 500 for count in nbytes], abs=2)


def cut_at(size: int) -> dict[str, bytes]:
    return class_tars() | {"n01000000.tar": class_tars()["n01000000.tar"][:size]}


def overwritten_at(start: int) -> dict[str, bytes]:
    data = class_tars()["n01000000.tar"]
    return class_tars() | {"n01000000.tar": data[:start] + b"\xff" * 512 + data[start + 512 :]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, rf"source: expected a tar per class such as n00004475.tar, or {WHOLE_TAR}, found neither"),
        ({WHOLE_TAR: tar({})}, f"{WHOLE_TAR}: expected a tar per class such as n00004475.tar, found none"),
        ({WHOLE_TAR: tar({"dogs.tar": b""} | class_tars())}, f"{WHOLE_TAR}: expected .* n00004475.tar, found dogs.tar"),
        ({WHOLE_TAR: tar(class_tars())[:-200_000]}, f"{WHOLE_TAR}: damaged or incomplete archive"),
        ({WHOLE_TAR: tar(class_tars() | {"n02000000.tar": b"no tar" * 200})}, f"{WHOLE_TAR}: damaged or incomplete"),
        (class_tars() | {"n02000000.tar": b"no tar" * 200}, r"source/n02000000\.tar: damaged or incomplete archive"),
        (cut_at(20_300), r"n01000000\.tar: damaged or incomplete archive"),  # within a picture
        (cut_at(20_000), r"n01000000\.tar: damaged or incomplete archive"),  # within a header
        (cut_at(19_968), r"n01000000\.tar: damaged or incomplete archive"),  # before a header
        (overwritten_at(19_968), r"n01000000\.tar: damaged or incomplete archive"),
        (class_tars() | {"n02000000.tar": tar({"x.JPEG": b"no image"})}, "1 of 151 examples .*: n02000000/x.JPEG: "),
    ],
)  # fmt: skip
def test_damaged_archives_of_imagenet22k_leave_nothing(
    content: Mapping[str, bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(BeitJaxError, match=message) as caught:
        prepare("imagenet22k", tree(tmp_path / "source", content), tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_imagenet22k_arguments(tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"none: expected a tar per class .*, found neither"):
        prepare("imagenet22k", tmp_path / "none", tmp_path / "data")
    with pytest.raises(BeitJaxError, match=r"held-out share: expected a number in \[0, 1\), found -0.1"):
        prepare("imagenet22k", tree(tmp_path / "tars", class_tars()), tmp_path / "data", held_out=-0.1)


# ADE20K


def segmentation(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    content = {}
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            values = np.arange(30, dtype=np.uint8).reshape(5, 6) * 5 + i
            content[f"images/{part}/ADE_{i}.jpg"] = picture("JPEG", value=i)
            content[f"annotations/{part}/ADE_{i}.png"] = segmentation(values)
    return tree(tmp_path / "ADEChallengeData2016", content)


def test_ade20k(scenes: Path, tmp_path: Path) -> None:
    done = prepare_ade20k(scenes, tmp_path / "data")
    assert done.splits == {"train": 3, "validation": 2} and done.labels == ()
    for split, part in (("train", "training"), ("validation", "validation")):
        decoders = AS_STORED | {"segmentation": tfds.decode.SkipDecoding()}
        for i, record in enumerate(records(done.directory, split, decoders)):
            assert record["file_name"].decode() == f"{part}/ADE_{i}.jpg"
            assert record["image"] == (scenes / "images" / part / f"ADE_{i}.jpg").read_bytes()
            assert record["segmentation"] == (scenes / "annotations" / part / f"ADE_{i}.png").read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((5, 6), 151, np.uint8), "label 151 at row 0, column 0, expected 0 .none. to 150; 30 such pixels"),
        (np.zeros((6, 5), np.uint8), "5x6 pixels, expected 6x5 as its image"),
        (np.zeros((5, 6, 3), np.uint8), "mode RGB holds colours"),
    ],
)
def test_segmentations_that_cannot_be(values: np.ndarray, message: str, scenes: Path, tmp_path: Path) -> None:
    (scenes / "annotations/training/ADE_1.png").write_bytes(segmentation(values))
    with pytest.raises(BeitJaxError, match=rf"1 of 5 examples .*annotations/training/ADE_1.png: {message}"):
        prepare_ade20k(scenes, tmp_path / "data")


def test_ade20k_needs_every_annotation(scenes: Path, tmp_path: Path) -> None:
    (scenes / "annotations/training/ADE_1.png").unlink()
    with pytest.raises(BeitJaxError, match=r"annotations/training/ADE_1.png: no such file.* ADE_1.jpg"):
        prepare_ade20k(scenes, tmp_path / "data")
    with pytest.raises(BeitJaxError, match="images/training: no such folder"):
        prepare_ade20k(tmp_path, tmp_path / "data")


# Writing


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return tree(tmp_path / "pets", {f"{name}/{i}.png": picture(value=i) for name in ("cat", "dog") for i in range(50)})


def test_shards_are_numbered_and_hold_the_records_in_order(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    done = prepare_folder(pets, tmp_path / "data", held_out=0)
    names = sorted(path.name for path in done.directory.glob("*array_record*"))
    assert len(names) > 3
    assert names == [f"image_folder-train.array_record-{i:05d}-of-{len(names):05d}" for i in range(len(names))]
    expected = sorted(path.relative_to(pets).as_posix() for path in pets.rglob("*.png"))
    assert list(named(done.directory, "train")) == expected


def test_progress_counts_every_example(pets: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: seen.append(done)
        assert sum(seen) == total == 100

    (pets / "cat/3.png").write_bytes(b"no image")
    prepare_folder(pets, tmp_path / "data", progress, skip_bad=True)
    assert len(seen) == 100


def test_unusable_examples_are_counted_and_named(pets: Path, tmp_path: Path) -> None:
    (pets / "cat/3.png").write_bytes(b"no image")
    (pets / "dog/4.png").write_bytes((pets / "dog/4.png").read_bytes()[:45])
    with pytest.raises(BeitJaxError, match=r"2 of 100 examples cannot be used, the first: cat/3.png: .*--skip-bad"):
        prepare_folder(pets, tmp_path / "data", held_out=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets"]

    done = prepare_folder(pets, tmp_path / "data", held_out=0, skip_bad=True)
    assert done.splits == {"train": 98}
    assert [re.split(": ", line)[0] for line in done.left_out] == ["cat/3.png", "dog/4.png"]
    assert not {"cat/3.png", "dog/4.png"} & set(named(done.directory, "train"))


def test_nothing_usable_is_no_data_set(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree", {"cat/a.png": b"no image"})
    with pytest.raises(BeitJaxError, match="the split train has no examples"):
        prepare_folder(source, tmp_path / "data", held_out=0, skip_bad=True)
    assert not (tmp_path / "data").exists()


def test_only_data_sets_are_replaced(pets: Path, tmp_path: Path) -> None:
    done = prepare_folder(pets, tmp_path / "data", held_out=0)
    with pytest.raises(BeitJaxError, match="already exists"):
        prepare_folder(pets, tmp_path / "data")
    assert prepare_folder(pets, tmp_path / "data", held_out=0.5, overwrite=True).splits != done.splits
    with pytest.raises(BeitJaxError, match="holds no data set"):
        prepare_folder(pets, pets, overwrite=True)
    assert len(list(pets.rglob("*.png"))) == 100


def test_what_reads_back_otherwise_is_not_kept(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardWriter, "name", lose_the_end_of_a_shard(ShardWriter.name))
    with pytest.raises(BeitJaxError, match="expected 100 records, found none: cut off"):
        prepare_folder(pets, tmp_path / "data", held_out=0)
    assert not (tmp_path / "data").exists()


def lose_the_end_of_a_shard(name: Callable[[Any], None]) -> Callable[[Any], None]:
    def wrapped(shards: Any) -> None:
        name(shards)
        (written,) = Path(shards.template.data_dir).glob("*array_record*")
        cut(written, written.stat().st_size // 2)

    return wrapped
