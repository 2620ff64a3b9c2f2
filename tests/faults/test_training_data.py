"""Training data as it breaks: lost and damaged files, wrong labels, processes that die. Rows F of the fault catalogue.

Damaged images are in tests/train/augmentation/test_decode.py, damaged archives and folders in
tests/train/data/test_prepare.py.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit_jax.errors import BeitJaxError
from beit_jax.train.augmentation.classification import Transform
from beit_jax.train.data import shards
from beit_jax.train.data.batches import train_batches
from beit_jax.train.data.datasets import open_dataset
from beit_jax.train.data.prepare import prepare_ade20k, prepare_folder, write
from beit_jax.train.data.shards import INFO
from beit_jax.train.data.sources import Source, Split, classification_features
from beit_jax.train.recipe import DataOptions

RECORDS, LABELS = 40, ("ant", "bee", "cat", "dog")
TIMEOUT = 120  # seconds, of every child process


def picture(number: int) -> bytes:
    """Incompressible: damage in the middle of a shard is damage in a record."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def examples() -> Sequence[dict[str, Any]]:
    return [{"image": picture(i), "label": i % 4, "file_name": f"image_{i}.png"} for i in range(RECORDS)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four shards of ten records."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 45_000)
    splits = {"train": Split(RECORDS, examples())}
    source = Source("tiny", "", LABELS, classification_features(LABELS), splits, 0)
    directory = write(source, tmp_path / "data").directory
    assert [shard.take for shard in open_dataset(directory, "train").shards] == [10] * 4
    return directory


def shard(data: Path, index: int) -> Path:
    return data / f"tiny-train.array_record-{index:05d}-of-00004"


def transform() -> Transform:
    return lambda image, rng: np.asarray(image)[:4, :4]


def stream(data: Path, workers: int = 0, max_bad: float = 0.5) -> Any:
    options = DataOptions(batch_size=8, workers=workers, max_bad=max_bad)
    return train_batches(open_dataset(data, "train"), options, transform(), seed=0, start_step=0)


# Files


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_records(data: Path) -> None:
    splits = json.loads((data / INFO).read_text())["splits"]
    edit(data / INFO, splits=[splits[0] | {"shardLengths": ["0"] * 4}])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: os.truncate(shard(at, 2), 30_000), r"-00002-of-00004: expected 10 records, found none: cut off"),
        (lambda at: shard(at, 2).write_bytes(b""), r"-00002-of-00004: expected 10 records, found none: cut off"),
        (lambda at: shard(at, 2).write_bytes(os.urandom(70_000)), r"-00002-of-00004: expected 10 records, found none"),
        (lambda at: shard(at, 2).unlink(), r"-00002-of-00004: no such file, a part of the data set"),
        (lambda at: os.replace(shard(at, 3), at / "elsewhere"), r"-00003-of-00004: no such file"),
        (lambda at: (at / INFO).unlink(), r"no dataset_info.json.*beit-jax prepare"),
        (lambda at: (at / INFO).write_text("{"), r"dataset_info.json: damaged"),
        (lambda at: (at / "features.json").unlink(), r"dataset_info.json: damaged"),
        (lambda at: (at / "features.json").write_text("[]"), r"dataset_info.json: damaged"),
        (
            lambda at: (at / "label.labels.txt").write_bytes(b"ant\nb\xff\n"),
            r"labels.txt: no UTF-8 text at byte 5; correct",
        ),
        (lambda at: edit(at / INFO, fileFormat="tfrecord"), r"array_record.*tfrecord"),
        (no_records, r"the split train has no records"),
    ],
)
def test_damaged_data_is_one_line_that_names_the_file(damage: Callable[[Path], Any], message: str, data: Path) -> None:
    damage(data)
    with pytest.raises(BeitJaxError, match=message) as caught:
        open_dataset(data, "train")
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_data_set(data: Path) -> None:
    write(
        Source("tiny", "", LABELS, classification_features(LABELS), {"train": Split(3, examples()[:3])}, 0),
        data.with_name("other"),
    )
    (other,) = data.with_name("other").glob("*array_record*")
    os.replace(other, shard(data, 1))
    with pytest.raises(BeitJaxError, match="-00001-of-00004: expected 10 records, found 3;"):
        open_dataset(data, "train")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("validation", "no split validation, found train"),
        ("", "no split '', found train"),
        ("train[nonsense]", r"split train\[nonsense\]: "),
        ("train[:0]", r"the split train\[:0\] has no records"),
    ],
)
def test_splits_that_are_not_there(split: str, message: str, data: Path) -> None:
    with pytest.raises(BeitJaxError, match=message):
        open_dataset(data, split)


def test_data_without_labels(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / part).mkdir(parents=True)
            mode = "RGB" if kind == "images" else "L"
            Image.new(mode, (4, 4)).save(tmp_path / "ade" / kind / part / "a.png")
    prepare_ade20k(tmp_path / "ade", tmp_path / "data")
    found = r"expected image \(Image\) and label \(ClassLabel\), .*found .*segmentation \(Image\)"
    with pytest.raises(BeitJaxError, match=found):
        open_dataset(tmp_path / "data", "train")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """F8, C: simulated by a limit on the size of files, in a process of its own."""
    for i in range(60):
        path = tmp_path / "tree" / LABELS[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    code = (
        "import resource, sys; from pathlib import Path; from beit_jax.errors import BeitJaxError\n"
        "from beit_jax.train.data.prepare import prepare_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: prepare_folder(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except BeitJaxError as error: print(error); sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tree"), str(tmp_path / "data")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 2, done.stderr
    assert str(tmp_path / "data") in done.stdout and "may not become that large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree"]


