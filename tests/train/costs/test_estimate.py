"""Estimates against what the compiler counts, and against published numbers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from beit_jax.config import BeitConfig
from beit_jax.kernels.cpu import library
from beit_jax.models.build import abstract_model, num_params, param_shapes
from beit_jax.models.interface import Remat
from beit_jax.models.partition import traced_for_several_devices
from beit_jax.tokenizers.build import tokenizer_shapes
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
from beit_jax.tokenizers.dvae import DvaeEncoderConfig
from beit_jax.train.costs.estimate import Flops, Memory, activation_bytes, compiled_bytes, flops, memory, peak_flops
from beit_jax.train.data.stored_tokens import StoredTokens
from beit_jax.train.objectives import objective_of
from beit_jax.train.objectives.objective import Sources
from beit_jax.train.recipes import recipe_named
from beit_jax.variants import VARIANTS

# One block: the compiler counts a loop's body once, whatever its length.
CLASSIFIES = BeitConfig(
    task="image_classification",
    labels=tuple("abcdefgh"),
    image_size=(112, 112),
    patch_size=(14, 14),
    hidden_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=1024,
    position_bias="per_layer",
    drop_path_rate=0.0,
)
CONFIGS = {
    "classification": CLASSIFIES,
    "many tokens": replace(CLASSIFIES, image_size=(280, 280), hidden_size=128, intermediate_size=128),
    "masked": replace(CLASSIFIES, task="masked_image_modeling", position_bias="shared", vocab_size=1024),
    "aggregated": replace(
        CLASSIFIES,
        task="masked_image_modeling",
        position_bias="shared",
        vocab_size=1024,
        aggregate_from=1,
        aggregation_layers=2,
    ),
    "a head of its own": replace(
        CLASSIFIES,
        task="masked_image_modeling",
        position_bias="shared",
        vocab_size=1024,
        aggregate_from=1,
        aggregation_layers=2,
        own_aggregation_head=True,
    ),
}
IMAGES = 2


@pytest.fixture(autouse=True)
def products_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are what can be counted; kernels of one CPU compute the same."""
    monkeypatch.setenv(library.SWITCH, "off")


def scalar(config: BeitConfig, remat: Remat = "none") -> Callable[[Any, jax.Array], jax.Array]:
    """A function of parameters and pixels that every parameter has a part in."""
    graph, _ = abstract_model(config)
    options: dict[str, Any] = {"train": True} if config.task == "semantic_segmentation" else {}
    options |= {"aggregate": True} if config.aggregation_layers else {}

    def function(params: Any, pixels: jax.Array) -> jax.Array:
        output = nnx.merge(graph, params)(pixels, remat=remat, **options)
        heads = [output.logits, *(getattr(output, f"{name}_logits", None) for name in ("auxiliary", "aggregated"))]
        return sum(jnp.square(logits).sum() for logits in heads if logits is not None)

    return function


def pixels(config: BeitConfig, images: int = IMAGES) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((images, *config.image_size, 3), jnp.float32)


def compiled(
    config: BeitConfig, *, gradients: bool, remat: Remat = "none", images: int = IMAGES
) -> jax.stages.Compiled:
    function = scalar(config, remat)
    program = jax.jit(jax.value_and_grad(function) if gradients else function)
    return program.lower(abstract_model(config)[1], pixels(config, images)).compile()


def counted(program: jax.stages.Compiled) -> float:
    return program.cost_analysis()["flops"] / IMAGES


@pytest.mark.parametrize("name", ["classification", "masked"])
def test_flops_are_the_compilers_but_for_what_is_no_matrix_product(name: str) -> None:
    """The rest, norms and the like, is 1 to 5 percent here and less in larger models; it is never negative."""
    found = flops(CONFIGS[name])
    assert 1.0 <= counted(compiled(CONFIGS[name], gradients=False)) / found.forward <= 1.05
    assert 1.0 <= counted(compiled(CONFIGS[name], gradients=True)) / found.training() <= 1.05


