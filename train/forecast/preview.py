"""A preview of a run: numbers that follow from its shapes, without running it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import jax

from beit_jax.choices import ProblemType
from beit_jax.config import BeitConfig
from beit_jax.models.partition import BATCH_AXES
from beit_jax.tree import Nested

from ..costs.estimate import Memory, memory
from ..initial.parameters import Report, checkpoint_report
from ..loop.plan import Plan
from ..recipe import Recipe

_UNIT: Mapping[ProblemType | None, str] = {"regression": "values"}


@dataclass(frozen=True)
class Preview:
    """Numbers of a run.

    Attributes:
        classes: outputs of the model, of the kind `problem_type`.
        network: the configuration of what is trained, without the names of its classes.
        start: the configuration of the checkpoint that training starts from, and the fate of its tensors.
        parameters, fixed: how many learn, and how many stay as they are.
        flops_per_image: floating point operations of a training step, for one image.
        memory: of each device, estimated.
        mesh: axis to devices.
    """

    recipe: Recipe
    network: Mapping[str, Any]
    start: tuple[BeitConfig, Report] | None
    parameters: int
    fixed: int
    steps: int
    steps_per_epoch: int
    training_images: int
    validation_images: int
    classes: int
    problem_type: ProblemType | None
    flops_per_image: float
    memory: Memory
    mesh: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        start = None if self.start is None else asdict(self.start[1])
        return asdict(self) | {"start": start, "memory": asdict(self.memory) | {"total": self.memory.total}}

    def lines(self) -> list[str]:
        """For people."""
        read = {group: vars(options) for group, options in self.recipe.groups().items()}
        settings = [f"{group}.{name} = {value}" for group, values in read.items() for name, value in values.items()]
        devices = " x ".join(f"{size} {axis}" for axis, size in self.mesh.items())
        return [
            f"recipe       {self.recipe.name} ({self.recipe.objective})",
            *(f"  {setting}" for setting in settings),
            *self._network_lines(),
            f"data         {self.training_images:,} images to train, {self.validation_images:,} to evaluate"
            + (f", {self.classes:,} {_UNIT.get(self.problem_type, 'classes')}" if self.classes else ""),
            f"steps        {self.steps:,}, {self.steps_per_epoch:,} an epoch",
            f"parameters   {self.parameters:,}" + (f" that learn, {self.fixed:,} that stay" if self.fixed else ""),
            f"operations   {self.flops_per_image / 1e9:,.1f} GFLOP an image and step, "
            f"{self.flops_per_image * self.recipe.data.batch_size * self.steps:.3g} FLOP in all",
            f"devices      {devices}",
            "memory       of each device, estimated, without what the compiler adds:",
            *(f"  {line}" for line in self.memory.lines()),
            "one step was traced with these shapes; nothing was computed or written",
        ]

    def _network_lines(self) -> list[str]:
        """The configuration, and of every field whether it is the checkpoint's."""
        if self.start is None:
            return ["network", *(f"  {name} = {_spoken(value)}" for name, value in self.network.items())]
        config, report = self.start
        shown = []
        for name, value in self.network.items():
            found = getattr(config, name)
            origin = "as the checkpoint has" if found == value else f"the checkpoint has {_spoken(found)}"
            shown.append(f"  {name} = {_spoken(value)}: {origin}")
        return [
            "network",
            *shown,
            "start        of the checkpoint's tensors",
            *(f"  {each}" for each in report.lines()),
        ]


def preview(plan: Plan) -> Preview:
    """Traces a step and adds up.

    Raises:
        BeitJaxError: shapes that do not fit, as the run would.
    """
    recipe, start = plan.recipe, plan.sources.start
    with jax.set_mesh(plan.mesh):
        jax.eval_shape(plan.step, plan.abstract_state, plan.abstract_batch)
    mesh = dict(plan.mesh.shape)
    state = plan.abstract_state
    learned = _count(state.params)
    images = recipe.data.batch_size // recipe.optim.accumulate // prod(mesh[axis] for axis in BATCH_AXES)
    return Preview(
        recipe=recipe,
        network=plan.objective.network,
        start=None if start is None else (start.config, checkpoint_report(start, plan.config)),
        parameters=learned,
        fixed=_count(state.fixed),
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        training_images=len(plan.training),
        validation_images=0 if plan.validation is None else len(plan.validation),
        classes=plan.config.num_labels,
        problem_type=plan.config.problem_type,
        flops_per_image=plan.objective.flops,
        memory=memory(
            4 * learned,
            images * plan.objective.activations,
            others=4 * sum(_count(tree) for tree in (state.average, state.frozen, state.fixed)),
            accumulate=recipe.optim.accumulate,
            shards=mesh["fsdp"] * mesh["tensor"],
        ),
        mesh=mesh,
    )


def _spoken(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _count(tree: Nested) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
