"""Twenty steps of fine-tuning against a plain torch loop: losses, final weights, moving average.

Adam divides a gradient by its own magnitude: where that is rounding noise, so is the quotient, in any implementation.
Epsilon is therefore 1e-3 here, a few hundredths of the gradients of these models and far above their rounding (1e-8).
Its own place in the formula and clipping, of which Adam would otherwise take no notice, then show in every weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import reference
import torch
from cases import thorough
from flax import nnx
from tolerances import TRAINING

from beit_jax.convert import to_torch
from beit_jax.models.build import Model, abstract_model
from beit_jax.train.objectives.classification import ClassificationRecipe, classification
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.step import freezing
from beit_jax.train.step.optim import optimizer
from beit_jax.train.step.schedule import decay_table, schedule_table
from beit_jax.train.step.state import State, initial_state, whole
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import flatten

Converted = Callable[[torch.nn.Module], Model]
Batches = list[tuple[np.ndarray, np.ndarray]]
STEPS, BATCH, CLASSES = 20, 8, 5
CONFIG = reference.TINY | reference.BIAS["both"] | {
    "num_hidden_layers": 3, "num_labels": CLASSES, "use_absolute_position_embeddings": True,
}  # fmt: skip
PLAIN = OptimOptions(lr=2e-2, min_lr=1e-4, epochs=2.0, warmup_epochs=0.5, weight_decay=0.3, epsilon=1e-3)
ALL = {"accumulate": 4, "clip": 0.5, "layer_decay": 0.65, "ema": 0.9, "beta2": 0.98, "decay_bias_tables": False}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "accumulation": ({"accumulate": 4}, False),
    "clip": ({"clip": 0.5}, False),
    "layer decay": ({"layer_decay": 0.65}, False),
    "mixup": ({}, True),
    "moving average": ({"ema": 0.9}, False),
    "everything": (ALL, True),
    "frozen": (ALL | {"freeze": "embeddings,shared_bias,blocks.0,blocks.2"}, True),
}
FROZEN = ("beit.embeddings.", "beit.encoder.relative_position_bias.", "beit.encoder.layer.0.", "beit.encoder.layer.2.")


def batches(mixup: bool) -> Batches:
    """Fixed noise images and smoothed targets; with mixup, one share per batch and the partner from the other end."""
    rng = np.random.default_rng(7)
    made = []
    for _ in range(STEPS):
        images = rng.standard_normal((BATCH, 32, 32, 3)).astype(np.float32)
        targets = np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, BATCH)] * 0.9 + 0.1 / CLASSES
        share = np.float32(rng.beta(0.8, 0.8)) if mixup else np.float32(1.0)
        made.append(tuple(share * part + (1 - share) * part[::-1] for part in (images, targets)))
    return made


def numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Copies."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def layer_of(name: str) -> int:
    """The original's layer ids, on transformers' names."""
    if name.startswith("beit.embeddings."):
        return 0
    if name.startswith("beit.encoder.layer."):
        return int(name.split(".")[3]) + 1
    return CONFIG["num_hidden_layers"] + 1


def decays(name: str, parameter: torch.nn.Parameter, options: OptimOptions) -> bool:
    """The original's rule: no vectors, no biases, no class token or positions; block tables by choice."""
    if parameter.ndim == 1 or name.endswith(".bias"):
        return False
    if name.endswith((".cls_token", ".position_embeddings")):
        return False
    in_block = name.startswith("beit.encoder.layer.") and name.endswith("relative_position_bias_table")
    return options.decay_bias_tables or not in_block


