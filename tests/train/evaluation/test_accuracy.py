"""Accuracy against plain counts, whatever the batches, devices and hosts; and the traps of class orders."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import forward
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ports import free_address
from virtual import xla_flags

import beit_jax
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor
from beit_jax.models.build import Model, abstract_model, build_model, param_shapes
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.distributed.sharding import make_mesh, place, state_shardings
from beit_jax.train.evaluation import confusion as pictures
from beit_jax.train.evaluation.accuracy import (
    Scores,
    Tally,
    class_table,
    confused,
    count,
    describe,
    evaluate_classification,
    make_eval_step,
)
from beit_jax.train.evaluation.confusion import confusion_picture
from beit_jax.train.evaluation.labelled import (
    ClassOrder,
    class_order,
    evaluate_directory,
    real_labels,
    reordered,
)
from beit_jax.train.evaluation.opening import open_folder
from beit_jax.train.recipe import STATISTICS
from beit_jax.tree import unflatten

CONFIG = BeitConfig(
    task="image_classification",
    image_size=(16, 16),
    patch_size=(8, 8),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    position_bias="per_layer",
    labels=tuple("abcdefg"),
)
IMAGES = 43
DIGITS = Path(str(files("beit_jax") / "digits"))
counted = jax.jit(count)
NAMES = "zero one two three four five six seven eight nine".split()


def random_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.4 for name, shape in param_shapes(CONFIG).items()}


def random_model() -> Model:
    return build_model(CONFIG, unflatten(random_params()))


def data(seed: int = 1) -> dict[str, np.ndarray]:
    """All images at once; every fourth has no alternative label, others have one to three."""
    rng = np.random.default_rng(seed)
    accepted = np.where(np.arange(3) < rng.integers(1, 4, (IMAGES, 1)), rng.integers(0, 7, (IMAGES, 3)), -1)
    accepted[::4] = -1
    return {
        "image": rng.standard_normal((IMAGES, 16, 16, 3)).astype(np.float32),
        "label": rng.integers(0, 7, IMAGES).astype(np.int32),
        "index": np.arange(IMAGES, dtype=np.int32),
        "accepted": accepted.astype(np.int32),
    }


def in_batches(size: int, *, padding: bool, process: int = 0, processes: int = 1) -> Iterator[dict[str, np.ndarray]]:
    """One host's batches; padded ones repeat a real image and label, which must not be counted."""
    everything = {name: array[process::processes] for name, array in data().items() if name != "accepted"}
    most = -(-IMAGES // processes)
    for start in range(0, most, size):
        rows = np.arange(start, start + size)
        valid = rows < len(everything["label"])
        rows = np.where(valid, rows, 0) if padding else rows[valid]
        valid = valid if padding else np.ones(len(rows), bool)
        yield {name: array[rows] for name, array in everything.items()} | {"valid": valid}


def plain_counts(logits: np.ndarray, labels: np.ndarray, accepted: np.ndarray) -> dict[str, Any]:
    """By definition, image by image: of equal logits the first class is better."""
    classes = logits.shape[1]
    correct, correct5, images = np.zeros((3, classes), int)
    confusion, real = np.zeros((classes, classes), int), [0, 0, 0]
    for row, label, others in zip(logits, labels, accepted, strict=True):
        ranking = sorted(range(classes), key=lambda c, row=row: (-row[c], c))[:5] if np.isfinite(row).all() else []
        images[label] += 1
        correct[label] += ranking[:1] == [label]
        correct5[label] += label in ranking
        if ranking:
            confusion[label, ranking[0]] += 1
        wanted = {int(other) for other in others if other >= 0}
        real[0] += bool(wanted)
        real[1] += bool(wanted & set(ranking[:1]))
        real[2] += bool(wanted & set(ranking))
    return {"images": images, "correct": correct, "correct5": correct5, "confusion": confusion, "real": tuple(real)}


def assert_counted(scores: Scores, expected: dict[str, Any]) -> None:
    for name in ("images", "correct", "correct5"):
        assert getattr(scores, name).dtype == np.int64
        assert getattr(scores, name).tolist() == expected[name].tolist(), name
    assert scores.confusion.dtype == np.int64 and np.array_equal(scores.confusion.toarray(), expected["confusion"])
    assert scores.real == expected["real"]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Counts of all images, from the model's logits for all images."""
    logits = forward.logits(random_model(), data()["image"])
    best = np.sort(logits, axis=1)
    assert (best[:, -1] - best[:, -2]).min() > 1e-4 and (best[:, -5] - best[:, -6]).min() > 1e-4  # beyond rounding
    return plain_counts(logits, data()["label"], data()["accepted"])


# --- Counts


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 7]), st.lists(st.integers(1, 39), max_size=3))
def test_counts_equal_a_plain_count_with_ties_padding_and_logits_that_are_no_numbers(
    seed: int, classes: int, cuts: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (40, classes)).astype(np.float32)  # full of ties
    logits[rng.random(40) < 0.1, rng.integers(classes)] = rng.choice([np.nan, np.inf, -np.inf])
    labels, valid = rng.integers(0, classes, 40).astype(np.int32), rng.random(40) < 0.7
    accepted = rng.integers(-1, classes, (40, 2)).astype(np.int32)
    tally = Tally(tuple(map(str, range(classes))))
    for part in np.split(np.arange(40), sorted(set(cuts))):
        rows = np.resize(part, 40)  # of one shape, so that one compilation serves all
        real = valid[rows] & (np.arange(40) < len(part))
        tally.add(counted(logits[rows], labels[rows], real, accepted[rows]))
    assert_counted(tally.scores(real=True), plain_counts(logits[valid], labels[valid], accepted[valid]))


