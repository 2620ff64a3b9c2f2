"""A hub that accepts connections and does not answer: given up in a minute, in one line, without its client's chatter.

`hub.PATIENCE` is 40 seconds; here it is less.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_hub
import huggingface_hub
import pytest
from fake_hub import FakeHub, Request

from beit_jax import hub
from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.hub import CONFIG, PROCESSOR, resolve

NAME = "org/model"
FILES = {CONFIG: b"{}", PROCESSOR: b'{"size": 4}', "model.safetensors": b"weights" * 1000}
PATIENCE = 0.4


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert hub.PATIENCE <= 45, "with a last wait between two requests, a minute in all"
    monkeypatch.setattr(hub, "PATIENCE", PATIENCE)
    yield
    huggingface_hub.close_session()


@contextmanager
def silent() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        accepted = []

        def accept() -> None:
            try:
                while True:
                    accepted.append(server.accept())
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection, _ in accepted:
            connection.close()


def refused_soon(message: str) -> None:
    began = time.monotonic()
    with pytest.raises(BeitJaxError, match=message):
        resolve(NAME)
    assert time.monotonic() - began < PATIENCE + 2


def test_a_silent_hub_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with silent() as url:
        fake_hub.use(url, tmp_path, monkeypatch)
        refused_soon(f"^{NAME}: .*lacks its {CONFIG}, and the hub cannot be reached .*; check the network")


@pytest.mark.parametrize(("method", "file"), [("HEAD", PROCESSOR), ("HEAD", "model.safetensors"), ("GET", CONFIG)])
def test_a_hub_that_falls_silent_is_given_up(
    method: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall_silent(request: Request) -> None:
        if (request.method, request.file) == (method, file):
            time.sleep(PATIENCE + 0.3)

    with FakeHub() as server:
        fake_hub.use(server.url, tmp_path, monkeypatch)
        server.push(NAME, FILES)
        server.before = fall_silent
        refused_soon(f"^{NAME}: ")
        server.before = lambda request: None
        assert resolve(NAME).path.is_dir()
    assert not [path for path in tmp_path.rglob("*.incomplete")]


def test_a_slow_hub_that_answers_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience begins anew with every answer."""
    with FakeHub() as server:
        fake_hub.use(server.url, tmp_path, monkeypatch)
        server.push(NAME, FILES)
        server.before = lambda request: time.sleep(0.6 * PATIENCE)
        began = time.monotonic()
        assert resolve(NAME).path.is_dir()
    assert time.monotonic() - began > 2 * PATIENCE


def test_what_is_asked_and_downloaded_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, list[int]] = {}

    @contextmanager
    def progress(total: int, what: str) -> Iterator[object]:
        shown[what] = [total]
        yield shown[what].append

    with FakeHub() as server:
        fake_hub.use(server.url, tmp_path, monkeypatch)
        server.push(NAME, FILES)
        resolve(NAME, progress=progress)
    for file, content in FILES.items():
        assert shown[f"asking the hub for {file}"] == [0]
        total, *done = shown[f"downloading {file}"]
        assert total == sum(done) == len(content)


def test_the_command_says_what_it_waits_for_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from beit_jax import terminal

    monkeypatch.setattr(terminal, "UNKNOWN_SILENCE", 0.1)
    with silent() as url:
        fake_hub.use(url, tmp_path, monkeypatch)
        assert main(["inspect", NAME]) == 2
    *waiting, last = capfd.readouterr().err.splitlines()
    assert waiting and all(line.startswith(f"asking the hub for {CONFIG}: ") for line in waiting)
    assert last.startswith(f"error: {NAME}: ")
