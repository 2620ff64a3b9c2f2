"""Adapted kernels: they start as the kernels, multiply as their mergers, and leave the kernels without a gradient."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from flax import nnx

from beit_jax.adapters.kernel import AdaptedKernel, Factors, norms
from beit_jax.adapters.low_rank import (
    PROJECTIONS,
    Adapter,
    adapted,
    factor_shapes,
    initial_factors,
    merged,
    targets_of,
)
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import abstract_model, param_shapes
from beit_jax.models.elementary import project
from beit_jax.models.interface import REMAT, Remat
from beit_jax.train.costs.estimate import traced_flops
from beit_jax.tree import Nested, flatten, unflatten

CONFIG = BeitConfig(
    task="image_classification", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
    image_size=(16, 16), patch_size=(8, 8), position_bias="per_layer", drop_path_rate=0.0, labels=("a", "b", "c"),
)  # fmt: skip
EVERYTHING = Adapter(4, tuple(PROJECTIONS), alpha=16.0)
CASES = {
    "everything": EVERYTHING,
    "query and value": Adapter(2, ("q", "v")),
    "rank-stabilised": replace(EVERYTHING, rslora=True),
    "DoRA": replace(EVERYTHING, dora=True),
    "DoRA of the MLP": Adapter(3, ("fc1", "fc2"), dora=True),
}


@cache
def parameters() -> Nested:
    rng = np.random.default_rng(0)
    shapes = param_shapes(CONFIG)
    return unflatten(
        {name: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    )


def trained(adapter: Adapter, scale: float = 0.1) -> Nested:
    """Parameters with factors that have moved, all of them."""
    rng = np.random.default_rng(1)
    factors = initial_factors(adapter, parameters(), jax.random.key(0))
    moved = {name: leaf + scale * rng.standard_normal(leaf.shape, np.float32) for name, leaf in factors.items()}
    return unflatten(flatten(parameters()) | moved)


def pixels() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((2, 16, 16, 3), np.float32)


def logits(params: Nested, remat: Remat = "none") -> jax.Array:
    return _logits(params, remat)


@partial(jax.jit, static_argnums=1)
def _logits(params: Nested, remat: Remat) -> jax.Array:
    found = nnx.merge(abstract_model(CONFIG)[0], params)(pixels(), remat=remat).logits
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["everything", "DoRA"])
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    adapter = CASES[name]
    fresh = unflatten(flatten(parameters()) | initial_factors(adapter, parameters(), jax.random.key(0)))
    assert np.abs(logits(adapted(adapter, fresh)) - logits(parameters())).max() <= 1e-6
    for leaf, expected in zip(flatten(merged(adapter, fresh)).values(), flatten(parameters()).values(), strict=True):
        assert np.allclose(leaf, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "case", thorough([(name, remat) for name in CASES for remat in REMAT], but=[*zip(CASES, cycle(REMAT))])
)
def test_an_adapted_model_computes_what_its_merger_does(case: tuple[str, Remat]) -> None:
    adapter, remat = CASES[case[0]], case[1]
    both = trained(adapter)
    found, expected = logits(adapted(adapter, both), remat=remat), logits(merged(adapter, both))
    assert np.abs(found - expected).max() <= 1e-5
    assert np.abs(found - logits(parameters())).max() > 0.01  # the adapter does change the model


def test_factors_are_drawn_as_peft_draws_them() -> None:
    """torch's kaiming_uniform_ with a = sqrt(5) is uniform within 1 / sqrt(fan in), whatever the rank."""
    config = replace(CONFIG, hidden_size=64, intermediate_size=256, num_attention_heads=4)
    shapes = {name: jnp.zeros(shape) for name, shape in param_shapes(config).items()}
    for rank in (4, 16):
        adapter = Adapter(rank, tuple(PROJECTIONS), dora=True)
        found = initial_factors(adapter, unflatten(shapes), jax.random.key(rank))
        assert {name: leaf.shape for name, leaf in found.items()} == factor_shapes(adapter, param_shapes(config))
        for name, leaf in found.items():
            if name.endswith("lora_a"):
                bound = 1 / np.sqrt(256 if "fc2" in name else 64)
                assert 0.98 * bound < np.abs(leaf).max() <= bound, name
                assert abs(np.mean(leaf)) < 0.1 * bound and abs(np.std(leaf) / bound - 3**-0.5) < 0.05, name
            elif name.endswith("lora_b"):
                assert not leaf.any(), name
        drawn = [np.asarray(leaf) for name, leaf in found.items() if name.endswith("lora_a") and "fc2" not in name]
        assert len({leaf.tobytes() for leaf in drawn}) == len(drawn)  # no two are the same draw


