"""The cache of traced forward passes: the same numbers, without Flax, and never those of another model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from beit_jax.convert import convert
from beit_jax.hub import resolve
from beit_jax.inference import predict, program_cache
from beit_jax.inference.predictor import Pooling
from beit_jax.inference.reading import read
from beit_jax.weights import NativeCheckpoint

DIGITS = Path(str(files("beit_jax") / "digits"))
IMAGES = sorted((DIGITS / "images").iterdir())[:3]


@pytest.fixture(scope="module")
def digits() -> NativeCheckpoint:
    return read(resolve(DIGITS))


@pytest.fixture
def pixels(digits: NativeCheckpoint) -> np.ndarray:
    return digits.processor(IMAGES)


@contextmanager
def setting(name: str, value: object) -> Iterator[None]:
    """One of JAX's, within a block."""
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Within JAX's compilation cache, which is empty; not made yet."""
    with setting("jax_compilation_cache_dir", str(tmp_path / "cache")):
        yield tmp_path / "cache" / "beit-jax"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is traced from now on."""
    heard, traced = [], program_cache._trace

    def listening(config, params, shape, output):  # type: ignore[no-untyped-def]
        heard.append(output)
        return traced(config, params, shape, output)

    monkeypatch.setattr(program_cache, "_trace", listening)
    return heard


def logits(checkpoint: NativeCheckpoint, place: Path, pixels: np.ndarray) -> np.ndarray:
    """By a forward pass of its own, as a new process has it."""
    return np.asarray(program_cache.forward(checkpoint.config, checkpoint.params, place)(pixels, "logits"))


@pytest.mark.parametrize("output", ["logits", *get_args(Pooling)])
def test_a_stored_program_computes_what_the_model_does(
    output: str, digits: NativeCheckpoint, pixels: np.ndarray, tmp_path: Path, traces: list[str]
) -> None:
    expected = np.asarray(predict.forward(predict.build(digits), pixels, output))
    first = program_cache.forward(digits.config, digits.params, tmp_path)(pixels, output)
    again = program_cache.forward(digits.config, digits.params, tmp_path)(pixels, output)
    assert traces == [output]
    assert np.array_equal(first, again)
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-6)


def test_it_computes_with_the_weights_that_it_is_given(
    digits: NativeCheckpoint, pixels: np.ndarray, tmp_path: Path, traces: list[str]
) -> None:
    other = replace(digits, params={name: 1.1 * leaf for name, leaf in digits.params.items()})
    found = [logits(checkpoint, tmp_path, pixels) for checkpoint in (digits, other)]
    assert traces == ["logits"]
    expected = [np.asarray(predict.build(checkpoint)(pixels).logits) for checkpoint in (digits, other)]
    assert not np.allclose(*expected, atol=1e-2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_another_question_has_another_program(
    digits: NativeCheckpoint, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(*, epsilon: float = 1e-12, shape: tuple[int, ...] = pixels.shape, output: str = "logits") -> str:
        return program_cache._key(replace(digits.config, layer_norm_eps=epsilon), digits.params, shape, output)

    keys = [key(), key(epsilon=1e-6), key(shape=(2, *pixels.shape[1:])), key(output="pooled")]
    with setting("jax_default_matmul_precision", "bfloat16"):
        keys.append(key())
    monkeypatch.setattr(program_cache, "version", lambda name: "0.0.0" if name == "flax" else "1.0.0")
    keys.append(key())
    for code in ("one", "another"):
        monkeypatch.setattr(program_cache, "source_digest", lambda code=code: code)
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_where_programs_lie_changes_nothing(digits: NativeCheckpoint, pixels: np.ndarray) -> None:
    before = program_cache._key(digits.config, digits.params, pixels.shape, "logits")
    with (
        setting("jax_compilation_cache_dir", "/elsewhere"),
        setting("jax_persistent_cache_min_compile_time_secs", 5.0),
    ):
        assert program_cache._key(digits.config, digits.params, pixels.shape, "logits") == before


def flipped(content: bytes) -> bytes:
    """One bit of it."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda content: content[:-1], lambda content: content[:40], lambda content: b""]
)
def test_a_damaged_program_is_traced_again(
    damage, digits: NativeCheckpoint, pixels: np.ndarray, tmp_path: Path, traces: list[str]
) -> None:  # type: ignore[no-untyped-def]
    expected = logits(digits, tmp_path, pixels)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert np.array_equal(logits(digits, tmp_path, pixels), expected)
    assert np.array_equal(logits(digits, tmp_path, pixels), expected)
    assert traces == ["logits"] * 2
    assert len(file.read_bytes()) == len(whole)


