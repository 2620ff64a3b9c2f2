"""Data sets of somebody's images and masks: pairs, splits, what is stored, and every mistake in one line."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.train.data.datasets import open_segmentation
from beit_jax.train.data.masks import MaskFiles
from beit_jax.train.data.prepare import Prepared, prepare_segmentation
from tests.support.scenes import scene, write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes of three classes in ``images`` and ``masks``, and the names of the classes."""
    root = write_scenes(tmp_path_factory.mktemp("scenes"), range(10), sides=(12, 20))
    (root / "names.txt").write_text("ground\nberry\nleaf\n")
    return root


def prepared(root: Path, dest: Path, **options: Any) -> Prepared:
    files = {name: options.pop(name) for name in list(options) if name in MaskFiles.__dataclass_fields__}
    return prepare_segmentation(root / "images", root / "masks", dest, MaskFiles(**files), **options)


def truth(number: int) -> np.ndarray:
    return scene(number, sides=(12, 20))[1]


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(word) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_what_is_stored(scenes: Path, tmp_path: Path) -> None:
    done = prepared(scenes, tmp_path / "data", labels=scenes / "names.txt")
    assert done.labels == ("ground", "berry", "leaf") and done.splits == {"train": 9, "validation": 1}
    seen, counts = set(), dict.fromkeys(("train", "validation"), np.zeros(3, int))
    for split in done.splits:
        images = open_segmentation(done.directory, split)
        assert images.labels == done.labels and images.do_reduce_labels is False and not images.reduced
        for index in range(len(images)):
            name = images[index]["file_name"]
            assert images[index]["image"] == (scenes / "images" / name).read_bytes()
            picture, labels = images.load(index)
            assert labels.dtype == np.uint8 and picture.shape[:2] == labels.shape
            assert np.array_equal(labels, truth(int(Path(name).stem)))
            counts[split] = counts[split] + np.bincount(labels.ravel(), minlength=3)
            seen.add(name)
        assert images.pixels == tuple(counts[split]) and np.array_equal(images.count_pixels(), counts[split])
    assert len(seen) == 10


def test_tfds_reads_names_and_numbers(scenes: Path, tmp_path: Path) -> None:
    done = prepared(scenes, tmp_path / "data", labels=scenes / "names.txt")
    builder = tfds.builder_from_directory(done.directory)
    assert builder.info.features["segmentation"].names == ["ground", "berry", "leaf"]
    first = builder.as_data_source("train")[0]
    assert np.array_equal(first["segmentation"][..., 0], truth(int(Path(first["file_name"].decode()).stem)))


def test_the_held_out_images_are_the_same_ones_every_time(scenes: Path, tmp_path: Path) -> None:
    def held(dest: str, root: Path) -> set[str]:
        images = open_segmentation(prepared(root, tmp_path / dest, held_out=0.3).directory, "validation")
        return {images[index]["file_name"] for index in range(len(images))}

    moved = Path(shutil.copytree(scenes, tmp_path / "elsewhere"))
    assert held("a", scenes) == held("b", moved) and len(held("c", scenes)) == 3
    assert prepared(scenes, tmp_path / "d", held_out=0.0).splits == {"train": 10}


def test_splits_of_both_trees(tmp_path: Path) -> None:
    for split, seeds in (("training", range(3)), ("val", range(3, 5)), ("test", range(5, 6))):
        write_scenes(tmp_path, seeds, split=split, sides=(12, 20))
    (tmp_path / "masks" / "val").rename(tmp_path / "masks" / "validation")
    assert prepared(tmp_path, tmp_path / "data").splits == {"train": 3, "validation": 2, "test": 1}
    with pytest.raises(BeitJaxError, match=r"--held-out 0.1: .*val is the validation split; leave the option out"):
        prepared(tmp_path, tmp_path / "more", held_out=0.1)
    (tmp_path / "images" / "extra").mkdir()
    shutil.copy(tmp_path / "images" / "val" / "003.jpg", tmp_path / "images" / "extra" / "009.jpg")
    shutil.copy(tmp_path / "masks" / "validation" / "003.png", tmp_path / "masks" / "test" / "009.png")
    with pytest.raises(BeitJaxError, match=r"009.jpg: lies in none of the splits' folders, test, training, val; move"):
        prepared(tmp_path, tmp_path / "more")


