"""A run that has made its first state keeps nothing of the checkpoint that it started from, but for its shapes."""

import gc
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit_jax import convert
from beit_jax.cli.main import main
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.loop import plan
from beit_jax.train.loop.dispatch import Dispatch
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.loop.run import train
from beit_jax.train.recipes import recipe_named
from beit_jax.weights.native import NativeCheckpoint

DIGITS = Path(__file__).parents[3] / "beit_jax" / "digits"


@dataclass
class Alive:
    """Values of a checkpoint, and how many of them were there again and again."""

    values: list[weakref.ref[Any]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def watch(self, start: NativeCheckpoint) -> None:
        self.values += [weakref.ref(leaf) for leaf in start.params.values() if leaf.ndim > 1]

    def check(self) -> None:
        assert len(self.values) > 10 and len(self.counts) > 5
        assert self.counts[-1] == 0  # on a CPU the first state may lie where the checkpoint does


def planned(data: Path, start: NativeCheckpoint) -> Plan:
    recipe = recipe_named("digits_finetune")
    optim = replace(recipe.optim, epochs=0.25, warmup_epochs=0)
    return make_plan(replace(recipe, optim=optim), data, start)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits").directory


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    """How many of the values that are watched are there before every step."""
    found = Alive()
    right = Dispatch.__call__

    def step(dispatch: Dispatch, *given: Any) -> Any:
        gc.collect()
        found.counts.append(sum(value() is not None for value in found.values))
        return right(dispatch, *given)

    monkeypatch.setattr(Dispatch, "__call__", step)
    return found


def test_the_checkpoint_is_freed(data: Path, tmp_path: Path, alive: Alive) -> None:
    start = convert.load(DIGITS)
    alive.watch(start)
    plans = [planned(data, start)]
    del start
    train(plans.pop(), tmp_path / "run", quiet=True)
    alive.check()


def test_the_command_frees_it_too(
    data: Path, tmp_path: Path, alive: Alive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = plan.make_plan

    def watched(*arguments: Any, **sources: Any) -> Plan:
        alive.watch(sources["init"])
        return right(*arguments, **sources)

    monkeypatch.setattr(plan, "make_plan", watched)
    options = ["--data", str(data), "--init", str(DIGITS), "--out", str(tmp_path / "run")]
    short = ["--optim.epochs", "0.25", "--optim.warmup-epochs", "0"]
    main(["train", "digits_finetune", *options, *short])
    assert capsys.readouterr().out.startswith("step 10 of 10: done")
    alive.check()


def test_what_is_said_of_the_checkpoint_stays(data: Path) -> None:
    """Its shapes say which parameters were adapted or drawn; and the plan that somebody keeps has its values."""
    kept = planned(data, replace(convert.load(DIGITS), provenance={"source": "a test"}))
    begun = kept.begun()
    before, after = kept.sources.start, begun.sources.start
    assert before is not None and after is not None and begun.objective.sources.start is not None
    assert begun.objective.notes == kept.objective.notes
    assert after.config == before.config and after.provenance == before.provenance
    for name, leaf in before.params.items():
        assert np.any(leaf) or leaf.ndim == 1
        assert (after.params[name].shape, after.params[name].dtype) == (leaf.shape, leaf.dtype)
        assert not any(after.params[name].strides)
