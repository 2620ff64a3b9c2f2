"""Which parameters decay, how fast each layer learns, and the arithmetic of clipping, AdamW and averages."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bits import same_bits
from hypothesis import given
from hypothesis import strategies as st

from beit_jax.config import BeitConfig, Task
from beit_jax.errors import BeitJaxError
from beit_jax.kernels.cpu import calls, library
from beit_jax.models.build import abstract_model, statistics
from beit_jax.models.one_cpu import traced_for
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.step.optim import (
    adam,
    clip_by_global_norm,
    ema_update,
    layer_scales,
    moved,
    optimizer,
    weight_decay_mask,
)  # fmt: skip
from beit_jax.train.step.schedule import SPAN, correction_tables
from beit_jax.tree import Nested, flatten, unflatten
from beit_jax.variants import VARIANTS

SMALL = BeitConfig(
    task="image_classification", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
    image_size=(16, 16), patch_size=(8, 8), position_bias="both", use_absolute_position_embeddings=True,
    use_mask_token=True, labels=("a", "b"),
)  # fmt: skip
TASKS: dict[Task, BeitConfig] = {
    "image_classification": SMALL,
    "masked_image_modeling": replace(SMALL, task="masked_image_modeling", pooling="cls"),
    "features": replace(SMALL, task="features"),
    "backbone": replace(SMALL, task="backbone", out_indices=(0, 2)),
    "semantic_segmentation": replace(
        SMALL, task="semantic_segmentation", num_hidden_layers=4, out_indices=(0, 1, 2, 3), auxiliary_num_convs=2,
        auxiliary_concat_input=True,
    ),
}  # fmt: skip


def learned(config: BeitConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: leaf for name, leaf in flatten(abstract_model(config)[1]).items() if name not in statistics(config)}


def original_decays(name: str, ndim: int) -> bool:
    """The original's rule: it sees one parameter per layer, its biases are vectors, and two names are exempt."""
    if name.startswith(("blocks/", "beit/blocks/")):
        ndim -= 1
    if name.endswith(("q_bias", "v_bias")):  # one vector there, heads by head_dim here
        ndim = 1
    return ndim != 1 and not name.endswith(("cls_token", "position_embeddings"))


CONFIGS = {**TASKS, **VARIANTS}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_decays_is_what_decays_in_the_original(name: str) -> None:
    params = learned(CONFIGS[name])
    mask = flatten(weight_decay_mask(unflatten(params)))
    assert mask == {name: original_decays(name, leaf.ndim) for name, leaf in params.items()}
    assert set(mask.values()) == {True, False}


def test_examples_of_decay() -> None:
    mask = flatten(weight_decay_mask(unflatten(learned(SMALL))))
    decaying = {name for name, decays in mask.items() if decays}
    assert decaying == {
        "beit/embeddings/patch_kernel", "beit/embeddings/mask_token", "beit/shared_bias_table", "classifier/kernel",
        "beit/blocks/attention/qkv_kernel", "beit/blocks/attention/out_kernel", "beit/blocks/attention/bias_table",
        "beit/blocks/mlp/fc1/kernel", "beit/blocks/mlp/fc2/kernel",
    }  # fmt: skip


def test_tables_of_blocks_may_be_exempt_and_no_other() -> None:
    params = unflatten(learned(SMALL))
    all_of_them, exempt = (flatten(weight_decay_mask(params, bias_tables=tables)) for tables in (True, False))
    assert {name for name in exempt if exempt[name] != all_of_them[name]} == {"beit/blocks/attention/bias_table"}


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(BeitJaxError, match="head/temperature: none of 3 rules"):
        weight_decay_mask({"head": {"temperature": np.zeros(())}})


