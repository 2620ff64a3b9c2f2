"""What a run learns follows from its data: the kind of outputs, weights, standardisation, and the fate of the head."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor
from beit_jax.models.build import param_shapes
from beit_jax.train.data.datasets import open_dataset
from beit_jax.train.data.prepare import prepare_table
from beit_jax.train.initial.parameters import head_change, keeps_classifier
from beit_jax.train.labels.meaning import TableOptions
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.objectives.classification import Classification
from beit_jax.train.recipes import recipe_named
from beit_jax.tree import flatten
from beit_jax.weights import NativeCheckpoint

IMAGES = 24
TINY = BeitConfig(
    task="image_classification",
    image_size=(16, 16),
    patch_size=(8, 8),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    labels=("x", "y"),
)
COLUMNS = {"one": ("one",), "several": ("several",)}
AGES = [float(i**2) for i in range(IMAGES)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data sets ``one``, ``several`` and ``numbers`` of one table."""
    folder = tmp_path_factory.mktemp("data")
    lines = ["file_name,one,several,age,height"]
    for i in range(IMAGES):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{'x' if i % 4 else 'y'},{'x;y' if i % 4 else 'y'},{AGES[i]},{3}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    for name, columns in COLUMNS.items():
        prepare_table(folder / "table.csv", folder / name, TableOptions(label_columns=columns))
    prepare_table(folder / "table.csv", folder / "numbers", TableOptions(value_columns=("age", "height")))
    return folder


def start(**changes: Any) -> NativeCheckpoint:
    config, rng = replace(TINY, **changes), np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in param_shapes(config).items()}
    return NativeCheckpoint(config, ImageProcessor(resize=(16, 16)), params, {"source": "a test"})


def plan(directory: Path, init: NativeCheckpoint | None = None, **options: Any) -> Plan:
    """The recipe `finetune` on a data set; options by their groups."""
    recipe = recipe_named("finetune")
    groups = {"data": {"batch_size": 8, "workers": 0}, "model": {"dtype": "float32"}} | options
    recipe = replace(recipe, **{name: replace(getattr(recipe, name), **values) for name, values in groups.items()})
    recipe.check()
    return make_plan(recipe, directory, init if init is not None else start())


def learned(found: Plan) -> Any:
    assert isinstance(found.objective, Classification) and found.objective.outputs is not None
    return found.objective.outputs


@pytest.mark.parametrize(
    ("name", "problem", "label"),
    [
        ("one", "single_label_classification", "int32[8]"),
        ("several", "multi_label_classification", "uint8[8, 2]"),
        ("numbers", "regression", "float32[8, 2]"),
    ],
)
def test_the_data_say_what_the_outputs_are(data: Path, name: str, problem: str, label: str) -> None:
    found = plan(data / name)
    assert found.config.problem_type == problem and found.objective.config.problem_type == problem
    shape = found.abstract_batch["label"]
    assert f"{shape.dtype}{list(shape.shape)}" == label
    assert jax.eval_shape(found.step, found.abstract_state, found.abstract_batch)


def test_one_class_of_each_image_can_be_learned_for_itself(data: Path) -> None:
    found = plan(data / "one", classify={"problem_type": "multi_label_classification"})
    assert found.config.problem_type == "multi_label_classification"
    assert found.abstract_batch["label"].shape == (8,)
    jax.eval_shape(found.step, found.abstract_state, found.abstract_batch)


def test_weights_of_the_training_split(data: Path, tmp_path: Path) -> None:
    labels = [int(label) for label in open_dataset(data / "one", "train").said()]
    expected = compute_class_weight("balanced", classes=np.arange(2), y=labels)
    found = plan(data / "one", classify={"class_weights": "balanced"})
    np.testing.assert_allclose(learned(found).weights, expected, rtol=1e-6)
    several = np.stack(list(open_dataset(data / "several", "train").said()))
    weights = learned(plan(data / "several", classify={"class_weights": "balanced"})).weights
    assert weights[0] == pytest.approx((several[:, 0] == 0).sum() / several[:, 0].sum())
    assert weights[1] == 1  # of a class that all images have
    (tmp_path / "weights.json").write_text(json.dumps({"y": 5}))
    found = plan(data / "one", classify={"class_weights": str(tmp_path / "weights.json")})
    np.testing.assert_array_equal(learned(found).weights, [1, 5])
    jax.eval_shape(found.step, found.abstract_state, found.abstract_batch)


