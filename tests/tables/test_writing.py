"""Tables of every format, read back by the programs that the formats are of."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from beit_jax.errors import BeitJaxError
from beit_jax.tables.schema import Part, Schema, regrouped
from beit_jax.tables.writing import FORMATS, format_of

NAMES = ["a\r.png", 'odd,"name"\n.png', "ö.png", os.fsdecode(b"\xff.png")]
TEXTS = [*NAMES[:3], "\\xff.png"]
VALUES = np.float32([[-0.0, -0.0, 1e-30], [np.pi, 3.4e38, 16777217], [np.nan, np.inf, -np.inf], [0.1, 1 / 3, 2e-45]])
FEATURES = Schema(shape=(3,), metadata={"model": "m", "shape": [3]})
CLASSES = Schema(
    {"size": "integer", "classes": {"index": "integer", "label": "text", "probability": "number"}}, errors=True
)
CLASS_ROWS = [
    {"image": "a", "size": 3, "classes": [{"index": 1, "label": "x,y", "probability": 0.75},
                                          {"index": 0, "label": "ö", "probability": 0.25}]},
    {"image": "b", "error": "b: damaged"},
]  # fmt: skip


def features(rows: slice = slice(None)) -> Iterator[Part]:
    for place in range(len(NAMES))[rows]:
        yield Part([{"image": NAMES[place]}], VALUES[place : place + 1])


def with_error() -> Iterator[Part]:
    yield Part([{"image": "a"}, {"image": "b", "error": "b: damaged"}], VALUES[:2])


def same(found: object) -> None:
    """Bit for bit, but for what is no number."""
    values = np.array(found, np.float32)
    np.testing.assert_array_equal(values, VALUES)
    assert (np.signbit(values) == np.signbit(VALUES)).all()


@pytest.mark.parametrize("ending", FORMATS)
def test_a_table_is_the_same_whenever_it_is_written(tmp_path: Path, ending: str) -> None:
    for name in ("a", "b"):
        assert format_of(tmp_path / f"{name}{ending}").write(tmp_path / f"{name}{ending}", FEATURES, features) == 4
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_features_as_text(tmp_path: Path) -> None:
    FORMATS[".jsonl"].write(tmp_path / "f.jsonl", FEATURES, features)
    rows = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [row["image"] for row in rows] == TEXTS and [*rows[0]] == ["image", "features"]
    same([row["features"] for row in rows])
    FORMATS[".csv"].write(tmp_path / "f.csv", FEATURES, features)
    with (tmp_path / "f.csv").open(newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    assert head == ["image", "f0", "f1", "f2"] and [line[0] for line in lines] == TEXTS
    same([line[1:] for line in lines])


def test_features_as_arrays(tmp_path: Path) -> None:
    FORMATS[".npz"].write(tmp_path / "f.npz", FEATURES, features)
    with np.load(tmp_path / "f.npz") as found:
        assert sorted(found) == ["beit_jax", "features", "images"] and found["images"].tolist() == NAMES
        assert json.loads(str(found["beit_jax"])) == FEATURES.metadata
        same(found["features"])
    FORMATS[".safetensors"].write(tmp_path / "f.safetensors", FEATURES, features)
    with safe_open(tmp_path / "f.safetensors", "np") as found:
        assert json.loads(found.metadata()["images"]) == TEXTS
        assert json.loads(found.metadata()["beit_jax"]) == FEATURES.metadata
        same(found.get_tensor("features"))


def test_features_by_arrow(tmp_path: Path) -> None:
    FORMATS[".parquet"].write(tmp_path / "f.parquet", FEATURES, features)
    FORMATS[".arrow"].write(tmp_path / "f.arrow", FEATURES, features)
    with pa.memory_map(str(tmp_path / "f.arrow")) as file:
        tables = [pq.read_table(tmp_path / "f.parquet"), pa.ipc.open_file(file).read_all()]
        for table in tables:
            assert table.schema.field("features").type == pa.list_(pa.float32(), 3)
            assert table["image"].to_pylist() == TEXTS
            assert json.loads(table.schema.metadata[b"beit_jax"]) == FEATURES.metadata
            same(table["features"].to_pylist())


@pytest.mark.parametrize("ending", FORMATS)
def test_images_that_could_not_be_read(tmp_path: Path, ending: str) -> None:
    path, schema = tmp_path / f"f{ending}", Schema(shape=(3,), errors=True)
    assert FORMATS[ending].write(path, schema, with_error) == 2
    if ending == ".jsonl":
        first, second = map(json.loads, path.read_text().splitlines())
        assert second == {"image": "b", "error": "b: damaged"} and first["image"] == "a"
    elif ending == ".csv":
        assert path.read_text().splitlines()[2] == "b,,,,b: damaged"
    elif ending == ".npz":
        with np.load(path) as found:
            assert found["images"].tolist() == ["a"] and found["features"].shape == (1, 3)
    elif ending == ".safetensors":
        with safe_open(path, "np") as found:
            assert json.loads(found.metadata()["images"]) == ["a"] and found.get_tensor("features").shape == (1, 3)
    else:
        table = pq.read_table(path) if ending == ".parquet" else pa.ipc.open_file(path).read_all()
        assert table["error"].to_pylist() == [None, "b: damaged"] and table["features"].to_pylist()[1] is None


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_classes(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c{ending}"
    assert FORMATS[ending].write(path, CLASSES, lambda: iter([Part(CLASS_ROWS)])) == 2
    if ending == ".jsonl":
        assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == CLASS_ROWS
    elif ending == ".csv":
        assert path.read_text("utf-8").splitlines() == [
            "image,size,rank,index,label,probability,error",
            'a,3,1,1,"x,y",0.75,', "a,3,2,0,ö,0.25,", "b,,,,,,b: damaged",
        ]  # fmt: skip
    else:
        table = pq.read_table(path) if ending == ".parquet" else pa.ipc.open_file(path).read_all()
        expected = [{"image": "a", "error": None} | CLASS_ROWS[0], {"size": None, "classes": None} | CLASS_ROWS[1]]
        assert table.to_pylist() == expected


def test_tokens_keep_their_shape_where_a_format_has_it(tmp_path: Path) -> None:
    schema, values = Schema(shape=(2, 3), metadata={"shape": [2, 3]}), np.arange(12, dtype=np.float32).reshape(2, 2, 3)

    def parts() -> Iterator[Part]:
        yield Part([{"image": "a"}, {"image": "b"}], values)

    for ending in FORMATS:
        FORMATS[ending].write(tmp_path / f"t{ending}", schema, parts)
    assert np.array_equal(np.load(tmp_path / "t.npz")["features"], values)
    rows = [json.loads(line)["features"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert np.array_equal(np.float32(rows), values)
    assert np.array_equal(pq.read_table(tmp_path / "t.parquet")["features"].to_pylist(), values.reshape(2, 6))
    with pytest.raises(BeitJaxError, match=r"x\.csv: 151,296 values an image, CSV has at most 16,384 columns"):
        FORMATS[".csv"].checked("x.csv", Schema(shape=(197, 768)))


def test_what_a_format_cannot_hold_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BeitJaxError, match=r"f\.pq: expected a name ending in \.jsonl, .*"):
        format_of(Path("f.pq"))
    with pytest.raises(BeitJaxError, match=r"c\.npz: holds arrays of features alone; choose a name ending in \.jsonl"):
        FORMATS[".npz"].checked("c.npz", CLASSES)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BeitJaxError, match=r"pip install 'beit-jax\[tables\]', or choose a name ending in \.jsonl"):
        FORMATS[".parquet"].checked("f.parquet", FEATURES)


def test_parts_become_larger() -> None:
    found = list(regrouped(features(), 3))
    assert [len(part) for part in found] == [3, 1]
    np.testing.assert_array_equal(np.concatenate([part.values for part in found]), VALUES)
