"""Training of a discrete VAE: density, divergence, codes, schedules, what a run leaves behind, and digits."""

import io
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from scipy.integrate import quad

from beit_jax.errors import BeitJaxError
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, load_decoder, load_tokenizer, save_tokenizer
from beit_jax.train.data.digits import digits
from beit_jax.train.objectives.dvae import (
    DvaeOptions,
    DvaeRecipe,
    abstract_dvae,
    code_noise,
    configs,
    decoder_params,
    divergence_from_uniform,
    dvae,
    encoder_params,
    initial_dvae,
    negative_log_likelihood,
    relaxed_codes,
)
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.step.criterion import Criterion
from beit_jax.train.step.schedule import schedule_table
from beit_jax.train.step.state import initial_state
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import Nested, flatten, unflatten

TINY = DvaeOptions(vocab_size=12, width=8, groups=2, blocks=1, embedding=6)
SIZE = (8, 12)


def objective(options: DvaeOptions = TINY, steps: int = 100) -> Criterion:
    return dvae(DvaeRecipe(dvae=options), steps)


def images(count: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3)), jnp.uint8)


def jitted(task: Criterion, graph: nnx.GraphDef[Any]) -> Any:
    """Loss and metrics, from parameters, a batch and a key or None."""
    return jax.jit(lambda params, batch, key: task.loss(nnx.merge(graph, params), batch, key, None))


def evaluated(params: Nested, options: DvaeOptions = TINY, **scalars: Any) -> tuple[float, dict[str, float]]:
    """Loss and metrics of `images` without a key."""
    task, graph = objective(options), abstract_dvae(options, SIZE)[0]
    batch = task.prepare({"image": images()}, jax.random.key(0))
    loss, metrics = jitted(task, graph)(params, {**batch, **scalars}, None)
    return float(loss), {name: float(value) for name, value in metrics.items()}


def drawn(options: DvaeOptions, size: tuple[int, int]) -> Nested:
    """Parameters, by NumPy; logits are large enough that the divergence is, too."""
    rng = np.random.default_rng(1)
    shapes = {name: leaf.shape for name, leaf in flatten(abstract_dvae(options, size)[1]).items()}
    flat = {name: rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])) for name, shape in shapes.items()}
    flat = {name: leaf * (not name.endswith("bias")) for name, leaf in flat.items()}
    flat["encoder/output/kernel"] *= 8
    return unflatten({name: jnp.asarray(leaf, jnp.float32) for name, leaf in flat.items()})


@pytest.fixture(scope="module")
def params() -> Nested:
    return drawn(TINY, SIZE)


# --- Parts of the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.7)])
def test_the_density_integrates_to_one(mean: float, log_scale: float) -> None:
    """And half of it lies below the sigmoid of the mean, which is the median of a symmetric variable."""

    @jax.jit
    def density(x: float) -> jax.Array:
        return jnp.exp(-negative_log_likelihood(*map(jnp.asarray, (x, mean, log_scale))))

    median = 1 / (1 + np.exp(-mean))
    below, above = (
        quad(lambda x: float(density(x)), *ends, limit=200, epsabs=1e-6)[0] for ends in ((0, median), (median, 1))
    )
    assert (below, above) == (pytest.approx(0.5, abs=1e-4), pytest.approx(0.5, abs=1e-4))


def test_the_divergence_in_closed_form() -> None:
    """Zero for equal logits, the vocabulary's logarithm for certainty, ln(V / k) for k equally probable tokens."""
    certain = [200.0] + [0.0] * 7
    half = [50.0] * 4 + [-50.0] * 4
    shares = np.array([0.5, 0.2, 0.1, 0.05, 0.05, 0.05, 0.03, 0.02])
    logits = jnp.asarray([[[[3.0] * 8, certain, half, np.log(shares) + 7.0]]], jnp.float32)
    expected = [0.0, log(8), log(2), (shares * np.log(8 * shares)).sum()]
    np.testing.assert_allclose(divergence_from_uniform(logits)[0, 0], expected, atol=1e-5)


def test_codes_are_drawn_from_the_softmax() -> None:
    """The largest of logits plus noise; frequencies within four standard deviations."""
    shares, count = np.array([0.5, 0.3, 0.15, 0.05]), 20_000
    noise = code_noise(jax.random.key(3), (count, 4))
    drawn = np.bincount((jnp.log(jnp.asarray(shares)) + noise).argmax(axis=-1), minlength=4) / count
    assert (np.abs(drawn - shares) < 4 * np.sqrt(shares * (1 - shares) / count)).all()


