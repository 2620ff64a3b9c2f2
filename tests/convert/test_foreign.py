"""Files that other libraries wrote (`foreign/make.py`) give the logits that these libraries computed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from beit_jax.convert import Options, load
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
}
_logits = jax.jit(lambda model, pixel_values: model(pixel_values).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_library(kind: str) -> None:
    source, logits, options = KINDS[kind]
    checkpoint, expected = load(resolve(FOREIGN / source), options), np.load(FOREIGN / logits)
    model = build_model(checkpoint.config, unflatten(dict(checkpoint.params)))
    found = np.asarray(_logits(model, np.load(FOREIGN / "images.npy")))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
