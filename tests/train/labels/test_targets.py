"""What TFDS' own data sets say of images: classes, several classes and numbers, whatever their features are called."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.train.data.batches import train_batches
from beit_jax.train.data.datasets import Dataset, open_dataset
from beit_jax.train.data.prepare import prepare_table
from beit_jax.train.labels.meaning import TableOptions
from beit_jax.train.objectives.class_weights import balanced_positives
from beit_jax.train.recipe import DataOptions

F = tfds.features
RECORDS = 6
Feature = Callable[[], Any]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def written(directory: Path, features: dict[str, Any], said: Callable[[int], dict[str, Any]]) -> Path:
    """A data set that TFDS itself has written."""

    class Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict({"image": F.Image(), **features}))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in range(RECORDS):
                yield i, {"image": io.BytesIO(picture(i)), **said(i)}

    builder = Own(data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def by_picture(data: Dataset) -> list[Any]:
    """The labels in the order of the pictures: TFDS shuffles."""
    loaded = [data.load(index) for index in range(len(data))]
    return [label.tolist() for _, label in sorted(loaded, key=lambda pair: int(pair[0][0, 0, 0]))]


CASES: dict[str, tuple[dict[str, Feature], Callable[[int], dict[str, Any]], str, tuple[str, ...], list[Any]]] = {
    "several": (
        {"labels": lambda: F.Sequence(F.ClassLabel(names=["a", "b", "c"]))},
        lambda i: {"labels": [j for j in range(3) if i >> j & 1]},
        "multi_label_classification",
        ("a", "b", "c"),
        [[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(RECORDS)],
    ),
    "flags": (
        {"has": lambda: F.Tensor(shape=(2,), dtype=np.bool_)},
        lambda i: {"has": [i % 2 == 0, i > 3]},
        "multi_label_classification",
        ("has_0", "has_1"),
        [[int(i % 2 == 0), int(i > 3)] for i in range(RECORDS)],
    ),
    "a number": (
        {"age": lambda: F.Scalar(np.float32), "id": lambda: F.Scalar(np.int64)},
        lambda i: {"age": i / 2, "id": i},
        "regression",
        ("age",),
        [[i / 2] for i in range(RECORDS)],
    ),
    "numbers": (
        {"values": lambda: F.Tensor(shape=(2,), dtype=np.float32), "score": lambda: F.Scalar(np.float32)},
        lambda i: {"values": [i, -i], "score": 9},
        "regression",
        ("values_0", "values_1"),
        [[i, -i] for i in range(RECORDS)],
    ),
    "whole numbers": (
        {"values": lambda: F.Scalar(np.int32)},
        lambda i: {"values": i * 7},
        "regression",
        ("values",),
        [[i * 7] for i in range(RECORDS)],
    ),
    "a class by another name": (
        {"species": lambda: F.ClassLabel(names=["x", "y"])},
        lambda i: {"species": i % 2},
        "single_label_classification",
        ("x", "y"),
        [i % 2 for i in range(RECORDS)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_tfds_wrote(name: str, tmp_path: Path) -> None:
    features, said, problem, names, expected = CASES[name]
    data = open_dataset(written(tmp_path, {key: make() for key, make in features.items()}, said), "train")
    assert (data.target.problem_type, data.labels) == (problem, names)
    assert by_picture(data) == expected
    assert data[0]["label"].dtype == data.target.dtype


def test_several_features_of_other_names(tmp_path: Path) -> None:
    features = {"age": F.Scalar(np.float32), "weight": F.Scalar(np.float32)}
    directory = written(tmp_path, features, lambda i: {"age": i, "weight": i})
    with pytest.raises(BeitJaxError, match="of age, weight, call the one that counts label, labels or values"):
        open_dataset(directory, "train")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    lines = ["file_name,label,age,height"]
    for i in range(20):
        (folder / f"{i}.png").write_bytes(picture(i))
        lines.append(f"{i}.png,{'x;y' if i % 3 else '[]' if i % 2 else 'x'},{i},{-i / 4}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_table_of_several_classes_becomes_a_data_set(table: Path, tmp_path: Path) -> None:
    done = prepare_table(table, tmp_path / "data")
    assert done.splits == {"train": 18, "validation": 2} and done.labels == ("x", "y") and done.unit == "classes"
    assert prepare_table(table, tmp_path / "again").splits == done.splits
    train, held = (open_dataset(tmp_path / "data", split) for split in ("train", "validation"))
    seen = {
        record["file_name"]: record["label"].tolist()
        for data in (train, held)
        for record in map(data.__getitem__, range(len(data)))
    }
    assert seen == {f"{i}.png": [int(i % 3 > 0 or i % 2 == 0), int(i % 3 > 0)] for i in range(20)}
    counts = np.sum(list(train.said()), axis=0)
    np.testing.assert_allclose(balanced_positives(counts, len(train)), (len(train) - counts) / counts)
    options = DataOptions(batch_size=4, workers=0)
    with train_batches(train, options, lambda image, rng: image[:2, :2], seed=0, start_step=0) as batches:
        batch = next(batches)
    assert batch["label"].dtype == np.uint8 and batch["label"].shape == (4, 2)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        assert label.tolist() == seen[f"{image[0, 0, 0]}.png"]


def test_a_table_of_numbers_becomes_a_data_set(table: Path, tmp_path: Path) -> None:
    options = TableOptions(value_columns=("height", "age"))
    done = prepare_table(table, tmp_path / "data", options, held_out=0.25)
    assert done.splits == {"train": 15, "validation": 5} and done.unit == "values"
    data = open_dataset(tmp_path / "data", "train")
    assert data.labels == ("height", "age") and data.target.problem_type == "regression"
    assert by_picture(data) == sorted(by_picture(data), key=lambda label: label[1])
    assert all(label == [-label[1] / 4, label[1]] for label in by_picture(data))
    assert tfds.builder_from_directory(tmp_path / "data").as_data_source("train")[0]["values"].shape == (2,)


def test_images_that_a_table_names_and_that_are_missing_can_be_left_out(table: Path, tmp_path: Path) -> None:
    rows = ["file_name,label", *(f"{table}/{i}.png,{'ab'[i % 2]}" for i in range(20)), "gone.png,a"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(BeitJaxError, match=r"row 22, column file_name: .*gone.png: no such file"):
        prepare_table(tmp_path / "t.csv", tmp_path / "data")
    done = prepare_table(tmp_path / "t.csv", tmp_path / "data", skip_bad=True)
    assert sum(done.splits.values()) == 20 and done.left_out == ("gone.png: no such file, or an empty one",)
