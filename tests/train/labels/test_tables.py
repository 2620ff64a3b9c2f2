"""Tables of labels: right ones against what they say, wrong ones against the row and the column that are wrong."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.train.labels.meaning import TableOptions
from beit_jax.train.labels.table import TableImages, read_images

NAMES = ("a.png", "b.png", "sub/c.png", "d.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


Read = Callable[..., TableImages]


@pytest.fixture
def read(images: Path, tmp_path: Path) -> Read:
    """Writes a table and reads it."""

    def of(content: str | bytes, name: str = "table.csv", **options: Any) -> TableImages:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_images(path, TableOptions(**{"image_folder": images} | options))

    return of


def csv(column: Sequence[str], head: str = "file_name,label") -> str:
    return "\n".join([head, *(f"{name},{cell}" for name, cell in zip(NAMES, column, strict=False))]) + "\n"


def said(found: TableImages) -> list[Any]:
    return [found[index]["label"].tolist() for index in range(len(found))]


def test_one_class(read: Read) -> None:
    found = read(csv(["dog", " cat ", "dog", "owl"]))
    assert found.target.problem_type == "single_label_classification"
    assert found.labels == ("cat", "dog", "owl") and said(found) == [1, 0, 1, 2]
    assert found.described == "images from file_name, classes from label"
    assert not found.splits


def test_numbered_classes_are_in_the_order_of_their_numbers(read: Read) -> None:
    assert read(csv(["10", "9", "1", "10"])).labels == ("1", "9", "10")


@pytest.mark.parametrize(
    ("cells", "options", "described"),
    [
        (["x;y", "y", "z ; x;", "y;y"], {}, "label (';' between them)"),
        (["x|y", "y", "z|x", "y"], {}, "label ('|' between them)"),
        (['"x, y"', "y", '"z,x"', "y"], {"separator": ","}, "label (',' between them)"),
        (["x y", "y", "z  x", "y"], {"separator": " "}, "label (' ' between them)"),
        (['"[""x"", ""y""]"', '"[""y""]"', '"[""z"",""x""]"', '"[""y""]"'], {}, "label (lists)"),
    ],
)
def test_several_classes_in_a_cell(read: Read, cells: list[str], options: dict[str, Any], described: str) -> None:
    found = read(csv(cells), **options)
    assert found.target.problem_type == "multi_label_classification"
    assert found.labels == ("x", "y", "z") and found.described.endswith(described)
    assert said(found) == [[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert found.target.dtype == np.uint8


def test_lists_that_python_has_printed(read: Read) -> None:
    found = read(csv(["\"['x', 'y']\"", "[]", "['y']", "\"['x', ]\""]))
    assert found.labels == ("x", "y") and said(found) == [[1, 1], [0, 0], [0, 1], [1, 0]]


def test_a_name_with_a_separator_in_it(read: Read) -> None:
    found = read(csv(["x;y", "y", "x;y", "y"]), separator="none")
    assert found.labels == ("x;y", "y") and said(found) == [0, 1, 0, 1]


def test_images_of_no_class(read: Read) -> None:
    assert said(read(csv(["x", "", "y", "x"]), allow_unlabelled=True)) == [[1, 0], [0, 0], [0, 1], [1, 0]]
    assert said(read(csv(["x;y", "", "x", "[]"]), allow_unlabelled=True)) == [[1, 1], [0, 0], [1, 0], [0, 0]]
    assert said(read(csv(["x;y", "[]", "x", "y"]))) == [[1, 1], [0, 0], [1, 0], [0, 1]]


def test_a_column_for_each_class(read: Read) -> None:
    text = "file_name,red,green,unused\na.png,1,0,9\nb.png,0,0,9\nd.png,true,1.0,9\n"
    found = read(text, label_columns=("red", "green"))
    assert found.labels == ("red", "green") and said(found) == [[1, 0], [0, 0], [1, 1]]


def test_one_class_of_several(read: Read) -> None:
    found = read(csv(["[]", '"[""x""]"', "[]", '"[""x""]"']))
    assert found.labels == ("x",) and said(found) == [[0], [1], [0], [1]]


def test_numbers(read: Read) -> None:
    text = "file_name,age,weight\na.png,3,-1.5e2\nb.png, 4.25 ,0\n"
    found = read(text, value_columns=("weight", "age"))
    assert found.target.problem_type == "regression" and found.labels == ("weight", "age")
    assert said(found) == [[-150, 3], [0, 4.25]] and found.target.dtype == np.float32


def test_splits_and_other_names(read: Read) -> None:
    text = "ID;kind;part\na;x;Train\nb;y;val\nsub/c;x;testing\n".replace("testing", "test")
    found = read(text, image_column="ID", label_columns=("kind",), split_column="part")
    assert found.splits == ("train", "validation", "test") and said(found) == [0, 1, 0]
    assert [path.name for path in found.paths] == ["a.png", "b.png", "c.png"]
    assert said(found.of_split("validation")) == [1]


def test_json(read: Read) -> None:
    rows = [
        {"file_name": "a.png", "label": ["x"], "n": 1},
        {"file_name": "b.png", "label": [], "n": 2.5},
        {"file_name": "d.png", "label": ["y", "x"], "n": 3},
    ]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    for name, content in (("t.jsonl", lines), ("t.json", json.dumps(rows)), ("t.ndjson", "\ufeff" + lines)):
        assert said(read(content, name)) == [[1, 0], [0, 0], [1, 1]]
    assert said(read(lines, "t.jsonl", value_columns=("n",))) == [[1], [2.5], [3]]


def test_the_order_of_classes(read: Read, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("owl\ndog\ncat\nbee\n")
    (tmp_path / "names.json").write_text('["owl", "dog", "cat", "bee"]')
    for name in ("names.txt", "names.json"):
        found = read(csv(["dog", "cat", "dog", "owl"]), classes=tmp_path / name)
        assert found.labels == ("owl", "dog", "cat", "bee") and said(found) == [1, 2, 1, 0]


def test_folders_as_hugging_face_has_them(tmp_path: Path) -> None:
    """A folder with its table; and one with such folders for its splits."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / split / "1.png")
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "label": split}) + "\n")
    found = read_images(tmp_path, TableOptions())
    assert found.splits == ("train", "test") and found.labels == ("test", "train") and said(found) == [1, 0]
    assert said(read_images(tmp_path / "test", TableOptions())) == [0]