@pytest.mark.parametrize("dora", [False, True])
def test_bfloat16_products_keep_small_updates(dora: bool) -> None:
    """Factors that change a kernel by less than its last bit in bfloat16 change the products nevertheless."""
    rng = np.random.default_rng(3)
    kernel = jnp.asarray(rng.choice([-1.5, 1.5], (16, 8)), jnp.float32)
    a, b = (jnp.asarray(0.003 * rng.standard_normal(shape), jnp.float32) for shape in ((16, 2), (2, 8)))
    assert np.array_equal((kernel + a @ b).astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    x, bias = jnp.asarray(rng.standard_normal((2, 3, 16)), jnp.bfloat16), jnp.zeros(8)
    adapter = AdaptedKernel(kernel, (Factors(a, b, norms(kernel, 1) if dora else None),), scale=1.0)
    found = project(x, adapter.astype(jnp.bfloat16), bias) - project(x, kernel.astype(jnp.bfloat16), bias)
    wide = x.astype(jnp.float32)
    expected = wide @ Factors(a, b, norms(kernel, 1) if dora else None).merged(kernel, 1.0) - wide @ kernel
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_kernels_have_no_gradient_and_cost_none(remat: Remat) -> None:
    """Of three products with a kernel, forward, to the inputs and to the kernel, training leaves the last one out."""
    config = replace(CONFIG, hidden_size=64, intermediate_size=256, num_attention_heads=4)
    adapter, graph = Adapter(2, ("q", "v")), abstract_model(config)[0]
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in param_shapes(config).items()}
    factors = jax.eval_shape(lambda params: initial_factors(adapter, params, jax.random.key(0)), unflatten(shapes))

    def loss(of: Callable[[Nested], Nested], images: int, learned: Nested) -> jax.Array:
        model: Any = nnx.merge(graph, of(learned))
        return model(jnp.zeros((images, 16, 16, 3)), key=jax.random.key(0), remat=remat).logits.sum()

    zeros = {name: jnp.zeros(shape.shape) for name, shape in shapes.items()}
    full = traced_flops(partial(loss, lambda learned: learned), unflatten(shapes))
    thin = traced_flops(partial(loss, lambda learned: adapted(adapter, unflatten(zeros | learned))), factors)
    assert thin < 0.78 * full


def test_dropout_is_of_what_is_added() -> None:
    adapter = replace(CASES["everything"], dropout=0.5)
    for each in (adapter, replace(adapter, dora=True)):
        both = trained(each)
        without = logits(adapted(each, both))
        assert np.abs(without - logits(merged(each, both))).max() <= 1e-5  # no key: nothing is dropped
        draws = [logits(adapted(each, both, jax.random.key(seed))) for seed in range(2)]
        assert np.abs(draws[0] - draws[1]).max() > 1e-3 and np.abs(draws[0] - without).max() > 1e-3
        fresh = unflatten(flatten(parameters()) | initial_factors(each, parameters(), jax.random.key(0)))
        assert np.abs(logits(adapted(each, fresh, jax.random.key(0))) - logits(parameters())).max() <= 1e-6


@pytest.mark.parametrize("text", ["qkv,out", "v,q", " fc1 , fc2 "])
def test_targets_are_read_in_their_order(text: str) -> None:
    expected = {"qkv,out": ("q", "k", "v", "out"), "v,q": ("q", "v"), " fc1 , fc2 ": ("fc1", "fc2")}
    assert targets_of(text) == expected[text]


@pytest.mark.parametrize("text", ["query", "", "q,,v"])
def test_unknown_targets_are_refused(text: str) -> None:
    with pytest.raises(BeitJaxError, match=r"--adapter.targets: expected names among q, k, v, out, fc1, fc2, qkv"):
        targets_of(text)
