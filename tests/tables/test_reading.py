"""Tables of features as other programs write them, read back: whole, in blocks, and with one line for what is none."""

import json
import zipfile
from pathlib import Path

import feature_tables
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from beit_jax.errors import BeitJaxError
from beit_jax.tables import read_arrow
from beit_jax.tables.reading import is_features, open_features, read_features

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((23, 5)).astype(np.float32)
NAMES = [f"folder/{i}, with a comma \u00e9.jpg" for i in range(23)]
METADATA = {"format": "beit-jax features 1", "model": "./native", "weights": "ab", "pooling": "mean", "shape": [5]}


@pytest.mark.parametrize("ending", feature_tables.ENDINGS)
def test_what_was_written_is_read(tmp_path: Path, ending: str) -> None:
    path = feature_tables.write(tmp_path / f"table.{ending}", NAMES, FEATURES, METADATA, batch=7)
    names, features, metadata = read_features(path)
    assert names == NAMES and features.dtype == np.float32 and np.array_equal(features, FEATURES)
    assert metadata == (METADATA if ending in feature_tables.WITH_METADATA else {})
    table = open_features(str(path))
    assert (table.width, table.names([22, 3, 3])) == (5, {3: NAMES[3], 22: NAMES[22]})
    blocks = list(table.blocks(4))  # other blocks than the file's
    assert [len(block) for block in blocks] == [4, 4, 4, 4, 4, 3]
    assert np.array_equal(np.concatenate([block.features for block in blocks]), FEATURES)
    assert [name for block in blocks for name in block.names()] == NAMES
    assert is_features(path)


@pytest.mark.parametrize("ending", feature_tables.ENDINGS)
def test_images_that_could_not_be_read_are_not_there(tmp_path: Path, ending: str) -> None:
    features = FEATURES.copy()
    features[[0, 9, 22]] = np.nan
    kept = np.delete(np.arange(23), [0, 9, 22])
    path = feature_tables.write(tmp_path / f"table.{ending}", NAMES, features, batch=5)
    names, found, _ = read_features(path)
    assert names == [NAMES[i] for i in kept] and np.array_equal(found, FEATURES[kept])
    assert open_features(path).names([8]) == {8: NAMES[10]}


