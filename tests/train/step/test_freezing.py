"""Freezing: which parameters a name stands for, what learns of stacked blocks, and what a frozen part costs."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import abstract_model, param_shapes, statistics
from beit_jax.models.interface import runs
from beit_jax.train.objectives import objective_of
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.recipes import recipe_named
from beit_jax.train.step.division import EVERYTHING
from beit_jax.train.step.freezing import division
from beit_jax.train.step.optim import layer_scales, optimizer
from beit_jax.tree import Nested, flatten, unflatten

CONFIG = BeitConfig(
    task="image_classification", hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
    image_size=(16, 16), patch_size=(8, 8), position_bias="both", labels=("a", "b", "c"),
)  # fmt: skip
BLOCKS = {name for name in param_shapes(CONFIG) if name.startswith("beit/blocks/")}
EMBEDDINGS = {name for name in param_shapes(CONFIG) if name.startswith("beit/embeddings/")}
NORM = {"beit/pooler_norm/scale", "beit/pooler_norm/bias"}
HEAD = {"classifier/kernel", "classifier/bias"}


def drawn(config: BeitConfig = CONFIG) -> Nested:
    """Every number is another one."""
    rng = np.random.default_rng(0)
    return unflatten(
        {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in param_shapes(config).items()}
    )


def parts(freeze: str) -> tuple[dict[str, Any], dict[str, Any]]:
    learned, fixed = division(freeze, CONFIG).divide(drawn(), jax.random.key(0))
    return flatten(learned), flatten(fixed)


@pytest.mark.parametrize(
    ("freeze", "names"),
    [
        ("embeddings", EMBEDDINGS),
        ("blocks", BLOCKS),
        ("blocks.0-3", BLOCKS),
        ("blocks.2-3,blocks.0, blocks.1", BLOCKS),
        ("shared_bias", {"beit/shared_bias_table"}),
        ("norm", NORM),
        ("encoder", EMBEDDINGS | BLOCKS | NORM | {"beit/shared_bias_table"}),
        ("head", HEAD),
        ("classifier,norm", HEAD | NORM),
    ],
)
def test_a_group_is_these_parameters(freeze: str, names: set[str]) -> None:
    learned, fixed = parts(freeze)
    assert fixed.keys() == names and learned.keys() == param_shapes(CONFIG).keys() - names


def test_heads_go_by_their_own_names_too() -> None:
    config = BeitConfig(
        task="semantic_segmentation", hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
        image_size=(16, 16), patch_size=(8, 8), out_indices=(0, 1, 2, 3), labels=("a", "b"),
    )  # fmt: skip
    learned = param_shapes(config).keys() - statistics(config)
    fixed = flatten(division("fpn,decode_head", config).divide(drawn(config), jax.random.key(0))[1]).keys()
    assert fixed == {name for name in learned if name.startswith(("fpn/", "decode_head/"))}
    assert flatten(division("head", config).divide(drawn(config), jax.random.key(0))[1]).keys() == {
        name for name in learned if not name.startswith("beit/")
    }


@pytest.mark.parametrize("freeze", ["blocks.0-2", "blocks.1", "blocks.0,blocks.2", "embeddings,blocks.3,norm"])
def test_rows_of_stacked_blocks_are_parted_and_joined_bit_for_bit(freeze: str) -> None:
    split = division(freeze, CONFIG)
    learned, fixed = split.divide(drawn(), jax.random.key(0))
    numbers = split.blocks(4)
    assert set(numbers) | set(split.fixed_blocks) == set(range(4)) and set(numbers).isdisjoint(split.fixed_blocks)
    for name in BLOCKS:
        whole = flatten(drawn())[name]
        assert np.array_equal(flatten(learned)[name], whole[jnp.asarray(numbers)]), name
        assert np.array_equal(flatten(fixed)[name], whole[jnp.asarray(split.fixed_blocks)]), name
    joined = split.join(learned, fixed)
    assert flatten(joined).keys() == param_shapes(CONFIG).keys()
    jax.tree.map(np.testing.assert_array_equal, joined, drawn())


def test_nothing_frozen_is_the_whole_tree() -> None:
    assert division(None, CONFIG) is EVERYTHING
    params = drawn()
    assert EVERYTHING.divide(params, jax.random.key(0))[0] is params and EVERYTHING.join(params, {}) is params


@pytest.mark.parametrize(
    ("freeze", "says"),
    [
        ("embedding", "found embedding, expected groups of the model, which are embeddings, blocks, shared_bias, norm"),
        ("", "found nothing, expected groups"),
        ("embeddings,,norm", "found nothing, expected groups"),
        ("blocks.0-", "found blocks.0-, expected groups .* from blocks.0 to blocks.3, as blocks.0-3"),
        ("blocks.4", "the model has 4 blocks, counted from 0; found blocks.4"),
        ("blocks.2-1", "expected blocks.A-B with A <= B <= 3"),
        ("fpn", "found fpn, .* encoder, classifier, head"),
        ("encoder,head", "nothing is left that learns"),
        ("embeddings,blocks.0-3,shared_bias,norm,classifier", "nothing is left that learns"),
    ],
)
def test_what_cannot_be_frozen_is_refused(freeze: str, says: str) -> None:
    with pytest.raises(BeitJaxError, match=f"^--optim.freeze.*{says}") as caught:
        division(freeze, CONFIG)
    assert "\n" not in str(caught.value)


def test_layers_learn_at_the_rates_they_have_without_freezing() -> None:
    split = division("blocks.0,blocks.2", CONFIG)
    learned, _ = split.divide(drawn(), jax.random.key(0))
    every, some = (flatten(layer_scales(tree, CONFIG, 0.5, blocks)) for tree, blocks in (
        (drawn(), None), (learned, split.blocks(4)),
    ))  # fmt: skip
    for name, shares in some.items():
        expected = every[name][[1, 3]] if name in BLOCKS else every[name]
        assert np.array_equal(shares, expected), name


def test_the_optimizer_holds_nothing_of_what_is_frozen() -> None:
    split = division("embeddings,shared_bias,blocks.0-2", CONFIG)
    learned, fixed = split.divide(drawn(), jax.random.key(0))
    state = optimizer(OptimOptions(layer_decay=0.9), CONFIG, split).init(learned)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (learned, fixed, state)]
    assert sizes[2] == 2 * sizes[0] + 1 and sizes[0] + sizes[1] == sum(leaf.size for leaf in jax.tree.leaves(drawn()))
    assert sizes[0] < 0.4 * sizes[1]


def test_runs_are_neighbours_of_one_kind() -> None:
    assert runs(5, (0, 1, 3)) == [(range(2), True), (range(2, 3), False), (range(3, 4), True), (range(4, 5), False)]
    assert runs(3, ()) == [(range(3), False)]


# --- The model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [(0, 1), (1, 3)])
def test_a_model_with_fixed_blocks_computes_the_same_and_has_no_gradient_there(fixed: tuple[int, ...]) -> None:
    """Dropout too: a block keeps its key, and its rate of stochastic depth."""
    config, params = replace(CONFIG, drop_path_rate=0.5, hidden_dropout_prob=0.2), drawn()
    images = np.random.default_rng(1).standard_normal((3, 16, 16, 3)).astype(np.float32)

    def outputs(blocks: tuple[int, ...]) -> Any:
        graph, _ = abstract_model(config, fixed_blocks=blocks)

        def loss(params: Nested) -> Any:
            model: Any = nnx.merge(graph, params)
            output = model(
                images, key=jax.random.key(0), taps=(1, 4), output_hidden_states=True, output_attentions=True
            )
            return jnp.square(output.logits).sum(), vars(output)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (every, expected), (some, found) = outputs(()), outputs(fixed)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    for name, gradient in flatten(some).items():
        if name in BLOCKS:
            assert not np.asarray(gradient)[list(fixed)].any(), name
            gradient = gradient.at[jnp.asarray(fixed)].set(flatten(every)[name][jnp.asarray(fixed)])
        np.testing.assert_allclose(gradient, flatten(every)[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.thorough
def test_what_is_frozen_before_all_that_learns_keeps_nothing_for_the_way_back() -> None:
    """A forward pass alone is a third of the operations, and a probe of the head costs little more."""
    recipe = recipe_named("digits_finetune")

    def costs(freeze: str | None) -> tuple[float, int]:
        model, optim = replace(recipe.model, remat="none"), replace(recipe.optim, freeze=freeze)
        frozen = replace(recipe, model=model, optim=optim)
        kind, labels = objective_of(frozen), ("a", "b")
        sources = kind.abstract_sources(frozen, labels)
        objective = kind(frozen, kind.configure(frozen, labels, sources), sources, 1)
        return objective.flops, objective.activations

    choices = None, "head", "embeddings,blocks.0-1", "blocks.0-1", "encoder"
    whole, none, half, inner, encoder = (costs(freeze) for freeze in choices)
    assert whole[0] * 0.99 < none[0] < whole[0]  # patches' gradients are not computed in either
    assert 0.6 * whole[0] < half[0] < 0.7 * whole[0]
    assert half[0] < inner[0] < whole[0]
    assert encoder[0] == pytest.approx(whole[0] / 3, rel=0.02)
    assert encoder[1] < 0.02 * whole[1] and 0.4 * whole[1] < half[1] < 0.6 * whole[1]
