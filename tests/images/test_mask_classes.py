"""What numbers and colours of masks mean: files of names, and masks renumbered as a model counts its classes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.images.class_files import read_colours, read_names
from beit_jax.images.mask_classes import MaskClasses, mask_classes


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def written(path: Path, content: str | object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


THREE = {0: "sky", 1: "tree, oak", 2: "a cow"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("names.txt", "sky\ntree, oak\na cow\n", THREE),
        ("names.txt", "0: sky\n1: tree, oak\n2: a cow\n", THREE),
        ("names.txt", "2: a cow\n0: sky\n1: tree, oak\n", THREE),
        ("names.txt", "0 sky\n1 tree, oak\n2  a cow\n", THREE),
        ("names.txt", "1 sky\n2 tree", {1: "sky", 2: "tree"}),
        ("names.txt", "2 door car\n4 door car", {0: "2 door car", 1: "4 door car"}),
        ("names.txt", "\ufeffsky\r\ntree, oak\r\na cow\r\n\r\n", THREE),
        ("names.csv", '0,sky\n1,"tree, oak"\n2,a cow\n', THREE),
        ("names.csv", "sky;0\ntree, oak;1\na cow;2", THREE),
        ("names.tsv", "0\tsky\n1\ttree, oak\n2\ta cow", THREE),
        ("names.csv", 'Name,color,ID\nsky,red,0\n"tree, oak",blue,1\na cow,green,2', THREE),
        ("names.txt", "Idx\tRatio\tName\n0\t0.1\tsky\n1\t0.2\ttree, oak\n2\t0.3\ta cow", THREE),
        ("names.csv", "7,road\n11,building\n33,bicycle", {7: "road", 11: "building", 33: "bicycle"}),
        ("names.json", ["sky", "tree, oak", "a cow"], THREE),
        ("names.json", {"0": "sky", "2": "a cow", "1": "tree, oak"}, THREE),
        ("config.json", {"model_type": "beit", "id2label": {str(k): v for k, v in THREE.items()}}, THREE),
        ("label2id.json", {"sky": 0, "a cow": 2, "tree, oak": 1}, THREE),
    ],
)
def test_names_by_number(name: str, content: object, expected: dict[int, str], tmp_path: Path) -> None:
    assert read_names(written(tmp_path / name, content)) == expected


def test_a_list_of_names_may_begin_with_one(tmp_path: Path) -> None:
    assert read_names(written(tmp_path / "names.txt", "a\nb"), first=1) == {1: "a", 2: "b"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("names.txt", "a\n\nb", "line 2 is empty"),
        ("names.txt", "", "no names; write one in each line"),
        ("names.txt", "a\nb\na", "the name a stands twice"),
        ("names.csv", "0,a\n0,b", "the number 0 stands twice"),
        ("names.csv", "id,name\n0,a\nx,b", "line 3: expected a number and a name, found x,b"),
        ("names.csv", "id,name\n0,a\n99999,b", "class number 99999, expected 0 to 65535"),
        ("names.json", {"a": "b"}, "expected a list of names, or an object"),
        ("names.json", "{", "not JSON"),
        ("names.txt", "a\nb\x07c", "class 1 has no printable name"),
        ("nowhere/names.txt", None, "nowhere/names.txt: cannot be read"),
    ],
)
def test_names_that_cannot_be(name: str, content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / name if content is None else written(tmp_path / name, content)
    with pytest.raises(BeitJaxError, match=message) as caught:
        read_names(path)
    assert "\n" not in str(caught.value)


TWO = [((0, 0, 0), "void"), ((64, 128, 64), "Animal 2")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("colors.csv", "name,r,g,b\nvoid,0,0,0\nAnimal 2,64,128,64"),
        ("colors.csv", "r,g,b,name\n0,0,0,void\n64,128,64,Animal 2"),
        ("colors.txt", "0 0 0\tvoid\n64 128 64\t\tAnimal 2\n"),  # CamVid's
        ("labelmap.txt", "# label:color_rgb:parts:actions\nvoid:0,0,0::\nAnimal 2:64,128,64::\n"),  # CVAT's
        ("colors.json", {"void": [0, 0, 0], "Animal 2": "#408040"}),
    ],
)
def test_colours_and_names(name: str, content: object, tmp_path: Path) -> None:
    assert read_colours(written(tmp_path / name, content)) == TWO


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("colors.csv", "void,0,0,0\ntree,0,300,0", "line 2: expected a name and three numbers from 0 to 255"),
        ("colors.csv", "void,0,0,0\ntree,0,0,0", r"the colour \(0, 0, 0\) stands twice"),
        ("colors.csv", "", "no colours"),
        ("colors.json", {"void": [0, 0]}, r'void: expected \[r, g, b\] or "#rrggbb", found \[0, 0\]'),
    ],
)
def test_colours_that_cannot_be(name: str, content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=message):
        read_colours(written(tmp_path / name, content))


# Numbers


@pytest.mark.parametrize(
    ("content", "options", "stored", "expected", "reduces"),
    [
        ("a\nb\nc", {}, [0, 1, 2, 255], [0, 1, 2, 255], False),
        ("a\nb\nc", {"from_one": True}, [0, 1, 3, 255], [255, 0, 2, 255], True),
        ("0,back\n1,a\n2,b", {"from_one": True}, [0, 1, 2, 255], [255, 0, 1, 255], True),
        ("a\nb\nc", {"ignore": ("3", "9")}, [0, 2, 3, 9], [0, 2, 255, 255], None),
        ("a\nb\nc", {"ignore": ("b",)}, [0, 1, 2, 255], [0, 255, 1, 255], None),
        ("back\na\nb", {"ignore": ("back",)}, [0, 1, 2, 255], [255, 0, 1, 255], True),
        ("7,road\n11,house", {"ignore": ("0", "-1")}, [7, 11, 0, 255], [0, 1, 255, 255], None),
        ("0,back\n255,lesion", {}, [0, 255, 0, 255], [0, 1, 0, 1], None),
    ],
)
def test_masks_as_the_model_counts(
    content: str,
    options: dict[str, object],
    stored: list[int],
    expected: list[int],
    reduces: bool | None,
    tmp_path: Path,
) -> None:
    classes = mask_classes(written(tmp_path / "names.csv", content), **options)  # type: ignore[arg-type]
    found = classes.read(png(np.array([stored], np.uint8)), "x")
    assert found.tolist() == [expected]
    assert classes.reduces is reduces
    assert classes.no_class == 255


def test_256_classes_and_more_keep_255_for_one_of_them(tmp_path: Path) -> None:
    names = written(tmp_path / "names.txt", "\n".join(f"class {i}" for i in range(300)))
    classes = mask_classes(names, ignore=("65535",))
    assert classes.read(png(np.array([[0, 255, 299, 65535]], np.uint16)), "x").tolist() == [[0, 255, 299, 65535]]
    assert classes.no_class == 65535 and classes.reduces is False


@pytest.mark.parametrize(
    ("options", "stored", "message"),
    [
        ({}, [0, 2], r"x: number 2 at row 0, column 1 has no name, expected 0 to 1 or 255 \(ignored\); 1 such pixels; "
                     r"pass --labels-from-one if 0 is no class, --ignore 2"),
        ({}, [0, 7], "x: number 7 .*; pass --ignore 7 if it is none, or name it in --labels"),
        ({"from_one": True}, [0, 3], r"x: number 3 .*expected 1 to 2 or 0, 255 \(ignored\)"),
        ({"binary": True}, [0, 17], "x: 17 at row 0, column 1, expected 0 and 255 .--binary.; export the mask without"),
    ],
)  # fmt: skip
def test_numbers_without_a_name(options: dict[str, object], stored: list[int], message: str, tmp_path: Path) -> None:
    classes = mask_classes(written(tmp_path / "names.txt", "a\nb"), **options)  # type: ignore[arg-type]
    with pytest.raises(BeitJaxError, match=message):
        classes.read(png(np.array([stored], np.uint8)), "x")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a", {}, "1 classes, expected two or more; keep the background"),
        ("a\nb", {"ignore": ("0",)}, "1 classes, expected two or more"),
        ("a\nb", {"ignore": ("c",)}, "--ignore c: neither a number nor a class; classes are a, b"),
        ("a\nb\nc", {"binary": True}, "--binary: expected two classes"),
        ("a\nb", {"binary": True, "from_one": True}, "--binary: expected two classes.*--labels-from-one"),
    ],
)
def test_classes_that_cannot_be(content: str, options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=message):
        mask_classes(written(tmp_path / "names.txt", content), **options)  # type: ignore[arg-type]


def test_two_classes_of_any_form(tmp_path: Path) -> None:
    classes = mask_classes(binary=True)
    drawn = np.zeros((16, 16), bool)
    drawn[4:12, 4:12] = True
    full = (drawn * 255).astype(np.uint8)
    smeared = io.BytesIO()
    Image.fromarray(full).save(smeared, "JPEG", quality=60)
    assert len(np.unique(np.asarray(Image.open(smeared)))) > 2
    for data in (png(drawn), png(full), png(drawn.astype(np.uint8)), png(np.dstack([full] * 3)), smeared.getvalue()):
        assert np.array_equal(classes.read(data, "x"), drawn)
    assert classes.names == ("background", "foreground")


def test_colours_become_classes_wherever_they_are_stored(tmp_path: Path) -> None:
    colours = written(tmp_path / "colors.txt", "void 0 0 0\ncat 200 0 0\ndog 0 0 200\ncat 220 20 0")
    classes = mask_classes(colours=colours, ignore=("void",))
    assert isinstance(classes, MaskClasses) and classes.names == ("cat", "dog") and classes.reduces is None
    rgb = np.array([[[0, 0, 0], [200, 0, 0], [0, 0, 200], [220, 20, 0]]], np.uint8)
    assert classes.read(png(rgb), "x").tolist() == [[255, 0, 1, 0]]
    indexed = Image.fromarray(np.array([[3, 1, 0, 1]], np.uint8))
    indexed.putpalette([0, 0, 200, 200, 0, 0, 9, 9, 9, 0, 0, 0])
    buffer = io.BytesIO()
    indexed.save(buffer, "PNG")
    assert classes.read(buffer.getvalue(), "x").tolist() == [[255, 0, 1, 0]]
    rgb[0, 2] = 1
    with pytest.raises(BeitJaxError, match=r"x: colour \(1, 1, 1\) at row 0, column 2 is none of --colors; 1 such"):
        classes.read(png(rgb), "x")
    with pytest.raises(BeitJaxError, match="--colors names the classes: leave --labels"):
        mask_classes(tmp_path / "names.txt", colours)
