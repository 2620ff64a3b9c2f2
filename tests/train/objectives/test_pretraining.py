"""Pre-training's arithmetic, each piece against its definition, and the teacher, through the step itself.

Values of whole models and of several steps are tests/parity/test_pretraining.py's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tolerances import GRADIENT

from beit_jax.config import BeitConfig
from beit_jax.kernels.elements import ACCELERATORS
from beit_jax.models.build import abstract_model
from beit_jax.models.interface import Remat
from beit_jax.tokenizers.build import abstract_tokenizer, build_tokenizer
from beit_jax.tokenizers.dvae import DvaeEncoder, DvaeEncoderConfig
from beit_jax.train.objectives.data2vec import Data2vecOptions, Data2vecRecipe, data2vec, feature_targets, smooth_l1
from beit_jax.train.objectives.hidden_patches import deviation, hidden_patches, weighted_mean
from beit_jax.train.objectives.masked_tokens import (
    MaskedTokensRecipe,
    TokenOptions,
    masked_tokens,
    perplexities,
    token_loss,
    visual_tokens,
)
from beit_jax.train.objectives.unlabelled import COLLAPSED, collapse
from beit_jax.train.recipe import MaskOptions, OptimOptions
from beit_jax.train.step.criterion import Batch, Criterion, Metrics
from beit_jax.train.step.schedule import decay_table
from beit_jax.train.step.state import State, initial_state
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import Nested, flatten, unflatten

BATCH, PATCHES, MOST, VOCABULARY = 6, 16, 9, 24
HIDDEN = (9, 1, 6, 3, 8, 4)
AGGREGATION = {"aggregate_from": 1, "aggregation_layers": 1}
CONFIG = BeitConfig(
    task="masked_image_modeling", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
    image_size=(16, 16), patch_size=(4, 4), position_bias="shared", use_mask_token=True, drop_path_rate=0.0,
    vocab_size=VOCABULARY,
)  # fmt: skip
AGGREGATING = replace(CONFIG, **AGGREGATION)
TWO_HEADS = replace(AGGREGATING, own_aggregation_head=True)
STUDENT = replace(CONFIG, vocab_size=CONFIG.hidden_size)
TOKENIZER = DvaeEncoderConfig(n_hid=8, vocab_size=VOCABULARY, group_count=3, n_blk_per_group=1, image_size=(16, 16))
RECIPE = MaskedTokensRecipe("test", mask=MaskOptions(patches=MOST))
TEACHING = RECIPE.derive(Data2vecRecipe, data2vec=Data2vecOptions(target_layers=2))
EXACT = 2e-6
"""Of losses of magnitude 1 to 5, where another program makes the same sums."""
ROUNDINGS = 8
"""Between float32 and half precision, of the largest logit: its layers round a dozen times, not all the same way."""


def drawn(shapes: Nested, seed: int = 0) -> Nested:
    """Matrices of unit gain, vectors around zero, scales around one."""
    rng = np.random.default_rng(seed)

    def one(name: str, leaf: Any) -> jax.Array:
        wide = name.endswith("kernel")
        noise = rng.standard_normal(leaf.shape) * (np.prod(leaf.shape[-3:-1]) ** -0.5 if wide else 0.3)
        return jnp.asarray(noise + name.endswith(("scale", "gamma_1", "gamma_2")), jnp.float32)

    return unflatten({name: one(name, leaf) for name, leaf in flatten(shapes).items()})


def parameters(config: BeitConfig, seed: int = 0) -> Nested:
    return drawn(abstract_model(config)[1], seed)


def batch(seed: int = 0) -> dict[str, jax.Array]:
    """Noise, masks that hide as many patches as `HIDDEN` says, and tokens."""
    rng = np.random.default_rng(seed)
    ranks = rng.permuted(np.tile(np.arange(PATCHES), (BATCH, 1)), axis=1)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (BATCH, 16, 16, 3)), jnp.uint8),
        "mask": jnp.asarray(ranks < np.asarray(HIDDEN)[:, None]),
        "tokens": jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, PATCHES)), jnp.int32),
    }


def objective_of(config: BeitConfig, *, remat: Remat = RECIPE.model.remat) -> Criterion:
    model = replace(RECIPE.model, remat=remat)
    if config.vocab_size == config.hidden_size:
        return data2vec(replace(TEACHING, model=model), abstract_model(config)[0])
    recipe = replace(RECIPE, model=model)
    if config.aggregation_layers:
        recipe = replace(recipe, tokens=TokenOptions(**AGGREGATION))
    return masked_tokens(recipe, None)


@cache
def evaluation(config: BeitConfig) -> Callable[..., Metrics]:
    graph, objective = abstract_model(config)[0], objective_of(config)

    @jax.jit
    def run(params: Nested, made: Batch, key: Any, teacher: Nested | None) -> Metrics:
        ready = objective.prepare(made, jax.random.key(0))
        value, metrics = objective.loss(nnx.merge(graph, params), ready, key, teacher)
        return metrics | {"loss": value}

    return run


def evaluated(config: BeitConfig, made: Batch, *, key: int | None = None, teacher: Nested | None = None) -> Metrics:
    """Loss and metrics of an objective on a batch as the pipeline makes it."""
    drop = None if key is None else jax.random.key(key)
    return evaluation(config)(parameters(config), made, drop, teacher)


def evaluated_alone(config: BeitConfig, made: Batch, *, key: int | None, teacher: Nested) -> Metrics:
    """The same by a program of this batch and this key: sums that do not need the key are made alike, bit for bit."""
    graph, objective = abstract_model(config)[0], objective_of(config)

    @jax.jit
    def run(params: Nested, teacher: Nested | None) -> Metrics:
        ready = objective.prepare(made, jax.random.key(0))
        drop = None if key is None else jax.random.key(key)
        value, metrics = objective.loss(nnx.merge(graph, params), ready, drop, teacher)
        return metrics | {"loss": value}

    return run(parameters(config), teacher)


# --- The patches that are predicted -----------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 12))
def test_hidden_patches_come_first_and_in_order(data: st.DataObject, patches: int) -> None:
    """For every number of hidden patches up to the bound, none among them, and for every bound up to all patches."""
    count = data.draw(st.integers(1, patches))
    rows = data.draw(st.lists(st.sets(st.integers(0, patches - 1), max_size=count), min_size=1, max_size=4))
    mask = np.array([[patch in row for patch in range(patches)] for row in rows])
    found = {name: np.asarray(array) for name, array in hidden_patches(jnp.asarray(mask), count).items()}
    assert np.array_equal(found["mask"], mask)
    assert found["positions"].shape == found["weights"].shape == (len(rows), count)
    assert (found["positions"].dtype, found["weights"].dtype) == (np.int32, np.float32)
    for row, positions, weights in zip(rows, found["positions"], found["weights"], strict=True):
        assert positions[: len(row)].tolist() == sorted(row)
        assert weights.tolist() == [1.0] * len(row) + [0.0] * (count - len(row))
        assert len(set(positions.tolist())) == count and set(positions[len(row) :].tolist()).isdisjoint(row)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def selected_cross_entropy(logits: Any, made: Batch) -> tuple[float, float]:
    """Mean over hidden patches of all patches' cross entropy in float64, and of the hits."""
    logits, mask, tokens = (np.asarray(array) for array in (logits, made["mask"], made["tokens"]))
    each = -np.take_along_axis(log_softmax(logits.astype(np.float64)), tokens[..., None], axis=-1)[..., 0]
    return float(each[mask].mean()), float((logits.argmax(-1) == tokens)[mask].mean())


