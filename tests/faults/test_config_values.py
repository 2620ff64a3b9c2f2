"""Values in config.json and preprocessor_config.json that no model has, and configurations of another model.

A row is a change of the digits, which are read from a native checkpoint and in Hugging Face's format.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from beit_jax import weights
from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.convert.formats.config_notes import hf_notes
from beit_jax.errors import BeitJaxError
from beit_jax.inference.predict import from_pretrained
from beit_jax.inference.segmentation import segment
from beit_jax.models.build import MODELS
from tests.support.segmenter import save_segmenter

DIGITS = Path(str(files("beit_jax") / "digits"))
IMAGE = next(iter(sorted((DIGITS / "images").iterdir())))
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
SECONDS = 5.0  # no refusal takes longer


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("native") / "digits"
    assert main(["convert", str(DIGITS), str(directory)]) == 0
    return directory


@pytest.fixture
def changed(native: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the digits, native or "hf", whose JSON file holds other values."""

    def make(kind: str, values: dict[str, Any], file: str = CONFIG) -> Path:
        source = tmp_path / "changed"
        shutil.copytree(native if kind == "native" else DIGITS, source)
        content = json.loads((source / file).read_text()) | values
        (source / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return source

    return make


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *needles: str) -> str:
    capsys.readouterr()
    start = time.monotonic()
    assert main(arguments) == 2
    assert time.monotonic() - start < SECONDS
    captured = capsys.readouterr()
    message = captured.err.removeprefix("error: ").removesuffix("\n")
    assert captured.out == "" and captured.err == f"error: {message}\n"
    assert message.isprintable() and len(message) < 1500, message
    for needle in needles:
        assert needle in message
    return message


# --- A native checkpoint's config.json and the header of its tensors -------------------------------------------------

OTHER_MODELS: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_hidden_layers": 3}, ["num_hidden_layers", "beit/blocks/", "[3,", "[4,"]),
    ({"num_hidden_layers": 5}, ["num_hidden_layers", "beit/blocks/"]),
    ({"num_attention_heads": 2}, ["num_attention_heads", "attention/"]),
    ({"hidden_size": 128}, ["hidden_size", "128", "64"]),
    ({"intermediate_size": 128}, ["intermediate_size", "mlp/fc1"]),
    ({"image_size": 64}, ["image_size", "bias_table"]),
    ({"patch_size": 8}, ["patch_size", "embeddings/patch_kernel"]),
    ({"image_size": 64, "patch_size": 8}, ["patch_size", "embeddings/patch_kernel"]),
    ({"num_channels": 1}, ["num_channels", "embeddings/patch_kernel"]),
    ({"id2label": {"0": "no", "1": "yes"}}, ["id2label", "classifier/", "[2]", "[10]"]),
    ({"use_relative_position_bias": False}, ["use_relative_position_bias", "bias_table", "no tensor"]),
    ({"use_shared_relative_position_bias": True}, ["use_shared_relative_position_bias", "shared_bias_table"]),
    ({"use_absolute_position_embeddings": True}, ["use_absolute_position_embeddings", "position_embeddings"]),
    ({"use_mask_token": True}, ["use_mask_token", "mask_token"]),
    ({"layer_scale_init_value": 0.0}, ["layer_scale_init_value", "gamma_1"]),
    ({"use_mean_pooling": False}, ["use_mean_pooling", "norm/"]),
    ({"architectures": ["BeitModel"]}, ["architectures"]),
    ({"architectures": ["BeitForMaskedImageModeling"]}, ["architectures"]),
]


@pytest.mark.parametrize(("values", "needles"), OTHER_MODELS, ids=[json.dumps(values) for values, _ in OTHER_MODELS])
@pytest.mark.parametrize("command", ["inspect", "classify", "export"])
def test_a_native_configuration_of_another_model(
    changed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str,
    values: dict[str, Any], needles: list[str],
) -> None:  # fmt: skip
    source = changed("native", values)
    rest = {"inspect": [], "classify": [str(IMAGE)], "export": [str(tmp_path / "out")]}[command]
    refused([command, str(source), *rest], capsys, str(source / CONFIG), weights.WEIGHTS, *needles)
    assert not (tmp_path / "out").exists()


def test_what_may_differ_is_not_refused(changed: Callable[..., Path]) -> None:
    values = {"id2label": {str(i): f"digit {i}" for i in range(10)}, "drop_path_rate": 0.3, "layer_norm_eps": 1e-6}
    found = weights.load(changed("native", values)).config
    assert (found.labels[3], found.drop_path_rate, found.layer_norm_eps) == ("digit 3", 0.3, 1e-6)


# --- Values that no model has ----------------------------------------------------------------------------------------

HUGE = [10**7, 10**18, 10**30, 10**400]
SIZES = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "image_size",
         "patch_size"]  # fmt: skip


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize("value", HUGE, ids=["1e7", "1e18", "1e30", "1e400"])
@pytest.mark.parametrize("key", SIZES)
def test_giant_sizes(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str], key: str, value: int, kind: str
) -> None:
    source = changed(kind, {key: value})
    found = "heads" if key == "num_attention_heads" and value == 10**7 else key
    refused(["inspect", str(source)], capsys, str(source), CONFIG, found)


