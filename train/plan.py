"""A training run, resolved: every choice made and every shape known before an array exists."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from beit_jax import weights
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor
from beit_jax.weights import NativeCheckpoint

from .optim import optimizer
from .recipe import Recipe
from .resolve import image_processor, model_config
from .schedule import poly_table, schedule_table
from .sharding import check_batch, init_sharded, make_mesh, place, state_shardings
from .state import State, initial_state
from .step import TrainStep, make_train_step
from .tasks import Images, Start, Task, task_of


@dataclass(frozen=True)
class Plan:
    """What a run consists of.

    Attributes:
        start: the checkpoint that training starts from; None for random parameters.
        rates: [steps] float32, the learning rate of every step.
    """

    recipe: Recipe
    config: BeitConfig
    processor: ImageProcessor
    start: NativeCheckpoint | None
    training: Images
    validation: Images
    mesh: Mesh
    task: Task
    tx: optax.GradientTransformation
    rates: np.ndarray

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.rates)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.training) // self.recipe.data.batch_size

    @cached_property
    def step(self) -> TrainStep:
        """The compiled step; it consumes the state it is given."""
        optim = self.recipe.optim
        step = make_train_step(
            self.task.graph,
            self.task.objective,
            self.tx,
            self.rates,
            accumulate=optim.accumulate,
            ema=optim.ema,
            seed=self.recipe.run.seed,
        )
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

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

    def first_state(self) -> State:
        """The state before the first step: drawn at random, or with the parameters of the checkpoint; sharded."""
        # Step keys are made from the seed too: the initial draw takes another branch of it.
        key = jax.random.fold_in(jax.random.key(self.recipe.run.seed), 2**31)
        if self.start is None:
            return init_sharded(lambda: self._state(self.task.first(key)), self.mesh)
        first = self.task.first(key)
        trees = (first.params, first.stats, first.beside)
        placed = Start(*(place(tree, state_shardings(tree, self.mesh)) for tree in trees))
        return init_sharded(self._state, self.mesh, placed)

    @cached_property
    def _shapes(self) -> State:
        return jax.eval_shape(self._state, self.task.shapes())

    def _state(self, start: Start) -> State:
        return replace(initial_state(start.params, self.tx), stats=start.stats, ema=start.beside)


def make_plan(recipe: Recipe, data: Path, init: Path | None) -> Plan:
    """Resolves a checked recipe against the data, the checkpoint and the devices.

    Raises:
        BeitJaxError: data or checkpoint that do not fit the recipe or each other; a mesh that does not fit the devices;
            fewer images than a batch.
    """
    kind = task_of(recipe)
    training, validation = kind.open(data, "train"), kind.open(data, "validation")
    if training.labels != validation.labels:
        raise BeitJaxError(f"{data}: the splits train and validation have different labels; prepare them together")
    if len(training) < recipe.data.batch_size:
        raise BeitJaxError(
            f"{data}: {len(training)} training images, fewer than --data.batch-size {recipe.data.batch_size}"
        )
    start = None if init is None else weights.load(init)
    config = model_config(
        recipe.model, training.labels, None if start is None else start.config, task=kind.architecture
    )
    table = poly_table if recipe.optim.schedule == "poly" else schedule_table
    mesh = make_mesh(recipe.run.mesh)
    check_batch(recipe.data.batch_size, mesh, parts=recipe.optim.accumulate)
    return Plan(
        recipe=recipe,
        config=config,
        processor=image_processor(recipe, config),
        start=start,
        training=training,
        validation=validation,
        mesh=mesh,
        task=kind(recipe, config, start),
        tx=optimizer(recipe.optim, config),
        rates=table(recipe.optim, len(training) // recipe.data.batch_size),
    )
