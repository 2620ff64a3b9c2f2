"""Runs of two processes of which one fails, is killed, hangs, differs or is told to stop: what the other one does.

Every process is a real one with two virtual devices; they talk over loopback.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ports import free_address
from virtual import xla_flags

from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.distributed.peers import HUNG, LOST
from beit_jax.train.loop.watch import INTERRUPTED
from beit_jax.weights import load

pytestmark = pytest.mark.thorough  # two processes for every test

SCRIPT = Path(__file__).parents[1] / "support" / "host.py"
LIMIT = 240.0  # seconds for a run of seconds: the machine may be busy
STEPS, BATCH = 10, 32
OPTIONS = (
    "--model.image-size", "16", "--data.batch-size", str(BATCH), "--data.eval-batch-size", "88",
    "--optim.epochs", str(STEPS / (1347 // BATCH)), "--optim.warmup-epochs", "0",
    "--run.log-every", "1", "--run.save-every", "3", "--run.keep", "10",
)  # fmt: skip


@dataclass
class Process:
    """A process that has ended.

    Attributes:
        after: seconds from the fault to its end; None where there was none.
    """

    code: int
    out: str
    err: str
    after: float | None

    @property
    def last_words(self) -> str:
        return self.err.splitlines()[-1]


@dataclass(frozen=True)
class Pod:
    """Runs of several processes over the same data and compiled programs."""

    data: Path
    cache: Path

    def run(
        self, out: Path, *options: str, fault: str = "none", culprit: int = 1, step: int = 8, hosts: int = 2,
        started: Sequence[int] | None = None, private_jax: bool = True,
    ) -> list[Process]:  # fmt: skip
        """Starts `hosts` processes, or those of them that are named, and waits for their end.

        Args:
            fault: what happens to `culprit`, before its first step after `step`.
            private_jax: False: the product cannot import ``jax._src``.
        """
        address = free_address()
        children = [
            subprocess.Popen(
                [
                    sys.executable, SCRIPT, fault, str(culprit), str(step), "train", "digits_finetune",
                    "--data", self.data, "--out", out, "--hosts.coordinator", address, "--hosts.processes", str(hosts),
                    "--hosts.process", str(index), *OPTIONS, *options,
                ],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=self.environment | ({} if private_jax else {"NO_PRIVATE_JAX": "1"}),
            )
            for index in (range(hosts) if started is None else started)
        ]  # fmt: skip
        ended = [0.0] * len(children)
        said = [("", "")] * len(children)

        def wait(place: int) -> None:
            said[place] = children[place].communicate(timeout=LIMIT)
            ended[place] = time.monotonic()

        threads = [threading.Thread(target=wait, args=(place,)) for place in range(len(children))]
        try:
            for thread in threads:
                thread.start()
            for place, thread in enumerate(threads):
                if fault != "stop" or place != culprit:
                    thread.join(LIMIT)
        finally:
            for child, thread in zip(children, threads, strict=True):
                child.kill()
                thread.join()
        moments = [float(line.split()[1]) for out, _ in said for line in out.splitlines() if line.startswith("now ")]
        return [
            Process(child.returncode, *text, end - moments[0] if moments else None)
            for child, text, end in zip(children, said, ended, strict=True)
        ]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(2),
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Pod:
    place = tmp_path_factory.mktemp("pod")
    prepare_digits(place / "digits")
    return Pod(place / "digits", place / "cache")


@pytest.fixture(scope="module")
def uninterrupted(pod: Pod, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    ended = pod.run(out)
    assert [process.code for process in ended] == [0, 0], ended
    return out


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def saved(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_bits(out: Path, expected: Path) -> None:
    found, wanted = load(out / "model").params, load(expected / "model").params
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()] == []
    assert losses(out) == losses(expected)


# --- One of them ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_fails(pod: Pod, tmp_path: Path, culprit: int) -> None:
    """Both end in less than ten seconds; the last line of both is the error, and says whose it is."""
    ended = pod.run(tmp_path / "run", fault="fail", culprit=culprit)
    guilty, other = ended[culprit], ended[1 - culprit]
    assert (guilty.code, other.code) == (2, LOST)
    assert guilty.last_words == "error: the disk is on fire; put it out"
    name = f"error: process {culprit} on {socket.gethostname()}"
    last = saved(tmp_path / "run")[-1]
    assert other.last_words.startswith(f"{name} failed: the disk is on fire; put it out; ")
    assert f"step {last} is saved" in other.last_words
    assert last in (3, 6) and max(process.after or 0.0 for process in ended) < 10


@pytest.mark.slow
def test_one_crashes(pod: Pod, tmp_path: Path) -> None:
    """An error of the program keeps its traceback, in the log of its own process."""
    other, guilty = pod.run(tmp_path / "run", fault="crash")
    assert (guilty.code, other.code) == (1, LOST)
    assert "Traceback" in guilty.err and guilty.last_words == "ZeroDivisionError: a fault of the program"
    assert "failed: ZeroDivisionError: a fault of the program" in other.last_words and "Traceback" not in other.err
    assert max(other.after or 0.0, guilty.after or 0.0) < 10


def test_one_is_killed(pod: Pod, uninterrupted: Path, tmp_path: Path) -> None:
    """Within thirty seconds, with the default of twenty for a sign of life; then the run goes on to the same bits."""
    out = tmp_path / "run"
    other, killed = pod.run(out, fault="kill")
    assert (killed.code, other.code) == (-9, LOST)
    assert "error: process 1 on" in other.last_words and "gave no sign of life for 20 s" in other.last_words
    assert f"step {saved(out)[-1]} is saved" in other.last_words
    assert 15 < (other.after or 0.0) < 30
    assert [process.code for process in pod.run(out)] == [0, 0]
    assert_same_bits(out, uninterrupted)


def test_the_leader_is_killed(pod: Pod, tmp_path: Path) -> None:
    """It holds the coordination service: JAX itself ends the others, at once, unless this program is faster."""
    killed, other = pod.run(tmp_path / "run", fault="kill", culprit=0)
    assert killed.code == -9 and other.code in (-6, LOST)
    assert "leader task" in other.err or "process 0 on the leading host cannot be reached" in other.err
    assert (other.after or 0.0) < 30
    assert 3 in saved(tmp_path / "run")


@pytest.mark.slow
def test_one_is_suspended(pod: Pod, tmp_path: Path) -> None:
    """As a frozen machine is: no process can end it, all others end."""
    (other,) = pod.run(tmp_path / "run", "--hosts.silence", "5", fault="stop", started=None)[:1]
    assert other.code == LOST and "process 1 on" in other.last_words and "no sign of life for 5 s" in other.last_words
    assert (other.after or 0.0) < 15


def test_one_hangs(pod: Pod, tmp_path: Path) -> None:
    """The watchdog finds it, here after fifteen seconds; who waits for it says whom, and it says where it stands."""
    other, hung = pod.run(tmp_path / "run", "--run.hang-minutes", "0.25", fault="hang")
    assert (other.code, hung.code) == (HUNG, HUNG)
    name = f"error: process 1 on {socket.gethostname()} stands still in input after step 8 for 0.2"
    assert name in other.err and name in hung.err
    assert "in hang" in hung.err, "the stack of the thread that hangs"
    assert max(other.after or 0.0, hung.after or 0.0) < 45
    assert 3 in saved(tmp_path / "run")


def test_one_reads_an_odd_batch(pod: Pod, tmp_path: Path) -> None:
    other, guilty = pod.run(tmp_path / "run", fault="batch")
    assert (guilty.code, other.code) == (2, LOST)
    assert guilty.last_words.startswith("error: ")
    for part in ("step 9", "image", "uint8[16, 16, 16, 3]", "uint8[15, 16, 16, 3]"):
        assert part in guilty.last_words
    assert guilty.last_words.removeprefix("error: ") in other.last_words
    assert max(other.after or 0.0, guilty.after or 0.0) < 10
    assert max(losses(tmp_path / "run")) == 8


# --- Preemption -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_stops_all_after_the_same_step(
    pod: Pod, uninterrupted: Path, tmp_path: Path, culprit: int
) -> None:
    out = tmp_path / "run"
    ended = pod.run(out, fault="term", culprit=culprit, step=2)
    assert [process.code for process in ended] == [INTERRUPTED] * 2, ended
    last = saved(out)[-1]
    assert 3 <= last < STEPS and f"step {last} of {STEPS}: stopped by a signal and saved" in ended[0].out
    assert [process.code for process in pod.run(out)] == [0, 0]
    assert_same_bits(out, uninterrupted)


def test_without_jaxs_store_processes_still_compare_and_still_stop_together(
    pod: Pod, uninterrupted: Path, tmp_path: Path
) -> None:
    """Where JAX's private module is gone, one line says what is off; facts and the last step go by collectives."""
    out = tmp_path / "run"
    ended = pod.run(out, fault="code", private_jax=False)
    assert [process.code for process in ended] == [2, 2]
    assert all(f"process 1 on {socket.gethostname()}: code is edited, " in process.last_words for process in ended)
    assert not out.exists()
    ended = pod.run(out, fault="term", step=2, private_jax=False)
    assert [process.code for process in ended] == [INTERRUPTED] * 2, ended
    assert [process.err.count("key-value store") for process in ended] == [1, 0]
    assert 3 <= saved(out)[-1] < STEPS
    assert [process.code for process in pod.run(out, private_jax=False)] == [0, 0]
    assert_same_bits(out, uninterrupted)