def test_of_equal_logits_the_first_classes_are_the_five_best() -> None:
    logits = np.array([[0, 1, 1, 1, 1, 1, 1, 1]] * 3, np.float32)
    counts = counted(logits, np.array([5, 6, 0], np.int32), np.ones(3, bool))
    assert counts.predicted.tolist() == [1, 1, 1]
    assert counts.correct5.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_with_fewer_than_five_classes_all_are_among_the_best() -> None:
    tally = Tally(("a", "b", "c"))
    tally.add(counted(np.eye(3, dtype=np.float32), np.array([0, 2, 1], np.int32), np.ones(3, bool)))
    scores = tally.scores()
    assert (scores.top1, scores.top5) == (1 / 3, 1.0)
    assert not any("top-5" in line for line in describe(scores))


def test_logits_that_are_not_finite_are_wrong_and_told() -> None:
    tally = Tally(("a", "b"))
    logits = np.array([[np.nan, np.nan], [1, 0], [np.inf, 0]], np.float32)
    tally.add(counted(logits, np.zeros(3, np.int32), np.ones(3, bool), np.zeros((3, 1), np.int32)))
    scores = tally.scores(real=True)
    assert (scores.count, scores.not_finite, scores.top1, scores.real) == (3, 2, 1 / 3, (3, 1, 1))
    assert "WARNING: the logits of 2 images are not finite; they count as wrong" in describe(scores)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("size", [43, 10, 7])
