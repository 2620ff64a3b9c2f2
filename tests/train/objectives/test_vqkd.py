"""Training of VQ-KD: what gets a gradient and what moves, its parts, teachers, eight devices, and digits learnt."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits
from tolerances import GRADIENT, MODEL
from virtual import xla_flags

from beit_jax.config import BeitConfig
from beit_jax.convert import load
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.images import ImageProcessor
from beit_jax.models.build import build_model, param_shapes
from beit_jax.tokenizers.build import abstract_tokenizer, build_tokenizer, tokenizer_shapes
from beit_jax.tokenizers.vqkd import VqkdConfig, VqkdTokenizer, l2_normalised
from beit_jax.train.distributed.sharding import AXES, state_shardings
from beit_jax.train.objectives.teachers import Teacher, abstract_teacher, teacher_params
from beit_jax.train.objectives.vqkd import (
    VqkdOptions,
    VqkdRecipe,
    cosine_distance,
    initial_tokenizer,
    straight_through,
    tokenizer_config,
    tokenizer_statistics,
    vqkd,
)
from beit_jax.train.recipe import ModelOptions, OptimOptions, Recipe
from beit_jax.train.step.optim import optimizer, weight_decay_mask
from beit_jax.train.step.state import State, initial_state, variables
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import Nested, flatten, unflatten
from beit_jax.variants import VARIANTS
from beit_jax.weights import NativeCheckpoint

PATCH, SIZE = 8, 5
TINY = VqkdConfig(
    image_size=(16, 24),
    patch_size=(PATCH, PATCH),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=24,
    vocab_size=12,
    codebook_dim=4,
    target_size=SIZE,
)
RECIPE = VqkdRecipe(
    "vqkd",
    model=ModelOptions(dtype="float32", drop_path=0.0),
    vqkd=VqkdOptions(vocab_size=12, codebook_dim=4, decoder_layers=1, commitment=0.5),
)
LENGTH = 1e-6
"""Of a code of length one, after it was normalised in float32."""


class MeanColour(nnx.Module):
    """A teacher from elsewhere: a linear map of every patch's mean colour."""

    def __init__(self, patch: int, target_size: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, target_size)))
        self.patch = patch

    @property
    def target_size(self) -> int:
        return self.kernel.shape[1]

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        b, h, w, _ = pixel_values.shape
        cut = pixel_values.reshape(b, h // self.patch, self.patch, w // self.patch, self.patch, 3)
        return cut.mean(axis=(2, 4)) @ self.kernel[...]


def mean_colour(patch: int = PATCH, target_size: int = SIZE) -> tuple[nnx.GraphDef[Any], Nested]:
    teacher: Teacher = MeanColour(patch, target_size, nnx.Rngs(3))
    graph, state = nnx.split(teacher)
    return graph, nnx.to_pure_dict(state)


def random_tokenizer() -> Nested:
    """No parameter at zero; the codebook as training finds it at first."""
    rng = np.random.default_rng(0)
    flat = {name: rng.standard_normal(shape) * 0.4 for name, shape in tokenizer_shapes(TINY).items()}
    flat |= {name: np.zeros_like(leaf) for name, leaf in flat.items() if name.startswith("codebook/")}
    codes = rng.standard_normal((TINY.vocab_size, TINY.codebook_dim))
    flat["codebook/embedding"] = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    return unflatten({name: jnp.asarray(leaf, jnp.float32) for name, leaf in flat.items()})


def images(count: int = 8, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (count, *TINY.image_size, 3), dtype=np.uint8))


def compute(
    recipe: Recipe, params: Nested, key: jax.Array | None, teacher: tuple[Any, Nested] | None = None
) -> tuple[jax.Array, dict[str, jax.Array], Nested]:
    """Loss, metrics, and the codebook after it."""
    graph, beside = teacher or mean_colour()
    return computation(recipe, graph)(params, key, beside)


@cache
def computation(recipe: Recipe, graph: Any) -> Callable[..., tuple[jax.Array, dict[str, jax.Array], Nested]]:
    objective = vqkd(recipe, graph)

    @jax.jit
    def run(params: Nested, key: jax.Array | None, beside: Nested) -> tuple[jax.Array, dict[str, jax.Array], Nested]:
        model: Any = build_tokenizer(TINY, params)
        batch = objective.prepare({"image": images()}, jax.random.key(0))
        loss, metrics = objective.loss(model, batch, key, beside)
        return loss, metrics, nnx.to_pure_dict(nnx.state(model.codebook))

    return run


