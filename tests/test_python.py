"""What people call from Python takes text, paths, hub names, and one image or many."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_hub
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fake_hub import FakeHub
from PIL import Image

import beit_jax
from beit_jax import convert
from beit_jax.errors import BeitJaxError

DIGITS = Path(beit_jax.__file__).parent / "digits"
IMAGE = sorted((DIGITS / "images").iterdir())[0]
NAME = "org/digits"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as server:
        fake_hub.use(server.url, tmp_path / "cache", monkeypatch)
        server.push(NAME, {path.name: path.read_bytes() for path in DIGITS.iterdir() if path.is_file()})
        yield server
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def checkpoint() -> beit_jax.NativeCheckpoint:
    return convert.load(DIGITS)


@pytest.fixture(scope="module")
def native(checkpoint: beit_jax.NativeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("python") / "native"
    beit_jax.save(directory, checkpoint)
    return directory


# --- Places ----------------------------------------------------------------------------------------------------------

SOURCES: dict[str, str | Path] = {
    "text": str(DIGITS),
    "path": DIGITS,
    "file": str(DIGITS / "model.safetensors"),
    "hub": NAME,
}
READERS: dict[str, Callable[[Any], Any]] = {
    "from_pretrained": lambda source: beit_jax.from_pretrained(source)[0].config,
    "load": lambda source: beit_jax.load(source).config,
    "convert.load": lambda source: convert.load(source).config,
    "convert.plan": lambda source: convert.plan(source).config,
}


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("reader", list(READERS))
def test_what_reads_takes_names(reader: str, source: str, hub: FakeHub, checkpoint: beit_jax.NativeCheckpoint) -> None:
    assert READERS[reader](SOURCES[source]) == checkpoint.config


@pytest.mark.parametrize("kind", [str, Path])
def test_what_reads_takes_native_directories(
    kind: Callable[[Path], str | Path], native: Path, checkpoint: beit_jax.NativeCheckpoint
) -> None:
    found = beit_jax.load(kind(native))
    assert found.config == checkpoint.config == beit_jax.from_pretrained(kind(native))[0].config
    assert all(np.array_equal(found.params[name], leaf) for name, leaf in checkpoint.params.items())
    assert beit_jax.BeitConfig.from_file(kind(native / "config.json")) == checkpoint.config
    assert beit_jax.ImageProcessor.from_file(kind(native / "preprocessor_config.json")) == checkpoint.processor


@pytest.mark.parametrize("kind", [str, Path])
def test_what_writes_takes_names(
    kind: Callable[[Path], str | Path], checkpoint: beit_jax.NativeCheckpoint, tmp_path: Path
) -> None:
    model, processor = beit_jax.from_pretrained(DIGITS)
    written: dict[str, Callable[[Any], object]] = {
        "save": lambda place: beit_jax.save(place, checkpoint),
        "save_pretrained": lambda place: beit_jax.save_pretrained(place, model, processor),
        "convert": lambda place: convert.convert(kind(DIGITS), place),
    }
    for name, write in written.items():
        write(kind(tmp_path / name))
        assert beit_jax.load(tmp_path / name).config == checkpoint.config
        with pytest.raises(BeitJaxError, match=f"{name}: already exists"):
            write(kind(tmp_path / name))
    for name, source in (("memory", checkpoint), ("native", kind(tmp_path / "save")), ("theirs", kind(DIGITS))):
        convert.export(source, kind(tmp_path / name))
        assert beit_jax.load(kind(tmp_path / name)).config == checkpoint.config
    with pytest.raises(BeitJaxError, match="nowhere: no such file or directory"):
        convert.export(kind(tmp_path / "nowhere"), kind(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_save_fills_an_empty_directory(checkpoint: beit_jax.NativeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    beit_jax.save(tmp_path / "empty", checkpoint)
    beit_jax.save(tmp_path / "empty", checkpoint, overwrite=True)
    assert beit_jax.load(tmp_path / "empty").config == checkpoint.config


@pytest.mark.parametrize("reader", list(READERS))
def test_a_name_of_nothing_is_one_line(reader: str) -> None:
    with pytest.raises(BeitJaxError, match=r"^no/such/place: no such file or directory") as caught:
        READERS[reader]("no/such/place")
    assert str(caught.value).isprintable()


# --- Images ----------------------------------------------------------------------------------------------------------


def pixels() -> np.ndarray:
    return np.asarray(Image.open(IMAGE).convert("RGB"))


ONE: dict[str, Callable[[], Any]] = {
    "text": lambda: str(IMAGE),
    "path": lambda: IMAGE,
    "PIL": lambda: Image.open(IMAGE),
    "array": pixels,
    "tensor": lambda: torch.from_numpy(pixels().copy()),
    "jax": lambda: jnp.asarray(pixels()),
}
MANY: dict[str, Callable[[], Any]] = {
    "list": lambda: [IMAGE, str(IMAGE)],
    "tuple": lambda: (IMAGE, pixels()),
    "generator": lambda: (path for path in (IMAGE, IMAGE)),
    "batch": lambda: np.stack([pixels(), pixels()]),
    "tensors": lambda: torch.from_numpy(np.stack([pixels(), pixels()])),
    "jax": lambda: jnp.stack([pixels(), pixels()]),
}


@pytest.mark.parametrize("kind", list(ONE))
def test_one_image_gives_one_result(kind: str, native: Path) -> None:
    model, processor = loaded(native)
    guesses = beit_jax.classify(model, processor, ONE[kind](), top=1)
    assert [guess.label for guess in guesses] == ["two"]  # 00_label_2.png
    assert beit_jax.features(model, processor, ONE[kind]()).shape == (64,)


@pytest.mark.parametrize("kind", list(MANY))
def test_many_images_give_a_list(kind: str, native: Path) -> None:
    model, processor = loaded(native)
    guesses = beit_jax.classify(model, processor, MANY[kind](), top=1)
    assert [[guess.label for guess in found] for found in guesses] == [["two"], ["two"]]
    assert beit_jax.features(model, processor, MANY[kind]()).shape == (2, 64)


def test_no_images_give_nothing(native: Path) -> None:
    model, processor = loaded(native)
    assert beit_jax.classify(model, processor, []) == []
    assert beit_jax.features(model, processor, [], pooling="tokens").shape == (0, 65, 64)


_LOADED: dict[Path, Any] = {}


def loaded(directory: Path) -> Any:
    """The model and the processor, built once."""
    if directory not in _LOADED:
        _LOADED[directory] = beit_jax.from_pretrained(directory)
    return _LOADED[directory]


# --- Training --------------------------------------------------------------------------------------------------------

SMALL = {
    "model.hidden-size": 16, "model.depth": 1, "model.heads": 2, "model.mlp": 16, "model.image-size": 8,
    "model.patch-size": 4, "optim.epochs": 1, "optim.warmup-epochs": 0, "data.batch-size": 4, "data.workers": 0,
}  # fmt: skip


@pytest.mark.thorough
def test_a_run_in_one_call(tmp_path: Path) -> None:
    from beit_jax import train

    for split in ("train", "val"):
        for name, value in (("dark", 30), ("light", 220)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (8, 8), value + i).save(tmp_path / "images" / split / name / f"{i}.png")
    train.prepare("folder", str(tmp_path / "images"), str(tmp_path / "data"))
    done = train.run("digits_finetune", str(tmp_path / "data"), str(tmp_path / "run"), options=SMALL, quiet=True)
    assert (done.step, done.steps) == (2, 2) and (tmp_path / "run/model").is_dir() and "accuracy" in done.scores
    model, processor = beit_jax.from_pretrained(tmp_path / "run/model")
    assert model.config.labels == ("dark", "light") and model.config.hidden_size == 16
    again = train.run("digits_finetune", tmp_path / "data", tmp_path / "run", options=SMALL, quiet=True, resume="must")
    assert again.scores == done.scores
    scores = train.evaluate(model, processor, str(tmp_path / "data"), workers=0)
    assert scores.count == 8 and scores.top1 == pytest.approx(done.scores["accuracy"], abs=1e-6)


def test_options_of_a_recipe() -> None:
    from beit_jax import train

    changed = train.recipe_with("digits_finetune", {"--optim.lr": 1, "model.drop_path": 0.2, "run.mesh": [1, 1, 1]})
    assert (changed.optim.lr, changed.model.drop_path, changed.run.mesh) == (1, 0.2, (1, 1, 1))
    assert train.recipe_with(changed, {"optim.lr": 1e-3}).model.drop_path == 0.2
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"optim.learning-rate": 1e-3}, "--optim.learning-rate: no option of digits_finetune; the nearest is optim"),
        ({"optim.lr": "fast"}, "--optim.lr: expected float, found fast"),
        ({"optim.lr": True}, "--optim.lr: expected float, found True"),
        ({"optim.lr": -1.0}, "--optim.lr: expected"),
        ({"run.mesh": (1, 1)}, "--run.mesh: expected 3 values"),
        ({"data.batch-size": 4.0}, "--data.batch-size: expected int"),
    ]
    for options, said in wrong:
        with pytest.raises(BeitJaxError, match=said) as caught:
            train.recipe_with("digits_finetune", options)
        assert str(caught.value).isprintable()
    with pytest.raises(BeitJaxError, match="digits_finetune"):
        train.recipe_with("digits_finetun", {})


def test_the_faces_have_what_they_list() -> None:
    from beit_jax import train

    for face in (beit_jax, convert, train):
        for name in face.__all__:
            with warnings.catch_warnings():
                assert callable(getattr(face, name)) or name in ("RECIPES", "VARIANTS"), name
        with pytest.raises(AttributeError, match="nothing"):
            getattr(face, "nothing")  # noqa: B009
