"""What parity compares with: transformers with the file's own tensors, or one line that says why there is nothing.

A reference that is drawn at random, or that holds other tensors than the file, would make every verdict worthless.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import original
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from beit_jax.cli.main import main
from beit_jax.convert import parity
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve

OPTIONS = reference.TINY | reference.BIAS["per_layer"] | {"num_labels": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A classifier as transformers saves it."""
    return reference.save(reference.random_model(**OPTIONS), tmp_path / "saved")


# Files that transformers' model has a place for, whatever from_pretrained would find. ---------------------------------


def renamed(directory: Path) -> Path:
    return (directory / "model.safetensors").rename(directory / "weights.safetensors")


def beside_another(directory: Path) -> Path:
    """The file that is named, and not the one that `from_pretrained` finds in its directory."""
    tensors = load_file(directory / "model.safetensors")
    path = renamed(directory)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, directory / "model.safetensors")
    return path


def half(directory: Path) -> Path:
    tensors = load_file(directory / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def as_in_memory(directory: Path) -> Path:
    """accelerate's state: the names that transformers 5 has in memory."""
    model = reference.random_model(**OPTIONS)
    save_file(model.state_dict(), directory / "model.safetensors")
    return directory


def pickled(directory: Path) -> Path:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save({"model": tensors}, directory / "best.pth")
    return directory / "best.pth"


def with_indices(directory: Path) -> Path:
    """Files of transformers 4 hold the index of the table, which is computed."""
    tensors = load_file(directory / "model.safetensors")
    index = "attention.attention.relative_position_bias.relative_position_index"
    tensors |= {f"beit.encoder.layer.{i}.{index}": torch.zeros(17, 17, dtype=torch.int64) for i in range(2)}
    save_file(tensors, directory / "model.safetensors")
    return directory


READ = [renamed, beside_another, half, as_in_memory, pickled, with_indices]


@pytest.mark.parametrize("change", READ, ids=lambda change: change.__name__)
def test_the_reference_has_the_tensors_of_the_file(change: Callable[[Path], Path], saved: Path) -> None:
    found = parity.compare(resolve(change(saved)))
    assert len(found.stages) > 4 and all(stage.passed for stage in found.stages)
    assert found.notes == ()


# Files that it has no place for. --------------------------------------------------------------------------------------


def timm(directory: Path) -> Path:
    save_file(original.original_names(load_file(directory / "model.safetensors")), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"architecture": "beit_base_patch16_224"}))
    return directory


def unilm(directory: Path) -> Path:
    torch.save({"model": original.original_names(load_file(directory / "model.safetensors"))}, directory / "beit.pth")
    (directory / "model.safetensors").unlink()
    return directory / "beit.pth"


def unilm_alone(directory: Path) -> Path:
    (directory / "config.json").unlink()
    return unilm(directory)


def flax(directory: Path) -> Path:
    original.save_msgpack(load_file(directory / "model.safetensors"), directory / "flax_model.msgpack")
    (directory / "model.safetensors").unlink()
    return directory


def hosted(directory: Path) -> Path:
    names = load_file(directory / "model.safetensors").items()
    encoder = {n.replace("beit.", "backbone.", 1): t for n, t in names if "beit." in n and "pooler" not in n}
    save_file(encoder | {"head.weight": torch.zeros(2)}, directory / "model.safetensors")
    backbone = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "dpt", "backbone_config": backbone}))
    return directory


UNREAD = [timm, unilm, unilm_alone, flax, hosted]


