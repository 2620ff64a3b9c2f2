"""The state of a training run: one pytree of nested dicts, saved, sharded and donated as such."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from beit_jax.tree import Nested, flatten, unflatten


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that one optimizer step reads and writes.

    Attributes:
        step: steps done, skipped ones included; the learning rate and all randomness follow it.
        params: what gradients move, float32.
        stats: running statistics of batch norm; empty for models without.
        opt: the optimizer's state, float32.
        ema: what is kept beside `params`: their moving average, or a frozen model; empty for most runs.
        bad: steps in a row, up to now, that were skipped because loss or gradient was not finite.
        skipped: all such steps.
    """

    step: Int[Array, ""]
    params: Nested
    stats: Nested
    opt: Any
    ema: Nested
    bad: Int[Array, ""]
    skipped: Int[Array, ""]


def initial_state(
    params: Nested, tx: optax.GradientTransformation, *, statistics: Collection[str] = (), ema: bool = False
) -> State:
    """The state before the first step. Traceable: `jax.eval_shape` of it is what sharding and restoring ask for.

    Args:
        params: all that the model is merged from.
        statistics: flat names of running statistics among them, `beit_jax.models.build.statistics`.
        ema: whether to keep a moving average. It starts as a copy: donating the state must donate no buffer twice.
    """
    learned, stats = divided(params, statistics)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=learned,
        stats=stats,
        opt=tx.init(learned),
        ema=jax.tree.map(jnp.copy, learned) if ema else {},
        bad=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )


def divided(tree: Nested, statistics: Collection[str]) -> tuple[Nested, Nested]:
    """What gradients move, and the running statistics, which are named flat: what `variables` puts together."""
    flat = flatten(tree)
    return (
        unflatten({name: leaf for name, leaf in flat.items() if name not in statistics}),
        unflatten({name: flat[name] for name in statistics}),
    )


def variables(params: Nested, stats: Nested) -> Nested:
    """What the model is merged from: parameters (or their average) and running statistics, as one."""
    return unflatten(flatten(params) | flatten(stats))
