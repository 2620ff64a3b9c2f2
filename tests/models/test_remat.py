"""What is kept, and whether loops over blocks are written out, changes the memory and the time of gradients alone."""

import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike
from tolerances import GRADIENT

from beit_jax.config import BeitConfig
from beit_jax.kernels.cpu import library
from beit_jax.kernels.cpu.calls import computed_often
from beit_jax.models.build import abstract_model, param_shapes
from beit_jax.models.interface import REMAT, Remat
from beit_jax.models.one_cpu import traced_for
from beit_jax.train.recipe import ModelOptions
from beit_jax.tree import flatten, unflatten

CONFIG = BeitConfig(
    task="image_classification",
    image_size=(32, 32),
    patch_size=(4, 4),
    hidden_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=256,
    position_bias="both",
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    drop_path_rate=0.3,
    labels=("a", "b", "c"),
)
BATCH = 8
HAS_KERNELS = pytest.mark.skipif(not library.available(), reason="no compiler, or another processor")


def gradient(
    remat: Remat, config: BeitConfig = CONFIG, fixed: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
) -> Any:
    """The compiled gradient of a sum of squares of the logits, with dropout; some blocks may have none."""
    graph, shapes = abstract_model(config, dtype=dtype, fixed_blocks=fixed)

    def loss(params: Any, pixels: Any) -> Any:
        return jnp.square(nnx.merge(graph, params)(pixels, key=jax.random.key(0), remat=remat).logits).sum()

    return jax.jit(jax.grad(loss)).lower(shapes, jax.ShapeDtypeStruct((BATCH, 32, 32, 3), jnp.float32)).compile()


@pytest.fixture(scope="module")
def gradients() -> dict[Remat, Any]:
    return {remat: gradient(remat) for remat in REMAT}


def test_every_policy_of_the_recipes_exists() -> None:
    assert set(REMAT) == set(get_args(Remat)) == set(get_args(ModelOptions.__annotations__["remat"]))


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_gradients_do_not_depend_on_what_is_kept(gradients: dict[Remat, Any], remat: Remat) -> None:
    """With dropout and stochastic depth: the second computation drops the same elements."""
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(s).astype(np.float32) * 0.1 for n, s in param_shapes(CONFIG).items()}
    pixels = rng.standard_normal((BATCH, 32, 32, 3)).astype(np.float32)
    expected, found = (flatten(gradients[kind](unflatten(params), pixels)) for kind in ("none", remat))
    for name, leaf in expected.items():
        scale = np.abs(leaf).max()
        assert scale > 0, name
        assert np.abs(found[name] - leaf).max() <= GRADIENT * scale, name


def test_memory_grows_with_what_is_kept(gradients: dict[Remat, Any]) -> None:
    memory = {remat: found.memory_analysis().temp_size_in_bytes for remat, found in gradients.items()}
    assert memory["block"] < memory["dots"] < memory["none"]


def test_dots_keeps_no_scores(gradients: dict[Remat, Any]) -> None:
    """Policy "dots" keeps the products with parameters at most. Attention scores would be half as large again."""
    memory = {remat: found.memory_analysis().temp_size_in_bytes for remat, found in gradients.items()}
    depth, tokens, hidden = CONFIG.num_hidden_layers, 65, CONFIG.hidden_size
    products = depth * BATCH * tokens * (3 + 1 + 4 + 1) * hidden * 4  # query, key and value; attention out; MLP
    assert memory["dots"] - memory["block"] < products


@pytest.mark.parametrize(
    ("remat", "drops", "kernels", "dtype", "fixed", "expected"),
    [
        ("none", True, "auto", "float32", (), True),
        ("none", False, "off", "float32", (0, 1, 4), True),
        pytest.param("dots", False, "auto", "float32", (), True, marks=HAS_KERNELS),
        pytest.param("dots", False, "auto", "float32", (0, 1, 4), True, marks=HAS_KERNELS),
        ("dots", True, "auto", "float32", (), False),
        ("dots", False, "off", "float32", (), False),
        ("dots", False, "auto", "bfloat16", (), False),
        ("block", False, "auto", "float32", (0, 1, 4), False),
    ],
)
def test_steps_of_training_on_one_cpu_have_loops_written_out(
    monkeypatch: pytest.MonkeyPatch,
    remat: Remat,
    drops: bool,
    kernels: str,
    dtype: str,
    fixed: tuple[int, ...],
    expected: bool,
) -> None:
    """But for those which would keep what they should compute again: whole blocks, or scores where no kernel computes
    attention. Some products are wide enough for kernels then, which round otherwise."""
    monkeypatch.setenv(library.SWITCH, kernels)
    config = CONFIG if drops else replace(CONFIG, attention_probs_dropout_prob=0.0)
    rng = np.random.default_rng(0)
    params = {n: rng.standard_normal(s).astype(np.float32) * 0.1 for n, s in param_shapes(CONFIG).items()}
    pixels = rng.standard_normal((BATCH, 32, 32, 3)).astype(np.float32)
    found = {}
    for platform, often in (("cpu", True), ("cpu", False), ("other", True)):
        with traced_for(platform), computed_often() if often else nullcontext():
            program = gradient(remat, config, fixed, dtype)
        loops = set(re.findall(r'known_trip_count":{"n":"(\d+)"', program.as_text()))
        over_blocks = loops & {"6", "2"}  # of all, and of neighbours that learn or do not; others are of random numbers
        assert bool(over_blocks) is not (platform == "cpu" and often and expected)
        found[platform, often] = flatten(program(unflatten(params), pixels))
    if dtype == "bfloat16":  # which rounds far more than sums do
        return
    first, *others = found.values()
    for name, leaf in first.items():
        for other in others:
            assert np.abs(other[name] - leaf).max() <= 4 * GRADIENT * max(np.abs(leaf).max(), 1e-6), name
