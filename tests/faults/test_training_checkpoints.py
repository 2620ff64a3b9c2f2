"""Training checkpoints on bad disks, beside other runs and under SIGKILL: rows D1 to D19 of the fault catalogue."""

import asyncio
import gc
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from ports import free_address

from beit_jax.errors import BeitJaxError
from beit_jax.train.checkpoints import checkpointer as checkpoint
from beit_jax.train.checkpoints.checkpointer import AllDamaged, Checkpoints, SaveFailed

State = dict[str, Any]


def values(step: int) -> State:
    """Incompressible, and different for every step."""
    rng = np.random.default_rng(step)
    layers = {name: jnp.asarray(rng.standard_normal((64, 129), np.float32)) for name in ("first", "second")}
    return {"params": layers, "step": jnp.int32(step)}


WANTED = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values(0))


def is_step(state: State, step: int) -> bool:
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(values(step)), strict=True)
    return all(np.asarray(left).tobytes() == np.asarray(right).tobytes() for left, right in pairs)


def write(directory: Path, *steps: int) -> None:
    with Checkpoints(directory, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, values(step), {"step": step})


def restore(directory: Path) -> tuple[int | None, list[str]]:
    """The step that is restored, its values compared, and the warnings."""
    warnings: list[str] = []
    with Checkpoints(directory, keep=9, warn=warnings.append) as checkpoints:
        restored = checkpoints.restore(WANTED)
    assert all("\n" not in warning for warning in warnings)
    if restored is None:
        return None, warnings
    assert is_step(restored.state, restored.step) and restored.extra == {"step": restored.step}
    return restored.step, warnings


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 5 and 10. Not to be changed."""
    directory = tmp_path_factory.mktemp("saved")
    write(directory, 5, 10)
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


# Damage: D4 to D7


def test_flipped_bits_are_never_restored(saved: Path, tmp_path: Path) -> None:
    """Every file, and 60 places at random: the step before takes its place, or there is an error."""
    rng = random.Random(0)
    names = [path.relative_to(saved) for path in files(saved / "10")]
    sizes = [(saved / name).stat().st_size for name in names]
    chosen = [name for name, size in zip(names, sizes, strict=True) if size]
    chosen += rng.choices(names, weights=sizes, k=60)
    for trial, name in enumerate(chosen):
        run = shutil.copytree(saved, tmp_path / str(trial))
        data = bytearray((run / name).read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (run / name).write_bytes(data)
        step, warnings = restore(run)
        assert step == 5, f"{name} of trial {trial}"
        assert len(warnings) == 1 and warnings[0].startswith(f"{run / '10'}: damaged (")
        assert (run / "10.bad").is_dir() and not (run / "10").exists()
        shutil.rmtree(run)


def test_a_mended_checkpoint_is_used_again(run: Path) -> None:
    path = max(files(run / "10"), key=lambda path: path.stat().st_size)
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    assert restore(run)[0] == 5
    (run / "10.bad").rename(run / "10")
    path.write_bytes(intact)
    assert restore(run) == (10, [])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "garbled": lambda path: path.write_bytes(b"\xff{]" * (path.stat().st_size // 3 + 1)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_are_noticed(saved: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    for trial, path in enumerate(files(saved / "10")):
        if not path.stat().st_size:
            continue
        run = shutil.copytree(saved, tmp_path / str(trial))
        name = path.relative_to(saved)
        damage(run / name)
        step, warnings = restore(run)
        assert step == 5, name
        assert len(warnings) == 1 and name.name in warnings[0]
        assert warnings[0].endswith("; renamed to 10.bad")


def test_partial_copies_are_noticed(run: Path) -> None:
    """An interrupted copy: nothing yet, directories without files, all but the last file, and a file for a step."""
    (run / "20").mkdir()
    shutil.copytree(run / "10", run / "30")
    for path in files(run / "30"):
        path.unlink()
    shutil.copytree(run / "10", run / "40")
    files(run / "40")[-1].unlink()
    (run / "50").write_text("")
    step, warnings = restore(run)
    assert step == 10
    assert [warning.split(":")[0] for warning in warnings] == [str(run / str(step)) for step in (50, 40, 30, 20)]
    assert {"20.bad", "30.bad", "40.bad", "50.bad"} <= set(os.listdir(run))


def test_a_step_does_not_pass_for_another(run: Path) -> None:
    (run / "10").rename(run / "20")
    step, warnings = restore(run)
    assert step == 5 and "it is step 10 under another's name" in warnings[0]


def test_saving_goes_on_after_damage(run: Path) -> None:
    """An empty directory with a number for a name makes Orbax's own manager unusable."""
    (run / "20").mkdir()
    with Checkpoints(run, keep=9, warn=lambda message: None) as checkpoints:
        assert checkpoints.restore(WANTED) is not None
        for step in (15, 20):
            checkpoints.save(step, values(step), {"step": step})
    assert restore(run) == (20, [])


