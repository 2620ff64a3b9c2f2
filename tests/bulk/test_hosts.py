"""The same table from runs that are killed, from several processes, and from several devices."""

import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax.cli.main import main

DIGITS = Path(beit_jax.__file__).parent / "digits"
OPTIONS = ["--batch-size", "4", "--chunk", "8"]
COUNT = 200


def started(arguments: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "beit_jax", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    found = []
    for shard in range(2):
        found.append(str(folder / f"{shard:03d}.tar"))
        with tarfile.open(found[-1], "w") as file:
            for n in range(COUNT // 2):
                path = folder / "image.png"
                Image.fromarray(rng.integers(0, 256, (10, 10), np.uint8)).save(path)
                file.add(path, f"{shard}{n:04d}.png")
                path.unlink()
    return found


@pytest.fixture(scope="module")
def whole(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "f.parquet"
    assert main(["features", str(DIGITS), *shards, "-o", str(output), *OPTIONS]) == 0
    return output.read_bytes()


@pytest.mark.thorough
def test_killed_at_ten_random_moments(shards: list[str], whole: bytes, tmp_path: Path) -> None:
    """By SIGKILL, with workers: during imports, computing, writing or joining."""
    output, moments = tmp_path / "f.parquet", random.Random(0)
    command = ["features", str(DIGITS), *shards, "-o", str(output), *OPTIONS, "--workers", "1"]
    kills = 0
    while kills < 10:
        run = started(command)
        # The first moments are those of a start; later ones come as soon as one more part is there.
        before, end = len(list(tmp_path.glob("*.partial/*.chunk"))), time.monotonic() + 60
        while run.poll() is None and time.monotonic() < end:
            if len(list(tmp_path.glob("*.partial/*.chunk"))) > before or kills < 2:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.05 if kills >= 2 else 2.0))
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGKILL)
        run.communicate()
        kills += 1
    text, _ = started(command).communicate(timeout=120)
    assert output.read_bytes() == whole, text
    assert kills >= 5 and not list(tmp_path.glob("*.partial"))


@pytest.mark.thorough
def test_a_stopped_run_says_how_to_go_on(shards: list[str], whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "f.parquet"
    command = ["features", str(DIGITS), *shards, "-o", str(output), *OPTIONS]
    run = started(command)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("*.partial/*.chunk")) and time.monotonic() < end:
        time.sleep(0.002)
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=60)
    if run.returncode != 0:  # it may have been faster
        assert run.returncode == 143 and "parts are kept in" in text and "the same command goes on" in text, text
    again = started(command)
    text, _ = again.communicate(timeout=120)
    assert again.returncode == 0, text
    assert output.read_bytes() == whole


@pytest.mark.thorough
def test_two_processes_without_a_cluster(shards: list[str], whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "f.parquet"
    command = ["features", str(DIGITS), *shards, "-o", str(output), *OPTIONS, "--processes", "2", "--process"]
    runs = [started([*command, str(index)]) for index in range(2)]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], texts
    assert output.read_bytes() == whole and not list(tmp_path.glob("*.partial"))


@pytest.mark.thorough
def test_two_processes_that_jax_joins(shards: list[str], whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "f.parquet"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["features", str(DIGITS), *shards, "-o", str(output), *OPTIONS, "--coordinator", address]
    runs = [started([*command, "--processes", "2", "--process", str(index)]) for index in range(2)]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], texts
    assert output.read_bytes() == whole and not list(tmp_path.glob("*.partial"))


@pytest.mark.thorough
def test_eight_devices(shards: list[str], tmp_path: Path) -> None:
    for devices, name in ((1, "one"), (8, "eight")):
        command = ["features", str(DIGITS), *shards, "-o", str(tmp_path / f"{name}.npz"), "--batch-size", "16"]
        run = started(command, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
        text, _ = run.communicate(timeout=120)
        assert run.returncode == 0, text
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "eight.npz") as eight:
        assert one["images"].tolist() == eight["images"].tolist() and len(one["images"]) == COUNT
        np.testing.assert_allclose(eight["features"], one["features"], rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_memory_is_flat_in_the_number_of_images(tmp_path: Path) -> None:
    """10,000 more images: at most 5 % more peak."""
    image = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 10, 3), np.uint8)).save(image)
    code = (
        "import resource, sys\nfrom beit_jax.cli.main import main\n"
        "if __name__ == '__main__':\n assert main(sys.argv[1:]) == 0\n"
        " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    peaks = []
    for count in (5000, 15000):
        listed = tmp_path / f"{count}.txt"
        listed.write_text(f"{image}\n" * count)
        output = tmp_path / f"{count}.parquet"
        command = [
            sys.executable,
            script,
            "features",
            DIGITS,
            f"@{listed}",
            "-o",
            output,
            "--batch-size",
            "64",
            "--workers",
            "0",
        ]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=True)
        peaks.append(int(run.stdout.split()[-1]))
    assert peaks[1] <= 1.05 * peaks[0], peaks
