"""Step one of parity: the same outputs as transformers, on random weights, for every combination of options."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import jax
import numpy as np
import pytest
import reference
import torch
from cases import pairwise
from numpy.testing import assert_allclose
from tolerances import MODEL

from beit_jax.models.build import Model
from beit_jax.models.interface import BeitOutput

Converted = Callable[[torch.nn.Module], Model]


def run(model: Model, *arguments: Any, **options: Any) -> BeitOutput:
    return jax.jit(lambda model, *arguments: model(*arguments, **options))(model, *arguments)


def assert_same(found: BeitOutput, expected: Any, *, pooled: bool = False) -> None:
    """Every field that the reference fills, within the tolerance of a float32 model."""
    close = {"rtol": 0.0, "atol": MODEL}
    assert len(found.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_allclose(ours, theirs, **close)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert_allclose(ours, theirs, **close)
    if "logits" in expected:
        assert_allclose(found.logits, expected.logits, **close)
    else:
        assert_allclose(found.last_hidden_state, expected.last_hidden_state, **close)
        assert (found.pooler_output is None) == (expected.pooler_output is None)
        if pooled:
            assert_allclose(found.pooler_output, expected.pooler_output, **close)


def every(*values: Sequence[Any]) -> list[Any]:
    """All combinations; those in which every two values meet are compiled as users compile too."""
    met = pairwise(*values)
    return [pytest.param(*case, marks=pytest.mark.compiled if case in met else ()) for case in product(*values)]


BIAS, POOLING = list(reference.BIAS), (True, False)  # the mean, the class token


@pytest.mark.parametrize(("bias", "positions", "scale", "pooling"), every(BIAS, (False, True), (0.0, 0.1), POOLING))
def test_every_combination_of_options(
    converted: Converted, bias: str, positions: bool, scale: float, pooling: bool
) -> None:
    options = reference.TINY | reference.BIAS[bias] | {
        "use_absolute_position_embeddings": positions,
        "layer_scale_init_value": scale,
        "use_mean_pooling": pooling,
        "use_mask_token": positions,
        "num_labels": 5,
    }  # fmt: skip
    theirs = reference.random_model(**options)
    pixel_values = reference.pixels(theirs)
    masked = reference.mask(theirs, pixel_values) if positions else None
    found = run(converted(theirs), pixel_values, masked, output_hidden_states=True, output_attentions=True)
    assert np.abs(found.logits).max() > 0.3
    if masked is None:
        assert_same(found, reference.run(theirs, pixel_values))
    else:  # transformers' classifier takes no mask; its encoder does
        expected = reference.run(theirs.beit, pixel_values, masked)
        assert_allclose(found.pooler_output, expected.pooler_output, rtol=0.0, atol=MODEL)
        assert_allclose(found.last_hidden_state, expected.last_hidden_state, rtol=0.0, atol=MODEL)


@pytest.mark.parametrize(("bias", "pooling"), every(BIAS, POOLING))
def test_masked_image_modelling(converted: Converted, bias: str, pooling: bool) -> None:
    options = reference.TINY | reference.BIAS[bias] | {"use_mask_token": True, "use_mean_pooling": pooling}
    theirs = reference.random_model(task="masked_image_modeling", **options)
    pixel_values = reference.pixels(theirs)
    masked = reference.mask(theirs, pixel_values)
    found = run(converted(theirs), pixel_values, masked, output_hidden_states=True, output_attentions=True)
    assert_same(found, reference.run(theirs, pixel_values, masked))


@pytest.mark.parametrize(("bias", "task", "pooling"), every(BIAS, ("features", "image_classification"), POOLING))
def test_data2vec(converted: Converted, bias: str, task: str, pooling: bool) -> None:
    options = {k: v for k, v in reference.TINY.items() if k != "vocab_size"} | reference.BIAS[bias]
    theirs = reference.random_model("data2vec-vision", task, use_mean_pooling=pooling, num_labels=3, **options)
    pixel_values = reference.pixels(theirs)
    found = run(converted(theirs), pixel_values, output_hidden_states=True, output_attentions=True)
    assert_same(found, reference.run(theirs, pixel_values))


@pytest.mark.compiled
@pytest.mark.parametrize("pooling", POOLING)
def test_bare_encoder(converted: Converted, pooling: bool) -> None:
    theirs = reference.random_model(
        task="features", use_mean_pooling=pooling, **reference.TINY, **reference.BIAS["both"]
    )
    pixel_values = reference.pixels(theirs)
    found = run(converted(theirs), pixel_values, output_hidden_states=True, output_attentions=True)
    assert_same(found, reference.run(theirs, pixel_values), pooled=True)
    # A model that pools the mean leaves its last state un-normalised; one that pools the class token normalises it.
    assert np.array_equal(found.last_hidden_state, found.hidden_states[-1]) == pooling


@pytest.mark.parametrize(("size", "bias"), every([(48, 48), (24, 40), (16, 16)], ["both", "none"]))
def test_other_input_sizes(converted: Converted, size: tuple[int, int], bias: str) -> None:
    options = reference.TINY | reference.BIAS[bias] | {"use_absolute_position_embeddings": bias == "none"}
    theirs = reference.random_model(**options)
    pixel_values = reference.pixels(theirs, size=size)
    found = run(converted(theirs), pixel_values, output_hidden_states=True, output_attentions=True)
    assert_same(found, reference.run(theirs, pixel_values))


@pytest.mark.compiled
def test_non_square_native_size(converted: Converted) -> None:
    """Against transformers with its bias replaced by the definition, pair by pair.

    transformers itself reads the table of a non-square configuration with height and width exchanged (5.23,
    `BeitRelativePositionBias.forward`, ``reshape(1, old_width, old_height, -1)``).
    """
    rows, columns = 2, 5
    theirs = reference.random_model(**reference.TINY | {"image_size": [16, 40]}, **reference.BIAS["shared"])
    table = theirs.beit.shared_position_bias.relative_position_bias_table.detach()
    bias = torch.empty(1, table.shape[1], 1 + rows * columns, 1 + rows * columns)
    bias[0, :, 0, :], bias[0, :, :, 0], bias[0, :, 0, 0] = table[-3, :, None], table[-2, :, None], table[-1]
    for q, k in product(product(range(rows), range(columns)), repeat=2):
        offset = (q[0] - k[0] + rows - 1) * (2 * columns - 1) + (q[1] - k[1] + columns - 1)
        bias[0, :, 1 + q[0] * columns + q[1], 1 + k[0] * columns + k[1]] = table[offset]
    theirs.beit.shared_position_bias.forward = lambda *window, **options: bias
    pixel_values = reference.pixels(theirs)
    found = run(converted(theirs), pixel_values, output_hidden_states=True, output_attentions=True)
    assert_same(found, reference.run(theirs, pixel_values))


@pytest.mark.compiled
def test_greyscale_and_other_activation(converted: Converted) -> None:
    theirs = reference.random_model(num_channels=1, hidden_act="gelu_pytorch_tanh", **reference.TINY)
    pixel_values = reference.pixels(theirs)
    found = run(converted(theirs), pixel_values, output_hidden_states=True, output_attentions=True)
    assert_same(found, reference.run(theirs, pixel_values))


@pytest.mark.compiled
@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 1e-2])
def test_layer_norm_epsilon_is_the_sources(converted: Converted, epsilon: float) -> None:
    theirs = reference.random_model(layer_norm_eps=epsilon, **reference.TINY)
    pixel_values = reference.pixels(theirs) * 1e-2  # small activations, where epsilon matters
    found = run(converted(theirs), pixel_values, output_hidden_states=True, output_attentions=True)
    assert_same(found, reference.run(theirs, pixel_values))


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("masked_image_modeling", reference.BIAS["shared"] | {"use_mask_token": True}),
        ("image_classification", reference.BIAS["per_layer"] | {"num_labels": 1000}),
    ],
)
def test_base_size(converted: Converted, task: str, options: dict[str, Any]) -> None:
    """BEiT-base as published, 224 x 224: all 13 hidden states and the logits."""
    theirs = reference.random_model(task=task, scale=0.1, **options)
    pixel_values = reference.pixels(theirs, batch=1)
    masked = reference.mask(theirs, pixel_values) if task == "masked_image_modeling" else None
    found = run(converted(theirs), pixel_values, masked, output_hidden_states=True, output_attentions=True)
    assert np.abs(found.logits).max() > 2.0
    assert_same(found, reference.run(theirs, pixel_values, masked))