def test_names_of_damaged_steps_are_not_used_twice(run: Path) -> None:
    for _ in range(2):
        (run / "20").mkdir()
        assert restore(run)[0] == 10
    assert {"20.bad", "20.bad-2"} <= set(os.listdir(run))


def test_other_names_are_left_alone(run: Path) -> None:
    for name in ("foo", "12abc", "-3", "007", "best", "7.tmpfile"):
        (run / name).mkdir()
    before = sorted(os.listdir(run))
    assert restore(run) == (10, [])
    assert sorted(os.listdir(run)) == before


def test_all_damaged_is_an_error_and_stays_one(run: Path) -> None:
    for step in ("5", "10"):
        os.truncate(run / step / "manifest.json", 10)
    for _ in range(2):  # a scheduler that starts the run again must not make it begin again
        with pytest.raises(AllDamaged, match=r"damaged \(10.bad, 5.bad\)") as raised:
            restore(run)
        assert raised.value.exit_code == 7 and "\n" not in str(raised.value)


def test_an_unreadable_file_is_not_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.parent.name == "10":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BeitJaxError, match=r"10/manifest.json: .*Permission denied"):
        restore(run)
    assert (run / "10").exists()


# Failed saves: D2, D3, D18


@contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond 20,000 bytes; writing more is an error as on a full disk, though of another number."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def single(step: int) -> State:
    """One array. Where several fail, Orbax closes its event loop at the first and the others call back into nothing."""
    return {"words": values(step)["params"]["first"]}


FULL = """
import sys, resource, time
from pathlib import Path
import jax, numpy as np
from beit_jax.train.checkpoints.checkpointer import Checkpoints, SaveFailed

def values(step):
    return {f"layer{i}": np.random.default_rng([step, i]).standard_normal((100, 300), np.float32) for i in range(20)}

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def failure(action):
    try:
        while True:
            action()
            time.sleep(0.01)
    except SaveFailed as error:
        print(error.step, error.retry, error)

with Checkpoints(Path(sys.argv[1]), keep=9) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, values(step), {})
    checkpoints.wait()
    limit(300_000)
    checkpoints.save(4, values(4), {})
    failure(checkpoints.poll)
    checkpoints.save(5, values(5), {})
    failure(lambda: checkpoints.save(6, values(6), {}))
    limit(resource.RLIM_INFINITY)
    checkpoints.save(6, values(6), {})  # the current step, as the loop does when it was told
wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values(0))
with Checkpoints(Path(sys.argv[1]), keep=9) as checkpoints:
    restored = checkpoints.restore(wanted)
    assert all(np.array_equal(restored.state[name], value) for name, value in values(6).items())
    print("restored", restored.step)
"""


