"""Every form of a Hugging Face directory gives the same parameters; errors name the tensors that do not fit."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from safetensors.numpy import save_file

from beit_jax import weights
from beit_jax.cli.inspection import inspect
from beit_jax.convert import Options, convert, load, plan
from beit_jax.errors import BeitJaxError
from beit_jax.hub import Source, resolve

Tensors = dict[str, np.ndarray]
OPTIONS = reference.TINY | reference.BIAS["both"] | {"num_labels": 5}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as transformers saves it."""
    return reference.save(reference.random_model(**OPTIONS), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def expected(source: Path) -> Tensors:
    return load(resolve(source)).params


def read(directory: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")


@pytest.fixture
def variation(source: Path, tmp_path: Path) -> Callable[..., Source]:
    """The same model with other tensors or another configuration."""

    def make(tensors: Tensors | None = None, **config: object) -> Source:
        directory = tmp_path / "variation"
        directory.mkdir()
        written = json.loads((source / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v != "absent"}))
        save_file(tensors or read(source), directory / "model.safetensors")
        return resolve(directory)

    return make


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name]), name


def test_convert_and_load_agree(source: Path, expected: Tensors, tmp_path: Path) -> None:
    done = convert(resolve(source), tmp_path / "native")
    checkpoint = weights.load(tmp_path / "native")
    assert_same(checkpoint.params, expected)
    assert checkpoint.config == done.config
    assert checkpoint.provenance["source"] == str(source) and checkpoint.provenance["naming"] == "transformers"
    assert sorted(path.name for path in (tmp_path / "native").iterdir()) == [
        "config.json", "flax_model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip


def test_names_of_transformers_5_in_memory(expected: Tensors, variation: Callable[..., Source]) -> None:
    model = reference.random_model(**OPTIONS)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert "beit.layers.0.attention.q_proj.weight" in tensors
    found = plan(variation(tensors))
    assert found.naming.name == "transformers 5 in memory"
    assert_same(load(found.source).params, expected)


def test_without_prefix(expected: Tensors, source: Path, variation: Callable[..., Source]) -> None:
    tensors = {name.removeprefix("beit."): tensor for name, tensor in read(source).items()}
    assert_same(load(variation(tensors)).params, expected)


def test_stored_indices_are_dropped_whatever_they_hold(
    expected: Tensors, source: Path, variation: Callable[..., Source]
) -> None:
    index = "relative_position_bias.relative_position_index"
    names = [f"beit.encoder.layer.{i}.attention.attention.{index}" for i in range(2)] + [f"beit.encoder.{index}"]
    wrong = np.full((17, 17), 3, np.int64)  # as averaged weights leave them
    decided = plan(variation(read(source) | dict.fromkeys(names, wrong)))
    assert decided.dropped == tuple(sorted(names))
    assert_same(load(decided.source).params, expected)


def test_sharded_index(expected: Tensors, source: Path, tmp_path: Path) -> None:
    model = type(reference.random_model(**OPTIONS)).from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded/model.safetensors.index.json").exists()
    decided = plan(resolve(tmp_path / "sharded"))
    assert len(decided.checkpoint.files) > 2
    assert_same(load(decided.source).params, expected)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_pytorch_model_bin(expected: Tensors, source: Path, tmp_path: Path, legacy: bool) -> None:
    state = {name: torch.from_numpy(tensor) for name, tensor in read(source).items()}
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_same(load(resolve(tmp_path)).params, expected)


def test_one_weight_file_beside_its_configuration(expected: Tensors, source: Path) -> None:
    assert_same(load(resolve(source / "model.safetensors")).params, expected)


@pytest.mark.parametrize(
    ("dtype", "kept", "note"),
    [
        (np.float16, np.float32, "tensors float16 widened to float32"),
        (np.float64, np.float32, "tensors float64 rounded to float32"),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16, "tensors kept bfloat16"),
    ],
)
def test_other_dtypes(source: Path, variation: Callable[..., Source], dtype: type, kept: type, note: str) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in read(source).items()}
    decided = plan(variation(tensors))
    assert any(note in line for line in decided.notes)
    params = load(decided.source).params
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(kept)}
    kernel = tensors["beit.encoder.layer.1.intermediate.dense.weight"].astype(kept).T
    assert np.array_equal(params["beit/blocks/mlp/fc1/kernel"][1], kernel)


def test_mixed_dtypes_of_one_leaf_become_float32(source: Path, variation: Callable[..., Source]) -> None:
    tensors = read(source)
    name = "beit.encoder.layer.0.intermediate.dense.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    leaf = load(variation(tensors)).params["beit/blocks/mlp/fc1/kernel"]
    assert leaf.dtype == np.float32 and np.array_equal(leaf[0], tensors[name].astype(np.float32).T)


@pytest.mark.parametrize(
    ("task", "name"), [("image_classification", "classifier"), ("masked_image_modeling", "lm_head")]
)
def test_head_is_read_from_the_names_when_the_configuration_does_not_say(tmp_path: Path, task: str, name: str) -> None:
    directory = reference.save(reference.random_model(task=task, **OPTIONS), tmp_path / "source")
    config = json.loads((directory / "config.json").read_text())
    del config["architectures"]
    (directory / "config.json").write_text(json.dumps(config))
    assert f"{name}/kernel" in load(resolve(directory)).params


