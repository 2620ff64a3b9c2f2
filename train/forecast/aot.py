"""A recipe compiled for TPUs or GPUs that nobody has at hand: does it fit, and how fast could it be?

The compiler is libtpu's own, or XLA's for GPUs without its trials on a card. The program is the sharded training step
as a run would execute it. Data, checkpoints and tokenizers count by their shapes alone.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.models.partition import BATCH_AXES
from beit_jax.variants import VARIANTS
from beit_jax.weights.native import NativeCheckpoint

from ..costs.estimate import compiled_bytes, tree_bytes
from ..costs.work import BETWEEN_SLICES, Work, work
from ..distributed.cards import FRACTION, Card
from ..distributed.chips import GIB
from ..distributed.sharding import check_batch, make_mesh
from ..distributed.topology import Topology
from ..initial.model_config import DIGITS
from ..initial.pixels import with_pixels
from ..loop.program import Program, learning_rates
from ..objectives import objective_of
from ..recipe import Recipe
from ..step.optim import optimizer

SCANS = 1_347  # images of an epoch of scikit-learn's digits, by which schedules are as long as they are
Say = Callable[[str], None]


@dataclass(frozen=True)
class Attempt:
    """A step, compiled for one batch size.

    Attributes:
        batch: images of a step, over all devices.
        needed: bytes of memory on each device; where they are too many, the compiler's first count of them.
        compiled: None where that does not fit.
        seconds: that the compiler took.
    """

    batch: int
    needed: int
    compiled: jax.stages.Compiled | None
    seconds: float

    @property
    def fits(self) -> bool:
        return self.compiled is not None


@dataclass(frozen=True)
class Report:
    """Numbers of a recipe on a topology. Bytes, operations and collectives are those of one device in one step.

    Attributes:
        mesh: axis to devices.
        work: None where the program does not fit.
        model_flops: what the model needs of a step on all devices, whatever is computed twice.
        largest: the largest batch that fits, among the powers of two times what the mesh divides a batch by; None: not
            looked for, or none.
        learned: numbers that the run trains.
        optimizer: bytes of the optimizer's state, over all devices that share one copy.
    """

    recipe: Recipe
    topology: Topology
    mesh: dict[str, int]
    memory: int
    work: Work | None
    model_flops: float
    largest: int | None
    seconds: float
    learned: int = 0
    optimizer: int = 0

    @property
    def fits(self) -> bool:
        return self.work is not None

    @property
    def intensity(self) -> float:
        """Operations for every byte of main memory that is read or written."""
        assert self.work is not None
        return self.work.flops / self.work.traffic

    @property
    def times(self) -> dict[str, float]:
        """Seconds of a step if nothing else took time, by what takes them."""
        assert self.work is not None
        chip = self.topology.chip
        network = {one.kind: one.bytes for one in self.work.collectives}
        across = network.pop(BETWEEN_SLICES, 0.0)
        found = {
            "products": self.work.flops / chip.flops,
            "memory": self.work.traffic / chip.hbm_bandwidth,
            "network": sum(network.values()) / self.topology.bandwidth if network else 0.0,
        }
        return found | ({"between slices": across / chip.dcn} if across and chip.dcn else {})

    @property
    def bounds(self) -> tuple[float, float]:
        """Seconds of a step: if all of `times` overlap, and if none do."""
        return max(self.times.values()), sum(self.times.values())

    @property
    def kernels(self) -> float | None:
        """Seconds of all kernels one after the other, as the compiler reckons; None where that is unknown.

        Of the kernels that it does not look into, the products take what the chip's peak says, which is too little.
        """
        assert self.work is not None
        chip = self.topology.chip
        if not (chip.clock and self.work.cycles):
            return None
        return self.work.cycles / chip.clock + self.work.opaque / chip.flops

    def utilisation(self, seconds: float) -> float:
        """Share of the devices' peak that the model's own operations are, in a step of so many seconds."""
        return self.model_flops / (self.topology.size * self.topology.chip.flops * seconds)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        found: dict[str, Any] = {
            "recipe": self.recipe.name,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "devices": self.topology.size,
            "mesh": self.mesh,
            "remat": self.recipe.model.remat,
            "accumulate": self.recipe.optim.accumulate,
            "batch": self.recipe.data.batch_size,
            "fits": self.fits,
            "memory": self.memory,
            "hbm": self.topology.chip.hbm,
            "model_flops": self.model_flops,
            "learned": self.learned,
            "optimizer": self.optimizer,
            "largest_batch": self.largest,
            "compile_seconds": self.seconds,
        }
        if self.work is None:
            return found
        bounds = {"step_seconds": self.bounds, "utilisation": [self.utilisation(each) for each in self.bounds]}
        own = {"intensity": self.intensity, "seconds": self.times, "kernel_seconds": self.kernels}
        return found | asdict(self.work) | own | bounds

    def lines(self) -> list[str]:
        """For people."""
        recipe, chip, size, each = self.recipe, self.topology.chip, self.topology.size, self._each
        verdict = "fits" if self.fits else "DOES NOT FIT"
        parts = f" in {recipe.optim.accumulate} parts" if recipe.optim.accumulate > 1 else ""
        noun = self.topology.noun
        counted = f"{self.topology.chips} {noun}{'s' if self.topology.chips > 1 else ''}"
        return [
            f"recipe       {recipe.name} ({recipe.objective}), recomputed: {recipe.model.remat}",
            f"topology     {self.topology.name}: {counted}, "
            + (f"{size} devices, two a chip, " if size != self.topology.chips else "")
            + " x ".join(f"{size} {axis}" for axis, size in self.mesh.items()),
            f"batch        {recipe.data.batch_size:,}{parts}, {recipe.data.batch_size // size:,} a {each}",
            f"memory       {self.memory / GIB:.2f} of {chip.hbm / GIB:.2f} GiB a {each}: {verdict}",
            *(
                [
                    f"             {chip.hbm / GIB:.2f} are {chip.fraction:.0%} of {chip.memory / GIB:.2f} GiB, "
                    f"which JAX takes; {FRACTION} changes that"
                ]
                if isinstance(chip, Card)
                else []
            ),
            f"learned      {self.learned:,} parameters, for which the optimizer holds {self.optimizer / 1e6:,.1f} MB",
            *self._work_lines(),
            *([] if self.largest is None else [f"largest      batch that fits: {self.largest:,}"]),
            f"compiled in {self.seconds:.0f} s; nothing was run: times are bounds from the {noun}'s data sheet",
        ]

    @property
    def _each(self) -> str:
        """What people call a device."""
        return self.topology.noun if self.topology.size == self.topology.chips else "device"

    def _work_lines(self) -> list[str]:
        if self.work is None:
            return []
        chip, kernels, each = self.topology.chip, self.kernels, self._each
        needed, turn = self.model_flops / self.topology.size, chip.flops / chip.hbm_bandwidth
        low, high = self.bounds
        return [
            f"products     {self.work.flops / 1e12:.4g} TFLOP a {each} and step; the model needs {needed / 1e12:.4g}",
            f"traffic      {self.work.traffic / 1e9:.4g} GB of memory: {self.intensity:.0f} FLOP for a byte; "
            f"below {turn:.0f} memory is what takes time",
            *(
                f"  {one.kind:<20} {one.count:>6,} x, {one.bytes / 1e6:>9,.2f} MB in all to each {each}"
                for one in self.work.collectives
            ),
            *(
                [f"unknown      to this library, counted by their shapes: {', '.join(self.work.unknown)}"]
                if self.work.unknown
                else []
            ),
            "roofline     " + ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in self.times.items()),
            f"step         {low * 1e3:.3g} ms if all overlap, {high * 1e3:.3g} ms if none do: utilisation "
            f"{self.utilisation(low):.0%} to {self.utilisation(high):.0%}",
            *(
                []
                if kernels is None
                else [f"compiler     {kernels * 1e3:.3g} ms for all kernels in a row: {self.utilisation(kernels):.0%}"]
            ),
        ]


def report(
    recipe: Recipe,
    topology: Topology,
    *,
    start: NativeCheckpoint | None = None,
    classes: int | None = None,
    largest: bool = True,
    say: Say = lambda line: None,
) -> Report:
    """Compiles a checked recipe, and adds up.

    Args:
        start: the checkpoint that training would start from; its configuration is what counts.
        classes: of the data; by default as many as the checkpoint has, or as the variant was published with.
        largest: whether to look for the largest batch, which compiles two or three times more.
        say: told what takes its time.

    Raises:
        BeitJaxError: the compiler is missing or refuses the topology; a mesh or batch that does not fit the devices.
    """
    devices = topology.devices()

    def attempt(batch: int) -> Attempt:
        say(f"compiling {recipe.name} for {topology.name}, batch {batch:,}")
        sized = replace(recipe, data=replace(recipe.data, batch_size=batch))
        return compile_step(abstract_program(sized, devices, start=start, classes=classes), topology.chip.hbm)

    program = abstract_program(recipe, devices, start=start, classes=classes)
    mesh, size = dict(program.mesh.shape), recipe.data.batch_size
    first = attempt(size)
    unit = recipe.optim.accumulate * mesh[BATCH_AXES[0]] * mesh[BATCH_AXES[1]]
    return Report(
        recipe=recipe,
        topology=topology,
        mesh=mesh,
        memory=first.needed,
        work=None if first.compiled is None else work(first.compiled.as_text() or "", topology.slice_size),
        model_flops=program.objective.flops * size,
        largest=largest_batch(first, attempt, unit, topology.chip.hbm) if largest else None,
        seconds=first.seconds,
        learned=sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params)),
        optimizer=tree_bytes(program.abstract_state.opt),
    )


def abstract_program(
    recipe: Recipe,
    devices: list[jax.Device],
    *,
    start: NativeCheckpoint | None = None,
    classes: int | None = None,
    images: int | None = None,
) -> Program:
    """The step of a recipe without what a run reads.

    Args:
        start, classes: as of `report`.
        images: of an epoch; by default those of ImageNet-1k, ADE20K or scikit-learn's digits.

    Raises:
        BeitJaxError: a mesh or batch that does not fit the devices; a recipe that describes no model; a checkpoint
            that does not fit it.
    """
    kind = objective_of(recipe)
    if start is not None and "init" not in kind.reads:
        raise BeitJaxError(f"--init: {recipe.objective} does not use it, leave it out")
    labels = _labels(recipe, classes, start)
    sources = kind.abstract_sources(recipe, labels)
    if start is not None:
        sources = replace(sources, start=start)
    listed = recipe.model.channels_from
    if listed is not None:  # which channels they are makes no difference to a program
        recipe = replace(recipe, model=replace(recipe.model, channels=len(listed), channels_from=None))
    config = kind.configure(recipe, labels, sources)
    recipe = with_pixels(recipe, config, sources.start)
    rates = learning_rates(recipe, images or (SCANS if recipe.variant == DIGITS else kind.epoch_images))
    mesh = make_mesh(recipe.run.mesh, devices)
    check_batch(recipe.data.batch_size, mesh, parts=recipe.optim.accumulate)
    objective = kind(recipe, config, sources, len(rates))
    tx = optimizer(recipe.optim, config, objective.division)
    return Program(recipe, config, mesh, objective, tx, rates)


def compile_step(program: Program, memory: int | None = None) -> Attempt:
    """Compiles the step of a program for its devices.

    Args:
        memory: bytes that a program may take. libtpu refuses a program that is too large; XLA for GPUs compiles it.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    batch = program.recipe.data.batch_size
    lowered, start = program.lower(), time.perf_counter()
    try:
        with _not_kept():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error))
        if needed is None:
            raise
        return Attempt(batch, needed, None, time.perf_counter() - start)
    held = compiled_bytes(compiled)
    assert held is not None, "TPUs and GPUs say what they hold"
    analysis: Any = compiled.memory_analysis()
    needed, gpu = held + analysis.generated_code_size_in_bytes, program.mesh.devices.flat[0].platform == "gpu"
    fits = not (gpu and memory is not None and needed > memory)
    return Attempt(batch, needed, compiled if fits else None, time.perf_counter() - start)


