"""Training segmentation: a tiny UperNet on images with labels that can be seen, from raw files to a usable model."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images.label_maps import IGNORED
from beit_jax.inference import predict
from beit_jax.inference.segmentation import segment
from beit_jax.models.build import param_shapes, statistics
from beit_jax.train.data.datasets import open_segmentation
from beit_jax.train.data.prepare import prepare_ade20k, prepare_digits
from beit_jax.train.evaluation.segmentation import Confusion, evaluate_folders
from beit_jax.train.forecast.preview import preview
from beit_jax.train.initial import model_config as resolve
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.loop.run import train
from beit_jax.train.objectives.segmentation import Segmentation, SegmentationOptions
from beit_jax.train.recipe import Recipe
from beit_jax.train.recipes import recipe_named
from beit_jax.train.step.optim import layer_scales, weight_decay_mask
from beit_jax.train.step.schedule import poly_table
from beit_jax.tree import flatten
from beit_jax.weights import load

STEPS = 12
COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)
TINY = BeitConfig(
    task="semantic_segmentation",
    image_size=(32, 32),
    patch_size=(8, 8),
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=32,
    position_bias="per_layer",
    position_resize="geometric",
    labels=("a",),
    out_indices=(0, 1, 2, 3),
    auxiliary_channels=8,
)


def write_scene(root: Path, part: str, i: int) -> None:
    """Patches of three colours, one for each class, and a corner of no class; sizes differ."""
    rng = np.random.default_rng([i, part == "training"])
    height, width = (int(side) * 8 for side in rng.integers(6, 9, 2))
    classes = np.kron(rng.integers(0, 3, (height // 8, width // 8)), np.ones((8, 8), int))
    pixels = np.clip(COLOURS[classes] + rng.normal(0, 5, (height, width, 1)), 0, 255).astype(np.uint8)
    stored = (classes + 1).astype(np.uint8)
    stored[:4, :4] = 0
    for kind, array, suffix in (("images", pixels, "png"), ("annotations", stored, "png")):
        path = root / kind / part / f"ADE_{i:02}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "ADEChallengeData2016"
    for part, count in (("training", 12), ("validation", 4)):
        for i in range(count):
            write_scene(root, part, i)
    return root


@pytest.fixture(scope="module")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_ade20k(scenes, tmp_path_factory.mktemp("data") / "ade20k").directory


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """The variant of every recipe here is TINY."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "_variant", lambda name: TINY)
        yield


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    published = recipe_named("beit_base_ade20k")
    return replace(
        published,
        model=replace(published.model, image_size=32, drop_path=0.1, dtype="float32"),
        data=replace(published.data, batch_size=4, workers=0),
        segment=replace(published.segment, scale=(256, 64), photometric=False),
        optim=replace(
            published.optim, lr=3e-2, warmup_lr=3e-8, epochs=STEPS / 3, warmup_epochs=2 / 3, accumulate=2, ema=0.5
        ),
        run=replace(published.run, save_every=5, log_every=1, eval_every_epochs=1000),
    )


@pytest.fixture(scope="module")
def plan(recipe: Recipe, data: Path) -> Plan:
    recipe.check()
    plan = make_plan(recipe, data, None)
    assert plan.steps == STEPS
    return plan