BAD_VALUES: list[tuple[dict[str, Any], list[str]]] = [
    ({"layer_norm_eps": 10**400}, ["layer_norm_eps", "a float can hold"]),
    ({"layer_norm_eps": float("nan")}, ["layer_norm_eps", "finite"]),
    ({"layer_norm_eps": 10**18}, ["layer_norm_eps", "at most 1"]),
    ({"drop_path_rate": 10**400}, ["drop_path_rate"]),
    ({"initializer_range": float("inf")}, ["initializer_range", "finite"]),
    ({"image_size": [32, 10**30]}, ["image_size"]),
    ({"image_size": [32, 32, 32]}, ["image_size", "[height, width]"]),
    ({"hidden_size": -64}, ["hidden_size", "positive"]),
    ({"num_hidden_layers": 4.0}, ["num_hidden_layers", "an integer"]),
    ({"hidden_act": ["gelu"]}, ["hidden_act"]),
    ({"model_type": {"a": 1}}, ["model_type"]),
    ({"architectures": {"a": 1}}, ["architectures"]),
    ({"architectures": [{"a": 1}]}, ["architectures"]),
    ({"problem_type": "detection"}, ["problem_type", "regression"]),
    ({"id2label": {"a": "b"}}, ["id2label", "numbers as keys", "found a"]),
    ({"id2label": {"-1": "b"}}, ["id2label", "numbers as keys"]),
    ({"id2label": {"1": "a", "01": "b"}}, ["id2label", "twice"]),
    ({"id2label": {"9" * 30: "b"}}, ["id2label", "numbers as keys"]),
    ({"id2label": {str(i): {"name": i} for i in range(10)}}, ["id2label", "text as the name"]),
    ({"id2label": {str(i): [i] for i in range(10)}}, ["id2label", "text as the name"]),
    ({"id2label": {str(i): True for i in range(10)}}, ["id2label", "text as the name"]),
    ({"id2label": ["a", "b"]}, ["id2label", "an object"]),
    ({"id2label": None, "num_labels": 10**9}, ["num_labels", "1000000"]),
    ({"id2label": None, "num_labels": -1}, ["num_labels"]),
]


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize(("values", "needles"), BAD_VALUES, ids=[str(values)[:60] for values, _ in BAD_VALUES])
def test_values_that_no_model_has(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str], values: dict[str, Any], needles: list[str],
    kind: str,
) -> None:  # fmt: skip
    source = changed(kind, values)
    refused(["inspect", str(source)], capsys, str(source / CONFIG), *needles)


@pytest.mark.parametrize("architecture", ["BeitBackbone", "BeitForSemanticSegmentation"])
@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize("names", [None, ["stage1"], ["stage" + "9" * 400], [{"a": 1}], ["stem", 3]])
def test_ten_million_layers_are_not_counted(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str], architecture: str, kind: str, names: Any
) -> None:
    values = {"architectures": [architecture], "num_hidden_layers": 10**7, "out_features": names}
    refused(["inspect", str(changed(kind, values))], capsys, CONFIG)


@pytest.mark.parametrize("kind", ["native", "hf"])
@pytest.mark.parametrize("name", [CONFIG, PROCESSOR])
@pytest.mark.parametrize("what", ["FIFO", "folder", "/dev/zero", "/dev/full", "loop"])
def test_what_is_no_file(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str, what: str, kind: str
) -> None:
    source = changed(kind, {})
    (source / name).unlink()
    if what == "FIFO":
        os.mkfifo(source / name)
    elif what == "folder":
        (source / name).mkdir()
    else:
        (source / name).symlink_to(name if what == "loop" else what)
    refused(["classify", str(source), str(IMAGE)], capsys, name)


