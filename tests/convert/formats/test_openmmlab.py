"""Open-MMLab's files: what they say beside the tensors, what lies beside the weights, and what is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_jax.cli.main import main
from beit_jax.convert import Options, plan
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve

FOREIGN = Path(__file__).parents[1] / "foreign"
RUNNER = FOREIGN / "mmpretrain/token.pth"


def changed(file: str, path: Path, entries: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """A stored file with other entries, and with tensors added, or left out where they are None."""
    content = torch.load(FOREIGN / file, weights_only=True) | (entries or {})
    renamed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    state = {name: tensor for name, tensor in (content["state_dict"] | renamed).items() if tensor is not None}
    torch.save(content | {"state_dict": state}, path)
    return path


def test_a_runners_own_classes_are_passed_over_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(RUNNER), "--weights", "ema"]) == 0
    told = capsys.readouterr().out
    assert "written by   mmengine 0.10.7" in told
    assert "message_hub of mmengine passed over unread" in told and "mmengine.logging.history_buffer" in told


def test_two_sets_of_weights_are_a_choice() -> None:
    with pytest.raises(BeitJaxError, match=r"moving average under 'state_dict'.*exchanges.*--weights ema or raw"):
        plan(resolve(RUNNER))
    with pytest.raises(BeitJaxError, match="--weights ema or raw"):
        plan(resolve(RUNNER), Options(weights="model_ema"))


class Runs:
    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._sentinel}",)


def test_nothing_of_a_runners_file_is_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    beside = changed("mmpretrain/mean.pth", tmp_path / "x.pth", {"message_hub": {"x": [Runs(sentinel)]}})
    assert any("posix.system" in note for note in plan(resolve(beside)).notes)
    for entries in ({"state_dict": Runs(sentinel)}, {"message_hub": {}, "state_dict": {"x": Runs(sentinel)}}):
        content = torch.load(FOREIGN / "mmpretrain/mean.pth", weights_only=True)
        torch.save(content | entries, tmp_path / "y.pth")
        with pytest.raises(BeitJaxError, match=r"asks to run posix\.system.*Nothing was run"):
            plan(resolve(tmp_path / "y.pth"))
    assert not sentinel.exists()


def test_classes_and_blocks_are_those_of_the_files_settings(tmp_path: Path) -> None:
    assert plan(resolve(FOREIGN / "mmpretrain/mean.pth")).config.labels == ("ant", "bee", "cat", "dog", "eel")
    segmenter = plan(resolve(FOREIGN / "mmseg/upernet.pth")).config
    assert segmenter.labels == ("wall", "sky", "tree") and segmenter.out_indices == (0, 1, 2, 3)
    # out_indices [-2, -1] of two blocks; early_layers of mmpretrain is a matter of stochastic depth alone.
    assert plan(resolve(FOREIGN / "mmpretrain/mim_v2.pth")).config.aggregate_from == 1
    silent = changed("mmpretrain/mim_v2.pth", tmp_path / "x.pth", {"meta": {}})
    with pytest.raises(BeitJaxError, match="--aggregate-from N"):
        plan(resolve(silent))


def test_the_tokenizer_of_a_pre_training_is_left_out(tmp_path: Path) -> None:
    block = "target_generator__encoder__layers__0__"
    tokenizer = {block + name: torch.ones(3) for name in ("attn__qkv__weight", "ffn__layers__0__0__weight")}
    path = changed("mmpretrain/mim_v2.pth", tmp_path / "x.pth", **tokenizer)
    assert {name for name in plan(resolve(path)).dropped if "target" in name} == {
        n.replace("__", ".") for n in tokenizer
    }


def test_a_classifier_with_both_norms_or_none(tmp_path: Path) -> None:
    """mmpretrain can build them; no BEiT was published with them."""
    norm = {"backbone__ln1__weight": torch.ones(16), "backbone__ln1__bias": torch.ones(16)}
    with pytest.raises(BeitJaxError, match="its backbone has ln1 and ln2, a final norm"):
        plan(resolve(changed("mmpretrain/mean.pth", tmp_path / "x.pth", **norm)))
    with pytest.raises(BeitJaxError, match="neither ln1 nor ln2"):
        none = dict.fromkeys(("backbone__ln2__weight", "backbone__ln2__bias"))
        plan(resolve(changed("mmpretrain/mean.pth", tmp_path / "x.pth", **none)))


def test_a_relative_is_refused_by_name(tmp_path: Path) -> None:
    """mmpretrain builds DeiT 3 and EVA of the same blocks, with one bias of queries, keys and values."""
    bias = {"backbone__layers__0__attn__qkv__bias": torch.ones(48), "backbone__layers__0__attn__q_bias": None}
    with pytest.raises(BeitJaxError, match="relative of BEiT"):
        plan(resolve(changed("mmpretrain/mean.pth", tmp_path / "x.pth", **bias)))


STORED = {
    "mean of the patches": ("mmpretrain/mean.pth", "mmpretrain", Options()),
    "class token": ("mmpretrain/token.pth", "mmpretrain", Options(weights="ema")),
    "pre-training": ("mmpretrain/mim.pth", "mmpretrain", Options()),
    "BEiT v2": ("mmpretrain/mim_v2.pth", "mmpretrain", Options()),
    "UperNet": ("mmseg/upernet.pth", "mmseg", Options()),
}


@pytest.mark.parametrize(("file", "layout", "options"), STORED.values(), ids=STORED)
def test_an_export_holds_what_the_library_wrote(file: str, layout: str, options: Options, tmp_path: Path) -> None:
    """Every name, shape, type and bit of the state dict, computed indices too: it can be loaded strictly."""
    assert main(["convert", str(FOREIGN / file), str(tmp_path / "native"), *flags(options)]) == 0
    assert main(["export", str(tmp_path / "native"), str(tmp_path / "out"), "--to", layout]) == 0
    found = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    expected = read_state(FOREIGN / file, options)
    assert found["state_dict"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert found["state_dict"][name].dtype == tensor.dtype and torch.equal(found["state_dict"][name], tensor), name
    config = plan(resolve(FOREIGN / file), options).config
    again = plan(resolve(tmp_path / "out/checkpoint.pth"))
    assert again.config == config and all(name.endswith(("_index", "_tracked")) for name in again.dropped)
    classes = found["meta"].get("dataset_meta", {}).get("classes", ())
    assert classes == tuple(config.labels) and found["meta"]["cfg"] == (tmp_path / "out/config.py").read_text()
    trained_on = {"meta": found["meta"], "state_dict": found["state_dict"]}  # as mmengine saves it again
    torch.save(trained_on, tmp_path / "again.pth")
    told = plan(resolve(tmp_path / "again.pth")).config
    assert (told.labels, told.aggregate_from, told.out_indices) == (
        config.labels, config.aggregate_from, config.out_indices
    )  # fmt: skip


def flags(options: Options) -> list[str]:
    return [] if options.weights is None else ["--weights", options.weights]


def read_state(path: Path, options: Options) -> dict[str, torch.Tensor]:
    """All weights of a file by their names."""
    with plan(resolve(path), options).checkpoint as checkpoint:
        return {name: torch.from_numpy(checkpoint.read(name).copy()) for name in checkpoint.tensors}


def test_the_settings_are_plain_python_that_names_the_model(tmp_path: Path) -> None:
    assert main(["convert", str(FOREIGN / "mmpretrain/mim_v2.pth"), str(tmp_path / "native")]) == 0
    assert main(["export", str(tmp_path / "native"), str(tmp_path / "out"), "--to", "mmpretrain"]) == 0
    names: dict[str, Any] = {}
    exec((tmp_path / "out/config.py").read_text(), names)  # written above
    model = names["model"]
    arch = {"embed_dims": 16, "num_layers": 2, "num_heads": 2, "feedforward_channels": 32}
    assert model["type"] == "BEiT" and model["backbone"]["type"] == "BEiTPretrainViT"
    assert model["backbone"]["arch"] == arch and model["backbone"]["out_indices"] == [0, 1]
    assert model["neck"]["early_layers"] == 1 and model["neck"]["num_layers"] == 1
    assert model["head"]["num_embed"] == 24 and model["data_preprocessor"]["mean"] == [127.5] * 3


def test_settings_that_a_person_has_changed_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, out = str(tmp_path / "native"), tmp_path / "out"
    assert main(["convert", str(FOREIGN / "mmpretrain/mean.pth"), native]) == 0
    for _ in range(2):
        assert main(["export", native, str(out), "--to", "mmpretrain", "--overwrite"]) == 0
    with (out / "config.py").open("a") as file:
        file.write("train_cfg = dict(max_epochs=3)\n")
    before = (out / "config.py").read_text()
    assert main(["export", native, str(out), "--to", "mmpretrain", "--overwrite"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and (out / "config.py").read_text() == before
