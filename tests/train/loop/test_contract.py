"""What a continued run compares with its beginning: what its objective reads, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.distributed.peers import Peers
from beit_jax.train.loop.contract import begin
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.objectives.data2vec import Data2vecOptions
from beit_jax.train.recipe import Recipe
from beit_jax.train.recipes import recipe_named

Content = dict[str, Any]


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Plan]:
    digits = prepare_digits(tmp_path_factory.mktemp("data") / "digits").directory
    return lambda recipe: make_plan(recipe, digits)


def begun(plan: Plan, out: Path) -> list[str]:
    with Peers.of_run() as peers:
        return begin(plan, out, "auto", peers)


def rewrite(out: Path, change: Callable[[Content], object]) -> None:
    """Makes the record of a run what another version would have written."""
    path = out / "run.json"
    content = json.loads(path.read_text())
    change(content["recipe"])
    path.write_text(json.dumps(content))


# What versions before the objectives had files of their own wrote for every run.
OTHER_GROUPS: Content = {
    "segment": {"scale": [2048, 512], "flip": 0.5, "mode": "slide"},
    "mask": {"patches": 75, "exact": False},
    "vqkd": {"vocab_size": 8192, "decay": 0.99},
    "dvae": {"width": 256},
}


def test_an_option_that_the_objective_does_not_read_decides_nothing(
    plan_of: Callable[[Recipe], Plan], tmp_path: Path
) -> None:
    plan, out = plan_of(recipe_named("digits_finetune")), tmp_path / "run"
    begun(plan, out)
    for value in ({"dvae": {"width": 8}}, OTHER_GROUPS, {"dvae": None}):
        rewrite(out, lambda recipe, value=value: recipe.update(value))
        assert begun(plan, out) == []


def test_a_group_of_which_the_objective_reads_a_part(plan_of: Callable[[Recipe], Plan], tmp_path: Path) -> None:
    """Pre-training reads the crops of `augment`; earlier versions kept all of it."""
    plan, out = plan_of(recipe_named("digits_data2vec")), tmp_path / "run"
    begun(plan, out)
    rewrite(out, lambda recipe: recipe["augment"].update(randaugment=None, erasing=0.0, mixup=0.0, smoothing=0.0))
    rewrite(out, lambda recipe: recipe.update(OTHER_GROUPS | {"mask": recipe["mask"]}))
    assert begun(plan, out) == []
    rewrite(out, lambda recipe: recipe["augment"].update(flip=0.25))
    with pytest.raises(BeitJaxError, match=r"recipe\.augment\.flip 0\.25"):
        begun(plan, out)


@pytest.mark.parametrize("name", ["digits_finetune", "digits_data2vec", "digits_tokenizer"])
def test_a_run_of_a_version_with_fewer_options_goes_on(
    name: str, plan_of: Callable[[Recipe], Plan], tmp_path: Path
) -> None:
    """Every option that has its default may be absent, and so may a whole group of such options."""
    recipe = recipe_named(name)
    plan, out = plan_of(recipe), tmp_path / "run"
    begun(plan, out)

    def forget(content: Content) -> None:
        for group, kind in type(recipe).group_types().items():
            defaults = json.loads(json.dumps(vars(kind())))
            content[group] = {option: value for option, value in content[group].items() if value != defaults[option]}
            if not content[group]:
                del content[group]

    rewrite(out, forget)
    assert "beta1" not in json.loads((out / "run.json").read_text())["recipe"]["optim"]
    assert begun(plan, out) == []


def test_an_absent_option_counts_as_its_default_and_not_as_the_recipe_has_it(
    plan_of: Callable[[Recipe], Plan], tmp_path: Path
) -> None:
    recipe, out = recipe_named("digits_data2vec"), tmp_path / "run"
    assert recipe.optim.clip == 3.0  # type: ignore[attr-defined]
    begun(plan_of(recipe), out)
    rewrite(out, lambda content: content["optim"].pop("clip"))
    with pytest.raises(BeitJaxError, match=r"recipe\.optim\.clip None.* 3\.0"):
        begun(plan_of(recipe), out)


def test_a_run_of_a_version_that_kept_less_goes_on(plan_of: Callable[[Recipe], Plan], tmp_path: Path) -> None:
    """Versions of packages, a place for a source that this objective has none of, and where a recipe is tuned for."""
    plan, out = plan_of(recipe_named("digits_finetune")), tmp_path / "run"
    begun(plan, out)
    path = out / "run.json"
    content = json.loads(path.read_text())
    for name in ("versions", "teacher", "tokenizer", "start"):
        del content[name]
    del content["recipe"]["topology"]
    path.write_text(json.dumps(content))
    assert all(note.startswith("versions") for note in begun(plan, out))


def test_what_the_objective_reads_is_compared(plan_of: Callable[[Recipe], Plan], tmp_path: Path) -> None:
    recipe, out = recipe_named("digits_data2vec"), tmp_path / "run"
    begun(plan_of(recipe), out)
    other = replace(recipe, data2vec=Data2vecOptions(target_layers=1))  # type: ignore[call-arg]
    with pytest.raises(BeitJaxError, match=r"recipe\.data2vec\.\w+ .*, now it is"):
        begun(plan_of(other), out)
    with pytest.raises(BeitJaxError, match=r"recipe\.(objective|name) \w*data2vec"):
        begun(plan_of(recipe_named("digits_finetune")), out)


@pytest.mark.parametrize("content", [{"optim": 3}, {"augment": [1]}])
def test_a_damaged_record_is_one_line(content: Content, plan_of: Callable[[Recipe], Plan], tmp_path: Path) -> None:
    plan, out = plan_of(recipe_named("digits_finetune")), tmp_path / "run"
    begun(plan, out)
    rewrite(out, lambda recipe: recipe.update(content))
    with pytest.raises(BeitJaxError, match=rf"run\.json.*{next(iter(content))}.*expected an object"):
        begun(plan, out)