def test_preparation_that_is_killed_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    (tmp_path / "tree/ant").mkdir(parents=True)
    for i in range(5):
        (tmp_path / f"tree/ant/{i}.png").write_bytes(picture(i))
    code = (
        "import os, sys; from pathlib import Path; from beit_jax.train.data import prepare\n"
        "prepare._verify = lambda *_: os.kill(os.getpid(), 9)\n"
        "prepare.prepare_folder(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tree"), str(tmp_path / "data")]
    assert subprocess.run(command, timeout=TIMEOUT).returncode == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    prepare_folder(tmp_path / "tree", tmp_path / "data")  # and what it left is no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "tree"]


# Records


def test_a_flipped_bit_in_a_record(data: Path) -> None:
    path = shard(data, 1)
    content = bytearray(path.read_bytes())
    place = content.index(picture(14)[500:560]) + 20
    content[place] ^= 1
    path.write_bytes(content)
    with stream(data) as batches:
        for _ in range(RECORDS // 8):
            next(batches)
        assert list(batches.bad.reasons) == [14]
        assert "tiny-train.array_record-00001-of-00004: record 4: damaged (Corrupted" in batches.bad.reasons[14]
    with stream(data, max_bad=0.001) as batches, pytest.raises(BeitJaxError, match="1 of 40 records cannot be read"):
        for _ in range(RECORDS // 8):
            next(batches)


def test_records_that_are_something_else(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    source = Source("tiny", "", LABELS, classification_features(LABELS), {"train": Split(3, examples()[:3])}, 0)
    data = write(source, tmp_path / "data").directory
    (path,) = data.glob("*array_record*")
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in (b"\xff no protocol buffer", b"", classification_features(LABELS).serialize_example(examples()[2])):
        writer.write(record)
    writer.close()
    dataset = open_dataset(data, "train")
    for index in (0, 1):
        with pytest.raises(BeitJaxError, match=rf"-00000-of-00001: record {index}: no classified image"):
            dataset[index]
    assert dataset[2]["file_name"] == "image_2.png"


def test_a_label_out_of_range(data: Path) -> None:
    """JAX would clamp it, silently."""
    (data / "label.labels.txt").write_text("ant\nbee\n")
    features = (data / "features.json").read_text()
    (data / "features.json").write_text(features.replace('"numClasses": "4"', '"numClasses": "2"'))
    dataset = open_dataset(data, "train")
    assert dataset.labels == ("ant", "bee") and dataset[1]["label"] == 1
    with pytest.raises(BeitJaxError, match=r"-00000-of-00004: record 2: label 2, expected 0 to 1"):
        dataset[2]
    with (
        stream(data, max_bad=0.1) as batches,
        pytest.raises(BeitJaxError, match=r"5 of 40 .* label [23], expected 0 to 1"),
    ):
        for _ in range(RECORDS // 8):
            next(batches)


def test_storage_that_fails_is_no_bad_record(data: Path) -> None:
    """What can be read again tomorrow must not be replaced today."""
    dataset = open_dataset(data, "train")
    shard(data, 1).unlink()
    options = DataOptions(batch_size=8, workers=0, max_bad=1.0)
    with (
        train_batches(dataset, options, transform(), seed=0, start_step=0) as batches,
        pytest.raises(BeitJaxError, match=r"No such file or directory.*check the storage") as caught,
    ):
        for _ in range(RECORDS // 8):
            next(batches)
    assert "\n" not in str(caught.value)


# Processes


def children(process: int) -> list[int]:
    """Workers only: Python's resource tracker is a child too."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status, command = (path / "stat").read_text(), (path / "cmdline").read_bytes()
        except OSError:
            continue
        if int(status.rpartition(")")[2].split()[1]) == process and b"spawn_main" in command:
            found.append(int(path.name))
    return found


def gone(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


linux = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")


@linux
def test_workers_leave_signals_to_their_parent_and_their_death_is_one_line(data: Path) -> None:
    before = set(children(os.getpid()))
    with stream(data, workers=1) as batches:
        next(batches)
        (worker,) = set(children(os.getpid())) - before
        for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal and a batch system send them to all
            os.kill(worker, number)
        for _ in range(10):
            next(batches)
        os.kill(worker, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(BeitJaxError, match=r"exit code -9.*check the storage, the memory") as caught:
            for _ in range(10):
                next(batches)
        assert time.monotonic() - started < 10
        assert "\n" not in str(caught.value)
    assert wait(lambda: gone(worker))


CHILD = """
import sys
from pathlib import Path
import numpy as np
from beit_jax.train.data.batches import train_batches
from beit_jax.train.data.datasets import open_dataset
from beit_jax.train.recipe import DataOptions

if __name__ == "__main__":
    dataset, options = open_dataset(Path(sys.argv[1]), "train"), DataOptions(batch_size=8, workers=1)
    batches = train_batches(dataset, options, lambda image, rng: np.asarray(image)[:4, :4], seed=0, start_step=0)
    found = batches.__enter__()
    print(next(found)["image"].shape, flush=True)
    sys.stdin.readline()
"""


@linux
@pytest.mark.parametrize("end", ["killed", "unclosed"])
def test_workers_end_with_their_parent(end: str, data: Path, tmp_path: Path) -> None:
    """Without absl's flags parsed, as in any program of ours (F11)."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    with subprocess.Popen(
        [sys.executable, str(script), str(data)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            assert child.stdout.readline() == "(8, 4, 4, 3)\n"
            workers = children(child.pid)
            assert len(workers) == 1
            if end == "killed":
                child.kill()
            else:
                child.stdin.close()
            child.wait(TIMEOUT)
        finally:
            child.kill()
    assert wait(lambda: all(gone(worker) for worker in workers))