def test_a_full_disk_is_reported_and_saving_goes_on(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    first, second, last = run.stdout.splitlines()
    reason = r"not saved \(.*File too large.*\); [\d,]+ bytes are free, the last one is step 3, failure"
    assert re.fullmatch(rf"4 True {tmp_path}/4: {reason} 1 of 3 in a row", first)
    assert re.fullmatch(rf"5 True {tmp_path}/5: {reason} 2 of 3 in a row", second)
    assert last == "restored 6"
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3", "6", "lock"]
    assert "/orbax/" not in run.stderr  # its tracebacks


@pytest.mark.parametrize(("file", "shown"), [("/lib/orbax/checkpoint/handlers.py", False), ("/lib/other.py", True)])
def test_errors_that_orbax_left_behind_are_not_shown(file: str, shown: bool, caplog: pytest.LogCaptureFixture) -> None:
    names: dict[str, Any] = {}
    exec(compile("async def write():\n    raise ValueError('disk full')\n", file, "exec"), names)

    async def main() -> None:
        asyncio.get_running_loop().create_task(names["write"]())
        await asyncio.sleep(0)  # it fails
        await asyncio.sleep(0)  # and is forgotten, with an error that nobody took
        gc.collect()

    asyncio.run(main())
    assert ("never retrieved" in caplog.text) == shown


def test_the_third_failure_in_a_row_is_the_last(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=9) as checkpoints, full_disk():
        retry = []
        for step in (1, 2, 3):
            checkpoints.save(step, single(step), {})
            with pytest.raises(SaveFailed, match=f"/{step}: not saved .*there is none before it") as raised:
                checkpoints.wait()
            retry.append(raised.value.retry)
        assert retry == [True, True, False]
    assert restore(tmp_path)[0] is None


def test_a_success_between_failures_counts(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in (1, 3, 5):
            with full_disk():
                checkpoints.save(step, single(step), {})
                with pytest.raises(SaveFailed) as raised:
                    checkpoints.wait()
            assert raised.value.retry
            checkpoints.save(step + 1, single(step + 1), {})
            checkpoints.wait()


def test_the_last_save_of_a_run_cannot_fail_unseen(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(SaveFailed, match="/1: not saved"), Checkpoints(tmp_path, keep=9) as checkpoints:
        checkpoints.save(1, single(1), {})


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path: Path) -> None:
    warnings: list[str] = []
    with full_disk(), pytest.raises(KeyError), Checkpoints(tmp_path, keep=9, warn=warnings.append) as checkpoints:
        checkpoints.save(1, single(1), {})
        raise KeyError
    assert len(warnings) == 1 and "/1: not saved" in warnings[0]


def test_what_ends_a_run_does_not_end_its_save(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Checkpoints(tmp_path, keep=9) as checkpoints:
        checkpoints.save(1, values(1), {"step": 1})
        raise KeyError
    assert restore(tmp_path) == (1, [])


def test_too_little_space_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    usage = type(shutil.disk_usage(tmp_path))(99_999, 50_000, 49_999)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        checkpoints.save(2, values(2), {})
        with pytest.raises(SaveFailed, match=r"/2: not saved \(66,052 bytes are needed\); 49,999 bytes are free, "):
            checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["1", "lock"]


def test_nothing_is_deleted_for_a_step_that_cannot_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk flips a bit of what Orbax has just written. Orbax reads it without complaint."""
    read = checkpoint._read

    def flip_and_read(path: Path, records: Any) -> dict[str, np.ndarray]:
        largest = max(files(path), key=lambda path: path.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 4
        largest.write_bytes(data)
        return read(path, records)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, values(1), {"step": 1})
        checkpoints.wait()
        monkeypatch.setattr(checkpoint, "_read", flip_and_read)
        checkpoints.save(2, values(2), {"step": 2})
        with pytest.raises(SaveFailed, match=r"/2: not saved \(Damaged: params/(first|second): digest mismatch\)"):
            checkpoints.wait()
        monkeypatch.setattr(checkpoint, "_read", read)
    assert sorted(os.listdir(tmp_path)) == ["1", "lock"]
    assert restore(tmp_path) == (1, [])


# Other processes: D1, D8, D9, D10

HOLD = """
import sys, time
from pathlib import Path
from beit_jax.lock import exclusive
directory = Path(sys.argv[1])
with exclusive(directory / "lock", directory, remove=False):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_at_once(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        owner = rf"process {other.pid} on {socket.gethostname()} since \d\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        began = time.monotonic()
        with pytest.raises(BeitJaxError, match=rf"^{tmp_path}: in use by {owner}\S*; wait for it") as raised:
            write(tmp_path, 1)
        assert time.monotonic() - began < 1 and "\n" not in str(raised.value)
        assert os.listdir(tmp_path) == ["lock"]
        other.kill()
    assert "process" in (tmp_path / "lock").read_text()  # the dead one's, and no obstacle
    write(tmp_path, 1)
    assert restore(tmp_path) == (1, [])


def test_a_second_run_of_the_same_process_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1), pytest.raises(BeitJaxError, match="in use by process"):
        write(tmp_path, 1)


def test_what_killed_saves_left_is_removed(run: Path) -> None:
    for name in ("11.tmp", "12.tmp-1", "13.tmp-2.orbax-checkpoint-tmp"):
        (run / name / "state").mkdir(parents=True)
        (run / name / "state" / "data").write_bytes(bytes(1_234_567))
    step, warnings = restore(run)
    assert step == 10
    assert warnings == [
        f"{run / name}: left behind by a killed process, removed (1,234,567 bytes)"
        for name in ("11.tmp", "12.tmp-1", "13.tmp-2.orbax-checkpoint-tmp")
    ]
    assert sorted(os.listdir(run)) == ["10", "5", "lock"]


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_no_place_is_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / ("" if kind == "a file" else "run")
    with pytest.raises(BeitJaxError, match=r"no place for checkpoints \(.*(exists|Not a directory)\)$"):
        write(directory, 1)


STEPS, SIZE = 40, 1_500_000
COUNT = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, xxhash
from beit_jax.train.checkpoints.checkpointer import Checkpoints

def digest(state): return xxhash.xxh3_128_hexdigest(np.asarray(state["words"]).tobytes())

@jax.jit
def advance(state):
    return {"words": state["words"] * np.uint32(1664525) + state["step"].astype(jnp.uint32), "step": state["step"] + 1}

steps, size = int(sys.argv[2]), int(sys.argv[3])
start = {"words": jnp.arange(size, dtype=jnp.uint32), "step": jnp.int32(0)}
abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), start)
with Checkpoints(Path(sys.argv[1]), keep=2) as checkpoints:
    restored = checkpoints.restore(abstract)
    state = start if restored is None else restored.state
    print(int(state["step"]), digest(state), flush=True)
    for step in range(int(state["step"]), steps):
        state = advance(state)
        checkpoints.save(step + 1, state, {})
        print("saving", flush=True)
print(int(state["step"]), digest(state), flush=True)
"""


def counted(steps: int) -> str:
    words = np.arange(SIZE, dtype=np.uint32)
    for step in range(steps):
        words = words * np.uint32(1664525) + np.uint32(step)
    return xxhash.xxh3_128_hexdigest(words.tobytes())


def test_sigkill_at_any_time(tmp_path: Path) -> None:
    """Saves 6 MB at every step, is killed five times, and ends as if it never had been."""
    rng, starts, left_behind = random.Random(1), [], 0
    command = [sys.executable, "-c", COUNT, str(tmp_path), str(STEPS), str(SIZE)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for _ in range(5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
            assert child.stdout is not None
            starts.append(child.stdout.readline().decode().split())
            for _ in range(rng.randint(3, 6)):  # a save begins, so the one before it has ended
                began = time.monotonic()
                assert child.stdout.readline() == b"saving\n"
            time.sleep(rng.uniform(0, time.monotonic() - began))
            child.kill()
        assert child.returncode == -9, "it ended before it was killed"
        left_behind += any(".tmp" in path.name for path in tmp_path.iterdir())
    last = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    lines = [line.split() for line in last.stdout.splitlines() if line != "saving"]
    starts.append(lines[0])
    begun = [int(step) for step, _ in starts]
    assert [digest for _, digest in starts] == [counted(step) for step in begun]
    assert all(late - early >= 2 for early, late in pairwise(begun)), "a committed step was lost"
    assert left_behind, "no kill came during a save"
    assert lines[1:] == [[str(STEPS), counted(STEPS)]]
    assert sorted(os.listdir(tmp_path)) == [str(STEPS - 1), str(STEPS), "lock"]


POD = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
index, address, where = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(address, 2, index, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from beit_jax.errors import BeitJaxError
from beit_jax.train.checkpoints.checkpointer import Checkpoints

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
host = {"kernel": np.random.default_rng(0).standard_normal((6, 8), np.float32), "step": np.int32(3)}
layout = {"kernel": NamedSharding(mesh, P(None, "fsdp")), "step": NamedSharding(mesh, P())}
state = {
    name: jax.make_array_from_callback(value.shape, layout[name], lambda index, value=value: value[index])
    for name, value in host.items()
}
abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()}
update = jax.jit(lambda state: {"kernel": state["kernel"] * 2, "step": state["step"] + 1}, donate_argnums=0)
try:
    with Checkpoints(where, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract)
        if restored is not None:
            for name, leaf in restored.state.items():
                for shard in leaf.addressable_shards:
                    assert np.asarray(shard.data).tobytes() == np.asarray(host[name] * 2)[shard.index].tobytes(), name
            print("restored", restored.step, restored.extra)
        else:
            checkpoints.save(3, state, {"a": 1})
            state = update(state)
            state["step"] = jax.device_put(np.int32(6), layout["step"])
            checkpoints.save(4, state, {"a": 2})
            state = update(update(state))
            print("saved")
except BeitJaxError as error:
    print("error:", error)
jax.distributed.shutdown()
"""


def pod(*directories: Path) -> list[str]:
    """What two processes with two devices each say; one directory for both, or one each."""
    address = free_address()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", POD, str(index), address, str(directories[index % len(directories)])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    killer = threading.Timer(60, lambda: [child.kill() for child in children])
    killer.start()
    said = [child.communicate() for child in children]
    killer.cancel()
    assert [child.returncode for child in children] == [0, 0], said
    return [out.splitlines()[-1] for out, _ in said]  # Gloo, too, writes to stdout


def test_two_processes_save_one_checkpoint(tmp_path: Path) -> None:
    assert pod(tmp_path) == ["saved", "saved"]
    assert sorted(os.listdir(tmp_path)) == ["3", "4", "lock"]
    assert pod(tmp_path) == ["restored 4 {'a': 2}"] * 2
    with Checkpoints(tmp_path, keep=2) as checkpoints:  # and one process reads it
        wanted = {"kernel": jax.ShapeDtypeStruct((6, 8), np.float32), "step": jax.ShapeDtypeStruct((), np.int32)}
        restored = checkpoints.restore(wanted)
    expected = np.random.default_rng(0).standard_normal((6, 8), np.float32) * 2
    assert restored is not None and np.asarray(restored.state["kernel"]).tobytes() == expected.tobytes()


def test_a_directory_that_hosts_do_not_share_is_refused(tmp_path: Path) -> None:
    message = (
        f"{tmp_path / 'a'}: process 1 does not see what process 0 wrote here; choose a directory that all hosts share"
    )
    first, second = pod(tmp_path / "a", tmp_path / "b")
    assert first == f"error: {message}" and second == first.replace("/a:", "/b:")