# --- The loss ---------------------------------------------------------------------------------------------------------


class Given(VqkdTokenizer):
    """A tokenizer whose features are given, so that a gradient with respect to them can be asked for."""

    def encode(self, pixel_values: Any, *, remat: Any = "none") -> jax.Array:
        return self.given[...]


def test_gradient_of_features_is_the_decoders_and_the_commitments() -> None:
    graph, beside = mean_colour()
    objective = vqkd(RECIPE, graph)
    batch = objective.prepare({"image": images()}, jax.random.key(0))
    features = jax.random.normal(jax.random.key(4), (8, 2, 3, 4))
    params = random_tokenizer()
    shell = nnx.graphdef(nnx.eval_shape(lambda: Given(TINY, rngs=nnx.Rngs(0))))

    def loss(features: jax.Array) -> jax.Array:
        model = nnx.merge(shell, params)
        model.given = nnx.Param(features)
        return objective.loss(model, batch, None, beside)[0]

    def by_hand(features: jax.Array) -> tuple[jax.Array, jax.Array]:
        model: Any = build_tokenizer(TINY, params)
        directions, pull = jax.vjp(l2_normalised, features)
        codes = model.codebook.embedding[...][model.codebook.nearest(features)]
        target = nnx.merge(graph, beside)(batch["image"])
        from_decoder = jax.grad(lambda codes: cosine_distance(model.decode_codes(codes), target))(codes)
        return pull(from_decoder)[0], pull(0.5 * 2 * (directions - codes) / directions.size)[0]

    found, parts = jax.jit(jax.grad(loss))(features), jax.jit(by_hand)(features)
    expected = sum(parts)
    assert min(np.abs(part).max() for part in parts) > 1e-3
    assert np.abs(found - expected).max() < GRADIENT * np.abs(expected).max()


def test_straight_through() -> None:
    x, codes = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, 5.0]])
    assert_array_equal(straight_through(x, codes), codes)
    gradients = jax.grad(lambda x, codes: jnp.square(straight_through(x, codes)).sum(), argnums=(0, 1))(x, codes)
    assert_array_equal(gradients[0], 2 * codes)
    assert_array_equal(gradients[1], jnp.zeros((1, 2)))


def test_cosine_distance() -> None:
    a, b = jnp.asarray([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]), jnp.asarray([[6.0, 8.0], [0.0, 9.0], [-1.0, 0.0]])
    assert_allclose(cosine_distance(a, b), (0 + 1 + 2) / 3, rtol=1e-6)
    assert np.isfinite(cosine_distance(a, jnp.zeros_like(a)))


def test_nothing_of_the_teacher_is_learnt() -> None:
    graph, beside = mean_colour()
    gradients = jax.grad(lambda beside: compute(RECIPE, random_tokenizer(), None, (graph, beside))[0])(beside)
    assert not np.asarray(gradients["kernel"]).any()
    other = {"kernel": beside["kernel"] + 1.0}  # whose features do count
    assert compute(RECIPE, random_tokenizer(), None)[0] != compute(RECIPE, random_tokenizer(), None, (graph, other))[0]


def test_teacher_without_parameters() -> None:
    graph, beside = mean_colour()

    class Frozen(nnx.Module):
        target_size = SIZE

        def __call__(self, pixel_values: jax.Array) -> jax.Array:
            return nnx.merge(graph, beside)(pixel_values)

    frozen = nnx.graphdef(Frozen())
    expected = compute(RECIPE, random_tokenizer(), None)[0]
    assert_allclose(compute(RECIPE, random_tokenizer(), None, (frozen, {}))[0], expected, rtol=1e-6)


def test_recomputing_changes_nothing() -> None:
    def gradient(recipe: Recipe) -> Nested:
        params = random_tokenizer()
        book = {"codebook": params.pop("codebook")}
        return jax.jit(jax.grad(lambda params: compute(recipe, variables(params, book), None)[0]))(params)

    blocks = replace(RECIPE, model=replace(RECIPE.model, remat="block"))
    for one, other in zip(*(jax.tree.leaves(gradient(recipe)) for recipe in (RECIPE, blocks)), strict=True):
        assert_allclose(one, other, atol=GRADIENT * np.abs(one).max())


