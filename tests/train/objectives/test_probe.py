"""Probes against the reference's hidden states and torch's losses; real features with heads and with neighbours."""

import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import torch
from flax import nnx
from numpy.testing import assert_allclose
from tolerances import GRADIENT, MODEL

import beit_jax
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import Model, abstract_model, build_model, param_shapes
from beit_jax.train.distributed.sharding import make_mesh
from beit_jax.train.evaluation.neighbours import knn
from beit_jax.train.objectives.linear_probe import (
    Heads,
    LinearProbeRecipe,
    ProbeScores,
    abstract_probe,
    block_features,
    describe,
    evaluate_probe,
    linear_probe,
    probe_params,
    summed_cross_entropy,
    token_features,
)
from beit_jax.train.recipe import DataOptions
from beit_jax.train.step.state import initial_state
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import flatten, unflatten

CONFIG = BeitConfig(
    image_size=(16, 16),
    patch_size=(8, 8),
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    position_bias="shared",
    pooling="cls",
)
CLASSES = 4


def random_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = param_shapes(CONFIG).items()
    return unflatten({name: jnp.asarray(rng.standard_normal(shape) * 0.3, jnp.float32) for name, shape in shapes})


def random_batch(size: int = 6, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8),
        "label": rng.integers(0, CLASSES, size).astype(np.int32),
    }


def on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in batch.items()}


# --- Features


@pytest.mark.parametrize("pooling", [True, False])
def test_features_are_those_of_the_references_blocks(tmp_path: Path, pooling: bool) -> None:
    torch_model = reference.random_model(**reference.TINY | {"use_mean_pooling": pooling, "num_labels": 5})
    ours, _ = beit_jax.from_pretrained(reference.save(torch_model, tmp_path / "hf"))
    pixels = reference.pixels(torch_model)
    states = reference.run(torch_model, pixels).hidden_states[1:]  # before the final norm; the embeddings left out
    expected = torch.stack([torch.cat([state[:, 0], state[:, 1:].mean(dim=1)], dim=-1) for state in states])
    found = block_features(ours, jnp.asarray(pixels))
    assert found.shape == (2, 2, 64) and found.dtype == jnp.float32
    assert_allclose(found, expected.numpy(), rtol=0, atol=MODEL)


def test_bfloat16_features_are_float32() -> None:
    model = build_model(CONFIG, random_params(), dtype=jnp.bfloat16)
    assert block_features(model, jnp.ones((2, 16, 16, 3))).dtype == jnp.float32


# --- Training


def test_initial_heads_are_drawn_as_the_original_draws_them() -> None:
    params = flatten(probe_params(BeitConfig(hidden_size=64, num_attention_heads=4), 50, jax.random.key(0)))
    assert set(params) == {"heads/kernel", "heads/bias"}
    kernel, bias = np.asarray(params["heads/kernel"]), np.asarray(params["heads/bias"])
    assert kernel.shape == (12, 128, 50) and bias.shape == (12, 50) and not bias.any()
    assert_allclose(kernel.std(axis=(1, 2)), 0.01, rtol=0.05)
    assert abs(np.corrcoef(kernel.reshape(12, -1))[0, 1]) < 0.05  # layers are drawn apart
    shapes = {name: leaf.shape for name, leaf in flatten(abstract_probe(CONFIG, CLASSES)[1]).items()}
    assert shapes == {"heads/kernel": (3, 32, CLASSES), "heads/bias": (3, CLASSES)}


def objective_and_inputs() -> tuple[Any, Any, dict[str, Any], dict[str, Any], Any]:
    recipe = LinearProbeRecipe(name="probe", data=DataOptions(statistics="imagenet"))
    objective = linear_probe(recipe, abstract_model(CONFIG)[0])
    graph, _ = abstract_probe(CONFIG, CLASSES)
    heads = jax.tree.map(lambda leaf: leaf * 10, probe_params(CONFIG, CLASSES, jax.random.key(1)))
    return objective, graph, heads, random_params(), objective.prepare(on_device(random_batch()), jax.random.key(0))


