"""Files that could become another model than the one that was saved: the right one, or one line and nothing written.

A new instance of a kind is a row of its table. Models are tiny, and their heads are not 64 channels wide.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import original
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from tolerances import MODEL

from beit_jax.cli.main import main
from beit_jax.convert import Options, convert, load, plan, tokenizers
from beit_jax.convert.options import DEFAULT
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.models.build import build_model
from beit_jax.tokenizers.build import tokenizer_shapes
from beit_jax.tokenizers.vqkd import VqkdConfig
from beit_jax.tree import unflatten

Tensors = dict[str, torch.Tensor]
HEADS, WIDTH = 2, 176  # EVA-01's heads of 88 channels
TABLELESS = {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0, "num_labels": 5}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A classifier without a position bias table: no tensor shows its number of heads."""
    size = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "layer_norm_eps": 1e-6}
    return reference.random_model(**reference.TINY | TABLELESS | size)


@pytest.fixture(scope="module")
def state(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """Its tensors under the names of unilm, timm and EVA-01."""
    directory = reference.save(model, tmp_path_factory.mktemp("hf"))
    return original.original_names(load_file(directory / "model.safetensors"))


_logits = jax.jit(lambda model, pixel_values: model(pixel_values).logits)


def assert_logits(source: Path, model: torch.nn.Module, options: Options = DEFAULT) -> None:
    checkpoint = load(resolve(source), options)
    pixel_values = reference.pixels(model)
    found = _logits(build_model(checkpoint.config, unflatten(dict(checkpoint.params))), pixel_values)
    np.testing.assert_allclose(found, reference.run(model, pixel_values).logits, rtol=0.0, atol=MODEL)


# Attention heads. -----------------------------------------------------------------------------------------------------


def timm(**content: Any) -> Callable[[Tensors, Path], Path]:
    def write(state: Tensors, directory: Path) -> Path:
        save_file(state, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"architecture": "eva_giant_patch14_224"} | content))
        return directory

    return write


def saved(**entries: Any) -> Callable[[Tensors, Path], Path]:
    def write(state: Tensors, directory: Path) -> Path:
        torch.save({"model": state, **entries}, directory / "checkpoint.pth")
        return directory / "checkpoint.pth"

    return write


def beside(**settings: Any) -> Callable[[Tensors, Path], Path]:
    """transformers' configuration beside an original file."""
    config = reference.TINY | TABLELESS | {"hidden_size": WIDTH, "layer_norm_eps": 1e-6, "model_type": "beit"}

    def write(state: Tensors, directory: Path) -> Path:
        (directory / "config.json").write_text(json.dumps(config | settings))
        return saved()(state, directory)

    return write


def in_metadata(state: Tensors, directory: Path) -> Path:
    save_file(state, directory / "weights.safetensors", metadata={"num_heads": str(HEADS)})
    return directory / "weights.safetensors"


def timm_wrapper(state: Tensors, directory: Path) -> Path:
    """transformers' model that timm builds, as `save_pretrained` writes it."""
    wrapped = {f"timm_model.{name}": tensor for name, tensor in state.items()}
    return timm(model_type="timm_wrapper", model_args={"num_heads": HEADS})(wrapped, directory)


STATED = {
    "timm's model_args": timm(model_args={"num_heads": HEADS}),
    "timm's model_args of another size": timm(architecture="beit_base_patch16_224", model_args={"num_heads": HEADS}),
    "timm's unknown architecture": timm(architecture="mine", model_args={"num_heads": HEADS, "embed_dim": WIDTH}),
    "arguments of a training": saved(args=argparse.Namespace(model="beit_tiny", num_heads=HEADS)),
    "keyword arguments of timm's training": saved(args=argparse.Namespace(model_kwargs={"num_heads": HEADS})),
    "opt": saved(opt={"num_attention_heads": HEADS}),
    "hyper-parameters of Lightning": saved(hyper_parameters={"net": {"num_heads": HEADS}}),
    "metadata of safetensors": in_metadata,
    "a float": saved(args={"num_heads": float(HEADS)}),
    "null beside it": timm(model_args={"num_heads": HEADS}, pretrained_cfg=None, label_names=None),
    "transformers' wrapper of timm": timm_wrapper,
    "transformers' config.json": beside(num_attention_heads=HEADS),
    "a decoder's heads beside": saved(args={"num_heads": HEADS, "decoder": {"num_heads": 8}}),
}


@pytest.mark.parametrize("write", STATED.values(), ids=STATED)
def test_stated_heads_are_believed(
    write: Callable[[Tensors, Path], Path], state: Tensors, model: torch.nn.Module, tmp_path: Path
) -> None:
    source = write(state, tmp_path)
    assert plan(resolve(source)).config.num_attention_heads == HEADS
    assert_logits(source, model)


