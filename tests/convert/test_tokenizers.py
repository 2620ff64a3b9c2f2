"""Tokenizers are converted from every kind of file and back; pickled modules are read and never run."""

import json
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from weight_files import refusal

from beit_jax.convert import Options, tokenizers
from beit_jax.convert.files.checkpoint import open_checkpoint
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.tokenizers.build import TokenizerConfig, build_tokenizer, tokenizer_shapes
from beit_jax.tokenizers.checkpoint import (
    TokenizerCheckpoint,
    load_decoder,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
)
from beit_jax.tokenizers.dvae import DvaeDecoderConfig, DvaeEncoderConfig
from beit_jax.tokenizers.interface import Tokenizer
from beit_jax.tokenizers.vqkd import VqkdConfig
from beit_jax.tree import unflatten

LEGACY = {"_use_new_zipfile_serialization": False}
CONTAINERS = pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
NO_SOURCE = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")

Classes = dict[str, type[nn.Module]]


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> Classes:
    """Returns modules that pickle under the names of the dall_e package, without this package."""
    made: Classes = {}
    for home, names in {"encoder": ("Encoder", "EncoderBlock"), "decoder": ("Decoder",), "utils": ("Conv2d",)}.items():
        module = types.ModuleType(f"dall_e.{home}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in names:
            made[name] = type(name, (nn.Module,), {"__module__": module.__name__})
            setattr(module, name, made[name])
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    return made


def encoder(classes: Classes, *, width: int = 8, vocab_size: int = 24) -> nn.Module:
    """The encoder's tree of modules with one block per group, from the description of its names and shapes."""

    def conv(inputs: int, outputs: int, size: int) -> nn.Module:
        module = classes["Conv2d"]()
        module.n_in, module.device = inputs, torch.device("cpu")
        module.w = nn.Parameter(torch.randn(outputs, inputs, size, size), requires_grad=False)
        module.b = nn.Parameter(torch.randn(outputs))
        return module

    def block(inputs: int, outputs: int) -> nn.Module:
        module, hidden = classes["EncoderBlock"](), outputs // 4
        module.id_path = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)
        sizes = ((inputs, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, outputs, 1))
        path = [(f"{kind}_{i}", part) for i, size in enumerate(sizes, 1)
                for kind, part in (("relu", nn.ReLU()), ("conv", conv(*size)))]  # fmt: skip
        module.res_path = nn.Sequential(OrderedDict(path))
        return module

    widths = [width, width, 2 * width, 4 * width, 8 * width]
    groups = [(f"group_{i}", nn.Sequential(OrderedDict(block_1=block(*widths[i - 1 : i + 1]), pool=nn.MaxPool2d(2))))
              for i in (1, 2, 3, 4)]  # fmt: skip
    output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(widths[-1], vocab_size, 1)))
    torch.manual_seed(0)
    model = classes["Encoder"]()
    model.blocks = nn.Sequential(OrderedDict([("input", conv(3, width, 7)), *groups, ("output", output)]))
    return model.eval()


def assert_holds(path: Path, expected: dict[str, torch.Tensor]) -> TokenizerCheckpoint:
    """Converting the file and going back gives these tensors, bit for bit."""
    checkpoint = tokenizers.load(resolve(path))
    exported = tokenizers.to_torch(checkpoint.config, checkpoint.params)
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name].flags.c_contiguous and np.array_equal(exported[name], tensor.numpy()), name
    return checkpoint


# --- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@CONTAINERS
def test_state_dicts(classes: Classes, tmp_path: Path, wrapper: str | None, options: dict[str, Any]) -> None:
    tensors = encoder(classes).state_dict()
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, tmp_path / "encoder.pt", **options)
    checkpoint = assert_holds(tmp_path / "encoder.pt", tensors)
    assert checkpoint.config == DvaeEncoderConfig(n_hid=8, vocab_size=24, n_blk_per_group=1)
    assert checkpoint.provenance["naming"] == "dall_e" and checkpoint.provenance["files"] == {"encoder.pt": None}


