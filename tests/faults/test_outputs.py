"""The converter as users run it, and everything that can go wrong with what it writes.

The letters are the rows of the fault catalogue these tests were written from.
"""

import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from trees import Tree, tree

from beit_jax import weights
from beit_jax.cli.main import main
from beit_jax.convert import importer, reading
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve

DIGITS = Path(str(files("beit_jax") / "digits"))
TIMEOUT = 60  # seconds, of every child process
PATCHES = "beit.embeddings.patch_embeddings.projection.weight"
LAYER = "beit.encoder.layer.2."
FC1, FC1_LEAF = LAYER + "intermediate.dense.weight", "beit/blocks/mlp/fc1/kernel"

Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """The command installs its own handler."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """What a directory holds after converting the digits to ``out`` there."""
    directory = tmp_path_factory.mktemp("expected")
    importer.convert(resolve(DIGITS), directory / "out")
    return tree(directory)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty directory for outputs."""
    path = tmp_path / "work"
    path.mkdir()
    return path


def earlier(directory: Path) -> None:
    """Makes what `convert --overwrite` takes for an earlier result, by the name of its weights."""
    directory.mkdir()
    (directory / weights.WEIGHTS).write_text("years of work")


@pytest.fixture
def occupied(work: Path) -> Tree:
    """``out`` exists in `work`, and is not to be touched."""
    earlier(work / "out")
    return tree(work)


@pytest.fixture
def variation(tmp_path: Path) -> Callable[..., Path]:
    """The digits with other tensors or another configuration."""

    def make(change: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> Path:
        directory = tmp_path / "source"
        directory.mkdir()
        shutil.copy(DIGITS / weights.PROCESSOR, directory)
        written = json.loads((DIGITS / weights.CONFIG).read_text()) | config
        (directory / weights.CONFIG).write_text(json.dumps(written))
        tensors = load_file(DIGITS / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return make


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], work: Path) -> Callable[..., str]:
    """Runs a conversion that must fail: exit code 2, one printable line with all `needles`, nothing changed on disk."""

    def run(source: Path, *needles: object, to: str = "out", options: tuple[str, ...] = ()) -> str:
        before = tree(work)
        assert main(["convert", str(source), str(work / to), *options]) == 2
        captured = capsys.readouterr()
        message = captured.err.removeprefix("error: ").removesuffix("\n")
        assert captured.out == "" and captured.err == f"error: {message}\n"
        assert message.isprintable() and len(message) < 2000, message
        for needle in needles:
            assert str(needle) in message
        assert tree(work) == before
        return message

    return run


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "beit_jax", *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


# C1, C7


def test_two_runs_write_the_same_bytes_and_the_second_needs_overwrite(work: Path, expected: Tree) -> None:
    """In other processes, with other hash seeds."""
    first = command("convert", DIGITS, work / "out", PYTHONHASHSEED="1")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines()[-1].split() == ["written", str(work / "out")]
    assert tree(work) == expected
    second = command("convert", DIGITS, work / "out", PYTHONHASHSEED="2")
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr.startswith(f"error: {work / 'out'}: already exists; pass --overwrite")
    assert second.stderr.count("\n") == 1
    assert tree(work) == expected


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "dangling link"])
def test_what_exists_is_kept(work: Path, refuse: Callable[..., str], kind: str) -> None:
    if "directory" in kind:
        (work / "out").mkdir()
    if kind == "directory":
        (work / "out" / "config.json").write_text("years of work")
    if kind == "file":
        (work / "out").write_text("years of work")
    if kind == "dangling link":
        (work / "out").symlink_to("unplugged-disk")
    refuse(DIGITS, work / "out", "already exists", "--overwrite")
    if "directory" not in kind:
        refuse(DIGITS, work / "out", "expected a directory to replace", options=("--overwrite",))


def test_overwrite_replaces_everything(work: Path, occupied: Tree, expected: Tree) -> None:
    assert main(["convert", str(DIGITS), str(work / "out"), "--overwrite"]) == 0
    assert tree(work) == expected