def train_torch(
    model: torch.nn.Module, data: Batches, options: OptimOptions, rates: np.ndarray
) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """The loss of every step, and the moving average after it."""
    every = reference.named_as_in_files(model)
    named = {name: every[name] for name in every if options.freeze is None or not name.startswith(FROZEN)}
    for name in every.keys() - named.keys():
        every[name].requires_grad_(False)
    groups = [
        {
            "params": [parameter],
            "weight_decay": options.weight_decay if decays(name, parameter, options) else 0.0,
            "scale": options.layer_decay ** (CONFIG["num_hidden_layers"] + 1 - layer_of(name)),
        }
        for name, parameter in named.items()
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(options.beta1, options.beta2), eps=options.epsilon)
    average = {name: parameter.detach().clone() for name, parameter in named.items()}
    for (images, targets), rate in zip(data, rates, strict=True):
        parts = zip(np.split(images, options.accumulate), np.split(targets, options.accumulate), strict=True)
        total = 0.0
        adam.zero_grad()
        for pixels, wanted in parts:
            logits = model(reference.to_torch(pixels)).logits
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(wanted)) / options.accumulate
            loss.backward()
            total += loss.item()
        if options.clip is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), options.clip)
        for group in adam.param_groups:
            group["lr"] = float(rate) * group["scale"]
        adam.step()
        for name, parameter in named.items():
            average[name].mul_(options.ema or 0.0).add_(parameter.detach(), alpha=1.0 - (options.ema or 0.0))
        yield total, average


def train_ours(model: Model, data: Batches, options: OptimOptions, rates: np.ndarray) -> tuple[list[float], State]:
    """The same with the library's step; batches are made already, so nothing is left to prepare."""
    division = freezing.division(options.freeze, model.config)
    graph, _ = abstract_model(model.config, fixed_blocks=division.fixed_blocks)
    objective = replace(classification(ClassificationRecipe("test"), model.config), prepare=lambda batch, key: batch)
    tx = optimizer(options, model.config, division)
    decays = decay_table(options, len(rates))
    step = make_train_step(graph, objective, tx, rates, accumulate=options.accumulate, decays=decays, division=division)
    step = jax.jit(step, donate_argnums=0)
    params, fixed = division.divide(nnx.to_pure_dict(nnx.state(model)), jax.random.key(0))
    state = initial_state(params, tx, average=options.ema is not None, fixed=fixed)
    losses = []
    for images, targets in data:
        state, metrics = step(state, {"image": images, "target": targets})
        assert metrics["finite"]
        losses.append(float(metrics["loss"]))
    return losses, whole(state, division.join)


def assert_went_the_same_way(
    start: dict[str, np.ndarray], found: dict[str, np.ndarray], expected: dict[str, np.ndarray], frozen: bool
) -> None:
    """Differences are small against the movement, which is itself no rounding; what is frozen keeps its bits."""
    assert found.keys() == start.keys() >= expected.keys()
    for name, leaf in expected.items():
        if frozen and name.startswith(FROZEN):
            assert found[name].tobytes() == start[name].tobytes(), name
            continue
        movement = np.abs(leaf - start[name]).max()
        assert movement > 1e-3 * np.abs(leaf).max(), f"{name} hardly moved, so that nothing is tested"
        assert np.abs(found[name] - leaf).max() <= TRAINING * movement, name


@pytest.mark.parametrize("case", thorough(CASES, but=["plain", "frozen"]))
def test_twenty_steps(case: str, converted: Converted) -> None:
    changes, mixup = CASES[case]
    options, data = replace(PLAIN, **changes), batches(mixup)
    rates = schedule_table(options, STEPS // 2)
    theirs = reference.random_model(**CONFIG)
    ours = converted(theirs)
    start = numpy(reference.named_as_in_files(theirs))

    losses, state = train_ours(ours, data, options, rates)
    expected_losses, averages = zip(*train_torch(theirs, data, options, rates), strict=True)

    np.testing.assert_allclose(losses, expected_losses, rtol=TRAINING)
    found = to_torch(ours.config, jax.tree.map(np.asarray, flatten(state.params)))
    frozen = options.freeze is not None
    assert_went_the_same_way(start, found, numpy(reference.named_as_in_files(theirs)), frozen)
    if options.ema is not None:
        average = to_torch(ours.config, jax.tree.map(np.asarray, flatten(state.average)))
        assert_went_the_same_way(start, average, numpy(averages[-1]), frozen)