def test_a_place_that_cannot_be_written_costs_no_answer(
    digits: NativeCheckpoint, pixels: np.ndarray, tmp_path: Path
) -> None:
    expected = logits(digits, tmp_path / "good", pixels)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"file/beit-jax/\w+\.stablehlo: the program was not stored.*Not a directory"):
        found = logits(digits, tmp_path / "file" / "beit-jax", pixels)
    assert np.array_equal(found, expected)


def test_programs_lie_in_the_compilation_cache_of_one_cpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert program_cache.cache_directory() == cache
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert program_cache.cache_directory() is None
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert program_cache.cache_directory() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    for place in (None, "gs://bucket/cache"):
        with setting("jax_compilation_cache_dir", place):
            assert program_cache.cache_directory() is None
    with setting("jax_enable_compilation_cache", False):
        assert program_cache.cache_directory() is None


def test_without_a_cache_the_model_itself_computes(digits: NativeCheckpoint, cache: Path, traces: list[str]) -> None:
    one = program_cache.predictor(digits).classify(IMAGES, top=3, batch_size=2)
    with setting("jax_compilation_cache_dir", None):
        other = program_cache.predictor(digits).classify(IMAGES, top=3, batch_size=2)
    assert [[guess.index for guess in best] for best in one] == [[guess.index for guess in best] for best in other]
    assert len(traces) == (1 if jax.default_backend() == "cpu" and jax.device_count() == 1 else 0)


COMMAND = """
import sys
from beit_jax.cli.main import main
code = main()
print(*(name in sys.modules for name in ("flax", "torch", "scipy.linalg")), file=sys.stderr)
sys.exit(code)
"""


def test_a_second_start_imports_no_flax_and_answers_the_same(tmp_path: Path) -> None:
    convert(resolve(DIGITS), tmp_path / "native")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "cpu"}

    def start(**more: str) -> tuple[list[list[float]], str]:
        arguments = ["classify", str(tmp_path / "native"), *map(str, IMAGES), "--json", "--top", "2"]
        command = [sys.executable, "-c", COMMAND, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | more, timeout=120)
        found = json.loads(run.stdout)
        return [[c["probability"] for c in image["classes"]] for image in found], run.stderr.splitlines()[-1]

    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    plain, first, second = start(), start(**cache), start(**cache)
    assert (plain[1], first[1], second[1]) == ("True False False", "True False False", "False False False")
    assert first[0] == second[0]
    np.testing.assert_allclose(first[0], plain[0], rtol=0, atol=1e-6)
    # What was compiled, too, within less than JAX's own second.
    compiled = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*-cache")}
    assert compiled
    start(**cache)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*-cache")} == compiled


@pytest.mark.parametrize("error", [ImportError("gone"), AttributeError("moved"), TypeError("other arguments")])
def test_a_jax_without_export_costs_no_answer(
    error: Exception, digits: NativeCheckpoint, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(program_cache, "_export", failing)
    with pytest.warns(UserWarning, match=str(error)):
        found = logits(digits, tmp_path, pixels)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_allclose(found, np.asarray(predict.build(digits)(pixels).logits), rtol=0, atol=1e-6)