def test_codes_become_one_hot_as_it_gets_cold() -> None:
    logits, noise = (code_noise(jax.random.key(i), (2, 3, 3, 5)) for i in (0, 1))
    warm, cold = (relaxed_codes(logits, noise, jnp.asarray(tau)) for tau in (1.0, 1e-3))
    np.testing.assert_allclose(warm.sum(axis=-1), 1, atol=1e-6)
    assert 0.1 < float(warm.max(axis=-1).min()) < 0.9
    np.testing.assert_allclose(cold, jax.nn.one_hot((logits + noise).argmax(axis=-1), 5), atol=1e-3)


# --- The objective ----------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    """Of 100 steps: temperature falls for 50 and beta grows for 10, each by half a cosine, and they stay there."""
    schedule = jax.jit(objective().schedule)
    expected = {
        0: (1.0, 0.0),
        5: (1 / 16 + 15 / 16 * (1 + np.cos(np.pi / 10)) / 2, 3.3),
        10: (1 / 16 + 15 / 16 * (1 + np.cos(np.pi / 5)) / 2, 6.6),
        25: (17 / 32, 6.6),
        50: (1 / 16, 6.6),
        99: (1 / 16, 6.6),
    }
    for step, (temperature, weight) in expected.items():
        found = {name: float(value) for name, value in schedule(jnp.int32(step)).items()}
        assert found == pytest.approx({"temperature": temperature, "divergence_weight": weight}, abs=1e-6), step


def test_schedules_of_no_steps_have_their_last_values_at_once() -> None:
    options = DvaeOptions(temperature_share=0.0, divergence_share=0.0)
    found = objective(options).schedule(jnp.int32(0))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"temperature": 1 / 16, "divergence_weight": 6.6}
    )


