"""Signals and hangs, in processes of their own: exit codes and what they leave behind."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from beit_jax.train.distributed.peers import HUNG
from beit_jax.train.loop.watch import INTERRUPTED, Interruption, Watchdog

TIMEOUT = 180.0  # for what takes seconds: the machine may be busy

PREAMBLE = """
import hashlib, os, signal, sys, threading, time
from beit_jax.train.loop.watch import INTERRUPTED, Interruption, Watchdog

def compile_for_ever():
    # Minutes inside C code that lets other threads run and Python's signal handlers not: as the compiler does.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""

LOOP = """
requests = []
with Interruption(requests.append):
    print("ready", flush=True)
    for step in range(100_000):
        time.sleep(0.01)
        if requests:
            print("saved", flush=True)
            sys.exit(INTERRUPTED)
"""

STUCK = """
def again(name):
    print(f"told of the second {name}", flush=True)

with Interruption(lambda name: print(f"asked by {name}", flush=True), again):
    print("ready", flush=True)
    compile_for_ever()
"""


@contextmanager
def process(code: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is gone when the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def started(running: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n", running.communicate()[1]
    return running


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_loop_after_its_step_and_the_save(number: signal.Signals) -> None:
    with process(LOOP) as running:
        started(running).send_signal(number)
        out, err = running.communicate(timeout=TIMEOUT)
    assert (running.returncode, out) == (INTERRUPTED, "saved\n")
    assert err == f"{number.name}: saving after this step, then stopping; once more stops at once\n"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_even_inside_the_compiler(second: signal.Signals) -> None:
    with process(STUCK) as running:
        started(running).send_signal(signal.SIGTERM)
        assert running.stderr is not None
        assert running.stderr.readline().startswith("SIGTERM: saving after this step")
        assert running.poll() is None
        running.send_signal(second)
        out, err = running.communicate(timeout=TIMEOUT)
    assert (running.returncode, out) == (INTERRUPTED, f"asked by SIGTERM\ntold of the second {second.name}\n")
    assert err == f"{second.name} again: stopping at once, nothing is saved\n"


def test_handlers_and_the_wakeup_pipe_are_as_before_at_the_end() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before, threads = [signal.getsignal(number) for number in numbers], threading.active_count()
    files = set(os.listdir("/proc/self/fd"))
    requests: queue.Queue[str] = queue.Queue()
    with pytest.raises(KeyError), Interruption(requests.put):
        assert [signal.getsignal(number) for number in numbers] != before
        assert requests.empty()
        signal.raise_signal(signal.SIGTERM)
        assert requests.get(timeout=TIMEOUT) == "SIGTERM"
        raise KeyError
    assert [signal.getsignal(number) for number in numbers] == before
    assert threading.active_count() == threads
    assert set(os.listdir("/proc/self/fd")) == files
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_of_others_do_not_count() -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        requests: queue.Queue[str] = queue.Queue()
        with Interruption(requests.put):
            for _ in range(3):
                signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGINT)  # comes after them through the same pipe
            assert requests.get(timeout=TIMEOUT) == "SIGINT"
    finally:
        signal.signal(signal.SIGUSR1, before)


# --- Hangs ------------------------------------------------------------------------------------------------------------


def finished(code: str) -> tuple[int, str, str]:
    with process(code) as running:
        out, err = running.communicate(timeout=TIMEOUT)
    return running.returncode, out, err


@pytest.mark.parametrize("hang", ["threading.Event().wait()", "compile_for_ever()", "time.sleep(600)"])
def test_a_hang_prints_all_stacks_and_exits(hang: str) -> None:
    code, out, err = finished(f"""
def waits_for_its_data():
    threading.Event().wait()

def hangs_here():
    {hang}

threading.Thread(target=waits_for_its_data, daemon=True).start()
with Watchdog(0.5 / 60):
    hangs_here()
""")
    assert (code, out) == (HUNG, "")
    assert err.startswith("no progress for 0.00") and "minutes (phase: step); the stacks of all threads:" in err
    assert "in hangs_here" in err and "in waits_for_its_data" in err


def test_who_beats_lives_on_in_every_phase() -> None:
    code, out, err = finished("""
with Watchdog(2.0 / 60) as watchdog:
    for _ in range(10):
        time.sleep(0.3)
        watchdog.beat()
    with watchdog.phase("evaluation"):
        for _ in range(10):
            time.sleep(0.3)
            watchdog.beat()
print("done")
""")
    assert (code, out, err) == (0, "done\n", "")


@pytest.mark.parametrize("phase", ["compile", "restore"])
def test_phases_that_take_long_have_four_times_the_patience_and_no_more(phase: str) -> None:
    code, out, err = finished(f"""
with Watchdog(1.0 / 60) as watchdog:
    with watchdog.phase("{phase}"):
        time.sleep(2.5)
    print("alive", flush=True)
    with watchdog.phase("{phase}"):
        start = time.monotonic()
        threading.Timer(3.5, lambda: print("patient", flush=True)).start()
        time.sleep(600)
""")
    assert (code, out) == (HUNG, "alive\npatient\n")
    assert f"(phase: {phase})" in err


def test_after_a_phase_the_usual_patience_counts_again() -> None:
    start = time.monotonic()
    code, _, err = finished("""
with Watchdog(0.5 / 60, phases={"compile": 1000.0}) as watchdog:
    with watchdog.phase("compile"):
        time.sleep(1.5)
    time.sleep(600)
""")
    assert code == HUNG and "(phase: step)" in err and time.monotonic() - start < TIMEOUT


def test_time_in_which_the_process_is_stopped_does_not_count() -> None:
    with process("""
with Watchdog(3.0 / 60):
    print("ready", flush=True)
    time.sleep(0.5)  # over as soon as the process goes on
    time.sleep(1.0)
    print("alive")
""") as running:
        started(running).send_signal(signal.SIGSTOP)
        time.sleep(5.0)
        running.send_signal(signal.SIGCONT)
        out, err = running.communicate(timeout=TIMEOUT)
    assert (running.returncode, out, err) == (0, "alive\n", "")


def test_the_thread_ends_with_the_block() -> None:
    threads = threading.active_count()
    with Watchdog(30.0) as watchdog, pytest.raises(KeyError), watchdog.phase("compile"):
        raise KeyError
    assert threading.active_count() == threads
