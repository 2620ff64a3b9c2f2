"""The codebook's arithmetic against NumPy loops, on one device and with samples on eight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from virtual import xla_flags

from beit_jax.train.objectives.codebook import averaged, counts, kmeans, mean_directions, perplexity, refined

ROUNDING = 1e-6
"""Of components of vectors of length one, after sums of a few hundred float32 numbers."""


def directions(count: int, dim: int = 5, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def reference_kmeans(centres: np.ndarray, samples: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster by cluster, in float64."""
    centres, samples = centres.astype(np.float64), samples.astype(np.float64)
    sizes = np.zeros(len(centres))
    for _ in range(iterations):
        nearest = (samples @ centres.T).argmax(axis=1)
        members = [samples[nearest == cluster] for cluster in range(len(centres))]
        sizes = np.array([len(found) for found in members])
        centres = np.stack([unit(m.mean(axis=0)) if len(m) else c for m, c in zip(members, centres, strict=True)])
    return centres, sizes


def lengths(vectors: jax.Array) -> np.ndarray:
    return np.linalg.norm(np.asarray(vectors, np.float64), axis=1)


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_kmeans_goes_as_the_reference(iterations: int) -> None:
    samples, start = directions(300), directions(40, seed=1)
    samples[:, 0], start[1] = np.abs(samples[:, 0]), [-1, 0, 0, 0, 0]  # a centre behind all samples
    centres, sizes = refined(jnp.asarray(start), jnp.asarray(samples), iterations)
    expected_centres, expected_sizes = reference_kmeans(start, samples, iterations)
    assert_array_equal(sizes, expected_sizes)
    assert_allclose(centres, expected_centres, atol=ROUNDING)
    if iterations:
        assert expected_sizes[1] == 0 and sizes.sum() == len(samples)
        assert_allclose(centres[1], start[1], atol=0)
        assert np.abs(np.asarray(centres) - start).max() > 0.1


def test_kmeans_starts_from_different_samples() -> None:
    samples = directions(30)
    centres, sizes = kmeans(jax.random.key(0), jnp.asarray(samples), 30, iterations=0)
    order = [int(np.flatnonzero((samples == centre).all(axis=1))[0]) for centre in np.asarray(centres)]
    assert sorted(order) == list(range(30)) and order != sorted(order)
    assert not sizes.any()
    other, _ = kmeans(jax.random.key(1), jnp.asarray(samples), 30, iterations=0)
    assert not np.array_equal(other, centres)


def test_kmeans_of_fewer_samples_than_clusters() -> None:
    """Every centre is a sample, and so every sample has one of its own direction if it was drawn at all."""
    samples = directions(6)
    centres, sizes = kmeans(jax.random.key(0), jnp.asarray(samples), 20)
    assert centres.shape == (20, 5) and sizes.sum() == 6
    assert_allclose(lengths(centres), 1, atol=ROUNDING)
    expected = reference_kmeans(np.asarray(kmeans(jax.random.key(0), jnp.asarray(samples), 20, 0)[0]), samples, 10)
    assert_allclose(centres, expected[0], atol=ROUNDING)


def test_kmeans_finds_clusters() -> None:
    truth = directions(8, dim=32)
    noise = np.random.default_rng(3).standard_normal((800, 32)).astype(np.float32)
    samples = np.repeat(truth, 100, axis=0) + 0.02 * noise
    samples /= np.linalg.norm(samples, axis=1, keepdims=True)
    start = samples[5::100]
    centres, sizes = refined(jnp.asarray(start), jnp.asarray(samples), 10)
    assert_array_equal(sizes, np.full(8, 100))
    assert (np.asarray(centres) * truth).sum(axis=1).min() > 0.999


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 0.99]))
def test_average_is_the_definition(seed: int, decay: float) -> None:
    """Codes with samples move towards the mean direction, the others stay; all have length one."""
    rng = np.random.default_rng(seed)
    embedding, samples = directions(12, seed=seed), directions(50, seed=seed + 1)
    tokens = rng.integers(0, 7, 50)
    found = averaged(jnp.asarray(embedding), jnp.asarray(samples), jnp.asarray(tokens), decay)
    for code, old in enumerate(embedding):
        own = samples[tokens == code].astype(np.float64)
        fresh = unit(own.mean(axis=0)) if len(own) else old
        assert_allclose(found[code], unit(decay * old + (1 - decay) * fresh), atol=1e-5)
    assert_allclose(lengths(found), 1, atol=ROUNDING)
    assert_allclose(found[7:], embedding[7:], atol=ROUNDING)


