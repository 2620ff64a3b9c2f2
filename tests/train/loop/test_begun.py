"""A run that has made its first state keeps nothing of the checkpoint that it started from, but for its shapes."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit_jax import convert
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.loop.dispatch import Dispatch
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.loop.run import train
from beit_jax.train.recipes import recipe_named
from beit_jax.weights.native import NativeCheckpoint

DIGITS = Path(__file__).parents[3] / "beit_jax" / "digits"


def planned(data: Path, start: NativeCheckpoint) -> Plan:
    recipe = recipe_named("digits_finetune")
    optim = replace(recipe.optim, epochs=0.25, warmup_epochs=0)
    return make_plan(replace(recipe, optim=optim), data, start)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits").directory


def test_the_checkpoint_is_freed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = convert.load(DIGITS)
    values = [weakref.ref(leaf) for leaf in start.params.values() if leaf.ndim > 1]
    alive = list[int]()
    right = Dispatch.__call__

    def step(dispatch: Dispatch, *given: Any) -> Any:
        gc.collect()
        alive.append(sum(value() is not None for value in values))
        return right(dispatch, *given)

    monkeypatch.setattr(Dispatch, "__call__", step)
    plans = [planned(data, start)]
    del start
    train(plans.pop(), tmp_path / "run", quiet=True)
    assert len(values) > 10 and len(alive) > 5
    assert alive[-1] == 0  # on a CPU the first state may lie where the checkpoint does


def test_what_is_said_of_the_checkpoint_stays(data: Path) -> None:
    """Its shapes say which parameters were adapted or drawn; and the plan that somebody keeps has its values."""
    plan = planned(data, replace(convert.load(DIGITS), provenance={"source": "a test"}))
    begun = plan.begun()
    before, after = plan.sources.start, begun.sources.start
    assert before is not None and after is not None and begun.objective.sources.start is not None
    assert begun.objective.notes == plan.objective.notes
    assert after.config == before.config and after.provenance == before.provenance
    for name, leaf in before.params.items():
        assert np.any(leaf) or leaf.ndim == 1
        assert (after.params[name].shape, after.params[name].dtype) == (leaf.shape, leaf.dtype)
        assert not any(after.params[name].strides)
