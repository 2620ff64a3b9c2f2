"""An objective is one file and one line: its name is decided nowhere else."""

import ast
import dataclasses
from pathlib import Path

import pytest

from beit_jax.train import objectives
from beit_jax.train.objectives import OBJECTIVES, objective_of
from beit_jax.train.objectives.objective import Objective
from beit_jax.train.recipe import Recipe
from beit_jax.train.recipes import RECIPES, recipe_named

ROOT = Path(__file__).parents[3]
HELPERS = {
    *("__init__", "objective", "labelled", "unlabelled", "hidden_patches", "codebook", "teachers"),
    *("outputs", "class_weights"),
}
UNMISTAKABLE = {"linear_probe", "masked_tokens", "data2vec"}
"""Names that mean nothing but an objective; classification, for instance, is a word."""


def test_every_objective_has_its_file() -> None:
    files = {path.stem for path in Path(objectives.__file__).parent.glob("*.py")} - HELPERS
    assert files == set(OBJECTIVES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_of_the_file_that_it_names(name: str) -> None:
    recipe = recipe_named(name)
    assert type(recipe).__module__ == f"beit_jax.train.objectives.{recipe.objective}"
    kind = objective_of(recipe)
    assert issubclass(kind, Objective) and kind.__module__ == type(recipe).__module__
    assert recipe.as_dict()["objective"] == recipe.objective
    assert dataclasses.replace(recipe, name="other").objective == recipe.objective


def test_every_objective_has_a_recipe() -> None:
    assert {recipe_named(name).objective for name in RECIPES} == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_stand_in_the_objective_s_file_or_are_shared(name: str) -> None:
    """Groups of options that no other objective reads are defined in the objective's own file."""
    recipes = {recipe_named(recipe).objective: type(recipe_named(recipe)) for recipe in RECIPES}
    own = set(recipes[name].group_types()) - set(Recipe.group_types())
    for other in recipes.keys() - {name}:
        own -= set(recipes[other].group_types())
    for group in own:
        assert recipes[name].group_types()[group].__module__ == f"beit_jax.train.objectives.{name}", group


def test_no_other_product_file_knows_an_objective_s_name() -> None:
    known = {
        path: ast.parse(path.read_text()) for room in ("beit_jax", "train") for path in (ROOT / room).rglob("*.py")
    }
    found = []
    for path, tree in known.items():
        if path.parent.name == "objectives" and (path.stem in OBJECTIVES or path.stem == "__init__"):
            continue
        found += [
            (path.relative_to(ROOT).as_posix(), node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in UNMISTAKABLE
        ]
    assert found == []
