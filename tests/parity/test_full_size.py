"""Every released configuration at its full size against transformers: minutes of computing, so only by name.

Run with ``pytest -m slow``.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from tolerances import MODEL

from beit_jax.convert import load
from beit_jax.hub import resolve
from beit_jax.models.build import build_model
from beit_jax.tree import unflatten
from beit_jax.variants import VARIANTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "ade20k" not in name])
def test_released_configuration(variant: str, tmp_path: Path) -> None:
    config = replace(VARIANTS[variant], layer_norm_eps=1e-12)
    options = {
        key: value
        for key, value in config.to_hf().items()
        if key not in ("beit_jax", "architectures", "model_type")
        and (config.model_type == "beit" or key != "vocab_size")
    }
    if "id2label" in options:  # transformers wants the keys as numbers in memory
        options["id2label"] = {int(i): label for i, label in options["id2label"].items()}
    theirs = reference.random_model(config.model_type, config.task, scale=0.1, **options)
    if config.layer_scale_init_value == 0:  # draw the branches as small as layer scale makes them in the other models
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith(("o_proj.weight", "fc2.weight")):
                    parameter.mul_(0.1)
    reference.save(theirs, tmp_path)
    checkpoint = load(resolve(tmp_path))
    assert replace(checkpoint.config, position_resize=config.position_resize) == config
    pixel_values = reference.pixels(theirs, batch=1)
    masked = reference.mask(theirs, pixel_values) if config.task == "masked_image_modeling" else None
    expected = reference.run(theirs, pixel_values, masked)
    run: Callable[..., object] = jax.jit(lambda model, pixels, mask: model(pixels, mask, output_hidden_states=True))
    found = run(build_model(checkpoint.config, unflatten(dict(checkpoint.params))), pixel_values, masked)
    for ours, reference_state in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_allclose(ours, reference_state, rtol=0.0, atol=MODEL)
    if "logits" in expected:
        assert np.abs(found.logits).max() > 1.0
        assert_allclose(found.logits, expected.logits, rtol=0.0, atol=MODEL)