def test_numbers_as_names_are_text(changed: Callable[..., Path]) -> None:
    """Data sets whose classes are numbers are saved so."""
    source = changed("hf", {"id2label": {str(i): i * 10 for i in range(10)}})
    assert BeitConfig.from_file(source / CONFIG).labels == tuple(str(i * 10) for i in range(10))


@pytest.mark.parametrize(
    "values",
    [
        {"auxiliary_channels": 256, "auxiliary_num_convs": 10**6},
        {"auxiliary_channels": 0, "auxiliary_num_convs": 0},
        {"vocab_size": 0},
        {"vocab_size": 10**6},
    ],
)
def test_the_sizes_of_an_absent_part_bound_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    source = save_segmenter(tmp_path / "segmenter", ("no", "yes"), use_auxiliary_head=False)
    content = json.loads((source / CONFIG).read_text()) | values
    (source / CONFIG).write_text(json.dumps(content))
    found = from_pretrained(source)
    assert segment(*found, IMAGE).shape == (8, 8)


# --- Label maps with gaps --------------------------------------------------------------------------------------------

MAPS = [
    ({str(i + 1): f"n{i}" for i in range(10)}, "from 1 to 10"),
    ({str(i + (i > 4) + (i > 7)): f"n{i}" for i in range(10)}, "from 0 to 11, without 5, 9"),
    ({str(i): f"n{i}" for i in reversed(range(10))}, None),
    ({str(i * 1000): f"n{i}" for i in range(10)}, "from 0 to 9000, without 1, 2, 3, 4, 5, ..."),
]


@pytest.mark.parametrize(("names", "note"), MAPS, ids=["1-based", "gaps", "reversed", "sparse"])
def test_names_are_read_in_the_order_of_their_keys(
    changed: Callable[..., Path], tmp_path: Path, names: dict[str, str], note: str | None
) -> None:
    source = changed("hf", {"id2label": names, "label2id": None})
    notes = hf_notes(json.loads((source / CONFIG).read_text()))
    assert [each for each in notes if "id2label" in each] == ([] if note is None else [next(iter(notes))])
    assert note is None or note in notes[0]
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert weights.load(tmp_path / "out").config.labels == tuple(f"n{i}" for i in range(10))


# --- Words -----------------------------------------------------------------------------------------------------------

WORDS = [
    ("position_bias", "per-layer", "per_layer"),
    ("position_bias", "Shared", "shared"),
    ("position_bias", "perlayer", "per_layer"),
    ("pooling", "CLS", "cls"),
    ("pooling", "avg", "mean"),
    ("hidden_act", "swish", "silu"),
    ("hidden_act", "GELU", "gelu"),
    ("model_type", "data2vec_vision", "data2vec-vision"),
    ("model_type", "data2vec", "data2vec-vision"),
    ("task", "classification", "image_classification"),
    ("task", "image-classification", "image_classification"),
    ("position_resize", "bilinar", "bilinear"),
    ("feature_taps", "HF", "hf"),
    ("problem_type", "multi_label", "multi_label_classification"),
]


@pytest.mark.parametrize(("name", "word", "right"), WORDS, ids=[f"{name} {word}" for name, word, _ in WORDS])
def test_a_wrong_word_names_the_right_one(name: str, word: str, right: str) -> None:
    with pytest.raises(BeitJaxError, match=rf"{name}: expected .*, found {word}; did you mean {right}\?") as caught:
        BeitConfig(**{name: word})
    assert str(caught.value).isprintable()


WRONG_TYPES = [
    ("pooling", None), ("task", 3), ("hidden_size", 64.5), ("hidden_size", "64"), ("hidden_size", True),
    ("layer_norm_eps", "1e-6"), ("layer_norm_eps", float("nan")), ("drop_path_rate", None), ("use_mask_token", 1),
    ("image_size", (224,)), ("image_size", "224"), ("image_size", 224.0), ("labels", "cat"), ("labels", (1, 2)),
    ("out_indices", 3), ("pool_scales", (1, 2.5)), ("num_hidden_layers", 10**18),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=[f"{name} {value!r}" for name, value in WRONG_TYPES])
def test_a_value_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(BeitJaxError, match=f"{name}: expected "):
        BeitConfig(**{name: value})