@pytest.mark.parametrize(("groups", "share"), [(4, 192), (2, 12)])
def test_beta_is_weighted_as_in_the_paper(groups: int, share: int) -> None:
    """A token of four groups covers 8 x 8 x 3 = 192 values."""
    options = DvaeOptions(vocab_size=12, width=4, groups=groups, blocks=1, embedding=6)
    graph, size = abstract_dvae(options, (8, 16))[0], (8, 16)
    pixels = jnp.asarray(np.random.default_rng(0).random((3, *size, 3)), jnp.float32)
    scalars = {"temperature": jnp.asarray(0.5), "divergence_weight": jnp.asarray(2.0)}
    loss, metrics = jitted(objective(options), graph)(
        drawn(options, size), {"image": pixels, **scalars}, jax.random.key(0)
    )
    assert float(metrics["divergence"]) > 1e-3
    expected = float(metrics["reconstruction"]) + 2.0 / share * float(metrics["divergence"])
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_evaluation_draws_nothing_and_shows_what_tokens_stand_for(params: Nested) -> None:
    loss, metrics = evaluated(params)
    assert (loss, metrics) == evaluated(params, temperature=jnp.asarray(9.0), divergence_weight=jnp.asarray(9.0))
    assert loss == pytest.approx(metrics["reconstruction"] + 6.6 / 12 * metrics["divergence"], rel=1e-6)
    model = nnx.merge(abstract_dvae(TINY, SIZE)[0], params)
    pixels = images() / 255
    tokens = model.encoder.tokens(pixels)
    assert metrics["mse"] == pytest.approx(float(jnp.square(model.decoder.decode(tokens) - pixels).mean()), rel=1e-5)
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    assert 2 < len(shares) < 12
    assert metrics["codebook_used"] == pytest.approx(len(shares) / 12)
    assert metrics["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_training_draws_by_its_key(params: Nested) -> None:
    task = objective()
    run = jitted(task, abstract_dvae(TINY, SIZE)[0])
    batch = {**task.prepare({"image": images()}, jax.random.key(0)), **task.schedule(jnp.int32(20))}
    first, again, other = (float(run(params, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1))
    assert first == again != other


def test_images_are_scaled_to_one() -> None:
    batch = objective().prepare({"image": jnp.asarray([[[[0, 51, 255]]]], jnp.uint8)}, jax.random.key(0))
    np.testing.assert_allclose(batch["image"], [[[[0, 0.2, 1]]]], rtol=1e-6)
    assert batch["image"].dtype == jnp.float32


def test_codes_and_distributions_are_float32_in_a_bfloat16_model(params: Nested) -> None:
    graph, shapes = abstract_dvae(TINY, SIZE, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in flatten(shapes).values()} == {jnp.dtype("float32")}

    def run(params: Nested) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        logits = model.encoder(images() / 255)
        return logits, model.decoder(jax.nn.softmax(logits))

    program = jax.make_jaxpr(run)(params)
    assert {aval.dtype for aval in program.out_avals} == {jnp.dtype("float32")}
    assert "bf16" in str(program)


# --- Parameters -------------------------------------------------------------------------------------------------------


def test_initial_parameters_fit_the_model_and_follow_the_key() -> None:
    draw = jax.jit(partial(initial_dvae, TINY, SIZE))
    first, other = (flatten(draw(jax.random.key(seed))) for seed in (0, 1))
    shapes = flatten(abstract_dvae(TINY, SIZE)[1])
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in first.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()
    }
    for name, leaf in first.items():
        assert np.array_equal(leaf, other[name]) == name.endswith("bias"), name
        assert not name.endswith("bias") or not leaf.any(), name


def test_a_run_leaves_a_tokenizer_and_a_decoder(params: Nested, tmp_path: Path) -> None:
    """Two native checkpoints that together do what the model did."""
    encoder_config, decoder_config = configs(TINY, SIZE)
    halves = {"encoder": (encoder_config, encoder_params(params)), "decoder": (decoder_config, decoder_params(params))}
    for name, (config, half) in halves.items():
        (tmp_path / name).mkdir()
        leaves = {path: np.asarray(leaf) for path, leaf in flatten(half).items()}
        save_tokenizer(tmp_path / name, TokenizerCheckpoint(config, leaves))
    tokenizer, decoder = load_tokenizer(tmp_path / "encoder"), load_decoder(tmp_path / "decoder")
    assert (tokenizer.vocab_size, tokenizer.patch_size, tokenizer.image_size) == (12, (2, 2), SIZE)
    model, pixels = nnx.merge(abstract_dvae(TINY, SIZE)[0], params), images() / 255
    tokens = tokenizer.tokens(pixels)
    assert np.array_equal(tokens, model.encoder.tokens(pixels)) and len(np.unique(tokens)) > 3
    assert np.array_equal(decoder.decode(tokens), model.decoder.decode(tokens))


def test_an_image_size_that_tokens_do_not_fill() -> None:
    with pytest.raises(BeitJaxError, match=r"image_size: expected multiples of 2, such as \[8, 8\], found \[8, 9\]"):
        configs(TINY, (8, 9))


# --- Learning ---------------------------------------------------------------------------------------------------------


def digit_images(split: str) -> np.ndarray:
    """[n, 16, 16, 3] uint8."""
    pictures = (Image.open(io.BytesIO(example["image"])) for example in digits().splits[split].examples)
    return np.stack([np.asarray(p.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)) for p in pictures])


@pytest.mark.thorough
def test_digits() -> None:
    """Held-out digits of 8 x 8 tokens look like themselves, and the vocabulary is in use."""
    options = DvaeOptions(
        vocab_size=64, width=16, groups=2, blocks=1, embedding=32, divergence=3.0, temperature_share=0.9
    )
    optim = OptimOptions(lr=5e-3, epochs=6, warmup_epochs=1)
    training, held_out, batch = digit_images("train"), jnp.asarray(digit_images("validation")), 32
    rates = schedule_table(optim, len(training) // batch)
    task, graph = objective(options, len(rates)), abstract_dvae(options, (16, 16))[0]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    state = initial_state(jax.jit(partial(initial_dvae, options, (16, 16)))(jax.random.key(0)), tx)
    step = jax.jit(make_train_step(graph, task, tx, rates), donate_argnums=0)
    rng = np.random.default_rng(0)
    for _ in rates:
        chosen = rng.choice(len(training), batch, replace=False)
        state, _ = step(state, {"image": jnp.asarray(training[chosen])})
    assert int(state.skipped) == 0

    prepared = task.prepare({"image": held_out}, jax.random.key(0))
    found = {name: float(value) for name, value in jitted(task, graph)(state.params, prepared, None)[1].items()}
    mean_image = training.mean(axis=0) / 255
    assert found["mse"] < 0.2 * float(jnp.square(prepared["image"] - mean_image).mean()), found
    assert found["codebook_used"] >= 0.5 and found["perplexity"] > 10, found
