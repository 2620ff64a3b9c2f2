"""What people see: whole names at any width, progress that says what happens, and nothing on standard error else."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
from grain.multiprocessing import SharedMemoryArray

import beit_jax
from beit_jax import terminal
from beit_jax.bulk.work import Work
from beit_jax.cli.main import main
from beit_jax.inference.predictor import Predictor
from beit_jax.models.build import num_params
from beit_jax.published import PUBLISHED
from beit_jax.train.data.workers import _unnamed
from beit_jax.train.loop.log import Log
from beit_jax.variants import PARAMETERS, VARIANTS

DIGITS = Path(beit_jax.__file__).parent / "digits"
IMAGE = DIGITS / "images" / "00_label_2.png"


def lines_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


# Lists and tables


@pytest.mark.parametrize("width", ["40", "60", "200"])
def test_list_has_whole_names_at_any_width(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    lines = lines_of(["list"], capsys)
    text = "\n".join(lines)
    words = text.split()
    for row in PUBLISHED:
        name = row.name.rpartition(" ")[2]
        place, inside, rest = row.where.partition(name)
        hub = not row.where.startswith("https:")
        assert words.count(row.where if hub else name) == 1 + (name in VARIANTS and not hub)
        assert hub or f"{place}{'NAME' if inside else ''}{rest}" in text
    assert "…" not in text and "hugging face" not in text
    assert all(line == line.rstrip() for line in lines)


def test_list_says_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(["list"], capsys)
    row = next(line for line in lines if line.startswith("microsoft/beit-large-patch16-512 "))
    assert row.split()[1:] == ["305.7", "M", "512", "88.60"]
    found = {entry["name"]: entry for entry in json.loads("\n".join(lines_of(["list", "--json"], capsys)))}
    entry = found["microsoft/beit-large-patch16-512"]
    assert (entry["parameters"], entry["image_size"]) == (305_674_728, 512)


def test_parameters_are_those_of_the_models() -> None:
    assert {name: num_params(config) for name, config in VARIANTS.items()} == PARAMETERS


@pytest.mark.parametrize("width", ["40", "200"])
def test_a_table_in_a_pipe_is_neither_cut_nor_wrapped(
    width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    image = tmp_path / f"{'a picture with a long name ' * 6}.png"
    shutil.copy(IMAGE, image)
    lines = lines_of(["classify", str(DIGITS), str(image), "--top", "2"], capsys)
    head, _rule, first, second = lines
    assert head.split() == ["image", "probability", "class"]
    assert first.startswith(str(image)) and first.split()[-1] == "two"
    assert second.split()[-1] == "three"


def test_numbers_are_aligned_at_their_ends(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(["name", "n"], [["a", "1"], ["b", "1,000"], ["c", "-"]])
    assert capsys.readouterr().out == "name      n\n----  -----\na         1\nb     1,000\nc         -\n"


# Progress


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "UNKNOWN_SILENCE", 0.05)
    monkeypatch.setattr(terminal, "LONGEST_PAUSE", 0.05)


def test_long_work_in_a_pipe_says_what_happens(soon: None, capfd: pytest.CaptureFixture[str]) -> None:
    with terminal.image_progress(1234, "classifying", first="compiling") as advance:
        time.sleep(0.1)
        advance(1000)
        time.sleep(0.1)
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first.startswith("compiling: 0 of 1,234 images after ")
    assert re.fullmatch(r"classifying: 1,000 of 1,234 images after \d+ s, [\d,.]+ images/s, \d+ s left", last)


def test_short_work_in_a_pipe_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal.byte_progress(10) as advance:
        advance(10)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("command", ["classify", "features"])
def test_classify_and_features_show_progress(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "UNKNOWN_SILENCE", 0.001)
    monkeypatch.setattr(terminal, "LONGEST_PAUSE", 0.001)
    owner, name = (Predictor, "outputs") if command == "classify" else (Work, "_outputs")
    compute = getattr(owner, name)

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.1)  # a program that another test compiled takes less than the thread that writes needs to start
        return compute(*arguments, **options)

    monkeypatch.setattr(owner, name, slowly)
    options = ["-o", str(tmp_path / "f.npz")] if command == "features" else ["--json"]
    assert main([command, str(DIGITS), str(IMAGE), *options]) == 0
    assert "compiling: 0 of 1 images" in capfd.readouterr().err


def shown(width: int, show: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is drawn on a terminal of that width."""
    out = io.StringIO()

    class Terminal(rich.console.Console):
        def __init__(self, **_: Any) -> None:
            super().__init__(file=out, force_terminal=True, width=width, color_system=None)

    with monkeypatch.context() as patch:
        patch.setattr(rich.console, "Console", Terminal)
        show()
    return [line.removeprefix("\x1b[2K") for line in out.getvalue().replace("\r", "\n").split("\n")]


