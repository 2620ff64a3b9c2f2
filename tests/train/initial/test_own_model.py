"""A model of nobody's architecture, made by transformers, goes all the way by the command line: converted, trained,
evaluated, exported, and transformers computes the same with it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from beit_jax import from_pretrained
from beit_jax.cli.main import main
from beit_jax.train.loop.plan import make_plan
from beit_jax.train.recipes import recipe_named
from beit_jax.weights import load

pytestmark = pytest.mark.thorough

HEIGHT, WIDTH = 32, 48
OWN = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "image_size": [HEIGHT, WIDTH],
    "patch_size": 8,
    "layer_norm_eps": 1e-5,
    # And no positions: of a grid that is not square, transformers exchanges rows and columns of bias tables, and it has
    # no absolute positions for images that are not.
    "use_mean_pooling": True,
    "layer_scale_init_value": 0.2,
    "hidden_act": "relu",
    "initializer_range": 0.2,
}
# A step or two of small batches, without dropout.
SHORT = (
    "--optim.epochs 0.1 --optim.warmup-epochs 0 --data.eval-batch-size 96 --model.drop-path 0 --run.log-every 1 "
    "--optim.lr 1e-2"
).split()


@dataclass(frozen=True)
class Places:
    """What the commands left, and what `train` would have done."""

    source: Path
    native: Path
    digits: Path
    run: Path
    preview: dict[str, Any]
    scores: dict[str, Any]
    exported: Path


def printed(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command prints for programs."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that pre-training would leave: no head, a final norm, no pooling."""
    directory = tmp_path_factory.mktemp("own") / "transformers"
    torch.manual_seed(0)
    config = transformers.BeitConfig(**OWN)
    model = transformers.BeitModel(config, add_pooling_layer=True)
    with torch.no_grad():  # tensors that start at zero hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def places(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("run")
    native, digits, run, exported = (root / name for name in ("native", "digits", "run", "exported"))
    log: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("beit_jax.cli.training.print_json", lambda content: log.update(last=content))
        patch.setattr("beit_jax.cli.evaluating.print_json", lambda content: log.update(last=content))
        assert main(["convert", str(source), str(native)]) == 0
        assert main(["prepare", "digits", str(digits)]) == 0
        train = ["train", "digits_finetune", "--data", str(digits), "--out", str(run), "--init", str(native), *SHORT]
        assert main([*train, "--dry-run", "--json"]) == 0
        preview = log["last"]
        assert main(train) == 0
        assert main(["evaluate", str(run / "model"), "--data", str(digits), "--workers", "0", "--json"]) == 0
    assert main(["export", str(run / "model"), str(exported)]) == 0
    return Places(source, native, digits, run, preview, log["last"], exported)


def test_the_run_is_of_the_checkpoints_architecture(places: Places) -> None:
    config = load(places.run / "model").config
    assert (config.image_size, config.patch_size, config.hidden_size) == ((HEIGHT, WIDTH), (8, 8), 48)
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (3, 4, 100)
    assert (config.layer_norm_eps, config.hidden_act, config.position_bias) == (1e-5, "relu", "none")
    assert (config.use_absolute_position_embeddings, config.layer_scale_init_value) == (False, 0.2)
    recorded = json.loads((places.run / "run.json").read_text())["model"]
    assert (recorded["hidden_size"], recorded["image_size"], "labels" in recorded) == (48, [HEIGHT, WIDTH], False)


