"""The model of a run: what a checkpoint decides, what options decide, and what published recipes have always given."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest

from beit_jax.config import BeitConfig, Task
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import param_shapes
from beit_jax.train.initial.model_config import ADAPTED, HEAD, SETTLED, model_config, segmentation_taps
from beit_jax.train.objectives import objective_of
from beit_jax.train.objectives.objective import Sources
from beit_jax.train.objectives.segmentation import HeadOptions
from beit_jax.train.recipe import ModelOptions, Recipe
from beit_jax.train.recipes import RECIPES, recipe_named
from beit_jax.variants import VARIANTS

OWN = BeitConfig(
    task="features",
    image_size=(32, 48),
    patch_size=(8, 8),
    num_channels=2,
    hidden_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    intermediate_size=100,
    hidden_act="relu",
    layer_norm_eps=1e-12,
    position_bias="shared",
    use_absolute_position_embeddings=True,
    layer_scale_init_value=0.0,
    initializer_range=0.03,
)
"""A checkpoint of nobody's architecture."""


def changed(name: str, **options: Any) -> Recipe:
    """A recipe with other options of its model."""
    recipe = recipe_named(name)
    return replace(recipe, model=replace(recipe.model, **options))


# --- Published recipes ------------------------------------------------------------------------------------------------

TASKS: Mapping[str, Task] = {
    "classification": "image_classification",
    "linear_probe": "image_classification",
    "segmentation": "semantic_segmentation",
    "masked_tokens": "masked_image_modeling",
    "data2vec": "masked_image_modeling",
    "vqkd": "features",
}
FIELDS = (
    "add_fpn add_pooling_layer aggregate_from aggregation_layers attention_probs_dropout_prob auxiliary_channels "
    "auxiliary_concat_input auxiliary_loss_weight auxiliary_num_convs drop_path_rate feature_taps hidden_act "
    "hidden_dropout_prob hidden_size image_size initializer_range intermediate_size labels layer_norm_eps "
    "layer_scale_init_value model_type num_attention_heads num_channels num_hidden_layers out_indices patch_size "
    "pool_scales pooling position_bias position_resize problem_type reshape_hidden_states semantic_loss_ignore_index "
    "task use_absolute_position_embeddings use_auxiliary_head use_mask_token vocab_size"
).split()
# By recipe, the beginning of the digest of every configuration that it gives: from a random start, and from every
# published variant of its size, as the original code has it and as transformers has it. Made by a8b74df, the last
# revision in which the recipe's variant decided.
DIGESTS = {
    "beit_base_ft22k": "b5104d93ecf09163",
    "beit_large_ft22k": "d0661ca4493e8953",
    "beit_base_ft22k_ft1k": "6bd8158261f42b37",
    "beit_base_ft22k_ft1k_384": "148acaf4cebcadd5",
    "beit_large_ft22k_ft1k": "77ee59402fe10b39",
    "beit_large_ft22k_ft1k_384": "b9008d9f1703b1b4",
    "beit_large_ft22k_ft1k_512": "395723e6037e8ae8",
    "beit_base_ft1k": "6bd8158261f42b37",
    "beit_large_ft1k": "d0661ca4493e8953",
    "beitv2_base_300e_ft1k": "6bd8158261f42b37",
    "beitv2_base_ft1k": "b5104d93ecf09163",
    "beitv2_large_300e_ft1k": "d0661ca4493e8953",
    "beitv2_large_ft1k": "d0661ca4493e8953",
    "beitv2_base_ft21k": "6bd8158261f42b37",
    "beitv2_large_ft21k": "d0661ca4493e8953",
    "beitv2_base_ft21k_ft1k": "6bd8158261f42b37",
    "beitv2_large_ft21k_ft1k": "1812456f851ea2a0",
    "data2vec_base_ft1k": "2a83f8868c1c4a45",
    "data2vec_large_ft1k": "0d2b7ef7f01eb7f5",
    "beit_base_linear": "1fc20acbccb1623a",
    "beit_large_linear": "eabe6b5855adfea7",
    "beit_base_pt22k_ade20k": "049093b50686dcaa",
    "beit_base_ade20k": "049093b50686dcaa",
    "beit_base_ade20k_640": "b0dd5ff4bbc28c9f",
    "beit_large_ade20k": "777cc20450d2e45c",
    "beit_large_ade20k_640": "0f62ce87422fca60",
    "beitv2_base_ade20k": "6995fb73ac3eb277",
    "beitv2_base_ft21k_ade20k": "6995fb73ac3eb277",
    "beitv2_large_ade20k": "777cc20450d2e45c",
    "beitv2_large_ft21k_ade20k": "777cc20450d2e45c",
    "beit_base_pt22k": "2e2bf2721c4d945f",
    "beit_large_pt22k": "f5cb5e73eb3948ad",
    "beit_base_pt1k": "2e2bf2721c4d945f",
    "beit_base_pt1k_800ep": "b363139fe951cfc0",
    "beitv2_base_pt1k": "2e2bf2721c4d945f",
    "beitv2_base_pt1k_300e": "0862fe9bb08610fc",
    "beitv2_large_pt1k": "f5cb5e73eb3948ad",
    "beitv2_large_pt1k_300e": "b9828df910687218",
    "data2vec_base_800": "fbdfd103362b5e88",
    "data2vec_large_800": "c62f25c6d362e36b",
    "data2vec_large_1600": "c62f25c6d362e36b",
    "vqkd_base": "400e0de914301e99",
    "dvae": "aa60bafe8a040b13",
    "digits_tokenizer": "b096fa4e5a7f6af5",
    "digits_pretrain": "1a332843ebb6a911",
    "digits_data2vec": "1a332843ebb6a911",
    "digits_finetune": "cc867afb88c29443",
    "digits_probe": "97ddfd0e9a8bbc90",
}


