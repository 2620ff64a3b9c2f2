"""What differs between the runs of the loop besides the objective: initial parameters, evaluation, and the result."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key

from beit_jax.config import BeitConfig
from beit_jax.heads import Model, abstract_model
from beit_jax.tree import Nested
from beit_jax.weights import NativeCheckpoint

from .accuracy import HostBatch, evaluate_classification
from .initialize import from_checkpoint, initial_params
from .objectives import Objective, classification
from .probe import LinearProbe, abstract_probe, evaluate_probe, linear_probe, probe_params
from .recipe import Recipe
from .state import State

Advance = Callable[[int], None]


class Task(Protocol):
    """One kind of run."""

    @property
    def graph(self) -> nnx.GraphDef[Any]:
        """What is trained, without its parameters."""

    @property
    def objective(self) -> Objective:
        """What is learned."""

    def shapes(self) -> tuple[Nested, Nested]:
        """Shapes of the parameters, and of what the state keeps beside them as `ema`: an average, or a frozen model."""

    def first(self, key: Key[Array, ""]) -> tuple[Nested, Nested]:
        """The values that `shapes` speaks of, at the start; traceable unless a checkpoint is read."""

    def scores(self, state: State, batches: Iterable[HostBatch], mesh: Mesh, advance: Advance) -> dict[str, float]:
        """An evaluation's numbers by name; the first is the one to compare runs by."""

    def results(self, state: State) -> dict[str, Nested]:
        """Directory name to parameters (of `config`) of every model that the run makes; maybe none."""


@dataclass(frozen=True)
class Classification:
    """All parameters learn, from a random start or from a checkpoint's."""

    recipe: Recipe
    config: BeitConfig
    start: NativeCheckpoint | None

    @property
    def graph(self) -> nnx.GraphDef[Model]:
        return abstract_model(self.config, dtype=jnp.dtype(self.recipe.model.dtype))[0]

    @property
    def objective(self) -> Objective:
        return classification(self.recipe, self.config)

    def shapes(self) -> tuple[Nested, Nested]:
        params = abstract_model(self.config)[1]
        return params, params if self._averages else {}

    def first(self, key: Key[Array, ""]) -> tuple[Nested, Nested]:
        params = (
            initial_params(self.config, "finetune", key)
            if self.start is None
            else from_checkpoint(self.start, self.config, key)[0]
        )
        return params, jax.tree.map(np.copy if self.start else jnp.copy, params) if self._averages else {}

    def scores(self, state: State, batches: Iterable[HostBatch], mesh: Mesh, advance: Advance) -> dict[str, float]:
        found = evaluate_classification(
            (self.graph, state.params), batches, self.config.labels, mesh=mesh, advance=advance
        )
        return {"accuracy": found.top1, "accuracy_top5": found.top5}

    def results(self, state: State) -> dict[str, Nested]:
        return {"model": state.params} | ({"model-ema": state.ema} if self._averages else {})

    @property
    def _averages(self) -> bool:
        return self.recipe.optim.ema is not None


@dataclass(frozen=True)
class Probe:
    """Linear heads on every block of a checkpoint's encoder, which the state keeps beside them and nothing moves."""

    recipe: Recipe
    config: BeitConfig
    start: NativeCheckpoint

    @property
    def graph(self) -> nnx.GraphDef[LinearProbe]:
        return abstract_probe(self.config, self.config.num_labels)[0]

    @property
    def backbone(self) -> nnx.GraphDef[Model]:
        return abstract_model(self.config, dtype=jnp.dtype(self.recipe.model.dtype))[0]

    @property
    def objective(self) -> Objective:
        return linear_probe(self.recipe, self.backbone)

    def shapes(self) -> tuple[Nested, Nested]:
        return abstract_probe(self.config, self.config.num_labels)[1], abstract_model(self.config)[1]

    def first(self, key: Key[Array, ""]) -> tuple[Nested, Nested]:
        heads = jax.tree.map(np.asarray, probe_params(self.config, self.config.num_labels, key))
        return heads, from_checkpoint(self.start, self.config, key)[0]

    def scores(self, state: State, batches: Iterable[HostBatch], mesh: Mesh, advance: Advance) -> dict[str, float]:
        found = evaluate_probe(
            (self.graph, state.params), (self.backbone, state.ema), batches, mesh=mesh, advance=advance
        )
        by_block = {f"accuracy_block_{i}": correct / found.images for i, correct in enumerate(found.correct, start=1)}
        return {"accuracy": found.top1, "best_block": float(found.best), **by_block}

    def results(self, state: State) -> dict[str, Nested]:
        return {}
