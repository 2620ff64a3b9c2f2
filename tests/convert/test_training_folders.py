"""What trainings leave behind: Lightning's files, accelerate's and the Trainer's folders, distributed checkpoints."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit_jax.cli.main import main
from beit_jax.convert import Options, load, plan
from beit_jax.convert.options import DEFAULT
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve

FOREIGN = Path(__file__).parent / "foreign"
CONFIG = FOREIGN / "accelerate/config.json"


class Runs:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._sentinel}",)


def refused(source: Path, *needles: str, options: Options = DEFAULT) -> str:
    with pytest.raises(BeitJaxError) as caught:
        load(resolve(source), options)
    message = str(caught.value)
    assert message.isprintable() and all(needle in message for needle in needles), message
    return message


# Lightning: objects of other classes beside the weights are left unread. ----------------------------------------------


def lightning(path: Path, **entries: Any) -> Path:
    content = torch.load(FOREIGN / "lightning/last.ckpt", weights_only=True)
    torch.save(content | entries, path)
    return path


@pytest.mark.parametrize("entry", ["hyper_parameters", "callbacks", "datamodule_hyper_parameters"])
def test_what_lies_beside_the_weights_is_left_unread_and_named(entry: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    held = {"net": Settings(), "deep": [{"x": Runs(sentinel)}]}
    path = lightning(tmp_path / "x.ckpt", **{entry: held})
    assert any(f"{entry} of Lightning passed over unread: they ask for" in note and "posix.system" in note
               for note in plan(resolve(path)).notes)  # fmt: skip
    expected = load(resolve(FOREIGN / "lightning/last.ckpt")).params
    found = load(resolve(path)).params
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert not sentinel.exists()


class Settings:
    """A user's own."""

    rate = 1


