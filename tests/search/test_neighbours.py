"""`beit-jax neighbours`: tables of every format, queries of every kind, and what it refuses."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import feature_tables
import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY, checkpoint

import beit_jax
from beit_jax.cli.main import main
from beit_jax.search import exact, index
from beit_jax.search.index import neighbours
from beit_jax.tables.features import Block
from beit_jax.tables.reading import open_features
from beit_jax.weights import save
from beit_jax.weights.digest import weights_digest

RNG = np.random.default_rng(0)
COUNT = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, twelve images, and their features in tables of all formats."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "photos").mkdir()
    for number in range(COUNT):
        pixels = RNG.integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number:02}.png")
    for name, seed in (("native", 0), ("other", 1)):
        (folder / name).mkdir()
        save(folder / name, checkpoint(TINY, seed))
    model, processor = beit_jax.from_pretrained(folder / "native")
    names = [f"photos/{number:02}.png" for number in range(COUNT)]
    features = beit_jax.features(model, processor, [folder / name for name in names])
    said = {
        "format": "beit-jax features 1",
        "model": str(folder / "native"),
        "revision": None,
        "weights": weights_digest(checkpoint(TINY, 0)),
        "processor": processor.to_hf(),
        "pooling": "pooled",
        "shape": [16],
    }
    for ending in feature_tables.ENDINGS:
        feature_tables.write(folder / f"index.{ending}", names, features, said, batch=5)
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(exact, "BLOCK_ROWS", 8)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["neighbours", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def expected(place: Path, query: int, top: int, *, exclude: bool = False) -> list[tuple[str, float]]:
    """By a plain search in float64."""
    features = np.load(place / "index.npz")["features"].astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarity = features @ features[query]
    order = [i for i in np.argsort(-similarity, kind="stable") if not (exclude and i == query)][:top]
    return [(f"photos/{i:02}.png", float(similarity[i])) for i in order]


def pairs(row: dict[str, Any]) -> list[tuple[str, float]]:
    return [(near["image"], pytest.approx(near["similarity"], abs=1e-5)) for near in row["neighbours"]]


def test_images_find_their_neighbours(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "index.parquet", "photos/03.png", "photos/07.png", "--top", 4)
    assert [row["image"] for row in found] == ["photos/03.png", "photos/07.png"]
    for row, query in zip(found, (3, 7), strict=True):
        assert pairs(row) == expected(place, query, 4)
        assert [near["row"] for near in row["neighbours"]] == [int(near["image"][7:9]) for near in row["neighbours"]]
    (alone,) = run(capsys, "index.parquet", "./photos/../photos/03.png", "--top", 99, "--exclude-self")
    assert pairs(alone) == expected(place, 3, COUNT - 1, exclude=True)
    assert main(["neighbours", "index.parquet", "photos/03.png", "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["photos/03.png", "1.0000", "photos/03.png"]


@pytest.mark.parametrize("ending", feature_tables.ENDINGS)
def test_the_rows_of_a_table_are_queries(place: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A table against itself: each row by all others, whatever the names are."""
    found = run(capsys, f"index.{ending}", f"index.{ending}", "--top", 3, "--exclude-self")
    assert [pairs(row) for row in found] == [expected(place, query, 3, exclude=True) for query in range(COUNT)]
    by_name = run(capsys, f"index.{ending}", "index.npz", "--top", 3, "--exclude-self")
    assert by_name == found


def test_a_name_that_is_no_utf8_is_known_by_what_tables_hold(tmp_path: Path) -> None:
    path = feature_tables.write(tmp_path / "index.parquet", ["\\xff.png", "a.png"], np.eye(2, dtype=np.float32))
    query = Block(np.eye(2, dtype=np.float32)[:1], lambda: ["\udcff.png"])
    ((_, found),) = index.search(open_features(path), [query], top=2, excluding="name")
    assert [near.image for near in found] == ["a.png"]


def test_queries_are_taken_in_turns(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, "index.arrow", "index.arrow", "--exclude-self", "--metric", "euclidean")
    monkeypatch.setattr(index, "QUERIES", 5)
    assert run(capsys, "index.arrow", "index.arrow", "--exclude-self", "--metric", "euclidean") == found
    assert set(found[0]["neighbours"][0]) == {"row", "image", "distance"}
    features = np.load("index.npz")["features"]
    again = neighbours("index.arrow", features, top=5, metric="dot")
    best = np.argsort(-(features.astype(np.float64) @ features.T), axis=1)[:, :5]
    assert [[near.row for near in row] for row in again] == best.tolist()


