"""Images of four bands and of one, by the command line: from the files of images to a model that transformers reads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tifffile
import torch
from numpy.testing import assert_allclose

from beit_jax import convert
from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.train.loop.plan import make_plan
from beit_jax.train.recipe import DataOptions
from beit_jax.train.recipes import recipe_named
from beit_jax.weights import load

FEW = ["--data.workers", "0", "--data.batch-size", "8", "--optim.epochs", "3", "--optim.warmup-epochs", "0",
       "--model.dtype", "float32", "--optim.layer-decay", "1"]  # fmt: skip
PLAIN = ["--augment.randaugment", "None", "--augment.color-jitter", "0"]
TOLERANCE = 1e-5


def printed(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()  # a run begins with what became of its checkpoint
    assert [line for line in lines if not line.startswith("--init: ")] == lines[-1:]
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.fixture(scope="module")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of RGB images, as transformers saves it."""
    model = reference.random_model(**reference.TINY | reference.BIAS["per_layer"] | {"num_labels": 3})
    return reference.save(model, tmp_path_factory.mktemp("hub") / "rgb")


@pytest.fixture(scope="module")
def four_bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class: 16-bit TIFF files of four bands, and arrays; the fourth band tells the classes apart."""
    root, rng = tmp_path_factory.mktemp("images") / "four", np.random.default_rng(0)
    for number, name in enumerate(("dry", "wet")):
        (root / name).mkdir(parents=True)
        for index in range(12):
            pixels = rng.integers(0, 65536, (40, 36, 4), dtype=np.uint16)
            pixels[..., 3] = rng.integers(0, 9000, (40, 36)) + 50000 * number
            if index % 3:
                path = root / name / f"{index}.tif"
                tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["unspecified"])
            else:
                np.save(root / name / f"{index}.npy", np.moveaxis(pixels, -1, 0))
    return root


@pytest.fixture(scope="module")
def trained(rgb: Path, four_bands: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`native`, `data` and `run` of a classifier of four bands."""
    root = tmp_path_factory.mktemp("trained")
    assert (
        main(["convert", str(rgb), str(root / "native"), "--channels", "4", "--channels-from", "0", "1", "2", "0"]) == 0
    )
    assert main(["prepare", "folder", str(four_bands), str(root / "data")]) == 0
    run = ["train", "beit_base_ft1k", "--data", root / "data", "--out", root / "run", "--init", root / "native", *FEW,
           *PLAIN, "--model.channels", "4", "--data.eval-batch-size", "2", "--optim.lr", "2e-3"]  # fmt: skip
    assert main([str(argument) for argument in run]) == 0
    return root


