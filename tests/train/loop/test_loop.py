"""Whole runs: stopped in every way and continued to the same bits, refused where they mislead, used afterwards."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from beit_jax import hub
from beit_jax.errors import BeitJaxError
from beit_jax.inference import predict
from beit_jax.inference.reading import read
from beit_jax.train.checkpoints.checkpointer import Checkpoints
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.evaluation.labelled import evaluate_directory
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.loop.run import NotFinite, train
from beit_jax.train.loop.watch import INTERRUPTED
from beit_jax.train.recipe import Recipe
from beit_jax.train.recipes import recipe_named
from beit_jax.train.step.state import from_saved, to_saved
from beit_jax.weights.native import load

STEPS = 48
OPTIONS = {
    "model.image-size": 16,
    "model.dropout": 0.1,
    "data.batch-size": 56,
    "optim.epochs": 2,
    "optim.warmup-epochs": 1,
    "optim.accumulate": 2,
    "optim.ema": 0.9,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.erasing": 0.25,
    "run.save-every": 3,
    "run.log-every": 6,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits").directory


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """As OPTIONS on the command line."""
    recipe = recipe_named("digits_finetune")
    return replace(
        recipe,
        model=replace(recipe.model, image_size=16, dropout=0.1),
        data=replace(recipe.data, batch_size=56),
        optim=replace(recipe.optim, epochs=2, warmup_epochs=1, accumulate=2, ema=0.9),
        augment=replace(recipe.augment, mixup=0.8, cutmix=1.0, erasing=0.25),
        run=replace(recipe.run, save_every=3, log_every=6),
    )


@pytest.fixture(scope="module")
def plan(recipe: Recipe, digits: Path) -> Plan:
    plan = make_plan(recipe, digits, None)
    assert plan.steps == STEPS
    return plan


@pytest.fixture(scope="module")
def uninterrupted(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    outcome = train(plan, out, quiet=True)
    assert (outcome.step, outcome.exit_code) == (STEPS, 0)
    assert tuple(outcome.scores) == plan.objective.score_names == ("accuracy", "accuracy_top5", "validation_loss")
    return out


def start(digits: Path, out: Path, **changes: object) -> subprocess.Popen[str]:
    """The run of OPTIONS as a user starts it, in a process of its own."""
    options = OPTIONS | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    command = [sys.executable, "-m", "beit_jax", "train", "digits_finetune", "--data", str(digits), "--out", str(out)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def newest(out: Path) -> int:
    return max((int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit()), default=-1)


def sha256(plan: Plan, out: Path) -> dict[str, str]:
    """Of the parameters, the optimizer's state and the average in the last checkpoint, and of its step."""
    with Checkpoints(out / "checkpoints", keep=2) as checkpoints:
        restored = checkpoints.restore(to_saved(plan.abstract_state))
    assert restored is not None
    state, found = from_saved(restored.state, plan.abstract_state), {}
    for name in ("step", "params", "opt", "average"):
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(getattr(state, name)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        found[name] = digest.hexdigest()
    return found


def records(out: Path) -> list[Mapping[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.thorough
def test_killed_five_times_a_run_ends_in_the_same_bits(
    plan: Plan, digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out, chance = tmp_path / "run", random.Random(0)
    resumed = []
    for attempt in range(5):
        before = newest(out)
        process = start(digits, out)
        goal = before + chance.randint(1, 8)
        while newest(out) < min(goal, STEPS - 2) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        _, _, errors = finish(process)
        assert process.returncode == -signal.SIGKILL, errors
        resumed.append("continuing after step" in errors)
        assert newest(out) > before, f"attempt {attempt}: {errors}"
    assert resumed == [False, True, True, True, True]
    code, _, errors = finish(start(digits, out))
    assert code == 0, errors
    assert sha256(plan, out) == sha256(plan, uninterrupted)
    losses = [(entry["step"], entry["loss"]) for entry in records(out) if "loss" in entry]
    assert [step for step, _ in losses] == [6, 12, 18, 24, 30, 36, 42, 48]
    scores = [[entry for entry in records(run) if "accuracy_top5" in entry] for run in (out, uninterrupted)]
    assert scores[0][-1] == scores[1][-1]


def test_a_signal_saves_and_exits_with_its_code(plan: Plan, digits: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(digits, out, run__save_every=1000)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, printed, errors = finish(process)
    assert code == INTERRUPTED, errors
    assert "stopped by a signal and saved" in printed
    assert 6 <= newest(out) < STEPS, "nothing was saved, or the signal came too late"
    assert not (out / "model").exists()
    code, _, errors = finish(start(digits, out))
    assert code == 0, errors
    assert sha256(plan, out) == sha256(plan, uninterrupted)


def test_a_diverging_run_stops_and_says_so(recipe: Recipe, digits: Path, tmp_path: Path) -> None:
    hopeless = replace(recipe, optim=replace(recipe.optim, lr=1e30, warmup_epochs=0, max_bad_steps=4))
    with pytest.raises(
        NotFinite, match=r"were not finite in steps \d+ to \d+, all of them skipped; the last checkpoint"
    ):
        train(make_plan(hopeless, digits, None), tmp_path / "run", quiet=True)
    assert NotFinite.exit_code == 8


@pytest.mark.parametrize(("steps", "stops_early"), [(2, False), (3, False), (2, True)])
def test_the_last_steps_may_be_the_bad_ones(
    recipe: Recipe, digits: Path, tmp_path: Path, steps: int, stops_early: bool
) -> None:
    """The first one is finite, and moves parameters too far. No model is written, and no state after the bad ones."""
    epochs = steps / make_plan(recipe, digits, None).steps_per_epoch
    optim = replace(recipe.optim, lr=1e30, min_lr=1e30, warmup_epochs=0, epochs=epochs, max_bad_steps=steps - 1)
    hopeless = replace(recipe, optim=optim)
    if stops_early:
        run = replace(recipe.run, best="loss", patience=1, eval_every_epochs=epochs)
        hopeless = replace(hopeless, optim=replace(optim, epochs=2 * epochs), run=run)
    with pytest.raises(NotFinite, match=f"were not finite in steps 2 to {steps}, all of them skipped"):
        train(make_plan(hopeless, digits, None), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model").exists()
    assert newest(tmp_path / "run") < steps


def test_the_model_classifies_as_the_run_says(uninterrupted: Path, digits: Path) -> None:
    """Both models, through the public functions; the run's own evaluation counted the first."""
    last = [entry for entry in records(uninterrupted) if "accuracy_top5" in entry][-1]
    for name in ("model", "model-ema"):
        model, processor = predict.from_pretrained(uninterrupted / name)
        scores = evaluate_directory(model, processor, digits, workers=0)
        assert scores.count == 450
        assert scores.top1 > 0.15, "no better than chance: the wrong parameters"
        if name == "model":
            assert scores.top1 == last["accuracy"]
    provenance = json.loads(json.dumps(read(hub.resolve(uninterrupted / "model")).provenance))
    assert provenance["recipe"]["optim"]["ema"] == 0.9
    assert provenance["step"] == STEPS


def test_a_finished_run_finishes_again(plan: Plan, uninterrupted: Path) -> None:
    """Its models are written again; what a person has put beside them stays."""
    before, model = sha256(plan, uninterrupted), uninterrupted / "model"
    (model / "NOTES.md").write_text("mine")
    (model / "pictures").mkdir()
    (model / "pictures" / "a.png").write_bytes(b"mine")
    (model / "config.json").write_text("{}")
    outcome = train(plan, uninterrupted, resume="must", quiet=True)
    assert outcome.step == STEPS
    assert sha256(plan, uninterrupted) == before
    assert (model / "NOTES.md").read_text() == "mine"
    assert (model / "pictures" / "a.png").read_bytes() == b"mine"
    assert load(model).config == plan.config


def test_another_recipe_is_refused_with_what_differs(recipe: Recipe, digits: Path, uninterrupted: Path) -> None:
    changed = make_plan(replace(recipe, optim=replace(recipe.optim, lr=1e-3)), digits, None)
    with pytest.raises(BeitJaxError, match=r"begun with recipe.optim.lr 0.002, now it is 0.001"):
        train(changed, uninterrupted, quiet=True)


def test_what_does_not_change_the_result_may_change(recipe: Recipe, digits: Path, uninterrupted: Path) -> None:
    free = replace(recipe, run=replace(recipe.run, log_every=1, keep=5), data=replace(recipe.data, eval_batch_size=45))
    assert train(make_plan(free, digits, None), uninterrupted, quiet=True).step == STEPS


def test_resume_says_what_it_wants(plan: Plan, uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"holds no run to continue"):
        train(plan, tmp_path / "nothing", resume="must", quiet=True)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(BeitJaxError, match=r"holds a run already"):
        train(plan, uninterrupted, resume="never", quiet=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(BeitJaxError, match=r"holds something else than a run"):
        train(plan, tmp_path / "photos", quiet=True)


def test_two_runs_cannot_share_a_directory(plan: Plan, uninterrupted: Path) -> None:
    with Checkpoints(uninterrupted / "checkpoints", keep=2), pytest.raises(BeitJaxError, match=r"process \d+"):
        train(plan, uninterrupted, quiet=True)


def test_fine_tuning_starts_from_a_checkpoint(
    recipe: Recipe, digits: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """The classifier too, as the labels are the same: the first losses are those of a trained model."""
    once_more = replace(
        recipe,
        optim=replace(recipe.optim, epochs=0.25, warmup_epochs=0, lr=1e-9, min_lr=1e-9, ema=None),
        run=replace(recipe.run, log_every=1),
    )
    plan = make_plan(once_more, digits, uninterrupted / "model")
    outcome = train(plan, tmp_path / "run", quiet=True)
    last = [entry for entry in records(uninterrupted) if "accuracy_top5" in entry][-1]
    assert outcome.scores["accuracy"] == pytest.approx(last["accuracy"], abs=0.005)


def test_a_probe_of_every_block(recipe: Recipe, digits: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """And a profiler's trace of two of its steps, as asked for."""
    probe = recipe_named("digits_probe")
    probe = replace(
        probe,
        model=replace(probe.model, image_size=16),
        optim=replace(probe.optim, epochs=2),
        run=replace(probe.run, save_every=20, profile_steps=2),
    )
    with pytest.raises(BeitJaxError, match=r"a linear probe needs an encoder: give --init"):
        make_plan(probe, digits, None)
    outcome = train(make_plan(probe, digits, uninterrupted / "model"), tmp_path / "probe", quiet=True)
    assert outcome.scores["validation_loss"] < 4 * np.log(10.0), "no better than chance, of four heads"
    assert [name for name in outcome.scores if name.startswith("accuracy_block_")] == [
        f"accuracy_block_{i}" for i in range(1, 5)
    ]
    by_block = [value for name, value in outcome.scores.items() if name.startswith("accuracy_block_")]
    assert outcome.scores["accuracy"] == max(by_block)
    assert outcome.scores["accuracy"] > 0.15, "no better than chance"
    assert outcome.models == ()
    assert list((tmp_path / "probe" / "profile").rglob("*.xplane.pb"))