@pytest.mark.parametrize("name", ["out/", "./out", ".out", "..out"])
def test_relative_and_hidden_names(work: Path, expected: Tree, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(work)
    assert main(["convert", str(DIGITS), name]) == 0
    assert list(tree(work).values()) == list(expected.values())
    assert [path.name for path in work.iterdir()] == [Path(name).name]


# C2


def test_not_enough_space(work: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(work)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    nbytes = 4 * 207_818  # parameters
    refuse(DIGITS, work, f"{nbytes:,} bytes are needed", "1,000 are free")


@pytest.mark.parametrize("call", ["mkdir", "posix_fallocate", "pwrite"])
def test_the_disk_becomes_full(
    work: Path, occupied: Tree, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real, calls = getattr(os, call), []

    def limited(*arguments: Any, **options: Any) -> Any:
        calls.append(call)
        if call != "pwrite" or len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, limited)
    refuse(DIGITS, work / "out", "disk is full", options=("--overwrite",))
    assert calls


# C3

KILLED = """
# Converts once for every directory, and is killed at the moment the directory is named after.
import os, signal, sys
from pathlib import Path
from beit_jax.convert import importer, reading
from beit_jax.convert.files import checkpoint
from beit_jax.hub import resolve

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def while_writing():
    read, calls = checkpoint.Checkpoint.read, []
    def limited(*arguments, **options):
        calls.append(0)
        return die() if len(calls) == 40 else read(*arguments, **options)
    checkpoint.Checkpoint.read = limited

def before_verifying():
    reading.verify = die

def around_a_rename(number, *, after):
    rename, calls = Path.rename, []
    def limited(self, target):
        calls.append(0)
        if len(calls) == number and not after:
            die()
        rename(self, target)
        if len(calls) == number:
            die()
    Path.rename = limited

moments = {
    "writing": while_writing,
    "verifying": before_verifying,
    "before the first rename": lambda: around_a_rename(1, after=False),
    "after the first rename": lambda: around_a_rename(1, after=True),
    "after the second rename": lambda: around_a_rename(2, after=True),
}
digits, *directories = map(Path, sys.argv[1:])
for directory in directories:
    pid = os.fork()
    if not pid:
        moments[directory.name]()
        importer.convert(resolve(digits), directory / "out", overwrite=directory.parent.name == "overwrite")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
MOMENTS = {
    "create": ["writing", "verifying", "before the first rename", "after the first rename"],
    "overwrite": [
        "writing", "verifying", "before the first rename", "after the first rename", "after the second rename",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory MODE/MOMENT for each of `MOMENTS`, in which a conversion to ``out`` was killed."""
    root = tmp_path_factory.mktemp("killed")
    directories = [root / mode / moment for mode, moments in MOMENTS.items() for moment in moments]
    for directory in directories:
        directory.mkdir(parents=True)
        if directory.parent.name == "overwrite":
            earlier(directory / "out")
    arguments = [sys.executable, "-c", KILLED, str(DIGITS), *map(str, directories)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT)
    assert list(map(int, result.stdout.split())) == [-signal.SIGKILL] * len(directories), result.stderr
    return root


@pytest.mark.parametrize(("mode", "moment"), [(mode, moment) for mode in MOMENTS for moment in MOMENTS[mode]])
def test_killed(killed: Path, expected: Tree, mode: str, moment: str) -> None:
    """SIGKILL leaves no output or a whole one; the next run needs no help and leaves no temporary files."""
    work, overwrite = killed / mode / moment, mode == "overwrite"
    old: Tree = {"out": None, f"out/{weights.WEIGHTS}": b"years of work"} if overwrite else {}
    left = tree(work)
    assert any(name.startswith(".out") for name in left)  # it could not clean up
    whole = {name: content for name, content in left.items() if name.split("/")[0] == "out"}
    if moment == MOMENTS[mode][-1]:
        assert whole == expected
    elif overwrite and moment == "after the first rename":
        # The old one has been moved aside, the new one not yet into its place: the next run puts it back.
        assert whole == {}
        with pytest.raises(BeitJaxError, match="already exists"):
            importer.convert(resolve(DIGITS), work / "out")
        assert tree(work) == old
    else:
        assert whole == old
    importer.convert(resolve(DIGITS), work / "out", overwrite=(work / "out").exists())
    assert tree(work) == expected


# C4, B13

SLOW = """
# The command line, with a reader that tells when it starts and then waits: for a moment, or for a line of input.
import signal, sys, threading, time
from beit_jax.cli.main import main
from beit_jax.convert.files.checkpoint import Checkpoint

wait, *arguments = sys.argv[1:]
read, begun, gate = Checkpoint.read, [], threading.Lock()

def slow(*arguments, **options):
    with gate:  # nobody reads while one waits
        if not begun:
            begun.append(print("reading", flush=True))
            if wait == "input":
                sys.stdin.readline()
        if wait == "moment":
            time.sleep(0.05)
    return read(*arguments, **options)

Checkpoint.read = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
sys.exit(main(arguments))
"""


def slow(wait: str, *arguments: object) -> subprocess.Popen[str]:
    """A conversion in the middle of its work."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, wait, *map(str, arguments)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline() != "reading\n":
        process.kill()
        raise AssertionError(process.communicate(timeout=TIMEOUT)[1])
    return process


@pytest.mark.parametrize(
    ("number", "code", "message", "options"),
    [
        (signal.SIGINT, 130, "interrupted; nothing was kept\n", ["--overwrite"]),
        (signal.SIGTERM, 143, "interrupted; nothing was kept\n", []),
    ],
)
def test_interrupted(work: Path, number: signal.Signals, code: int, message: str, options: list[str]) -> None:
    if options:
        earlier(work / "out")
    before = tree(work)
    with slow("moment", "convert", DIGITS, work / "out", *options) as process:
        during = tree(work)
        process.send_signal(number)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert during != before  # it had begun to write
    assert (process.returncode, errors) == (code, message)
    assert tree(work) == before


def test_two_at_once(work: Path, refuse: Callable[..., str], expected: Tree) -> None:
    with slow("input", "convert", DIGITS, work / "out") as process:
        owner = f"in use by process {process.pid} on {socket.gethostname()}"
        refuse(DIGITS, work / "out", owner)
        refuse(DIGITS, work / "out", owner, options=("--overwrite",))
        _, errors = process.communicate("go on\n", timeout=TIMEOUT)
    assert (process.returncode, errors) == (0, "")
    assert tree(work) == expected


# C5


@pytest.mark.parametrize(("mask", "directory", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_modes_are_those_of_the_umask(work: Path, mask: int, directory: int, file: int) -> None:
    before = os.umask(mask)
    try:
        importer.convert(resolve(DIGITS), work / "out")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [work / "out", *(work / "out").iterdir()]}
    assert modes == {"out": directory, weights.CONFIG: file, weights.PROCESSOR: file, weights.WEIGHTS: file}


# C6


def test_the_destination_is_checked_before_the_source_is_read(
    work: Path, tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "nonsense"
    source.mkdir()
    (work / "file").write_text("kept")
    refuse(source, source)  # it is the source that is complained about, where the destination is right
    refuse(source, work / "no", "does not exist", "create it first", to="no/out")
    refuse(source, work / "file", "is a file", to="file/out")
    refuse(source, "expected the name", to="..")
    refuse(source, work / "file", "already exists", to="file")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # faked: root may write everywhere
    refuse(source, work / "out", work, "not writable")


# C8


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(byte: int) -> Callable[[Path], None]:
    """Flips one bit of a file."""

    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[byte] ^= 1
        path.write_bytes(raw)

    return damage


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        (flip(-1), "classifier/kernel: digest"),  # the last tensor of the file
        (flip(3), "not a readable safetensors file"),
        (truncate, "not a readable safetensors file"),
    ],
)
def test_a_disk_that_changes_what_was_written(
    work: Path,
    refuse: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    needle: str,
    overwrite: bool,
) -> None:
    if overwrite:
        earlier(work / "out")
    verify = reading.verify

    def after_damage(path: Path, *arguments: Any) -> None:
        assert overwrite or not (work / "out").exists()
        damage(path)
        verify(path, *arguments)

    monkeypatch.setattr(reading, "verify", after_damage)
    refuse(DIGITS, needle, weights.WEIGHTS, options=("--overwrite",) if overwrite else ())


# A13


def put(name: str, values: dict[tuple[int, ...], float], dtype: Any = np.float32) -> Callable[[Tensors], None]:
    """Sets single values of a tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].astype(dtype)
        for index, value in values.items():
            tensors[name][index] = value

    return change


NONFINITE = [
    (FC1, {(3, 5): np.nan, (255, 63): np.nan}, np.float32, "2 of 16384", [3, 5]),
    (FC1, {(255, 63): np.inf}, ml_dtypes.bfloat16, "1 of 16384", [255, 63]),
    (FC1, {(0, 0): -np.inf}, np.float16, "1 of 16384", [0, 0]),
    (FC1, {(1, 0): np.inf, (0, 63): np.nan}, np.float64, "2 of 16384", [0, 63]),
    (LAYER + "attention.attention.key.weight", {(63, 62): np.nan}, np.float32, "1 of 4096", [63, 62]),
    (LAYER + "lambda_1", {(7,): -np.inf}, np.float32, "1 of 64", [7]),
    (PATCHES, {(9, 2, 3, 1): np.nan}, np.float32, "1 of 3072", [9, 2, 3, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "dtype", "count", "first"), NONFINITE)
def test_nonfinite_weights_are_refused(
    occupied: Tree,
    variation: Callable[..., Path],
    refuse: Callable[..., str],
    name: str,
    values: dict[tuple[int, ...], float],
    dtype: Any,
    count: str,
    first: list[int],
) -> None:
    source = variation(put(name, values, dtype))
    needles = (source / "model.safetensors", name, f"{count} values are NaN or infinite", f"the first at {first}")
    refuse(source, *needles, "--allow-nonfinite", options=("--overwrite",))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_nonfinite_weights_can_be_allowed(work: Path, variation: Callable[..., Path], dtype: Any) -> None:
    source = variation(put(FC1, {(3, 5): np.nan, (255, 63): -np.inf}, dtype))
    assert main(["convert", str(source), str(work / "out"), "--allow-nonfinite"]) == 0
    params = weights.load(work / "out").params
    leaf = params[FC1_LEAF].astype(np.float32)
    assert np.isnan(leaf[2, 5, 3]) and leaf[2, 63, 255] == -np.inf  # layer 2, transposed
    assert sum(int((~np.isfinite(array.astype(np.float32))).sum()) for array in params.values()) == 2


def test_large_finite_weights_are_fine(work: Path, variation: Callable[..., Path]) -> None:
    """Their squares, which a quick test for finiteness sums up, are not finite."""
    top = float(np.finfo(np.float32).max)
    source = variation(put(FC1, {(3, 5): 1e30, (4, 5): top, (5, 5): -top}))
    assert main(["convert", str(source), str(work / "out")]) == 0
    assert weights.load(work / "out").params[FC1_LEAF][2, 5, 3:6].tolist() == [np.float32(1e30), top, -top]


def test_float64_beyond_float32(work: Path, variation: Callable[..., Path], refuse: Callable[..., str]) -> None:
    source = variation(put(FC1, {(3, 5): 1e39}, np.float64))
    refuse(source, source / "model.safetensors", FC1, "beyond the range of float32")


# A30 to A33, and tensors that are not there


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"num_attention_heads": 8}, "4 attention heads, num_attention_heads says 8"),
        ({"num_attention_heads": 2}, "4 attention heads, num_attention_heads says 2"),
        ({"id2label": {str(i): str(i) for i in range(21841)}}, "10 classes, id2label has 21841"),
        ({"id2label": {"0": "no", "1": "yes"}}, "10 classes, id2label has 2"),
        ({"num_hidden_layers": 12}, "4 layers, num_hidden_layers says 12"),
        ({"num_hidden_layers": 3}, "4 layers, num_hidden_layers says 3"),
        ({"image_size": 64}, "8 x 8 grid, image_size and patch_size say (16, 16)"),
    ],
)  # fmt: skip
def test_a_configuration_of_another_model(
    variation: Callable[..., Path], refuse: Callable[..., str], config: dict[str, Any], advice: str
) -> None:
    source = variation(**config)
    refuse(source, advice, f"correct {source / weights.CONFIG}")


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def transpose(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)})


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        (lambda tensors: tensors.pop(FC1), ["1 tensor missing", FC1]),
        (lambda tensors: tensors.update(extra=np.ones(2)), ["1 tensor unexpected", "extra"]),
        (rename(FC1, FC1 + "s"), ["1 tensor missing", FC1, "1 tensor unexpected", FC1 + "s"]),
        (transpose(FC1), ["1 tensor of another shape", f"{FC1} expected [256, 64] found [64, 256]"]),
        (
            lambda tensors: tensors.update({"\x1b[31m../../etc/passwd\n": np.ones(2)}),
            ["1 tensor unexpected", "\\x1b[31m../../etc/passwd\\n"],
        ),
        (lambda tensors: tensors.update({"x" * 5000: np.ones(2)}), ["1 tensor unexpected", "xxx..."]),
        (lambda tensors: tensors.clear() or tensors.update(a=np.ones(2)), ["no BEiT names (known", "1 tensors: a"]),
    ],
)
def test_tensors_that_do_not_fit(
    variation: Callable[..., Path],
    refuse: Callable[..., str],
    change: Callable[[Tensors], object],
    needles: list[str],
) -> None:
    refuse(variation(change), *needles)


def test_overwrite_replaces_models_only(tmp_path: Path) -> None:
    """A slip of the keyboard must not cost a home directory, nor the source its own life."""
    from beit_jax.convert import convert
    from beit_jax.hub import Source

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(BeitJaxError, match=rf"{tmp_path}/home: holds no native checkpoint"):
        convert(Source(DIGITS, "digits"), tmp_path / "home", overwrite=True)
    copy = tmp_path / "copy"
    shutil.copytree(DIGITS, copy)
    with pytest.raises(BeitJaxError, match="holds the source itself"):
        convert(Source(copy, "digits"), copy, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists() and (copy / "model.safetensors").exists()