def test_values_that_mean_the_same_are_accepted() -> None:
    config = BeitConfig(
        image_size=32, patch_size=np.int64(4), hidden_size=np.int32(64), num_attention_heads=4, labels=["a", "b"],
        layer_norm_eps=0, task="semantic_segmentation", out_indices=[0, 1, 2, 3], pool_scales=[1, 2],
    )  # type: ignore[arg-type]  # fmt: skip
    assert (config.image_size, config.patch_size, config.grid) == ((32, 32), (4, 4), (8, 8))
    assert (config.labels, config.out_indices, config.pool_scales) == (("a", "b"), (0, 1, 2, 3), (1, 2))
    assert type(config.layer_norm_eps) is float and type(config.hidden_size) is int
    assert hash(config) == hash(replace(config)) and BeitConfig.from_hf(config.to_hf()) == config
    assert BeitConfig.from_hf({"model_type": "beit", "hidden_act": "swish"}).hidden_act == "silu"


@pytest.mark.parametrize("task", [task for task in MODELS if task != "features"])
@pytest.mark.parametrize("other", list(MODELS))
def test_the_class_of_a_head_takes_no_other_task(task: Any, other: Any) -> None:
    """Without arrays."""
    if task == other:
        return
    tiny = BeitConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=4, num_attention_heads=2)
    config = replace(tiny, task=other, labels=("a",), out_indices=(0, 1, 2, 3))
    with pytest.raises(BeitJaxError, match=f"task: expected {task} for this class, found {other}"):
        nnx.eval_shape(lambda: MODELS[task](config, rngs=nnx.Rngs(0)))


# --- preprocessor_config.json ----------------------------------------------------------------------------------------

UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, "4 channels, the model takes 3"),
    ({"image_mean": [0.5], "image_std": [0.5]}, "1 channels, the model takes 3"),
    ({"image_mean": [0.5, 0.5]}, "std is (0.5, 0.5, 0.5), expected 2 positives"),
    ({"size": {"height": 30, "width": 30}}, "30x30 are not multiples of the model's patch 4x4, as 32x32 would be"),
    ({"size": {"height": 10**18, "width": 32}}, "at most"),
    ({"size": "large"}, "size"),
    ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type"),
    ({"image_mean": 10**400}, "image_mean"),
    ({"rescale_factor": {}}, "rescale_factor"),
    ({"do_resize": "yes"}, "do_resize"),
]


@pytest.mark.parametrize(("values", "found"), UNUSABLE, ids=[str(values)[:50] for values, _ in UNUSABLE])
def test_images_that_cannot_be_prepared(
    changed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], found: str
) -> None:
    """`inspect` needs no image; `convert` names the way out, which leads out."""
    source, out = changed("hf", values, PROCESSOR), tmp_path / "out"
    assert main(["inspect", str(source)]) == 0
    assert found in capsys.readouterr().out
    refused(["convert", str(source), str(out)], capsys, str(source / PROCESSOR), found, "--image-preset hf")
    assert not out.exists()
    assert main(["convert", str(source), str(out), "--image-preset", "hf"]) == 0
    assert main(["classify", str(out), str(IMAGE), "--top", "1"]) == 0
    assert "two" in capsys.readouterr().out


def test_a_model_of_one_channel_needs_no_file(changed: Callable[..., Path], tmp_path: Path) -> None:
    source = changed("hf", {"num_channels": 1})
    (source / PROCESSOR).unlink()
    tensors = load_file(source / "model.safetensors")
    name = "beit.embeddings.patch_embeddings.projection.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :1])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert main(["inspect", str(source)]) == 0
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    processor = weights.load(tmp_path / "out").processor
    assert (processor.num_channels, processor.mean, processor.resize) == (1, (0.5,), (32, 32))
    assert main(["classify", str(tmp_path / "out"), str(IMAGE)]) == 0


def test_images_of_another_size_are_noted(changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    source = changed("hf", {"size": {"height": 64, "width": 64}}, PROCESSOR)
    assert main(["inspect", str(source)]) == 0
    assert "prepared as 64x64, the model is of 32x32" in capsys.readouterr().out


def test_every_field_of_closed_words_is_in_the_table() -> None:
    words = {field.name for field in fields(BeitConfig) if isinstance(field.default, str)}
    assert words <= {name for name, *_ in WORDS}


@pytest.mark.parametrize("command", ["classify", "export", "inspect"])
@pytest.mark.parametrize("what", ["FIFO", "folder", "nothing"])
def test_weights_that_are_no_file(
    changed: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, what: str, command: str
) -> None:
    weights = changed("native", {}) / "flax_model.safetensors"
    weights.unlink()
    make = {"FIFO": os.mkfifo, "folder": os.mkdir, "nothing": lambda path: os.symlink("/nowhere", path)}
    make[what](weights)
    more = {"classify": [str(IMAGE)], "export": [str(tmp_path / "out")], "inspect": []}
    refused([command, str(weights.parent), *more[command]], capsys, str(weights), "expected a regular file", "convert")