def logits_of_all(config: BeitConfig, made: Batch) -> Any:
    model = nnx.merge(abstract_model(config)[0], parameters(config))
    images = made["image"].astype(jnp.float32) / 127.5 - 1.0
    return jax.jit(lambda model: model(images, made["mask"], aggregate=config.aggregation_layers > 0))(model)


@pytest.mark.parametrize("config", [CONFIG, AGGREGATING, TWO_HEADS], ids=["BEiT", "BEiT v2", "a head of its own"])
def test_the_loss_is_that_of_all_patches_selected_by_the_mask(config: BeitConfig) -> None:
    made = batch()
    output, metrics = logits_of_all(config, made), evaluated(config, made)
    value, accuracy = selected_cross_entropy(output.logits, made)
    assert metrics["masked_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    if not config.aggregation_layers:
        assert metrics["loss"] == pytest.approx(value, rel=EXACT)
        return
    more, accuracy = selected_cross_entropy(output.aggregated_logits, made)
    assert metrics["loss_patches"] == pytest.approx(value, rel=EXACT)
    assert metrics["loss_aggregated"] == pytest.approx(more, rel=EXACT)
    assert metrics["loss"] == pytest.approx(value + more, rel=EXACT)
    assert metrics["masked_accuracy_aggregated"] == pytest.approx(accuracy, abs=1e-6)


def written_out_targets(made: Batch, teacher: Nested, options: Data2vecOptions) -> np.ndarray:
    """data2vec's, of all patches, in float64 from the teacher's float32 hidden states."""
    model = nnx.merge(abstract_model(STUDENT)[0], teacher)
    images = made["image"].astype(jnp.float32) / 127.5 - 1.0
    states = jax.jit(lambda model: model(images, output_hidden_states=True).hidden_states)(model)

    def normalised(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    last = [normalised(np.asarray(state[:, 1:], np.float64)) for state in states[-options.target_layers :]]
    return normalised(np.mean(last, axis=0)) if options.normalise_mean else np.mean(last, axis=0)


def test_data2vecs_loss_is_that_of_all_patches_selected_by_the_mask() -> None:
    made, teacher = batch(), parameters(STUDENT, seed=1)
    metrics, mask = evaluated(STUDENT, made, teacher=teacher), np.asarray(made["mask"])
    difference = np.abs(logits_of_all(STUDENT, made).logits - written_out_targets(made, teacher, TEACHING.data2vec))
    beta = TEACHING.data2vec.beta
    each = np.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta)
    assert (difference[mask] < beta).any() and (difference[mask] > beta).any()
    assert metrics["loss"] == pytest.approx(each[mask].mean(), rel=EXACT)


@pytest.mark.parametrize("options", [Data2vecOptions(target_layers=3), Data2vecOptions(2, normalise_mean=False)])
def test_targets_are_the_last_blocks_outputs_before_any_final_norm(options: Data2vecOptions) -> None:
    made, teacher = batch(), parameters(STUDENT, seed=1)
    graph, images = abstract_model(STUDENT)[0], made["image"].astype(jnp.float32) / 127.5 - 1.0
    found = jax.jit(lambda params: feature_targets(nnx.merge(graph, params), images, options))(teacher)
    assert found.dtype == jnp.float32 and found.shape == (BATCH, PATCHES, STUDENT.hidden_size)
    np.testing.assert_allclose(found, written_out_targets(made, teacher, options), rtol=0, atol=1e-5)


def test_patches_of_weight_zero_teach_nothing() -> None:
    """The tokens of patches that are seen may be anything, those that fill up the gathered ones among them."""
    made = batch()
    others = made | {"tokens": jnp.where(made["mask"], made["tokens"], (made["tokens"] + 5) % VOCABULARY)}
    one, other = evaluated(CONFIG, made), evaluated(CONFIG, others)
    assert one.keys() == other.keys() and all(one[name] == other[name] for name in one)


def test_a_batch_in_which_nothing_is_hidden_has_a_loss_of_zero() -> None:
    nothing = batch() | {"mask": jnp.zeros((BATCH, PATCHES), bool)}
    for config in (CONFIG, STUDENT):
        metrics = evaluated(config, nothing, teacher=parameters(config) if config is STUDENT else None)
        assert metrics["loss"] == 0 and all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("config", [AGGREGATING, STUDENT], ids=["BEiT v2", "data2vec"])
def test_accumulation_takes_the_mean_of_each_parts_mean(config: BeitConfig) -> None:
    """Samples i, i + parts, ... are a part. What hides more patches counts no more, as among GPUs in the originals."""
    graph, made = abstract_model(config)[0], batch()
    ema = config is STUDENT
    state = initial_state(parameters(config), optax.identity(), average=ema)
    step = make_train_step(graph, objective_of(config), optax.identity(), np.zeros(1, np.float32), accumulate=3)
    _, metrics = jax.jit(step)(state, made)
    teacher = parameters(config) if ema else None
    parts = [evaluated(config, {name: array[i::3] for name, array in made.items()}, teacher=teacher) for i in range(3)]
    for name in parts[0]:
        assert metrics[name] == pytest.approx(np.mean([part[name] for part in parts]), rel=EXACT), name
    assert abs(metrics["loss"] - evaluated(config, made, teacher=teacher)["loss"]) > 1e-3


# --- The teacher ------------------------------------------------------------------------------------------------------


DECAYS = {
    "published": (OptimOptions(ema=0.9998), [0.9998] * 6),
    "constant": (OptimOptions(ema=0.5), [0.5] * 6),
    "annealed": (OptimOptions(ema=0.9, ema_start=0.1, ema_steps=4), [0.1, 0.3, 0.5, 0.7, 0.9, 0.9]),
    "annealed beyond the run": (
        OptimOptions(ema=0.9, ema_start=0.6, ema_steps=60),
        [0.6, 0.605, 0.61, 0.615, 0.62, 0.625],
    ),
}


@pytest.fixture(scope="module")
def teaching() -> Callable[[State, Batch], tuple[State, Metrics]]:
    """data2vec's step with plain gradient descent, through the tables of all of `DECAYS`, one behind the other."""
    tables = np.concatenate([decay_table(options, len(decays)) for options, decays in DECAYS.values()])
    rates = np.full(len(tables), 0.5, np.float32)
    graph, objective = abstract_model(STUDENT)[0], objective_of(STUDENT)
    return jax.jit(make_train_step(graph, objective, optax.identity(), rates, decays=tables))


@pytest.mark.parametrize("name", DECAYS)
def test_the_teacher_in_closed_form(name: str, teaching: Callable[[State, Batch], tuple[State, Metrics]]) -> None:
    """Student k, after step k, has the weight ``(1 - d_k) d_{k+1} ... d_n``, the start ``d_1 ... d_n``."""
    decays, step = DECAYS[name][1], teaching
    state = initial_state(parameters(STUDENT), optax.identity(), average=True)
    state = replace(state, step=jnp.asarray(6 * [*DECAYS].index(name), jnp.int32))
    students = [flatten(state.params)]
    for i in range(len(decays)):
        state, metrics = step(state, batch(i))
        assert metrics["finite"]
        students.append(flatten(state.params))
    tails = np.cumprod([1.0, *decays[::-1]])[::-1]
    weights = [tails[0], *((1.0 - decay) * tail for decay, tail in zip(decays, tails[1:], strict=True))]
    assert sum(weights) == pytest.approx(1.0)
    for name, found in flatten(state.average).items():
        leaves = [np.asarray(student[name], np.float64) for student in students]
        assert np.abs(leaves[-1] - leaves[0]).max() > 1e-4, f"{name} hardly moved, so nothing is tested"
        expected = sum(weight * leaf for weight, leaf in zip(weights, leaves, strict=True))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=name)