def test_a_bar_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with terminal.image_progress(50_000, "computing features", first="compiling") as advance:
            advance(25_000)

    lines = shown(80, work, monkeypatch)
    assert any("compiling" in line for line in lines)
    drawn = [line for line in lines if "computing features" in line and "━━━━━━━━" in line]
    assert drawn and all(len(line) <= 80 and "25000/50000" in line for line in drawn)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_and_the_step_of_a_run_survive(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"loss": 6.1, "learning_rate": 1e-3, "images_per_second": 1234.5, "mfu": 0.1, "grad_norm": 1.2}

    def work() -> None:
        with Log(tmp_path, total_steps=125_000, tensorboard=False) as log:
            log.compiling(1)
            time.sleep(0.15)
            log.advance(1)
            log.write(62_500, metrics)

    lines = shown(width, work, monkeypatch)
    assert any("compiling" in line for line in lines)
    last = [line for line in lines if "62500" in line][-1]
    assert "━━━━━━━━" in last and "62500/125000" in last and "loss 6.1000" in last and len(last) <= width
    assert "compiling" not in last


def test_a_run_in_a_pipe_says_at_once_what_it_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, total_steps=1000, tensorboard=False) as log:
        log.compiling(1)
    assert capfd.readouterr().err == "step 1/1,000  compiling\n"


# Nothing is left


def test_shared_memory_has_no_name_once_it_has_arrived() -> None:
    """What has a name when the process ends is reported as leaked."""
    array = SharedMemoryArray((1000,), np.float32)
    array[:] = 7
    name = array.shm.name
    assert (Path("/dev/shm") / name).exists()
    assert _unnamed(array) is array and not (Path("/dev/shm") / name).exists()
    assert array.sum() == 7000
    plain = np.zeros(3)
    assert _unnamed(plain) is plain


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_stderr_is_empty_after_success_with_workers(command: str, tmp_path: Path) -> None:
    assert main(["prepare", "digits", str(tmp_path / "data")]) == 0
    data = ["--data", str(tmp_path / "data")]
    arguments = {
        "evaluate": ["evaluate", str(DIGITS), *data, "--workers", "2", "--json"],
        "train": ["train", "digits_finetune", *data, "--out", str(tmp_path / "run"), "--data.workers", "2",
                  "--optim.epochs", "0.05", "--optim.warmup-epochs", "0", "--json"],
    }[command]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "beit_jax", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    rest = [line for line in done.stderr.splitlines() if not line.startswith(("step ", "evaluating: "))]
    assert rest == [] and json.loads(done.stdout)


# Standard output


@pytest.mark.parametrize(
    ("place", "message"),
    [("> /dev/full", "standard output: No space left on device"), (">&-", "standard output is closed")],
)
def test_standard_output_that_takes_nothing_is_one_line(place: str, message: str) -> None:
    command = f"{sys.executable} -m beit_jax list {place}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_standard_output_without_utf_8_escapes(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = "import sys; from beit_jax.cli import main; sys.argv = ['beit-jax', 'demo']\n" \
        "from pathlib import Path\nfrom beit_jax.cli import conversion\n" \
        "def demo(*, out: Path = Path('x'), json: bool = False) -> int:\n    print('ö'); return 0\n" \
        "conversion.demo = demo; sys.exit(main.main())"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xf6\n", "")
