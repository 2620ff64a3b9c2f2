"""Weights of classes against scikit-learn's, and files that are none."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from beit_jax.errors import BeitJaxError
from beit_jax.train.objectives.class_weights import balanced, balanced_positives, class_weights

LABELS = ("cat", "dog", "owl")


def never() -> np.ndarray:
    raise AssertionError("nothing has to be counted")


def test_balanced_as_scikit_learn() -> None:
    labels = np.repeat([0, 1, 2], [7, 2, 31])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    found = class_weights("balanced", LABELS, lambda: balanced(np.bincount(labels)))
    assert found is not None and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_balanced_without_some_classes() -> None:
    """A class that does not occur does not change the others' weights."""
    np.testing.assert_allclose(balanced(np.array([4, 0, 2])), [6 / 8, 1, 6 / 4])
    np.testing.assert_allclose(balanced_positives(np.array([4, 0, 10]), 10), [6 / 4, 1, 1])


def test_a_file_names_classes(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text('{"owl": 3, "cat": 0.25}')
    np.testing.assert_array_equal(class_weights(str(path), LABELS, never), np.float32([0.25, 1, 3]))  # type: ignore[arg-type]
    assert class_weights(None, LABELS, never) is None


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"dot": 1}, "dot is no class of the data; one is called dog"),
        ({"cat": -1}, "cat: expected a weight from 0 to 1,000,000, found -1"),
        ({"cat": float("nan")}, "cat: expected a weight"),
        ({"cat": "2"}, "cat: expected a number"),
        (dict.fromkeys(LABELS, 0), "every class weighs 0"),
        ([1, 2, 3], "expected a JSON object"),
        (None, "no such file; --classify.class-weights takes balanced, or a file"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: object, found: str) -> None:
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(BeitJaxError, match=found) as caught:
        class_weights(str(path), LABELS, never)
    assert str(path) in str(caught.value)