def test_the_teacher_draws_nothing_and_sees_all_patches() -> None:
    """With all kinds of dropout on, predictions follow the key; targets follow neither the key nor the mask token."""
    config = replace(STUDENT, drop_path_rate=0.5, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    teacher = parameters(config, seed=1)
    one, other, none = (evaluated_alone(config, batch(), key=key, teacher=teacher) for key in (0, 1, None))
    assert one["target_deviation"] == other["target_deviation"] == none["target_deviation"]
    assert len({float(metrics["prediction_deviation"]) for metrics in (one, other, none)}) == 3
    flat = flatten(teacher)
    flat["beit/embeddings/mask_token"] = flat["beit/embeddings/mask_token"] + 1.0
    assert evaluated_alone(config, batch(), key=None, teacher=unflatten(flat))["loss"] == none["loss"]


def test_no_gradient_reaches_data2vecs_teacher() -> None:
    """Exactly zero, though its values matter."""
    graph, made, objective = abstract_model(STUDENT)[0], batch(), objective_of(STUDENT)
    student = parameters(STUDENT)

    @jax.jit
    @jax.value_and_grad
    def loss(teacher: Nested) -> jax.Array:
        ready = objective.prepare(made, jax.random.key(0))
        return objective.loss(nnx.merge(graph, student), ready, None, teacher)[0]

    value, gradients = loss(parameters(STUDENT, seed=1))
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
    assert abs(value - loss(parameters(STUDENT, seed=2))[0]) > 1e-3


def test_a_teacher_that_tells_no_patch_from_another_is_seen() -> None:
    """Blind to pixels and positions; its student learns something all the same, so only the metric shows it."""
    flat = flatten(parameters(STUDENT, seed=1))
    blind = {name: jnp.zeros_like(flat[name]) for name in ("beit/embeddings/patch_kernel", "beit/shared_bias_table")}
    metrics = evaluated(STUDENT, batch(), teacher=unflatten(flat | blind))
    assert metrics["target_deviation"] < 1e-6 and metrics["prediction_deviation"] > 0.1
    [line] = collapse({name: float(value) for name, value in metrics.items()})
    assert line.startswith("target_deviation is ") and "the teacher gives nearly the same features" in line
    sighted = evaluated(STUDENT, batch(), teacher=unflatten(flat))
    assert sighted["target_deviation"] > 0.5 and collapse({k: float(v) for k, v in sighted.items()}) == []


# --- The tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer(dtype: Any = jnp.float32) -> DvaeEncoder:
    """A small dVAE; its logits are zero on average, or one token would win everywhere."""
    flat = flatten(drawn(abstract_tokenizer(TOKENIZER)[1]))
    flat["output/bias"] = jnp.zeros_like(flat["output/bias"])
    logits = jax.jit(lambda model: model(squares()))(build_tokenizer(TOKENIZER, unflatten(flat)))
    flat["output/bias"] = -logits.mean(axis=(0, 1, 2))
    built = build_tokenizer(TOKENIZER, unflatten(flat), dtype=dtype)
    assert isinstance(built, DvaeEncoder)
    return built


def squares(count: int = 16) -> jax.Array:
    """[b, 16, 16, 3] in [0, 1]: noise on squares of one colour, each of a token's size."""
    rng = np.random.default_rng(4)
    plain = rng.random((count, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return jnp.asarray(0.9 * plain + 0.1 * rng.random(plain.shape), jnp.float32)


def test_tokens_are_those_of_pixels_in_the_tokenizers_range() -> None:
    """Row by row, from uint8; a tokenizer that wants other values than [0, 1] gets them."""

    class Probe:
        value_range = (-1.0, 3.0)

        def tokens(self, pixel_values: jax.Array) -> jax.Array:
            return jnp.round(pixel_values.sum(axis=-1) * 100).astype(jnp.int32)

    images = np.arange(2 * 2 * 3 * 3).reshape(2, 2, 3, 3).astype(np.uint8) * 7
    found = visual_tokens(Probe(), jnp.asarray(images))
    expected = np.round((-1.0 + 4.0 * images.astype(np.float64) / 255).sum(-1) * 100).astype(int)
    assert found.shape == (2, 6) and np.abs(found - expected.reshape(2, 6)).max() <= 1
    found = visual_tokens(tokenizer(), jnp.asarray(squares() * 255, jnp.uint8))
    assert found.shape == (16, PATCHES) and len(np.unique(found)) > 5


@pytest.mark.parametrize("count", [16, 6, 5, 1])
def test_tokens_of_an_accelerator_are_computed_in_pieces(count: int) -> None:
    """The same tokens, in the order of the images, of a quarter of them at a time, a half, or all."""
    images = jnp.asarray(squares(count) * 255, jnp.uint8)
    made = tokenizer()
    with ACCELERATORS.interpreted():
        program = jax.make_jaxpr(lambda images: visual_tokens(made, images))(images)
        found = jax.jit(lambda images: visual_tokens(made, images))(images)
    (loop,) = (equation for equation in program.eqns if equation.primitive.name == "scan")
    assert loop.params["length"] == {16: 4, 6: 2, 5: 1, 1: 1}[count]
    np.testing.assert_array_equal(found, jax.jit(lambda images: visual_tokens(made, images))(images))


def token_views() -> dict[str, jax.Array]:
    made = {name: array for name, array in batch().items() if name != "tokens"}
    return made | {"token_image": jnp.asarray(squares(BATCH) * 255, jnp.uint8)}


def test_tokens_in_the_loop_are_stored_tokens() -> None:
    graph, params = nnx.split(tokenizer())
    frozen, views = nnx.to_pure_dict(params), token_views()
    stored = jax.jit(lambda params: visual_tokens(nnx.merge(graph, params), views["token_image"]))(frozen)
    student = nnx.merge(abstract_model(CONFIG)[0], parameters(CONFIG))

    @jax.jit
    def loss(made: Batch, teacher: Nested | None) -> Metrics:
        objective = masked_tokens(RECIPE, graph if teacher else None)
        value, metrics = objective.loss(student, objective.prepare(made, jax.random.key(0)), None, teacher)
        return metrics | {"loss": value}

    looped = loss(views, frozen)
    expected = loss({"image": views["image"], "mask": views["mask"], "tokens": stored}, None)
    assert looped.keys() == expected.keys()
    for name in expected:
        assert looped[name] == pytest.approx(float(expected[name]), rel=EXACT), name
    same = {name: array for name, array in views.items() if name != "token_image"}
    seen = loss(same, frozen)["target_perplexity"]
    also_seen = loss(same | {"token_image": same["image"]}, frozen)["target_perplexity"]
    assert seen == also_seen != looped["target_perplexity"]


def test_nothing_moves_the_tokenizer() -> None:
    """No gradient, exactly; and a step leaves it as it was, bit for bit."""
    graph, params = nnx.split(tokenizer())
    frozen, views, student = nnx.to_pure_dict(params), token_views(), abstract_model(CONFIG)[0]
    objective = masked_tokens(RECIPE, graph)

    @jax.jit
    @jax.grad
    def gradient(teacher: Nested) -> jax.Array:
        model = nnx.merge(student, parameters(CONFIG))
        return objective.loss(model, objective.prepare(views, jax.random.key(0)), None, teacher)[0]

    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient(frozen)))
    state = initial_state(parameters(CONFIG), optax.identity(), frozen=frozen)
    step = make_train_step(student, objective, optax.identity(), np.ones(1, np.float32))
    after, metrics = jax.jit(step)(state, views)
    assert metrics["finite"] and metrics["grad_norm"] > 0.1 and "ema_distance" not in metrics
    for name, leaf in flatten(after.frozen).items():
        assert np.asarray(leaf).tobytes() == np.asarray(flatten(frozen)[name]).tobytes(), name


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_gives_the_tokens_whose_margin_is_clear(dtype: Any) -> None:
    """Two logits keep their order where they are further apart than both may be off."""
    images = jnp.asarray(squares() * 255, jnp.uint8)
    run = jax.jit(lambda tokenizer: (visual_tokens(tokenizer, images), tokenizer(images.astype(jnp.float32) / 255)))
    (full, logits), (half, rough) = run(tokenizer()), run(tokenizer(dtype))
    logits, rough = (np.asarray(array).reshape(16, PATCHES, -1) for array in (logits, rough))
    bound = ROUNDINGS * float(jnp.finfo(dtype).eps) / 2 * np.abs(logits).max()
    assert bound / ROUNDINGS < np.abs(rough - logits).max() <= bound
    second, first = np.moveaxis(np.partition(logits, -2)[..., -2:], -1, 0)
    clear = first - second > 2 * bound
    assert clear.mean() > 0.3
    assert np.array_equal(np.asarray(full)[clear], np.asarray(half)[clear])


# --- Losses and metrics -----------------------------------------------------------------------------------------------


@given(st.floats(-8.0, 8.0, width=32), st.floats(0.0, 4.0, width=32))
def test_smooth_l1_is_its_definition(difference: float, beta: float) -> None:
    size = abs(difference)
    expected = 0.5 * difference**2 / beta if size < beta else size - 0.5 * beta
    assert smooth_l1(jnp.float32(difference), beta) == pytest.approx(expected, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("beta", [0.12, 1.0, 2.0])
def test_smooth_l1_and_its_slope_are_continuous_at_beta(beta: float) -> None:
    """From below, at and from above: half of beta, and a slope of one."""
    for sign in (1.0, -1.0):
        around = [jnp.float32(sign * beta * (1 + nudge)) for nudge in (-1e-6, 0.0, 1e-6)]
        for point in around:
            assert smooth_l1(point, beta) == pytest.approx(beta / 2, rel=1e-5)
            assert jax.grad(lambda x: smooth_l1(x, beta))(point) == pytest.approx(sign, rel=1e-5)
    slopes = [float(jax.grad(lambda x: smooth_l1(x, beta))(jnp.float32(x))) for x in (0.0, beta / 4, 3 * beta)]
    assert slopes == pytest.approx([0.0, 0.25, 1.0])


@pytest.mark.parametrize("value", [0.0, -0.5, 3.0])
def test_smooth_l1_without_beta_is_l1(value: float) -> None:
    assert smooth_l1(jnp.float32(value), 0.0) == abs(value)
    slope = jax.grad(lambda x: smooth_l1(x, 0.0))(jnp.float32(value))
    assert np.isfinite(slope) and (value == 0 or slope == np.sign(value))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.3, 0.7, 1.0]))
