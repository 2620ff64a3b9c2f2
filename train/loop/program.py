"""The compiled step of a run: what it computes and where its arrays lie. Compiling needs no data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from beit_jax.config import BeitConfig
from beit_jax.tree import Nested

from ..distributed.sharding import batch_sharding, init_sharded, place, state_shardings
from ..recipe import Recipe
from ..step.schedule import decay_table, poly_table, schedule_table
from ..step.state import Draw, Parts, State, initial_state, whole
from ..step.step import make_train_step

if TYPE_CHECKING:
    from ..objectives.objective import Objective


START, DIVISION = 2**31, 2**31 + 1
"""Branches of the seed's key from which a run starts. Its steps have keys of the same seed, by their numbers."""

GATHER_FIRST = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""For libtpu: parameters that are split over "fsdp" are gathered, and then multiplied. From some MiB on, libtpu would
multiply each part as it comes around a ring instead, and read and write the sum of the products, which is as large as
the activations, once for every part."""

IN_LITTLE_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""For a CPU: operations in an order that needs little memory, and not in one by which most could run at the same time:
1.26 GB instead of 1.53 for BEiT-B and eight images, and no slower. Kernels use all threads by themselves."""
OPTIONS = {"tpu": GATHER_FIRST, "cpu": IN_LITTLE_MEMORY}


@dataclass(frozen=True)
class Program:
    """A training step with its shapes and places.

    Attributes:
        config: of the model; of a tokenizer that is trained, of the images and patches it is for.
        rates: [steps] float32, the learning rate of every step.
    """

    recipe: Recipe
    config: BeitConfig
    mesh: Mesh
    objective: "Objective[Recipe]"
    tx: optax.GradientTransformation
    rates: np.ndarray

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.rates)

    @cached_property
    def step(self) -> jax.stages.Wrapped:
        """The compiled step, a `TrainStep`; it consumes the state it is given."""
        optim = self.recipe.optim
        step = make_train_step(
            self.objective.graph,
            self.objective.criterion,
            self.tx,
            self.rates,
            accumulate=optim.accumulate,
            decays=decay_table(optim, self.steps),
            division=self.objective.division,
            seed=self.recipe.run.seed,
        )
        options = OPTIONS.get(self.mesh.devices.flat[0].platform)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None), compiler_options=options)

    def lower(self) -> jax.stages.Lowered:
        """The step traced for the mesh's devices, which may belong to another machine."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.abstract_state, self.abstract_batch)

    @cached_property
    def shardings(self) -> State:
        """Where every leaf of the state lies."""
        return state_shardings(self._shapes, self.mesh)

    @property
    def abstract_state(self) -> State:
        """Shapes, dtypes and places of the state: what restoring asks for."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._shapes,
            self.shardings,
        )

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and places of a batch."""
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
            for name, shape in self.objective.batch(self.recipe.data.batch_size).items()
        }

    def first_state(self) -> State:
        """The state before the first step, drawn or read, each part of it where it belongs."""
        first = self.objective.initial(self._key(START))
        placed = Parts(*(self._placed(part) for part in (first.params, first.stats, first.frozen)))
        return init_sharded(self._state, self.mesh, placed)

    def begun(self) -> Self:
        """The same program for the time after its first state: without the values that only that is made of."""
        return replace(self, objective=self.objective.replaced(sources=self.objective.sources.begun()))

    def whole(self, state: State) -> State:
        """The state with all parameters of the model, as evaluation and results read it: `step.state.whole`."""
        return whole(state, self._join) if state.fixed else state

    @cached_property
    def result_names(self) -> tuple[str, ...]:
        """The names of the models that the run makes."""

        def params(state: State) -> dict[str, Nested]:
            found = self.objective.results(whole(state, self.objective.division.join) if state.fixed else state)
            return {name: result.params for name, result in found.items()}

        return tuple(jax.eval_shape(params, self._shapes))

    @cached_property
    def _join(self) -> Callable[[Nested, Nested], Nested]:
        join, state = self.objective.division.join, self._shapes
        joined = jax.eval_shape(join, state.params, state.fixed)
        return jax.jit(join, out_shardings=state_shardings(joined, self.mesh))

    def _key(self, branch: int) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.key(self.recipe.run.seed), branch)

    def _placed(self, part: Nested | Draw) -> Nested:
        if callable(part):
            return init_sharded(part, self.mesh)
        return place(part, state_shardings(part, self.mesh))

    @cached_property
    def _shapes(self) -> State:
        return jax.eval_shape(self._state, self.objective.shapes())

    def _state(self, parts: Parts) -> State:
        average = self.recipe.optim.ema is not None
        params, fixed = self.objective.division.divide(parts.params, self._key(DIVISION))
        state = initial_state(params, self.tx, average=average, frozen=parts.frozen, fixed=fixed)
        return replace(state, stats=parts.stats)


def learning_rates(recipe: Recipe, images: int) -> np.ndarray:
    """[steps] float32, of a run over so many training images."""
    table = poly_table if recipe.optim.schedule == "poly" else schedule_table
    return table(recipe.optim, images // recipe.data.batch_size)
