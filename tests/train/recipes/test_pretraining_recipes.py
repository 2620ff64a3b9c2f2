"""The published pre-training runs: their numbers, and that each is a run whose step can be traced at its own sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from beit_jax.config import BeitConfig
from beit_jax.images import ImageProcessor
from beit_jax.models.build import num_params, param_shapes
from beit_jax.tokenizers.build import TokenizerConfig, tokenizer_shapes
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
from beit_jax.tokenizers.dvae import DvaeEncoderConfig
from beit_jax.tokenizers.vqkd import VqkdConfig
from beit_jax.train.distributed.sharding import make_mesh
from beit_jax.train.initial.model_config import model_config
from beit_jax.train.loop.plan import Plan
from beit_jax.train.objectives import objective_of
from beit_jax.train.objectives.dvae import configs
from beit_jax.train.objectives.masked_tokens import MaskedTokensRecipe, TokenOptions
from beit_jax.train.objectives.objective import Sources
from beit_jax.train.recipe import Recipe
from beit_jax.train.recipes import RECIPES, pretraining, recipe_named, tokenizers
from beit_jax.train.step.optim import optimizer
from beit_jax.train.step.schedule import decay_table, schedule_table
from beit_jax.variants import VARIANTS
from beit_jax.weights import NativeCheckpoint

IMAGENET, IMAGENET22K = 1_281_167, 14_197_122
NAMES = [make.__name__ for make in (*pretraining.RECIPES, *tokenizers.RECIPES)] + [
    "digits_tokenizer",
    "digits_pretrain",
    "digits_data2vec",
]


def nothing(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays of these shapes that take four bytes each."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def sources_of(recipe: Recipe) -> Sources:
    """What the recipe's documentation tells to give it, by its shapes."""
    if recipe.objective == "masked_tokens":
        # DALL-E's, BEiT v2's, and that of the digits.
        config: TokenizerConfig = VqkdConfig() if recipe.name.startswith("beitv2") else DvaeEncoderConfig()
        if recipe.name == "digits_pretrain":
            config, _ = configs(recipe_named("digits_tokenizer").dvae, (16, 16))
        return Sources(tokenizer=TokenizerCheckpoint(config, nothing(tokenizer_shapes(config))))
    if recipe.objective == "vqkd":
        # As large as CLIP's output.
        teacher = BeitConfig(hidden_size=512, num_attention_heads=8, intermediate_size=2048)
        return Sources(teacher=NativeCheckpoint(teacher, ImageProcessor(), nothing(param_shapes(teacher))))
    return Sources()


def planned(recipe: Recipe, images: int = IMAGENET) -> Plan:
    """As `make_plan`, of data that nobody reads."""
    sources, kind = sources_of(recipe), objective_of(recipe)
    config = kind.configure(recipe, (), sources)
    rates = schedule_table(recipe.optim, images // recipe.data.batch_size)
    data: Any = range(images)
    return Plan(
        recipe=recipe,
        config=config,
        processor=kind.processor(recipe, config),
        sources=sources,
        training=data,
        validation=None,
        mesh=make_mesh((1, 1, 1), jax.devices()[:1]),
        objective=kind(recipe, config, sources, len(rates)),
        tx=optimizer(recipe.optim, config),
        rates=rates,
    )


def test_all_of_them_are_recipes() -> None:
    objectives = {"masked_tokens", "data2vec", "vqkd", "dvae"}
    assert {name for name in RECIPES if recipe_named(name).objective in objectives} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_traces(name: str) -> None:
    """Shapes of one whole step at the recipe's own sizes, tokenizer and teacher included: nothing is computed."""
    recipe = recipe_named(name)
    recipe.check()
    plan = planned(recipe)
    state = plan.abstract_state
    with jax.set_mesh(plan.mesh):
        after, metrics = jax.eval_shape(plan.step, state, plan.objective.batch(recipe.data.batch_size))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == () and metrics["loss"].dtype == np.float32
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(after.params))
    beside = sum(leaf.size for leaf in jax.tree.leaves((state.average, state.frozen)))
    learned = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    if recipe.objective == "dvae":
        assert beside == 0
    elif recipe.objective == "data2vec":
        assert beside == learned
    else:
        assert beside > 0


# --- Numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A published command with the defaults of its program."""

    variant: tuple[int, int]
    """Width and blocks."""
    batch: int
    lr: float
    epochs: float
    warmup: int
    """Epochs."""
    drop_path: float
    layer_scale: float
    statistics: str
    beta2: float = 0.999
    attention_dropout: float = 0.0
    ema: float | None = None
    masks: tuple[int, int, int | None, bool] = (75, 16, None, False)
    """Patches, smallest and largest block, whether exactly so many."""
    crop: tuple[float, float] = (0.08, 1.0)
    aggregation: tuple[int, int] = (0, 0)
    second: str = "lanczos"
    """Filter of the tokenizer's view."""
    clip: float | None = 3.0
    weight_decay: float = 0.05
    min_lr: float = 1e-5


