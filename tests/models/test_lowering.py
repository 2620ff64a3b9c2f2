"""What a program contains is chosen by the device that it is compiled for, not by the machine that traces it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
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


# --- Symbolic sizes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations say that sizes are integers; a symbolic size behaves like one, and is none."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


DEEP = replace(TINY, task="features", num_hidden_layers=4)
EVERY = {
    "features": DEEP,
    "classification": TINY,
    "classification by class token": replace(TINY, pooling="cls", use_absolute_position_embeddings=True),
    "masked": replace(DEEP, task="masked_image_modeling", pooling="cls", vocab_size=8),
    "aggregated": replace(
        DEEP, task="masked_image_modeling", pooling="cls", vocab_size=8, aggregate_from=2, aggregation_layers=1
    ),
    "segmentation": replace(DEEP, task="semantic_segmentation", out_indices=(0, 1, 2, 3)),
    "backbone": replace(DEEP, task="backbone", out_indices=(0, 2)),
    "feature pyramid": replace(DEEP, task="backbone", out_indices=(0, 1, 2, 3), add_fpn=True),
}


def outputs(name: str, config: BeitConfig) -> Callable[[Nested, Any], list[Any]]:
    options: dict[str, Any] = {"aggregate": True} if name == "aggregated" else {}
    return lambda params, pixels: jax.tree.leaves(build_model(config, params)(pixels, **options))


def computed(name: str, config: BeitConfig, *arguments: Any) -> list[Any]:
    return jax.jit(outputs(name, config))(*arguments)


def exported(function: Callable[..., Any], config: BeitConfig, sizes: str) -> jax.export.Exported:
    pixels = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), jnp.float32)
    platforms = ("cpu", "tpu", "cuda")
    return jax.export.export(jax.jit(function), platforms=platforms)(abstract_model(config)[1], pixels)


def drawn(config: BeitConfig) -> Nested:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape), leaf.dtype), abstract_model(config)[1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", EVERY)
def test_every_model_is_exported_for_any_batch(name: str) -> None:
    """Called with several samples and with one."""
    config = EVERY[name]
    program = exported(outputs(name, config), config, "b, 16, 16, 3")
    params, rng = drawn(config), np.random.default_rng(1)
    for batch in (1, 3):
        pixels = rng.standard_normal((batch, 16, 16, 3)).astype(np.float32)
        for found, expected in zip(program.call(params, pixels), computed(name, config, params, pixels), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_gradients_are_exported_for_any_batch() -> None:
    program = exported(gradient, TINY, "b, 16, 16, 3")
    params, pixels = arrays()
    for found, expected in zip(
        jax.tree.leaves(program.call(params, pixels)), jax.tree.leaves(fresh("gradient")(params, pixels)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("unchecked")
def test_without_positions_height_and_width_are_free_too() -> None:
    config = replace(TINY, position_bias="none")
    program = exported(outputs("free", config), config, "b, 8*h, 8*w, 3")
    params = drawn(config)
    for shape in ((2, 16, 24, 3), (1, 8, 8, 3)):
        pixels = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        for found, expected in zip(program.call(params, pixels), computed("free", config, params, pixels), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


FREE_SIDES = {
    "per layer": (replace(TINY, position_bias="per_layer"), "b, 8*h, 8*w, 3", "relative position bias .* h x w"),
    "shared": (replace(TINY, position_bias="shared"), "b, 16, 8*w, 3", "relative position bias .* 2 x w"),
    "absolute": (
        replace(TINY, position_bias="none", use_absolute_position_embeddings=True),
        "b, 8*h, 16, 3",
        "absolute position embeddings .* h x 2",
    ),
    "segmentation": (replace(EVERY["segmentation"], position_bias="none"), "b, 8*h, 8*w, 3", "feature pyramid"),
    "no multiple": (TINY, "b, h, w, 3", r"\(h, w\) are not multiples of the patch .*, as \(8\*h, 8\*w\) would be"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", FREE_SIDES)
def test_where_sides_must_be_known_one_line_says_so(name: str) -> None:
    config, sizes, said = FREE_SIDES[name]
    with pytest.raises(BeitJaxError, match=said) as caught:
        exported(outputs(name, config), config, sizes)
    assert "\n" not in str(caught.value)
