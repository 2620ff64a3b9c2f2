"""The head of masked image modelling: logits of chosen patches, and BEiT v2's aggregation layers."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import GRADIENT

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import abstract_model, build_model, param_shapes
from beit_jax.models.interface import REMAT, BeitOutput, Remat
from beit_jax.models.masked_image_modeling import Aggregation, BeitForMaskedImageModeling
from beit_jax.models.one_cpu import traced_for
from beit_jax.tree import Nested, flatten, unflatten

CONFIG = BeitConfig(
    task="masked_image_modeling", image_size=(32, 32), patch_size=(8, 8), hidden_size=32, num_hidden_layers=3,
    num_attention_heads=4, intermediate_size=48, position_bias="shared", use_mask_token=True, vocab_size=24,
    drop_path_rate=0.0, aggregate_from=2, aggregation_layers=2,
)  # fmt: skip
BATCH, PATCHES = 4, 16
RNG = np.random.default_rng(1)
PIXELS = RNG.standard_normal((BATCH, 32, 32, 3)).astype(np.float32)
MASK = RNG.random((BATCH, PATCHES)) < 0.4
PREDICTED = np.stack([RNG.choice(PATCHES, 5, replace=False) for _ in range(BATCH)])  # in no order
ROUNDING = 2e-6
"""Tolerance of logits of magnitude 3, where another program computes the same sums."""


def random_params(config: BeitConfig) -> Nested:
    rng = np.random.default_rng(0)
    return unflatten(
        {n: jnp.asarray(rng.standard_normal(s), jnp.float32) * 0.2 for n, s in param_shapes(config).items()}
    )


def model(config: BeitConfig = CONFIG) -> BeitForMaskedImageModeling:
    built = build_model(config, random_params(config))
    assert isinstance(built, BeitForMaskedImageModeling)
    return built


def run(config: BeitConfig = CONFIG, **options: Any) -> BeitOutput:
    """The output of the compiled model, with the mask."""
    return jax.jit(lambda ours: ours(PIXELS, MASK, **options))(model(config))


# --- Chosen patches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", [False, True])
def test_predicted_patches_get_the_logits_they_have_among_all(aggregate: bool) -> None:
    every, chosen = run(aggregate=aggregate), run(aggregate=aggregate, predicted=PREDICTED)
    for name in ("logits", *(["aggregated_logits"] if aggregate else [])):
        full, found = np.asarray(getattr(every, name)), np.asarray(getattr(chosen, name))
        assert full.shape == (BATCH, PATCHES, 24) and found.shape == (BATCH, 5, 24)
        assert np.abs(full).max() > 1
        np.testing.assert_allclose(found, np.take_along_axis(full, PREDICTED[..., None], 1), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(chosen.last_hidden_state, every.last_hidden_state, rtol=0, atol=ROUNDING)


def test_a_patch_may_be_predicted_twice_or_not_at_all() -> None:
    twice, none = run(predicted=np.full((BATCH, 2), 3)).logits, run(predicted=np.zeros((BATCH, 0), int)).logits
    assert twice is not None and none is not None
    assert np.array_equal(twice[:, 0], twice[:, 1]) and none.shape == (BATCH, 0, 24)


def test_the_head_computes_no_other_logits() -> None:
    """No array of the program is as large as all patches' logits."""
    ours = model()
    jaxpr = jax.make_jaxpr(lambda pixels: ours(pixels, MASK, predicted=PREDICTED, aggregate=True).logits)(PIXELS)
    shapes = {variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars}
    assert (BATCH, 5, 24) in shapes and (BATCH, PATCHES, 24) not in shapes


# --- Aggregation ------------------------------------------------------------------------------------------------------


def test_aggregation_changes_nothing_else() -> None:
    plain, both = run(), run(aggregate=True)
    assert plain.aggregated_logits is None and both.aggregated_logits is not None
    for name in ("logits", "last_hidden_state"):
        np.testing.assert_allclose(getattr(both, name), getattr(plain, name), rtol=0, atol=ROUNDING, err_msg=name)
    assert np.abs(both.aggregated_logits - both.logits).max() > 0.1
    assert plain.taps is None and both.taps is None


