"""Directories and indexes that lie: refused with one line that names the entry, before any tensor is read.

The letters are the rows of the fault catalogue these tests were written from.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weight_files import read_all, refusal

from beit_jax.convert.files.checkpoint import open_checkpoint

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.zeros(2), "b": torch.ones(3)},
    "model-00002-of-00002.safetensors": {"c": torch.full((4,), 2.0)},
}
FIRST, SECOND = SHARDS
INDEX = "model.safetensors.index.json"


def weight_map() -> dict[str, Any]:
    return {name: shard for shard, tensors in SHARDS.items() for name in tensors}


def write_index(directory: Path, index: dict[str, Any] | str) -> Path:
    path = directory / INDEX
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for shard, tensors in SHARDS.items():
        save_file(tensors, directory / shard)
    write_index(directory, {"metadata": {"total_size": 36}, "weight_map": weight_map()})
    return directory


def assert_read(directory: Path) -> None:
    arrays = read_all(open_checkpoint(directory))
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [0] * 2, "b": [1] * 3, "c": [2] * 4}


def test_shards_are_read(sharded: Path) -> None:
    assert_read(sharded)
    assert_read(sharded / INDEX)
    with open_checkpoint(sharded) as checkpoint:
        assert checkpoint.format == "safetensors, 2 shards"
        assert checkpoint.files == (sharded / FIRST, sharded / SECOND)
        assert checkpoint.tensors["c"].file == sharded / SECOND
        assert list(checkpoint.tensors) == ["a", "b", "c"]
        assert checkpoint.notes == ()


def test_pytorch_shards_are_read(tmp_path: Path) -> None:
    names = {shard: shard.replace("model", "pytorch_model").replace("safetensors", "bin") for shard in SHARDS}
    for shard, tensors in SHARDS.items():
        torch.save(tensors, tmp_path / names[shard])
    index = {"metadata": {}, "weight_map": {name: names[shard] for name, shard in weight_map().items()}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_read(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "pytorch zip, 2 shards"
    refusal(tmp_path, "one set of weights", "model_ema", prefer="model_ema")


# B1: an index that points elsewhere


@pytest.mark.parametrize(
    "entry",
    [
        lambda outside: f"../{outside.name}",
        lambda outside: str(outside),
        lambda outside: f"..\\{outside.name}",
        lambda outside: f"sub/../../{outside.name}",
        lambda outside: f"C:{outside.name}",
        lambda outside: f"file://{outside}",
        lambda outside: f"{FIRST}\0.safetensors",
        lambda outside: "..",
        lambda outside: "",
        lambda outside: None,
        lambda outside: [str(outside)],
    ],
    ids=["..", "absolute", "backslash", "through a folder", "drive", "URL", "NUL", "parent", "empty", "null", "list"],
)
def test_entry_outside_the_directory(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, entry: Callable[[Path], object]
) -> None:
    outside = sharded.parent / "outside.safetensors"
    save_file(SHARDS[SECOND], outside)
    (sharded / "sub").mkdir()
    index = write_index(sharded, {"weight_map": weight_map() | {"c": entry(outside)}})
    opened = []
    real_open = os.open

    def record(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(Path(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", record)
    refusal(sharded, index, "tensor c", "expected the name of a file beside it")
    assert opened == [index]


def test_link_out_of_the_directory(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    os.rename(sharded / SECOND, outside)
    (sharded / SECOND).symlink_to(outside)
    refusal(sharded, sharded / INDEX, SECOND, outside, "expected a file in the same directory")


def test_link_within_the_directory(sharded: Path) -> None:
    os.rename(sharded / SECOND, sharded / "real")
    (sharded / SECOND).symlink_to("real")
    assert_read(sharded)


def test_links_of_a_hugging_face_cache(sharded: Path, tmp_path: Path) -> None:
    """snapshots/<revision>/ holds links into blobs/, which is outside the snapshot."""
    repository = tmp_path / "models--microsoft--beit"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        os.rename(file, repository / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert_read(snapshot)
    (snapshot / SECOND).unlink()
    (snapshot / SECOND).symlink_to("../../../secret.safetensors")
    save_file(SHARDS[SECOND], tmp_path / "secret.safetensors")
    refusal(snapshot, SECOND, tmp_path / "secret.safetensors")


# B2: a shard is missing


def test_missing_shard(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    refusal(sharded, sharded / INDEX, FIRST, "not there", "2 of 3 tensors")


def test_broken_link_to_a_shard(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    (sharded / FIRST).symlink_to("gone")
    refusal(sharded, FIRST, "not there", "2 of 3 tensors")


def test_damaged_shard(sharded: Path) -> None:
    whole = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(whole[:-1])
    refusal(sharded, sharded / SECOND, "truncated", len(whole), len(whole) - 1)


def test_no_file_stays_open_after_a_refusal(sharded: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files as Linux shows them")
    write_index(sharded, {"weight_map": weight_map() | {"d": SECOND}})
    before = len(os.listdir("/proc/self/fd"))
    refusal(sharded, "tensor d")
    assert len(os.listdir("/proc/self/fd")) == before


# B3, B4: index and shards disagree


def test_listed_but_in_no_shard(sharded: Path) -> None:
    write_index(sharded, {"weight_map": weight_map() | {"d": SECOND}})
    refusal(sharded, sharded / INDEX, "tensor d", f"the index says {SECOND}", "no shard holds it")


def test_listed_in_another_shard(sharded: Path) -> None:
    write_index(sharded, {"weight_map": weight_map() | {"a": SECOND}})
    refusal(sharded, sharded / INDEX, "tensor a", f"the index says {SECOND}", f"it is in {FIRST}")


def test_in_a_shard_but_not_listed(sharded: Path) -> None:
    listed = weight_map()
    del listed["b"]
    write_index(sharded, {"weight_map": listed})
    refusal(sharded, sharded / INDEX, "tensor b", "the index does not list it", f"it is in {FIRST}")


@pytest.mark.parametrize("value", [0.0, 5.0], ids=["same values", "other values"])
def test_tensor_in_two_shards(sharded: Path, value: float) -> None:
    save_file(SHARDS[SECOND] | {"a": torch.full((2,), value)}, sharded / SECOND)
    refusal(sharded, sharded / INDEX, "tensor a", FIRST, SECOND, "both")


# B5: not an index


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "not valid JSON"),
        ('{"weight_map": {', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "an empty one"),
        ('{"weight_map": null}', "found none"),
        ('{"weight_map": ["a"]}', "found list"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "names a twice"),
        ('{"weight_map": {"a": "x"}, "weight_map": {"a": "y"}}', "names weight_map twice"),
        ('{"weight_map": {"a": 3}}', "tensor a to 3"),
        ("version https://git-lfs.github.com/spec/v1\n", "not valid JSON"),
        ("", "empty (0 bytes)"),
    ],
)
def test_not_an_index(sharded: Path, content: str, said: str) -> None:
    refusal(sharded, write_index(sharded, content), said)


def test_index_that_is_not_text(sharded: Path) -> None:
    (sharded / INDEX).write_bytes(b'{"\xff": 1}')
    refusal(sharded, sharded / INDEX, "not valid JSON")


def test_index_over_the_limit(sharded: Path) -> None:
    write_index(sharded, " " * (8 * 2**20) + "{}")
    refusal(sharded, sharded / INDEX, 8 * 2**20 + 2, "at most 8388608")


@pytest.mark.parametrize("name", ["\x1b[31mred\n", "../../etc/passwd"])
def test_hostile_names_in_an_index(sharded: Path, name: str) -> None:
    write_index(sharded, {"weight_map": weight_map() | {name: SECOND}})
    refusal(sharded, "no shard holds it")
    write_index(sharded, {"weight_map": weight_map() | {"d": "\x1b[31mred\n"}})
    refusal(sharded, "\\x1b[31mred\\n", "1 of 4 tensors")


# B6: a wrong total


def test_wrong_total_size_is_a_note(sharded: Path) -> None:
    write_index(sharded, {"metadata": {"total_size": 12}, "weight_map": weight_map()})
    assert_read(sharded)
    with open_checkpoint(sharded) as checkpoint:
        (note,) = checkpoint.notes
        assert all(part in note for part in (str(sharded / INDEX), "total_size is 12", "36 bytes"))


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": None}, {"total_size": 36.0}, []])
def test_no_total_size(sharded: Path, metadata: object) -> None:
    write_index(sharded, {"metadata": metadata, "weight_map": weight_map()})
    with open_checkpoint(sharded) as checkpoint:
        assert checkpoint.notes == ()


# B7: several formats side by side, and none


def test_order_of_preference(sharded: Path) -> None:
    names = ["model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"]
    save_file({"single": torch.ones(1)}, sharded / names[0])
    torch.save({"bin": torch.ones(1)}, sharded / names[2])
    (sharded / names[3]).write_text(json.dumps({"weight_map": {"bin": names[2]}}))
    expected = [["single"], ["a", "b", "c"], ["bin"], ["bin"]]
    for number, chosen in enumerate(names):
        with open_checkpoint(sharded) as checkpoint:
            assert list(checkpoint.tensors) == expected[number]
            assert checkpoint.notes == tuple(f"{name} ignored: {chosen} is preferred" for name in names[number + 1 :])
        if chosen != names[2]:
            (sharded / chosen).unlink()
        else:
            os.rename(sharded / chosen, sharded / "moved.bin")
            (sharded / names[3]).write_text(json.dumps({"weight_map": {"bin": "moved.bin"}}))


def test_no_weights(tmp_path: Path) -> None:
    for name in ("config.json", "\x1b[31m.pth"):
        (tmp_path / name).write_text("{}")
    refusal(tmp_path, tmp_path, "no weights", "expected one of model.safetensors", "\\x1b[31m.pth, config.json")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", "found nothing")


def test_unreadable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", deny)  # the tests may run as root, whom no mode stops
    refusal(tmp_path, tmp_path, "Permission denied")