def test_loss_and_gradients_are_torchs() -> None:
    objective, graph, heads, backbone, batch = objective_and_inputs()

    def loss(heads: Any) -> Any:
        return objective.loss(nnx.merge(graph, heads), batch, None, backbone)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(heads)
    features = np.array(block_features(build_model(CONFIG, backbone), batch["image"]))
    kernel, bias = (torch.tensor(np.array(heads["heads"][name]), requires_grad=True) for name in ("kernel", "bias"))
    logits = [torch.from_numpy(f) @ k + b for f, k, b in zip(features, kernel, bias, strict=True)]
    target = torch.from_numpy(np.array(batch["label"])).long()
    expected = sum(torch.nn.functional.cross_entropy(each, target) for each in logits)
    expected.backward()
    assert_allclose(value, expected.item(), rtol=MODEL)
    for name, theirs in (("kernel", kernel.grad), ("bias", bias.grad)):
        assert_allclose(gradient["heads"][name], theirs, rtol=0, atol=GRADIENT * float(theirs.abs().max()))
    shares = [float((each.argmax(dim=1) == target).float().mean()) for each in logits]
    assert_allclose(metrics["accuracy"], max(shares), rtol=1e-6)


def test_no_gradient_reaches_the_backbone() -> None:
    objective, graph, heads, backbone, batch = objective_and_inputs()

    def loss(heads: Any, backbone: Any) -> Any:
        return objective.loss(nnx.merge(graph, heads), batch, None, backbone)[0]

    to_heads, to_backbone = jax.grad(loss, argnums=(0, 1))(heads, backbone)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(to_heads))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_backbone))
    assert loss(heads, jax.tree.map(lambda leaf: leaf * 1.1, backbone)) != loss(heads, backbone)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_engine_trains_heads_and_leaves_the_backbone_alone(accumulate: int) -> None:
    objective, graph, heads, backbone, _ = objective_and_inputs()
    tx, rates = optax.scale_by_adam(), np.full(3, 0.01, np.float32)
    step = jax.jit(make_train_step(graph, objective, tx, rates, accumulate=accumulate))
    state = initial_state(heads, tx, frozen=backbone)
    losses = []
    for _ in range(3):
        state, metrics = step(state, on_device(random_batch()))
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert set(flatten(state.params)) == {"heads/kernel", "heads/bias"}
    for before, after in zip(jax.tree.leaves(backbone), jax.tree.leaves(state.frozen), strict=True):
        assert np.array_equal(before, after)


# --- Evaluation


def plain_correct(backbone: Any, heads: Any, pixels: np.ndarray, labels: np.ndarray) -> list[int]:
    features = np.asarray(block_features(build_model(CONFIG, backbone), jnp.asarray(pixels)))
    logits = np.einsum("lbf,lfc->lbc", features, heads["heads"]["kernel"]) + np.asarray(heads["heads"]["bias"])[:, None]
    return (logits.argmax(axis=-1) == labels).sum(axis=1).tolist()