def test_safetensors_and_half_precision(classes: Classes, tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in encoder(classes).state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(tmp_path, {name: tensor.float() for name, tensor in tensors.items()})


@CONTAINERS
@NO_SOURCE
def test_a_pickled_module(classes: Classes, tmp_path: Path, options: dict[str, Any]) -> None:
    model = encoder(classes)
    torch.save(model, tmp_path / "encoder.pkl", **options)
    assert_holds(tmp_path / "encoder.pkl", model.state_dict())
    with open_checkpoint(tmp_path / "encoder.pkl") as checkpoint:
        assert checkpoint.notes == ("weights taken from a pickled dall_e.encoder.Encoder; nothing was run",)


@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.filterwarnings("ignore")
@CONTAINERS
def test_modules_of_the_package_itself(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    dall_e = pytest.importorskip("dall_e", reason="the dall_e package is not installed: pip install DALL-E")
    model = getattr(dall_e, kind)(n_hid=16, vocab_size=32)
    torch.save(model, tmp_path / "model.pkl", **options)
    assert_holds(tmp_path / "model.pkl", model.state_dict())


@CONTAINERS
@NO_SOURCE
def test_a_pickled_module_needs_neither_torch_nor_dall_e(
    classes: Classes, tmp_path: Path, options: dict[str, Any]
) -> None:
    torch.save(encoder(classes), tmp_path / "encoder.pkl", **options)
    program = (
        "import sys, pathlib\n"
        "sys.modules['torch'] = sys.modules['dall_e'] = None  # importing them fails\n"
        "from beit_jax.convert import tokenizers\n"
        "from beit_jax.hub import resolve\n"
        "checkpoint = tokenizers.load(resolve(sys.argv[1]))\n"
        "assert checkpoint.config.vocab_size == 24\n"
        "assert not any(name.startswith(('torch.', 'dall_e.')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "encoder.pkl")], check=True, timeout=120)


# --- pickled modules that are refused ---------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return open, (str(self.sentinel), "w")


@CONTAINERS
@NO_SOURCE
def test_one_foreign_name_refuses_the_module(classes: Classes, tmp_path: Path, options: dict[str, Any]) -> None:
    model = encoder(classes)
    model.blocks.group_1.pool.payload = Payload(tmp_path / "sentinel")
    torch.save(model, tmp_path / "encoder.pkl", **options)
    message = refusal(tmp_path / "encoder.pkl", "encoder.pkl", "asks to run", "io.open", "Nothing was run")
    assert "dall_e" not in message and not (tmp_path / "sentinel").exists()


@NO_SOURCE
def test_other_modules_are_refused(classes: Classes, tmp_path: Path) -> None:
    path, model = tmp_path / "encoder.pkl", encoder(classes)
    torch.save(nn.Sequential(nn.ReLU()), path)
    refusal(path, "whole-module pickle of torch.nn.modules.container.Sequential", "dall_e.encoder.Encoder")
    model.blocks.input = nn.Conv2d(3, 8, 7)
    torch.save(model, path)
    refusal(path, "whole-module pickle", "torch.nn.modules.conv.Conv2d", "state_dict()")
    torch.save({"model": {"a": torch.ones(1), "b": nn.ReLU()}}, path)
    refusal(path, "b in the state dict", "torch.nn.modules.activation.ReLU")


def holds_itself(model: nn.Module) -> None:
    model._modules["blocks"] = model


def grows_at_every_level(model: nn.Module) -> None:
    """Twenty levels of twice the same module: a million paths in a small file."""
    for _ in range(20):
        parent = nn.Sequential(model.blocks, model.blocks)
        model._modules["blocks"] = parent


def has_no_parameters(model: nn.Module) -> None:
    del model.blocks.input._parameters


def holds_text(model: nn.Module) -> None:
    model.blocks.input._parameters["w"] = "text"


def holds_no_module(model: nn.Module) -> None:
    model._modules["blocks"] = torch.ones(1)


def has_a_long_name(model: nn.Module) -> None:
    model._modules["b" * 600] = nn.ReLU()


def stands_twice(model: nn.Module) -> None:
    model._parameters["blocks.input.w"] = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (holds_itself, "at most 500 characters"),
        (grows_at_every_level, "nests more than 20000"),
        (has_no_parameters, "blocks.input. has no _parameters"),
        (holds_text, "blocks.input.w is not one tensor"),
        (holds_no_module, "blocks is no module"),
        (has_a_long_name, "at most 500 characters"),
        (stands_twice, "blocks.input.w is not one tensor"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_module_that_is_none(
    classes: Classes, tmp_path: Path, change: Callable[[nn.Module], None], needle: str
) -> None:
    model = encoder(classes)
    change(model)
    torch.save(model, tmp_path / "encoder.pkl")
    refusal(tmp_path / "encoder.pkl", "encoder.pkl", needle)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "needles"),
    [
        ({"blocks.group_2.block_1.id_path.b": None}, ["1 tensors do not fit", "id_path.b expected [16] found nothing"]),
        ({"blocks.extra": torch.ones(2)}, ["blocks.extra expected nothing found [2] of float32"]),
        ({"blocks.output.conv.b": torch.ones(7)}, ["blocks.output.conv.b expected [24] found [7]"]),
        ({"blocks.output.conv.b": torch.ones(24).int()}, ["expected [24] found [24] of int32"]),
        (
            {"blocks.output.conv.w": None},
            ["not a dall_e tokenizer", "blocks.output.conv.w of 4 dimensions, found none"],
        ),
        ({"blocks.group_1.block_1.res_path.conv_1.w": None}, ["group_count: expected a positive integer"]),
        ({"blocks.input.w": None}, ["no tokenizer's names found", "dall_e"]),
        ({"blocks.output.conv.b": torch.full((24,), torch.nan)}, ["blocks.output.conv.b", "NaN", "--allow-nonfinite"]),
        ({"blocks.output.conv.b": torch.full((24,), 1e300, dtype=torch.float64)}, ["beyond the range of float32"]),
    ],
)
def test_tensors_that_do_not_fit(
    classes: Classes, tmp_path: Path, changes: dict[str, torch.Tensor | None], needles: list[str]
) -> None:
    tensors = {name: tensor for name, tensor in (encoder(classes).state_dict() | changes).items() if tensor is not None}
    path = tmp_path / "encoder.pth"
    torch.save(tensors, path)
    with pytest.raises(BeitJaxError) as caught:
        tokenizers.load(resolve(path))
    assert str(caught.value).isprintable()
    for needle in (str(path), *needles):
        assert needle in str(caught.value)


def test_nonfinite_values_on_request(classes: Classes, tmp_path: Path) -> None:
    tensors = encoder(classes).state_dict() | {"blocks.output.conv.b": torch.full((24,), torch.inf)}
    torch.save(tensors, tmp_path / "encoder.pth")
    checkpoint = tokenizers.load(resolve(tmp_path / "encoder.pth"), Options(allow_nonfinite=True))
    assert np.isinf(checkpoint.params["output/bias"]).all()


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (DvaeEncoderConfig(), 74, 53_786_240),
        (DvaeDecoderConfig(), 76, 43_829_766),
        (VqkdConfig(), 220, 109_369_889),
        (VqkdConfig(decoder_num_hidden_layers=1, target_size=768), 194, 95_392_545),
    ],
    ids=["encoder", "decoder", "3x768x12_clip", "1x768x12_dino"],
)
def test_published_models_have_their_tensors(config: TokenizerConfig, tensors: int, parameters: int) -> None:
    zeros = {name: np.broadcast_to(np.float32(), shape) for name, shape in tokenizer_shapes(config).items()}
    [naming] = (naming for naming in tokenizers.NAMINGS if type(config) in naming.kinds and naming != tokenizers.FLAVA)
    planned = tokenizers.steps(naming.rules(config), {name: leaf.shape for name, leaf in zeros.items()})
    shapes = dict(pair for step in planned.values() for pair in step.torch_shapes())
    assert len(shapes) == tensors and sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    assert naming.config(shapes) == config


