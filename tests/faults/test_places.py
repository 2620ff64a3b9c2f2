"""Places where nothing can be written: one line, exit code 2, nothing left. A row is a place, a column a command."""

import os
import resource
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from beit_jax.cli.main import main

DIGITS = Path(str(files("beit_jax") / "digits"))
IMAGE = next(iter(sorted((DIGITS / "images").iterdir())))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("native") / "digits"
    assert main(["convert", str(DIGITS), str(directory)]) == 0
    return directory


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A directory with everything that a destination may wrongly be or lie in."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "file").write_text("a person's")
    (work / "loop").symlink_to("loop")
    (work / "loop.npz").symlink_to("loop.npz")
    os.mkfifo(work / "pipe.npz")
    (work / "folder.npz").mkdir()
    return work


def listed(work: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(work)), path.lstat().st_size) for path in work.rglob("*"))


Command = Callable[[Path, Path], list[str]]
COMMANDS: dict[str, Command] = {
    "convert": lambda native, out: ["convert", str(DIGITS), str(out)],
    "export": lambda native, out: ["export", str(native), str(out)],
    "export original": lambda native, out: ["export", str(native), str(out), "--to", "original"],
    "prepare": lambda native, out: ["prepare", "digits", str(out)],
    "train": lambda native, out: ["train", "digits_finetune", "--data", "nowhere", "--out", str(out)],
    "features": lambda native, out: ["features", str(native), str(IMAGE), "-o", f"{out}.npz"],
}
PLACES = [
    ("x" * 300, "name is too long: 30", "at most 2"),
    ("missing/out", "missing", "create it first"),
    ("file/out", "is a file, not a directory", "choose another place"),
    ("file/sub/out", "lies in a file", "choose another place"),
    ("loop/out", "symbolic links", "choose another place"),
    ("n\0ul", "no name of a file", "choose another"),
]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *needles: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    message = captured.err.removeprefix("error: ").removesuffix("\n")
    assert captured.out == "" and captured.err == f"error: {message}\n" and message.isprintable()
    for needle in needles:
        assert needle in message
    return message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("place", "found", "advice"), PLACES, ids=[repr(place[:12]) for place, *_ in PLACES])
def test_nothing_can_be_made_there(
    native: Path, work: Path, capsys: pytest.CaptureFixture[str], command: str, place: str, found: str, advice: str
) -> None:
    before = listed(work)
    refused(COMMANDS[command](native, work / place), capsys, found, advice)
    assert listed(work) == before


@pytest.mark.parametrize("command", ["convert", "export", "prepare"])
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_the_longest_names(native: Path, work: Path, command: str, name: str) -> None:
    assert main(COMMANDS[command](native, work / name)) == 0
    assert main([*COMMANDS[command](native, work / name), "--overwrite"]) == 0
    assert [path.name for path in work.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_read_only(
    native: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    before, access = listed(work), os.access
    # Faked: root, who may run this, is refused by a read-only file system only.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != work and access(path, mode))
    refused(COMMANDS[command](native, work / "out"), capsys, str(work), "not writable")
    assert listed(work) == before


@pytest.mark.parametrize("name", ["loop.npz", "pipe.npz", "folder.npz"])
def test_files_that_no_file_replaces(native: Path, work: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = listed(work)
    refused(["features", str(native), str(IMAGE), "-o", str(work / name)], capsys, "expected a file name", name)
    assert listed(work) == before


@pytest.mark.parametrize("name", ["file", "loop"])
def test_a_run_that_is_no_directory(work: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = listed(work)
    refused(COMMANDS["train"](work, work / name), capsys, "expected a directory for the run", name)
    assert listed(work) == before


@pytest.fixture
def small_files() -> Iterator[None]:
    """The shell's ``ulimit -f``: no file may become larger than 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["convert", "export", "export original", "prepare"])
def test_files_that_may_not_become_so_large(
    native: Path, work: Path, capsys: pytest.CaptureFixture[str], small_files: None, command: str
) -> None:
    before = listed(work)
    refused(COMMANDS[command](native, work / "out"), capsys, f"{work / 'out'}: ", "may not become that large")
    assert listed(work) == before


def test_a_file_system_that_takes_no_files(native: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["features", str(native), str(IMAGE), "-o", "/proc/x.npz"], capsys, "/proc/x.npz", "choose another place")


def test_a_link_to_a_file_is_written_through(native: Path, work: Path) -> None:
    (work / "link.npz").symlink_to("file")
    assert main(["features", str(native), str(IMAGE), "-o", str(work / "link.npz")]) == 0
    assert not (work / "link.npz").is_symlink() and (work / "file").read_text() == "a person's"
