"""Classes by nearest neighbours against a plain count in float64, and against scikit-learn."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.neighbors import KNeighborsClassifier

from beit_jax.errors import BeitJaxError
from beit_jax.search import exact
from beit_jax.train.evaluation import neighbours
from beit_jax.train.evaluation.neighbours import knn


def plain_votes(
    train: np.ndarray, labels: np.ndarray, tests: np.ndarray, k: int, temperature: float, classes: int
) -> np.ndarray:
    """Sums of weights in float64, from all similarities at once."""
    train, tests = train.astype(np.float64), tests.astype(np.float64)
    similarity = (tests @ train.T) / np.linalg.norm(tests, axis=1)[:, None] / np.linalg.norm(train, axis=1)
    votes = np.zeros((len(tests), classes))
    for row, values in enumerate(similarity):
        for i in np.argsort(-values, kind="stable")[:k]:
            votes[row, labels[i]] += np.exp((values[i] - values.max()) / temperature)
    return votes


@pytest.mark.parametrize(("k", "temperature", "classes"), [(20, 0.07, 7), (1, 0.07, 7), (64, 1.0, 3), (5, 0.001, 7)])
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_votes_are_those_of_a_plain_count(
    monkeypatch: pytest.MonkeyPatch, k: int, temperature: float, classes: int, chunk: int
) -> None:
    monkeypatch.setattr(exact, "BLOCK_ROWS", chunk)
    monkeypatch.setattr(exact, "QUERY_ROWS", chunk)
    monkeypatch.setattr(neighbours, "VOTED", chunk)
    rng = np.random.default_rng(k)
    train, tests = (rng.standard_normal((n, 8)).astype(np.float32) * 100 for n in (90, 20))
    labels = rng.integers(0, classes, 90).astype(np.int32)
    labels[0] = classes - 1
    found = knn(train, labels, tests, k, temperature)
    votes = plain_votes(train, labels, tests, k, temperature, classes)
    assert found.shape == (20, min(5, classes)) and found.dtype == np.int32
    chosen = np.take_along_axis(votes, found, axis=1)
    most = -np.sort(-votes, axis=1)[:, : chosen.shape[1]]
    assert_allclose(chosen, most, rtol=0, atol=1e-5)
    assert np.array_equal(found[:, 0], votes.argmax(axis=1))


def test_neighbours_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    train, tests = rng.standard_normal((200, 16)).astype(np.float32), rng.standard_normal((50, 16)).astype(np.float32)
    labels = rng.integers(0, 5, 200)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)

    theirs = KNeighborsClassifier(20, metric="cosine", weights=weights, algorithm="brute").fit(train, labels)
    assert np.array_equal(knn(train, labels, tests)[:, 0], theirs.predict(tests))


def test_left_out_in_turn_every_image_is_classified_by_the_others() -> None:
    """scikit-learn's, fitted anew without each image."""
    rng = np.random.default_rng(3)
    features, labels = rng.standard_normal((40, 6)).astype(np.float32), rng.integers(0, 4, 40)
    features[7] = features[3]  # an image twice is a neighbour of itself all the same
    found = knn(features, labels, features, 5, leave_one_out=True)[:, 0]
    for i in range(40):
        others = np.arange(40) != i
        model = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute")
        assert found[i] == model.fit(features[others], labels[others]).predict(features[i : i + 1])[0]
    with pytest.raises(BeitJaxError, match="k is 40, expected 1 to 39, the other images"):
        knn(features, labels, features, 40, leave_one_out=True)
    with pytest.raises(BeitJaxError, match="39 tests, expected the 40 training images themselves"):
        knn(features, labels, features[1:], 5, leave_one_out=True)


def test_neighbours_only_depend_on_directions_and_ties_go_to_the_first() -> None:
    train = np.array([[2e30, 0], [0, 1e-30], [1, 0]], np.float32)
    assert knn(train, np.array([2, 1, 0]), np.array([[1.0, 0], [0, 7]], np.float32), k=1)[:, 0].tolist() == [2, 1]
    zeros = knn(train, np.array([2, 1, 0]), np.zeros((1, 2), np.float32), k=2)
    assert zeros.tolist() == [[1, 2, 0]]  # all are equally near: the first two vote, the lower class first


def test_neighbours_that_make_no_sense_are_refused() -> None:
    train, labels, tests = np.ones((3, 2), np.float32), np.zeros(3, np.int32), np.ones((2, 2), np.float32)
    wrong = np.array([[1, np.nan]], np.float32)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        (r"k is 4, expected 1 to 3, the training images", (train, labels, tests, 4)),
        (r"k is 0, expected", (train, labels, tests, 0)),
        (r"found \[3, 2\], \[2\], \[2, 2\]", (train, labels[:2], tests, 1)),
        (r"found \[3, 2\], \[3\], \[0, 2\]", (train, labels, tests[:0], 1)),
        (r"found \[3, 2\], \[3\], \[2, 3\]", (train, labels, np.ones((2, 3)), 1)),
        (r"the temperature is 0.0, expected a positive number", (train, labels, tests, 1, 0.0)),
        (r"label -1, expected 0 or more", (train, labels - 1, tests, 1)),
        (r"1 test features are not finite, row 0 first", (train, labels, wrong, 1)),
        (r"1 training features are not finite, row 0 first", (wrong, labels[:1], tests, 1)),
    ]
    for message, arguments in cases:
        with pytest.raises(BeitJaxError, match=message):
            knn(*arguments)