def test_an_evaluation_counts_every_image_once(expected: dict[str, Any], size: int, padding: bool) -> None:
    seen: list[int] = []
    scores = evaluate_classification(
        random_model(),
        in_batches(size, padding=padding),
        CONFIG.labels,
        accepted=data()["accepted"],
        matched="name",
        advance=seen.append,
    )
    assert_counted(scores, expected)
    assert sum(seen) == scores.count == IMAGES and len(seen) == -(-IMAGES // size)
    assert scores.matched == "name"


def test_images_of_eight_bits_are_normalised_on_the_device() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    labels = {"label": np.arange(6, dtype=np.int32), "valid": np.ones(6, bool)}
    mean, std = (np.array(values, np.float32) for values in STATISTICS["imagenet"])
    floats = {"image": (pixels / np.float32(255) - mean) / std, **labels}
    model = random_model()
    raw = evaluate_classification(model, [{"image": pixels, **labels}], CONFIG.labels, statistics="imagenet")
    ready = evaluate_classification(model, [floats], CONFIG.labels)
    assert raw.as_dict() == ready.as_dict() and len(set(raw.confusion.tocoo().col.tolist())) > 1


def test_a_step_is_compiled_once_for_equal_models() -> None:
    assert make_eval_step(abstract_model(CONFIG)[0]) is make_eval_step(abstract_model(CONFIG)[0])


def test_labels_that_the_model_does_not_have_are_refused() -> None:
    batch = {"image": np.zeros((2, 16, 16, 3), np.float32), "valid": np.array([True, False])}
    with pytest.raises(BeitJaxError, match="labels 7 to 7, but the model's classes are 0 to 6"):
        evaluate_classification(random_model(), [batch | {"label": np.array([7, 0], np.int32)}], CONFIG.labels)
    with pytest.raises(BeitJaxError, match="labels: 6 classes, but the model has 7 logits"):
        evaluate_classification(random_model(), [batch | {"label": np.array([0, 9], np.int32)}], CONFIG.labels[:6])


# --- Devices and hosts: this file is also the program that they run


def on_devices(shape: tuple[int, int, int], processes: int = 1, process: int = 0) -> dict[str, Any]:
    """The evaluation over a mesh, from sharded parameters or, on several hosts, from a model of each."""
    mesh = make_mesh(shape)
    params = unflatten(random_params())
    sharded = abstract_model(CONFIG)[0], place(params, state_shardings(params, mesh))
    model = random_model() if processes > 1 else sharded
    batches = in_batches(5, padding=processes > 1, process=process, processes=processes)
    found = evaluate_classification(model, batches, CONFIG.labels, accepted=data()["accepted"], mesh=mesh)
    return {"scores": found.as_dict(), "devices": mesh.size}


def main(process: int, processes: int, address: str) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    if processes > 1:
        jax.distributed.initialize(address, processes, process)
    shape = (4, 1, 1) if processes > 1 else (2, 2, 2)
    print(json.dumps(on_devices(shape, processes, process)))


def outcomes(devices: int, processes: int) -> list[dict[str, Any]]:
    address = free_address()
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(devices),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),  # pytest's: the helpers of all tests are on it
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(number), str(processes), address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    printed = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * processes, printed
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]  # gloo announces itself above


@pytest.mark.parametrize(("devices", "processes"), [(8, 1), (2, 2)])
def test_counts_are_the_same_over_devices_and_hosts(expected: dict[str, Any], devices: int, processes: int) -> None:
    alone = evaluate_classification(
        random_model(), in_batches(5, padding=False), CONFIG.labels, accepted=data()["accepted"]
    )
    assert_counted(alone, expected)
    for found in outcomes(devices, processes):
        assert found == {"scores": alone.as_dict(), "devices": devices * processes}


# --- Scores


def scores_of(confusion: np.ndarray, labels: tuple[str, ...] | None = None) -> Scores:
    """Scores of images that a model ranks as the matrix says, one batch for each pair."""
    classes = len(confusion)
    tally = Tally(labels or tuple(map(str, range(classes))))
    truth, predicted = (np.repeat(index, confusion.ravel()) for index in np.indices(confusion.shape).reshape(2, -1))
    tally.add(counted(np.eye(classes, dtype=np.float32)[predicted], truth.astype(np.int32), np.ones(len(truth), bool)))
    return tally.scores()