@pytest.fixture(scope="module")
def run(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    outcome = train(plan, out, quiet=True)
    assert outcome.step == STEPS
    assert tuple(outcome.scores) == plan.objective.score_names == ("mIoU", "mAcc", "aAcc", "validation_loss")
    assert 0.0 < outcome.scores["validation_loss"] < 20.0
    assert next(iter(outcome.scores)) == "mIoU"
    return out


def records(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def params(directory: Path) -> dict[str, np.ndarray]:
    return dict(load(directory).params)


def test_the_loss_falls(run: Path) -> None:
    losses = [entry["loss"] for entry in records(run) if "loss" in entry]
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < 0.8 * losses[0], losses


def test_learning_rates_are_the_polynomial_ones(plan: Plan, run: Path) -> None:
    """Written out: rise over two steps from a millionth, times a straight line to zero."""
    line = 3e-2 * (1 - np.arange(STEPS) / STEPS)
    line[:2] *= [1e-6, 1 - 0.5 * (1 - 1e-6)]
    np.testing.assert_allclose(plan.rates, line, rtol=1e-6)
    assert np.array_equal(plan.rates, poly_table(plan.recipe.optim, plan.steps_per_epoch))
    logged = [entry["learning_rate"] for entry in records(run) if "loss" in entry]
    np.testing.assert_allclose(logged, line, rtol=1e-6)


def test_running_statistics_move_and_no_gradient_moves_them(plan: Plan, run: Path) -> None:
    first, names = plan.first_state(), statistics(plan.config)
    assert names and set(flatten(first.stats)) == names
    assert not names & set(flatten(first.params))
    assert set(flatten(first.params)) | names == set(param_shapes(plan.config))
    assert set(flatten(first.average)) == set(flatten(first.params))
    trained = params(run / "model")
    for name, before in flatten(first.stats).items():
        assert not np.array_equal(trained[name], before), f"{name} stands still"


def test_the_average_shares_the_running_statistics(plan: Plan, run: Path) -> None:
    model, average = params(run / "model"), params(run / "model-ema")
    same = {name for name in model if np.array_equal(model[name], average[name])}
    assert statistics(plan.config) <= same
    assert "decode_head/classifier/kernel" not in same


def test_resumed_it_ends_in_the_same_bits(
    plan: Plan, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle by an error that the loop does not expect, then continued from step 5."""
    out, step = tmp_path / "run", plan.step
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setitem(plan.__dict__, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(plan, out, quiet=True)
    monkeypatch.setitem(plan.__dict__, "step", step)
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == 5
    assert train(plan, out, resume="must", quiet=True).step == STEPS
    for name in ("model", "model-ema"):
        once, twice = params(run / name), params(out / name)
        assert once.keys() == twice.keys()
        assert all(np.array_equal(once[leaf], twice[leaf]) for leaf in once)


def test_the_model_segments_as_the_run_says(run: Path, scenes: Path, data: Path) -> None:
    """Through the public functions, on the records and on the files that they were made of."""
    model, processor = predict.from_pretrained(run / "model")
    validation = open_segmentation(data, "validation")
    confusion = Confusion(model.config.labels)
    for i in range(len(validation)):
        picture, truth = validation.load(i)
        assert (truth[:4, :4] == IGNORED).all()
        confusion.add(segment(model, processor, picture), truth)
    scores, logged = confusion.scores(), records(run)[-1]
    assert (scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy) == (
        logged["mIoU"],
        logged["mAcc"],
        logged["aAcc"],
    )
    files = evaluate_folders(model, processor, scenes / "images/validation", scenes / "annotations/validation")
    assert files.pixel_accuracy == scores.pixel_accuracy
    assert scores.pixel_accuracy > 0.1, "150 classes, three of which occur: no better than chance"


def test_a_new_head_on_a_checkpoint(recipe: Recipe, run: Path, data: Path) -> None:
    """The encoder of a checkpoint of another size is taken over, and its heads, as the labels are the same."""
    larger = replace(recipe, model=replace(recipe.model, image_size=48))
    plan = make_plan(larger, data, run / "model")
    first, before = plan.first_state(), params(run / "model")
    leaves = flatten(first.params) | flatten(first.stats)
    assert np.array_equal(leaves["beit/blocks/mlp/fc1/kernel"], before["beit/blocks/mlp/fc1/kernel"])
    assert leaves["beit/blocks/attention/bias_table"].shape != before["beit/blocks/attention/bias_table"].shape
    assert not any(leaf is other for leaf in jax.tree.leaves(first.average) for other in jax.tree.leaves(first.params))


def test_all_but_the_encoder_learns_at_the_full_rate(plan: Plan) -> None:
    learned = plan.objective.shapes().params
    scales = flatten(layer_scales(learned, plan.config, 0.5))
    outside = {name for name in scales if not name.startswith("beit/")}
    assert {name.partition("/")[0] for name in outside} == {"fpn", "decode_head", "auxiliary_head"}
    assert all(scales[name] == 1.0 for name in outside)
    assert scales["beit/embeddings/cls_token"] == 0.5**5
    assert scales["beit/blocks/mlp/fc1/kernel"].ravel().tolist() == [0.5**4, 0.5**3, 0.5**2, 0.5]


def test_what_decays(plan: Plan) -> None:
    """In the original's segmentation the class token does, too: its exception is spelled otherwise."""
    optim = plan.recipe.optim
    assert optim.decay_class_token
    decays = flatten(weight_decay_mask(plan.objective.shapes().params, class_token=True))
    vectors = {name for name in decays if name.endswith(("bias", "scale", "gamma_1", "gamma_2"))}
    assert {name for name, decay in decays.items() if not decay} == vectors
    assert decays["beit/embeddings/cls_token"]


def test_padding_has_the_mean_colour_and_no_label(plan: Plan) -> None:
    """Images of at most 128 pixels in a crop of 256: normalised, the rest is 0 as in mmseg."""
    assert isinstance(plan.objective, Segmentation)
    task = replace(plan.objective, config=replace(plan.config, image_size=(256, 256)))
    image, labels = task.transform(Image.new("RGB", (60, 60)), np.zeros((60, 60), np.uint8), np.random.default_rng(0))
    assert image[-1, -1].tolist() == [124, 116, 104]
    assert labels[-1, -1] == IGNORED and labels[0, 0] == 0


def test_preview_traces_a_step(plan: Plan) -> None:
    found = preview(plan)
    assert (found.steps, found.training_images, found.validation_images, found.classes) == (STEPS, 12, 4, 150)


def test_data_of_another_kind_is_refused(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    digits = prepare_digits(tmp_path / "digits").directory
    with pytest.raises(BeitJaxError, match=r"expected image \(Image\) and segmentation"):
        make_plan(recipe, digits, None)
    with pytest.raises(BeitJaxError, match=r"expected image \(Image\) and label"):
        make_plan(recipe_named("digits_finetune"), data, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment": SegmentationOptions(scale=(32, 64))}, r"--segment.scale: expected pixels of the long edge"),
        ({"segment": SegmentationOptions(max_class_share=0.0)}, r"--segment.max-class-share: expected a number"),
    ],
)
def test_options_that_cannot_be(recipe: Recipe, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BeitJaxError, match=message):
        replace(recipe, **change).check()
