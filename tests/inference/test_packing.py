"""A packed model computes what it did, is written as it was, and stays as it is where nothing would be faster."""

from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TINY

import beit_jax
from beit_jax.config import BeitConfig
from beit_jax.hub import resolve
from beit_jax.inference import packing, predict, program_cache
from beit_jax.inference.reading import read
from beit_jax.kernels.cpu import calls, library
from beit_jax.models.build import build_model, param_shapes
from beit_jax.models.one_cpu import traced_for
from beit_jax.tree import flatten, unflatten
from beit_jax.weights import NativeCheckpoint

pytestmark = pytest.mark.skipif(
    library.compiler() is None or not library.measured(), reason="no compiler, or another processor"
)
PER_LAYER = replace(TINY, position_bias="per_layer", layer_scale_init_value=0.1)
KINDS = {
    "a table per layer": PER_LAYER,
    "a shared table": replace(TINY, position_bias="shared"),
    "a key bias and norms within": replace(PER_LAYER, use_key_bias=True, use_sub_norm=True),
    "no classifier": replace(PER_LAYER, task="features", labels=()),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "SMALLEST", 1)
    monkeypatch.setenv(library.SWITCH, "on")


def drawn(config: BeitConfig, **options: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    shapes = param_shapes(config)
    params = {name: jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32) for name, shape in shapes.items()}
    pixels = jnp.asarray(rng.standard_normal((2, *config.image_size, 3)), jnp.float32)
    return build_model(config, unflatten(params), **options), pixels


def leaves(model: Any) -> dict[str, Any]:
    return flatten(nnx.to_pure_dict(nnx.state(model)))


@jax.jit
def everything(model: Any, pixels: Any) -> Any:
    outputs = model(pixels, taps=(0, 1, 2), output_attentions=True)
    return jax.tree.leaves(outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_computes_what_it_did(kind: str) -> None:
    model, pixels = drawn(KINDS[kind])
    expected = everything(model, pixels)
    assert beit_jax.pack(model) is model
    names = {name for name, leaf in leaves(model).items() if isinstance(leaf, calls.Packed)}
    assert len(names) == 4 and all("blocks/" in name and name.endswith("kernel") for name in names)
    found = everything(model, pixels)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))
    beit_jax.pack(model)  # once more
    assert all(np.array_equal(*pair) for pair in zip(everything(model, pixels), found, strict=True))


@pytest.mark.parametrize("platform", ["said", "not said"])
def test_gradients_are_those_of_the_model(platform: str) -> None:
    """Whether it is known while the program is traced that it is for a CPU, or later."""
    model, pixels = drawn(PER_LAYER)

    def slopes(model: Any) -> dict[str, Any]:
        return packing.unpacked(leaves(jax.jit(jax.grad(lambda model: jnp.sin(model(pixels).logits).sum()))(model)))

    with traced_for("cpu") if platform == "said" else nullcontext():
        expected = slopes(model)
        found = slopes(beit_jax.pack(model))
    for name, slope in expected.items():
        np.testing.assert_allclose(found[name], slope, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(slope).max())))


def test_it_is_written_as_it_was(tmp_path: Path) -> None:
    model, _ = drawn(PER_LAYER)
    expected = leaves(model)
    processor = beit_jax.preset("hf", size=PER_LAYER.image_size[0])
    beit_jax.save_pretrained(tmp_path / "native", beit_jax.pack(model), processor)
    written = beit_jax.load(tmp_path / "native").params
    assert written.keys() == expected.keys()
    assert all(np.array_equal(leaf, expected[name]) for name, leaf in written.items())