def test_a_second_signal_ends_all_at_once(pod: Pod, tmp_path: Path) -> None:
    other, guilty = pod.run(tmp_path / "run", fault="term twice")
    assert (guilty.code, other.code) == (INTERRUPTED, LOST)
    assert guilty.last_words.startswith("SIGTERM again: ") and "nothing is saved" in guilty.last_words
    assert "process 1 on" in other.last_words and "second SIGTERM" in other.last_words
    assert max(other.after or 0.0, guilty.after or 0.0) < 10


@pytest.mark.parametrize(
    ("hosts", "mesh"),
    [
        pytest.param(1, ("1", "2", "1"), id="one host, parameters split", marks=pytest.mark.thorough),
        pytest.param(4, ("2", "4", "1"), id="four hosts, parameters split", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_hosts_and_another_mesh(
    pod: Pod, uninterrupted: Path, tmp_path: Path, hosts: int, mesh: tuple[str, str, str]
) -> None:
    """With the same images in the same order: losses differ by rounding only, and from step to step by far more."""
    out = tmp_path / "run"
    assert [process.code for process in pod.run(out, fault="term", step=2)] == [INTERRUPTED] * 2
    last = saved(out)[-1]
    ended = pod.run(out, "--run.mesh", *mesh, hosts=hosts)
    assert [process.code for process in ended] == [0] * hosts, ended
    assert "recipe.run.mesh was" in ended[0].err
    found, expected = losses(out), losses(uninterrupted)
    assert found.keys() == expected.keys() and last < STEPS
    differences = np.array([found[step] - expected[step] for step in range(last + 1, STEPS + 1)])
    assert 0 < np.abs(differences).max() < 1e-5
    assert np.abs(np.diff([expected[step] for step in range(last, STEPS + 1)])).min() > 1e-4


# --- The start --------------------------------------------------------------------------------------------------------


def test_other_code_is_refused_before_anything_is_written(pod: Pod, tmp_path: Path) -> None:
    ended = pod.run(tmp_path / "run", fault="code")
    assert [process.code for process in ended] == [2, 2]
    for process in ended:
        assert process.last_words.startswith(f"error: process 1 on {socket.gethostname()}: code is edited, ")
        assert "on every host" in process.last_words
    assert list(tmp_path.iterdir()) == []


def test_others_that_do_not_come(pod: Pod, tmp_path: Path) -> None:
    """One line instead of an abort with a trace of JAX's own code, from the leader and from the others."""
    for alone in (0, 1):
        (process,) = pod.run(tmp_path / "run", "--hosts.wait", "3", started=[alone])
        assert process.code == LOST
        assert f"process {alone} of 2" in process.last_words
        assert " 127.0.0.1:" in process.last_words and " 3 s" in process.last_words
    assert list(tmp_path.iterdir()) == []


# --- What is told -----------------------------------------------------------------------------------------------------


def test_a_slow_host_is_named(pod: Pod, uninterrupted: Path, tmp_path: Path) -> None:
    """Half a second for every batch, in one of them; not a word where all are as fast."""
    ended = pod.run(tmp_path / "run", fault="slow")
    assert [process.code for process in ended] == [0, 0]
    assert f"process 1 on {socket.gethostname()} waits for its images" in ended[0].err
    assert ended[0].err.count("waits for its images") == 1, "once"
    assert "step " not in ended[1].err and "images/s" not in ended[1].out, "process 0 tells, alone"
    rows = [json.loads(line) for line in (tmp_path / "run" / "hosts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    waits = [[host["input"] for host in row["hosts"]] for row in rows]
    assert all(second > 0.5 for _, second in waits) and np.mean([first for first, _ in waits]) < 0.25