@pytest.mark.parametrize(
    ("patch", "size", "found"), [(4, SIZE, r"\[8, 4, 6, 5\]"), (PATCH, 7, r"\[8, 2, 3, 7\]")], ids=["grid", "size"]
)
def test_teacher_that_does_not_fit(patch: int, size: int, found: str) -> None:
    with pytest.raises(BeitJaxError, match=rf"teacher: expected features \[8, 2, 3, 5\] .*, found {found}"):
        compute(RECIPE, random_tokenizer(), None, mean_colour(patch, size))


# --- The codebook -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [0.0, 1.0])
def test_evaluation_does_not_move_the_codebook(begun: float) -> None:
    params = random_tokenizer()
    params["codebook"]["initialised"] = jnp.full((1,), begun)
    before = {name: np.array(leaf) for name, leaf in params["codebook"].items()}
    _, metrics, after = compute(RECIPE, params, None)
    assert after.keys() == before.keys()
    for name, leaf in before.items():
        assert_array_equal(after[name], leaf)
    assert metrics["codebook_used"] > 0


@pytest.mark.parametrize("kmeans", [True, False])
def test_training_moves_it_and_begins_once(kmeans: bool) -> None:
    recipe = replace(RECIPE, vqkd=replace(RECIPE.vqkd, kmeans=kmeans))
    params = random_tokenizer()
    first = compute(recipe, params, jax.random.key(1))[2]
    assert first["initialised"] == 1
    assert first["cluster_size"].sum() == (48 if kmeans else 0)
    again = compute(recipe, params | {"codebook": first}, jax.random.key(2))[2]
    assert_array_equal(again["cluster_size"], first["cluster_size"])
    began = np.abs(first["embedding"] - params["codebook"]["embedding"]).max()
    assert began > 0.3 if kmeans else 1e-4 < began < 0.03
    assert np.abs(again["embedding"] - first["embedding"]).max() < 0.03  # other clusters: this key draws other starts
    for book in (first, again):
        assert_allclose(np.linalg.norm(book["embedding"], axis=1), 1, atol=LENGTH)
    assert_allclose(first["usage"].sum(), 0.01 * 48, rtol=1e-5)
    assert_allclose(again["usage"].sum(), (1 - 0.99**2) * 48, rtol=1e-5)


def test_codes_are_used_before_they_move() -> None:
    """The loss of a training step is the evaluation's, of the same codebook."""
    params = random_tokenizer()
    params["codebook"]["initialised"] = jnp.ones((1,))
    evaluated, trained = (compute(RECIPE, params, key)[:2] for key in (None, jax.random.key(1)))
    for one, other in zip(jax.tree.leaves(evaluated), jax.tree.leaves(trained), strict=True):
        assert_allclose(one, other, rtol=1e-6)


# --- Its parts --------------------------------------------------------------------------------------------------------


def test_configuration() -> None:
    """BEiT v2's published tokenizer is that of the defaults and the base variant."""
    recipe = VqkdRecipe("vqkd", model=ModelOptions(drop_path=0.0))
    assert tokenizer_config(recipe, VARIANTS["beit_base_patch16_224"], 512) == VqkdConfig()
    assert tokenizer_config(RECIPE, VARIANTS["beit_large_patch16_384"], 768) == VqkdConfig(
        (384, 384), (16, 16), 1024, 24, 16, 4096, 1024, 1, 16, 4096, 12, 4, 768
    )


@pytest.mark.parametrize(
    ("option", "value"), [("drop_path", 0.1), ("dropout", 0.2), ("attention_dropout", 0.3), ("layer_scale", 0.4)]
)
def test_options_that_it_does_not_have(option: str, value: float) -> None:
    recipe = replace(RECIPE, model=replace(RECIPE.model, **{option: value}))
    with pytest.raises(BeitJaxError, match=rf"--model.{option.replace('_', '-')}: .*expected 0, found {value}"):
        tokenizer_config(recipe, VARIANTS["beit_base_patch16_224"], 512)