def configurations(recipe: Recipe) -> Iterator[tuple[str, BeitConfig]]:
    """What a recipe's model is, by the name of what it starts from."""
    if recipe.objective == "dvae":
        yield "None", objective_of(recipe).configure(recipe, (), Sources())
        return
    task = TASKS[recipe.objective]
    labels = () if task in ("masked_image_modeling", "features") else ("a", "b", "c")
    first = model_config(recipe, labels, task=task)
    yield "None", first
    for name, config in VARIANTS.items():
        if config.hidden_size == first.hidden_size and task != "features":
            transformers = replace(config, position_resize="bilinear", layer_norm_eps=1e-12)
            yield name, model_config(recipe, labels, config, task=task)
            yield f"{name} hf", model_config(recipe, labels, transformers, task=task)


@pytest.mark.parametrize("name", DIGESTS)
def test_published_recipes_give_the_models_that_they_always_gave(name: str) -> None:
    found = {}
    for start, config in configurations(recipe_named(name)):
        fields = asdict(config)
        found[start] = {field: fields[field] for field in FIELDS}
    assert len(found) == (21 if name.startswith(("beit", "data2vec")) else 1)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == DIGESTS[name]


def test_no_recipe_names_a_variant() -> None:
    """Which would refuse checkpoints of other sizes; what a published run trained stands in `published`."""
    assert [name for name in RECIPES if recipe_named(name).model.variant is not None] == []


# --- A checkpoint of one's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["beit_base_ft1k", "beit_large_ft22k_ft1k_512", "digits_finetune", "beit_base_linear"])
def test_a_checkpoint_brings_its_own_architecture(name: str) -> None:
    """The encoder's tensors are those of the checkpoint, but for bias tables, of which each layer gets its own."""
    config = model_config(recipe_named(name), ("a", "b"), OWN)
    kept = {field: getattr(OWN, field) for field in (*SETTLED.values(), *ADAPTED.values()) if field != "position_bias"}
    assert {field: getattr(config, field) for field in kept} == kept
    assert (config.position_bias, config.labels, config.task) == ("per_layer", ("a", "b"), "image_classification")
    ours, theirs = param_shapes(config), {f"beit/{name}": shape for name, shape in param_shapes(OWN).items()}
    encoder = {name for name in ours.keys() & theirs.keys() if "pooler" not in name}
    assert {name: ours[name] for name in encoder} == {name: theirs[name] for name in encoder}
    assert theirs.keys() - ours.keys() <= {"beit/shared_bias_table", "beit/norm/scale", "beit/norm/bias"}


