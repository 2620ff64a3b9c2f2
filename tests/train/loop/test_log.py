"""The reports of a run: records survive a killed process, and lines show the metrics that matter."""

import json
import signal
import struct
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from clock import Time
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from beit_jax.errors import BeitJaxError
from beit_jax.train.loop.log import BOARD, Log, describe
from beit_jax.train.loop.metrics_file import METRICS, keep_until


def records(directory: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (directory / METRICS).read_text().splitlines()]


def plain(**options: Any) -> Console:
    return Console(file=StringIO(), width=400, **options)


def shown(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def log(directory: Path, **options: Any) -> Log:
    return Log(directory, **{"total_steps": 100, "tensorboard": False, "console": plain()} | options)


# --- Records ----------------------------------------------------------------------------------------------------------


def test_a_record_per_line_and_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    with log(tmp_path) as run:
        run.write(10, {"loss": 2.5, "grad_norm": float("nan")})
        run.write(20, {"loss": float("inf"), "skipped": 1})
    assert records(tmp_path) == [
        {"step": 10, "loss": 2.5, "grad_norm": None},
        {"step": 20, "loss": None, "skipped": 1.0},
    ]


def test_resuming_drops_the_steps_that_are_done_again_and_half_a_line(tmp_path: Path) -> None:
    with log(tmp_path) as run:
        for step in (10, 20, 30, 40):
            run.write(step, {"loss": float(step)})
        run.write(30, {"eval/top1": 0.5})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 20, "lo')
    with log(tmp_path, start_step=30) as run:
        run.write(40, {"loss": 41.0})
    assert [(record["step"], record.get("loss")) for record in records(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, 30.0),
        (30, None),
        (40, 41.0),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS]


def test_a_run_from_the_beginning_starts_an_empty_log(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with log(tmp_path) as run:
            run.write(0, {"eval/top1": 0.1})
            run.write(10, {"loss": loss})
    assert [record.get("loss") for record in records(tmp_path)] == [None, 2.0]


def test_a_file_that_has_nothing_to_drop_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n')
    before = path.stat()
    keep_until(path, 1)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"loss": 1}', '{"step": "1"}', ""])
def test_a_finished_line_that_is_no_record_is_refused_and_kept(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS).write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = (tmp_path / METRICS).read_bytes()
    with pytest.raises(BeitJaxError, match=r'line 2: expected a JSON object with a "step"; move the file away'):
        log(tmp_path, start_step=2).__enter__()
    assert (tmp_path / METRICS).read_bytes() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from beit_jax.train.loop.log import Log
with Log(Path(sys.argv[1]), total_steps=9, quiet=True, tensorboard=False) as run:
    for step in range(1, 6):
        run.write(step, {"loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_no_record(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"^/dev/full: cannot be written \(No space left on device\)"):  # noqa: SIM117
        with log(tmp_path) as run:
            run._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 # every write to it fails like this
            run.write(1, {"loss": 1.0})
    run._file.close()


def test_a_directory_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"no/metrics.jsonl: cannot be written \(No such file or directory\)"):
        log(tmp_path / "no").__enter__()


def test_only_the_first_process_writes_and_shows(tmp_path: Path) -> None:
    console = plain()
    with log(tmp_path, process_index=1, tensorboard=True, console=console) as run:
        run.write(1, {"loss": 1.0})
        run.advance(2)
        run.note("hello")
    assert list(tmp_path.iterdir()) == [] and shown(console) == ""


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(directory: Path) -> list[list[Event]]:
    """The events of every file, oldest file first. A record: length, checksum, bytes, checksum."""
    files = []
    for path in sorted((directory / BOARD).iterdir(), key=lambda path: path.stat().st_ctime_ns):
        data, found = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event()
            event.ParseFromString(data[12 : 12 + length])
            found.append(event)
            data = data[16 + length :]
        files.append(found)
    return files


def scalars(found: list[Event]) -> list[tuple[str, int, float]]:
    return [(value.tag, event.step, value.simple_value) for event in found for value in event.summary.value]


def test_tensorboard_has_every_scalar_and_hides_the_steps_that_are_done_again(tmp_path: Path) -> None:
    with log(tmp_path, tensorboard=True) as run:
        for step in (10, 20, 30):
            run.write(step, {"loss": step / 10, "accuracy": 0.5})
    with log(tmp_path, tensorboard=True, start_step=20) as run:
        run.write(30, {"loss": 9.0})
    first, second = events(tmp_path)
    assert scalars(first) == [
        (name, step, value) for step in (10, 20, 30) for name, value in (("loss", step / 10), ("accuracy", 0.5))
    ]
    assert scalars(second) == [("loss", 30, 9.0)]
    for found, purge in ((first, 0), (second, 21)):
        (restart,) = [event for event in found if event.HasField("session_log")]
        assert restart.step == purge and restart.session_log.status == restart.session_log.START


def test_tensorboard_is_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(BeitJaxError, match="tensorboardX is not installed; pip install"):
        log(tmp_path, tensorboard=True).__enter__()


# --- What people see --------------------------------------------------------------------------------------------------

TRAINING = {
    "loss": 2.34567,
    "learning_rate": 1.25e-4,
    "images_per_second": 1812.34,
    "mfu": 0.4123,
    "input_wait": 0.031,
    "skipped": 2,
}


def test_elsewhere_than_on_a_terminal_every_record_is_a_line(tmp_path: Path) -> None:
    now, console = Time(), plain()
    with log(tmp_path, total_steps=30_000, start_step=1000, console=console, now=now) as run:
        now.go(500.0)
        run.write(1500, TRAINING)
        run.advance(1600)
        run.write(1600, {"eval/top1": 0.91234})
        run.note("saved [1600]")
    assert shown(console).splitlines() == [
        "step 1,500/30,000  loss 2.3457  lr 1.25e-04  1,812.3 images/s  MFU 41.2 %  input wait 3 %  2 skipped  "
        "ETA 7:55:00",
        "step 1,600/30,000  eval/top1 0.9123",
        "saved [1600]",
    ]


def test_on_a_terminal_a_line_keeps_up_and_other_records_stand_above_it(tmp_path: Path) -> None:
    now, console = Time(), plain(force_terminal=True)
    with log(tmp_path, console=console, now=now) as run:
        now.go(10.0)
        run.write(10, TRAINING)
        run.advance(11)
        run.write(12, {"eval/top1": 0.5})
    text = shown(console)
    assert "12/100" in text and "ETA 0:01:30" in text and "loss 2.3457" in text
    assert "step 12/100  eval/top1 0.5" in text
    assert "step 10/100" not in text, "a training record does not scroll"
    assert [record["step"] for record in records(tmp_path)] == [10, 12]


def test_quiet_shows_nothing_and_writes_all_the_same(tmp_path: Path) -> None:
    console = plain(force_terminal=True)
    with log(tmp_path, quiet=True, console=console) as run:
        run.write(1, {"loss": 1.0})
        run.note("hello")
    assert shown(console) == "" and len(records(tmp_path)) == 1


def test_what_is_unknown_or_nothing_is_left_out() -> None:
    assert describe({"loss": 1.0, "skipped": 0.0}) == "loss 1.0000"
    assert describe({"loss": float("nan"), "grad_norm": 12.34567}, eta=61.0) == "loss nan  ETA 0:01:01  grad_norm 12.35"
    assert describe({"eval/top1": 0.5}, eta=61.0) == "eval/top1 0.5"
