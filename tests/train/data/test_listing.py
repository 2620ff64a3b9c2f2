"""`prepare` and `evaluate` see the same classes and images in one tree, whichever lists it."""

from pathlib import Path

import pytest
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.images.listing import SUFFIXES, image_files
from beit_jax.train.data.image_folders import folder
from beit_jax.train.data.listing import annotated_images, class_images
from beit_jax.train.evaluation.opening import open_folder

IMAGES = ("cat/b.png", "cat/a.JPG", "cat/deep/er/c.gif", "dog/a.webp", "dog/Z.bmp", "owl/1.tiff")
OTHERS = ("cat/notes.txt", "cat/.hidden.png", "dog/.cache/a.png", ".git/a.png", "readme.md")


def tree(root: Path) -> Path:
    for name in (*IMAGES, *OTHERS):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in SUFFIXES:
            Image.new("RGB", (2, 3)).save(path)
        else:
            path.write_text("no image")
    return root


def of_evaluate(root: Path, split: str) -> list[tuple[str, str]]:
    found = open_folder(root, split)
    return [
        (found.labels[number], path.relative_to(root).as_posix())
        for path, number in zip(found.paths, found.classes, strict=True)
    ]


def of_prepare(root: Path, split: str) -> list[tuple[str, str]]:
    found = folder(root, 0)
    return [(found.labels[example["label"]], example["file_name"]) for example in found.splits[split].examples]


def test_both_commands_list_the_same_classes_and_images(tmp_path: Path) -> None:
    root = tree(tmp_path)
    found = of_evaluate(root, "train")
    assert found == of_prepare(root, "train")
    assert sorted(name for _, name in found) == sorted(IMAGES)
    assert [label for label, _ in found] == ["cat"] * 3 + ["dog"] * 2 + ["owl"]


@pytest.mark.parametrize(("train", "validation"), [("train", "val"), ("training", "valid"), ("train", "validation")])
def test_both_commands_know_the_same_names_of_splits(train: str, validation: str, tmp_path: Path) -> None:
    for name in (train, validation, "test"):
        tree(tmp_path / name)
    for split in ("train", "validation", "test"):
        found = of_evaluate(tmp_path, split)
        assert found == of_prepare(tmp_path, split)
        assert len(found) == len(IMAGES)


def test_an_images_annotation_has_its_name(tmp_path: Path) -> None:
    images, annotations = tree(tmp_path / "images"), tmp_path / "annotations"
    for path in image_files(images):
        annotation = (annotations / path.relative_to(images)).with_suffix(".png")
        annotation.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 3)).save(annotation)
    pairs = annotated_images(images, annotations)
    assert [image for image, _ in pairs] == image_files(images)
    for image, annotation in pairs:
        assert image.relative_to(images).with_suffix("") == annotation.relative_to(annotations).with_suffix("")


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    (tree(tmp_path) / "ant").mkdir()
    for find in (class_images, open_folder, folder):
        with pytest.raises(BeitJaxError, match="ant"):
            find(tmp_path)
