"""Scores of several classes and of numbers: against scikit-learn's."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import Model, abstract_model, build_model, param_shapes
from beit_jax.train.distributed.sharding import make_mesh
from beit_jax.train.evaluation import multilabel, regression
from beit_jax.train.evaluation.labelled import problem_type_of
from beit_jax.train.evaluation.logits import outputs
from beit_jax.train.evaluation.matching import value_order
from beit_jax.train.evaluation.multilabel import average_precision, evaluate_multilabel, scored
from beit_jax.train.evaluation.regression import Distances, RegressionScores, evaluate_regression
from beit_jax.train.labels.table import TableImages
from beit_jax.train.labels.targets import Target
from beit_jax.tree import unflatten

NAMES = tuple("abcd")


def drawn(seed: int, images: int = 60, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many equal ones, and labels."""
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(size=(images, classes)), 1).astype(np.float32), rng.random((images, classes)) < 0.3


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_average_precision(pairs: list[tuple[int, bool]]) -> None:
    scores, present = np.asarray([p[0] for p in pairs], np.float32), np.asarray([p[1] for p in pairs])
    found = average_precision(scores, present)
    if present.any():
        assert found == pytest.approx(metrics.average_precision_score(present, scores), abs=1e-12)
    else:
        assert np.isnan(found)


def test_several_classes_as_scikit_learn() -> None:
    logits, present = drawn(0)
    found, truth, guess = scored(logits, present, NAMES), present.astype(int), (logits >= 0).astype(int)
    expected = {
        "map_macro": metrics.average_precision_score(truth, logits, average="macro"),
        "map_micro": metrics.average_precision_score(truth, logits, average="micro"),
        "f1_macro": metrics.f1_score(truth, guess, average="macro"),
        "f1_micro": metrics.f1_score(truth, guess, average="micro"),
        "exact_match": metrics.accuracy_score(truth, guess),
    }
    content = json.loads(json.dumps(found.as_dict()))
    for name, value in expected.items():
        assert content[name] == pytest.approx(value, abs=1e-12), name
    each = metrics.average_precision_score(truth, logits, average=None)
    assert [row["average_precision"] for row in content["classes"]] == pytest.approx(list(each), abs=1e-12)
    assert [row["f1"] for row in content["classes"]] == pytest.approx(
        list(metrics.f1_score(truth, guess, average=None)), abs=1e-12
    )
    assert next(iter(found.of_a_run())) == "map"
    precision = metrics.precision_score(truth, guess, average=None)
    assert [row[4] for row in multilabel.class_table(found)] == [f"{100 * value:.2f}" for value in precision]


def test_classes_that_do_not_occur() -> None:
    """Means are over the others."""
    logits, present = drawn(1)
    present[:, 2] = False
    found, others = scored(logits, present, NAMES), [0, 1, 3]
    expected = metrics.average_precision_score(present[:, others], logits[:, others], average="macro")
    assert found.map_macro == pytest.approx(expected, abs=1e-12)
    truth, guess = present[:, others], logits[:, others] >= 0
    assert found.f1_macro == pytest.approx(metrics.f1_score(truth, guess, average="macro"), abs=1e-12)
    assert "classes 1 of 4 occur in no image" in multilabel.describe(found)
    content = found.as_dict()["classes"][2]
    assert content["average_precision"] is None and content["images"] == 0 and content["found"] > 0


def test_outputs_that_are_not_finite() -> None:
    logits, present = drawn(2)
    logits[5, 1] = np.nan
    found = scored(logits, present, NAMES)
    instead = logits.copy()
    instead[5] = -1e9
    assert found.not_finite == 1
    assert found.map_macro == scored(instead, present, NAMES).map_macro
    assert any("WARNING: the outputs of 1 images" in line for line in multilabel.describe(found))


def numbers(seed: int, images: int = 50) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = (rng.normal(size=(images, 2)) * [3, 0.01] + [1e4, -2]).astype(np.float32)
    return (truth + rng.normal(size=(images, 2)) * [1, 0.02]).astype(np.float32), truth


def measured(found: np.ndarray, truth: np.ndarray, parts: int = 1) -> RegressionScores:
    distances = Distances(found.shape[1])
    for part, said in zip(np.array_split(found, parts), np.array_split(truth, parts), strict=True):
        distances.add(part, said)
    return distances.scores(NAMES[: found.shape[1]])


@pytest.mark.parametrize("parts", [1, 7, 50])
def test_numbers_as_scikit_learn(parts: int) -> None:
    found, truth = numbers(0)
    scores = measured(found, truth, parts)
    found, truth = found.astype(np.float64), truth.astype(np.float64)
    for name, function in {
        "mae": metrics.mean_absolute_error,
        "mse": metrics.mean_squared_error,
        "rmse": metrics.root_mean_squared_error,
        "r2": metrics.r2_score,
    }.items():
        expected = function(truth, found, multioutput="raw_values")
        np.testing.assert_allclose(getattr(scores, name), expected, rtol=1e-9, err_msg=name)
    assert list(scores.of_a_run()) == ["r2", "mae", "rmse"]
    assert scores.of_a_run()["r2"] == pytest.approx(metrics.r2_score(truth, found), rel=1e-9)
    assert len(regression.class_table(scores)) == 2


