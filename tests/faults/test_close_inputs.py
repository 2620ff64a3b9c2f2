"""Something close to what is asked for: it is used, or one line says what to give. Rows of C4 and D5.

`--init` and `--tokenizer` of `train` take what `beit-jax convert` takes, and the directories of runs. Every public
function that takes a path takes text.
"""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_hub
import huggingface_hub
import numpy as np
import pytest
from fake_hub import FakeHub
from safetensors.numpy import save_file

import beit_jax
from beit_jax import convert, images, weights
from beit_jax.cli import sources
from beit_jax.cli.main import main
from beit_jax.convert import tokenizers
from beit_jax.errors import BeitJaxError
from beit_jax.hub import CONFIG, PROCESSOR, WEIGHTS
from beit_jax.tokenizers.build import tokenizer_shapes
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, load_tokenizer, read_tokenizer
from beit_jax.tokenizers.dvae import DvaeEncoderConfig
from beit_jax.train.loop.plan import make_plan
from beit_jax.train.loop.run import train
from beit_jax.train.recipes import recipe_named
from beit_jax.weights.native import NativeCheckpoint

DIGITS = Path(beit_jax.__file__).parent / "digits"
HUB_FILES = (CONFIG, PROCESSOR, "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a tokenizer: as their files, native, and as results of runs."""
    folder = tmp_path_factory.mktemp("close")
    config = DvaeEncoderConfig(n_hid=8, vocab_size=16, n_blk_per_group=1)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tokenizer_shapes(config).items()}
    save_file(tokenizers.to_torch(config, params), folder / "encoder.safetensors")
    tokenizers.convert(str(folder / "encoder.safetensors"), str(folder / "tokenizer"))
    convert.convert(str(DIGITS), str(folder / "native"))
    for run, result in (("run", "native"), ("tokenizer-run", "tokenizer"), ("young-run", None)):
        (folder / run).mkdir()
        (folder / run / "run.json").write_text("{}")
        if result is not None:
            shutil.copytree(folder / result, folder / run / ("model" if result == "native" else result))
    return folder


@pytest.mark.parametrize("given", ["native", "run", "run/model", str(DIGITS), str(DIGITS / "model.safetensors"), "hub"])
@pytest.mark.parametrize("option", ["init", "teacher"])
def test_a_model_is_read_from_what_is_close(
    option: str, given: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights.load(folder / "native")
    with FakeHub() as hub:
        if given == "hub":
            fake_hub.use(hub.url, tmp_path, monkeypatch)
            hub.push("org/digits", {name: (DIGITS / name).read_bytes() for name in HUB_FILES})
        found = sources.READERS[option](option, "org/digits" if given == "hub" else str(folder / given))
        huggingface_hub.close_session()
    assert isinstance(found, NativeCheckpoint) and found.config == expected.config
    assert found.params.keys() == expected.params.keys()
    assert all(np.array_equal(found.params[name], leaf) for name, leaf in expected.params.items())


@pytest.mark.parametrize("given", ["tokenizer", "tokenizer-run", "tokenizer-run/tokenizer", "encoder.safetensors"])
def test_a_tokenizer_is_read_from_what_is_close(given: str, folder: Path) -> None:
    expected, found = read_tokenizer(folder / "tokenizer"), sources.tokenizer("tokenizer", str(folder / given))
    assert isinstance(found, TokenizerCheckpoint) and found.config == expected.config
    assert all(np.array_equal(found.params[name], leaf) for name, leaf in expected.params.items())


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("init", "young-run", "a run without model/; it has no results before its end"),
        ("tokenizer", "run", "a run without tokenizer/; its results are model"),
        ("init", "tokenizer", "a tokenizer; expected a model"),
        ("init", "encoder.safetensors", "a tokenizer; expected a model"),
        ("tokenizer", "native", "a model; expected a tokenizer"),
        ("tokenizer", str(DIGITS), "a model; expected a tokenizer"),
        ("init", "nowhere", "no such file or directory, and not a hub name"),
    ],
)
def test_what_cannot_be_meant_is_one_line(option: str, given: str, message: str, folder: Path) -> None:
    with pytest.raises(BeitJaxError, match=f"^--{option}: .*{message}"):
        sources.READERS[option](option, str(folder / given))


@pytest.mark.parametrize(
    ("call", "file"),
    [
        (weights.load, ""),
        (weights.is_native, ""),
        (weights.read_config, ""),
        (lambda path: sorted(weights.read_metadata(path).items()), WEIGHTS),
        (weights.read_specs, WEIGHTS),
        (weights.verify, WEIGHTS),
        (beit_jax.BeitConfig.from_file, CONFIG),
        (lambda path: images.ImageProcessor.from_file(path).to_hf(), PROCESSOR),
        (lambda path: beit_jax.from_pretrained(path)[1].to_hf(), ""),
    ],
)
def test_text_names_a_file_as_a_path_does(call: Callable[[Any], Any], file: str, folder: Path) -> None:
    path = folder / "native" / file
    assert repr(call(str(path))) == repr(call(path))


def test_text_names_sources_and_destinations(folder: Path, tmp_path: Path) -> None:
    assert convert.plan(str(DIGITS)).config == convert.load(str(DIGITS)).config
    convert.convert(str(DIGITS), str(tmp_path / "native"))
    checkpoint = weights.load(str(tmp_path / "native"))
    convert.export(checkpoint, str(tmp_path / "export"), "hf")
    assert (tmp_path / "export" / "model.safetensors").is_file()
    (tmp_path / "saved").mkdir()
    weights.save(str(tmp_path / "saved"), checkpoint)
    assert weights.is_native(tmp_path / "saved")
    assert type(load_tokenizer(str(folder / "tokenizer"))) is type(load_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("data") / "digits"
    assert main(["prepare", "digits", str(destination)]) == 0
    return destination


def test_a_plan_takes_text_and_checkpoints(data: Path, folder: Path) -> None:
    recipe = recipe_named("digits_finetune")
    plans = [make_plan(recipe, str(data), start) for start in (str(folder / "native"), convert.load(str(DIGITS)))]
    assert [plan.config for plan in plans] == [plans[0].config] * 2
    assert all(plan.sources.start is not None for plan in plans)


@pytest.mark.thorough
def test_training_runs_in_a_thread(data: Path, tmp_path: Path, folder: Path) -> None:
    """As a notebook's executor runs it: signals are the main thread's."""
    import dataclasses

    recipe = recipe_named("digits_finetune")
    optim = dataclasses.replace(recipe.optim, epochs=0.05, warmup_epochs=0.0)
    plan = make_plan(dataclasses.replace(recipe, optim=optim), str(data), str(folder / "native"))
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(train(plan, str(tmp_path / "run"), quiet=True)))
    thread.start()
    thread.join()
    assert [outcome.step for outcome in outcomes] == [plan.steps]
    assert weights.is_native(tmp_path / "run" / "model")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["start"] is not None
