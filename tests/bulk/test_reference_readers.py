"""Tables that the command writes are read by pyarrow, pandas, NumPy, safetensors, csv and json (docs/search.md)."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from PIL import Image
from safetensors import safe_open
from tiny_models import TINY, checkpoint

import beit_jax
from beit_jax.cli.main import main
from beit_jax.tables.reading import read_features
from beit_jax.weights import save
from beit_jax.weights.digest import weights_digest

ENDINGS = ("parquet", "arrow", "npz", "safetensors", "csv", "jsonl")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of four images and one that cannot be read, in every format."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "native").mkdir()
    save(folder / "native", checkpoint(TINY))
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "photos" / f"{number}, a.png")
    (folder / "photos" / "9.png").write_bytes(b"no image")
    for ending in ENDINGS:
        command = ["features", str(folder / "native"), str(folder / "photos"), "-o", str(folder / f"table.{ending}")]
        assert main([*command, "--skip-bad", "--max-bad", "0.5"]) == 0
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> tuple[list[str], np.ndarray]:
    model, processor = beit_jax.from_pretrained(place / "native")
    names = [str(place / "photos" / f"{number}, a.png") for number in range(4)]
    return names, beit_jax.features(model, processor, names)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == np.float32 and bool(np.abs(found - expected).max() <= 1e-5)


@pytest.mark.parametrize("ending", ENDINGS)
def test_this_library_reads_what_it_writes(
    place: Path, expected: tuple[list[str], np.ndarray], ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names, features, said = read_features(place / f"table.{ending}")
    assert names == expected[0] and close(features, expected[1])
    if ending not in ("csv", "jsonl"):
        assert said["weights"] == weights_digest(checkpoint(TINY)) and said["pooling"] == "pooled"
        assert (said["model"], said["shape"]) == (str(place / "native"), [16])
    asked = ["--model", str(place / "native")] if ending in ("csv", "jsonl") else []
    assert main(["neighbours", str(place / f"table.{ending}"), names[2], *asked, "--top", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["neighbours"][0]["image"] == names[2] and row["neighbours"][0]["similarity"] > 0.999999


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_pyarrow_reads_the_table(place: Path, expected: tuple[list[str], np.ndarray], ending: str) -> None:
    if ending == "parquet":
        table = pyarrow.parquet.read_table(place / "table.parquet")
    else:
        with pyarrow.memory_map(str(place / "table.arrow")) as file:
            table = pyarrow.ipc.open_file(file).read_all()
    assert table.column_names == ["image", "features", "error"]
    assert table.schema.field("features").type.value_type == pyarrow.float32()
    assert table["image"].to_pylist()[:4] == expected[0]
    assert table["features"].null_count == 1 and "9.png" in table["error"].to_pylist()[4]
    lists = table["features"].drop_null().combine_chunks()
    features = lists.flatten().to_numpy().reshape(len(lists), -1)
    assert close(features, expected[1])


@pytest.mark.filterwarnings("ignore")  # of pandas
def test_pandas_reads_the_table(place: Path, expected: tuple[list[str], np.ndarray]) -> None:
    pandas = pytest.importorskip("pandas")
    frames = [pandas.read_parquet(place / "table.parquet"), pandas.read_feather(place / "table.arrow")]
    for frame in frames:
        kept = frame[frame["error"].isna()]
        assert list(kept["image"]) == expected[0] and close(np.stack(list(kept["features"])), expected[1])
    text = pandas.read_csv(place / "table.csv")
    numbers = text[text["error"].isna()].filter(regex=r"^f\d+$").to_numpy(np.float32)
    assert close(numbers, expected[1])
    lines = pandas.read_json(place / "table.jsonl", lines=True)
    assert close(np.stack(lines["features"].dropna().map(np.float32).to_list()), expected[1])
    frames[0].to_parquet(place / "again.parquet")  # what pandas writes is read as well
    names, features, said = read_features(place / "again.parquet")
    assert names == expected[0] and close(features, expected[1]) and not said


def test_numpy_safetensors_csv_and_json_read_the_table(place: Path, expected: tuple[list[str], np.ndarray]) -> None:
    names, features = expected
    with np.load(place / "table.npz") as file:
        assert file["images"].tolist() == names and close(file["features"], features)
    with safe_open(place / "table.safetensors", framework="numpy") as tensors:
        assert close(tensors.get_tensor("features"), features)
        assert json.loads(tensors.metadata()["images"]) == names
    with (place / "table.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["image"] for row in rows[:4]] == names and "9.png" in rows[4]["error"]
    assert close(np.array([[row[f"f{i}"] for i in range(16)] for row in rows[:4]], np.float32), features)
    lines = [json.loads(line) for line in (place / "table.jsonl").read_text().splitlines()]
    assert close(np.array([line["features"] for line in lines[:4]], np.float32), features) and "error" in lines[4]
