"""Does pre-training learn? Linear probes after `digits_pretrain` and `digits_data2vec`, and of random weights.

For every seed: a tokenizer is trained (`digits_tokenizer`), two models are pre-trained without labels, and the same
linear probe (`digits_probe`) reads the best block of each, and of a model with the weights that pre-training starts
from. The score is the accuracy on 450 held-out digits.

    python benchmarks/digits_pretraining.py --out DIR
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from beit_jax import weights
from beit_jax.atomic import new_directory
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.distributed.collectives import on_host
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.loop.run import Outcome, train
from beit_jax.train.recipe import Recipe
from beit_jax.train.recipes import recipe_named
from beit_jax.tree import flatten
from beit_jax.weights import NativeCheckpoint


def seeded(name: str, seed: int) -> Recipe:
    recipe = recipe_named(name)
    return replace(recipe, run=replace(recipe.run, seed=seed))


def run(plan: Plan, out: Path) -> Outcome:
    outcome = train(plan, out, quiet=True)
    score = next(iter(outcome.scores.items()))
    print(f"{out.parent.name}  {out.name:<22} {outcome.timing.total:6.0f} s  {score[0]} {score[1]:.4f}", flush=True)
    return outcome


def untrained(plan: Plan, directory: Path) -> Path:
    """A native checkpoint of what a run starts from."""
    params = {name: on_host(leaf) for name, leaf in flatten(plan.first_state().params).items()}
    with new_directory(directory, overwrite=False) as partial:
        weights.save(partial, NativeCheckpoint(plan.config, plan.processor, params, {"source": "random weights"}))
    return directory


def accuracies(data: Path, out: Path, seed: int) -> dict[str, float]:
    """Of the probe, by what it reads."""
    out.mkdir(parents=True)
    run(make_plan(seeded("digits_tokenizer", seed), data), out / "tokenizer")
    tokens = make_plan(seeded("digits_pretrain", seed), data, tokenizer=out / "tokenizer" / "tokenizer")
    features = make_plan(seeded("digits_data2vec", seed), data)
    starts = {"random weights": untrained(tokens, out / "random")}
    for name, plan in (("digits_pretrain", tokens), ("digits_data2vec", features)):
        run(plan, out / name)
        starts[name] = out / name / "model"
    probe = seeded("digits_probe", seed)
    probe = replace(probe, model=replace(probe.model, image_size=tokens.recipe.model.image_size))
    return {
        name: run(make_plan(probe, data, start), out / f"probe {name}").scores["accuracy"]
        for name, start in starts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="seeds that run at the same time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True)
    data = prepare_digits(options.out / "digits").directory
    seeds = range(options.seeds)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(accuracies, repeat(data), [options.out / f"seed {seed}" for seed in seeds], seeds))
    table = {name: [scores[name] for scores in found] for name in found[0]}
    if options.json:
        print(json.dumps({"accuracy": table, "seconds": time.monotonic() - began}))
        return
    for name, values in table.items():
        seeds = "  ".join(f"{100 * value:5.2f}" for value in values)
        print(f"{name:<16} {100 * np.mean(values):5.2f} % (spread {100 * np.ptp(values):.2f}): {seeds}")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
