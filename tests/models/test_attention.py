"""Attention has the values of its definition: in one piece, sample by sample, and head by head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from numpy.testing import assert_allclose

from beit_jax.models import one_cpu
from beit_jax.models.attention import attend

BATCH, TOKENS, HEADS, WIDTH = 3, 5, 2, 4
SCORES = 4 * HEADS * TOKENS**2  # bytes of a sample's
ROUNDING = 1e-6


def inputs() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((BATCH, TOKENS, 3, HEADS, WIDTH), np.float32)
    return jnp.asarray(qkv), jnp.asarray(rng.standard_normal((1, HEADS, TOKENS, TOKENS), np.float32))


def by_definition(qkv: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Averages and weights in float64, one score at a time."""
    averages = np.zeros((BATCH, TOKENS, HEADS, WIDTH))
    weights = np.zeros((BATCH, HEADS, TOKENS, TOKENS))
    for b, q, h in np.ndindex(BATCH, TOKENS, HEADS):
        query, keys, values = (qkv[b, q, 0, h], qkv[b, :, 1, h], qkv[b, :, 2, h])
        added = 0.0 if bias is None else bias[0, h, q].astype(np.float64)
        scores = np.exp(keys.astype(np.float64) @ query / WIDTH**0.5 + added)
        weights[b, h, q] = scores / scores.sum()
        averages[b, q, h] = weights[b, h, q] @ values
    return averages, weights


@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_the_definition(has_bias: bool) -> None:
    qkv, bias = inputs()
    expected, weights = by_definition(np.asarray(qkv), np.asarray(bias) if has_bias else None)
    averages, nothing = attend(qkv, bias if has_bias else None)
    again, found = attend(qkv, bias if has_bias else None, output_attentions=True)
    assert nothing is None and np.array_equal(averages, again)
    assert_allclose(averages, expected, rtol=0, atol=ROUNDING)
    assert_allclose(found, weights, rtol=0, atol=ROUNDING)


def test_scores_beyond_the_range_of_exponentials() -> None:
    qkv, bias = inputs()
    averages, weights = attend(100 * qkv, 1e4 * bias, output_attentions=True)
    assert weights is not None and np.isfinite(averages).all()
    assert_allclose(weights.sum(axis=-1), np.ones((BATCH, HEADS, TOKENS)), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("cache", "loops"), [(BATCH * SCORES, 0), (SCORES, 1), (SCORES - 1, 2)])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, cache: int, loops: int, has_bias: bool) -> None:
    """Values and gradients of the largest pieces that the cache holds: all samples, one sample, one head."""
    qkv, bias = inputs()
    upstream = np.random.default_rng(1).standard_normal((BATCH, TOKENS, HEADS, WIDTH), np.float32)

    def run(qkv: Any, bias: Any) -> Any:
        return attend(qkv, bias if has_bias else None)[0]

    def gradients() -> Any:
        return jax.grad(lambda *both: (run(*both) * upstream).sum(), argnums=(0, 1))(qkv, bias)

    monkeypatch.setattr(one_cpu, "CACHE", 2**40)
    whole, expected = run(qkv, bias), gradients()
    monkeypatch.setattr(one_cpu, "CACHE", cache)
    assert str(jax.make_jaxpr(run)(qkv, bias)).count("scan[") == loops
    assert_allclose(run(qkv, bias), whole, rtol=0, atol=ROUNDING)
    for found, wanted in zip(gradients(), expected, strict=True):
        assert_allclose(found, wanted, rtol=0, atol=ROUNDING * 10)


def test_where_devices_share_a_batch_nothing_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_cpu, "CACHE", 0)
    two = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(two):
        assert "scan[" not in str(jax.make_jaxpr(lambda *both: attend(*both)[0])(*inputs()))
    one = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(one):
        assert "scan[" in str(jax.make_jaxpr(lambda *both: attend(*both)[0])(*inputs()))


def test_each_shard_has_a_bias_of_its_own() -> None:
    qkv, bias = inputs()
    biases = jnp.concatenate([bias, 2 * bias, 3 * bias])
    together = attend(qkv, biases, output_attentions=True)[0]
    for i in range(BATCH):
        alone = attend(qkv[i : i + 1], biases[i : i + 1])[0]
        assert_allclose(together[i], alone[0], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shards", [1, BATCH])
def test_derivatives_by_the_bias(shards: int) -> None:
    """Both modes of differentiation agree with each other, with finite differences, and with vmap."""
    qkv, bias = inputs()
    biases = jnp.concatenate([(1 + i) * bias for i in range(shards)])
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(biases.shape, np.float32))

    def loss(biases: Any) -> Any:
        return jnp.square(attend(qkv, biases)[0]).sum()

    slope = float(jax.jvp(loss, (biases,), (direction,))[1])
    gradient = jax.grad(loss)(biases)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5)
    step = 1e-2
    difference = float(loss(biases + step * direction) - loss(biases - step * direction)) / (2 * step)
    assert abs(slope) > 0.1 and slope == pytest.approx(difference, rel=1e-3)
    assert_allclose(jax.vmap(jax.grad(loss))(biases[None])[0], gradient, rtol=0, atol=ROUNDING)


def test_dropout_is_of_the_weights_after_their_sum() -> None:
    qkv, bias = inputs()

    def drop(weights: Any) -> Any:
        return weights.at[:, :, :, 0].set(0.0) * 2.0

    averages, weights = attend(qkv, bias, drop, output_attentions=True)
    expected = drop(jnp.asarray(by_definition(np.asarray(qkv), np.asarray(bias))[1]))
    assert_allclose(weights, expected, rtol=0, atol=ROUNDING)
    assert_allclose(averages, np.einsum("bhqk,bkhe->bqhe", expected, qkv[:, :, 2]), rtol=0, atol=2 * ROUNDING)


def test_products_read_the_dtype_and_averages_have_it() -> None:
    qkv, bias = inputs()
    averages, weights = attend(qkv.astype(jnp.bfloat16), bias, output_attentions=True)
    assert averages.dtype == jnp.bfloat16 and weights is not None and weights.dtype == jnp.float32
    assert_allclose(averages.astype(np.float32), attend(qkv, bias)[0], rtol=0, atol=0.05)