@pytest.mark.parametrize(
    "content",
    [
        {"architecture": "beit_base_patch16_224.in22k_ft_in1k", "model_args": {"embed_dim": 96, "depth": 2}},
        {"architecture": "timm/beitv2_base_patch16_224", "model_args": {"embed_dim": 96, "depth": 2, "img_size": 32}},
    ],
)
def test_an_architecture_says_what_timm_builds_of_it(content: dict[str, Any], tmp_path: Path) -> None:
    size = {"hidden_size": 96, "num_attention_heads": 12, "layer_norm_eps": 1e-6}
    model = reference.random_model(**reference.TINY | TABLELESS | size)
    files = load_file(reference.save(model, tmp_path / "hf") / "model.safetensors")
    assert_logits(timm(**content)(original.original_names(files), tmp_path), model)


OPEN = {
    "timm's architecture of another size": timm(),
    "timm's unknown architecture": timm(architecture="mine"),
    "no settings": saved(),
    "settings that say something else": saved(args=argparse.Namespace(model="beit_base_patch16_224", depth=2), epoch=3),
}


@pytest.mark.parametrize("write", OPEN.values(), ids=OPEN)
def test_heads_that_nothing_states_are_refused_until_stated(
    write: Callable[[Tensors, Path], Path], state: Tensors, model: torch.nn.Module, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, native = write(state, tmp_path), tmp_path / "native"
    assert main(["convert", str(source), str(native)]) == 2
    message = capsys.readouterr().err
    assert "--num-heads" in message and f"width {WIDTH}" in message and message.count("\n") == 1
    assert not native.exists()
    assert main(["convert", str(source), str(native), "--num-heads", str(HEADS)]) == 0
    assert f"{HEADS} heads: --num-heads" in capsys.readouterr().out
    assert_logits(source, model, Options(num_heads=HEADS))


CONTRADICTIONS = {
    "option and timm": (timm(model_args={"num_heads": 4}), HEADS, ["4", "model_args.num_heads", "--num-heads"]),
    "option and transformers": (beside(num_attention_heads=4), HEADS, ["--num-heads 2", "config.json says 4"]),
    "two settings": (saved(args={"num_heads": 2}, opt={"num_heads": 4}), None, ["args.num_heads", "opt.num_heads"]),
    "no divisor, option": (saved(), 3, ["--num-heads", "divides the width 176", "found 3"]),
    "no divisor, settings": (saved(args={"num_heads": 5}), None, ["args.num_heads", "found 5"]),
    "no divisor, timm": (timm(model_args={"num_heads": 0}), None, ["model_args.num_heads", "found 0"]),
}


@pytest.mark.parametrize(("write", "option", "needles"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_statements_that_contradict_are_refused(
    write: Callable[[Tensors, Path], Path], option: int | None, needles: list[str], state: Tensors, tmp_path: Path
) -> None:
    with pytest.raises(BeitJaxError) as caught:
        plan(resolve(write(state, tmp_path)), Options(num_heads=option))
    assert all(needle in str(caught.value) for needle in needles), caught.value


def test_a_table_is_no_matter_of_statements(tmp_path: Path) -> None:
    model = reference.random_model(**reference.TINY | reference.BIAS["shared"] | {"layer_norm_eps": 1e-6})
    files = load_file(reference.save(model, tmp_path / "hf") / "model.safetensors")
    source = saved(args={"num_heads": 8})(original.original_names(files), tmp_path)
    assert_logits(source, model)
    with pytest.raises(BeitJaxError, match="4 attention heads by the position bias table, 8 by --num-heads"):
        plan(resolve(source), Options(num_heads=8))
    timm(model_args={"num_heads": 8})(original.original_names(files), tmp_path)
    with pytest.raises(BeitJaxError, match=r"4 attention heads by .* table, 8 by .*model_args.num_heads"):
        plan(resolve(tmp_path))


# Adapters. ------------------------------------------------------------------------------------------------------------

LORA = {f"base_model.model.beit.layers.0.attention.q_proj.lora_{ab}.weight": torch.zeros(4, 4) for ab in "AB"}


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """A model as transformers saves it, and an adapter in the same directory."""
    directory = reference.save(reference.random_model(**reference.TINY), tmp_path / "adapted")
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base", "r": 4}))
    save_file(LORA, directory / "adapter_model.safetensors")
    return directory


def only_config(directory: Path) -> Path:
    (directory / "adapter_model.safetensors").unlink()
    return directory


def only_weights(directory: Path) -> Path:
    (directory / "adapter_config.json").unlink()
    return directory


def alone(directory: Path) -> Path:
    (directory / "model.safetensors").unlink()
    return directory


def renamed(directory: Path) -> Path:
    return (directory / "adapter_model.safetensors").rename(directory.parent / "lora.safetensors")


def unmerged(directory: Path) -> Path:
    """What a model with an adapter in place saves under its own name."""
    only_weights(directory)
    (directory / "adapter_model.safetensors").unlink()
    state = load_file(directory / "model.safetensors")
    name = "beit.encoder.layer.0.attention.attention.value."
    state[name + "base_layer.weight"] = state.pop(name + "weight")
    save_file(state | {name + "lora_A.default.weight": torch.zeros(4, 32)}, directory / "model.safetensors")
    return directory


def damaged(directory: Path) -> Path:
    (directory / "adapter_config.json").write_text("nonsense")
    return directory


def of_another_kind(directory: Path) -> Path:
    """VeRA's, LoKr's, BOFT's and layer norms have other names, behind peft's own prefix."""
    name = "base_model.model.beit.layers.0.attention.q_proj.vera_lambda_b"
    save_file({name: torch.zeros(4)}, directory.parent / "vera.safetensors")
    return directory.parent / "vera.safetensors"


ADAPTED = {
    "damaged": damaged,
    "of another kind": of_another_kind,
    "beside the weights": lambda directory: directory,
    "beside the weight file": lambda directory: directory / "model.safetensors",
    "its configuration": only_config,
    "its weights": only_weights,
    "without the model": alone,
    "its weight file": lambda directory: directory / "adapter_model.safetensors",
    "under another name": renamed,
    "within the weights": unmerged,
}


@pytest.mark.parametrize("command", ["convert", "inspect", "parity"])
@pytest.mark.parametrize("place", ADAPTED.values(), ids=ADAPTED)
def test_adapters_are_refused_with_the_way_to_merge_them(
    place: Callable[[Path], Path], command: str, adapted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = place(adapted)
    native = source.parent / "native"
    assert main([command, str(source), *([str(native)] if command == "convert" else [])]) == 2
    message = capsys.readouterr().err
    assert "merge_and_unload" in message and "adapter" in message and message.count("\n") == 1
    assert not native.exists()


def test_a_model_without_its_adapter(adapted: Path) -> None:
    """The other way out of the message."""
    (adapted / "adapter_config.json").rename(adapted.parent / "adapter_config.json")
    (adapted / "adapter_model.safetensors").rename(adapted.parent / "adapter_model.safetensors")
    convert(resolve(adapted), adapted.parent / "native")


# Wrappers' prefixes, and relatives of BEiT. ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model._orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_prefixes_of_wrappers_are_removed(
    prefix: str, suffix: str, state: Tensors, model: torch.nn.Module, tmp_path: Path
) -> None:
    """DistributedDataParallel's, torch.compile's, Lightning's."""
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    path = tmp_path / f"weights.{suffix}"
    save_file(wrapped, path) if suffix == "safetensors" else torch.save({"state_dict": wrapped}, path)
    assert any(repr(prefix) in note for note in plan(resolve(path), Options(num_heads=HEADS)).notes)
    assert_logits(path, model, Options(num_heads=HEADS))


RELATIVES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "ViT": (lambda s: {n: t for n, t in s.items() if not n.endswith(("q_bias", "v_bias"))}, "qkv.bias.*without biases"),
    "DINOv3": (lambda s: s | {"reg_token": torch.zeros(1, 4, WIDTH)}, "register tokens"),
    "EVA-02": (lambda s: s | {"blocks.0.mlp.fc2.weight": torch.zeros(WIDTH, 24)}, "gated MLP"),
}


@pytest.mark.parametrize(("change", "word"), RELATIVES.values(), ids=RELATIVES)
def test_relatives_are_refused_before_anything_is_asked_for(
    change: Callable[[Tensors], Tensors], word: str, state: Tensors, tmp_path: Path
) -> None:
    """No number of heads and no configuration would make them BEiT."""
    source = saved()(change(state), tmp_path)
    with pytest.raises(BeitJaxError, match=f"{word}.*relative of BEiT") as caught:
        plan(resolve(source))
    assert "--num-heads" not in str(caught.value)


# VQ-KD's attention heads. ---------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 8}
VQKD = VqkdConfig(
    image_size=(4, 4), patch_size=(2, 2), vocab_size=3, codebook_dim=2, target_size=3, num_attention_heads=4,
    decoder_num_attention_heads=4, **SIZES, **{f"decoder_{name}": size for name, size in SIZES.items()},
)  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "options", "heads", "note"),
    [
        ({}, Options(), 1, "64 channels"),
        ({}, Options(num_heads=4), 4, "--num-heads"),
        ({"args": {"num_heads": 4}}, Options(), 4, "args.num_heads"),
        ({"args": {"num_heads": 2}}, Options(num_heads=4), 4, "--num-heads"),
    ],
)
def test_heads_of_a_tokenizer_are_told(
    entries: dict[str, Any], options: Options, heads: int, note: str, tmp_path: Path
) -> None:
    params = {name: np.ones(shape, np.float32) for name, shape in tokenizer_shapes(VQKD).items()}
    state = {name: torch.from_numpy(leaf) for name, leaf in tokenizers.to_torch(VQKD, params).items()}
    torch.save({"model": state, **entries}, tmp_path / "vqkd.pth")
    decided = tokenizers.plan(resolve(tmp_path / "vqkd.pth"), options)
    decided.checkpoint.close()
    assert (decided.config.num_attention_heads, decided.config.decoder_num_attention_heads) == (heads, heads)
    assert any(f"{heads} attention heads" in line and note in line for line in decided.notes)