sizes = st.integers(1, 3)
CONFIGS = st.one_of(
    st.builds(
        DvaeEncoderConfig, n_hid=st.sampled_from([4, 12]), vocab_size=sizes, group_count=sizes, n_blk_per_group=sizes,
        input_channels=sizes,
    ).map(lambda config: DvaeEncoderConfig(**vars(config) | {"image_size": (14 * config.stride,) * 2})),
    st.builds(
        DvaeDecoderConfig, n_init=sizes, n_hid=st.sampled_from([4, 12]), vocab_size=sizes, group_count=sizes,
        n_blk_per_group=sizes, output_channels=sizes,
    ),
    st.builds(
        VqkdConfig, image_size=st.sampled_from([(4, 4), (6, 6)]), patch_size=st.just((2, 2)),
        hidden_size=st.just(128), num_attention_heads=st.just(2), num_hidden_layers=sizes, intermediate_size=sizes,
        decoder_hidden_size=st.just(64), decoder_num_attention_heads=st.just(1), decoder_num_hidden_layers=sizes,
        decoder_intermediate_size=sizes, vocab_size=sizes, codebook_dim=sizes, target_size=sizes,
    ),
)  # fmt: skip


@given(CONFIGS)
def test_round_trip(config: TokenizerConfig) -> None:
    """The rules cover a model's tree exactly, its shapes say which model it is, and export and import are inverse."""
    rng = np.random.default_rng(0)
    shapes = tokenizer_shapes(config)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for naming in tokenizers.NAMINGS:
        if type(config) not in naming.kinds:
            continue
        tensors = tokenizers.to_torch(config, params, naming)
        assert sum(tensor.size for tensor in tensors.values()) == sum(leaf.size for leaf in params.values())
        assert naming.marker in tensors
        assert naming.config({name: tensor.shape for name, tensor in tensors.items()}) == config
        for path, step in tokenizers.steps(naming.rules(config), shapes).items():
            leaf = np.empty(step.shape, np.float32)
            for names, layer in zip(step.layers, leaf if step.rule.stacked else [leaf], strict=True):
                step.rule.op.load([tensors[name] for name in names], 0, layer)
            assert np.array_equal(leaf, params[path]), path


