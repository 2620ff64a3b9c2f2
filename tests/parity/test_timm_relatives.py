"""Relatives of BEiT in timm, made tiny: the same logits, and exports that timm loads strictly; or refused by name.

Run with ``pytest -m timm`` where timm is installed.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch

from beit_jax.config import BeitConfig
from beit_jax.convert import Options, export, load
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.models.build import build_model
from beit_jax.tree import unflatten
from beit_jax.weights.native import NativeCheckpoint

timm = pytest.importorskip("timm", reason="timm is not installed; see pyproject.toml, extra timm")
torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings("ignore")]  # the reference warns of its own code

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
IMAGES = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
FAMILIES = ("vit_*", "deit*", "eva*", "flexivit*", "beit3*", "samvit*")


def tiny(name: str, **options: Any) -> Any:
    model = timm.create_model(name, **SIZE | options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(draw * (0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5))
    return model


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).numpy()


COMPILED: dict[BeitConfig, Any] = {}


def computed(checkpoint: NativeCheckpoint) -> np.ndarray:
    """The logits here; models of one configuration share a program."""
    config = replace(checkpoint.config, labels=tuple("abcde"))
    if config not in COMPILED:
        COMPILED[config] = jax.jit(lambda params: build_model(config, params)(IMAGES).logits)
    return np.asarray(COMPILED[config](unflatten(dict(checkpoint.params))))


def assert_same(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert found.shape == expected.shape, what
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), what


@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_224", "deit_base_patch16_224", "deit3_base_patch16_224", "eva_large_patch14_196",
     "vit_base_patch14_dinov2", "beit3_base_patch16_224", "beit3_giant_patch14_336", "eva_giant_patch14_224"],
)  # fmt: skip
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """By timm's directory and by the weights alone; the export by ``create_model`` and by ``load_state_dict``."""
    theirs = tiny(name, mlp_ratio=2)
    expected = logits(theirs)
    timm.models.save_for_hf(theirs, tmp_path / "saved")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    checkpoint = load(resolve(tmp_path / "saved"))
    assert_same(computed(checkpoint), expected, name)
    assert_same(computed(load(resolve(tmp_path / "weights.pth"), Options(num_heads=2))), expected, name)
    assert export(checkpoint, tmp_path / "out", "timm") == []
    assert np.array_equal(logits(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()), expected)
    again = tiny("vit_base_patch16_224" if name.startswith("deit3") else name, mlp_ratio=2, **layer_scale(name))
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "out/model.safetensors"), strict=True)
    assert np.array_equal(logits(again), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"img_size": (16, 24)},
        {"img_size": (16, 24), "no_embed_class": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
    ],
)
def test_what_shapes_do_not_say_is_timm_s(options: dict[str, Any], tmp_path: Path) -> None:
    """4x6 patches and a class token are 25 rows, as 5x5 patches are; norms within branches have ViT's epsilon."""
    theirs = tiny("vit_base_patch16_224", **options)
    timm.models.save_for_hf(theirs, tmp_path / "saved")
    checkpoint = load(resolve(tmp_path / "saved"), Options(image_preset="hf"))
    images = np.random.default_rng(1).standard_normal((2, *checkpoint.config.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    found = jax.jit(lambda params: build_model(checkpoint.config, params)(images).logits)
    assert_same(np.asarray(found(unflatten(dict(checkpoint.params)))), expected, str(options))
    assert checkpoint.config.layer_norm_eps == theirs.norm.eps


def layer_scale(name: str) -> dict[str, float]:
    """deit3's export has a position for its class token, as the plain ViT has, and layer scale."""
    return {"init_values": 1e-6} if name.startswith("deit3") else {}


@pytest.mark.thorough
def test_every_relative_is_read_right_or_refused(tmp_path: Path) -> None:
    """All of timm's that can be built so small: no logits but timm's own, and no error but one line."""
    read, refused = [], []
    for name in sorted({name for family in FAMILIES for name in timm.list_models(family)}):
        try:
            theirs = tiny(name)
            expected = logits(theirs)
        except (AssertionError, RuntimeError, TypeError, ValueError):
            continue  # of a fixed size, or without one of the arguments
        directory = tmp_path / name
        timm.models.save_for_hf(theirs, directory)
        try:
            checkpoint = load(resolve(directory), Options(image_preset="hf"))
        except BeitJaxError as error:
            refused.append(name)
            assert "\n" not in str(error) and str(directory) in str(error)
            continue
        read.append(name)
        assert_same(computed(checkpoint), expected, name)
        assert json.loads((directory / "config.json").read_text())["architecture"] == name
    assert len(read) > 40 and len(refused) > 100
