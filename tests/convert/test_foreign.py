"""Files that other libraries wrote (`foreign/make.py`) give the logits that these libraries computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.cli.main import main
from beit_jax.convert import Options, load
from beit_jax.convert.files.checkpoint import open_checkpoint
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
    "tf_model.h5 in shards": ("tensorflow_shards", "tensorflow_shards/logits.npy", Options()),
    "Keras 3's archive": ("keras3/beit.keras", "keras3/logits.npy", Options()),
    "Keras 2's archive": ("keras2/beit.keras", "keras2/beit.keras.npy", Options()),
    "a whole model of Keras 2": ("keras2/vit.h5", "keras2/vit.h5.npy", Options()),
    "CAE, fine-tuned": ("cae/classifier.pth", "cae/classifier.npy", Options()),
    "Paddle, CAE": ("paddle/cae.pdparams", "paddle/cae.npy", Options()),
    "Paddle, protocol 2": ("paddle/protocol2.pdparams", "paddle/token.npy", Options()),
    "Paddle, safetensors": ("paddle/paddle.safetensors", "paddle/token.npy", Options()),
    "Paddle, bfloat16 within a training's entries": ("paddle/bfloat16.pdparams", "paddle/bfloat16.npy", Options()),
    "Paddle, BEiTv2": ("paddle/BEiTv2.pdparams", "paddle/BEiTv2.npy", Options()),
    "Paddle, CAE of the foundation models": ("paddle/CAE.pdparams", "paddle/CAE.npy", Options()),
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
    if any(word in source for word in ("h5", "keras", "shards")):
        pytest.importorskip("h5py")
    assert_equal(computed(source, options, lambda model: model(IMAGES).logits), logits)


def test_pre_training_of_mmpretrain() -> None:
    mask = np.load(FOREIGN / "mmpretrain/mask.npy")
    found = computed("mmpretrain/mim.pth", DEFAULT, lambda model: model(IMAGES, mask).logits)
    assert_equal(found[None], "mmpretrain/mim.npy")
    both = computed("mmpretrain/mim_v2.pth", DEFAULT, lambda model: predictions(model, mask))
    assert_equal(both, "mmpretrain/mim_v2.npy")


@pytest.mark.parametrize("head", ["shared", "own"])
def test_pre_training_of_beit_v2(head: str, tmp_path: Path) -> None:
    """Both predictions are those of the original's code; an export goes back bit for bit, and so do its predictions."""
    mask, source = np.load(FOREIGN / "beitv2/mask.npy"), f"beitv2/{head}.pth"
    assert_equal(computed(source, DEFAULT, lambda model: predictions(model, mask)), f"beitv2/{head}.npy")
    first = load(resolve(FOREIGN / source))
    assert first.config.own_aggregation_head == (head == "own")
    native, exported = tmp_path / "native", tmp_path / "exported"
    assert main(["convert", str(FOREIGN / source), str(native)]) == 0
    assert main(["export", str(native), str(exported), "--to", "original"]) == 0
    with open_checkpoint(FOREIGN / source) as theirs, open_checkpoint(exported / "checkpoint.pth") as ours:
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(np.array_equal(ours.read(name), theirs.read(name)) for name in theirs.tensors)
    back = load(resolve(exported / "checkpoint.pth"))
    assert back.config == first.config


def predictions(model: Any, mask: np.ndarray) -> jax.Array:
    """Those of the last block, and those behind BEiT v2's extra blocks."""
    found = model(IMAGES, mask, aggregate=True)
    return jnp.stack([found.logits, found.aggregated_logits])


def test_encoders_of_cae() -> None:
    """Its pre-training, and a probe whose pooling is not BEiT's: the class token behind the last norm."""
    heads = Options(num_heads=2)
    states = computed("cae/pretrained.pth", heads, lambda model: model(IMAGES).last_hidden_state)
    assert_equal(states, "cae/encoder.npy")
    states = computed("cae/attentive.pth", heads, lambda model: model(IMAGES).last_hidden_state)
    assert_equal(states[:, 0], "cae/attentive.npy")


@pytest.mark.parametrize(
    ("file", "kind", "parts"),
    [
        ("pretrained", "CAE pre-training", "alignment_encoder (21), decoder (19), mask_token (1), rd_pos_embed (1), "
                                           "regresser (23)"),
        ("attentive", "CAE, attentive probe", "attentive_blocks (13), fc_norm (3), head (2), query_token (1)"),
        ("classifier", "CAE, fine-tuned", ""),
    ],
)  # fmt: skip
def test_cae_is_called_so(file: str, kind: str, parts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(FOREIGN / f"cae/{file}.pth"), "--num-heads", "2"]) == 0
    told = capsys.readouterr().out
    assert kind in told and parts in told
    assert "mean (0.485, 0.456, 0.406)" in told  # as the training's settings say


def test_segmentation_of_tensorflow() -> None:
    found = computed("tensorflow_segmentation", DEFAULT, lambda model: model(IMAGES).logits)
    assert_equal(found.transpose(0, 3, 1, 2), "tensorflow_segmentation/logits.npy")


def test_segmentation_of_mmsegmentation() -> None:
    found = computed("mmseg/upernet.pth", DEFAULT, lambda model: model(IMAGES).logits)
    assert_equal(found.transpose(0, 3, 1, 2), "mmseg/logits.npy")
