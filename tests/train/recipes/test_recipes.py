"""Recipes: the published numbers, and that every one of them is a run that can be traced."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.images import Within
from beit_jax.models.build import abstract_model, num_params, statistics
from beit_jax.train.distributed.sharding import _sizes
from beit_jax.train.distributed.topology import parse_topology
from beit_jax.train.initial.model_config import model_config
from beit_jax.train.objectives import objective_of
from beit_jax.train.objectives.classification import classification
from beit_jax.train.objectives.data2vec import Data2vecOptions
from beit_jax.train.objectives.dvae import DvaeOptions
from beit_jax.train.objectives.masked_tokens import TokenOptions
from beit_jax.train.objectives.segmentation import segmentation
from beit_jax.train.objectives.vqkd import VqkdOptions
from beit_jax.train.recipe import (
    DataOptions,
    MaskOptions,
    ModelOptions,
    OptimOptions,
    Recipe,
)
from beit_jax.train.recipes import RECIPES, recipe_named
from beit_jax.train.step.optim import optimizer
from beit_jax.train.step.schedule import decay_table, poly_table, schedule_table
from beit_jax.train.step.state import initial_state
from beit_jax.train.step.step import make_train_step
from beit_jax.variants import VARIANTS

IMAGENET = 1_281_167
ADE20K = 20_210
ON_TPUS = [name for name, build in RECIPES.items() if build.__module__.rpartition(".")[2] not in ("own", "digits")]
SEGMENTS = [name for name in ON_TPUS if recipe_named(name).objective == "segmentation"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_documented_and_named(name: str) -> None:
    recipe = recipe_named(name)
    recipe.check()
    assert recipe.name == name
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", ON_TPUS)
def test_every_published_recipe_names_tpus_over_which_its_batch_divides(name: str) -> None:
    """And computes blocks again, without which few fit there; benchmarks/aot.md says that they do."""
    recipe = recipe_named(name)
    chips = parse_topology(recipe.topology).chips
    data, fsdp, tensor = _sizes(recipe.run.mesh, chips)
    assert (recipe.data.batch_size % (data * fsdp * recipe.optim.accumulate), tensor) == (0, 1)
    assert recipe.model.remat == ("none" if recipe.objective in ("linear_probe", "dvae") else "block")


@pytest.mark.parametrize("name", [name for name in RECIPES if recipe_named(name).objective == "classification"])
def test_every_recipe_traces(name: str) -> None:
    """Shapes of one whole step at the recipe's own sizes: nothing is computed."""
    recipe = recipe_named(name)
    variant = VARIANTS.get(recipe.variant)
    labels = tuple(f"class {i}" for i in range(10 if variant is None else variant.num_labels))
    config = model_config(recipe, labels)
    graph, params = abstract_model(config, dtype=jnp.dtype(recipe.model.dtype))
    tx = optimizer(recipe.optim, config)
    state = jax.eval_shape(lambda params: initial_state(params, tx, average=recipe.optim.ema is not None), params)
    rates = schedule_table(recipe.optim, IMAGENET // recipe.data.batch_size)
    step = make_train_step(
        graph,
        classification(recipe, config),
        tx,
        rates,
        accumulate=recipe.optim.accumulate,
        decays=decay_table(recipe.optim, len(rates)),
    )
    batch = {
        "image": jax.ShapeDtypeStruct((recipe.data.batch_size, *config.image_size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((recipe.data.batch_size,), jnp.int32),
    }
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()


# GPUs x images x accumulation, lr, warmup, epochs, layer decay, drop path, weight decay, classes, pixels:
# microsoft/unilm@768a3c8 beit/README.md, beit/get_started_for_image_classification.md;
# facebookresearch/data2vec_vision@af9a363 beit/README.md.
PUBLISHED = {
    "beit_base_ft1k": (8 * 128, 4e-3, 20, 100, 0.65, 0.1, 0.05, 1000, 224),
    "beit_large_ft1k": (8 * 64 * 2, 1e-3, 5, 50, 0.75, 0.2, 0.05, 1000, 224),
    "beit_base_ft22k": (16 * 256, 3e-3, 5, 90, 0.65, 0.2, 0.05, 21841, 224),
    "beit_large_ft22k": (16 * 64 * 2, 2e-3, 5, 90, 0.75, 0.2, 0.05, 21841, 224),
    "beit_base_ft22k_ft1k_384": (8 * 64, 2e-5, 5, 30, 0.85, 0.1, 1e-8, 1000, 384),
    "beit_large_ft22k_ft1k_512": (8 * 32 * 2, 2e-5, 5, 30, 0.9, 0.4, 1e-8, 1000, 512),
    "data2vec_base_ft1k": (8 * 128, 4e-3, 10, 100, 0.65, 0.2, 0.0, 1000, 224),
    "data2vec_large_ft1k": (16 * 64, 5e-3, 5, 50, 0.65, 0.25, 0.05, 1000, 224),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    recipe = recipe_named(name)
    variant = VARIANTS[recipe.variant]
    config = model_config(recipe, variant.labels)
    optim = recipe.optim
    assert (
        recipe.data.batch_size,
        optim.lr,
        optim.warmup_epochs,
        optim.epochs,
        optim.layer_decay,
        config.drop_path_rate,
        optim.weight_decay,
        config.num_labels,
        config.image_size[0],
    ) == PUBLISHED[name]
    assert num_params(config) == num_params(variant)


@pytest.mark.parametrize("name", SEGMENTS)
def test_every_segmentation_recipe_traces(name: str) -> None:
    """As above, with running statistics."""
    recipe = recipe_named(name)
    labels = tuple(f"class {i}" for i in range(150))
    config = model_config(recipe, labels, task="semantic_segmentation")
    graph, params = abstract_model(config, dtype=jnp.dtype(recipe.model.dtype))
    tx = optimizer(recipe.optim, config)
    state = jax.eval_shape(lambda params: initial_state(params, tx, statistics=statistics(config)), params)
    rates = poly_table(recipe.optim, ADE20K // recipe.data.batch_size)
    step = make_train_step(
        graph,
        segmentation(recipe, config),
        tx,
        rates,
        accumulate=recipe.optim.accumulate,
        decays=decay_table(recipe.optim, len(rates)),
    )
    size = (recipe.data.batch_size, *config.image_size)
    batch = {"image": jax.ShapeDtypeStruct((*size, 3), jnp.uint8), "label": jax.ShapeDtypeStruct(size, jnp.int32)}
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()


# lr, layer decay, drop path, pixels, blocks, images of a GPU x accumulation (8 GPUs):
# microsoft/unilm@768a3c8 beit/semantic_segmentation/configs and beit2/semantic_segmentation/configs.
PUBLISHED_ADE20K = {
    "beit_base_pt22k_ade20k": (7e-4, 0.65, 0.1, 512, 12, 2, 1),
    "beit_base_ade20k": (3e-5, 0.9, 0.1, 512, 12, 2, 1),
    "beit_base_ade20k_640": (3e-5, 0.9, 0.1, 640, 12, 2, 1),
    "beit_large_ade20k": (2e-5, 0.95, 0.2, 512, 24, 2, 1),
    "beit_large_ade20k_640": (2e-5, 0.95, 0.2, 640, 24, 1, 2),
    "beitv2_base_ade20k": (5e-5, 0.75, 0.15, 512, 12, 2, 1),
    "beitv2_base_ft21k_ade20k": (5e-5, 0.85, 0.15, 512, 12, 2, 1),
    "beitv2_large_ade20k": (4e-5, 0.9, 0.2, 512, 24, 2, 1),
    "beitv2_large_ft21k_ade20k": (3e-5, 0.9, 0.2, 512, 24, 2, 1),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_published_numbers_of_segmentation(name: str) -> None:
    lr, layer_decay, drop_path, pixels, blocks, images, accumulate = PUBLISHED_ADE20K[name]
    recipe = recipe_named(name)
    config = model_config(recipe, VARIANTS[recipe.variant].labels, task="semantic_segmentation")
    assert (recipe.optim.lr, recipe.optim.layer_decay, config.drop_path_rate) == (lr, layer_decay, drop_path)
    assert (recipe.data.batch_size, recipe.optim.accumulate) == (8 * images * accumulate, accumulate)
    assert (config.image_size, config.num_hidden_layers) == ((pixels, pixels), blocks)
    assert (recipe.segment.scale, recipe.data.statistics) == ((4 * pixels, pixels), "imagenet")
    assert config.out_indices == ((3, 5, 7, 11) if blocks == 12 else (7, 11, 15, 23))
    assert config.feature_taps == "original"
    processor = objective_of(recipe).processor(recipe, config)
    assert (processor.resize, processor.crop) == (Within(pixels, 4 * pixels), None)
    rates = poly_table(recipe.optim, ADE20K // recipe.data.batch_size)
    assert len(rates) == 160_000
    assert rates[0] == pytest.approx(1e-6 * lr)
    assert rates[1500] == pytest.approx(lr * (1 - 1500 / 160_000))
    assert rates[1499] < rates[1500] > rates[1501]


def test_a_variant_that_does_not_segment() -> None:
    with pytest.raises(BeitJaxError, match=r"beit_base_patch16_224 does not segment; choose .*640_ade20k or "):
        model_config(recipe_named("beit_base_ft1k"), ("a",), task="semantic_segmentation")


def test_evaluation_images_are_prepared_as_the_original_does() -> None:
    """Shorter side 256, centre 224; from 384 on the whole image: unilm beit/datasets.py."""
    for name, resize, crop in (("beit_base_ft1k", 256, 224), ("beit_large_ft22k_ft1k_512", 512, 512)):
        recipe = recipe_named(name)
        config = model_config(recipe, ("a", "b"))
        processor = objective_of(recipe).processor(recipe, config)
        assert (processor.resize, processor.crop) == (resize, (crop, crop))
        assert processor.resample == "bicubic"
    v2 = recipe_named("beitv2_base_ft1k")
    assert objective_of(v2).processor(v2, model_config(v2, ("a",))).mean == (0.485, 0.456, 0.406)


def test_a_checkpoint_brings_its_own_architecture() -> None:
    pretrained = replace(VARIANTS["data2vec_vision_base"], layer_norm_eps=1e-12)
    config = model_config(recipe_named("beit_base_ft1k"), ("cat", "dog"), pretrained)
    assert config.model_type == "data2vec-vision"
    assert config.layer_norm_eps == 1e-12
    assert config.layer_scale_init_value == 1e-4
    assert config.position_bias == "per_layer"
    assert config.pooling == "mean"
    assert config.labels == ("cat", "dog")


def test_a_checkpoint_of_another_size_than_the_named_variant_is_refused() -> None:
    recipe = recipe_named("beit_base_ft1k")
    named = replace(recipe, model=replace(recipe.model, variant="beit_base_patch16_224"))
    with pytest.raises(
        BeitJaxError, match=r"--init: hidden_size 1024, but --model.variant has 768; choose the variant"
    ):
        model_config(named, ("a",), VARIANTS["beit_large_patch16_224_pt22k"])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(BeitJaxError, match="the nearest is beit_base_ft1k"):
        recipe_named("beit_bas_ft1k")


def test_an_unknown_variant() -> None:
    recipe = recipe_named("beit_base_ft1k")
    with pytest.raises(BeitJaxError, match=r"--model.variant: no variant is called beit_huge"):
        model_config(replace(recipe, model=replace(recipe.model, variant="beit_huge")), ("a",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": OptimOptions(lr=float("nan"))}, r"--optim.lr: expected a positive number, found nan"),
        ({"optim": OptimOptions(warmup_epochs=40)}, r"--optim.warmup-epochs: expected at most the epochs"),
        ({"optim": OptimOptions(layer_decay=0.0)}, r"--optim.layer-decay: expected a number in \(0, 1\]"),
        ({"optim": OptimOptions(ema=1.0)}, r"--optim.ema"),
        ({"data": DataOptions(batch_size=0)}, r"--data.batch-size: expected a positive integer"),
        (
            {"data": DataOptions(batch_size=10), "optim": OptimOptions(accumulate=4)},
            r"--data.batch-size: expected a multiple of 4 \(--optim.accumulate\), found 10",
        ),
    ],
)
def test_values_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(BeitJaxError, match=message):
        replace(Recipe("any"), **change).check()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("digits_pretrain", {"mask": MaskOptions(patches=0)}, r"--mask.patches: expected a positive integer, found 0"),
        ("digits_pretrain", {"mask": MaskOptions(min_block=0)}, r"--mask.min-block: expected a positive integer"),
        ("digits_pretrain", {"mask": MaskOptions(max_block=0)}, r"--mask.max-block: expected a positive integer"),
        ("digits_pretrain", {"mask": MaskOptions(min_aspect=1.5)}, r"--mask.min-aspect: expected a number in \(0, 1\]"),
        (
            "digits_pretrain",
            {"tokens": TokenOptions(aggregation_layers=2)},
            r".*aggregation-layers: expected both or none",
        ),
        (
            "digits_pretrain",
            {"tokens": TokenOptions(aggregate_from=-1)},
            r"--tokens.aggregate-from: expected an integer",
        ),
        (
            "digits_pretrain",
            {"optim": OptimOptions(ema=0.9)},
            r"--optim.ema: expected None, masked_tokens .* 0.9",
        ),
        (
            "digits_pretrain",
            {"model": ModelOptions(pooling="cls")},
            r"--model.pooling: expected mean, masked_tokens pools",
        ),
        (
            "digits_data2vec",
            {"optim": OptimOptions()},
            r"--optim.ema: expected a decay, data2vec's teacher .* found None",
        ),
        (
            "digits_data2vec",
            {"optim": OptimOptions(ema=0.9, ema_start=1.0)},
            r"--optim.ema-start: expected a number in",
        ),
        ("digits_data2vec", {"optim": OptimOptions(ema=0.9, ema_start=0.5)}, r"--optim.ema-steps: expected steps over"),
        (
            "digits_data2vec",
            {"data2vec": Data2vecOptions(target_layers=0)},
            r"--data2vec.target-layers: expected a pos",
        ),
        ("digits_data2vec", {"data2vec": Data2vecOptions(beta=-1.0)}, r"--data2vec.beta: expected a number >= 0"),
        ("vqkd_base", {"vqkd": VqkdOptions(decay=1.0)}, r"--vqkd.decay: expected a number in \[0, 1\), found 1.0"),
        ("vqkd_base", {"vqkd": VqkdOptions(commitment=-0.1)}, r"--vqkd.commitment: expected a number >= 0"),
        ("vqkd_base", {"vqkd": VqkdOptions(codebook_dim=0)}, r"--vqkd.codebook-dim: expected a positive integer"),
        ("vqkd_base", {"optim": OptimOptions(ema=0.9)}, r"--optim.ema: expected None, vqkd"),
        ("dvae", {"dvae": DvaeOptions(temperature=(1.0, 0.0))}, r"--dvae.temperature: expected two positive numbers"),
        (
            "dvae",
            {"dvae": DvaeOptions(temperature_share=1.5)},
            r"--dvae.temperature-share: expected a number in \[0, 1\]",
        ),
        ("dvae", {"dvae": DvaeOptions(divergence=-1.0)}, r"--dvae.divergence: expected a number >= 0, found -1.0"),
        ("dvae", {"dvae": DvaeOptions(groups=0)}, r"--dvae.groups: expected a positive integer up to 256, found 0"),
        ("digits_probe", {"optim": OptimOptions(ema=0.9)}, r"--optim.ema: expected None, linear_probe"),
        (
            "digits_finetune",
            {"optim": OptimOptions(ema_start=0.9)},
            r"--optim.ema-start: expected None without --optim.ema",
        ),
    ],
)
def test_options_of_pretraining_that_cannot_be(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(BeitJaxError, match=rf"^{message}"):
        replace(recipe_named(name), **change).check()