def test_a_classifier_of_four_bands_from_file_to_file(
    trained: Path, four_bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(trained / "run" / "model")
    assert model.config.num_channels == model.processor.num_channels == 4
    scores = printed(["evaluate", trained / "run" / "model", "--data", trained / "data"], capsys)
    assert scores["images"] == 2
    again = printed(["evaluate", trained / "run" / "model", "--data", four_bands], capsys)
    assert again["images"] == 24
    files = sorted(four_bands.rglob("*.*"))
    found = printed(["classify", trained / "run" / "model", four_bands, "--top", "2"], capsys)
    assert [row["image"] for row in found] == [str(path) for path in files]
    assert main(["features", str(trained / "run" / "model"), *map(str, files[:2]), "-o", str(tmp_path / "f.npz")]) == 0
    assert np.load(tmp_path / "f.npz")["features"].shape == (2, 32)

    assert main(["export", str(trained / "run" / "model"), str(tmp_path / "hf")]) == 0
    from transformers import BeitForImageClassification

    theirs = BeitForImageClassification.from_pretrained(tmp_path / "hf")
    pixels = torch.from_numpy(model.processor(files)).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = theirs(pixels).logits
    expected = torch.softmax(logits, dim=-1).numpy()
    for row, probabilities in zip(found, expected, strict=True):
        by_label = {entry["label"]: entry["probability"] for entry in row["classes"]}
        assert_allclose([by_label[name] for name in ("dry", "wet")], probabilities, rtol=0, atol=TOLERANCE)


def test_pixels_are_scaled_as_numpy_would(trained: Path, four_bands: Path) -> None:
    """From the same file as an array: cut, scaled by 65535 and normalised."""
    processor = load(trained / "run" / "model").processor
    path = next(four_bands.rglob("*.tif"))
    pixels = tifffile.imread(path).astype(np.float64) / 65535
    means = processor(path)[0].mean(axis=(0, 1))
    assert_allclose(means, (pixels[2:38].mean(axis=(0, 1)) - 0.5) / 0.5, atol=0.05)


def test_what_needs_rgb_is_refused_by_name(
    trained: Path, rgb: Path, four_bands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "beit_base_ft1k", "--data", trained / "data", "--out", trained / "x", *FEW, "--dry-run"]
    start = ["--init", trained / "native"]
    message = refused([*run, *start, "--augment.color-jitter", "0.4"], capsys)
    assert "RandAugment and colour jitter: 8-bit RGB images have colours to change, found 4 channels" in message
    assert "pass --augment.randaugment None --augment.color-jitter 0" in message
    assert "--data.mean: expected 1 number or 4" in refused(
        [*run, *start, *PLAIN, "--data.mean", "0.1", "0.2", "--data.std", "1", "1"], capsys
    )
    assert "--data.bands: expected 4 numbers" in refused([*run, *start, *PLAIN, "--data.bands", "1", "2"], capsys)
    assert "--data.mean: expected with --data.std" in refused([*run, *start, *PLAIN, "--data.mean", "1"], capsys)
    image = next(four_bands.rglob("*.tif"))
    message = refused(["classify", rgb, image], capsys)
    assert "4 bands (uint16), the model takes 3; select bands" in message
    message = refused([*run[:-1], *start, *PLAIN, "--data.pixels", "uint8"], capsys)
    assert "uint16 values, expected 8 bits; --data.pixels float32" in message


@pytest.mark.thorough
def test_one_channel_by_options_of_training(
    trained: Path, rgb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "beit_base_ft1k", "--data", trained / "data", "--out", tmp_path / "run", "--init", rgb, *FEW,
           *PLAIN, "--model.channels", "1", "--data.bands", "4", "--data.eval-batch-size", "2", "--optim.epochs", "1",
           "--data.mean", "0.4", "--data.std", "0.3", "--data.scale", "10000"]  # fmt: skip
    assert main([str(argument) for argument in run]) == 0
    model = load(tmp_path / "run" / "model")
    processor = model.processor
    assert (model.config.num_channels, processor.bands, processor.mean, processor.std) == (1, (4,), (0.4,), (0.3,))
    assert processor.rescale_factor == 1 / 10000
    assert printed(["evaluate", tmp_path / "run" / "model", "--data", trained / "data"], capsys)["images"] == 2


def test_a_list_of_channels_starts_training_as_conversion_does(trained: Path, rgb: Path) -> None:
    recipe = replace(recipe_named("finetune"), data=DataOptions(batch_size=8, eval_batch_size=2, workers=0))
    listed = replace(recipe, model=replace(recipe.model, channels_from=(0, 1, 2, 0)))
    found = make_plan(listed, trained / "data", convert.load(rgb))
    expected = make_plan(recipe, trained / "data", load(trained / "native"))
    assert (found.config, found.processor) == (expected.config, expected.processor)
    leaf = "beit/embeddings/patch_kernel"
    starts = [plan.sources.start for plan in (found, expected)]
    assert starts[0] is not None and starts[1] is not None
    assert np.array_equal(starts[0].params[leaf], starts[1].params[leaf])
    with pytest.raises(
        BeitJaxError, match=r"--model\.channels-from: the channels of a checkpoint; name it with --init"
    ):
        make_plan(listed, trained / "data")