def test_scores_for_programs_and_people() -> None:
    scores = scores_of(np.array([[3, 1, 0], [2, 2, 0], [0, 0, 0]]), ("cat", "dog\x1b[31m", "eel"))
    assert (scores.count, scores.top1, scores.mean_class_accuracy) == (8, 5 / 8, (3 / 4 + 2 / 4) / 2)
    found = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert sorted(found["confusion"]) == [[0, 0, 3], [0, 1, 1], [1, 0, 2], [1, 1, 2]]
    assert found["classes"][0] == {"label": "cat", "images": 4, "correct": 3, "correct5": 4}
    assert describe(scores)[0] == "top-1   62.50 %   of 8 images"
    assert confused(scores) == [(1, 0, 2), (0, 1, 1)]
    dog = "dog\\x1b[31m"
    assert class_table(scores) == [["cat", "4", "75.00", "100.00", dog], [dog, "4", "50.00", "100.00", "cat"]]
    assert [row[0] for row in class_table(scores, limit=1)] == [dog]


def test_nothing_counted_has_no_score() -> None:
    found = Tally(("a", "b")).scores(real=True).as_dict()
    assert found["images"] == 0 and found["top1"] is None and found["real"]["top1"] is None
    assert describe(Tally(("a", "b")).scores(real=True))[0] == "top-1     nan %   of 0 images"


def test_22k_classes_take_little_memory() -> None:
    classes = 21841
    tally = Tally(tuple(map(str, range(classes))))
    truth = np.arange(300, dtype=np.int32)
    logits = np.zeros((300, classes), np.float32)
    logits[truth, truth + 21000] = 1
    tally.add(counted(logits, truth, np.ones(300, bool)))
    assert tally.confusion.nnz == 300 and confused(tally.scores())[0] == (0, 21000, 1)


# --- A picture


@pytest.mark.parametrize("classes", [2, 10, 1000, 2500])
def test_the_picture_shows_the_mistakes(tmp_path: Path, classes: int) -> None:
    right = 50 * np.eye(classes, dtype=int) if classes <= 1000 else np.eye(classes, dtype=int)
    wrong = right.copy()
    wrong[0] = np.roll(wrong[0], classes - 1)  # the first class is always taken for the last
    pictures = {}
    for name, confusion in (("right", right), ("wrong", wrong)):
        confusion_picture(scores_of(confusion), tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG" and image.width >= 900 and image.height >= 600
            pictures[name] = np.asarray(image.convert("RGB")).astype(int)
    assert pictures["right"].shape == pictures["wrong"].shape
    assert (np.abs(pictures["right"] - pictures["wrong"]).sum(axis=-1) > 100).sum() > 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right.png", "wrong.png"]


def test_neighbouring_classes_share_a_pixel_where_there_are_thousands() -> None:
    shares = pictures._row_shares(scores_of(np.eye(2500, dtype=int)))
    assert shares.shape == (834, 834) and np.array_equal(shares, np.eye(834))


def test_a_picture_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match="does not exist"):
        confusion_picture(scores_of(np.eye(2, dtype=int)), tmp_path / "none" / "x.png")


# --- Class orders


def test_classes_are_matched_by_name_whatever_the_order() -> None:
    order = class_order(("dog", "cat"), ("cat", "cow", "dog"), "DIR")
    assert order == ClassOrder((2, 0), "name (2 of 3 occur)")
    assert class_order(("1", "0"), ("1", "0"), "DIR").indices == (0, 1)  # names come before numbers
    batch = {"label": np.array([0, 1, 1], np.int32)}
    assert [found["label"].tolist() for found in reordered([batch], order)] == [[2, 0, 0]]


def test_folders_of_imagenet_v2_are_numbers_not_words() -> None:
    folders = sorted(str(i) for i in range(1000))
    assert folders[:4] == ["0", "1", "10", "100"]
    order = class_order(folders, tuple(f"class {i}" for i in range(1000)), "DIR")
    assert order.indices == tuple(int(name) for name in folders) and order.rule == "number"
    assert sum(i == index for i, index in enumerate(order.indices)) == 12


def test_numbers_may_be_a_part_of_the_models() -> None:
    """Of ImageNet-22k's classes, for example, as timm's lists of valid labels name them."""
    order = class_order(("15026", "9205", "3"), tuple(f"n{i}" for i in range(21841)), "DIR")
    assert order == ClassOrder((15026, 9205, 3), "number (3 of 21841 occur)")