WRONG: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "missing": (csv(["x", "y"]).replace("b.png", "e.png"), {}, "row 3, column file_name: .*e.png: no such file;"),
    "missing many": ("file_name,label\nx.png,1\ny.png,2\n", {}, r"row 2, column file_name: .* \(and 1 more\)"),
    "no name": ("file_name,label\na.png,x\n,y\n", {}, "row 3, column file_name: empty; name the image's file"),
    "twice": ("file_name,label\na.png,x\n./a.png,y\n", {}, "row 3, column file_name: ./a.png stands in row 2 too"),
    "unknown column": (csv(["x"]), {"label_columns": ("lable",)}, "--label-columns lable: .* did you mean label"),
    "unknown image": (csv(["x"]), {"image_column": "file"}, "--image-column file: .* has the columns file_name, label"),
    "unknown split": (csv(["x"]), {"split_column": "fold"}, "--split-column fold: "),
    "no label column": ("file_name,sort\na.png,x\n", {}, "no column of labels .* found file_name, sort; name it with"),
    "no image column": ("what,label\na.png,x\n", {}, "no column of the images' names"),
    "empty": (csv(["x", "", "y"]), {}, "row 3, column label: empty; write the class"),
    "empty of several": (csv(["x;y", "", "y"]), {}, r"row 3, column label: empty; write \[\] .* --allow-unlabelled"),
    "no number": (csv(["1", "2", "three"]), {"value_columns": ("label",)}, "row 4, column label: expected a number, f"),
    "a decimal comma": (csv(["1", '"2,5"']), {"value_columns": ("label",)}, "found 2,5; write it with a point"),
    "not finite": (csv(["1", "nan"]), {"value_columns": ("label",)}, "row 3, column label: expected a number, found n"),
    "too large": (csv(["1", "1e39"]), {"value_columns": ("label",)}, "row 3, column label: expected a number, found 1"),
    "empty number": (csv(["1", ""]), {"value_columns": ("label",)}, "row 3, column label: empty; write the number"),
    "no flag": ("file_name,p,q\na.png,1,2\n", {"label_columns": ("p", "q")}, "row 2, column q: expected 0 or 1, found"),
    "no flag at all": ("file_name,p,q\na.png,,1\n", {"label_columns": ("p", "q")}, "row 2, column p: .* found nothing"),
    "cells": ("file_name,label\na.png,x\nb.png,y,z\n", {}, "row 3: 3 cells, but the first row names 2 columns"),
    "two names": ("file_name,label,label\na.png,x,y\n", {}, "two columns are called label"),
    "split": (
        "file_name,label,split\na.png,x,dev\n",
        {},
        "row 2, column split: expected train, training, .* found dev",
    ),
    "decimals": (
        csv(["1.5", "2"]),
        {},
        "column label holds numbers such as 1.5; learn them with --value-columns label",
    ),
    "two separators": (csv(["x;y", "x|y"]), {}, "found ; and | in cells; say which separates classes with --separator"),
    "both": (csv(["1"]), {"label_columns": ("label",), "value_columns": ("label",)}, "were both given"),
    "one column twice": (csv(["1"]), {"label_columns": ("file_name",)}, "column file_name is named for two things"),
    "nothing": ("file_name,label\n", {}, "no rows"),
    "nothing at all": ("", {}, "no rows"),
    "quotes": ('file_name,label\na.png,"x\n', {}, "row 2: unexpected end of data"),
    "no classes": (csv(["[]", "[]"]), {}, "column label: no image has a class"),
    "separator of numbers": (csv(["1"]), {"value_columns": ("label",), "separator": ";"}, "--separator: for classes"),
    "unlabelled of one": (
        csv(["x"]),
        {"allow_unlabelled": True, "separator": "none"},
        "--allow-unlabelled: for images of several classes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_tables_that_are_wrong(read: Read, name: str) -> None:
    content, options, expected = WRONG[name]
    with pytest.raises(BeitJaxError, match=expected.replace("found ; and | in", r"found ; and \| in")) as caught:
        read(content, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"file_name,label\na.png,\xff\n", "no UTF-8 text at byte 22"),
        ("t.parquet", b"PAR1", r"expected a table \(.csv, .tsv, .jsonl"),
        ("t.jsonl", b'{"file_name": "a.png", "label": 1}\n{"file_name"', "row 2: not JSON"),
        ("t.jsonl", b'{"file_name": "a.png", "label": 1, "label": 2}', "row 1: the key label stands twice"),
        ("t.jsonl", b"[1]", 'row 1: expected {"name of a column": value}'),
        ("t.jsonl", b'{"file_name": ["a.png"], "label": 1}', "row 1, column file_name: expected one value, found"),
        ("t.jsonl", b'{"file_name": "a.png", "label": [["x"]]}', "row 1, column label: expected a list of names"),
        ("t.jsonl", b'{"file_name": "a.png", "label": 1}\n{"file_name": "b.png"}', "row 2, column label: empty"),
    ],
)
def test_files_that_are_no_tables(read: Read, name: str, content: bytes, expected: str) -> None:
    with pytest.raises(BeitJaxError, match=expected) as caught:
        read(content, name)
    assert name in str(caught.value)


def test_a_class_that_is_not_listed(read: Read, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    with pytest.raises(BeitJaxError, match=r"row 3, column label: dgo is not in .*names.txt; is it dog\?"):
        read(csv(["cat", "dgo"]), classes=names)
    names.write_text("cat\ndog\ncat\n")
    with pytest.raises(BeitJaxError, match="class 1: cat: a name that stands twice"):
        read(csv(["cat", "dog"]), classes=names)


def test_two_tables_of_a_folder(tmp_path: Path) -> None:
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("file_name,label\n")
    with pytest.raises(BeitJaxError, match=r"expected metadata.csv or metadata.jsonl, found both"):
        read_images(tmp_path, TableOptions())


def test_a_name_without_suffix_that_is_not_clear(read: Read, images: Path) -> None:
    Image.new("RGB", (4, 4)).save(images / "two.png")
    Image.new("RGB", (4, 4)).save(images / "two.jpg")
    with pytest.raises(BeitJaxError, match=r"row 2, column file_name: two may be two.jpg or two.png; write the suffix"):
        read("file_name,label\ntwo,x\n")