def test_the_dry_run_said_so(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    """What the model is, what of it is the checkpoint's, and what starts new."""
    network, start = places.preview["network"], places.preview["start"]
    assert (network["hidden_size"], list(network["image_size"])) == (48, [HEIGHT, WIDTH])
    assert list(start["drawn"]) == ["classifier/bias", "classifier/kernel"]
    assert (list(start["adapted"]), list(start["dropped"])) == ([], [])
    train = ["train", "digits_finetune", "--data", places.digits, "--out", places.run.parent / "x", "--init"]
    options = ["--model.image-size", "64", "--model.patch-size", "16"]
    assert main([*map(str, [*train, places.native, *options]), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "  hidden_size = 48: as the checkpoint has\n" in shown
    assert "  patch_size = 16x16: the checkpoint has 8x8\n" in shown
    assert "  adapted    beit/embeddings/patch_kernel\n" in shown
    assert "  starts new classifier/bias, classifier/kernel\n" in shown


def test_the_tensors_are_those_of_the_checkpoint_when_the_run_begins(places: Places) -> None:
    """By Python, too; nothing but the classifier is drawn."""
    plan = make_plan(recipe_named("digits_finetune"), places.digits, init=places.native)
    assert (plan.config.hidden_size, plan.config.image_size) == (48, (HEIGHT, WIDTH))
    theirs = {f"beit/{name}": leaf for name, leaf in load(places.native).params.items()}
    from beit_jax.tree import flatten

    ours = flatten(plan.first_state().params)
    assert ours.keys() - theirs.keys() == {"classifier/kernel", "classifier/bias"}
    for name in ours.keys() & theirs.keys():
        np.testing.assert_array_equal(np.asarray(ours[name]), theirs[name])


def test_transformers_gives_the_same_logits_and_the_same_score(places: Places) -> None:
    """Of images that its own processor has prepared, by the exported directory alone."""
    from beit_jax.train.data.datasets import open_dataset

    theirs = transformers.BeitForImageClassification.from_pretrained(places.exported).eval()
    assert theirs.config.image_size == [HEIGHT, WIDTH] and theirs.config.id2label[3] == "three"
    processor = transformers.BeitImageProcessorPil.from_pretrained(places.exported)
    model, own = from_pretrained(places.run / "model")
    images = open_dataset(places.digits, "validation")
    pictures, labels = zip(*(images.load(index) for index in range(96)), strict=True)
    pixels = processor([Image.fromarray(np.asarray(picture)) for picture in pictures], return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        expected = theirs(pixels).logits.numpy()
    np.testing.assert_allclose(own(list(pictures)), pixels.numpy().transpose(0, 2, 3, 1), atol=1e-6)
    found = np.asarray(model(own(list(pictures))).logits)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - expected[:1]).max() > 1e-2, "all images are the same to it"
    assert places.scores["images"] == 450
    assert (expected.argmax(axis=1) == np.asarray(labels)).mean() == pytest.approx(places.scores["top1"], abs=0.15)


def test_it_goes_on_and_refuses_another_architecture(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a run that an earlier version began: it kept the variant as if it were named, and no architecture."""
    run = ["train", "digits_finetune", "--data", places.digits, "--out", places.run, "--init", places.native, *SHORT]
    run = list(map(str, run))
    assert main(run) == 0
    path = places.run / "run.json"
    record = json.loads(path.read_text())
    assert (record["recipe"]["model"]["variant"], record["recipe"]["published"]) == (None, "digits")
    del record["model"], record["recipe"]["published"]
    record["recipe"]["model"]["variant"] = "digits"
    path.write_text(json.dumps(record))
    assert main(run) == 0
    capsys.readouterr()
    for options, message in (
        (["--model.variant", "digits"], "--init: hidden_size 48, but --model.variant has 64; choose the variant of"),
        (["--model.depth", "4"], "--model.depth: the checkpoint of --init has 3, found 4; None takes the checkpoint's"),
        (["--model.image-size", "32"], "the run was begun with recipe.model.image_size None, now it is 32"),
    ):
        assert main([*run, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_directory_of_transformers_and_a_file_are_converted_on_the_way(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--init` takes what `convert` takes; Python names the command."""
    from beit_jax.errors import BeitJaxError

    run = ["train", "digits_finetune", "--data", places.digits, "--out", tmp_path / "run", "--dry-run", *SHORT]
    found = printed([*run, "--init", places.source], capsys)
    assert list(found["start"]["drawn"]) == ["classifier/bias", "classifier/kernel"]
    assert found["network"] == json.loads(json.dumps(places.preview["network"]))
    with pytest.raises(BeitJaxError, match=r"convert"):
        make_plan(recipe_named("digits_finetune"), places.digits, init=places.source)
    assert not os.path.lexists(tmp_path / "run")