@pytest.mark.parametrize("folders", [("1", "2", "3"), ("0", "1", "01"), ("0", "1", "2", "3")])
def test_numbers_must_be_the_models(folders: tuple[str, ...]) -> None:
    with pytest.raises(
        BeitJaxError, match=r"DIR: classes are \d numbers from \d to \d, expected each of 0 to 2 once at most"
    ):
        class_order(folders, ("a", "b", "c"), "DIR")


def test_wordnet_ids_are_imagenets_classes_in_order() -> None:
    ids = [f"n{number:08d}" for number in np.random.default_rng(0).choice(10**8, 1000, replace=False)]
    order = class_order(ids, tuple(f"class {i}" for i in range(1000)), "DIR")
    assert [ids[i] for i in np.argsort(order.indices)] == sorted(ids) and "WordNet" in order.rule
    assert class_order(ids[:3], tuple(sorted(ids)), "DIR").indices == tuple(sorted(ids).index(name) for name in ids[:3])
    with pytest.raises(BeitJaxError, match="DIR: 999 classes, but the model has 1000; their names would have to be"):
        class_order(ids[1:], tuple(f"class {i}" for i in range(1000)), "DIR")
    with pytest.raises(BeitJaxError, match="is none of the model's"):
        class_order(ids[:3], ("a", "b", "c"), "DIR")


def test_a_model_without_names_takes_the_sorted_order() -> None:
    order = class_order(("b", "a"), ("LABEL_0", "LABEL_1"), "DIR")
    assert order.indices == (1, 0) and order.rule == "the order of their names, as the model's have none"


def test_doubtful_orders_are_refused_in_one_line() -> None:
    cases = {
        r"DIR: 3 classes, but the model has 2; their names would have to be its labels": (("a", "b", "c"), ("a", "b")),
        r"DIR: class x\\x1b is none of the model's, whose first is a; name the": (("x\x1b", "b"), ("a", "b")),
        r"several classes called x; name the data's by their numbers": (("x", "y"), ("x", "y", "x")),
    }
    for message, (folders, labels) in cases.items():
        with pytest.raises(BeitJaxError, match=message) as caught:
            class_order(folders, labels, "DIR")
        assert "\n" not in str(caught.value)


# --- ReaL


def test_reassessed_labels_follow_the_number_in_the_name_not_the_order_of_files(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[3], [], [0, 2], [1]]))
    names = ["val/n02/ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    assert real_labels(path, names, 4).tolist() == [[0, 2], [3, -1], [-1, -1]]
    assert real_labels(path, names[2:], 4).tolist() == [[-1]]
    for name in ("cat.jpg", "ILSVRC2012_val_00000005.JPEG", "ILSVRC2012_val_00000000.JPEG"):
        with pytest.raises(BeitJaxError, match=r"has no labels in .*real.json, which are .* to 00000004"):
            real_labels(path, [name], 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1], [4]]", "image 2: class 4, expected 0 to 3"),
        ("[[true]]", "image 1: class True, expected 0 to 3"),
        ('{"a": [1]}', "expected a JSON array"),
        ("[1]", "expected a list of lists"),
        ("[[1", "not JSON"),
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "real.json"
    with pytest.raises(BeitJaxError, match=r"real.json: no such file"):
        real_labels(path, [], 4)
    path.write_text(content)
    with pytest.raises(BeitJaxError, match=rf"real.json: {message}"):
        real_labels(path, [], 4)


# --- Folders


@pytest.fixture(scope="module")
def digits() -> Any:
    return beit_jax.from_pretrained(DIGITS)


def digit_folders(root: Path, names: list[str]) -> Path:
    """The fifty embedded images in folders of these names, each image called as one of ImageNet's."""
    for number, path in enumerate(sorted((DIGITS / "images").iterdir()), start=1):
        folder = root / names[int(path.stem[-1])]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"ILSVRC2012_val_{number:08d}.PNG").write_bytes(path.read_bytes())
    return root