def test_nothing_is_packed_where_nothing_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_packed(model: Any) -> bool:
        return any(isinstance(leaf, calls.Packed) for leaf in leaves(beit_jax.pack(model)).values())

    assert not is_packed(drawn(PER_LAYER, dtype=jnp.bfloat16)[0])
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn(PER_LAYER)[0])
    assert not is_packed(rounded)
    model, pixels = drawn(PER_LAYER)
    traced = jax.jit(lambda model, pixels: beit_jax.pack(model)(pixels).logits)(model, pixels)  # kernels have no value
    np.testing.assert_allclose(traced, model(pixels).logits, rtol=0, atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(calls, "SMALLEST", 1000)
        assert not is_packed(model)
    monkeypatch.setenv(library.SWITCH, "off")
    assert not is_packed(model)


def digits() -> NativeCheckpoint:
    return read(resolve(str(files("beit_jax") / "digits")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arrays", ["ours", "not aligned", "read-only", "with gaps", "of bfloat16"])
def test_a_model_that_is_packed_while_it_is_read(kind: str, arrays: str, tmp_path: Path) -> None:
    config = replace(KINDS[kind], hidden_size=32, num_attention_heads=2, intermediate_size=40)
    model, pixels = drawn(config)
    beit_jax.save_pretrained(tmp_path / "native", model, beit_jax.preset("hf", size=config.image_size[0]))
    checkpoint = beit_jax.load(tmp_path / "native")
    given = checkpoint.params
    for name, leaf in given.items():
        if arrays == "not aligned":
            memory = np.empty(leaf.size + 17, np.float32)
            start = 1 + -memory.ctypes.data // 4 % 16
            given[name] = memory[start : start + leaf.size].reshape(leaf.shape)
            given[name][...] = leaf
        elif arrays == "with gaps":
            given[name] = np.repeat(leaf, 2, axis=-1)[..., ::2]
        elif arrays == "of bfloat16":
            given[name] = leaf.astype(jnp.bfloat16)
        leaf.flags.writeable = arrays != "read-only"
    before = {name: (leaf.ctypes.data, np.array(leaf, np.float32)) for name, leaf in given.items()}
    found = predict.build(checkpoint, packed=True)
    assert not given
    kernels = {name: leaf for name, leaf in leaves(found).items() if isinstance(leaf, calls.Packed)}
    assert len(kernels) == 4
    for name, leaf in leaves(found).items():
        np.testing.assert_array_equal(packing.unpacked({name: leaf})[name], before[name][1], err_msg=name)
        if name in kernels and np.prod(leaf.outputs) % library.columns() == 0:
            assert (leaf.panels.unsafe_buffer_pointer() == before[name][0]) == (arrays == "ours")
    whole = build_model(config, unflatten({name: jnp.asarray(leaf) for name, (_, leaf) in before.items()}))
    expected = everything(beit_jax.pack(whole), pixels)
    assert all(np.array_equal(*pair) for pair in zip(everything(found, pixels), expected, strict=True))


def test_from_pretrained_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(**options: Any) -> set[type]:
        model, _ = beit_jax.from_pretrained(str(files("beit_jax") / "digits"), packed=True, **options)
        return {type(leaf) for name, leaf in leaves(model).items() if "kernel" in name and "blocks" in name}

    assert kinds() == {calls.Packed}
    for options in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}):
        assert calls.Packed not in kinds(**options)
    monkeypatch.setenv(library.SWITCH, "off")
    assert calls.Packed not in kinds()


def test_the_predictor_of_many_images(tmp_path: Path) -> None:
    """With stored programs and without them; a program for packed kernels is another than one for arrays."""
    pixels = np.random.default_rng(0).standard_normal((2, *digits().config.image_size, 3)).astype(np.float32)
    expected = np.asarray(predict.forward(predict.build(digits()), pixels, "logits"))
    before = jax.config.values["jax_compilation_cache_dir"]
    found = [program_cache.predictor(digits(), many=True).compute(pixels, "logits")]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        for many in (False, True, True):
            found.append(program_cache.predictor(digits(), many=many).compute(pixels, "logits"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert len(list(tmp_path.glob("beit-jax/*.stablehlo"))) == 2
    for one in found:
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-5)
    assert np.array_equal(found[2], found[3])