def test_lengths_do_not_drift() -> None:
    """A code that is never drawn is renormalised a thousand times, and is still where it was."""
    embedding = jnp.asarray(directions(4))
    samples, tokens = jnp.asarray(directions(8, seed=1)), jnp.zeros(8, jnp.int32)
    found = jax.lax.fori_loop(0, 1000, lambda _, codes: averaged(codes, samples, tokens, 0.99), embedding)
    assert_allclose(lengths(found), 1, atol=ROUNDING)
    assert_allclose(found[1:], embedding[1:], atol=ROUNDING)
    assert_allclose(found[0], unit(np.asarray(samples).mean(axis=0)), atol=1e-3)


def test_counts_and_perplexity() -> None:
    sizes = counts(jnp.asarray([[3, 3], [1, 0]]), 5)
    assert sizes.dtype == jnp.float32
    assert_array_equal(sizes, [1, 1, 0, 2, 0])
    assert_allclose(perplexity(sizes), 2 ** (0.25 * 2 + 0.25 * 2 + 0.5 * 1), rtol=1e-6)
    assert_allclose(perplexity(jnp.asarray([0.0, 7.0])), 1, rtol=1e-6)
    assert_allclose(perplexity(jnp.full(64, 3.0)), 64, rtol=1e-5)


def test_memory_is_not_that_of_one_hot_matrices() -> None:
    """Of BEiT v2's own size: 12544 samples on a device, 8192 codes of 32 dimensions."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((8192, 32), jnp.float32), ((12544, 32), jnp.float32), ((12544,), jnp.int32))
    ]
    compiled = jax.jit(mean_directions).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 16 * 2**20  # a one-hot matrix: 411 MB


# --- Eight devices ----------------------------------------------------------------------------------------------------


def sharded() -> None:
    """Run as a script: the same functions of samples on eight devices, as JSON."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    samples, tokens, embedding = case()
    put = NamedSharding(mesh, P("data"))
    samples, tokens = jax.device_put(samples, put), jax.device_put(tokens, put)
    whole = jax.device_put(embedding, NamedSharding(mesh, P()))
    moved = jax.jit(averaged, static_argnums=3, out_shardings=NamedSharding(mesh, P()))
    text = moved.lower(whole, samples, tokens, 0.9).compile().as_text()
    centres, sizes = jax.jit(kmeans, static_argnums=2)(jax.random.key(0), samples, 16)
    result = {
        "averaged": np.asarray(moved(whole, samples, tokens, 0.9)).tolist(),
        "centres": np.asarray(centres).tolist(),
        "sizes": np.asarray(sizes).tolist(),
        "gathers": text.count("all-gather("),
        "sums": text.count("all-reduce(") + text.count("all-reduce-start("),
    }
    json.dump(result, sys.stdout)


def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return directions(256), np.random.default_rng(2).integers(0, 12, 256).astype(np.int32), directions(16, seed=3)


def test_samples_on_eight_devices() -> None:
    """Sums are over all of them; the samples themselves are not sent around to be averaged."""
    support = str(Path(__file__).parents[2] / "support")
    flags = {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu", "PYTHONPATH": support}
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    samples, tokens, embedding = map(jnp.asarray, case())
    assert_allclose(found["averaged"], averaged(embedding, samples, tokens, 0.9), atol=ROUNDING)
    centres, sizes = kmeans(jax.random.key(0), samples, 16)
    assert_array_equal(found["sizes"], sizes)
    assert_allclose(found["centres"], centres, atol=ROUNDING)
    assert found["gathers"] == 0 and found["sums"] > 0


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    sharded()
