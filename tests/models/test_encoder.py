"""The models as JAX objects: transformations, precision, randomness, errors. tests/parity tests their values."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import BFLOAT16

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import MODELS, Model, abstract_model, build_model, param_shapes
from beit_jax.models.elementary import dropout
from beit_jax.tree import flatten, unflatten

CONFIG = BeitConfig(
    task="image_classification",
    image_size=(32, 32),
    patch_size=(8, 8),
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    position_bias="both",
    use_mask_token=True,
    labels=("a", "b", "c"),
)


def random_params(config: BeitConfig, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return unflatten(
        {n: jnp.asarray(rng.standard_normal(s), jnp.float32) * 0.2 for n, s in param_shapes(config).items()}
    )


def model(config: BeitConfig = CONFIG, **options: Any) -> Model:
    return build_model(config, random_params(config), **options)


def run(ours: Model, *inputs: Any, **options: Any) -> Any:
    """The output of the compiled model: outside of a program each of its operations is compiled by itself."""
    return jax.jit(lambda ours, *inputs: ours(*inputs, **options))(ours, *inputs)


PIXELS = np.random.default_rng(1).standard_normal((4, 32, 32, 3)).astype(np.float32)


def test_jit_grad_and_vmap_take_the_model_as_a_pytree() -> None:
    ours = model()
    plain = ours(PIXELS).logits
    assert np.allclose(run(ours, PIXELS).logits, plain, atol=1e-6)
    one_by_one = jax.jit(jax.vmap(lambda m, x: m(x[None]).logits[0], in_axes=(None, 0)))
    assert np.allclose(one_by_one(ours, PIXELS), plain, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda m: m(PIXELS, np.ones((4, 16), bool)).logits.sum()))(ours)
    leaves = flatten(nnx.to_pure_dict(nnx.state(gradient)))
    assert {name: leaf.shape for name, leaf in leaves.items()} == dict(param_shapes(CONFIG))
    # Every parameter takes part except the patch projection, whose patches are all masked here.
    silent = {name for name, leaf in leaves.items() if not np.abs(leaf).max() > 0}
    assert silent == {"beit/embeddings/patch_kernel", "beit/embeddings/patch_bias"}


def test_initialised_models_have_the_shapes_that_loading_expects() -> None:
    for task, kind in MODELS.items():
        config = replace(CONFIG, task=task, num_hidden_layers=4, out_indices=(0, 1, 2, 3))
        made = nnx.eval_shape(lambda kind=kind, config=config: kind(config, rngs=nnx.Rngs(0)))
        shapes = {name: leaf.shape for name, leaf in flatten(nnx.to_pure_dict(nnx.state(made))).items()}
        assert shapes == dict(param_shapes(config))


def test_layers_differ_after_initialisation() -> None:
    kernel = model_at_random().beit.blocks.attention.qkv_kernel[...]
    assert np.asarray(kernel).std(axis=0).min() > 0


def model_at_random() -> Any:
    return MODELS["image_classification"](CONFIG, rngs=nnx.Rngs(0))


def test_bfloat16_computes_near_float32_and_returns_float32() -> None:
    full, half = (run(model(dtype=dtype), PIXELS, output_attentions=True) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.logits.dtype == half.last_hidden_state.dtype == half.attentions.dtype == jnp.float32
    error = np.abs(half.logits - full.logits).max() / np.abs(full.logits).max()
    assert 0 < error <= BFLOAT16
    assert np.allclose(half.attentions.sum(axis=-1), 1.0, atol=1e-6)  # softmax stays in float32


def test_outputs_only_on_request() -> None:
    output = run(model(), PIXELS)
    assert output.hidden_states is None and output.attentions is None
    output = run(model(), PIXELS, output_hidden_states=True, output_attentions=True)
    assert output.hidden_states.shape == (4, 4, 17, 32) and output.attentions.shape == (3, 4, 4, 17, 17)


def test_taps_are_the_hidden_states_they_name() -> None:
    states = run(model(), PIXELS, output_hidden_states=True).hidden_states
    for taps in ((0,), (3,), (0, 3), (1, 2), (0, 1, 2, 3), (2,)):
        found = jax.jit(lambda m, x, taps=taps: m.beit(x, taps=taps).taps)(model(), PIXELS)
        assert np.allclose(found, states[np.array(taps)], atol=1e-6)
    for taps in ((2, 1), (1, 1), (4,), (-1, 2)):
        with pytest.raises(BeitJaxError, match=rf"taps.*{re.escape(str(list(taps)))}"):
            model().beit(PIXELS, taps=taps)


def test_taps_are_all_that_is_kept() -> None:
    """With two taps, the program of a deep model holds two states more than without taps, not one per block."""
    config = replace(CONFIG, num_hidden_layers=24, position_bias="none")
    deep = model(config)

    def temporary(taps: tuple[int, ...]) -> int:
        run = jax.jit(lambda m, x: (m.beit(x, taps=taps).taps, m.beit(x, taps=taps).last_hidden_state.sum()))
        return int(
            run.lower(deep, np.zeros((64, 32, 32, 3), np.float32)).compile().memory_analysis().temp_size_in_bytes
        )

    state = 64 * 17 * 32 * 4
    assert temporary((5, 24)) - temporary(()) <= 6 * state


def test_masked_patches_do_not_show_their_pixels() -> None:
    mask = np.zeros((4, 16), bool)
    mask[:, 5] = True
    changed = PIXELS.copy()
    changed[:, 8:16, 8:16] += 1.0  # patch 5: row 1, column 1
    ours, forward = model(), jax.jit(lambda ours, *inputs: ours(*inputs).logits)
    assert np.array_equal(forward(ours, PIXELS, mask), forward(ours, changed, mask))
    assert not np.allclose(forward(ours, PIXELS), forward(ours, changed))


def test_any_input_size_and_its_batch_independence() -> None:
    wide = np.random.default_rng(2).standard_normal((2, 16, 56, 3)).astype(np.float32)
    assert np.allclose(run(model(), wide).logits[1], run(model(), wide[1:]).logits[0], atol=1e-6)


def test_randomness_needs_a_key_and_repeats_with_it() -> None:
    config = replace(CONFIG, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.5)
    ours = model(config)
    assert np.array_equal(run(ours, PIXELS).logits, run(model(), PIXELS).logits)
    drawn = jax.jit(lambda key: ours(PIXELS, key=key).logits)
    first, again, other = (drawn(jax.random.key(k)) for k in (0, 0, 1))
    assert np.array_equal(first, again) and not np.allclose(first, other)


def test_stochastic_depth_drops_whole_samples_of_the_last_block_most() -> None:
    """At rate 1 - 1e-6 for the last block, its output equals its input; the first block never drops."""
    config = replace(CONFIG, drop_path_rate=1 - 1e-6)
    states = run(model(config), PIXELS, key=jax.random.key(0), output_hidden_states=True).hidden_states
    kept = run(model(config), PIXELS, output_hidden_states=True).hidden_states
    assert np.array_equal(states[3], states[2])
    assert np.allclose(states[1], kept[1], atol=1e-6)


def test_dropout_keeps_the_mean_and_drops_per_sample() -> None:
    x = jnp.ones((4000, 3, 2))
    elements = dropout(x, 0.25, jax.random.key(0))
    assert abs(float((elements == 0).mean()) - 0.25) < 0.01 and abs(float(elements.mean()) - 1.0) < 0.01
    samples = np.asarray(dropout(x, 0.25, jax.random.key(0), per_sample=True)).reshape(4000, -1)
    assert ((samples == 0).all(axis=1) | (samples == np.float32(1 / 0.75)).all(axis=1)).all()
    assert abs((samples == 0).mean() - 0.25) < 0.03


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((1, 3, 32, 32), None, r"pixel_values: expected \[batch, height, width, 3\], found \[1, 3, 32, 32\]"),
        ((32, 32, 3), None, "pixel_values: expected"),
        ((1, 30, 32, 3), None, r"\(30, 32\) are not multiples of the patch \(8, 8\), as \(32, 32\) would be"),
        ((1, 0, 32, 3), None, "are not multiples"),
        ((1, 32, 32, 3), (1, 17), r"bool_masked_pos: expected shape \(1, 16\) \(batch, patches\), found \(1, 17\)"),
    ],
)
def test_wrong_inputs_are_named(shape: tuple[int, ...], mask: tuple[int, ...] | None, message: str) -> None:
    # Called without the runtime shape checks of the tests, as users call it.
    kind = MODELS[CONFIG.task].__call__.__wrapped__ if hasattr(MODELS[CONFIG.task].__call__, "__wrapped__") else None
    call = kind or MODELS[CONFIG.task].__call__
    with pytest.raises((BeitJaxError, TypeError)) as error:
        call(model(), np.zeros(shape, np.float32), None if mask is None else np.zeros(mask, bool))
    if isinstance(error.value, BeitJaxError):
        error.match(message)


def test_a_mask_for_a_model_without_mask_token_is_refused() -> None:
    config = replace(CONFIG, use_mask_token=False)
    with pytest.raises(BeitJaxError, match=r"bool_masked_pos.*use_mask_token"):
        model(config)(PIXELS, np.ones((4, 16), bool))


def test_classifier_without_labels_returns_the_pooled_features() -> None:
    output = run(model(replace(CONFIG, labels=())), PIXELS)
    assert np.array_equal(output.logits, output.pooler_output)


def test_abstract_model_holds_no_memory() -> None:
    _, shapes = abstract_model(CONFIG)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
