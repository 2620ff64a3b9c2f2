"""Outputs appear whole or not at all, whatever happens to the process that writes them."""

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trees import tree

from beit_jax.atomic import Contents, check_destination, new_directory, new_file
from beit_jax.errors import BeitJaxError

TIMEOUT = 30  # seconds, of every child process
OLD = {"out": None, "out/config": b"old", "out/weights": b"old"}
NEW = {"out": None, "out/config": b"new", "out/weights": b"new"}


def fill(directory: Path, content: str) -> None:
    (directory / "config").write_text(content)
    (directory / "weights").write_text(content)


KIND = Contents("model", ("config", "weights"), lambda directory: (directory / "config").is_file())


def make(destination: Path, content: str = "new", *, overwrite: bool = False) -> None:
    with new_directory(destination, overwrite=overwrite, contents=KIND) as partial:
        fill(partial, content)


def refusal(action: Callable[[], object], *needles: object) -> str:
    with pytest.raises(BeitJaxError) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable(), message
    for needle in needles:
        assert str(needle) in message
    return message


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty directory for outputs, apart from what else a test writes."""
    path = tmp_path / "work"
    path.mkdir()
    return path


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# A new directory


def test_a_directory_appears_when_it_is_complete(work: Path) -> None:
    with new_directory(work / "out") as partial:
        fill(partial, "new")
        assert not (work / "out").exists()
        assert partial.parent == work  # the same file system: a rename, not a copy
    assert tree(work) == NEW


def test_a_name_the_block_may_use_is_not_reserved(work: Path) -> None:
    names = ["owner", "lock", "partial", ".out.partial", ".out.lock"]
    with new_directory(work / "out") as partial:
        assert list(partial.iterdir()) == []
        for name in names:
            (partial / name).write_text(name)
    assert tree(work) == {"out": None} | {f"out/{name}": name.encode() for name in names}


@pytest.mark.parametrize("name", [".out", "..out", "out.d", "with space", "-out", "ä", "out.partial"])
def test_unusual_names(work: Path, name: str) -> None:
    make(work / name)
    make(work / name, "newer", overwrite=True)
    assert [path.name for path in work.iterdir()] == [name]
    assert (work / name / "config").read_text() == "newer"


@pytest.mark.parametrize("name", ["out", "out/", "./out", "../work/out"])
def test_relative_destinations(work: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(work)
    make(Path(name))
    assert tree(work) == NEW


@pytest.mark.parametrize("failure", [ValueError, BeitJaxError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("before", [{}, OLD])
def test_a_failure_changes_nothing(
    work: Path, failure: type[BaseException], before: dict[str, bytes | str | None]
) -> None:
    if before:
        make(work / "out", "old")
    with (
        pytest.raises(failure, match="sentinel"),
        new_directory(work / "out", overwrite=True, contents=KIND) as partial,
    ):
        fill(partial, "new")
        assert OLD.items() <= tree(work).items() or not before
        raise failure("sentinel")
    assert tree(work) == before
    make(work / "out", overwrite=True)
    assert tree(work) == NEW


# What is already there


def test_an_existing_directory_is_kept(work: Path) -> None:
    make(work / "out", "old")
    refusal(lambda: make(work / "out"), work / "out", "already exists", "--overwrite")
    refusal(lambda: check_destination(work / "out", overwrite=False), work / "out", "already exists")
    assert tree(work) == OLD


def test_overwrite_keeps_the_old_one_until_the_end(work: Path) -> None:
    make(work / "out", "old")
    with new_directory(work / "out", overwrite=True, contents=KIND) as partial:
        fill(partial, "new")
        assert OLD.items() <= tree(work).items()
    assert tree(work) == NEW


def test_overwrite_refuses_what_is_not_its_own(work: Path) -> None:
    make(work / "out", "old")
    (work / "out" / "notes.txt").write_text("a person's")
    before = tree(work)
    refusal(lambda: make(work / "out", overwrite=True), work / "out", "notes.txt", "move it away")
    assert tree(work) == before


def test_what_is_kept_moves_into_the_new_one(work: Path) -> None:
    make(work / "out", "old")
    (work / "out" / "notes").mkdir()
    (work / "out" / "notes" / "a.txt").write_text("a person's")
    with new_directory(work / "out", overwrite=True, contents=KIND, keep_others=True) as partial:
        fill(partial, "new")
    assert tree(work) == NEW | {"out/notes": None, "out/notes/a.txt": b"a person's"}
    before = tree(work)
    with (
        pytest.raises(ValueError, match="sentinel"),
        new_directory(work / "out", overwrite=True, contents=KIND, keep_others=True),
    ):
        raise ValueError("sentinel")
    assert tree(work) == before


@pytest.mark.parametrize("content", [{"thesis.tex": "years of work"}, {"weights": "somebody else's"}])
def test_only_its_own_kind_is_replaced(work: Path, content: dict[str, str]) -> None:
    (work / "out").mkdir()
    for name, text in content.items():
        (work / "out" / name).write_text(text)
    before = tree(work)
    refusal(lambda: make(work / "out", overwrite=True), work / "out", "holds no model", "choose another name")
    assert tree(work) == before


def test_strangers_with_our_names_are_kept(work: Path) -> None:
    (work / ".out.old").mkdir()
    (work / ".out.old" / "backup").write_text("years of work")
    before = tree(work)
    refusal(lambda: make(work / "out"), work / ".out.old", "move it away")
    assert tree(work) == before


def test_overwrite_needs_nothing_to_replace(work: Path) -> None:
    make(work / "out", overwrite=True)
    assert tree(work) == NEW


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to a directory", "dangling link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_only_a_directory_is_replaced(work: Path, kind: str, overwrite: bool) -> None:
    (work / "file").write_text("kept")
    make(work / "directory", "old")
    targets = {"link to a file": "file", "link to a directory": "directory", "dangling link": "nowhere"}
    if kind == "file":
        (work / "out").write_text("kept")
    else:
        (work / "out").symlink_to(targets[kind])
    before = tree(work)
    needle = "expected a directory to replace" if overwrite else "already exists"
    refusal(lambda: make(work / "out", overwrite=overwrite), work / "out", needle)
    refusal(lambda: check_destination(work / "out", overwrite=overwrite), work / "out", needle)
    assert tree(work) == before


def test_a_mount_point_is_refused_before_the_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(work / "out", "old")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == work / "out")
    refusal(lambda: check_destination(work / "out", overwrite=True), work / "out", "mount point")


def test_what_appears_meanwhile_is_kept(work: Path) -> None:
    """Made by something that knows nothing of locks, such as `mkdir` in another terminal."""

    def race() -> None:
        with new_directory(work / "out") as partial:
            fill(partial, "new")
            (work / "out").mkdir()
            fill(work / "out", "old")

    refusal(race, work / "out", "already exists")
    assert tree(work) == OLD


@pytest.mark.parametrize("name", [".", "..", "sub/..", "/", ""])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_needs_a_name(work: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool) -> None:
    (work / "sub").mkdir()
    monkeypatch.chdir(work)
    refusal(lambda: check_destination(Path(name), overwrite=overwrite), "expected the name")
    refusal(lambda: make(Path(name), overwrite=overwrite), "expected the name")
    assert tree(work) == {"sub": None}


# Where it is to be


def test_a_missing_parent(work: Path) -> None:
    for action in (make, lambda path: check_destination(path, overwrite=False)):
        refusal(lambda action=action: action(work / "no" / "out"), work / "no", "does not exist", "create it first")
    assert tree(work) == {}


def test_a_parent_that_is_a_file(work: Path) -> None:
    (work / "file").write_text("kept")
    refusal(lambda: make(work / "file" / "out"), work / "file", "is a file")
    refusal(lambda: make(work / "file" / "sub" / "out"), work / "file", "lies in a file")
    assert tree(work) == {"file": b"kept"}


def test_a_parent_that_is_not_writable(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Faked: root, who may run this, is refused by a read-only file system only.
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == work and mode & os.W_OK))
    for action in (make, lambda path: check_destination(path, overwrite=True)):
        refusal(lambda action=action: action(work / "out"), work / "out", work, "not writable")
    with pytest.raises(BeitJaxError, match="not writable"), new_file(work / "out"):
        raise AssertionError("the block must not run")
    assert tree(work) == {}


def test_a_name_too_long_for_the_file_system(work: Path) -> None:
    refusal(lambda: make(work / ("x" * 256)), "cannot be created", "too long")
    assert tree(work) == {}


def test_not_enough_space(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(work)._replace(free=4999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BeitJaxError) as caught, new_directory(work / "out", need_bytes=5000):
        raise AssertionError("the block must not run")
    assert f"{work}: 5,000 bytes are needed, 4,999 are free" in str(caught.value)
    assert tree(work) == {}
    with new_directory(work / "out", need_bytes=4999) as partial:
        fill(partial, "new")
    assert tree(work) == NEW


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_disk_becomes_full(work: Path, code: int) -> None:
    make(work / "out", "old")

    def run_out() -> None:
        with new_directory(work / "out", overwrite=True, contents=KIND) as partial:
            fill(partial, "new")
            raise OSError(code, os.strerror(code))

    refusal(run_out, work / "out", "disk is full", "nothing was kept")
    assert tree(work) == OLD


@pytest.mark.parametrize(
    ("mask", "directory", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640), (0o077, 0o700, 0o600)]
)
def test_modes_are_those_of_the_umask(
    work: Path, umask: Callable[[int], int], mask: int, directory: int, file: int
) -> None:
    umask(mask)
    make(work / "out")
    with new_file(work / "file") as partial:
        partial.write_text("new")
    found = {name: stat.S_IMODE((work / name).stat().st_mode) for name in ("out", "out/config", "file")}
    assert found == {"out": directory, "out/config": file, "file": file}


# Killed

KILLED_EVERYWHERE = """
# Makes (or replaces) a directory once for every change of the file system that this takes, killed before that change.
import os, signal, sys
from pathlib import Path
from beit_jax.atomic import Contents, new_directory

