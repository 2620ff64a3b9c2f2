"""One optimizer step, for any loss and model: a pure function from state and batch to state and metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from beit_jax.errors import BeitJaxError
from beit_jax.kernels.cpu.calls import computed_often
from beit_jax.models.build import Model
from beit_jax.models.segmenter import batch_statistics
from beit_jax.tree import Nested

from .criterion import Batch, Criterion, Metrics
from .division import EVERYTHING, Division
from .optim import chosen, ema_update, global_norm, moved
from .state import State, variables

TrainStep = Callable[[State, Batch], tuple[State, Metrics]]
_Part = tuple[Batch, Key[Array, ""]]
_Parts = tuple[Batch, Key[Array, " parts"]]


def make_train_step(
    graph: nnx.GraphDef[Model],
    criterion: Criterion,
    tx: optax.GradientTransformation,
    rates: np.ndarray,
    *,
    accumulate: int = 1,
    decays: np.ndarray | None = None,
    division: Division = EVERYTHING,
    seed: int = 0,
) -> TrainStep:
    """The step of a run. Compile it with ``donate_argnums=0``.

    A step whose loss or gradient is not finite, in any part of the batch, changes neither parameters, running
    statistics, optimizer nor average, not by a bit; it is counted, and the schedule goes on.

    Args:
        graph: the model without its parameters.
        criterion: the loss, with the preparation of its batch.
        tx: as `optim.optimizer` makes it, without learning rate.
        rates: [steps] float32, the learning rate of every step.
        accumulate: parts of the batch that are computed one after the other; their gradients are averaged.
        decays: [steps, 2] float32, `schedule.decay_table`: the moving average's, for states that have one.
        division: makes the model's parameters of those that learn and those that are fixed; by default all learn.
        seed: with the number of the step, all of its randomness.

    Returns:
        A function of the state and a batch. Its metrics are the objective's, and ``loss``, ``grad_norm`` (before
        clipping), ``learning_rate``, ``finite`` and, where there is an average, ``ema_distance``: how far it is from
        the parameters, as a share of their norm.
    """
    table = np.asarray(rates, np.float32)
    # Apart: as one array [steps, 2] a TPU would pad it to 128 columns.
    averaging = None if decays is None else [np.ascontiguousarray(column) for column in decays.T]

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        prepare_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        scalars = {name: jnp.broadcast_to(value, accumulate) for name, value in criterion.schedule(state.step).items()}
        prepared = split(criterion.prepare(batch, prepare_key), accumulate)
        parts = {**prepared, **scalars}, jax.random.split(loss_key, accumulate)
        teacher = state.frozen or (division.join(state.average, state.fixed) if state.average else None)
        trained = partial(division.trained, fixed=state.fixed)
        differentiate = partial(_differentiate, graph, criterion, trained, state.params, teacher)
        stats, gradients, metrics = _average(differentiate, state.stats, parts)

        norm, rate = global_norm(gradients), jnp.asarray(table)[state.step]
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        params, opt = moved(tx, gradients, state.opt, state.params, rate, finite)
        average = state.average
        if averaging is not None:
            decay, gain = (jnp.asarray(column)[state.step] for column in averaging)
            average = chosen(finite, ema_update(average, params, decay, gain), average)
        after = State(
            step=state.step + 1,
            params=params,
            stats=chosen(finite, stats, state.stats),
            opt=opt,
            average=average,
            bad=jnp.where(finite, 0, state.bad + 1),
            skipped=state.skipped + jnp.where(finite, 0, 1),
            frozen=state.frozen,
            fixed=state.fixed,
        )
        metrics |= {"grad_norm": norm, "learning_rate": rate, "finite": finite}
        if averaging is not None:
            metrics |= {"ema_distance": _distance(after.average, after.params)}
        return after, metrics

    return step


def split(batch: Batch, parts: int) -> Batch:
    """Every array [b, ...] as [parts, b / parts, ...]; sample i goes to part i % parts.

    So the samples of one device, which are neighbours, are shared out evenly, and no part moves between devices.

    Raises:
        BeitJaxError: the parts do not divide the batch.
    """

    def one(array: Array) -> Array:
        if len(array) % parts:
            raise BeitJaxError(f"batch of {len(array)}: expected a multiple of {parts} (--optim.accumulate)")
        return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)

    return {name: one(array) for name, array in batch.items()}


def _differentiate(
    graph: nnx.GraphDef[Model],
    criterion: Criterion,
    trained: Callable[..., Nested],
    params: Nested,
    teacher: Nested | None,
    stats: Nested,
    part: _Part,
) -> tuple[Nested, Nested, Metrics]:
    """New running statistics, gradients and metrics of one part of a batch."""
    batch, key = part

    def loss(params: Nested) -> tuple[Array, tuple[Nested, Metrics]]:
        model = nnx.merge(graph, variables(trained(params, key=key), stats))
        value, metrics = criterion.loss(model, batch, key, teacher)
        return value, (batch_statistics(model), metrics | {"loss": value})

    with computed_often():
        gradients, (stats, metrics) = jax.grad(loss, has_aux=True)(params)
    return stats, gradients, metrics


def _average(
    differentiate: Callable[[Nested, _Part], tuple[Nested, Nested, Metrics]], stats: Nested, parts: _Parts
) -> tuple[Nested, Nested, Metrics]:
    """`_differentiate` of all parts: the last statistics, mean gradients and mean metrics."""
    count = len(parts[1])
    first: Any = jax.tree.map(lambda array: array[0], parts)
    if count == 1:
        return differentiate(stats, first)
    _, shapes, _ = jax.eval_shape(differentiate, stats, first)

    def add(carry: tuple[Nested, Nested], part: _Part) -> tuple[tuple[Nested, Nested], Metrics]:
        stats, gradients, metrics = differentiate(carry[0], part)
        return (stats, jax.tree.map(jnp.add, carry[1], gradients)), metrics

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (stats, total), metrics = jax.lax.scan(add, (stats, zeros), parts)
    return (
        stats,
        jax.tree.map(lambda leaf: leaf / count, total),
        {name: values.mean() for name, values in metrics.items()},
    )


def _distance(average: Nested, params: Nested) -> Float[Array, ""]:
    """Norm of the difference over the norm of the parameters."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, average, params)) / optax.tree.norm(params)