def test_aggregation_draws_nothing_that_the_encoder_draws() -> None:
    """With all kinds of randomness, the encoder's output is that of the same key without aggregation."""
    config = replace(CONFIG, drop_path_rate=0.4, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    key = jax.random.key(3)
    plain, both = run(config, key=key), run(config, key=key, aggregate=True)
    assert both.aggregated_logits is not None
    np.testing.assert_allclose(both.logits, plain.logits, rtol=0, atol=ROUNDING)
    assert np.abs(both.logits - run(config).logits).max() > 0.1
    assert np.abs(both.aggregated_logits - run(config, aggregate=True).aggregated_logits).max() > 0.1


@pytest.mark.parametrize("first", [1, 2, 3])
def test_what_the_aggregation_layers_read(first: int) -> None:
    """They read the last block's class token and the patches of an earlier block; here block by block."""
    config = replace(CONFIG, aggregate_from=first)
    output = run(config, aggregate=True, output_hidden_states=True)
    assert output.hidden_states is not None

    @jax.jit
    def by_hand(ours: BeitForMaskedImageModeling, states: jax.Array) -> jax.Array:
        x = jnp.concatenate([states[-1][:, :1], states[first][:, 1:]], axis=1)
        graph, stacked = nnx.split(ours.aggregation.blocks)
        for i in range(config.aggregation_layers):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
            x, _ = block(x, (4, 4), ours.beit.shared_bias((4, 4), len(x)))
        return ours.lm_head(ours.norm(x[:, 1:]))

    expected = by_hand(model(config), output.hidden_states)
    np.testing.assert_allclose(output.aggregated_logits, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("taps", [(), (0,), (2,), (1, 3), (0, 2, 3), (0, 1, 2, 3)])
def test_taps_that_were_asked_for_come_back_beside_aggregation(taps: tuple[int, ...]) -> None:
    output = run(taps=taps, aggregate=True, output_hidden_states=True)
    assert output.hidden_states is not None and output.aggregated_logits is not None
    if not taps:
        assert output.taps is None
        return
    np.testing.assert_allclose(output.taps, output.hidden_states[np.array(taps)], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("depth", "first", "count"), [(3, 2, 2), (5, 2, 2), (3, 3, 1), (12, 9, 2), (2, 1, 4)])
def test_stochastic_depth_goes_on_where_that_of_the_early_patches_stops(depth: int, first: int, count: int) -> None:
    """Each layer adds one to a feature of its own: 0 if a sample drops the layer, else 1 / (1 - rate)."""
    rate = 0.5
    config = replace(
        CONFIG, num_hidden_layers=depth, aggregate_from=first, aggregation_layers=count, drop_path_rate=rate
    )
    _, shapes = abstract_model(config)
    zeros = {name: np.zeros(leaf.shape, np.float32) for name, leaf in flatten(shapes["aggregation"]).items()}
    for branch, bias in enumerate(("attention/out_bias", "mlp/fc2/bias")):
        zeros[f"blocks/{bias}"][np.arange(count), 2 * np.arange(count) + branch] = 1.0
        zeros[f"blocks/gamma_{branch + 1}"][...] = 1.0
    graph, _ = nnx.split(nnx.eval_shape(lambda: Aggregation(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    layers = nnx.merge(graph, jax.tree.map(jnp.asarray, unflatten(zeros)))
    x = jnp.zeros((2000, 2, 32))
    found = np.asarray(layers(x, (1, 1), None, jax.random.key(0), "none"))

    expected = np.linspace(0.0, rate, max(depth, first + count))[first : first + count].repeat(2)
    kept = found[:, 0, : 2 * count]
    assert np.array_equal(found, found[:, :1].repeat(2, axis=1)), "a sample drops a layer for all of its tokens"
    assert not found[:, :, 2 * count :].any()
    for feature, share in enumerate(expected):
        values = kept[:, feature]
        np.testing.assert_allclose(values[values > 0], 1 / (1 - share), rtol=1e-6)
        assert abs((values == 0).mean() - share) < 0.05
    if count > 1:  # each layer, and each branch of one, is dropped by itself
        correlations = np.corrcoef((kept[:, -4:] > 0).T)[np.triu_indices(4, 1)]
        assert np.abs(correlations).max() < 0.1
    assert np.array_equal(layers(x, (1, 1), None, None, "none")[:, :, : 2 * count], np.ones((2000, 2, 2 * count)))


@pytest.fixture(scope="module")
def gradients() -> dict[Remat, dict[str, jax.Array]]:
    """The gradient of squares of both logits, with all kinds of randomness, for each value of `remat`."""
    config = replace(CONFIG, drop_path_rate=0.3, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    graph, _ = abstract_model(config)

    def gradient(remat: Remat) -> dict[str, jax.Array]:
        @jax.jit
        @jax.grad
        def differentiate(params: Nested) -> jax.Array:
            output = nnx.merge(graph, params)(
                PIXELS, MASK, predicted=PREDICTED, aggregate=True, key=jax.random.key(0), remat=remat
            )
            return jnp.square(output.logits).sum() + jnp.square(output.aggregated_logits).sum()

        return flatten(differentiate(random_params(config)))

    return {remat: gradient(remat) for remat in REMAT}


@pytest.mark.parametrize("remat", [remat for remat in REMAT if remat != "none"])
def test_gradients_do_not_depend_on_what_is_kept(gradients: dict[Remat, dict[str, jax.Array]], remat: Remat) -> None:
    for name, leaf in gradients["none"].items():
        scale = np.abs(leaf).max()
        assert scale > 0, name
        assert np.abs(gradients[remat][name] - leaf).max() <= GRADIENT * scale, name


def test_aggregation_layers_are_computed_again_only_if_asked() -> None:
    """`remat` reaches the scan of the aggregation layers too."""
    graph, shapes = abstract_model(CONFIG)

    def program(remat: Remat) -> str:
        def loss(params: Nested) -> jax.Array:
            output = nnx.merge(graph, params)(PIXELS, MASK, aggregate=True, remat=remat)
            return output.aggregated_logits.sum()

        with traced_for("tpu"):
            return str(jax.make_jaxpr(loss)(shapes))

    assert [program(remat).count("prevent_cse=") for remat in ("none", "block", "dots")] == [0, 2, 2]


# --- The configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, aggregate_from=0, aggregation_layers=0)])
def test_to_hf_and_back(config: BeitConfig) -> None:
    written = json.loads(json.dumps(config.to_hf()))
    assert BeitConfig.from_hf(written) == config
    assert ("aggregation_layers" in written["beit_jax"]) == bool(config.aggregation_layers)


def test_parameters_of_aggregation_layers_are_those_of_blocks() -> None:
    shapes = dict(param_shapes(CONFIG))
    extra = {name: shape for name, shape in shapes.items() if name.startswith("aggregation/")}
    blocks = {name.replace("beit/", "aggregation/"): (2, *shape[1:]) for name, shape in shapes.items()
              if name.startswith("beit/blocks/")}  # fmt: skip
    assert extra == blocks
    assert shapes.keys() - extra.keys() == param_shapes(replace(CONFIG, aggregate_from=0, aggregation_layers=0)).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aggregation_layers": 0}, "aggregation_layers: expected a positive integer, found 0"),
        ({"aggregation_layers": -1}, "aggregation_layers: expected a positive integer, found -1"),
        ({"aggregate_from": 0}, "aggregate_from: expected a block, 1 to 3, found 0"),
        ({"aggregate_from": 4}, "aggregate_from: expected a block, 1 to 3, found 4"),
        ({"aggregate_from": -1}, "aggregate_from: expected a block, 1 to 3, found -1"),
        ({"task": "features"}, "aggregation_layers: expected 0 for features"),
        ({"task": "image_classification", "labels": ("a",)}, "aggregation_layers: expected 0 for image_classification"),
    ],
)
def test_configurations_of_no_model_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BeitJaxError) as error:
        replace(CONFIG, **change)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"aggregation_layers": "2"}, 'beit_jax: aggregation_layers: expected an integer, found "2"'),
        ({"aggregate_from": True}, "beit_jax: aggregate_from: expected an integer, found true"),
        ({"aggregate_from": 9}, "aggregate_from: expected a block, 1 to 3, found 9"),
    ],
)
def test_files_with_bad_values_are_named(own: dict[str, Any], message: str) -> None:
    written = CONFIG.to_hf()
    written["beit_jax"] |= own
    with pytest.raises(BeitJaxError) as error:
        BeitConfig.from_hf(written, file="dir/config.json")
    assert str(error.value).startswith(f"dir/config.json: {message}")
