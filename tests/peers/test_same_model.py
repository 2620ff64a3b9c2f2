"""One model for all: drawn so that activations keep their size, resized, written in every layout that can have it."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TINY, checkpoint

from beit_jax.convert import importer
from beit_jax.convert.options import Options
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import param_shapes
from beit_jax.peers.same_model import at_size, drawn, inputs, write
from beit_jax.weights.native import load

DIGITS = Path(str(files("beit_jax") / "digits"))


def test_every_parameter_is_drawn_with_unit_gain() -> None:
    config = replace(TINY, hidden_size=64, intermediate_size=256)
    params = drawn(config, np.random.default_rng(0)).params
    assert {name: leaf.shape for name, leaf in params.items()} == param_shapes(config)
    assert all(np.any(leaf) and leaf.dtype == np.float32 for leaf in params.values())
    x = np.random.default_rng(1).standard_normal((100, 64), np.float32)
    qkv, up = params["beit/blocks/attention/qkv_kernel"][0], params["beit/blocks/mlp/fc1/kernel"][0]
    assert 0.9 < np.std(np.einsum("nd,d...->n...", x, qkv)) < 1.1 and 0.9 < np.std(x @ up) < 1.1


def test_another_size_is_what_conversion_makes_of_it() -> None:
    found = at_size(importer.load(DIGITS), 16)
    expected = importer.load(DIGITS, Options(image_size=16))
    assert found.config.image_size == expected.config.image_size == (16, 16)
    assert found.params.keys() == expected.params.keys()
    for name, leaf in expected.params.items():
        np.testing.assert_array_equal(found.params[name], leaf, err_msg=name)
    with pytest.raises(BeitJaxError, match="not a multiple of patch_size"):
        at_size(found, 17)


def test_parameters_become_float32() -> None:
    import ml_dtypes

    half = checkpoint(TINY)
    half = replace(half, params={name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in half.params.items()})
    assert {leaf.dtype for leaf in at_size(half, None).params.values()} == {np.dtype(np.float32)}


def test_a_layout_that_cannot_have_the_model_says_why(tmp_path: Path) -> None:
    model = checkpoint(replace(TINY, problem_type="regression"))
    refused = write(model, tmp_path, ["hf", "mmpretrain"])
    assert list(refused) == ["mmpretrain"] and "\n" not in refused["mmpretrain"]
    assert load(tmp_path / "native").config == model.config and (tmp_path / "hf" / "config.json").exists()


def test_pixels_are_those_of_the_images() -> None:
    found = inputs(replace(TINY, num_channels=4), 3, np.random.default_rng(0))
    assert found["pixels"].shape == (3, 32, 32, 4) and found["pixels"].dtype == np.float32
    assert -1 <= found["pixels"].min() < -0.9 and 0.9 < found["pixels"].max() <= 1
    np.testing.assert_allclose(found["image"] / 127.5 - 1, found["pixels"], atol=1e-6)
