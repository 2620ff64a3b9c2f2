import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import beit_jax
from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.inference.predictor import Guess, guesses_of

DIGITS = Path(str(files("beit_jax") / "digits"))
IMAGES = sorted((DIGITS / "images").iterdir())


@pytest.fixture(scope="module")
def digits():  # type: ignore[no-untyped-def]
    return beit_jax.from_pretrained(DIGITS)


def test_classify_names_the_digit_and_sorts_by_probability(digits) -> None:  # type: ignore[no-untyped-def]
    guesses = beit_jax.classify(*digits, IMAGES[:12], top=3)
    assert [best[0].label for best in guesses] == [
        "zero one two three four five six seven eight nine".split()[int(path.stem[-1])] for path in IMAGES[:12]
    ]
    for best in guesses:
        probabilities = [guess.probability for guess in best]
        assert len(best) == 3 and probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1.0


def test_the_last_batch_is_padded_without_effect(digits) -> None:  # type: ignore[no-untyped-def]
    whole = beit_jax.classify(*digits, IMAGES[:7], batch_size=7)
    parts = beit_jax.classify(*digits, IMAGES[:7], batch_size=3)
    for a, b in zip(whole, parts, strict=True):
        assert [guess.index for guess in a] == [guess.index for guess in b]
        assert np.allclose([g.probability for g in a], [g.probability for g in b], atol=1e-6)


def test_features_are_what_the_model_pools(digits) -> None:  # type: ignore[no-untyped-def]
    model, processor = digits
    output = model(processor(IMAGES[:2]))
    tokens = output.last_hidden_state
    expected = {
        "pooled": output.pooler_output,
        "mean": tokens[:, 1:].mean(axis=1),
        "cls": tokens[:, 0],
        "tokens": tokens,
    }
    for pooling, value in expected.items():
        found = beit_jax.features(model, processor, IMAGES[:2], pooling=pooling)
        assert found.dtype == np.float32 and np.allclose(found, value, atol=1e-5)


def test_dtype_and_sources(digits, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from beit_jax.convert import convert
    from beit_jax.hub import resolve

    convert(resolve(DIGITS), tmp_path / "native")
    native, processor = beit_jax.from_pretrained(tmp_path / "native")
    assert processor == digits[1]
    pixels = processor(IMAGES[:2])
    assert np.array_equal(native(pixels).logits, digits[0](pixels).logits)
    half, _ = beit_jax.from_pretrained(tmp_path / "native", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    assert not np.array_equal(half(pixels).logits, native(pixels).logits)


def test_a_model_without_classifier_says_so(digits) -> None:  # type: ignore[no-untyped-def]
    encoder = digits[0].beit
    model = beit_jax.build_model(
        replace(encoder.config, task="features", labels=()), nnx.to_pure_dict(nnx.state(encoder))
    )
    with pytest.raises(BeitJaxError, match=r"has no classifier \(its task is features\); use features"):
        beit_jax.classify(model, digits[1], IMAGES[:1])
    assert beit_jax.features(model, digits[1], IMAGES[:1]).shape == (1, 64)


def test_public_names_are_all_there() -> None:
    assert set(beit_jax.__all__) <= set(dir(beit_jax))
    for name in beit_jax.__all__:
        assert name == "VARIANTS" or getattr(beit_jax, name).__doc__
    with pytest.raises(AttributeError):
        beit_jax.nothing  # noqa: B018


@pytest.mark.parametrize("form", ["import beit_jax; module = beit_jax.{0}", "from beit_jax import {0} as module"])
def test_public_modules_are_attributes_and_can_be_imported(form: str) -> None:
    """In a new process, because an earlier import would leave the attribute behind; `visualize` imports the other."""
    names = ["interpret", "visualize"]
    code = "\n".join(f"{form.format(name)}; print(module.__name__)" for name in names)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == [f"beit_jax.looking.{name}" for name in names]
    assert set(names) <= set(dir(beit_jax))


LOGITS = np.array([2.0, -1.0, 0.5], np.float32)


@pytest.mark.parametrize(
    ("problem", "labels", "expected"),
    [
        (None, 3, [(0, 0.7856), (2, 0.1753)]),
        ("single_label_classification", 3, [(0, 0.7856), (2, 0.1753)]),
        ("multi_label_classification", 3, [(0, 0.8808), (2, 0.6225)]),
        (None, 1, [(0, 0.8808)]),  # as in transformers' pipeline: the softmax of one number is always 1
        ("single_label_classification", 1, [(0, 0.8808)]),
    ],
)
def test_probabilities_are_what_the_outputs_mean(problem: Any, labels: int, expected: list[tuple[int, float]]) -> None:
    config = BeitConfig(task="image_classification", labels=("a", "b", "c")[:labels], problem_type=problem)
    found = guesses_of(config, LOGITS[:labels], top=2)
    assert [(guess.index, round(guess.probability or 0.0, 4)) for guess in found] == expected
    assert all(guess.value is None for guess in found)


def test_regression_has_values_and_no_probabilities() -> None:
    config = BeitConfig(task="image_classification", labels=("age", "height", "c"), problem_type="regression")
    assert guesses_of(config, LOGITS, top=1) == [
        Guess(0, "age", None, 2.0), Guess(1, "height", None, -1.0), Guess(2, "c", None, 0.5)
    ]  # fmt: skip


def test_extreme_outputs_have_probabilities() -> None:
    config = BeitConfig(task="image_classification", labels=("a", "b"), problem_type="multi_label_classification")
    found = guesses_of(config, np.array([-800.0, 800.0], np.float32), top=2)
    assert [guess.probability for guess in found] == [1.0, 0.0]


@pytest.fixture
def with_problem(tmp_path: Path) -> Callable[[str], Path]:
    """The digits, which transformers trained as the problem says."""

    def make(problem: str) -> Path:
        shutil.copytree(DIGITS, tmp_path / problem)
        path = tmp_path / problem / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": problem}))
        return tmp_path / problem

    return make


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_problem_is_kept_by_convert_and_export(
    with_problem: Callable[[str], Path], tmp_path: Path, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    native, exported = tmp_path / "native", tmp_path / "exported"
    assert main(["convert", str(with_problem(problem)), str(native)]) == 0
    assert main(["export", str(native), str(exported)]) == 0
    for directory in (native, exported):
        assert json.loads((directory / "config.json").read_text())["problem_type"] == problem
    capsys.readouterr()
    assert main(["classify", str(native), str(IMAGES[0]), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert {key for each in result["classes"] for key in each} == {
        "index", "label", "value" if problem == "regression" else "probability"
    }  # fmt: skip


def test_regression_has_no_accuracy(
    with_problem: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val" / "zero").mkdir(parents=True)
    shutil.copy(IMAGES[0], tmp_path / "val" / "zero" / "a.png")
    assert main(["evaluate", str(with_problem("regression")), str(tmp_path / "val")]) == 2
    assert "regression" in capsys.readouterr().err
