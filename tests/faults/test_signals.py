"""SIGINT and SIGTERM at any moment: one line, the shell's exit code, and no signal that is swallowed."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beit_jax.cli import conversion
from beit_jax.cli.main import main
from beit_jax.cli.stopping import SIGNALS, Stoppable, Stopped
from beit_jax.train.loop.watch import Interruption

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def in_plain_code(number: int, folder: Path) -> None:
    send(number)


def in_a_collectors_callback(number: int, folder: Path) -> None:
    """As JAX has one; Python drops what it raises."""
    sent = []

    def callback(phase: str, info: dict[str, int]) -> None:
        if not sent:
            sent.append(number)
            send(number)
            time.sleep(0.001)  # the handler runs here

    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)


def in_a_finalizer(number: int, folder: Path) -> None:
    class Dying:
        def __del__(self) -> None:
            send(number)
            time.sleep(0.001)

    Dying()


def in_an_import(number: int, folder: Path) -> None:
    """An exception there may pass through C++ code of a module, which ends the process by a fault."""
    (folder / "signals_itself.py").write_text(f"import os, time\nos.kill({os.getpid()}, {number})\ntime.sleep(0.01)\n")
    importlib.import_module("signals_itself")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", [in_plain_code, in_a_collectors_callback, in_a_finalizer, in_an_import])
def test_no_signal_is_lost(
    moment: Callable[[int, Path], None],
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "signals_itself", raising=False)
    before = [signal.getsignal(each) for each in SIGNALS], sys.unraisablehook

    def command(*, out: Path = Path("x"), json: bool = False) -> int:
        moment(number, tmp_path)
        for _ in range(400):  # the command would go on
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(conversion, "demo", command)
    assert main(["demo"]) == CODES[signal.Signals(number)]
    assert capsys.readouterr().err == "interrupted; nothing was kept\n"
    assert ([signal.getsignal(each) for each in SIGNALS], sys.unraisablehook) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_a_library_swallows_is_no_success(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*, out: Path = Path("x"), json: bool = False) -> int:
        try:
            send(number)
            time.sleep(1)
        except BaseException:
            pass
        return 0

    monkeypatch.setattr(conversion, "demo", command)
    assert main(["demo"]) == CODES[signal.Signals(number)]


def test_a_second_signal_at_once_is_the_same_wish() -> None:
    cleaned = False
    with Stoppable(alone=False), pytest.raises(Stopped):
        try:
            send(signal.SIGINT)
            time.sleep(1)
        finally:
            send(signal.SIGINT)
            time.sleep(0.01)
            cleaned = True
    assert cleaned


@pytest.mark.parametrize(("pause", "kept"), [(0.1, ""), (1.3, "file")])
def test_two_signals_leave_no_traceback(pause: float, kept: str, tmp_path: Path) -> None:
    """The second, a second later, ends a clean-up that hangs."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom beit_jax.cli import conversion, main\n"
        "def demo(*, out: Path = Path('x'), json: bool = False) -> int:\n"
        "    try:\n        print('ready', flush=True)\n        time.sleep(30)\n"
        f"    finally:\n        time.sleep({0.5 if not kept else 30})\n        Path('file').unlink()\n"
        "conversion.demo = demo\nsys.argv = ['beit-jax', 'demo']\nsys.exit(main.main())\n"
    )
    (tmp_path / "file").touch()
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == ("" if kept else "interrupted; nothing was kept\n")
    assert [path.name for path in tmp_path.iterdir()] == [kept] * bool(kept)


def test_another_thread_takes_no_signals() -> None:
    """A notebook's executor calls `train` in one."""
    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[object] = []

    def run() -> None:
        with Interruption(found.append), Stoppable(alone=False):
            found.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before] and [signal.getsignal(number) for number in SIGNALS] == before