def test_initial_values() -> None:
    """As drawn by the original: its fine-tuning model's transformers, normal task layers, codes of length one."""
    config = replace(TINY, hidden_size=96, decoder_hidden_size=96, codebook_dim=16, target_size=80)
    flat = jax.jit(lambda key: flatten(initial_tokenizer(config, key)))(jax.random.key(0))
    assert {name: leaf.shape for name, leaf in flat.items()} == tokenizer_shapes(config)
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype(jnp.float32)}
    for part in ("encoder", "decoder"):
        for name in ("embeddings/cls_token", "embeddings/position_embeddings", "blocks/attention/qkv_kernel"):
            assert_allclose(np.std(flat[f"{part}/{name}"]), 0.02, rtol=0.25)
        for name in ("blocks/attention/out_kernel", "blocks/mlp/fc2/kernel"):
            for layer, kernel in enumerate(flat[f"{part}/{name}"], start=1):
                assert_allclose(np.std(kernel), 0.02 / np.sqrt(2 * layer), rtol=0.1)
        for name in ("blocks/attention/q_bias", "blocks/attention/out_bias", "blocks/mlp/fc1/bias", "pooler_norm/bias"):
            assert not flat[f"{part}/{name}"].any()
        assert (flat[f"{part}/pooler_norm/scale"] == 1).all()
    for part, fan_in in (("encoder", 3 * PATCH**2), ("decoder", 16)):  # as torch draws convolutions
        assert_allclose(np.abs(flat[f"{part}/embeddings/patch_kernel"]).max(), fan_in**-0.5, rtol=0.02)
        assert_allclose(np.abs(flat[f"{part}/embeddings/patch_bias"]).max(), fan_in**-0.5, rtol=0.1)
    for name in ("encode_task/fc1", "encode_task/fc2", "decode_task/fc1", "decode_task/fc2"):
        assert_allclose(np.std(flat[f"{name}/kernel"]), 0.02, rtol=0.1)
        assert not flat[f"{name}/bias"].any()
    assert not np.array_equal(flat["encoder/embeddings/cls_token"], flat["decoder/embeddings/cls_token"])
    assert_allclose(np.linalg.norm(flat["codebook/embedding"], axis=1), 1, atol=LENGTH)
    assert flat["codebook/initialised"] == 0