def test_golden_shares_of_the_base_model() -> None:
    """Decay 0.65 of BEiT-base: .003697 ... .65, 1.0, as the original prints them."""
    config = VARIANTS["beit_base_patch16_224"]
    shares = flatten(layer_scales(unflatten(learned(config)), config, 0.65))
    blocks = shares["beit/blocks/mlp/fc1/kernel"]
    assert blocks.shape == (12, 1, 1) and blocks.dtype == np.float32
    assert shares["beit/embeddings/cls_token"] == pytest.approx(0.003697, abs=5e-7)
    assert blocks[-1, 0, 0] == np.float32(0.65)
    np.testing.assert_allclose(blocks[1:] / blocks[:-1], 1 / 0.65, rtol=1e-6)
    assert blocks[0, 0, 0] * np.float32(0.65) == pytest.approx(shares["beit/embeddings/patch_kernel"])


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_learns_as_fast_as_its_layer(task: Task) -> None:
    config = TASKS[task]
    depth = config.num_hidden_layers
    params = learned(config)
    shares = flatten(layer_scales(unflatten(params), config, 0.5))
    for name, leaf in params.items():
        parts = name.removeprefix("beit/").split("/")
        if parts[0] == "blocks":
            expected = 0.5 ** np.arange(depth, 0, -1.0).reshape(depth, *[1] * (leaf.ndim - 1))
        else:  # the shared table, norms and all heads learn at the full rate
            expected = np.asarray(0.5 ** (depth + 1) if parts[0] == "embeddings" else 1.0)
        assert np.array_equal(shares[name], expected) and np.shape(shares[name]) == expected.shape, name


def drawn(config: BeitConfig, seed: int, scale: float = 1.0) -> Nested:
    rng = np.random.default_rng(seed)
    return unflatten(
        {name: scale * rng.standard_normal(leaf.shape, np.float32) for name, leaf in learned(config).items()}
    )


@pytest.mark.parametrize(("norm", "largest"), [(5.0, 1.0), (5e-3, 1.0), (5e-3, 1e-3), (1.0, 1.0)])
def test_clipping_is_torchs(norm: float, largest: float) -> None:
    """Where norms are small, its 1e-6 shows: 2e-4 of the third result."""
    gradients = {"a": np.array([0.6, 0.8], np.float32) * np.float32(norm), "b": np.zeros((2, 2), np.float32)}
    clipped, _ = clip_by_global_norm(largest).update(gradients, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], gradients["a"] * min(1.0, largest / (norm + 1e-6)), rtol=3e-7)
    assert not np.asarray(clipped["b"]).any()


def test_three_steps_of_adamw_written_out() -> None:
    """In float64, leaf by leaf: clip, moments, bias correction, epsilon outside the root, decay, layer's share."""
    options = OptimOptions(weight_decay=0.2, layer_decay=0.5, beta1=0.8, beta2=0.9, epsilon=1e-2, clip=2.0)
    tx, params = optimizer(options, SMALL), drawn(SMALL, 0)
    decays, shares = flatten(weight_decay_mask(params)), flatten(layer_scales(params, SMALL, 0.5))
    state, update = tx.init(params), jax.jit(tx.update)
    first = {name: np.zeros(leaf.shape) for name, leaf in flatten(params).items()}
    second = dict(first)
    for step in (1, 2, 3):
        gradients = drawn(SMALL, step)
        found, state = update(gradients, state, params)
        flat = {name: leaf.astype(np.float64) for name, leaf in flatten(gradients).items()}
        share = min(1.0, 2.0 / (np.sqrt(sum((leaf**2).sum() for leaf in flat.values())) + 1e-6))
        for name, leaf in flatten(params).items():
            first[name] = 0.8 * first[name] + 0.2 * share * flat[name]
            second[name] = 0.9 * second[name] + 0.1 * (share * flat[name]) ** 2
            adam = first[name] / (1 - 0.8**step) / (np.sqrt(second[name] / (1 - 0.9**step)) + 1e-2)
            expected = shares[name] * (adam + 0.2 * decays[name] * leaf)
            np.testing.assert_allclose(flatten(found)[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_one_cpu_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch, clip: float | None, kernels: bool) -> None:
    """As the chain of optax's: parameters, moments and count, after steps of which one changes nothing."""
    if kernels and not library.available():
        pytest.skip("no compiler, or another processor")
    monkeypatch.setattr(calls, "SMALLEST_STEP", 1 if kernels else 2**60)
    options = OptimOptions(weight_decay=0.2, layer_decay=0.5, beta1=0.8, beta2=0.9, epsilon=1e-2, clip=clip)
    tx, params = optimizer(options, SMALL), drawn(SMALL, 0)
    ways = {}
    for platform in ("cpu", "other"):
        with traced_for(platform):
            step = jax.jit(partial(moved, tx)).lower(params, tx.init(params), params, jnp.float32(0.1), jnp.bool_(True))
        assert ("beit_jax_cpu_adamw" in step.as_text()) == (kernels and platform == "cpu")
        run, found, state = step.compile(), params, tx.init(params)
        for seed, finite in ((1, True), (2, False), (3, True), (4, True)):
            gradients = drawn(SMALL, seed) if finite else jax.tree.map(lambda leaf: leaf * np.nan, params)
            before, (found, state) = (found, state), run(gradients, state, found, jnp.float32(0.1), jnp.bool_(finite))
            if not finite:
                assert same_bits(before, (found, state))
        ways[platform] = found, state
    for one, other in zip(*(jax.tree.leaves(way) for way in ways.values()), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-7)
    assert jax.tree.structure(ways["cpu"]) == jax.tree.structure(ways["other"])


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.98, 0.999, 0.9999, 0.999999])
def test_adams_corrections_are_those_of_float64(beta: float) -> None:
    """Found by a gradient of one at every step, whose moments are the corrections themselves."""
    low, high = correction_tables(beta)
    assert len(low) == SPAN and high[0] == 0.0 and high[-1] == 1.0 and low.dtype == high.dtype == np.float32
    tx, update = adam(beta, 0.0, 0.0), jax.jit(adam(beta, 0.0, 0.0).update)
    ones = {"a": np.ones((), np.float32)}
    for done in (0, 1, 2, 19, SPAN - 2, SPAN - 1, SPAN, 10 * SPAN + 7, 10**6, 2**31 - 2):
        step, missing = done + 1, beta ** (done + 1)
        before = tx.init(ones)._replace(count=jnp.int32(done), mu={"a": jnp.float32(1.0)})
        found, after = update(ones, before)
        assert after.count == step
        assert 1.0 / found["a"] == pytest.approx(1.0 - missing, rel=3e-7), step