@contextmanager
def _not_kept() -> Iterator[None]:
    """Keeps programs out of JAX's cache on disk, from which those for another machine cannot be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def memory_needed(message: str) -> int | None:
    """Bytes that a program would take, of the compiler's message that it does not fit; None for another message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", message)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part is not None)
    return int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])


def largest_batch(first: Attempt, attempt: Callable[[int], Attempt], unit: int, memory: int) -> int | None:
    """The largest ``unit * 2**k`` that fits, from few attempts.

    Memory is a line over the batch through two of them; a third confirms what the line foretells, and where it was
    wrong smaller ones follow.

    Args:
        first: that was made already.
        attempt: makes another.
        memory: bytes of a chip.
    """
    tried = {first.batch: first}

    def made(batch: int) -> Attempt:
        if batch not in tried:
            tried[batch] = attempt(batch)
        return tried[batch]

    if first.fits:  # as many times as all of it would fit, parameters too: surely not too many, but far enough away
        second = made(first.batch * 2 ** max(1, (memory // first.needed).bit_length() - 1))
    else:
        second = made(max(unit, first.batch // unit // 2 * unit))
    growth = (second.needed - first.needed) / ((second.batch - first.batch) or 1)
    room = (memory - first.needed) / growth + first.batch if growth > 0 else max(tried)
    guess = unit
    while 2 * guess <= room:
        guess *= 2
    while not made(guess).fits:
        if guess == unit:
            return None
        guess //= 2
    return guess


def _labels(recipe: Recipe, classes: int | None, start: NativeCheckpoint | None) -> tuple[str, ...]:
    variant = VARIANTS.get(recipe.variant, BeitConfig())
    published = 10 if recipe.variant == DIGITS else len(variant.labels)
    own = 0 if start is None else start.config.num_labels
    return tuple(f"LABEL_{i}" for i in range(classes or own or published))