@pytest.mark.parametrize("change", UNREAD, ids=lambda change: change.__name__)
def test_what_transformers_does_not_read_is_refused_with_a_way_that_works(
    change: Callable[[Path], Path], saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(change(saved))
    assert main(["parity", source]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "convert SOURCE NATIVE, export NATIVE DIRECTORY, then parity DIRECTORY" in captured.err
    native, exported = str(tmp_path / "native"), str(tmp_path / "exported")
    assert main(["convert", source, native]) == 0
    assert main(["export", native, exported]) == 0
    assert main(["parity", exported]) == 0
    assert "all stages agree" in capsys.readouterr().out


def test_a_configuration_that_transformers_refuses_is_one_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(content: object) -> object:
        raise TypeError("of\nmany lines")

    monkeypatch.setattr(transformers.BeitConfig, "from_dict", refuse)
    with pytest.raises(BeitJaxError, match=r"config.json: transformers refuses it \(TypeError: of many lines\)"):
        parity.check(resolve(saved))


def test_transformers_order_of_oblong_grids_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It reads their biases with height and width exchanged: convert, parity and export say it."""
    source = str(reference.save(reference.random_model(**OPTIONS | {"image_size": [16, 40]}), tmp_path / "wide"))
    native = str(tmp_path / "native")
    for code, command in (
        (0, ["convert", source, native]), (1, ["parity", source]), (0, ["export", native, str(tmp_path / "out")])
    ):  # fmt: skip
        assert main(command) == code
        assert "height and width exchanged" in capsys.readouterr().out, command


@pytest.mark.parametrize("option", [["--batch", "0"], ["--batch", "-1"], ["--seed", "-1"]])
def test_numbers_that_compare_nothing(option: list[str], saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(saved), *option]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and option[0] in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": [16, 40], "use_absolute_position_embeddings": True},
        {"quantization_config": {"load_in_8bit": True}},
    ],
)
def test_what_transformers_cannot_run_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    options = reference.TINY | {"num_labels": 3} | {k: v for k, v in changes.items() if k != "quantization_config"}
    directory = reference.save(reference.random_model(**options), tmp_path / "saved")
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(BeitJaxError, match="transformers refuses it"):
        parity.compare(resolve(directory))


# What from_pretrained makes of a file. --------------------------------------------------------------------------------

CONVERTING = (Path(__file__).parents[2] / "docs" / "converting.md").read_text(encoding="utf-8")
NORMS = ["beit.layernorm.bias", "beit.layernorm.weight", "layernorm.bias", "layernorm.weight"]


@pytest.mark.parametrize("mean", [False, True], ids=["class token", "mean"])
def test_tensors_that_from_pretrained_exchanges_are_named(
    mean: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The comparison is with the file's values; the note says what others get who load the same file."""
    options = reference.TINY | {"use_mask_token": True, "use_mean_pooling": mean}
    theirs = reference.random_model(task="masked_image_modeling", **options)
    directory = reference.save(theirs, tmp_path / "masked")
    state = theirs.state_dict()
    loaded = type(theirs).from_pretrained(directory).state_dict()
    exchanged = sorted(name for name in state if not torch.equal(state[name], loaded[name]))
    assert exchanged in ([], [] if mean else NORMS)  # a later transformers may do it right

    found = parity.compare(resolve(directory))
    assert all(stage.passed for stage in found.stages)
    assert [all(name in note for name in exchanged) for note in found.notes] == ([True] if exchanged else [])

    capsys.readouterr()
    assert main(["parity", str(directory)]) == 0
    assert ("from_pretrained" in capsys.readouterr().out) == bool(exchanged)
    assert main(["parity", str(directory), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)
    assert all(("notes" in stage) == bool(exchanged) for stage in stages)

    native, exported = str(tmp_path / "native"), str(tmp_path / "exported")
    assert main(["convert", str(directory), native]) == 0
    capsys.readouterr()
    assert main(["export", native, exported]) == 0
    assert ("exchanges" in capsys.readouterr().out) == (not mean)

    [snippet] = [block for block in CONVERTING.split("```python\n") if "load_state_dict" in block]
    found_names: dict[str, Any] = {}
    exec(snippet.partition("```")[0].replace("DIRECTORY", exported), found_names)
    right = found_names["model"].state_dict()
    assert right.keys() == state.keys() and all(torch.equal(right[name], state[name]) for name in state)