def test_the_state_of_adam_is_optaxs() -> None:
    """Runs that were begun with optax's own go on."""
    params = drawn(SMALL, 0)
    ours, theirs = (tx.init(params) for tx in (adam(0.9, 0.999, 1e-8), optax.scale_by_adam(mu_dtype=jnp.float32)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert [leaf.aval for leaf in jax.tree.leaves(ours)] == [leaf.aval for leaf in jax.tree.leaves(theirs)]
    after = adam(0.9, 0.999, 1e-8).update(params, theirs)[1]
    assert jax.tree.structure(after) == jax.tree.structure(theirs) and after.count == 1


def test_moments_are_float32_and_shaped_as_parameters() -> None:
    params = drawn(SMALL, 0)
    state = optimizer(OptimOptions(clip=1.0), SMALL).init(params)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert [leaf.shape for leaf in arrays] == shapes * 2
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype(jnp.float32)}


@given(decay=st.floats(0.0, 0.9999), steps=st.integers(1, 50))
def test_the_average_of_constant_parameters_closes_in_geometrically(decay: float, steps: int) -> None:
    average, target = {"a": np.float32(1.0)}, {"a": np.float32(3.0)}
    for _ in range(steps):
        average = ema_update(average, target, decay, 1.0 - decay)
    assert average["a"] == pytest.approx(3.0 - 2.0 * decay**steps, rel=1e-5)


def test_the_average_takes_its_gain_as_it_is_given() -> None:
    """Not one minus the decay; and both as traced scalars, as a table's row."""
    average, params = {"a": np.array([1.0, -2.0], np.float32)}, {"a": np.array([3.0, 5.0], np.float32)}
    expected = np.array([0.25 + 1.5, -0.5 + 2.5], np.float32)
    row = jnp.array([0.25, 0.5])
    for found in (ema_update(average, params, 0.25, 0.5), jax.jit(lambda row: ema_update(average, params, *row))(row)):
        assert np.array_equal(found["a"], expected)


def test_aggregation_layers_decay_as_blocks_and_learn_as_what_follows_them() -> None:
    """The original's layer ids know `blocks` only: BEiT v2's further layers are among the rest."""
    config = replace(TASKS["masked_image_modeling"], pooling="mean", aggregate_from=2, aggregation_layers=2)
    params = unflatten(learned(config))
    decays, shares = flatten(weight_decay_mask(params)), flatten(layer_scales(params, config, 0.5))
    extra = [name for name in decays if name.startswith("aggregation/blocks/")]
    assert len(extra) == sum(name.startswith("beit/blocks/") for name in decays)
    for name in extra:
        assert decays[name] == decays[name.replace("aggregation/", "beit/")], name
        assert shares[name] == 1.0 and shares[name].shape == (), name