def test_a_naming_without_the_model() -> None:
    with pytest.raises(BeitJaxError, match="FlavaImageCodebook has no dalle-dvae-decoder"):
        tokenizers.to_torch(DvaeDecoderConfig(), {}, tokenizers.FLAVA)


# --- native -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def native(classes: Classes, tmp_path: Path) -> Path:
    torch.save(encoder(classes).state_dict(), tmp_path / "encoder.pth")
    tokenizers.convert(resolve(tmp_path / "encoder.pth"), tmp_path / "native")
    return tmp_path / "native"


def test_native_directory(native: Path) -> None:
    source = resolve(native.parent / "encoder.pth")
    assert sorted(path.name for path in native.iterdir()) == ["config.json", "flax_model.safetensors"]
    assert json.loads((native / "config.json").read_text())["model_type"] == "dalle-dvae-encoder"
    stored, converted = read_tokenizer(native), tokenizers.load(source)
    assert stored.config == converted.config and stored.provenance == converted.provenance
    assert stored.params.keys() == converted.params.keys()
    assert all(np.array_equal(stored.params[name], converted.params[name]) for name in converted.params)
    with pytest.raises(BeitJaxError, match="already exists"):
        tokenizers.convert(source, native)
    tokenizers.convert(source, native, overwrite=True)