@pytest.mark.parametrize("ending", ["arrow", "npz", "safetensors"])
def test_files_that_can_be_are_mapped_and_not_copied(tmp_path: Path, ending: str) -> None:
    path = feature_tables.write(tmp_path / f"table.{ending}", NAMES, FEATURES)
    features = read_features(path).features
    assert not features.flags.writeable and not features.flags.owndata


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_features_of_tokens_are_rows(tmp_path: Path, ending: str) -> None:
    tokens = RNG.standard_normal((4, 3, 5)).astype(np.float32)
    found = read_features(feature_tables.write(tmp_path / f"table.{ending}", NAMES[:4], tokens.reshape(4, 15)))
    assert found.features.shape == (4, 15)
    np.savez(tmp_path / "tokens.npz", features=tokens, images=np.array(NAMES[:4]))
    assert np.array_equal(read_features(tmp_path / "tokens.npz").features, tokens.reshape(4, 15))


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16(), 5)])
def test_lists_and_names_of_any_type_of_arrows_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    """Other programs write lists of any length and doubles, and names as categories."""
    rounded = FEATURES.astype(np.float16)
    images = pa.array(NAMES, pa.large_string()).dictionary_encode()
    table = pa.table({"other": range(23), "image": images, "features": pa.array(list(rounded)).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet", row_group_size=6)
    with pyarrow.ipc.new_stream(tmp_path / "table.arrow", table.schema) as writer:  # as Hugging Face's `datasets`
        writer.write_table(table.slice(2), max_chunksize=4)
    for name, start in (("table.parquet", 0), ("table.arrow", 2)):
        names, features, _ = read_features(tmp_path / name)
        assert names == NAMES[start:] and np.array_equal(features, rounded[start:].astype(np.float32))


def test_tensors_of_arrows_own_type_are_read(tmp_path: Path) -> None:
    kind = pa.fixed_shape_tensor(pa.float32(), [5])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(FEATURES.ravel()), 5)
    table = pa.table({"image": NAMES, "features": pa.ExtensionArray.from_storage(kind, lists)})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    assert np.array_equal(read_features(tmp_path / "table.parquet").features, FEATURES)


def test_other_forms_of_the_same_arrays_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "packed.npz", features=FEATURES.astype(np.float64), images=np.array(NAMES))
    np.savez(tmp_path / "fortran.npz", features=np.asfortranarray(FEATURES), images=np.array(NAMES))
    np.savez(tmp_path / "empty.npz", features=FEATURES[:0], images=np.array([], "U1"))
    assert np.array_equal(read_features(tmp_path / "packed.npz").features, FEATURES)
    assert np.array_equal(read_features(tmp_path / "fortran.npz").features, FEATURES)
    assert read_features(tmp_path / "empty.npz").features.shape == (0, 5)
    lines = [{"features": row.reshape(5, 1).tolist(), "image": name} for name, row in zip(NAMES, FEATURES, strict=True)]
    (tmp_path / "nested.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert np.array_equal(read_features(tmp_path / "nested.jsonl").features, FEATURES)


def test_a_folder_of_tables_is_one_table(tmp_path: Path) -> None:
    """What Ray Data, Spark and jobs of an array write."""
    for part, start in enumerate((0, 10, 15)):
        stop = (10, 15, 23)[part]
        path = tmp_path / f"part-{part}.parquet"
        feature_tables.write(path, NAMES[start:stop], FEATURES[start:stop], METADATA)
    (tmp_path / "_SUCCESS").write_text("")
    names, features, metadata = read_features(tmp_path)
    assert names == NAMES and np.array_equal(features, FEATURES) and metadata == METADATA
    assert is_features(tmp_path) and open_features(tmp_path).names([12]) == {12: NAMES[12]}
    feature_tables.write(tmp_path / "part-3.parquet", NAMES[:2], FEATURES[:2], {**METADATA, "weights": "cd"})
    with pytest.raises(BeitJaxError, match=r'part-3\.parquet: weights is "cd", that of .*part-0\.parquet is "ab"'):
        read_features(tmp_path)
    feature_tables.write(tmp_path / "part-3.parquet", NAMES[:2], FEATURES[:2, :3], METADATA)
    with pytest.raises(BeitJaxError, match=r"part-3\.parquet: 3 numbers in a row, .*part-0\.parquet has 5"):
        read_features(tmp_path)


def test_what_is_no_table_of_features_is_told_in_one_line(tmp_path: Path) -> None:
    def text(name: str, content: str | bytes) -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    np.savez(tmp_path / "image.npz", np.zeros((4, 4, 3), np.uint8))
    np.savez(tmp_path / "counts.npz", features=FEATURES, images=np.array(NAMES[:2]))
    np.savez(tmp_path / "integers.npz", features=np.arange(6).reshape(3, 2), images=np.array(NAMES[:3]))
    np.savez(tmp_path / "objects.npz", features=FEATURES, images=np.array(NAMES, object))
    np.savez(tmp_path / "flat.npz", features=FEATURES[:, 0], images=np.array(NAMES))
    np.savez(tmp_path / "said.npz", features=FEATURES, images=np.array(NAMES), beit_jax=np.array("[1"))
    save_file({"kernel": FEATURES}, tmp_path / "weights.safetensors")
    save_file({"features": FEATURES}, tmp_path / "nameless.safetensors")
    labels = pa.table({"image": NAMES, "classes": [[1]] * 23})
    pyarrow.parquet.write_table(labels, tmp_path / "classes.parquet")
    pyarrow.parquet.write_table(
        pa.table({"image": NAMES[:2], "features": [[1.0], [1.0, 2.0]]}), tmp_path / "ragged.parquet"
    )
    pyarrow.parquet.write_table(pa.table({"image": NAMES[:1], "features": [[1]]}), tmp_path / "whole.parquet")
    pyarrow.parquet.write_table(pa.table({"image": NAMES[:1], "features": [[1.0, None]]}), tmp_path / "hole.parquet")
    whole = (tmp_path / "classes.parquet").read_bytes()
    (tmp_path / "empty").mkdir()
    cases = {
        "missing.parquet": "no such file",
        "empty": "no table of features in this folder",
        text("cat.jpg", b"x"): r"expected a name ending in \.parquet, .*\.csv$",
        text("damaged.parquet", whole[:-9]): "damaged or no Parquet file",
        text("damaged.arrow", b"nothing of the kind"): "damaged or no Arrow file",
        text("damaged.npz", b"PK\x03\x04 no archive"): r"damaged or no \.npz file",
        text("damaged.safetensors", b"\xff" * 20): "damaged or no safetensors file",
        "image.npz": "expected the arrays features and images, found arr_0; beit-jax features",
        "counts.npz": "expected a name for each of 23 rows, found 2 names",
        "integers.npz": r"expected features .* found \[0, 2\] int64",
        "objects.npz": "expected images.npy to be text or numbers, found Python objects",
        "flat.npz": r"expected features \[images, numbers\] of floats, found \[0\] float32",
        "said.npz": "its metadata beit_jax are no JSON object",
        "weights.safetensors": "expected the tensor features, found kernel",
        "nameless.safetensors": "expected a JSON list of names as images in the metadata, found none",
        "classes.parquet": "expected the columns image and features, found image, classes",
        "ragged.parquet": "row 1: expected 1 numbers as those before, found 2",
        "whole.parquet": r"expected features to be lists of floats, found list<\w+: int64>",
        "hole.parquet": "a number is missing",
        text("labels.csv", "image,rank,label\na.jpg,1,cat\n"): "expected the columns image, f0, f1, ..., found image",
        text("short.csv", "image,f0,f1\na.jpg,1\n"): "line 2: expected 3 cells, found 2",
        text("word.csv", "image,f0\na.jpg,1\nb.jpg,two\n"): "line 3: expected numbers, found .*two",
        text("latin.csv", b"image,f0\n\xe9,1\n"): "no UTF-8 text",
        text("broken.jsonl", '{"image": "a.jpg", "features": [1]}\n{"image"\n'): "line 2: expected a JSON object",
        text("labels.jsonl", '{"image": "a.jpg", "classes": []}\n'): "numbers as features in line 1, found the keys",
        text("ragged.jsonl", '{"image": "a", "features": [1, 2]}\n{"image": "b", "features": [1]}'): "line 2: expec",
        text("array.jsonl", "[1, 2]\n"): "expected image and features in line 1",
        text("nothing.jsonl", ""): "expected lines with image and features, found none",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(BeitJaxError, match=message) as caught:
            read_features(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    assert not is_features(tmp_path / "image.npz") and not is_features(tmp_path / "cat.jpg")


def test_a_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = feature_tables.write(tmp_path / "table.parquet", NAMES, FEATURES)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(BeitJaxError, match=r"pyarrow is not installed; pip install 'beit-jax\[tables\]'"):
        open_features(path)
    assert read_arrow.COLUMNS  # imported without it


def test_members_behind_others_and_with_extra_fields_are_found(tmp_path: Path) -> None:
    """numpy writes a local header of its own; other programs' are longer."""
    np.savez(tmp_path / "plain.npz", features=FEATURES, images=np.array(NAMES))
    with zipfile.ZipFile(tmp_path / "plain.npz") as old, zipfile.ZipFile(tmp_path / "new.npz", "w") as new:
        new.writestr("notes.txt", "anything")
        for info in old.infolist():
            other = zipfile.ZipInfo(info.filename)
            other.extra = b"\x99\x99\x04\x00abcd"
            new.writestr(other, old.read(info))
    names, features, _ = read_features(tmp_path / "new.npz")
    assert names == NAMES and np.array_equal(features, FEATURES)