def test_among_the_weights_and_in_other_files_it_is_refused(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    weights = torch.load(FOREIGN / "lightning/last.ckpt", weights_only=True)["state_dict"]
    within = lightning(tmp_path / "x.ckpt", state_dict=weights | {"net.x": Runs(sentinel)})
    refused(within, "asks to run posix.system", "Nothing was run")
    torch.save({"state_dict": weights, "hyper_parameters": Runs(sentinel)}, tmp_path / "y.pth")
    refused(tmp_path / "y.pth", "asks to run posix.system")
    assert not sentinel.exists()


# accelerate: the configuration is the user's. -------------------------------------------------------------------------


def test_save_state_asks_for_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = FOREIGN / "accelerate/state"
    assert main(["convert", str(state), str(tmp_path / "native")]) == 2
    message = capsys.readouterr().err
    assert "--config FILE" in message and message.count("\n") == 1 and not (tmp_path / "native").exists()
    assert main(["convert", str(state), str(tmp_path / "native"), "--config", str(CONFIG)]) == 0
    recorded = json.loads((tmp_path / "native/config.json").read_text())
    assert recorded["hidden_size"] == 16
    assert plan(resolve(state), Options(config=CONFIG.parent)).config.hidden_size == 16
    refused(state, "no such file", options=Options(config=tmp_path / "none.json"))
    with pytest.raises(BeitJaxError, match="--config and --variant both say"):
        Options(config=CONFIG, variant="beit_base_patch16_224")


def test_images_are_prepared_by_what_lies_beside_the_configuration(tmp_path: Path) -> None:
    shutil.copy(CONFIG, tmp_path / "config.json")
    processor = {
        "do_resize": True,
        "size": {"height": 16, "width": 16},
        "image_mean": [0.1] * 3,
        "image_std": [0.2] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    decided = plan(resolve(FOREIGN / "accelerate/state"), Options(config=tmp_path / "config.json"))
    assert decided.processor.mean == (0.1, 0.1, 0.1)


# The Trainer: which checkpoint. ---------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOREIGN / "trainer", tmp_path / "output"))


def taken(output: Path, checkpoint: str | None) -> str:
    decided = plan(resolve(output), Options(checkpoint=checkpoint))
    decided.checkpoint.close()
    (note,) = [note for note in decided.notes if " taken, " in note]
    assert decided.checkpoint.files[0].parent.name == note.split()[0]
    return note


@pytest.mark.parametrize(
    ("wanted", "note"),
    [
        (None, "checkpoint-2 taken, the latest of 1, 2"),
        ("latest", "checkpoint-2 taken, the latest of 1, 2"),
        ("best", "checkpoint-1 taken, the best of 1, 2"),
        ("1", "checkpoint-1 taken, as asked of 1, 2"),
    ],
)
def test_the_checkpoint_that_is_taken_is_said(wanted: str | None, note: str, output: Path) -> None:
    assert taken(output, wanted).startswith(note)


def test_steps_are_numbers(output: Path) -> None:
    """By their names, checkpoint-10 would stand before checkpoint-2."""
    (output / "checkpoint-1").rename(output / "checkpoint-10")
    assert taken(output, None).startswith("checkpoint-10 taken, the latest of 2, 10")


def test_checkpoints_that_are_not_there(output: Path, tmp_path: Path) -> None:
    refused(output, "--checkpoint 3", "holds the checkpoints 1, 2", options=Options(checkpoint="3"))
    refused(output / "checkpoint-1", "no checkpoint-N", "leave it out", options=Options(checkpoint="best"))
    file = output / "checkpoint-2/trainer_state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"best_model_checkpoint": None}))
    refused(output, "trainer_state.json", "compared no score", options=Options(checkpoint="best"))
    file.unlink()
    refused(output, "trainer_state.json", "no such file", options=Options(checkpoint="best"))
    with pytest.raises(BeitJaxError, match="--checkpoint: expected latest, best or the number of a step, found newest"):
        Options(checkpoint="newest")


def test_weights_of_the_whole_training_go_before_its_checkpoints(output: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(output / "checkpoint-1" / file, output / file)
    decided = plan(resolve(output))
    decided.checkpoint.close()
    assert decided.checkpoint.files == (output / "model.safetensors",)
    assert taken(output, "latest").startswith("checkpoint-2")


# torch.distributed.checkpoint. ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOREIGN / "distributed/step_7", tmp_path / "step_7"))


alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore::FutureWarning")


@alone
def test_parts_of_all_ranks_are_put_together(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    decided = plan(resolve(folder))
    with decided.checkpoint as checkpoint:
        metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        dtypes = {"f": torch.float32, "i": torch.int64}
        state = {f"model.{n}": torch.empty(i.shape, dtype=dtypes[i.dtype.kind]) for n, i in checkpoint.tensors.items()}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        assert any(len(metadata[name].chunks) == 2 for name in state)
        for name in checkpoint.tensors:
            assert np.array_equal(checkpoint.read(name), state[f"model.{name}"].numpy())
        assert [path.name for path in checkpoint.files] == [".metadata", "__0_0.distcp", "__1_0.distcp"]


@alone
def test_one_process_saved_it(tmp_path: Path) -> None:
    """Also in accelerate's folder of FSDP, and by the path of the record."""
    import torch.distributed.checkpoint as dcp

    weights = torch.load(FOREIGN / "lightning/last.ckpt", weights_only=True)["state_dict"]
    half = {name.removeprefix("net."): tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in weights.items() if name.startswith("net.")}  # fmt: skip
    dcp.save({"model": half}, checkpoint_id=tmp_path / "state/pytorch_model_fsdp_0", no_dist=True)
    for source in ("state", "state/pytorch_model_fsdp_0", "state/pytorch_model_fsdp_0/.metadata"):
        found = load(resolve(tmp_path / source)).params["beit/blocks/mlp/fc1/kernel"]
        assert found.dtype.name == "bfloat16"
        assert np.array_equal(found[1].astype(np.float32).T, half["blocks.1.mlp.fc1.weight"].float().numpy())


def test_a_folder_that_is_not_complete(folder: Path) -> None:
    part = folder / "__1_0.distcp"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    refused(folder, "__1_0.distcp is truncated")
    part.unlink()
    refused(folder, ".metadata needs __1_0.distcp, which is not there")
    part.write_bytes(whole)
    (folder / ".metadata").unlink()
    refused(folder, "no .metadata, which is written last")


def changed(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return write


NAME = "model.blocks.0.attn.qkv.weight"


def gap(metadata: Any) -> None:
    del metadata.state_dict_metadata[NAME].chunks[0]


def overlap(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[NAME].chunks
    chunks[1] = replace(chunks[1], offsets=chunks[0].offsets)


def beyond(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[NAME].chunks
    chunks[1] = replace(chunks[1], sizes=torch.Size([40, 16]))


def nowhere(metadata: Any) -> None:
    key = next(key for key in metadata.storage_data if key.fqn == NAME)
    del metadata.storage_data[key]


def elsewhere(metadata: Any) -> None:
    key = next(key for key in metadata.storage_data if key.fqn == NAME)
    metadata.storage_data[key] = replace(metadata.storage_data[key], relative_path="../step_7/__0_0.distcp")


def other_type(metadata: Any) -> None:
    metadata.state_dict_metadata[NAME].properties.dtype = torch.float16


def compressed(metadata: Any) -> None:
    key = next(key for key in metadata.storage_data if key.fqn == NAME)
    metadata.storage_data[key] = replace(metadata.storage_data[key], transform_descriptors=["zstd"])


FLAWS: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "a gap": (gap, (NAME, "parts hold 384 of its 768 elements")),
    "an overlap": (overlap, (NAME, "parts overlap")),
    "beyond the shape": (beyond, (NAME, "reach beyond its shape [48, 16]")),
    "no place": (nowhere, (NAME, "does not say where", "not complete")),
    "another folder": (elsewhere, ("../step_7/__0_0.distcp", "expected one beside it")),
    "another type": (other_type, (NAME.removeprefix("model."), "float32", ".metadata says float16")),
    "compression": (compressed, (NAME, "compressed")),
}


@pytest.mark.parametrize(("change", "needles"), FLAWS.values(), ids=FLAWS)
def test_a_record_that_lies(change: Callable[[Any], None], needles: tuple[str, ...], folder: Path) -> None:
    changed(change)(folder)
    refused(folder, *needles)


def test_nothing_in_a_distributed_checkpoint_is_run(folder: Path, tmp_path: Path) -> None:
    """Neither by the record nor by a part."""
    sentinel, record = tmp_path / "sentinel", folder / ".metadata"
    whole = record.read_bytes()
    changed(lambda metadata: metadata.state_dict_metadata.update(evil=Runs(sentinel)))(folder)
    refused(folder, "asks to run posix.system", "Nothing was run")
    record.write_bytes(whole)
    metadata = pickle.loads(whole)
    key = next(key for key in metadata.storage_data if key.fqn == "model.cls_token")
    torch.save(Runs(sentinel), folder / "evil.distcp")
    nbytes = (folder / "evil.distcp").stat().st_size
    metadata.storage_data[key] = replace(
        metadata.storage_data[key], relative_path="evil.distcp", offset=0, length=nbytes
    )
    record.write_bytes(pickle.dumps(metadata))
    refused(folder, "evil.distcp", "cls_token", "no tensor")
    assert not sentinel.exists()


DAMAGED = ("distributed/step_7/.metadata", "distributed/step_7/__0_0.distcp", "lightning/last.ckpt")


@pytest.mark.parametrize("file", DAMAGED)
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.thorough)])
def test_damage_is_an_error_or_changes_nothing(file: str, count: int, tmp_path: Path) -> None:
    """Cut at places and changed in single bytes: an error, or the same tensors. Names and settings have no checksum."""
    path = FOREIGN / file
    source = path if file.startswith("lightning") else path.parent
    copy = Path(shutil.copytree(source, tmp_path / "x")) if source.is_dir() else Path(shutil.copy(source, tmp_path))
    target = copy / path.name if copy.is_dir() else copy
    data, expected = path.read_bytes(), load(resolve(source)).params
    draw = np.random.default_rng(0)
    cuts = [data[: int(at)] for at in draw.integers(1, len(data), max(count // 10, 5))]
    flips = []
    for at in draw.integers(0, len(data), count):
        flips.append(data[:at] + bytes([data[at] ^ int(draw.integers(1, 256))]) + data[at + 1 :])
    for content in (*cuts, *flips):
        target.write_bytes(content)
        try:
            found = load(resolve(copy)).params
        except BeitJaxError as error:
            assert str(error).isprintable()
        else:
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