def products(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions of a traced program, loops by their length, padding included."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, ((contracted, _), _) = equation.invars[0].aval, equation.params["dimension_numbers"]
            total += 2.0 * equation.outvars[0].aval.size * prod(left.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            total += 2.0 * equation.outvars[0].aval.size * kernel.size / kernel.shape[-1]
        for name, value in equation.params.items():
            several = value if isinstance(value, tuple | list) else [value]
            for inner in several[-1:] if name == "branches" else several:  # the last is the textbook's
                inner = getattr(inner, "jaxpr", inner)
                times = equation.params["length"] if equation.primitive.name == "scan" else 1
                total += times * products(inner) if hasattr(inner, "eqns") else 0.0
    return total


def traced(config: BeitConfig, *, gradients: bool = False, remat: Remat = "none") -> float:
    function, arguments = scalar(config, remat), (abstract_model(config)[1], pixels(config))
    return products(jax.make_jaxpr(jax.grad(function) if gradients else function)(*arguments).jaxpr) / IMAGES


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_the_traced_products(name: str, remat: Remat) -> None:
    config = replace(CONFIGS[name], num_hidden_layers=3)
    assert traced(config, remat=remat) == flops(config).forward
    assert traced(config, gradients=True, remat=remat) == flops(config).training(remat)


def pretraining(name: str, sources: Sources, remat: Remat = "block") -> tuple[Any, BeitConfig]:
    """A task without labels as `make_plan` makes it."""
    recipe = recipe_named(name)
    recipe = replace(recipe, model=replace(recipe.model, remat=remat))
    config = objective_of(recipe).configure(recipe, (), sources)
    return objective_of(recipe)(recipe, config, sources, 10), config


def weightless(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def heads_share(found: Flops, patches: int) -> Flops:
    """FLOPs of a model that predicts so many of its 196 patches."""
    return replace(found, head=found.head * patches / 196)


def dvae_flops(config: DvaeEncoderConfig) -> float:
    """Forward, of its convolutions, written out: every group at half the resolution of the one before."""
    total, inner = 0.0, config.image_size[0] * config.image_size[1]
    for name, (height, width, inputs, outputs) in kernels(config).items():
        group = {"input": 1, "output": config.group_count}.get(name.split("/")[0]) or int(name.split("/")[0][-1])
        total += 2.0 * height * width * inputs * outputs * inner / 4 ** (group - 1)
    return total


def kernels(config: DvaeEncoderConfig) -> dict[str, Any]:
    return {name: shape for name, shape in tokenizer_shapes(config).items() if name.endswith("kernel")}


def test_flops_of_pretraining_on_stored_tokens() -> None:
    """Exactly the model's, with the head on 75 of 196 patches: all other operations are gathers and sums."""
    encoder = DvaeEncoderConfig()
    tokenizer = TokenizerCheckpoint(encoder, weightless(tokenizer_shapes(encoder)))
    tokens = StoredTokens(Path("tokens"), 8192, 10, 1.0, np.zeros((10, 196), np.uint16))
    for name in ("beit_base_pt1k", "beit_large_pt22k"):  # one without recomputation, one with
        task, config = pretraining(name, Sources(tokenizer=tokenizer, tokens=tokens))
        model = heads_share(flops(config), 75)
        assert task.flops == model.training(), name  # whatever the run computes twice
        assert model.training() < 0.99 * flops(config).training(), "the head counts"


def test_flops_of_pretraining_with_its_tokenizer() -> None:
    """And the forward pass of DALL-E's encoder: no gradient of it is asked for."""
    encoder = DvaeEncoderConfig()
    tokenizer = TokenizerCheckpoint(encoder, weightless(tokenizer_shapes(encoder)))
    task, config = pretraining("beit_base_pt1k", Sources(tokenizer=tokenizer))
    assert task.flops == pytest.approx(heads_share(flops(config), 75).training() + dvae_flops(encoder), rel=1e-9)


def test_flops_of_data2vec() -> None:
    """The student's, with a head from features to features on 120 patches; forward once more for its teacher."""
    task, config = pretraining("data2vec_base_800", Sources())
    found = flops(config)
    assert config.vocab_size == config.hidden_size
    expected = heads_share(found, 120).training() + found.forward - found.head
    assert task.flops == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_activations_of_pretraining_are_of_predicted_patches_only(remat: Remat) -> None:
    """Logits in float32 and their exponentials, of 75 patches instead of 196, are what is saved."""
    encoder = DvaeEncoderConfig()
    tokenizer = TokenizerCheckpoint(encoder, weightless(tokenizer_shapes(encoder)))
    task, config = pretraining("beit_base_pt1k", Sources(tokenizer=tokenizer), remat)
    model = activation_bytes(config, remat=remat)
    logits = 8192 * 4
    assert 0.8 * model < task.activations < model + 3 * 75 * logits


def test_flops_of_a_segmentation_model_but_for_its_resizing() -> None:
    """Bilinear resizing and pooling are products with fixed matrices here: half a percent."""
    config = VARIANTS["beit_base_patch16_640_ade20k"]
    assert 1.0 <= traced(config) / flops(config).forward <= 1.01


@pytest.mark.parametrize(
    ("variant", "gmacs"),
    [("beit_base_patch16_224", 17.58), ("beit_base_patch16_384", 55.54), ("beit_large_patch16_224", 61.6)],
)
def test_published_multiply_adds(variant: str, gmacs: float) -> None:
    """As timm's results list them for these models, which count the products with parameters and attention."""
    assert flops(VARIANTS[variant]).forward / 2e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kernel_of_every_variant_is_counted_once(variant: str) -> None:
    config = VARIANTS[variant]
    found = flops(config)
    kernels = [shape for name, shape in param_shapes(config).items() if name.endswith("kernel")]
    assert kernels and found.forward > found.attention > 0
    assert found.training("block") > found.training("dots") > found.training() > 2.9 * found.forward


def test_memory_counts_parameters_their_copies_and_activations() -> None:
    config = VARIANTS["beit_base_patch16_224"]
    size = 4 * num_params(config)
    each = activation_bytes(config, remat="block")
    assert memory(size, 64 * each) == Memory(size, 2 * size, 0, size, 64 * each)
    found = memory(size, 8 * each, others=size, accumulate=4, shards=8)
    part = -(-size // 8)
    assert found == Memory(part, 2 * part, part, 2 * part, 8 * each)
    assert found.total == 6 * part + 8 * each
    assert found.lines()[-1] == f"total       {found.total / 2**30:8.2f} GiB"


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_activations_are_most_of_what_the_compiler_takes(remat: Remat) -> None:
    """Temporaries of the compiled gradients in float32: what the forward pass keeps, and the backward pass's own."""
    config = replace(CLASSIFIES, image_size=(196, 196), num_hidden_layers=6)
    program = compiled(config, gradients=True, remat=remat, images=16)
    found = 16 * activation_bytes(config, dtype=jnp.float32, remat=remat)
    assert 0.65 <= found / program.memory_analysis().temp_size_in_bytes <= 1.05
    total = compiled_bytes(program)
    assert total is not None and total > 16 * 196 * 196 * 3 * 4 + 2 * 4 * num_params(config)


def test_activations_shrink_with_recomputation_and_with_bfloat16() -> None:
    """On accelerators. One CPU keeps less of activation functions, of which more is float32 in either dtype."""
    config = VARIANTS["beit_base_patch16_224"]
    with traced_for_several_devices():
        none, dots, block = (activation_bytes(config, remat=remat) for remat in ("none", "dots", "block"))
        assert none > 2 * dots > 4 * block > 0
        assert activation_bytes(config, dtype=jnp.float32) > 1.3 * none
    assert activation_bytes(config) < none
    stream = (1 + 14 * 14) * config.hidden_size * 4 * config.num_hidden_layers  # the input of every block, float32
    assert block > stream


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("cpu", None),
        ("TPU v7x", None),
        ("Tesla T4", None),
    ],
)
def test_peaks(kind: str, expected: float | None) -> None:
    assert peak_flops(kind) == expected


def test_this_machines_device_has_an_answer() -> None:
    kind = jax.devices()[0].device_kind
    assert (peak_flops(kind) is None) == (jax.default_backend() == "cpu")