@pytest.mark.parametrize(("found", "expected"), [([2.0, 2.0], 1.0), ([2.0, 2.5], 0.0)])
def test_numbers_that_do_not_vary(found: list[float], expected: float) -> None:
    truth = np.full((2, 1), 2, np.float32)
    assert measured(np.float32(found)[:, None], truth).r2[0] == expected
    assert metrics.r2_score(truth[:, 0], found) == expected


def test_one_image_and_infinite_outputs() -> None:
    scores = measured(np.float32([[np.inf, 1]]), np.float32([[1, 2]]))
    assert scores.not_finite == 1 and np.isinf(scores.mae).all() and np.isnan(scores.r2).all()
    assert json.loads(json.dumps(scores.as_dict(), allow_nan=False))["values"][1]["mae"] is None


# Outputs of a model, however its images come


CONFIG = BeitConfig(
    task="image_classification",
    image_size=(16, 16),
    patch_size=(8, 8),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    labels=NAMES,
)
IMAGES = 23


def model() -> Model:
    rng = np.random.default_rng(0)
    shapes = param_shapes(CONFIG)
    return build_model(CONFIG, unflatten({name: rng.normal(size=s).astype("f4") for name, s in shapes.items()}))


def in_batches(size: int, labels: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Every image once; the last batch is filled up with images that are not valid."""
    images = np.random.default_rng(1).normal(size=(IMAGES, 16, 16, 3)).astype(np.float32)
    for start in range(0, IMAGES, size):
        rows = np.arange(start, start + size)
        yield {"image": images[rows % IMAGES], "label": labels[rows % IMAGES], "valid": rows < IMAGES}


@pytest.mark.parametrize("size", [IMAGES, 5, 1])
def test_scores_do_not_depend_on_batches(size: int) -> None:
    network, mesh = model(), make_mesh((-1, 1, 1))
    logits = np.concatenate([found for found, _ in outputs(network, in_batches(IMAGES, np.zeros(IMAGES, np.int32)))])
    present = np.random.default_rng(2).random((IMAGES, 4)) < 0.4
    columns = [2, 0, 3, 1]
    found = evaluate_multilabel(network, in_batches(size, present.astype(np.uint8)), NAMES, mesh=mesh, columns=columns)
    expected = metrics.average_precision_score(present, logits[:, columns], average="macro")
    assert found.count == IMAGES and found.map_macro == pytest.approx(expected, abs=1e-9)
    one = np.random.default_rng(3).integers(0, 4, IMAGES).astype(np.int32)
    found = evaluate_multilabel(network, in_batches(size, one), NAMES)
    assert found.images.tolist() == np.bincount(one, minlength=4).tolist()
    truth = np.random.default_rng(4).normal(size=(IMAGES, 2)).astype(np.float32)
    distances = evaluate_regression(network, in_batches(size, truth), ("p", "q"), columns=[3, 1])
    assert distances.mae == pytest.approx(
        metrics.mean_absolute_error(truth, logits[:, [3, 1]], multioutput="raw_values"), rel=1e-5
    )


def test_no_images() -> None:
    for evaluate in (evaluate_multilabel, evaluate_regression):
        with pytest.raises(BeitJaxError, match="no images, so there is no score"):
            evaluate(model(), iter(()), NAMES)


# What the data say, and what the model makes


@pytest.mark.parametrize(
    ("made", "said", "expected"),
    [
        (None, "single_label_classification", "single_label_classification"),
        (None, "multi_label_classification", "multi_label_classification"),
        (None, "regression", "regression"),
        ("multi_label_classification", "single_label_classification", "multi_label_classification"),
        ("regression", "regression", "regression"),
        ("single_label_classification", "multi_label_classification", None),
        ("regression", "single_label_classification", None),
        ("multi_label_classification", "regression", None),
    ],
)
def test_scores_are_of_the_kind_of_the_outputs(made: Any, said: Any, expected: str | None) -> None:
    network = nnx.merge(*abstract_model(replace(CONFIG, problem_type=made)))
    images = TableImages(Path("t.csv"), Target("said", said, NAMES), (), (), (), ())
    if expected is None:
        with pytest.raises(BeitJaxError, match=r"t.csv: holds .* \(said\), but the model's outputs are .*problem_type"):
            problem_type_of(network, images)
    else:
        assert problem_type_of(network, images) == expected


def test_numbers_are_matched_by_name() -> None:
    assert value_order(("b", "a"), ("a", "b"), "t.csv").indices == (1, 0)
    assert value_order(("b",), ("a", "b"), "t.csv").indices == (1,)
    assert value_order(("x", "y"), ("LABEL_0", "LABEL_1"), "t.csv").indices == (0, 1)
    for found in (("a", "c"), ("age",)):
        with pytest.raises(BeitJaxError, match=r"t.csv: numbers called .*, but the model's are a, b; name the data's"):
            value_order(found, ("a", "b"), "t.csv")