def test_metrics_are_those_of_what_has_a_weight(seed: int, share: float) -> None:
    """Deviation, perplexities, accuracy and cross entropy, in float64 over the selected patches alone."""
    rng = np.random.default_rng(seed)
    weights = rng.random((3, 4)) < share
    features = rng.standard_normal((3, 4, 7)).astype(np.float32) * 3 + 5
    labels = rng.integers(0, 7, (3, 4)).astype(np.int32)
    as_weights = jnp.asarray(weights, jnp.float32)
    found = perplexities(jnp.asarray(features), jnp.asarray(labels), as_weights)
    value, accuracy = token_loss(jnp.asarray(features), jnp.asarray(labels), as_weights)
    spread = deviation(jnp.asarray(features), as_weights)
    if not weights.any():
        assert (float(value), float(accuracy), float(spread)) == (0.0, 0.0, 0.0)
        assert {float(one) for one in found.values()} == {1.0}
        return
    chosen, wanted = features[weights].astype(np.float64), labels[weights]
    assert spread == pytest.approx(chosen.std(axis=0).mean(), rel=1e-5, abs=1e-6)
    expected = -log_softmax(chosen)[np.arange(len(wanted)), wanted]
    assert value == pytest.approx(expected.mean(), rel=1e-5)
    assert accuracy == pytest.approx((chosen.argmax(-1) == wanted).mean(), rel=1e-6)
    for name, tokens in (("predicted_perplexity", chosen.argmax(-1)), ("target_perplexity", wanted)):
        shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
        assert found[name] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5), name