@pytest.mark.parametrize(
    ("name", "task", "bias"),
    [
        ("beit_base_pt22k", "masked_image_modeling", "shared"),
        ("data2vec_base_800", "masked_image_modeling", "shared"),
        ("beit_base_pt1k_800ep", "masked_image_modeling", "shared"),  # the variant has none, the checkpoint has
        ("dit_of_rvlcdip", "image_classification", "per_layer"),
    ],
)
def test_kinds_of_positions_that_follow(name: str, task: Task, bias: str) -> None:
    recipe = recipe_named("beit_base_ft1k") if name not in RECIPES else recipe_named(name)
    assert model_config(recipe, (), OWN, task=task).position_bias == bias


@pytest.mark.parametrize("bias", ["none", "per_layer", "both"])
def test_other_positions_stay_what_they_are(bias: str) -> None:
    start = replace(OWN, position_bias=bias)
    assert model_config(recipe_named("beit_base_ft1k"), ("a",), start).position_bias == bias


def test_image_size() -> None:
    """The recipe's, where its run was of the checkpoint's architecture; else the checkpoint's; an option goes first."""
    published = VARIANTS["beit_base_patch16_384"]
    recipe = recipe_named("beit_base_ft1k")
    generic = replace(recipe, published="")
    oblong = replace(published, image_size=(384, 192))
    sizes = {
        "published": model_config(recipe, ("a",), published),
        "no published run": model_config(generic, ("a",), published),
        "oblong": model_config(recipe, ("a",), oblong),
        "of another patch": model_config(recipe, ("a",), replace(published, patch_size=(32, 32))),
        "option": model_config(changed("beit_base_ft1k", image_size=(64, 96)), ("a",), oblong),
        "number": model_config(changed("beit_base_ft1k", image_size=64), ("a",), OWN),
        "random": model_config(changed("beit_base_ft1k", image_size=(64, 96)), ("a",)),
    }
    assert {name: config.image_size for name, config in sizes.items()} == {
        "published": (224, 224),
        "no published run": (384, 384),
        "oblong": (384, 192),
        "of another patch": (384, 384),
        "option": (64, 96),
        "number": (64, 64),
        "random": (64, 96),
    }


def test_a_variant_that_is_named_must_be_the_checkpoints() -> None:
    recipe = changed("beit_large_ft1k", variant="beit_base_patch16_224")
    with pytest.raises(BeitJaxError, match=r"--init: hidden_size 48, but --model.variant has 768; choose the variant"):
        model_config(recipe, ("a",), OWN)
    named = model_config(recipe, ("a",), VARIANTS["dit_base"])
    assert (named.hidden_size, named.position_bias) == (768, "none")


# --- Options ----------------------------------------------------------------------------------------------------------

OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "image_size": ((64, 96), (64, 96)),
    "patch_size": ((8, 16), (8, 16)),
    "channels": (4, 4),
    "hidden_size": (192, 192),
    "depth": (6, 6),
    "heads": (3, 3),
    "mlp": (500, 500),
    "activation": ("silu", "silu"),
    "absolute_positions": (True, True),
    "epsilon": (1e-5, 1e-5),
    "position_bias": ("both", "both"),
    "position_resize": ("geometric_linear", "geometric_linear"),
    "layer_scale": (0.0, 0.0),
    "initializer_range": (0.5, 0.5),
    "family": ("data2vec-vision", "data2vec-vision"),
}


@pytest.mark.parametrize("task", ["image_classification", "semantic_segmentation", "masked_image_modeling"])
def test_every_field_of_a_model_drawn_at_random_is_an_option(task: Task) -> None:
    """All at once, and the others are the variant's."""
    recipe = recipe_named("beit_base_ade20k")
    recipe = replace(recipe, model=ModelOptions(**{option: value for option, (value, _) in OPTIONS.items()}))
    recipe.check()
    config = model_config(recipe, ("a",), task=task)
    fields = {**SETTLED, **ADAPTED}
    assert fields.keys() == OPTIONS.keys()
    assert {option: getattr(config, field) for option, field in fields.items()} == {
        option: expected for option, (_, expected) in OPTIONS.items()
    }
    if task == "semantic_segmentation":
        assert config.out_indices == (1, 2, 3, 5)
    blocks = "beit/blocks/mlp/fc1/kernel"
    assert param_shapes(config)[blocks] == (6, 192, 500)
    assert param_shapes(config)["beit/embeddings/patch_kernel"] == (8, 16, 4, 192)


