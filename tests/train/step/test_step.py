"""The step: what a bad one leaves alone, what follows the counter, and that parts of a batch add up to the whole."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bits import same_bits
from flax import nnx

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.kernels.cpu import library
from beit_jax.models.build import Model, abstract_model, statistics
from beit_jax.models.one_cpu import traced_for
from beit_jax.models.segmenter import batch_statistics
from beit_jax.train.augmentation.labels import soft_cross_entropy
from beit_jax.train.objectives.segmentation import SegmentationRecipe, segmentation
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.step.criterion import Batch, Criterion, Metrics
from beit_jax.train.step.division import Division
from beit_jax.train.step.optim import ema_update, optimizer
from beit_jax.train.step.state import State, divided, initial_state, variables
from beit_jax.train.step.step import make_train_step, split
from beit_jax.tree import Nested, flatten, unflatten

CONFIG = BeitConfig(
    task="image_classification", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    image_size=(16, 16), patch_size=(8, 8), position_bias="per_layer", drop_path_rate=0.0, labels=("a", "b", "c"),
)  # fmt: skip
SEGMENTER = replace(
    CONFIG, task="semantic_segmentation", num_hidden_layers=4, out_indices=(0, 1, 2, 3), auxiliary_channels=8
)
OPTIM = OptimOptions(weight_decay=0.1, layer_decay=0.8, clip=0.2)
RATES = np.linspace(0.0, 1e-2, 12, dtype=np.float32)  # a warmup: the first rate is 0
DECAYS = np.tile(np.asarray([0.9, 0.1], np.float32), (len(RATES), 1))
SIZE = 8
GOOD, NAN_GRADIENT, INFINITE_GRADIENT, NAN_LOSS, INFINITE_LOSS = range(5)
BAD = {
    "NaN gradient of a finite loss": NAN_GRADIENT,
    "infinite gradient of a finite loss": INFINITE_GRADIENT,
    "NaN loss with finite gradients": NAN_LOSS,
    "infinite loss with finite gradients": INFINITE_LOSS,
}


def spoilt(kind: jax.Array, weight: jax.Array) -> jax.Array:
    """0 for a good sample; for a bad one what its kind says. `weight` is a parameter for gradients to go wrong in."""

    def root(sample_kind: int, inside: jax.Array) -> jax.Array:  # 0, whose slope is infinite
        return jnp.where(kind == sample_kind, jnp.sqrt(jnp.where(kind == sample_kind, inside, 1.0)), 0.0)

    value = jnp.where(kind == NAN_LOSS, jnp.nan, jnp.where(kind == INFINITE_LOSS, jnp.inf, 0.0))
    return value + root(NAN_GRADIENT, 0.0 * weight) + root(INFINITE_GRADIENT, weight - jax.lax.stop_gradient(weight))


def loss(model: Model, batch: Batch, key: Any, teacher: Nested | None) -> tuple[jax.Array, Metrics]:
    value = soft_cross_entropy(model(batch["image"], key=key).logits, batch["target"])
    spoil = jax.vmap(spoilt, (0, None))(batch["kind"], model.classifier.bias[0]).sum()
    return value + spoil, {}


def prepare(batch: Batch, key: Any) -> Batch:
    return batch


def cheap_loss(model: Model, batch: Batch, key: Any, teacher: Nested | None) -> tuple[jax.Array, Metrics]:
    """Tells what it was given, and compiles fast."""
    value = model.classifier.bias[...].sum()
    return value, {"draw": jax.random.uniform(key), "teacher": jnp.asarray(teacher is not None)}


OBJECTIVE = Criterion(prepare, loss)


def drawn(config: BeitConfig) -> Nested:
    rng = np.random.default_rng(0)
    shapes = flatten(abstract_model(config)[1])
    return unflatten({name: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype) + name.endswith("var")
                      for name, leaf in shapes.items()})  # fmt: skip


def fresh(tx: optax.GradientTransformation | None = None, ema: bool = True) -> State:
    return initial_state(drawn(CONFIG), optimizer(OPTIM, CONFIG) if tx is None else tx, average=ema)


def batch(seed: int = 0, **bad: int) -> Batch:
    """Noise images and targets; `bad` gives samples (s3=NAN_LOSS) their kind."""
    rng = np.random.default_rng(seed)
    kind = np.zeros(SIZE, np.int32)
    for sample, value in bad.items():
        kind[int(sample[1:])] = value
    images = rng.standard_normal((SIZE, 16, 16, 3)).astype(np.float32)
    return {"image": images, "target": rng.dirichlet(np.ones(3), SIZE).astype(np.float32), "kind": kind}


@cache
def compiled(accumulate: int = 1, seed: int = 0, config: BeitConfig = CONFIG) -> Callable[..., tuple[State, Metrics]]:
    graph, _ = abstract_model(config)
    tx = optimizer(OPTIM, config)
    return jax.jit(make_train_step(graph, OBJECTIVE, tx, RATES, accumulate=accumulate, decays=DECAYS, seed=seed))


@pytest.mark.skipif(not library.available(), reason="no compiler, or another processor")
def test_on_one_cpu_a_step_of_a_small_model_has_kernels_and_a_forward_pass_none() -> None:
    config = replace(CONFIG, hidden_size=64, intermediate_size=128)
    graph, _ = abstract_model(config)
    state = initial_state(drawn(config), optimizer(OPTIM, config), average=True)

    def logits(state: State, batch: Batch) -> jax.Array:
        return nnx.merge(graph, state.params)(batch["image"]).logits

    with traced_for("cpu"):
        found = [
            "beit_affine" in str(jax.make_jaxpr(what)(state, batch())) for what in (compiled(config=config), logits)
        ]
    assert found == [True, False]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("good_steps", [0, 2], ids=["first step of the warmup", "later"])
def test_a_bad_step_changes_no_bit(kind: str, accumulate: int, good_steps: int) -> None:
    """One bad sample, so with accumulation one bad part, neither the first nor the last."""
    step, state = compiled(accumulate), fresh()
    for i in range(good_steps):
        state, metrics = step(state, batch(i))
        assert metrics["finite"]
    after, metrics = step(state, batch(9, s5=BAD[kind]))
    loss_is_finite, norm_is_finite = (bool(np.isfinite(metrics[name])) for name in ("loss", "grad_norm"))
    assert (loss_is_finite, norm_is_finite) == ("of a finite loss" in kind, "with finite gradients" in kind)
    assert not metrics["finite"]
    for name in ("params", "opt", "average"):
        assert same_bits(getattr(after, name), getattr(state, name)), name
    assert (after.step, after.bad, after.skipped) == (good_steps + 1, 1, 1)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_after_bad_steps_training_goes_on(accumulate: int) -> None:
    """As if the bad batches had not been there, but at the rate of the step that it is."""
    step = compiled(accumulate)
    state, _ = step(fresh(), batch(0))
    good = state
    for bad in range(3):
        state, _ = step(state, batch(1, s0=1 + bad))
        assert (state.bad, state.skipped) == (bad + 1, bad + 1)
    state, metrics = step(state, batch(2))
    assert (state.step, state.bad, state.skipped) == (5, 0, 3)
    assert metrics["finite"] and metrics["learning_rate"] == RATES[4]
    expected, _ = step(replace(good, step=jnp.asarray(4, jnp.int32)), batch(2))
    for name in ("params", "opt", "average"):
        assert same_bits(getattr(state, name), getattr(expected, name)), name


def test_the_schedule_follows_the_counter() -> None:
    step, state, rates = compiled(), fresh(), []
    for i in range(4):
        state, metrics = step(state, batch(i, s0=NAN_LOSS if i == 1 else GOOD))
        rates.append(metrics["learning_rate"])
    assert np.array_equal(rates, RATES[:4])
    _, metrics = step(replace(state, step=jnp.asarray(11, jnp.int32)), batch())
    assert metrics["learning_rate"] == RATES[11]


def test_a_step_subtracts_rate_times_update_then_moves_the_average() -> None:
    state, _ = compiled()(fresh(), batch(0))
    after, metrics = compiled()(state, batch(1))
    graph, _ = abstract_model(CONFIG)
    tx = optimizer(OPTIM, CONFIG)

    @jax.jit
    @jax.grad
    def gradient(params: Nested, batch: Batch) -> jax.Array:
        return loss(nnx.merge(graph, params), batch, jax.random.key(0), None)[0]

    gradients = gradient(state.params, batch(1))
    updates, _ = jax.jit(tx.update)(gradients, state.opt, state.params)
    params = jax.tree.map(lambda leaf, update: leaf - RATES[1] * update, state.params, updates)
    for found, expected in ((after.params, params), (after.average, ema_update(state.average, params, 0.9, 0.1))):
        for name, leaf in flatten(expected).items():
            np.testing.assert_allclose(flatten(found)[name], leaf, rtol=0, atol=1e-6, err_msg=name)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradients)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 2 * OPTIM.clip, "clipping must have had something to do, and grad_norm to be the norm before it"


@pytest.mark.parametrize("accumulate", [2, 8])
def test_parts_add_up_to_the_whole(accumulate: int) -> None:
    """With an optimizer that returns gradients, and a rate of 1, the new parameters tell the gradient."""
    graph, _ = abstract_model(CONFIG)
    results = []
    for parts in (1, accumulate):
        step = make_train_step(graph, OBJECTIVE, optax.identity(), np.ones(1, np.float32), accumulate=parts)
        results.append(jax.jit(step)(fresh(optax.identity(), ema=False), batch()))
    (whole, metrics), (added, metrics_of_parts) = results
    start = flatten(drawn(CONFIG))
    for name, leaf in flatten(whole.params).items():
        gradient = np.abs(leaf - start[name]).max()
        assert gradient > 1e-4, f"{name} has no gradient, so nothing is tested"
        assert np.abs(flatten(added.params)[name] - leaf).max() <= 1e-6, name
    for name in ("loss", "grad_norm"):
        assert metrics_of_parts[name] == pytest.approx(float(metrics[name]), rel=1e-6)


def test_parts_take_turns_so_that_devices_keep_their_samples() -> None:
    parts = split({"index": jnp.arange(12), "image": jnp.zeros((12, 2, 2, 3))}, 3)
    assert parts["index"].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert parts["image"].shape == (3, 4, 2, 2, 3)
    with pytest.raises(BeitJaxError, match=r"batch of 12: expected a multiple of 5 \(--optim.accumulate\)"):
        split({"index": jnp.arange(12)}, 5)


@cache
def cheap(averages: bool = False, **options: Any) -> Callable[..., tuple[State, Metrics]]:
    graph, _ = abstract_model(CONFIG)
    options["decays"] = DECAYS if averages else None
    return jax.jit(make_train_step(graph, Criterion(prepare, cheap_loss), optax.identity(), RATES, **options))


def test_randomness_follows_seed_and_step_alone() -> None:
    def draw(seed: int, number: int, seen: int, accumulate: int = 1) -> float:
        state = replace(fresh(optax.identity()), step=jnp.asarray(number, jnp.int32))
        return float(cheap(seed=seed, accumulate=accumulate)(state, batch(seen))[1]["draw"])

    assert draw(0, 3, seen=0) == draw(0, 3, seen=1)
    assert len({draw(0, 3, seen=0), draw(0, 4, seen=0), draw(1, 3, seen=0)}) == 3


def test_preparation_sees_the_whole_batch_and_loss_its_parts_with_different_randomness() -> None:
    draws, sizes = {}, []

    def prepare(batch: Batch, key: Any) -> Batch:
        sizes.append(len(batch["image"]))
        jax.debug.callback(lambda draw: draws.setdefault("prepare", float(draw)), jax.random.uniform(key))
        return batch

    def loss(model: Model, batch: Batch, key: Any, teacher: Nested | None) -> tuple[jax.Array, Metrics]:
        sizes.append(len(batch["image"]))
        number = batch["target"].argmax()
        jax.debug.callback(lambda n, draw: draws.setdefault(int(n), float(draw)), number, jax.random.uniform(key))
        return cheap_loss(model, batch, key, teacher)

    graph, _ = abstract_model(CONFIG)
    step = make_train_step(graph, Criterion(prepare, loss), optax.identity(), RATES, accumulate=SIZE)
    numbered = batch() | {"target": np.eye(SIZE, dtype=np.float32)}
    jax.block_until_ready(jax.jit(step)(fresh(optax.identity()), numbered))
    jax.effects_barrier()
    assert sizes[0] == SIZE and set(sizes[1:]) == {1}
    assert draws.keys() == {"prepare", *range(SIZE)} and len(set(draws.values())) == SIZE + 1


@pytest.mark.parametrize("ema", [True, False])
def test_an_objective_gets_the_average_as_its_teacher(ema: bool) -> None:
    after, metrics = cheap(averages=ema)(fresh(optax.identity(), ema=ema), batch())
    assert metrics["teacher"] == ema and bool(after.average) == ema


def test_the_same_run_twice_gives_the_same_bits() -> None:
    ends = []
    for _ in range(2):
        state = fresh()
        for i in range(3):
            state, _ = compiled(4)(state, batch(i))
        ends.append(state)
    assert same_bits(*ends)


def test_everything_of_the_state_may_be_donated() -> None:
    state = fresh()
    buffers = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in buffers}) == len(buffers)
    after, _ = compiled()(state, batch())
    assert jax.tree.structure(after) == jax.tree.structure(fresh())
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(fresh())
    ]


# --- The average and what follows the counter -------------------------------------------------------------------------


def norm(tree: Nested) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


@cache
def averaging() -> Callable[..., tuple[State, Metrics]]:
    """A table in which every number differs, and gains are not one minus decays."""
    graph, _ = abstract_model(CONFIG)
    decays = np.stack([np.linspace(0.9, 0.35, len(RATES)), np.linspace(0.2, 0.4, len(RATES))], 1).astype(np.float32)
    step = make_train_step(graph, Criterion(prepare, loss), optax.identity(), RATES + 0.1, decays=decays)
    return jax.jit(lambda state, batch: (*step(state, batch), jnp.asarray(decays)[state.step]))


def test_the_averages_decay_is_the_steps_row_of_the_table() -> None:
    """A skipped step uses up its row, as it does its learning rate."""
    state, rows = fresh(optax.identity()), []
    for i in range(4):
        bad = i == 1
        after, metrics, row = averaging()(state, batch(i, s0=NAN_LOSS if bad else GOOD))
        assert metrics["finite"] == (not bad)
        decay, gain = (1.0, 0.0) if bad else (float(number) for number in row)
        for name, leaf in flatten(after.average).items():
            expected = decay * flatten(state.average)[name] + gain * flatten(after.params)[name]
            np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-6, err_msg=name)
        rows.append((decay, gain))
        state = after
    assert len(set(rows)) == 4


def test_ema_distance_is_relative_to_the_parameters_after_the_step() -> None:
    state = fresh(optax.identity())
    after, metrics, _ = averaging()(state, batch())
    difference = jax.tree.map(lambda average, leaf: np.asarray(average) - np.asarray(leaf), after.average, after.params)
    assert metrics["ema_distance"] == pytest.approx(norm(difference) / norm(after.params), rel=1e-5)
    assert metrics["ema_distance"] > 0.01
    before = jax.tree.map(lambda average, leaf: np.asarray(average) - np.asarray(leaf), after.average, state.params)
    assert norm(before) / norm(state.params) != pytest.approx(float(metrics["ema_distance"]), rel=1e-3)


def test_what_stands_beside_the_parameters_without_decays_is_kept_and_not_measured() -> None:
    """As a tokenizer, which is no average and need not look like the parameters."""
    frozen = {"tokenizer": {"kernel": jnp.arange(4.0)}}
    state = replace(fresh(optax.identity(), ema=False), frozen=frozen)
    after, metrics = cheap()(state, batch())
    assert same_bits(after.frozen, frozen) and metrics["teacher"] and "ema_distance" not in metrics


@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_part_of_a_batch_finds_the_schedules_scalars(accumulate: int) -> None:
    """They follow the counter, which bad steps move too, and they are no arrays to be split."""
    shapes = []

    def loss(model: Model, batch: Batch, key: Any, teacher: Nested | None) -> tuple[jax.Array, Metrics]:
        shapes.append((batch["temperature"].shape, batch["number"].shape, len(batch["image"])))
        value = model.classifier.bias[...].sum() * batch["temperature"]
        seen = {"temperature": batch["temperature"], "number": batch["number"].astype(jnp.float32)}
        return jnp.where((batch["kind"] == GOOD).all(), value, jnp.nan), seen

    def schedule(step: jax.Array) -> Metrics:
        return {"temperature": 1.0 / (1.0 + step), "number": step * 3}

    graph, _ = abstract_model(CONFIG)
    objective = Criterion(prepare, loss, schedule)
    step = jax.jit(make_train_step(graph, objective, optax.identity(), RATES, accumulate=accumulate))
    state = fresh(optax.identity(), ema=False)
    for i in range(3):
        state, metrics = step(state, batch(i, s0=NAN_LOSS if i == 1 else GOOD))
        assert (metrics["temperature"], metrics["number"]) == (pytest.approx(1.0 / (1.0 + i)), 3.0 * i)
    assert state.skipped == 1 and set(shapes) == {((), (), SIZE // accumulate)}


# --- Running statistics -----------------------------------------------------------------------------------------------


@cache
def segmentation_step() -> Callable[[State, Batch], tuple[State, Metrics]]:
    graph, _ = abstract_model(SEGMENTER)
    objective = segmentation(SegmentationRecipe("test"), SEGMENTER)
    return jax.jit(
        make_train_step(graph, objective, optimizer(OPTIM, SEGMENTER), RATES[1:], accumulate=2, decays=DECAYS)
    )


def segmentation_state() -> State:
    params = drawn(SEGMENTER)
    return initial_state(params, optimizer(OPTIM, SEGMENTER), statistics=statistics(SEGMENTER), average=True)


def segmentation_batch() -> Batch:
    rng = np.random.default_rng(3)
    return {
        "image": rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8),
        "label": rng.integers(0, 3, (4, 16, 16)).astype(np.int32),
    }


def test_running_statistics_go_from_part_to_part() -> None:
    state = segmentation_state()
    assert flatten(state.stats).keys() == statistics(SEGMENTER)
    assert not flatten(state.params).keys() & statistics(SEGMENTER)
    assert jax.tree.structure(state.average) == jax.tree.structure(state.params)
    after, metrics = segmentation_step()(state, segmentation_batch())
    assert metrics["finite"]

    @jax.jit
    def moved(stats: Nested, images: np.ndarray) -> Nested:
        model = nnx.merge(abstract_model(SEGMENTER)[0], variables(state.params, stats))
        model(images, train=True)
        return batch_statistics(model)

    images = segmentation_batch()["image"].astype(np.float32) / 127.5 - 1.0
    expected = flatten(moved(moved(state.stats, images[0::2]), images[1::2]))
    for name, leaf in flatten(after.stats).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert not np.array_equal(leaf, flatten(state.stats)[name]), name


def test_a_bad_step_leaves_running_statistics_alone() -> None:
    state = segmentation_state()
    broken = flatten(state.params)
    broken["decode_head/classifier/bias"] = jnp.full_like(broken["decode_head/classifier/bias"], jnp.nan)
    state = replace(state, params=unflatten(broken))
    after, metrics = segmentation_step()(state, segmentation_batch())
    assert not metrics["finite"]
    for field in fields(State):
        if field.name not in ("step", "bad", "skipped", "frozen", "fixed"):
            assert same_bits(getattr(after, field.name), getattr(state, field.name)), field.name
    assert after.frozen == state.frozen == after.fixed == state.fixed == {}


# --- Parameters that are fixed ----------------------------------------------------------------------------------------


class Head(Division):
    """The classifier learns, and everything else is fixed."""

    def divide(self, params: Nested, key: Any) -> tuple[Nested, Nested]:
        return divided(params, [name for name in flatten(params) if not name.startswith("classifier/")])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_fixed_has_no_gradient_no_moments_and_no_average(accumulate: int) -> None:
    """The others move as if it were not there: the norm that clips them is their own."""
    division, (graph, _), tx = Head(), abstract_model(CONFIG), optimizer(OPTIM, CONFIG)
    params, fixed = division.divide(drawn(CONFIG), jax.random.key(0))
    state = initial_state(params, tx, average=True, fixed=fixed)
    assert flatten(state.params).keys() == flatten(state.average).keys() == {"classifier/bias", "classifier/kernel"}
    options = {"accumulate": accumulate, "decays": DECAYS}
    after, metrics = jax.jit(make_train_step(graph, OBJECTIVE, tx, RATES + 0.01, division=division, **options))(
        state, batch()
    )
    assert same_bits(after.fixed, fixed)
    assert jax.tree.structure(after) == jax.tree.structure(state)

    def value(learned: Nested) -> jax.Array:
        return loss(nnx.merge(graph, division.join(learned, fixed)), batch(), jax.random.key(0), None)[0]

    gradients = jax.jit(jax.grad(value))(params)
    assert metrics["grad_norm"] == pytest.approx(norm(gradients), rel=1e-5)
    updates, _ = tx.update(gradients, tx.init(params), params)
    for name, leaf in flatten(after.params).items():
        expected = flatten(params)[name] - (RATES[0] + np.float32(0.01)) * flatten(updates)[name]
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-6, err_msg=name)