def test_examples_of_metrics() -> None:
    everywhere, eye = jnp.ones((1, 4)), jnp.eye(4)[None]
    labels = jnp.array([[2, 2, 2, 2]], jnp.int32)
    found = perplexities(eye, labels, everywhere)
    assert found["predicted_perplexity"] == pytest.approx(4.0) and found["target_perplexity"] == pytest.approx(1.0)
    assert token_loss(eye, labels, everywhere)[1] == 0.25
    assert deviation(jnp.ones((2, 3, 5)), jnp.ones((2, 3))) == 0
    assert weighted_mean(jnp.array([1.0, 5.0]), jnp.array([0.0, 1.0])) == 5.0


HEALTHY = {"loss": 2.0, "target_deviation": 0.9, "prediction_deviation": 0.4, "predicted_perplexity": 40.0,
           "target_perplexity": 300.0}  # fmt: skip


@pytest.mark.parametrize("name", COLLAPSED)
def test_collapse_names_the_metric_its_value_and_its_meaning(name: str) -> None:
    least, meaning = COLLAPSED[name]
    assert collapse(HEALTHY) == []
    [line] = collapse(HEALTHY | {name: 0.99 * least})
    assert line == f"{name} is {0.99 * least:.3g}, expected more than {least:g}: {meaning}" and "\n" not in line
    assert collapse(HEALTHY | {name: 1.01 * least}) == []


