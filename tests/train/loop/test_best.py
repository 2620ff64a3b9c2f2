"""The best model beside the last, runs that stop early, and both after a kill at any moment. A part of the model is
frozen in all of these runs."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.train.checkpoints.checkpointer import Checkpoints
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.loop import scores as run_scores
from beit_jax.train.loop.best import Best, replayed, watched
from beit_jax.train.loop.log import Log
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.loop.run import Outcome, train
from beit_jax.train.objectives.classification import Classification
from beit_jax.train.recipe import Recipe, RunOptions
from beit_jax.train.recipes import recipe_named
from beit_jax.train.step.state import State, from_saved, to_saved
from beit_jax.tree import Nested, flatten
from beit_jax.weights.native import load

# --- Which value is better --------------------------------------------------------------------------------------------


def after(best: Best, *values: float) -> Best:
    for step, value in enumerate(values, 1):
        best = best.after(step, value)
    return best


@pytest.mark.parametrize(
    ("direction", "values", "expected"),
    [
        ("higher", (0.1, 0.5, 0.3), (0.5, 2, 1)),
        ("lower", (0.1, 0.5, 0.3), (0.1, 1, 2)),
        ("higher", (0.5, 0.5, 0.5), (0.5, 1, 2)),  # an equal value is no improvement
        ("higher", (math.nan, 0.2, math.nan), (0.2, 2, 1)),
        ("lower", (math.nan, -math.inf, 3.0), (3.0, 3, 0)),
        ("higher", (math.nan, math.nan), (None, 0, 2)),
    ],
)
def test_the_best_value(direction: Any, values: tuple[float, ...], expected: tuple[float | None, int, int]) -> None:
    found = after(Best("accuracy", direction), *values)
    assert (found.value, found.step, found.since) == expected


@pytest.mark.parametrize(
    ("options", "name", "direction"),
    [
        ({"best": "accuracy"}, "accuracy", "higher"),
        ({"best": "loss"}, "validation_loss", "lower"),
        ({"best": "validation_loss"}, "validation_loss", "lower"),
        ({"best": "rmse"}, "rmse", "lower"),
        ({"best": "mae", "best_is": "higher"}, "mae", "higher"),
        ({"patience": 3}, "accuracy", "higher"),
        ({"best": "accuracy", "best_is": "lower", "patience": 1}, "accuracy", "lower"),
    ],
)
def test_the_score_that_is_watched(options: dict[str, Any], name: str, direction: str) -> None:
    found = watched(RunOptions(**options), ("accuracy", "mae", "rmse", "validation_loss"))
    assert found is not None and (found.score, found.direction) == (name, direction)


@pytest.mark.parametrize(
    ("options", "names", "says"),
    [
        ({"best": "acuracy"}, ("accuracy", "validation_loss"), "--run.best: expected a score of this run, accuracy, "),
        ({"best": "accuracy"}, (), "--run.best: this run evaluates nothing"),
        ({"patience": 2}, (), "--run.patience: this run evaluates nothing"),
        ({"best_is": "lower"}, ("accuracy",), "--run.best-is: expected a score, --run.best"),
    ],
)
def test_a_score_that_no_evaluation_has_is_refused(options: dict[str, Any], names: tuple[str, ...], says: str) -> None:
    with pytest.raises(BeitJaxError, match=f"^{says}"):
        watched(RunOptions(**options), names)


def test_a_log_is_read_again() -> None:
    """Training records have metrics of the same name; an evaluation of the last step may be there twice."""
    log = [
        {"step": 2, "loss": 0.1, "accuracy": 0.9, "skipped": 0.0},
        {"step": 2, "accuracy": 0.4},
        {"step": 4, "accuracy": 0.3},
        {"step": 4, "accuracy": 0.3},
        {"step": 6, "mae": 0.3},
    ]
    assert replayed(Best("accuracy", "higher"), log) == Best("accuracy", "higher", 0.4, 2, 1)


# --- Runs -------------------------------------------------------------------------------------------------------------

SCORES = {2: 0.1, 4: 0.5, 6: 0.3, 8: 0.5, 10: math.nan, 12: 0.2, 14: 0.4}


class Killed(BaseException):
    """As a killed process: nobody handles it."""


@dataclass(frozen=True)
class Scripted(Classification):
    """Its accuracy is written down; its validation loss too: the lower, the higher."""

    def scores(self, state: State, *rest: Any) -> dict[str, float]:
        step = int(state.step)
        if step == KILLED_IN["step"]:
            raise Killed
        return {"accuracy": SCORES[step], "accuracy_top5": 1.0, "validation_loss": 1.0 - SCORES[step]}


KILLED_IN = {"step": -1}


@contextmanager
def killed_in_evaluation(step: int) -> Iterator[None]:
    KILLED_IN["step"] = step
    with pytest.raises(Killed):
        yield
    KILLED_IN["step"] = -1


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits").directory


def recipe(**run: Any) -> Recipe:
    base = recipe_named("digits_finetune")
    return replace(
        base,
        model=replace(base.model, image_size=16),
        data=replace(base.data, batch_size=96, workers=0),
        optim=replace(base.optim, epochs=1, warmup_epochs=0, ema=0.5, clip=0.1, freeze="embeddings,blocks.0-1"),
        run=replace(base.run, **({"save_every": 2, "keep": 100, "eval_every_epochs": 2 / 14, "log_every": 3} | run)),
    )


@pytest.fixture(scope="module")
def plan(digits: Path) -> Plan:
    found = make_plan(recipe(best="accuracy"), digits, objective=Scripted)
    assert found.steps == 14
    return found


def with_run(plan: Plan, **run: Any) -> Plan:
    """The plan with other options of a run, none of which the compiled step depends on."""
    other = replace(plan, recipe=recipe(**run))
    vars(other).update({name: value for name, value in vars(plan).items() if name in ("step", "shardings", "_join")})
    return other


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train(plan, out, quiet=True)


def at(plan: Plan, out: Path, step: int) -> State:
    """The state of a training checkpoint, all parameters of the model in it; later checkpoints are removed."""
    for path in (out / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            path.rename(path.with_name(f"{path.name}.bad"))
    with Checkpoints(out / "checkpoints", keep=100) as checkpoints:
        restored = checkpoints.restore(to_saved(plan.abstract_state))
    for path in (out / "checkpoints").glob("*.bad"):
        path.rename(path.with_name(path.name.removesuffix(".bad")))
    assert restored is not None and restored.step == step
    return plan.whole(from_saved(restored.state, plan.abstract_state))


def same(params: Nested | Mapping[str, np.ndarray], other: Nested) -> bool:
    one, two = flatten(params), flatten(other)
    assert one.keys() == two.keys()
    return all(np.asarray(leaf).tobytes() == np.asarray(two[name]).tobytes() for name, leaf in one.items())


def test_the_best_model_is_that_of_its_step_tensor_by_tensor(plan: Plan, whole: tuple[Path, Outcome]) -> None:
    """Blocks that are frozen, blocks that learned, and the average."""
    out, outcome = whole
    assert (outcome.step, outcome.exit_code, outcome.stopped) == (14, 0, None)
    best, average, last = (load(out / name) for name in ("best", "best-ema", "model"))
    kept = at(plan, out, 4)
    assert same(best.params, kept.params) and same(average.params, kept.average)
    assert any("blocks/mlp" in name for name in best.params)
    for other in (average, last):
        assert not same(other.params, kept.params)
    assert best.provenance["step"] == 4
    assert best.provenance["best"] == {"score": "accuracy", "better": "higher", "value": 0.5, "step": 4}
    assert best.provenance["scores"]["accuracy"] == 0.5 and last.provenance["step"] == 14
    assert outcome.as_dict()["best"]["value"] == 0.5
    assert f"best         accuracy 0.5000 after step 4, {out / 'best'}, {out / 'best-ema'}" in outcome.lines()


def test_what_is_frozen_ends_as_it_began_bit_for_bit(plan: Plan, whole: tuple[Path, Outcome]) -> None:
    start = flatten(plan.whole(plan.first_state()).params)
    for name in ("model", "model-ema", "best", "best-ema"):
        end = load(whole[0] / name).params
        for path, leaf in end.items():
            first, leaf = np.asarray(start[path]), np.asarray(leaf)
            if "/embeddings/" in path:
                assert leaf.tobytes() == first.tobytes(), path
            elif "/blocks/" in path:
                assert leaf[:2].tobytes() == first[:2].tobytes(), path
                assert all((leaf[row] != first[row]).any() for row in (2, 3)), path
            else:
                assert (leaf != first).any(), path


def evaluations(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "skipped" not in record]


def assert_same_ends(plan: Plan, one: Path, other: Path) -> None:
    assert evaluations(one) == evaluations(other)
    for name in ("model", "model-ema", "best", "best-ema"):
        first, second = load(one / name), load(other / name)
        assert same(first.params, second.params), name
        assert first.provenance["step"] == second.provenance["step"], name
    ends = [to_saved(at(plan, out, 14)) for out in (one, other)]
    assert all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*map(jax.tree.leaves, ends), strict=True)
    )


@pytest.mark.thorough
def test_killed_a_run_keeps_the_same_best_model_and_ends_in_the_same_bits(
    plan: Plan, whole: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an evaluation, before the best model is written, between model and log, and long after it."""
    out, write, results = tmp_path / "run", Log.write, run_scores.write_results
    with killed_in_evaluation(4):
        train(plan, out, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(run_scores, "write_results", lambda *rest: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(plan, out, quiet=True)
    assert load(out / "best").provenance["step"] == 2

    def die(log: Log, step: int, metrics: Mapping[str, float]) -> None:
        if step == 4 and "skipped" not in metrics:
            raise Killed
        write(log, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", die)
        with pytest.raises(Killed):
            train(plan, out, quiet=True)
    assert load(out / "best").provenance["step"] == 4 and run_scores.write_results is results
    with killed_in_evaluation(12):
        train(plan, out, quiet=True)
    outcome = train(plan, out, quiet=True)
    assert (outcome.step, outcome.best) == (14, whole[1].best)
    assert outcome.kept == (out / "best", out / "best-ema")
    assert_same_ends(plan, out, whole[0])


@pytest.mark.thorough
def test_a_run_stops_when_nothing_gets_better_also_after_a_kill(plan: Plan, tmp_path: Path) -> None:
    first, plan, out = plan, with_run(plan, best="loss", patience=2), tmp_path / "run"
    with killed_in_evaluation(6):
        train(plan, out, quiet=True)
    outcome = train(plan, out, quiet=True)
    assert (outcome.step, outcome.steps, outcome.exit_code) == (8, 14, 0)
    reason = "2 evaluations in a row without a better validation_loss (--run.patience 2)"
    assert outcome.stopped == outcome.as_dict()["stopped"] == reason
    assert outcome.lines()[0] == f"step 8 of 14: stopped early: {reason}"
    assert load(out / "model").provenance["step"] == 8 and load(out / "best").provenance["step"] == 4
    again = train(plan, out, quiet=True)
    assert (again.step, again.stopped) == (8, reason), "a run that has ended ends again"
    more = with_run(first, best="loss", patience=3)
    assert train(more, out, quiet=True).step == 10, "an evaluation that is no number is no improvement"
    assert [record["step"] for record in evaluations(out)][:3] == [2, 4, 6]
    other = with_run(first, best="accuracy", patience=9)
    outcome = train(other, out, quiet=True)
    assert outcome.step == 14 and outcome.best == Best("accuracy", "higher", 0.4, 14), "the best of another score, anew"


def test_patience_counts_evaluations_that_are_no_numbers(plan: Plan, tmp_path: Path) -> None:
    hopeless = with_run(plan, best="accuracy", patience=1, eval_every_epochs=10 / 14)
    outcome = train(hopeless, tmp_path / "run", quiet=True)
    assert outcome.step == 10 and outcome.best == Best("accuracy", "higher", None, 0, 1)
    assert not (tmp_path / "run" / "best").exists()


def test_without_its_log_a_run_still_knows_its_best_model(
    plan: Plan, whole: tuple[Path, Outcome], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "metrics.jsonl").unlink()
    outcome = train(plan, out, quiet=True)
    assert outcome.best == Best("accuracy", "higher", 0.5, 4, 1) and load(out / "best").provenance["step"] == 4


def test_the_place_of_the_best_model_is_not_taken_from_anybody(plan: Plan, tmp_path: Path) -> None:
    """Before a step is done."""
    run = tmp_path / "run"
    with killed_in_evaluation(2):
        train(plan, run, quiet=True)
    (run / "best").write_text("mine")
    with pytest.raises(BeitJaxError, match="best"):
        train(plan, run, quiet=True)
    assert (run / "best").read_text() == "mine"