@pytest.mark.parametrize("size", [11, 4])
def test_every_block_is_scored_and_padding_is_not(size: int) -> None:
    backbone, heads = random_params(), probe_params(CONFIG, CLASSES, jax.random.key(1))
    rng = np.random.default_rng(2)
    pixels = rng.standard_normal((11, 16, 16, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, 11).astype(np.int32)
    batches = []
    for start in range(0, 11, size):
        rows = np.arange(start, start + size) % 11
        valid = np.arange(start, start + size) < 11
        batches.append({"image": pixels[rows], "label": labels[rows], "valid": valid, "index": rows})
    seen: list[int] = []
    scores = evaluate_probe(
        (abstract_probe(CONFIG, CLASSES)[0], heads),
        (abstract_model(CONFIG)[0], backbone),
        batches,
        mesh=make_mesh((-1, 1, 1)),
        advance=seen.append,
    )
    assert scores.images == sum(seen) == 11
    assert list(scores.correct) == plain_correct(backbone, heads, pixels, labels)
    assert scores.correct5 == (11,) * 3  # of four classes, all are among the five best


def test_labels_that_the_heads_do_not_have_are_refused() -> None:
    parts = (abstract_probe(CONFIG, CLASSES)[0], probe_params(CONFIG, CLASSES, jax.random.key(1)))
    batch = {"image": np.zeros((1, 16, 16, 3), np.float32), "label": np.array([4]), "valid": np.array([True])}
    with pytest.raises(BeitJaxError, match="labels 4 to 4, but the model's classes are 0 to 3"):
        evaluate_probe(parts, (abstract_model(CONFIG)[0], random_params()), [batch])


def test_the_best_block_is_told() -> None:
    scores = ProbeScores(10, (2, 7, 7), (4, 9, 8))
    assert (scores.best, scores.top1) == (2, 0.7)
    assert scores.as_dict()["blocks"][1] == {"block": 2, "top1": 0.7, "top5": 0.9}
    lines = describe(scores)
    assert lines[0] == "block  1   20.00 %  ########" and lines[-1] == "best: block 2, 70.00 % of 10 images"
    assert ProbeScores(0, (0,), (0,)).as_dict()["top1"] is None
    assert "nan" in describe(ProbeScores(0, (0,), (0,)))[0]


# --- Real features


@pytest.fixture(scope="module")
def digits() -> dict[str, np.ndarray]:
    """Features [1 + blocks, images, 128] of scikit-learn's digits by the embedded classifier, embeddings first."""
    script = Path(__file__).parents[2] / "reference" / "make_digits.py"
    spec = importlib.util.spec_from_file_location("make_digits", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, processor = beit_jax.from_pretrained(Path(str(files("beit_jax") / "digits")))
    found = {}
    for name, examples in zip(("train", "test"), module.split_digits(), strict=True):
        pixels = processor([image for image, _ in examples])
        found[name] = np.concatenate([np.asarray(_all_features(model, part)) for part in np.array_split(pixels, 6)], 1)
        found[f"{name}_labels"] = np.array([label for _, label in examples], np.int32)
    return found


@jax.jit
def _all_features(model: Model, pixels: jax.Array) -> jax.Array:
    return token_features(model(pixels, output_hidden_states=True).hidden_states)


def test_late_blocks_of_a_classifier_know_more_than_its_embeddings(digits: dict[str, np.ndarray]) -> None:
    features, labels = jnp.asarray(digits["train"]), jnp.asarray(digits["train_labels"])
    graph, params = nnx.split(Heads(len(digits["train"]), 128, 10, rngs=nnx.Rngs(0)))
    tx = optax.adamw(4e-3, weight_decay=1e-4)

    @jax.jit
    def step(params: Any, opt: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return summed_cross_entropy(nnx.merge(graph, params)(features), labels)

        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, updates), opt

    opt = tx.init(params)
    for _ in range(150):
        params, opt = step(params, opt)
    logits = nnx.merge(graph, params)(jnp.asarray(digits["test"]))
    found = (np.asarray(logits).argmax(axis=-1) == digits["test_labels"]).mean(axis=1)
    assert found[-1] >= 0.97 and found[-2] >= 0.95 and found[0] <= found[-2] - 0.1


def test_neighbours_of_late_features_are_of_the_same_class(digits: dict[str, np.ndarray]) -> None:
    shares = [
        (knn(train, digits["train_labels"], test)[:, 0] == digits["test_labels"]).mean()
        for train, test in zip(digits["train"][[0, -1]], digits["test"][[0, -1]], strict=True)
    ]
    assert shares[1] >= 0.97 and shares[1] > shares[0]