@pytest.mark.parametrize("pooling_layer", [True, False])
def test_bare_encoder_with_and_without_its_pooling_layer(tmp_path: Path, pooling_layer: bool) -> None:
    import transformers

    kind = transformers.BeitModel
    model = kind(kind.config_class(**reference.TINY), add_pooling_layer=pooling_layer)
    model.save_pretrained(tmp_path)
    assert plan(resolve(tmp_path)).config.add_pooling_layer is pooling_layer


def test_missing_preprocessor_is_told(source: Path, variation: Callable[..., Source]) -> None:
    decided = plan(variation())
    assert any("preprocessor_config.json: no such file; images will be prepared" in note for note in decided.notes)
    assert decided.processor.describe() == "resize 32x32 bilinear, /255, mean 0.5 std 0.5"


def rejected(source: Source) -> str:
    with pytest.raises(BeitJaxError) as error:
        plan(source)
    message = str(error.value)
    assert "\n" not in message and str(source.path) in message
    return message


QUERY = "beit.encoder.layer.1.attention.attention.query.weight"
TABLE = "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table"


def test_missing_tensor(source: Path, variation: Callable[..., Source]) -> None:
    tensors = read(source)
    del tensors[QUERY]
    assert f"1 tensor missing: {QUERY}. " in rejected(variation(tensors))


def test_unexpected_tensor(source: Path, variation: Callable[..., Source]) -> None:
    message = rejected(variation(read(source) | {"beit.\x1b[31mextra": np.zeros(1, np.float32)}))
    assert r"1 tensor unexpected: beit.\x1b[31mextra. " in message


def test_many_problems_are_counted_and_cut(source: Path, variation: Callable[..., Source]) -> None:
    tensors = {name: tensor for name, tensor in read(source).items() if "bias" not in name or "table" in name}
    message = rejected(variation(tensors))
    missing = len(read(source)) - len(tensors)
    assert f"{missing} tensors missing: " in message and f" and {missing - 10} more" in message


def test_integer_tensor(source: Path, variation: Callable[..., Source]) -> None:
    tensors = read(source)
    tensors[QUERY] = tensors[QUERY].astype(np.int64)
    assert f"1 tensor not floating point: {QUERY} is int64" in rejected(variation(tensors))


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"num_attention_heads": 8}, "The file has 4 attention heads, num_attention_heads says 8"),
        ({"num_hidden_layers": 3}, "The file has 2 layers, num_hidden_layers says 3"),
        ({"num_hidden_layers": 1}, "The file has 2 layers, num_hidden_layers says 1"),
        ({"image_size": 64}, "The table is of a 4 x 4 grid, image_size and patch_size say (8, 8)"),
        ({"id2label": {"0": "a"}, "label2id": {"a": 0}}, "The file has 5 classes, id2label has 1"),
        ({"intermediate_size": 64}, "config.json, or use the weights it belongs to"),
    ],
)
def test_likely_cause_is_named(config: dict[str, object], advice: str, variation: Callable[..., Source]) -> None:
    assert advice in rejected(variation(**config))


def test_absolute_positions_of_another_size(tmp_path: Path) -> None:
    options = reference.TINY | {"use_absolute_position_embeddings": True}
    directory = reference.save(reference.random_model(**options), tmp_path / "source")
    config = json.loads((directory / "config.json").read_text()) | {"image_size": 64}
    (directory / "config.json").write_text(json.dumps(config))
    assert "The file has 16 positions, image_size and patch_size say 64" in rejected(resolve(directory))


def test_sha256_is_recorded_when_asked(source: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    convert(resolve(source), tmp_path / "native", Options(sha256=True))
    provenance = weights.load(tmp_path / "native").provenance
    assert provenance["files"] == {"model.safetensors": digest} and provenance["options"] == {"sha256": True}
    lines = "\n".join(inspect(resolve(tmp_path / "native")).lines)
    assert digest in lines and f"{source} by beit-jax" in lines and "options      sha256 True" in lines


def test_expected_sha256(source: Path, tmp_path: Path) -> None:
    """Only a digest can show a flipped bit in a value."""
    content = bytearray((source / "model.safetensors").read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(content)
    assert load(resolve(tmp_path), Options(expect_sha256=digest[:8].upper())).provenance["files"] == {
        "model.safetensors": digest
    }
    content[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    load(resolve(tmp_path))
    with pytest.raises(
        BeitJaxError, match=rf"model\.safetensors: sha256 {digest} expected, [0-9a-f]{{64}} found; download"
    ):
        load(resolve(tmp_path), Options(expect_sha256=digest))


def test_format_is_chosen_where_there_are_several(source: Path, expected: Tensors, tmp_path: Path) -> None:
    state = {name: torch.from_numpy(tensor) + 1 for name, tensor in read(source).items()}
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert any("pytorch_model.bin ignored" in note for note in plan(resolve(tmp_path)).notes)
    assert_same(load(resolve(tmp_path)).params, expected)
    other = load(resolve(tmp_path), Options(format="pytorch"))
    assert np.array_equal(other.params["classifier/bias"], expected["classifier/bias"] + 1)
    with pytest.raises(
        BeitJaxError,
        match=r"holds no weights: expected one of flax_model\.msgpack, flax_model\.msgpack\.index\.json; found",
    ):
        plan(resolve(tmp_path), Options(format="flax"))