def test_collapse_speaks_of_finite_metrics_that_are_there_and_of_all_of_them() -> None:
    assert collapse({}) == [] and collapse({"loss": 0.0, "accuracy": 0.0}) == []
    assert collapse(HEALTHY | {"target_deviation": float("nan"), "predicted_perplexity": float("inf")}) == []
    zeros = dict.fromkeys(HEALTHY, 0.0)
    assert [line.split()[0] for line in collapse(zeros)] == list(COLLAPSED)


@pytest.mark.parametrize("config", [AGGREGATING, STUDENT], ids=["BEiT v2", "data2vec"])
def test_remat_and_randomness_reach_the_model(config: BeitConfig) -> None:
    """Gradients of an objective do not depend on what is kept; the loss does on the key."""
    config = replace(config, drop_path_rate=0.5)
    graph, made = abstract_model(config)[0], batch()
    teacher = parameters(config, seed=1) if config.vocab_size == config.hidden_size else None

    def gradients(remat: Any, *keys: int) -> list[dict[str, jax.Array]]:
        objective = objective_of(config, remat=remat)

        @jax.jit
        @jax.grad
        def differentiate(params: Nested, key: jax.Array) -> jax.Array:
            ready = objective.prepare(made, jax.random.key(0))
            return objective.loss(nnx.merge(graph, params), ready, key, teacher)[0]

        return [flatten(differentiate(parameters(config), jax.random.key(key))) for key in keys]

    (kept, other), (again,) = gradients("none", 0, 1), gradients("block", 0)
    for name, leaf in kept.items():
        scale = np.abs(leaf).max()
        assert scale > 0 and np.abs(again[name] - leaf).max() <= GRADIENT * scale, name
    assert any(np.abs(other[name] - leaf).max() > 0.01 * np.abs(leaf).max() for name, leaf in kept.items())
