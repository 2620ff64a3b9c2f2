"""Every reader of pickles: what a file asks for beyond data is refused by its name, and nothing of it has run.

Two canaries: the call of a function, and an object whose class runs code when it is restored. Each test proves at its
end that its canary was live.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beit_jax.cli.main import main

FOREIGN = Path(__file__).parents[1] / "foreign"


class Call:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._sentinel}",)


class Restored:
    """Leaves a file behind when it is restored."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = str(sentinel)

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["sentinel"]).touch()


CANARIES = {Call: "posix.system", Restored: f"{Restored.__module__}.Restored"}
TENSORS = {"blocks.0.attn.qkv.weight": torch.ones(2)}


def live(path: Path) -> None:
    """Reads a file, which this test wrote, as the program of its kind does."""
    if path.suffix == ".pdparams" or path.name in ("x.pkl", ".metadata"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)


def zipped(folder: Path, evil: object) -> Path:
    torch.save({"model": {**TENSORS, "x": evil}}, folder / "x.pth")
    return folder / "x.pth"


def legacy(folder: Path, evil: object) -> Path:
    torch.save({"model": {**TENSORS, "x": evil}}, folder / "x.pth", _use_new_zipfile_serialization=False)
    return folder / "x.pth"


def bare(folder: Path, evil: object) -> Path:
    (folder / "x.pkl").write_bytes(pickle.dumps({"model": {"w": np.ones(2, np.float32), "x": evil}}))
    return folder / "x.pkl"


def paddle(folder: Path, evil: object) -> Path:
    arrays = {"w": np.ones(2, np.float32), "StructuredToParameterName@@": {"w": "w_0"}, "x": evil}
    (folder / "x.pdparams").write_bytes(pickle.dumps(arrays, 4))
    return folder / "x.pdparams"


def beside(name: str, entry: str) -> Callable[[Path, object], Path]:
    """The file of a training program that keeps objects of its own beside the weights, with one among these."""

    def write(folder: Path, evil: object) -> Path:
        content = torch.load(FOREIGN / name, weights_only=True)
        torch.save(content | {entry: {**content[entry], "x": evil}}, folder / "x.pth")
        return folder / "x.pth"

    return write


def record(folder: Path, evil: object) -> Path:
    shutil.copytree(FOREIGN / "distributed/step_7", folder / "step")
    metadata = pickle.loads((folder / "step/.metadata").read_bytes())
    metadata.state_dict_metadata["x"] = evil
    (folder / "step/.metadata").write_bytes(pickle.dumps(metadata))
    return folder / "step/.metadata"


def weights_bin(folder: Path, evil: object) -> Path:
    """As accelerate and transformers 4 write weights, beside their configuration."""
    shutil.copy(FOREIGN / "accelerate/config.json", folder)
    torch.save({**TENSORS, "x": evil}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def shard(folder: Path, evil: object) -> Path:
    shutil.copy(FOREIGN / "accelerate/config.json", folder)
    torch.save({**TENSORS, "x": evil}, folder / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys((*TENSORS, "x"), "pytorch_model-00001-of-00001.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder / "pytorch_model-00001-of-00001.bin"


def module(folder: Path, evil: object) -> Path:
    """DALL-E's encoders are pickled modules, whose attributes are read."""
    held = torch.nn.Linear(1, 1)
    held.x = evil
    torch.save(held, folder / "encoder.pkl")
    return folder / "encoder.pkl"


READERS: dict[str, Callable[[Path, object], Path]] = {
    "torch.save": zipped,
    "torch.save before 1.6": legacy,
    "pickle": bare,
    "Paddle": paddle,
    "Lightning": beside("lightning/last.ckpt", "state_dict"),
    "mmengine": beside("mmpretrain/mean.pth", "state_dict"),
    "torch.distributed.checkpoint": record,
    "accelerate and transformers": weights_bin,
    "a shard": shard,
    "DALL-E's modules": module,
}


@pytest.mark.parametrize("canary", CANARIES, ids=["call", "object"])
@pytest.mark.parametrize("reader", READERS)
def test_nothing_of_a_canary_runs(reader: str, canary: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, sentinel, out = tmp_path / "source", tmp_path / "sentinel", tmp_path / "out"
    folder.mkdir()
    path = READERS[reader](folder, canary(sentinel))
    source = path.parent if path.name.startswith(("pytorch_model", ".metadata")) else path
    for command in (["inspect", str(source)], ["convert", str(source), str(out)]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert CANARIES[canary] in message and message.count("\n") == 1, message
        assert not sentinel.exists() and not out.exists()
    live(path)
    assert sentinel.exists()