def test_overwrite_replaces_neither_other_directories_nor_the_source(native: Path, tmp_path: Path) -> None:
    source = resolve(tmp_path / "encoder.pth")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(BeitJaxError, match=rf"{tmp_path}/home"):
        tokenizers.convert(source, tmp_path / "home", overwrite=True)
    inside = native / "encoder.pth"
    inside.write_bytes(source.path.read_bytes())
    with pytest.raises(BeitJaxError, match=str(native)):
        tokenizers.convert(resolve(inside), native, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists() and inside.exists()


def test_the_interface(native: Path) -> None:
    loaded = load_tokenizer(native)
    assert isinstance(loaded, Tokenizer)
    assert (loaded.vocab_size, loaded.patch_size, loaded.image_size) == (24, (8, 8), (112, 112))
    assert loaded.value_range == (0.0, 1.0)
    images = np.random.default_rng(0).random((2, 16, 24, 3), dtype=np.float32)
    tokens = jax.jit(lambda model, pixels: model.tokens(pixels))(loaded, images)
    assert tokens.shape == (2, 2, 3) and tokens.dtype == np.int32
    logits = build_tokenizer(loaded.config, unflatten(read_tokenizer(native).params))
    assert np.array_equal(tokens, jax.jit(lambda model, pixels: model(pixels))(logits, images).argmax(-1))
    with pytest.raises(BeitJaxError, match="expected dalle-dvae-decoder, found dalle-dvae-encoder"):
        load_decoder(native)


@pytest.mark.parametrize("config", [DvaeDecoderConfig(4, 4, 6, 2, 1), VqkdConfig(
    image_size=(4, 8), patch_size=(2, 2), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=8, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
    decoder_intermediate_size=8, vocab_size=6, codebook_dim=2, target_size=3,
)], ids=["decoder", "vqkd"])  # fmt: skip
def test_other_models_are_stored_alike(tmp_path: Path, config: TokenizerConfig) -> None:
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32)
              for name, shape in tokenizer_shapes(config).items()}  # fmt: skip
    save_tokenizer(tmp_path, TokenizerCheckpoint(config, params, {"source": "here"}))
    stored = read_tokenizer(tmp_path)
    assert stored.config == config and stored.provenance == {"source": "here"}
    assert all(np.array_equal(stored.params[name], leaf) for name, leaf in params.items())
    if isinstance(config, DvaeDecoderConfig):
        assert load_decoder(tmp_path).config == config
        with pytest.raises(BeitJaxError, match="expected a tokenizer, found dalle-dvae-decoder"):
            load_tokenizer(tmp_path)
    else:
        assert isinstance(load_tokenizer(tmp_path), Tokenizer)


@pytest.mark.parametrize(
    ("changes", "needle"),
    [
        ({"model_type": "beit"}, "model_type: expected dalle-dvae-encoder or"),
        ({"n_hid": None}, "missing key n_hid"),
        ({"n_hid": "8"}, "n_hid: expected an integer"),
        ({"n_hid": 0}, "n_hid: expected a positive integer"),
        ({"n_hid": 16}, "expected shape"),
        ({"n_blk_per_group": 10**9}, "n_blk_per_group: expected at most 64"),
        ({"group_count": 10**9}, "group_count: expected at most 8"),
        ({"image_size": [112, 110]}, r"image_size: expected multiples of 8, such as \[112, 112\]"),
        ({"width": 3}, "unknown key width"),
    ],
)
def test_a_wrong_config(native: Path, changes: dict[str, object], needle: str) -> None:
    content = json.loads((native / "config.json").read_text()) | changes
    (native / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(BeitJaxError, match=needle) as caught:
        load_tokenizer(native)
    assert str(native) in str(caught.value)


def test_a_damaged_byte_is_found(native: Path) -> None:
    path = native / "flax_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(BeitJaxError, match="digest"):
        load_tokenizer(native)