KIND = Contents("model", ("config", "weights"), lambda directory: True)
overwrite, root = sys.argv[1] == "overwrite", Path(sys.argv[2])
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock"}

def write(destination, content):
    with new_directory(destination, overwrite=overwrite, contents=KIND) as partial:
        (partial / "config").write_text(content)
        (partial / "weights").write_text(content)

def child(moment):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    work = root / str(moment)
    work.mkdir()
    if overwrite:
        write(work / "out", "old")
    sys.addaudithook(hook)
    write(work / "out", "new")

for moment in range(1, 100):
    pid = os.fork()
    if not pid:
        child(moment)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(status)
    if status == 0:
        break
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_before_any_change(work: Path, overwrite: bool) -> None:
    """SIGKILL leaves no output, the old one or the new one, and the next call puts everything right."""
    command = [sys.executable, "-c", KILLED_EVERYWHERE, "overwrite" if overwrite else "create", str(work)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    statuses = [int(line) for line in result.stdout.split()]
    assert statuses[-1] == 0, result.stderr
    assert set(statuses[:-1]) == {-signal.SIGKILL}
    assert len(statuses) > 7  # lock, directory, two files, renames, removals
    left_behind = 0
    for moment in range(1, len(statuses)):
        place = work / str(moment)
        left = tree(place)
        left_behind += any(name.startswith(".") for name in left)
        whole = {name: content for name, content in left.items() if name.split("/")[0] == "out"}
        assert whole in (OLD, NEW) or whole == {}
        if not whole and overwrite:  # between the two renames: the old one is aside, and comes back by itself
            refusal(lambda place=place: make(place / "out", "newest"), "already exists")
            assert tree(place) == OLD
        make(place / "out", "newest", overwrite=bool(whole) or overwrite)
        assert tree(place) == {name: content and b"newest" for name, content in NEW.items()}
    assert left_behind > 4


def test_remains_of_a_process_with_our_id(work: Path) -> None:
    """A container that restarts has the same process ids, and often the same name, as the one that was killed."""
    (work / ".out.lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    (work / ".out.partial" / "sub").mkdir(parents=True)
    (work / ".out.partial" / "config").write_text("half")
    make(work / "out")
    assert tree(work) == NEW


def test_remains_that_cannot_be_removed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / ".out.lock").touch()
    (work / ".out.partial").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    refusal(lambda: make(work / "out"), work / ".out.partial", "Permission denied", "remove it")


# Two at once

HOLDER = """
import sys
from pathlib import Path
from beit_jax.atomic import new_directory

with new_directory(Path(sys.argv[1])) as partial:
    (partial / "config").write_text("new")
    print("ready", flush=True)
    sys.stdin.readline()
    (partial / "weights").write_text("new")
"""


@pytest.fixture
def holder(work: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing; it goes on when told to."""
    command = [sys.executable, "-c", HOLDER, str(work / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_the_second_process_is_refused_and_the_first_finishes(work: Path, holder: subprocess.Popen[str]) -> None:
    before = tree(work)
    for overwrite in (False, True):
        needles = (work / "out", f"in use by process {holder.pid} on {socket.gethostname()}")
        refusal(lambda overwrite=overwrite: make(work / "out", overwrite=overwrite), *needles)
    assert tree(work) == before
    make(work / "other")  # only the same destination is taken
    shutil.rmtree(work / "other")
    holder.communicate("go on\n", timeout=TIMEOUT)
    assert holder.returncode == 0
    assert tree(work) == NEW


def test_a_killed_process_blocks_nobody(work: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait(TIMEOUT)
    assert any(name.endswith("config") for name in tree(work))  # it did leave something
    make(work / "out")
    assert tree(work) == NEW


def test_two_in_one_process(work: Path) -> None:
    (work / ".out.lock").write_text("process 1234567890 on a-host-with-a-long-name-that-was-killed")
    with new_directory(work / "out") as partial:
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        refusal(lambda: make(work / "out"), f"{work / 'out'}: in use by {owner}")
        fill(partial, "new")
    assert tree(work) == NEW


CROWD = """
# Several processes replace one directory again and again. Exits with 1 if any sees anything but success or a refusal.
import os, sys, time
from pathlib import Path
from beit_jax.errors import BeitJaxError
from beit_jax.atomic import Contents, new_directory

KIND = Contents("model", ("a", "b"), lambda directory: True)
destination = Path(sys.argv[1])

def replace(content):
    try:
        with new_directory(destination, overwrite=True, contents=KIND) as partial:
            assert not list(partial.iterdir())
            for name in ("a", "b"):
                (partial / name).write_text(content)
                time.sleep(0.0005)
            assert {path.read_text() for path in partial.iterdir()} == {content}
        return True
    except BeitJaxError as error:
        assert "in use by" in str(error), error
        return False

def child(number):
    done = refused = 0
    while done < 30:
        if replace(f"{number} {done}"):
            done += 1
        else:
            refused += 1
    print(refused, flush=True)
    os._exit(0)

pids = []
for number in range(4):
    pid = os.fork()
    if not pid:
        try:
            child(number)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    pids.append(pid)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))