@pytest.mark.parametrize(("names", "rule"), [(NAMES, "name"), ([str(i) for i in range(10)], "number")])
def test_a_tree_of_folders_is_evaluated_as_it_is(digits: Any, tmp_path: Path, names: list[str], rule: str) -> None:
    root = digit_folders(tmp_path, names)
    scores = evaluate_directory(*digits, root, batch_size=16, workers=0)
    correct = json.loads((DIGITS / "expected.json").read_text())["images_correct"]
    assert (scores.count, int(scores.correct.sum()), scores.matched) == (50, correct, rule)
    assert scores.images.tolist() == [5] * 10 and scores.labels == tuple(NAMES)


def test_prepared_data_give_the_accuracy_that_pytorch_had(digits: Any, tmp_path: Path) -> None:
    prepare_digits(tmp_path / "digits")
    seen: list[int] = []
    scores = evaluate_directory(
        *digits, tmp_path / "digits", batch_size=64, workers=0, progress=lambda total: nullcontext(seen.append)
    )
    recorded = json.loads((DIGITS / "expected.json").read_text())
    assert (scores.count, int(scores.correct.sum())) == (recorded["held_out_size"], recorded["held_out_correct"])
    assert sum(seen) == scores.count
    with pytest.raises(BeitJaxError, match="did you mean"):
        evaluate_directory(*digits, tmp_path)


def test_reassessed_labels_of_a_tree(digits: Any, tmp_path: Path) -> None:
    root = digit_folders(tmp_path / "val", NAMES).parent  # below a folder of the split
    truth = [int(path.stem[-1]) for path in sorted((DIGITS / "images").iterdir())]
    wrong = [(label + 1) % 10 for label in truth]
    lists = [[]] * 10 + [[a, b] for a, b in zip(wrong[10:30], truth[10:30], strict=True)] + [[a] for a in wrong[30:]]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    scores = evaluate_directory(*digits, root, real=tmp_path / "real.json", batch_size=16, workers=0)
    guesses = beit_jax.classify(*digits, sorted((DIGITS / "images").iterdir()), top=5)
    right = sum(best[0].index in accepted for best, accepted in zip(guesses, lists, strict=True))
    right5 = sum(any(g.index in accepted for g in best) for best, accepted in zip(guesses, lists, strict=True))
    assert scores.real == (40, right, right5) and 18 <= right <= 22
    assert any(line.startswith("ReaL") and "of 40 images" in line for line in describe(scores))


def test_folders_that_are_no_data_are_named(digits: Any, tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match="none: expected a folder, found nothing"):
        open_folder(tmp_path / "none")
    with pytest.raises(BeitJaxError, match="expected prepared data, or a folder of images per class; found neither"):
        open_folder(tmp_path)
    (tmp_path / "b").mkdir(), (tmp_path / "a" / "deep").mkdir(parents=True), (tmp_path / ".git").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "a" / "deep" / "1.JPG", "JPEG")
    with pytest.raises(BeitJaxError, match="b: the folder of a class without images"):
        open_folder(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "b" / "1.png")
    folder = open_folder(tmp_path)
    assert folder.labels == ("a", "b") and folder.classes == (0, 1) and len(folder) == 2
    assert folder[0]["file_name"].endswith("a/deep/1.JPG") and folder[1]["label"] == 1
    with pytest.raises(BeitJaxError, match="2 classes, but the model has 10"):
        evaluate_directory(*digits, tmp_path)


def test_a_model_that_does_not_classify_is_refused(tmp_path: Path) -> None:
    config = BeitConfig(image_size=(16, 16), patch_size=(8, 8), hidden_size=16, num_attention_heads=2)
    with pytest.raises(BeitJaxError, match=r"has no classifier \(its task is features\)"):
        evaluate_directory(build_model(config, abstract_model(config)[1]), ImageProcessor(), tmp_path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