_B, _L = (768, 12), (1024, 24)
_V2: Mapping[str, Any] = {"masks": (75, 16, None, True), "crop": (0.2, 1.0), "second": "bicubic"}
_D2V: Mapping[str, Any] = {"masks": (120, 16, 196, False)}
# microsoft/unilm@768a3c8 beit/README.md, beit/get_started_for_pretraining.md and run_beit_pretraining.py;
# beit2/PRETRAINING.md; facebookresearch/data2vec_vision@af9a363 beit/README.md and run_cyclical.py.
PUBLISHED = {
    "beit_base_pt22k": Published(_B, 16 * 128, 1.5e-3, 150, 0, 0.1, 0.1, "half"),
    "beit_large_pt22k": Published(_L, 16 * 128, 1.5e-3, 150, 0, 0.1, 1e-5, "half"),
    "beit_base_pt1k": Published(_B, 16 * 128, 1.5e-3, 800, 10, 0.1, 0.1, "imagenet"),
    "beit_base_pt1k_800ep": Published(_B, 16 * 128, 1.5e-3, 800, 10, 0.1, 0.0, "imagenet"),
    "beitv2_base_pt1k": Published(_B, 2048, 1.5e-3, 1600, 10, 0.1, 0.1, "imagenet", aggregation=(9, 2), **_V2),
    "beitv2_base_pt1k_300e": Published(
        _B, 2048, 1.5e-3, 300, 10, 0.0, 0.1, "imagenet", beta2=0.98, aggregation=(9, 2), **_V2
    ),
    "beitv2_large_pt1k": Published(_L, 64 * 32, 1.5e-3, 1600, 10, 0.1, 1e-5, "imagenet", aggregation=(21, 2), **_V2),
    "beitv2_large_pt1k_300e": Published(
        _L, 2048, 1.5e-3, 300, 10, 0.0, 1e-5, "imagenet", beta2=0.98, aggregation=(21, 2), **_V2
    ),
    "data2vec_base_800": Published(
        _B, 16 * 128, 2e-3, 800, 10, 0.25, 1e-4, "imagenet", attention_dropout=0.05, ema=0.9998, **_D2V
    ),
    "data2vec_large_800": Published(
        _L, 64 * 64, 1e-3, 800, 80, 0.2, 1e-5, "imagenet", attention_dropout=0.15, ema=0.9998, **_D2V
    ),
    "data2vec_large_1600": Published(
        _L, 64 * 64, 1e-3, 800, 40, 0.2, 1e-5, "imagenet", attention_dropout=0.15, ema=0.9999, **_D2V
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    recipe, expected = recipe_named(name), PUBLISHED[name]
    config = model_config(recipe, (), task="masked_image_modeling")
    optim, mask, augment = recipe.optim, recipe.mask, recipe.augment
    tokens = recipe.tokens if isinstance(recipe, MaskedTokensRecipe) else TokenOptions()
    images = IMAGENET22K if name.endswith("22k") else IMAGENET
    warmup = 10_000 / (images // 2048) if name.endswith("22k") else expected.warmup
    found = Published(
        variant=(config.hidden_size, config.num_hidden_layers),
        batch=recipe.data.batch_size,
        lr=optim.lr,
        epochs=optim.epochs,
        warmup=expected.warmup,
        drop_path=config.drop_path_rate,
        layer_scale=config.layer_scale_init_value,
        statistics=recipe.data.statistics,
        beta2=optim.beta2,
        attention_dropout=config.attention_probs_dropout_prob,
        ema=optim.ema,
        masks=(mask.patches, mask.min_block, mask.max_block, mask.exact),
        crop=augment.crop_scale,
        aggregation=(tokens.aggregate_from, tokens.aggregation_layers),
        second=tokens.interpolation,
        clip=optim.clip,
        weight_decay=optim.weight_decay,
        min_lr=optim.min_lr,
    )
    assert found == expected
    assert optim.warmup_epochs == pytest.approx(warmup)
    assert (optim.beta1, optim.epsilon, optim.layer_decay, optim.warmup_lr) == (0.9, 1e-8, 1.0, 0.0)
    assert (config.image_size, config.grid, config.hidden_dropout_prob) == ((224, 224), (14, 14), 0.0)
    assert (augment.color_jitter, augment.flip, augment.interpolation) == (0.4, 0.5, "bicubic")
    assert augment.crop_ratio == (3 / 4, 4 / 3) and not {"randaugment", "erasing"} & vars(augment).keys()
    absolute = name == "beit_base_pt1k_800ep"
    assert config.use_absolute_position_embeddings == absolute
    assert config.position_bias == ("none" if absolute else "shared")
    if recipe.objective == "data2vec":
        # The last six blocks; the mean of them normalised once more.
        assert (recipe.data2vec.target_layers, recipe.data2vec.normalise_mean, recipe.data2vec.beta) == (6, True, 2.0)


def test_warmup_of_imagenet22k_is_ten_thousand_steps() -> None:
    optim = recipe_named("beit_base_pt22k").optim
    rates = schedule_table(optim, IMAGENET22K // 2048)
    assert len(rates) == 150 * 6932
    assert rates[0] == 0 and np.argmax(rates) == 9_999 and rates[9_999] == rates[10_000] == np.float32(1.5e-3)


def test_learning_rates_of_imagenet() -> None:
    """The original's `cosine_scheduler`, as it printed them."""
    rates = schedule_table(recipe_named("beit_base_pt1k").optim, IMAGENET // 2048)
    assert len(rates) == 800 * 625
    golden = {0: 0.0, 1: 2.400384e-7, 6249: 1.5e-3, 6250: 1.5e-3, 6251: 0.0014999999999849196, -1: 1.00000000151e-5}
    for step, rate in golden.items():
        assert rates[step] == pytest.approx(rate, rel=1e-6), step


@pytest.mark.parametrize(
    ("name", "decay"), [("data2vec_base_800", 0.9998), ("data2vec_large_800", 0.9998), ("data2vec_large_1600", 0.9999)]
)
def test_published_teachers_have_a_constant_decay(name: str, decay: float) -> None:
    table = decay_table(recipe_named(name).optim, 1000)
    assert table is not None and (table == np.float32([decay, 1 - decay])).all()


def test_models_are_those_that_were_published() -> None:
    for name, variant in (
        ("beit_base_pt22k", "beit_base_patch16_224_pt22k"),
        ("beit_large_pt22k", "beit_large_patch16_224_pt22k"),
        ("beit_base_pt1k_800ep", "beit_base_patch16_224_pt1k_800ep"),
    ):
        assert num_params(planned(recipe_named(name), IMAGENET22K).config) == num_params(VARIANTS[variant])


def test_tokenizer_of_beit_v2() -> None:
    """microsoft/unilm@768a3c8 beit2/TOKENIZER.md and run_vqkd_training.py: lr is 5e-5 for every 128 images."""
    recipe = recipe_named("vqkd_base")
    optim, options = recipe.optim, recipe.vqkd
    assert recipe.data.batch_size == 8 * 64 and optim.lr == 5e-5 * 512 / 128
    assert (optim.min_lr, optim.epochs, optim.warmup_epochs, optim.weight_decay) == (1e-5, 100, 10, 1e-4)
    assert (optim.beta1, optim.beta2, optim.epsilon, optim.clip, optim.ema) == (0.9, 0.99, 1e-8, None, None)
    assert (options.vocab_size, options.codebook_dim, options.decoder_layers) == (8192, 32, 3)
    assert (options.decay, options.commitment, options.kmeans) == (0.99, 1.0, True)
    augment = recipe.augment
    assert (augment.crop_scale, augment.flip, augment.color_jitter, augment.interpolation) == (
        (0.08, 1.0), 0.5, 0.0, "bicubic",
    )  # fmt: skip
    plan = planned(recipe)
    state = plan.abstract_state
    shapes = {name: leaf.shape for part in (state.params, state.stats) for name, leaf in flat(part)}
    assert shapes == dict(tokenizer_shapes(VqkdConfig()))  # vqkd_encoder_base_decoder_3x768x12_clip


def flat(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def test_tokenizer_of_dalle() -> None:
    """arXiv 2102.12092, appendix A.2; the networks' sizes are those of the released weights."""
    recipe = recipe_named("dvae")
    optim, options = recipe.optim, recipe.dvae
    assert (recipe.data.batch_size, optim.lr, optim.min_lr) == (512, 1e-4, 1.25e-6)
    assert (optim.beta1, optim.beta2, optim.epsilon, optim.weight_decay) == (0.9, 0.999, 1e-8, 1e-4)
    assert (options.temperature, options.divergence) == ((1.0, 1 / 16), 6.6)
    shapes = {name.removeprefix("encoder/"): leaf.shape for name, leaf in flat(planned(recipe).abstract_state.params)}
    expected = tokenizer_shapes(DvaeEncoderConfig())
    assert expected.items() <= {name: shape for name, shape in shapes.items() if "decoder" not in name}.items()


def test_digits_recipes_fit_each_other() -> None:
    """The tokenizer's grid is the model's: one token for a patch."""
    plan, tokens = planned(recipe_named("digits_pretrain")), planned(recipe_named("digits_tokenizer"))
    assert plan.config.grid == tokens.config.grid
    assert plan.config.vocab_size == recipe_named("digits_tokenizer").dvae.vocab_size