def test_no_two_leaves_share_a_buffer() -> None:
    """Else a donated state would be refused."""
    leaves = jax.tree.leaves(initial_tokenizer(TINY, jax.random.key(0)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_what_gradients_move_and_what_decays() -> None:
    names = tokenizer_shapes(TINY).keys()
    fixed = tokenizer_statistics(TINY)
    assert fixed == {name for name in names if name.startswith("codebook/")}
    state = jax.eval_shape(
        partial(initial_state, tx=optimizer(RECIPE.optim, TINY.encoder), statistics=fixed),
        abstract_tokenizer(TINY)[1],
    )
    assert flatten(state.params).keys() == names - fixed
    decays = flatten(weight_decay_mask(state.params))
    assert {name for name, yes in decays.items() if yes} == {name for name in decays if name.endswith("kernel")}


def test_published_size_is_split_nearly_evenly() -> None:
    """Every tensor of tokenizer and teacher has a rule; only the codebook, which all read, is whole on every device."""
    mesh: Any = AbstractMesh((1, 8, 1), AXES, (AxisType.Auto,) * 3)
    tokenizer = abstract_tokenizer(VqkdConfig())[1]
    trees = {
        "teacher": abstract_teacher(VARIANTS["beit_base_patch16_224_pt22k"], None, None)[1],
        "tokenizer": tokenizer,
    }
    for tree in trees.values():
        shapes, places = flatten(tree), flatten(state_shardings(tree, mesh))
        held = sum(prod(places[name].shard_shape(leaf.shape)) for name, leaf in shapes.items())
        assert held < 1.1 / 8 * sum(prod(leaf.shape) for leaf in shapes.values())


# --- Teachers ---------------------------------------------------------------------------------------------------------

ENCODER = BeitConfig(
    image_size=(16, 24),
    patch_size=(PATCH, PATCH),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    position_bias="shared",
    vocab_size=9,
    labels=("a", "b"),
)
TEACHERS = {
    "masked images": replace(ENCODER, task="masked_image_modeling", use_mask_token=True),
    "class token": replace(ENCODER, task="image_classification", pooling="cls"),
    "mean": replace(ENCODER, task="image_classification"),
    "encoder": replace(ENCODER, pooling="cls"),
}
PROCESSOR = ImageProcessor(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def checkpoint(config: BeitConfig, processor: ImageProcessor = PROCESSOR) -> NativeCheckpoint:
    rng = np.random.default_rng(5)
    params = {name: rng.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in param_shapes(config).items()}
    return NativeCheckpoint(config, processor, params)


def encoder_teacher(source: NativeCheckpoint) -> Any:
    graph, shapes = abstract_teacher(source.config, source.processor.mean, source.processor.std)
    params = teacher_params(source)
    assert {name: leaf.shape for name, leaf in flatten(params).items()} == {
        name: leaf.shape for name, leaf in flatten(shapes).items()
    }
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("name", TEACHERS)
def test_encoders_as_teachers(name: str) -> None:
    """The features are what the model's own task reads of the patches, of normalised pixels."""
    source = checkpoint(TEACHERS[name])
    model: Any = build_model(source.config, unflatten({n: jnp.asarray(v) for n, v in source.params.items()}))
    pixels = jnp.asarray(np.random.default_rng(6).random((2, 16, 24, 3), np.float32))
    inputs = (pixels - jnp.asarray((0.1, 0.2, 0.3))) / jnp.asarray((0.4, 0.5, 0.6))

    @jax.jit
    def features(model: Any) -> jax.Array:
        hidden = model(inputs).last_hidden_state[:, 1:]
        return model.norm(hidden) if name == "masked images" else hidden

    expected, teacher = features(model), encoder_teacher(source)
    found = jax.jit(lambda teacher: teacher(pixels))(teacher)
    assert found.shape == (2, 2, 3, teacher.target_size) and found.dtype == jnp.float32
    assert_allclose(found.reshape(2, 6, 16), expected, atol=MODEL * np.abs(expected).max())
    assert not [leaf for leaf in flatten(teacher_params(source)) if leaf.startswith(("lm_head", "classifier"))]


def test_teacher_of_pixels_as_they_are() -> None:
    plain = encoder_teacher(checkpoint(TEACHERS["mean"], ImageProcessor(mean=None, std=None)))
    neutral = encoder_teacher(checkpoint(TEACHERS["mean"], ImageProcessor(mean=(0.0,) * 3, std=(1.0,) * 3)))
    pixels = jnp.full((1, 16, 24, 3), 0.7)
    features = jax.jit(lambda teacher: teacher(pixels))
    assert_array_equal(features(plain), features(neutral))


def test_incomplete_teacher() -> None:
    source = checkpoint(TEACHERS["encoder"])
    del source.params["norm/scale"]
    with pytest.raises(BeitJaxError, match=r"^teacher: beit/norm/scale: expected \[16\] .*, found nothing; convert"):
        teacher_params(source)


# --- Eight devices ----------------------------------------------------------------------------------------------------


def first_step() -> dict[str, Any]:
    """Loss, codebook and a gradient of a training step that begins with k-means, from images wherever they lie."""
    graph, beside = mean_colour()
    objective, params = vqkd(RECIPE, graph), random_tokenizer()
    book = {"codebook": params.pop("codebook")}

    def loss(params: Nested, image: jax.Array) -> Any:
        model: Any = build_tokenizer(TINY, variables(params, book))
        value, metrics = objective.loss(
            model, objective.prepare({"image": image}, jax.random.key(0)), jax.random.key(1), beside
        )
        return value, (metrics | {"loss": value}, nnx.to_pure_dict(nnx.state(model.codebook)))

    batch = images(16)
    if len(jax.devices()) > 1:
        mesh = jax.make_mesh((4, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)
        jax.set_mesh(mesh)
        batch = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
    gradients, (metrics, book) = jax.jit(jax.grad(loss, has_aux=True))(params, batch)
    kept = {"kernel": gradients["encode_task"]["fc2"]["kernel"], **metrics, **book}
    return {name: np.asarray(leaf).tolist() for name, leaf in kept.items()}


def test_step_on_eight_devices() -> None:
    flags = {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    support = str(Path(__file__).parents[2] / "support")
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | flags | {"PYTHONPATH": support},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, expected in first_step().items():
        scale = np.abs(expected).max()
        assert_allclose(found[name], expected, rtol=0, atol=GRADIENT * scale, err_msg=name)


# --- Learning ---------------------------------------------------------------------------------------------------------

STEPS, BATCH, CODES = 120, 32, 64


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out images [n, 32, 32, 3] uint8."""
    pixels = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    pictures = [Image.fromarray(digit).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR) for digit in pixels]
    return np.stack(pictures[:1500]), np.stack(pictures[1500:])


@pytest.mark.thorough
def test_digits() -> None:
    """The tokens tell more of a classifier's features than positions do, and at least two thirds of them are used."""
    source = load(resolve(Path(str(files("beit_jax") / "digits"))))
    graph, _ = abstract_teacher(source.config, source.processor.mean, source.processor.std)
    recipe = VqkdRecipe(
        "digits",
        model=ModelOptions(dtype="float32", drop_path=0.0),
        vqkd=VqkdOptions(vocab_size=CODES, codebook_dim=16, decoder_layers=1),
        optim=OptimOptions(weight_decay=1e-4, beta2=0.99),
    )
    variant = BeitConfig(
        image_size=(32, 32), patch_size=(4, 4), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96,
    )  # fmt: skip
    config = tokenizer_config(recipe, variant, 64)
    objective, tx = vqkd(recipe, graph), optimizer(recipe.optim, config.encoder)
    rates = np.minimum(np.linspace(0, 1.8e-2, STEPS + 1, dtype=np.float32), 3e-3)
    step = jax.jit(make_train_step(abstract_tokenizer(config)[0], objective, tx, rates), donate_argnums=0)

    params = jax.jit(partial(initial_tokenizer, config))(jax.random.key(0))
    state = initial_state(params, tx, statistics=tokenizer_statistics(config))
    state = replace(state, frozen=jax.tree.map(jnp.asarray, teacher_params(source)))
    train, held_out = digits()
    rng, logs = np.random.default_rng(0), []
    for _ in range(STEPS):
        state, metrics = step(state, {"image": train[rng.choice(len(train), BATCH, replace=False)]})
        assert_allclose(np.linalg.norm(state.stats["codebook"]["embedding"], axis=1), 1, atol=LENGTH)
        logs.append({name: float(value) for name, value in metrics.items()})

    def mean(name: str, logs: list[dict[str, float]]) -> float:
        return float(np.mean([log[name] for log in logs]))

    assert mean("rec_loss", logs[:5]) > 0.8 and mean("rec_loss", logs[-10:]) < 0.6
    assert mean("codebook_used", logs[-10:]) > 2 / 3 and mean("perplexity", logs[-10:]) > CODES / 4

    batch = objective.prepare({"image": jnp.asarray(held_out)}, jax.random.key(0))
    before = jax.tree.map(np.array, state.stats["codebook"])

    @jax.jit
    def evaluate(state: State) -> tuple[dict[str, jax.Array], jax.Array]:
        model = build_tokenizer(config, variables(state.params, state.stats))
        target = l2_normalised(nnx.merge(graph, state.frozen)(batch["image"]))
        by_position = jnp.broadcast_to(target.mean(axis=0), target.shape)
        return objective.loss(model, batch, None, state.frozen)[1], cosine_distance(by_position, target)

    scores, of_positions = evaluate(state)
    assert scores["rec_loss"] < of_positions - 0.1
    assert scores["codebook_used"] > 2 / 3

    check_failed_step(step, state, train[:BATCH], before)


def check_failed_step(step: Any, state: State, batch: np.ndarray, before: Nested) -> None:
    """A loss that is no number leaves the codebook as it is."""
    broken = replace(state, frozen=jax.tree.map(lambda leaf: leaf * jnp.nan, state.frozen))
    after, metrics = step(broken, {"image": batch})
    assert not metrics["finite"] and after.bad == 1
    for name, leaf in before.items():
        assert_array_equal(after.stats["codebook"][name], leaf)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    json.dump(first_step(), sys.stdout)
