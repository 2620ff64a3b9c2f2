"""What a program contains is chosen by the device that it is compiled for, not by the machine that traces it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.config import BeitConfig
from beit_jax.models import one_cpu
from beit_jax.models.attention import attend
from beit_jax.models.build import abstract_model, build_model
from beit_jax.models.one_cpu import traced_for
from beit_jax.tree import Nested

TINY = BeitConfig(
    task="image_classification", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    image_size=(16, 16), patch_size=(8, 8), position_bias="both", labels=("a", "b"),
)  # fmt: skip
BATCH = 3


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in the smallest pieces, whatever its size."""
    monkeypatch.setattr(one_cpu, "CACHE", 0)


def forward(params: Nested, pixels: Any) -> Any:
    return build_model(TINY, params)(pixels).logits


def gradient(params: Nested, pixels: Any) -> Any:
    return jax.grad(lambda params: jnp.square(forward(params, pixels)).sum())(params)


FUNCTIONS = {"forward": forward, "gradient": gradient}
LOOPS = {"forward": 1, "gradient": 2}  # over the blocks: the textbook has no others


def fresh(name: str) -> Callable[..., Any]:
    """A function that JAX has not traced yet."""
    return jax.jit(lambda *arguments: FUNCTIONS[name](*arguments))


def shapes() -> tuple[Nested, jax.ShapeDtypeStruct]:
    return abstract_model(TINY)[1], jax.ShapeDtypeStruct((BATCH, 16, 16, 3), jnp.float32)


def arrays() -> tuple[Nested, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes()[0])
    return drawn, rng.standard_normal((BATCH, 16, 16, 3)).astype(np.float32)


def loops(program: str) -> int:
    return program.count("stablehlo.while")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_an_export_for_an_accelerator_has_the_textbook_alone(platform: str, name: str) -> None:
    found = jax.export.export(fresh(name), platforms=(platform,))(*shapes()).mlir_module()
    assert loops(found) == LOOPS[name]
    lowered = fresh(name).trace(*shapes()).lower(lowering_platforms=(platform,)).as_text()
    assert loops(lowered) == LOOPS[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_the_program_of_someone_who_says_the_platform(name: str) -> None:
    """Operation by operation, in the forward pass; the backward pass may carry what it does not use."""
    unsaid = jax.export.export(fresh(name), platforms=("tpu",))(*shapes()).mlir_module()
    with traced_for("tpu"):
        said = jax.export.export(fresh(name), platforms=("tpu",))(*shapes()).mlir_module()
    for operation in ("dot_general", "exponential", "concatenate", *(["reshape", "multiply"] * (name == "forward"))):
        assert unsaid.count(f"stablehlo.{operation}") == said.count(f"stablehlo.{operation}") > 0, operation


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_export_for_cpus_loops(name: str) -> None:
    """And one for both platforms holds both programs."""
    cpu = loops(jax.export.export(fresh(name), platforms=("cpu",))(*shapes()).mlir_module())
    assert cpu > LOOPS[name]
    both = loops(jax.export.export(fresh(name), platforms=("cpu", "tpu"))(*shapes()).mlir_module())
    assert both >= cpu


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what one CPU computes")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_cpu_computes_the_bits_and_takes_the_memory_of_its_own_form(name: str) -> None:
    """The compiler drops what the textbook would have kept for the backward pass."""
    compiled = [fresh(name).lower(*shapes()).compile()]
    with traced_for("cpu"):
        compiled.append(fresh(name).lower(*shapes()).compile())
    unsaid, said = ([np.asarray(leaf) for leaf in jax.tree.leaves(program(*arrays()))] for program in compiled)
    assert all(np.array_equal(found, expected) for found, expected in zip(unsaid, said, strict=True))
    first, second = (program.memory_analysis().temp_size_in_bytes for program in compiled)
    assert first == second


def test_functions_without_jit_choose_as_they_run() -> None:
    qkv = jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, 5, 3, 2, 4)), jnp.float32)
    np.testing.assert_allclose(attend(qkv, None)[0], jax.jit(attend)(qkv, None)[0], rtol=0, atol=1e-6)
