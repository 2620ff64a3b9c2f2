"""Good weight files: tensors equal those that torch and safetensors read, bit for bit."""

import argparse
import collections
import datetime
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weight_files import Strided, entry, read_all, refusal, safetensors_bytes, torch_pickle, write_zip

from beit_jax.convert.files.checkpoint import open_checkpoint

DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float64: np.dtype(np.float64),
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.int16: np.dtype(np.int16),
    torch.int8: np.dtype(np.int8),
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
}
TORCH_FORMATS = {
    "zip": {},
    "zip, protocol 3": {"pickle_protocol": 3},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
torch_formats = pytest.mark.parametrize("options", TORCH_FORMATS.values(), ids=TORCH_FORMATS.keys())


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """One tensor of every dtype with random bits (a NaN is data too), a scalar and an empty one."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for dtype, stored in DTYPES.items():
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 5 * stored.itemsize), generator=generator)
        result[f"layer.{stored.name}"] = bits.to(torch.uint8).view(dtype)
    return result | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == sorted(expected)
        for name, tensor in expected.items():
            info = checkpoint.tensors[name]
            array = checkpoint.read(name)
            assert (info.name, info.shape, info.dtype) == (name, tuple(tensor.shape), DTYPES[tensor.dtype])
            assert (array.shape, array.dtype) == (info.shape, info.dtype)
            assert array.flags.c_contiguous
            assert array.tobytes() == bits(tensor)


def test_safetensors_of_every_dtype(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(tmp_path / "model.safetensors", tensors())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.files == (tmp_path / "model.safetensors",)
        assert dict(checkpoint.metadata) == {"format": "pt"}
        assert checkpoint.notes == ()


@torch_formats
def test_torch_files_of_every_dtype(tmp_path: Path, options: dict[str, object]) -> None:
    torch.save(collections.OrderedDict(tensors()), tmp_path / "pytorch_model.bin", **options)
    assert_same(tmp_path, tensors())
    assert_same(tmp_path / "pytorch_model.bin", torch.load(tmp_path / "pytorch_model.bin", weights_only=False))


@torch_formats
def test_views_and_tied_tensors(tmp_path: Path, options: dict[str, object]) -> None:
    base = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    state = {
        "base": base,
        "tied": base,
        "transposed": base.permute(3, 1, 0, 2),
        "row": base[1, 2],
        "column": base[:, :, 1:3, ::2],
        "square.t": torch.arange(9.0).reshape(3, 3).t(),
        "one wide": torch.arange(4.0).reshape(4, 1).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    state["parameter"].note = "attributes of a parameter change how it is pickled"
    torch.save(state, tmp_path / "x.pth", **options)
    assert_same(tmp_path / "x.pth", state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_out_is_filled_and_can_be_reused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    state = {
        "a": torch.randn(7, 3),
        "b": torch.randn(2, 5).t().contiguous() if suffix == "safetensors" else torch.randn(2, 5).t(),
    }
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    buffer = np.full(100, 255, np.uint8)
    with open_checkpoint(path) as checkpoint:
        for name, tensor in state.items():
            array = checkpoint.read(name, buffer)
            assert np.shares_memory(array, buffer)
            assert array.tobytes() == bits(tensor)
            assert (buffer[84:] == 255).all()
        for wrong in (
            np.empty(83, np.uint8),
            np.empty(100, np.int8),
            np.empty((2, 100), np.uint8),
            np.empty(400, np.uint8)[::2],
        ):
            with pytest.raises(ValueError, match="flat contiguous uint8 array of at least 84 bytes"):
                checkpoint.read("a", wrong)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_threads_read_the_same_as_one(tmp_path: Path, suffix: str) -> None:
    flat = torch.randn(64 * 1000)
    state = {f"t{i}": flat[i * 1000 : (i + 1) * 1000] for i in range(64)}  # one storage: threads race to verify it
    path = tmp_path / f"model.{suffix}"
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, path
    ) if suffix == "safetensors" else torch.save(state, path)
    with open_checkpoint(path) as checkpoint, ThreadPoolExecutor(8) as pool:
        names = [f"t{i}" for i in range(64)] * 4
        for name, array in zip(names, pool.map(checkpoint.read, names), strict=True):
            assert array.tobytes() == bits(state[name])


def test_int64_and_float64_stay_exact(tmp_path: Path) -> None:
    state = {"i": torch.tensor([2**40, -(2**63)]), "f": torch.tensor([1 / 3, 1e300], dtype=torch.float64)}
    save_file(state, tmp_path / "model.safetensors")
    arrays = read_all(open_checkpoint(tmp_path))
    assert arrays["i"].tolist() == [2**40, -(2**63)]
    assert arrays["f"].tolist() == [1 / 3, 1e300]


def test_a_file_that_is_renamed_over_reads_on_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, path)
    save_file({"a": torch.zeros(3)}, tmp_path / "new")
    with open_checkpoint(path) as checkpoint:
        os.replace(tmp_path / "new", path)
        assert checkpoint.read("a").tolist() == [1, 1, 1]


def test_unilm_fine_tuning_checkpoint(tmp_path: Path) -> None:
    """The keys are those of the original training script. The settings must come out as plain data."""
    weights = {"patch_embed.proj.weight": torch.randn(4, 3, 2, 2), "fc_norm.bias": torch.zeros(4)}
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(
        lr=np.float64(5e-4),
        seed=np.int32(7),
        output_dir=Path("/tmp/out"),
        start=datetime.datetime(2021, 6, 15, 12, 30),
        betas=(0.9, 0.999),
        flags={"a", "b"},
        device=torch.device("cuda", 1),
        dtype=torch.bfloat16,
        grid=torch.Size([14, 14]),
        resume=None,
        nested=argparse.Namespace(enabled=True),
        raw=b"\x00\x01",
    )
    checkpoint = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "epoch": 29,
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "max_accuracy": np.float64(85.25),
        "history": collections.defaultdict(list, {"loss": [1.0, 0.5]}),
        "args": args,
    }
    for name, options in TORCH_FORMATS.items():
        torch.save(checkpoint, tmp_path / "x.pth", **options)
        with open_checkpoint(tmp_path / "x.pth") as opened:
            metadata = dict(opened.metadata)
            settings = metadata.pop("args")
            assert sorted(settings.pop("flags")) == ["a", "b"]
            assert settings == {
                "lr": 5e-4,
                "seed": 7,
                "output_dir": "/tmp/out",
                "start": "2021-06-15 12:30:00",
                "betas": [0.9, 0.999],
                "device": "cuda:1",
                "dtype": "torch.bfloat16",
                "grid": [14, 14],
                "resume": None,
                "nested": {"enabled": True},
                "raw": "<2 bytes>",
            }, name
            assert metadata == {
                "epoch": 29,
                "scaler": {"scale": 65536.0, "_growth_tracker": 3},
                "max_accuracy": 85.25,
                "history": {"loss": [1.0, 0.5]},
            }
            json.dumps(dict(opened.metadata))
            assert "weights taken from 'model'" in opened.notes
            assert "optimizer (dict) ignored" in opened.notes
            assert "args (argparse.Namespace) kept as metadata" in opened.notes
        assert_same(tmp_path / "x.pth", weights)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_both_spellings_of_a_numpy_scalar(tmp_path: Path, module: str) -> None:
    """numpy 2 renamed the module; published files have the old name."""
    pickled = torch_pickle({"model": {"w": Strided((1,), (1,), 1)}, "lr": np.float64(0.1)})
    other = pickled.replace(b"cnumpy._core.multiarray\n", f"c{module}\n".encode())
    assert module.encode() in other
    write_zip(tmp_path / "x.pth", other, {"0": bytes(4)})
    with open_checkpoint(tmp_path / "x.pth") as checkpoint:
        assert checkpoint.metadata["lr"] == 0.1


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_ema"])
def test_a_wrapper_is_peeled_and_reported(tmp_path: Path, key: str) -> None:
    torch.save({key: tensors(), "epoch": 1}, tmp_path / "x.pth")
    assert_same(tmp_path / "x.pth", tensors())
    with open_checkpoint(tmp_path / "x.pth", prefer=key) as checkpoint:
        assert f"weights taken from {key!r}" in checkpoint.notes


def test_two_sets_of_weights_are_a_question(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.zeros(1)}, "model_ema": {"w": torch.ones(1)}, "epoch": 1}, path)
    refusal(path, path, "'model' and 'model_ema'", "choose")
    refusal(path, path, "'model' and 'model_ema'", "module", prefer="module")
    for key, value in (("model", 0), ("model_ema", 1)):
        with open_checkpoint(path, prefer=key) as checkpoint:
            assert checkpoint.read("w").tolist() == [value]
            other = {"model": "model_ema", "model_ema": "model"}[key]
            assert f"{other} (dict) ignored" in checkpoint.notes


def test_prefer_where_there_is_no_choice_is_an_error(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "flat.pth")
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    refusal(tmp_path / "flat.pth", "flat.pth", "model_ema", prefer="model_ema")
    refusal(tmp_path, "model.safetensors", "model_ema", prefer="model_ema")


def test_a_common_module_prefix_is_removed(tmp_path: Path) -> None:
    torch.save({"state_dict": {"module.a": torch.zeros(1), "module.b.c": torch.ones(2)}}, tmp_path / "all.pth")
    torch.save({"state_dict": {"module.a": torch.zeros(1), "b": torch.ones(2)}}, tmp_path / "some.pth")
    with open_checkpoint(tmp_path / "all.pth") as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b.c"]
        assert checkpoint.read("b.c").tolist() == [1, 1]
        assert any("module." in note for note in checkpoint.notes)
    with open_checkpoint(tmp_path / "some.pth") as checkpoint:
        assert list(checkpoint.tensors) == ["b", "module.a"]


def test_the_optimizer_is_never_read(tmp_path: Path) -> None:
    """Flip a bit in every storage but the weights': the CRC of a record is only checked when it is needed."""
    path = tmp_path / "x.pth"
    weights, moments = torch.full((100,), 3.0), torch.full((100,), 7.0)
    torch.save({"model": {"w": weights}, "optimizer": {"state": {0: {"exp_avg": moments}}}}, path)
    raw = path.read_bytes()
    assert raw.count(bits(moments)) == 1
    path.write_bytes(raw.replace(bits(moments), bytes(400)))
    assert read_all(open_checkpoint(path))["w"].tolist() == [3.0] * 100


def test_safetensors_under_another_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "weights.bin")
    with open_checkpoint(tmp_path / "weights.bin") as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.notes == ("weights.bin is a safetensors file",)


def test_a_closed_checkpoint_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"w": entry("F32", [1], 0, 4)}, bytes(4)))
    checkpoint = open_checkpoint(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    checkpoint.close()
    checkpoint.close()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before - 1
    with pytest.raises(ValueError, match="cannot read tensor w"):
        checkpoint.read("w")


def test_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match=r"no tensor v\\nx"):
        checkpoint.read("v\nx")


def test_torch_is_not_imported(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    program = (
        "import sys, pathlib\n"
        "from beit_jax.convert.files.checkpoint import open_checkpoint\n"
        "assert open_checkpoint(pathlib.Path(sys.argv[1])).read('w').tolist() == [1.0]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
