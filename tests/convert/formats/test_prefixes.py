"""What other programs put before the names of a model: found by structure and told; a choice is the user's."""

from pathlib import Path

import numpy as np
import original
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from beit_jax.cli.main import main
from beit_jax.convert import Options, load, plan
from beit_jax.convert.options import DEFAULT
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as transformers saves it."""
    model = reference.random_model(num_labels=3, **reference.TINY | {"layer_norm_eps": 1e-6}, **reference.BIAS["both"])
    return reference.save(model, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def files(directory: Path) -> Tensors:
    """Its tensors under transformers' names."""
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def params(directory: Path) -> dict[str, np.ndarray]:
    return load(resolve(directory)).params


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def saved(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def assert_same(source: Path, expected: dict[str, np.ndarray], options: Options = DEFAULT) -> None:
    found = load(resolve(source), options).params
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


PREFIXES = (
    "model.", "net.encoder.", "core.core.pretrained.model.", "backbone.bottom_up.backbone.", "backbone.", "encoder.",
    "_orig_mod.", "module.module.module.", "module.net._orig_mod.module.", "vision_tower.0.", "a.b.c.d.e.f.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", ["transformers", "original"])
def test_a_prefix_of_every_name(
    prefix: str, naming: str, files: Tensors, params: dict[str, np.ndarray], directory: Path, tmp_path: Path
) -> None:
    """Nothing but the model is there: its head is read too, whatever stands before its name."""
    if naming == "transformers":
        (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    names = original.original_names(files) if naming == "original" else files
    path = saved(tmp_path / "x.safetensors", under(prefix, names))
    assert_same(path, params)
    decided = plan(resolve(path))
    notes = " ".join(decided.notes)
    assert decided.dropped == () and all(word in notes for word in prefix.split("."))


BESIDE = {
    "loss.weight": torch.ones(3),
    "net.projector.0.weight": torch.ones(2, 2),
    "net.projector.0.bias": torch.ones(2),
}


def test_the_model_around_it_is_left_out_and_listed(
    files: Tensors, params: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "x.safetensors", under("net.encoder.", original.original_names(files)) | BESIDE)
    assert_same(path, params)
    assert plan(resolve(path)).dropped == tuple(sorted(BESIDE))
    assert main(["inspect", str(path)]) == 0
    told = "model taken from 'net.encoder.'; 3 tensors of the model around it left out: loss (1), net.projector (2)"
    assert told in capsys.readouterr().out


HOSTS: dict[str, tuple[str, Tensors]] = {
    "MiDaS": ("pretrained.model.", {"scratch.conv.weight": torch.ones(3), "pretrained.act.0.weight": torch.ones(3)}),
    "ZoeDepth": ("core.core.pretrained.model.", {"core.core.scratch.conv.weight": torch.ones(3)}),
    "DiT detection": ("backbone.bottom_up.backbone.", {"proposal_generator.anchor.weight": torch.ones(3)}),
}


@pytest.mark.parametrize(("prefix", "beside"), HOSTS.values(), ids=HOSTS)
def test_a_host_does_not_use_the_head_of_its_encoder(
    prefix: str, beside: Tensors, files: Tensors, params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """timm's classifier was never removed from MiDaS, and detection has a pyramid of its own within the encoder."""
    pyramid = {"fpn1.0.weight": torch.ones(2)} if "bottom_up" in prefix else {}
    path = saved(tmp_path / "x.safetensors", under(prefix, original.original_names(files) | pyramid) | beside)
    encoder = {name.removeprefix("beit/"): leaf for name, leaf in params.items() if name.startswith("beit/")}
    assert_same(path, encoder)
    heads = [f"{prefix}head.bias", f"{prefix}head.weight"]
    decided = plan(resolve(path))
    assert decided.config.task == "features"
    assert decided.dropped == tuple(sorted([*beside, *heads, *(prefix + name for name in pyramid)]))
    assert any(f"{prefix}head (2)" in note for note in decided.notes)


def test_wrappers_of_single_modules(files: Tensors, params: dict[str, np.ndarray], tmp_path: Path) -> None:
    """torch.compile, FSDP and checkpointing of blocks put names into the middle."""
    names = original.original_names(files)
    wrapped = {
        name.replace("blocks.0.", "blocks.0._orig_mod.").replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): tensor
        for name, tensor in names.items()
    }
    path = saved(tmp_path / "x.safetensors", under("model.", wrapped))
    assert_same(path, params)
    assert any("_fsdp_wrapped_module" in note for note in plan(resolve(path)).notes)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("first", "second"), [("student.", "teacher."), ("net.a.", "net.b."), ("model.", "ema_model.")]
)
def test_two_encoders_are_a_choice(
    first: str, second: str, suffix: str, files: Tensors, params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    names = original.original_names(files)
    shifted = {name: tensor + 1 for name, tensor in names.items()}
    both, path = under(first, names) | under(second, shifted), tmp_path / f"x.{suffix}"
    save_file(both, path) if suffix == "safetensors" else torch.save({"state_dict": both}, path)
    with pytest.raises(BeitJaxError, match=r"holds 2 encoders, under .*: choose one of them, --weights") as caught:
        plan(resolve(path))
    for prefix in (first, second):
        assert f"'{prefix}'" in str(caught.value) and prefix.rstrip(".") in str(caught.value).split("--weights")[1]
    assert_same(path, params, Options(weights=first.rstrip(".")))
    chosen = load(resolve(path), Options(weights=second.rstrip("."))).params
    assert np.array_equal(chosen["classifier/bias"], params["classifier/bias"] + 1)
    with pytest.raises(BeitJaxError, match=r"(no|expected) nothing; leave --weights out"):
        plan(resolve(path), Options(weights="nothing"))


def test_a_part_without_an_encoder(files: Tensors, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", under("student.", original.original_names(files)) | BESIDE)
    with pytest.raises(BeitJaxError, match=r"--weights net: no encoder there, found one under student\."):
        plan(resolve(path), Options(weights="net"))


def test_a_copy_that_a_training_keeps_is_no_choice(
    files: Tensors, params: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """An alignment encoder is a copy of its encoder after every step, in CAE and in what others make of it."""
    names = original.original_names(files)
    both = under("encoder.", names) | under("alignment_encoder.", names) | {"predictor.weight": torch.ones(3)}
    assert_same(saved(tmp_path / "x.safetensors", both), params)


def test_names_that_only_end_like_a_backbones(files: Tensors, tmp_path: Path) -> None:
    """A decoder's blocks are no encoder: a prefix ends with a point."""
    with pytest.raises(BeitJaxError, match="no BEiT names"):
        plan(resolve(saved(tmp_path / "x.safetensors", under("decoder_", original.original_names(files)))))
