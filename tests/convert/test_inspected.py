"""`beit-jax inspect` of every stored file of another library: which program wrote it, what it is, what is left out."""

import json
from pathlib import Path
from typing import Any

import damage
import pytest

from beit_jax.cli.main import main
from beit_jax.convert import Options

FOREIGN = Path(__file__).parent / "foreign"
FILES = damage.files(FOREIGN)
SOURCES = {damage.source_of(FOREIGN / name).relative_to(FOREIGN).as_posix(): name for name in FILES}

WORDS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "inspected.json").read_text())
"""Of every kind the lines, and the notes of what is left out. One that is not listed has `test_what_it_is` alone."""
LEFT_OUT = ("left out", "ignored", "passed over unread")


def inspected(source: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    options = damage.options_of(FOREIGN / SOURCES[source])
    if options is None:
        pytest.skip("told to be no weights")
    assert main(["inspect", str(FOREIGN / source), *arguments(options), *more]) == 0
    return capsys.readouterr().out


def arguments(options: Options) -> list[str]:
    """The options of the command line."""
    stated: dict[str, Any] = {
        "--weights": options.weights, "--num-heads": options.num_heads, "--config": options.config
    }  # fmt: skip
    return [each for key, value in stated.items() if value is not None for each in (key, str(value))]


@pytest.mark.parametrize("source", WORDS)
def test_exact_words(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = WORDS[source]
    lines = inspected(source, capsys).splitlines()
    told = {line[:13].rstrip(): line[13:] for line in lines if not line.startswith("note")}
    assert {key: told[key] for key in ("written by", "naming", "model")} == {
        key: value for key, value in expected.items() if key != "left out"
    }
    found = [line[13:] for line in lines if line.startswith("note") and any(word in line for word in LEFT_OUT)]
    assert found == expected["left out"]


@pytest.mark.parametrize("source", SOURCES)
def test_what_it_is(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In words and as JSON the same."""
    lines = inspected(source, capsys).splitlines()
    told = {line[:13].rstrip(): line[13:] for line in lines if not line.startswith("note")}
    data = json.loads(inspected(source, capsys, "--json"))
    assert told["written by"] == (data["written_by"] or "a program that its files do not name")
    assert told["naming"].startswith(f"{data['naming']}, {data['source_tensors']} tensors")
    assert told["files"] == f"{', '.join(data['files'])} ({data['format']})"
    left_out = f", {len(data['dropped'])} left out" if data["dropped"] else ""
    assert f"{data['source_tensors']} tensors{left_out}" in told["naming"]
    assert told["model"].startswith(f"{data['config']['architectures'][0]}, {data['parameters']:,} parameters")
    assert [line[13:] for line in lines if line.startswith("note")] == data["notes"]


def test_every_kind_is_one_that_was_seen() -> None:
    assert WORDS.keys() <= SOURCES.keys()