def test_a_table_that_says_nothing_takes_a_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["neighbours", "index.csv", "photos/03.png"]) == 2
    assert "index.csv: does not say which model made it; give --model SOURCE" in capsys.readouterr().err
    (row,) = run(capsys, "index.csv", "photos/03.png", "--model", "native", "--top", 2)
    assert pairs(row) == expected(place, 3, 2)


def test_the_picture_shows_the_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of files, of members of archives, and grey where there is none now."""
    with tarfile.open("shard.tar", "w") as tar:
        tar.add("photos/01.png", "01.png")
    features = np.load("index.npz")["features"][:3]
    feature_tables.write(Path("mixed.npz"), ["photos/00.png", "shard.tar/01.png", "gone.png"], features)
    assert main(["neighbours", "mixed.npz", "mixed.npz", "--top", "3", "-o", "sheet.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "written      sheet.png"
    sheet = Image.open("sheet.png").convert("RGB")
    side, gap = 160, 8
    centers = {}
    for column in range(4):
        left = gap + column * (side + gap) + (gap if column else 0)
        for row in range(3):
            top = gap + row * (side + 18 + gap)
            centers[row, column] = np.asarray(sheet.crop((left + 64, top + 64, left + 96, top + 96)))
    for row in range(2):  # a query, and the same image as its first neighbour
        original = np.asarray(Image.open(f"photos/{row:02}.png"))
        assert np.array_equal(centers[row, 0], original) and np.array_equal(centers[row, 1], original)
    assert (centers[2, 0] == 211).all() and (centers[2, 1] == 211).all()


def test_unreadable_queries_are_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.png").write_bytes(b"no image")
    found = run(capsys, "index.npz", "photos/03.png", "bad.png", "--skip-bad", "--top", 1)
    assert [row["image"] for row in found] == ["photos/03.png", "bad.png"] and "error" in found[1]


def test_mistakes_are_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"weights": "0" * 32, "model": "gone/away/model", "pooling": "mean"}
    features = np.load("index.npz")["features"]
    names = [f"photos/{i:02}.png" for i in range(COUNT)]
    feature_tables.write(Path("strange.npz"), names, features, said)
    feature_tables.write(Path("narrow.npz"), names, features[:, :5])
    spoiled = features.copy()
    spoiled[4, 1] = np.inf
    feature_tables.write(Path("spoiled.npz"), names, spoiled)
    prepared = json.loads(str(np.load("index.npz")["beit_jax"]))
    prepared["processor"]["image_mean"] = [0.1, 0.2, 0.3]
    feature_tables.write(Path("prepared.npz"), names, features, prepared)
    cases: dict[str, str] = {
        "index.parquet photos/03.png --model other": r"index\.parquet: made by .*native \(weights .*give the model",
        "strange.npz photos/03.png": r"strange\.npz: made by gone/away/model.*give the model with --model",
        "prepared.npz photos/03.png": r"prepared\.npz: its images were prepared with image_mean \[0\.1, 0\.2, 0\.3\]",
        "index.parquet photos/03.png --pooling cls": r"--pooling cls: index\.parquet holds pooled features",
        "index.csv photos/03.png --model native --pooling tokens": r"rows of 16 numbers, found queries of 272",
        "index.parquet strange.npz": r"strange\.npz: weights 0+.*, index\.parquet was made with",
        "index.parquet narrow.npz": r"narrow\.npz: 5 numbers in a row, index\.parquet has 16; give tables of one model",
        "index.parquet index.npz --model native": "--model: for images, and the queries are features already",
        "index.parquet index.npz --skip-bad": "--skip-bad: for images, and the queries are features already",
        "index.parquet index.npz photos/03.png": r"index\.npz: a table of features among other queries; give it alone",
        "photos/03.png photos/03.png": r"photos/03\.png: no table of features: expected a name ending in",
        "index.parquet photos/03.png -o sheet.jpg": r"sheet\.jpg: expected a name ending in \.png",
        "index.parquet photos/03.png -o photos/03.png": r"photos/03\.png: is an input itself",
        "index.parquet photos/03.png --top 0": "--top: expected an integer of at least 1, found 0",
        "index.parquet photos/03.png --top 65 -o sheet.png": "--top 65: a picture shows at most 64 neighbours",
        "spoiled.npz index.npz": r"spoiled\.npz: row 4: its features are not finite",
        "index.parquet missing.png": r"missing\.png: no such file",
    }
    for arguments, message in cases.items():
        assert main(["neighbours", *arguments.split()]) == 2, arguments
        out, error = capsys.readouterr()
        assert re.search(message, error) and error.count("\n") == 1 and not out, (arguments, error)