"""


def test_a_crowd(work: Path) -> None:
    command = [sys.executable, "-c", CROWD, str(work / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert sum(map(int, result.stdout.split())) > 10  # they did meet
    found = tree(work)
    assert list(found) == ["out", "out/a", "out/b"]
    assert found["out/a"] == found["out/b"]


# A new file


def test_a_file_appears_when_it_is_complete(work: Path) -> None:
    with new_file(work / "out.npz") as partial:
        partial.write_text("new")
        assert not (work / "out.npz").exists()
    assert tree(work) == {"out.npz": b"new"}
    with new_file(work / "out.npz") as partial:
        partial.write_text("newer")
        assert (work / "out.npz").read_text() == "new"
    assert tree(work) == {"out.npz": b"newer"}


@pytest.mark.parametrize("failure", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("started", [False, True])
def test_a_failed_file_changes_nothing(work: Path, failure: type[BaseException], started: bool) -> None:
    (work / "out.npz").write_text("old")
    with pytest.raises(failure, match="sentinel"), new_file(work / "out.npz") as partial:
        if started:
            partial.write_text("half")
        raise failure("sentinel")
    assert tree(work) == {"out.npz": b"old"}


def test_a_full_disk_ends_a_file_in_one_line(work: Path) -> None:
    (work / "out.npz").write_text("old")

    def run_out() -> None:
        with new_file(work / "out.npz") as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    refusal(run_out, work / "out.npz", "disk is full")
    assert tree(work) == {"out.npz": b"old"}


@pytest.mark.parametrize("name", ["directory", ".", "..", "no/out.npz", "file/out.npz"])
def test_a_file_that_cannot_be(work: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (work / "directory").mkdir()
    (work / "file").write_text("kept")
    monkeypatch.chdir(work)
    with pytest.raises(BeitJaxError, match=r"found a directory|does not exist|is a file"), new_file(Path(name)):
        raise AssertionError("the block must not run")
    assert tree(work) == {"directory": None, "file": b"kept"}