def test_numbers_of_the_training_split(data: Path) -> None:
    ages = np.stack(list(open_dataset(data / "numbers", "train").said()))
    outputs = learned(plan(data / "numbers"))
    np.testing.assert_allclose(outputs.mean, ages.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(outputs.std, [ages[:, 0].std(), 1], rtol=1e-6)  # what does not vary has no deviation
    assert learned(plan(data / "numbers", classify={"standardise": False})).mean is None


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "one",
            {"classify": {"problem_type": "regression"}},
            "expected data that say numbers, found one class of every",
        ),
        ("several", {"classify": {"problem_type": "single_label_classification"}}, "found several classes of an image"),
        ("numbers", {"classify": {"problem_type": "multi_label_classification"}}, r"found numbers \(values\); leave"),
        (
            "numbers",
            {"classify": {"class_weights": "balanced"}},
            "--classify.class-weights: expected none, numbers have",
        ),
        ("numbers", {"augment": {"smoothing": 0.1}}, "--augment.smoothing: expected 0, numbers have no classes"),
        ("several", {"classify": {"standardise": False}}, "--classify.standardise: expected True, classes are no"),
        (
            "one",
            {"classify": {"class_weights": "nowhere.json"}},
            "nowhere.json: no such file; --classify.class-weights",
        ),
    ],
)
def test_options_that_do_not_fit_the_data(data: Path, name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(BeitJaxError, match=expected):
        plan(data / name, **options)


def test_pixels_are_normalised_as_the_checkpoint_s(data: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    checkpoint = replace(start(), processor=ImageProcessor(resize=(16, 16), mean=mean, std=std))
    for options, expected in (({}, (mean, std)), ({"statistics": "half"}, ((0.5,) * 3,) * 2)):
        found = plan(data / "one", checkpoint, data={"batch_size": 8, "workers": 0, **options})
        assert (found.processor.mean, found.processor.std) == expected
        assert found.recipe.data.moments(3) == expected


def test_a_probe_learns_one_class(data: Path) -> None:
    recipe = replace(recipe_named("digits_probe"), data=replace(recipe_named("digits_probe").data, batch_size=8))
    with pytest.raises(BeitJaxError, match="a linear probe learns one class of each image, found image with classes"):
        make_plan(recipe, data / "several", start())


# The head


@pytest.mark.parametrize(
    ("then", "now", "kept"),
    [
        ({}, {}, True),
        ({}, {"labels": ("y", "x")}, False),
        ({}, {"labels": ("x", "y", "z")}, False),
        ({}, {"pooling": "cls"}, False),
        ({}, {"problem_type": "multi_label_classification"}, False),
        ({}, {"problem_type": "single_label_classification"}, True),
        ({"problem_type": "multi_label_classification"}, {"problem_type": "multi_label_classification"}, True),
        ({"problem_type": "multi_label_classification"}, {"problem_type": "single_label_classification"}, False),
        ({"labels": ("age",)}, {"labels": ("age",), "problem_type": "regression"}, True),
        ({"problem_type": "regression"}, {"problem_type": "multi_label_classification"}, False),
    ],
)
def test_a_head_is_kept_only_if_it_means_the_same(then: dict[str, Any], now: dict[str, Any], kept: bool) -> None:
    config, target = replace(TINY, **then), replace(TINY, **now)
    assert keeps_classifier(config, target) is kept
    assert bool(head_change(config, target)) is not kept


@pytest.mark.parametrize(
    ("name", "config", "note"),
    [
        ("one", {}, None),
        (
            "one",
            {"labels": ("y", "x")},
            "the head starts new: the data's labels are 2 (x, y), the checkpoint's 2 (y, x)",
        ),
        ("several", {}, "the head starts new: it is for multi_label_classification, the checkpoint's for none"),
        ("several", {"problem_type": "multi_label_classification"}, None),
    ],
)
def test_a_run_says_what_becomes_of_the_head(data: Path, name: str, config: dict[str, Any], note: str | None) -> None:
    checkpoint = start(**config)
    found = plan(data / name, checkpoint)
    params = flatten(found.objective.initial(jax.random.key(0)).params)
    same = np.array_equal(params["classifier/kernel"], checkpoint.params["classifier/kernel"])
    assert same is (note is None)
    said = [line for line in found.objective.notes if "head" in line or "starts new" in line]
    assert said == (
        [] if note is None else ["--init: starts new classifier/bias, classifier/kernel", f"--init: {note}"]
    )


def test_a_head_of_numbers_goes_on_where_it_was(data: Path) -> None:
    """It gives the data's units in a checkpoint, and standardised numbers in a run."""
    checkpoint = start(labels=("age", "height"), problem_type="regression")
    found = plan(data / "numbers", checkpoint)
    outputs, params = learned(found), found.objective.initial(jax.random.key(0)).params
    kernel = checkpoint.params["classifier/kernel"]
    np.testing.assert_allclose(params["classifier"]["kernel"], kernel / outputs.std, rtol=1e-6)  # type: ignore[index]
    back = flatten(outputs.in_units(params))
    np.testing.assert_allclose(back["classifier/kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(back["classifier/bias"], checkpoint.params["classifier/bias"], rtol=1e-4, atol=1e-4)