@pytest.mark.parametrize("option", OPTIONS)
def test_one_option_changes_one_field(option: str) -> None:
    name, value = "beit_base_ft1k", OPTIONS[option][0]
    before, after = (asdict(model_config(recipe, ("a",))) for recipe in (recipe_named(name), changed(name, **{option: value})))  # fmt: skip  # noqa: E501
    field = {**SETTLED, **ADAPTED}[option]
    assert {key for key in before if before[key] != after[key]} == {field}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 64}, r"--model.hidden-size: the checkpoint of --init has 48, found 64; None takes the check"),
        ({"depth": 12}, r"--model.depth: the checkpoint of --init has 5, found 12"),
        ({"heads": 3}, r"--model.heads: the checkpoint of --init has 4, found 3"),
        ({"mlp": 192}, r"--model.mlp: the checkpoint of --init has 100, found 192"),
        ({"activation": "gelu"}, r"--model.activation: the checkpoint of --init has relu, found gelu"),
        ({"absolute_positions": False}, r"--model.absolute-positions: the checkpoint of --init has True, found False"),
        ({"epsilon": 1e-6}, r"--model.epsilon: the checkpoint of --init has 1e-12, found 1e-06"),
        ({"position_bias": "none"}, r"--model.position-bias: the checkpoint of --init has shared, found none"),
        ({"layer_scale": 0.1}, r"--model.layer-scale: the checkpoint of --init has none, found 0.1"),
        ({"patch_size": 7}, r"--model.image-size: image_size \(32, 48\) is not a multiple of patch_size \(7, 7\)"),
    ],
)
def test_an_option_that_contradicts_the_checkpoint(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(BeitJaxError, match=message):
        model_config(changed("beit_base_ft1k", **options), ("a",), OWN)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 48, "depth": 5, "heads": 4, "mlp": 100, "activation": "relu", "absolute_positions": True},
        {"epsilon": 1e-12, "position_bias": "shared", "layer_scale": 0.0},
        {"position_bias": "per_layer", "patch_size": 16, "image_size": (64, 32), "position_resize": "geometric"},
        {"family": "data2vec-vision", "initializer_range": 0.1},
    ],
)
def test_options_that_the_checkpoint_has_or_can_be_adapted_to(options: Mapping[str, Any]) -> None:
    config = model_config(changed("beit_base_ft1k", **options), ("a",), OWN)
    for option, value in options.items():
        found = getattr(config, {**SETTLED, **ADAPTED}[option])
        assert found == ((value, value) if option == "patch_size" else value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 100}, r"--model.hidden-size: hidden_size 100 is not a multiple of 12 heads"),
        ({"image_size": (64, 40)}, r"--model.image-size: image_size \(64, 40\) is not a multiple of patch_size"),
    ],
)
def test_options_that_describe_no_model(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(BeitJaxError, match=message):
        model_config(changed("beit_base_ft1k", **options), ("a",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (0, 32)}, r"--model.image-size: expected a positive integer up to 65536, or two: height and"),
        ({"patch_size": 0}, r"--model.patch-size: expected a positive integer"),
        ({"channels": 0}, r"--model.channels: expected a positive integer"),
        ({"depth": 257}, r"--model.depth: expected a positive integer up to 256, found 257"),
        ({"epsilon": -1.0}, r"--model.epsilon: expected a number in \[0, 1\], found -1.0"),
        ({"initializer_range": 0.0}, r"--model.initializer-range: expected a positive number, found 0.0"),
    ],
)
def test_options_out_of_their_range(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(BeitJaxError, match=message):
        changed("beit_base_ft1k", **options).check()


# --- Segmentation on any encoder --------------------------------------------------------------------------------------


def test_the_blocks_that_a_segmentation_head_reads() -> None:
    """Growing, the last among them, and those that were published of 12 and 24."""
    assert segmentation_taps(12) == ((3, 5, 7, 11), "original")
    assert segmentation_taps(24) == ((7, 11, 15, 23), "original")
    for depth in range(4, 65):
        taps, counted = segmentation_taps(depth)
        assert counted == "original"
        assert list(taps) == sorted(set(taps)) and taps[0] >= 0 and taps[-1] == depth - 1
    with pytest.raises(BeitJaxError, match=r"expected at least 3 blocks, found 2"):
        segmentation_taps(2)


@pytest.mark.parametrize("task", ["features", "image_classification", "masked_image_modeling", "backbone"])
def test_any_encoder_segments(task: Task) -> None:
    labels = {"image_classification": ("x",)}.get(task, ())
    start = replace(OWN, task=task, labels=labels, out_indices=(0, 1) if task == "backbone" else ())
    config = model_config(recipe_named("beit_base_ade20k"), ("a", "b"), start, task="semantic_segmentation")
    assert (config.out_indices, config.feature_taps) == ((0, 1, 3, 4), "original")
    assert (config.hidden_size, config.num_labels, config.image_size) == (48, 2, (512, 512))
    assert param_shapes(config)["fpn/up2/kernel"][-1] == 48


def test_a_segmenter_brings_its_head_along() -> None:
    head = {"out_indices": (1, 2, 3, 5), "feature_taps": "hf", "auxiliary_channels": 16, "pool_scales": (1, 2)}
    start = replace(OWN, task="semantic_segmentation", labels=("a", "b"), **head)
    config = model_config(recipe_named("beit_base_ade20k"), ("a", "b"), start, task="semantic_segmentation")
    assert {name: getattr(config, name) for name in head} == head


HEADS: Mapping[str, Any] = {
    "out_indices": (0, 2, 5, 11),
    "pool_scales": (1, 4),
    "auxiliary": False,
    "auxiliary_weight": 0.2,
    "auxiliary_channels": 8,
    "auxiliary_convs": 2,
    "auxiliary_concat": True,
}


def headed(**options: Any) -> Recipe:
    """A recipe with other options of its segmentation head."""
    recipe = recipe_named("segment")
    return replace(recipe, head=HeadOptions(**options))


def test_every_field_of_a_segmentation_head_is_an_option() -> None:
    recipe = headed(**HEADS)
    recipe.check()
    config = model_config(recipe, ("a", "b"), task="semantic_segmentation")
    assert HEADS.keys() == HEAD.keys()
    assert {option: getattr(config, field) for option, field in HEAD.items()} == HEADS
    assert config.feature_taps == "original"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"out_indices": (0, 2, 5, 12)},
            r"--head.out-indices: out_indices: expected four growing indices of the 12 bl",
        ),
        ({"pool_scales": (0,)}, r"--head.pool-scales: expected positive integers, found \(0,\)"),
        ({"auxiliary_weight": -1.0}, r"--head.auxiliary-weight: expected a number >= 0, found -1.0"),
    ],
)
def test_options_of_a_head_that_describe_none(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(BeitJaxError, match=message):
        headed(**options).check()
        model_config(headed(**options), ("a",), task="semantic_segmentation")


def test_a_checkpoints_head_keeps_its_shapes() -> None:
    head = {"out_indices": (1, 2, 3, 5), "feature_taps": "hf", "auxiliary_channels": 16}
    start = replace(OWN, task="semantic_segmentation", labels=("a", "b"), **head)
    other = model_config(headed(out_indices=(0, 1, 2, 4)), ("a",), start, task="semantic_segmentation")
    assert (other.out_indices, other.feature_taps, other.auxiliary_channels) == ((0, 1, 2, 4), "original", 16)
    with pytest.raises(BeitJaxError, match=r"--head.auxiliary-channels: the checkpoint of --init has 16, found 8"):
        model_config(headed(auxiliary_channels=8), ("a",), start, task="semantic_segmentation")


@pytest.mark.parametrize("depth", [3, 4, 5, 12])
def test_a_segmenter_of_any_depth_is_written_and_read(depth: int) -> None:
    """Of three blocks all states are read, the embeddings' among them."""
    start = replace(OWN, num_hidden_layers=depth)
    config = model_config(recipe_named("segment"), ("a", "b"), start, task="semantic_segmentation")
    assert BeitConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert config.tapped_states[-1] == depth
    if depth == 3:
        assert config.tapped_states == (0, 1, 2, 3)