@pytest.mark.parametrize("together", [False, True])
def test_ends_of_names(scenes: Path, tmp_path: Path, together: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """As Cityscapes names them, which also has pictures of the masks in colours."""
    images, masks = tmp_path / "images", tmp_path / ("images" if together else "masks")
    images.mkdir(), masks.mkdir(exist_ok=True)
    for number in range(10):
        shutil.copy(scenes / "images" / f"{number:03}.jpg", images / f"a_{number:03}_left.jpg")
        shutil.copy(scenes / "masks" / f"{number:03}.png", masks / f"a_{number:03}_ids.png")
        Image.new("RGB", (9, 9), (200, 0, 1)).save(masks / f"a_{number:03}_color.png")
    ends = ["--image-suffix", "_left", "--mask-suffix", "_ids"]
    assert main(["prepare", "segmentation", str(images), str(masks), str(tmp_path / "data"), *ends, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {"train": 9, "validation": 1}
    message = error(capsys, "prepare", "segmentation", images, masks, tmp_path / "more", *ends[2:])
    assert "no mask of this name" in message


def test_the_end_of_masks_names_is_suggested(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "s")
    for path in sorted((tmp_path / "s" / "masks").iterdir()):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    with pytest.raises(BeitJaxError, match="if 000_mask is its mask, pass --mask-suffix=_mask"):
        prepared(tmp_path / "s", tmp_path / "data")
    assert prepared(tmp_path / "s", tmp_path / "data", mask_suffix="_mask").splits["train"] == 9


def test_images_and_masks_without_a_partner(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "s")
    (tmp_path / "s" / "masks" / "004.png").unlink()
    with pytest.raises(BeitJaxError, match=r"004.jpg: no mask of this name below .*; 1 of 10 .*--only-annotated"):
        prepared(tmp_path / "s", tmp_path / "data")
    (tmp_path / "s" / "images" / "005.jpg").unlink()
    done = prepared(tmp_path / "s", tmp_path / "data", only_annotated=True)
    assert sum(done.splits.values()) == 8
    assert [note.partition(",")[0] for note in done.notes] == [
        "1 images have no mask and are left out",
        "1 masks have no image and are left out",
    ]


def test_the_background_may_be_no_class(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("berry\nleaf")
    done = prepared(scenes, tmp_path / "data", labels=tmp_path / "names.txt", from_one=True)
    images = open_segmentation(done.directory, "train")
    assert images.do_reduce_labels is True and images.labels == ("berry", "leaf")
    for index in range(len(images)):
        stored = truth(int(Path(images[index]["file_name"]).stem)).astype(int)
        assert np.array_equal(images.load(index)[1], np.where(stored == 0, 255, stored - 1))


def test_300_classes_in_16_bits(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    stored = np.array([[0, 255], [299, 65535]], np.uint16)
    for number in range(2):
        Image.new("RGB", (2, 2)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(stored).save(tmp_path / "masks" / f"{number}.png")
    (tmp_path / "names.json").write_text(json.dumps([f"class {i}" for i in range(300)]))
    done = prepared(tmp_path, tmp_path / "data", labels=tmp_path / "names.json", ignore=("65535",))
    assert done.notes[-1].startswith("no pixel of the split train is of class 1, class 2, class 3 and 294 more")
    images = open_segmentation(done.directory, "train")
    assert images.no_class == 65535 and images.load(0)[1].tolist() == stored.tolist()


@pytest.mark.parametrize("kind", ["0 and 255", "booleans", "JPEG", "arrays"])
def test_masks_of_two_classes(kind: str, tmp_path: Path) -> None:
    write_scenes(tmp_path, range(6), classes=2, sides=(16, 24))
    for number in range(6):
        path, drawn = tmp_path / "masks" / f"{number:03}.png", scene(number, 2, (16, 24))[1] > 0
        path.unlink()
        if kind == "arrays":
            np.save(path.with_suffix(".npy"), drawn)
        elif kind == "JPEG":
            Image.fromarray((drawn * 255).astype(np.uint8)).save(path.with_suffix(".jpg"), quality=95)
        else:
            Image.fromarray((drawn * 255).astype(np.uint8) if kind == "0 and 255" else drawn).save(path)
    if kind == "0 and 255":
        (tmp_path / "names.txt").write_text("back\nfront")
        with pytest.raises(BeitJaxError, match=r"every labelled pixel .* is back, .*255 is no class: pass --binary"):
            prepared(tmp_path, tmp_path / "data", labels=tmp_path / "names.txt")
    if kind == "JPEG":
        with pytest.raises(BeitJaxError, match=r"no masks .*JPEG smears class numbers: with two classes pass --binary"):
            prepared(tmp_path, tmp_path / "data")
    done = prepared(tmp_path, tmp_path / "data", binary=True)
    assert done.labels == ("background", "foreground") and not (tmp_path / "data.partial").exists()
    images = open_segmentation(done.directory, "train")
    for index in range(len(images)):
        assert np.array_equal(images.load(index)[1], scene(int(Path(images[index]["file_name"]).stem), 2, (16, 24))[1])


def test_an_image_that_exif_data_turn_is_stored_as_people_see_it(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    pixels, labels = scene(3, sides=(12, 20))
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    for number in range(2):
        turned = Image.fromarray(np.rot90(pixels).copy())
        turned.save(tmp_path / "images" / f"{number}.png", exif=exif)
        Image.fromarray(labels).save(tmp_path / "masks" / f"{number}.png")
    images = open_segmentation(prepared(tmp_path, tmp_path / "data").directory, "train")
    found, maps = images.load(0)
    assert np.array_equal(found, pixels) and np.array_equal(maps, labels)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (np.zeros((3, 4), np.uint8), [], "masks/000.png: 4x3 pixels, but .*images/000.jpg has "),
        (np.full((3, 4), 9, np.uint8), [], "000.png: number 9 at row 0, column 0 has no name, expected 0 to 2 or 255"),
        (np.full((3, 4, 3), [1, 2, 3], np.uint8), [], "000.png: mode RGB holds colours"),
        (None, ["--held-out", "1.5"], "--held-out 1.5: expected a share from 0 to below 1"),
        (None, ["--labels", "nowhere.txt"], "nowhere.txt: cannot be read .No such file or directory."),
        (None, ["--colors", "nowhere.txt", "--binary"], "nowhere.txt: cannot be read"),
        (None, ["--ignore", "sea"], "--ignore sea: neither a number nor a class"),
        (None, ["--ignore", "berry", "leaf"], "1 classes, expected two or more"),
        (None, ["--mask-suffix", "_x"], "no masks whose names end in _x"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    mask: np.ndarray | None, options: list[str], message: str, scenes: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = Path(shutil.copytree(scenes, tmp_path / "s"))
    if mask is not None:
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "PNG")
        (root / "masks" / "000.png").write_bytes(buffer.getvalue())
    given = [] if {"--labels", "--colors"} & {*options} else ["--labels", root / "names.txt"]
    arguments = ["prepare", "segmentation", root / "images", root / "masks", tmp_path / "data", *given, *options]
    found = error(capsys, *arguments)
    assert re.search(message, found), found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
    if mask is not None:
        assert main([*map(str, arguments), "--skip-bad", "--max-bad", "0.5", "--json"]) == 0
        assert sum(json.loads(capsys.readouterr().out)["splits"].values()) == 9


def test_options_of_masks_are_refused_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, "prepare", "folder", tmp_path, tmp_path / "data", "--binary", "--mask-suffix", "_x")
    assert "--binary, --mask-suffix: for segmentation; leave them out" in message
    assert "expected IMAGES MASKS DEST, found 2 names" in error(capsys, "prepare", "segmentation", tmp_path, tmp_path)


def test_a_data_set_is_replaced_whole(scenes: Path, tmp_path: Path) -> None:
    prepared(scenes, tmp_path / "data")
    assert prepared(scenes, tmp_path / "data", overwrite=True, held_out=0.5).splits == {"train": 5, "validation": 5}
