"""The state of a training run: one pytree of nested dicts, saved, sharded and donated as such."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from beit_jax.tree import Nested, flatten, unflatten

Draw = Callable[[], Nested]
"""Draws parameters; traceable."""


@dataclass(frozen=True)
class Initial:
    """The values that a state begins with: arrays of the host, or functions that draw them on the devices.

    Attributes:
        params: of the trained model, all of them; `division.Division` says which learn.
        stats: running statistics; empty for models without.
        frozen: a second network, which nothing moves (a tokenizer, a teacher, a backbone); empty for most objectives.
    """

    params: Nested | Draw
    stats: Nested | Draw
    frozen: Nested | Draw


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parts:
    """The same parts of a state as arrays or as shapes; the fields mean what those of `Initial` mean."""

    params: Nested
    stats: Nested
    frozen: Nested


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that one optimizer step reads and writes.

    Attributes:
        step: steps done, skipped ones included; the learning rate and all randomness follow it.
        params: what gradients move, float32.
        stats: running statistics of batch norm; empty for models without.
        opt: the optimizer's state, float32.
        average: moving average of `params`, float32; empty where the run keeps none.
        frozen: parameters of a second network, which nothing moves: a tokenizer, a teacher or a backbone; empty for
            most runs.
        fixed: parameters of the trained model itself which nothing moves, float32: they have no gradient, no optimizer
            state and no average. Empty where the whole model learns. `division.Division.join` makes the model's
            parameters of `params` and `fixed`; `whole` does so for a state.
        bad: steps in a row, up to now, that were skipped because loss or gradient was not finite.
        skipped: all such steps.
    """

    step: Int[Array, ""]
    params: Nested
    stats: Nested
    opt: Any
    average: Nested
    frozen: Nested
    bad: Int[Array, ""]
    skipped: Int[Array, ""]
    fixed: Nested = field(default_factory=dict)


def initial_state(
    params: Nested,
    tx: optax.GradientTransformation,
    *,
    statistics: Collection[str] = (),
    average: bool = False,
    frozen: Nested | None = None,
    fixed: Nested | None = None,
) -> State:
    """The state before the first step. Traceable: `jax.eval_shape` of it is what sharding and restoring ask for.

    Args:
        params: what learns of the model, with its running statistics.
        statistics: flat names of running statistics among them, `beit_jax.models.build.statistics`.
        average: whether to keep a moving average. It starts as a copy: donating the state must donate no buffer twice.
        frozen: parameters of a second network.
        fixed: the model's other parameters, which nothing moves.
    """
    learned, stats = divided(params, statistics)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=learned,
        stats=stats,
        opt=tx.init(learned),
        average=jax.tree.map(jnp.copy, learned) if average else {},
        frozen={} if frozen is None else frozen,
        bad=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        fixed={} if fixed is None else fixed,
    )


def whole(state: State, join: Callable[[Nested, Nested], Nested]) -> State:
    """The state as evaluation and results read it: `params` and `average` are all of the model, `fixed` is empty.

    Args:
        join: `division.Division.join`.
    """
    average = join(state.average, state.fixed) if state.average else {}
    return replace(state, params=join(state.params, state.fixed), average=average, fixed={})


def to_saved(state: State) -> dict[str, Any]:
    """The state as training checkpoints name its parts. Takes arrays or shapes.

    Files have one place, ``ema``, for the average or, where there is no average, for the frozen network; a state that
    has both keeps the second as ``frozen``. Where nothing is fixed there is no ``fixed``. Runs of earlier versions are
    read by the same names.
    """
    saved = {name: getattr(state, name) for name in ("step", "params", "stats", "opt", "bad", "skipped")}
    both = {"frozen": state.frozen} if state.average and state.frozen else {}
    fixed = {"fixed": state.fixed} if state.fixed else {}
    return saved | both | fixed | {"ema": state.average or state.frozen}


def from_saved(saved: Mapping[str, Any], like: State) -> State:
    """The inverse of `to_saved`.

    Args:
        like: a state of the same run, or its shapes; says which network lies under ``ema``.
    """
    rest = {name: value for name, value in saved.items() if name not in ("ema", "frozen")}
    if not like.average:
        return State(average={}, frozen=saved["ema"], **rest)
    return State(average=saved["ema"], frozen=saved.get("frozen", {}), **rest)


def divided(tree: Nested, statistics: Collection[str]) -> tuple[Nested, Nested]:
    """The parameters that gradients move, and the running statistics of the given flat names; undone by `variables`."""
    flat = flatten(tree)
    return (
        unflatten({name: leaf for name, leaf in flat.items() if name not in statistics}),
        unflatten({name: flat[name] for name in statistics}),
    )


def variables(params: Nested, stats: Nested) -> Nested:
    """Parameters (or their average) and running statistics as one tree, from which the model is merged."""
    return unflatten(flatten(params) | flatten(stats))
