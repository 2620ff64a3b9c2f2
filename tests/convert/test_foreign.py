"""Files that other libraries wrote (`foreign/make.py`) give the logits that these libraries computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.convert import Options, load
from beit_jax.convert.options import DEFAULT
from beit_jax.hub import resolve
from beit_jax.models.build import build_model
from beit_jax.tree import unflatten

FOREIGN = Path(__file__).parent / "foreign"

KINDS: dict[str, tuple[str, str, Options]] = {
    "Lightning": ("lightning/last.ckpt", "lightning/logits.npy", Options()),
    "accelerate": ("accelerate/state", "accelerate/logits.npy", Options(config=FOREIGN / "accelerate/config.json")),
    "Trainer": ("trainer", "trainer/checkpoint-2.npy", Options()),
    "Trainer, the best": ("trainer", "trainer/checkpoint-1.npy", Options(checkpoint="best")),
    "Trainer, step 1": ("trainer", "trainer/checkpoint-1.npy", Options(checkpoint="1")),
    "torch.distributed.checkpoint": ("distributed/step_7", "distributed/logits.npy", Options()),
    "TensorFlow's names in safetensors": ("tensorflow/safetensors", "tensorflow/logits.npy", Options()),
    "tf_model.h5": ("tensorflow/h5", "tensorflow/logits.npy", Options()),
    "keras_cv_attention_models": ("kecam/beit.h5", "kecam/logits.npy", Options()),
    "mmpretrain, mean of the patches": ("mmpretrain/mean.pth", "mmpretrain/mean.npy", Options()),
    "mmpretrain, class token": ("mmpretrain/token.pth", "mmpretrain/token_raw.npy", Options(weights="raw")),
    "mmpretrain, moving average": ("mmpretrain/token.pth", "mmpretrain/token_ema.npy", Options(weights="ema")),
}


def computed(source: str, options: Options, output: Callable[[Any], Any]) -> np.ndarray:
    """What `output` gives of the model."""
    checkpoint = load(resolve(FOREIGN / source), options)
    return np.asarray(jax.jit(output)(build_model(checkpoint.config, unflatten(dict(checkpoint.params)))))


def assert_equal(found: np.ndarray, logits: str) -> None:
    expected = np.load(FOREIGN / logits)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


IMAGES = np.load(FOREIGN / "images.npy")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_library(kind: str) -> None:
    source, logits, options = KINDS[kind]
    if "h5" in source:
        pytest.importorskip("h5py")
    assert_equal(computed(source, options, lambda model: model(IMAGES).logits), logits)


def test_pre_training_of_mmpretrain() -> None:
    mask = np.load(FOREIGN / "mmpretrain/mask.npy")
    found = computed("mmpretrain/mim.pth", DEFAULT, lambda model: model(IMAGES, mask).logits)
    assert_equal(found[None], "mmpretrain/mim.npy")
    both = computed("mmpretrain/mim_v2.pth", DEFAULT, lambda model: predictions(model, mask))
    assert_equal(both, "mmpretrain/mim_v2.npy")


def predictions(model: Any, mask: np.ndarray) -> jax.Array:
    """Those of the last block, and those behind BEiT v2's extra blocks."""
    found = model(IMAGES, mask, aggregate=True)
    return jnp.stack([found.logits, found.aggregated_logits])


def test_segmentation_of_mmsegmentation() -> None:
    found = computed("mmseg/upernet.pth", DEFAULT, lambda model: model(IMAGES).logits)
    assert_equal(found.transpose(0, 3, 1, 2), "mmseg/logits.npy")
