"""Joining a run: what launcher are recognised, what options are refused, and starts by SLURM's variables."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.train.distributed import cluster
from beit_jax.train.distributed.cluster import joined, launcher
from beit_jax.train.recipe import HostOptions

SLURM = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "node[001-004]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.fixture
def chips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Device files of a TPU VM, where libtpu is installed."""
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    return tmp_path


def test_tasks_of_slurm(tmp_path: Path) -> None:
    assert launcher(SLURM, tmp_path) == "slurm"
    assert launcher(SLURM | {"SLURM_NTASKS": "1"}, tmp_path) is None, "one task is a run of one"
    batch_script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert launcher(batch_script, tmp_path) is None, "srun starts tasks, sbatch does not"


def test_chips_and_their_library(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert launcher({}, chips) == "tpu"
    assert launcher({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, chips) == "tpu"
    assert launcher({"JAX_PLATFORMS": "cpu"}, chips) is None, "the chips were not asked for"
    assert launcher({}, tmp_path_factory.mktemp("dev")) is None


def test_chips_behind_vfio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """v5e and v6e; a machine that passes other devices through has the folder as well, without the library."""
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert launcher({}, tmp_path) == "tpu"
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    assert launcher({}, tmp_path) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "--hosts.processes: missing; give coordinator, processes and process together"),
        ({"processes": 2, "process": 0}, "--hosts.coordinator: missing"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--hosts.coordinator: expected HOST:PORT, found a"),
        ({"coordinator": "a:0", "processes": 2, "process": 0}, "--hosts.coordinator: expected HOST:PORT, found a:0"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "--hosts.processes: expected 1 or more, found 0"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--hosts.process: expected 0 to 1, found 2"),
        (
            {"coordinator": "a:1", "processes": 2, "process": 1, "alone": True},
            "--hosts.alone: contradicts --hosts.coordinator",
        ),
        ({"wait": 0.0}, "--hosts.wait: expected 1 to 86400 seconds, found 0"),
        ({"silence": float("nan")}, "--hosts.silence: expected 1 to 86400 seconds, found nan"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BeitJaxError) as error, joined(HostOptions(**options)):
        pass
    assert str(error.value).startswith(message)


def test_alone_errors_are_raised_as_ever() -> None:
    with pytest.raises(KeyError), joined(HostOptions(alone=True)) as peers:
        assert (peers.index, peers.count) == (0, 1)
        raise KeyError


JOIN = """
from beit_jax.train.distributed.cluster import joined
from beit_jax.train.recipe import HostOptions
with joined(HostOptions(wait=120.0)) as peers:
    peers.compare({"same": True}, patience=60.0)
    print("joined as", peers.index, "of", peers.count)
"""


def started(**variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"} | variables,
    )


def job() -> str:
    """A job whose port, which JAX derives from its number, is free."""
    for number in range(1, 4096):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", 61440 + number)) != 0:
                return str(number)
    raise AssertionError("no free port")


def test_slurm_starts_a_run() -> None:
    shared = {"SLURM_JOB_ID": job(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    tasks = [started(**shared, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    said = [task.communicate(timeout=180) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert [f"joined as {i} of 2" in out for i, (out, _) in enumerate(said)] == [True, True]
    assert [f"process {i} of 2 on {socket.gethostname()}" in err for i, (_, err) in enumerate(said)] == [True, True]


def test_a_cluster_that_jax_does_not_understand_is_one_line() -> None:
    """Not a run of one: every task would believe that it is alone."""
    task = started(**SLURM | {"SLURM_PROCID": "no number"})
    _, err = task.communicate(timeout=180)
    assert task.returncode != 0
    assert "--hosts: this process could not join a run (slurm: " in err
    assert "give --hosts.coordinator, processes and process, or --hosts.alone" in err
