"""The time of a training step on many chips, on paper: products, memory and two networks, each from a formula.

Every term is a function, of one chip and one optimizer step. Formulas of rings and of what data, fsdp and tensor axes
exchange: https://jax-ml.github.io/scaling-book/ (sharding, training). Which arrays travel, how often and in which type
is what libtpu made of the step; benchmarks/scaling.md puts the terms beside the compiled programs.

Peaks and bandwidths are the data sheet's, so times are bounds; what is not counted only makes a step longer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import jax

from beit_jax.models.build import param_shapes
from beit_jax.models.partition import traced_for_several_devices
from beit_jax.train.costs import estimate
from beit_jax.train.costs.estimate import Memory, activation_bytes, flops
from beit_jax.train.distributed.chips import Chip
from beit_jax.train.distributed.topology import Slices, Topology
from beit_jax.train.forecast.aot import abstract_program
from beit_jax.train.loop.program import Program
from beit_jax.train.recipe import Recipe
from beit_jax.tree import Nested, first_match

BFLOAT16, FLOAT32 = 2, 4  # bytes
GATHERED_UP_TO = 16
"""The largest fsdp axis over which libtpu was seen to gather. On 64 and 256 chips it compiled all-reduces in its place,
which move twice the bytes."""

RESIDUAL_PASSES, LOOKUP_PASSES = 48.0, 3.7
"""Times that main memory is read or written, forward, forward again and backward, in float32: by a block and image,
arrays like the residual stream [n, d]; by a position bias, arrays like itself [heads, n, n]. From compiled programs of
fine-tuning and of pre-training. Scores [heads, n, n] of images never reach it: they stay with the kernels."""
ON_CHIP, RESIDUALS_AT_ONCE = 128 * 2**20, 6
"""Bytes of a chip's own memory (VMEM, https://jax-ml.github.io/scaling-book/tpus/). Where so many arrays like a block's
residual stream fit for all images at once, none of them reaches main memory; where they take twice as much, all do."""
TEACHER_INTENSITY = 250
"""Operations of a tokenizer or teacher for each byte that it reads or writes."""
WHOLE = 0.37  # share of RESIDUAL_PASSES that every chip of a tensor axis makes over whole arrays: one compiled program
SLACK = 1.7  # compiled programs took up to so many times `estimate.Memory`; one with a tokenizer, on two slices, 2.2
MAX_SLICE = 256  # chips of a pod of v5e or v6e: 16 x 16

_NARROW = ((r"(beit/)?blocks/(attention/qkv_kernel|mlp/fc1/kernel)", True), (r".*", False))
"""Kernels whose products are bfloat16, so that their gradients are, when they travel."""


@dataclass(frozen=True)
class Workload:
    """What the formulas need of a recipe.

    Attributes:
        batch: images of a step.
        flops: of an image, forward and backward, what is computed again included.
        model_flops: without that.
        parameters: that learn.
        narrow: those of them whose gradients travel as bfloat16; all others as float32.
        frozen: parameters of a tokenizer or teacher beside the model.
        teacher_flops: of its forward pass, which `flops` and `model_flops` hold too.
        tokens, width, heads, blocks: of the encoder; blocks of BEiT v2's aggregation are counted too.
        biases: matrices [heads, tokens, tokens] that are looked up: one per block, one for all, or none.
        passes: over the parameters: forward, backward, and between them again where blocks are recomputed.
        unread: parameters that the pass between does not read: each block's last kernel, whose product nothing reads on
            the way back, as the kernel holds the layer's scale.
    """

    name: str
    batch: int
    flops: float
    model_flops: float
    parameters: int
    narrow: int
    frozen: int
    teacher_flops: float
    tokens: int
    width: int
    heads: int
    blocks: int
    biases: int
    passes: int
    unread: int = 0

    @property
    def reads(self) -> int:
        """Parameters that all passes read."""
        return self.passes * self.parameters - self.unread

    @property
    def gradient_bytes(self) -> int:
        return BFLOAT16 * self.narrow + FLOAT32 * (self.parameters - self.narrow)


@dataclass(frozen=True)
class Layout:
    """Chips and their mesh. Sizes of axes may be fractions, to solve for them.

    Attributes:
        bandwidth: bytes per second that reach a chip over the links of its slice that data and fsdp use.
        data: of all slices.
        parts: of a batch, one after the other. Gradients are reduced, and parameters gathered, in each.
    """

    chip: Chip
    bandwidth: float
    slices: float
    data: float
    fsdp: float = 1
    tensor: int = 1
    parts: int = 1

    @property
    def chips(self) -> float:
        return self.data * self.fsdp * self.tensor

    @property
    def replicas(self) -> float:
        """Chips, or groups of a tensor axis, that share out a batch."""
        return self.data * self.fsdp

    @property
    def inside(self) -> float:
        """The data axis within a slice."""
        return self.data / self.slices


def workload(recipe: Recipe) -> Workload:
    """Of a recipe, by tracing it; nothing is compiled.

    Raises:
        BeitJaxError: a recipe that describes no model.
    """
    program = _program(recipe)
    config, objective, state, remat = program.config, program.objective, program.abstract_state, recipe.model.remat
    tokens, blocks = 1 + config.grid[0] * config.grid[1], config.num_hidden_layers + config.aggregation_layers
    sizes = {name: prod(shape) for name, shape in param_shapes(config).items()}
    own = flops(config).training()
    unread = blocks * config.hidden_size * config.intermediate_size if remat == "block" else 0
    again = flops(config).training(remat) - own - 2 * tokens * unread
    return Workload(
        name=recipe.name,
        batch=recipe.data.batch_size,
        flops=objective.flops + again + blocks * 2 * tokens**2 * config.hidden_size,  # scores again, in the kernels
        model_flops=objective.flops,
        parameters=_elements(state.params),
        narrow=sum(size for name, size in sizes.items() if first_match(_NARROW, name)),
        frozen=_elements(state.average) + _elements(state.frozen),
        teacher_flops=objective.flops - own if state.average or state.frozen else 0.0,
        tokens=tokens,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        blocks=blocks,
        biases=config.has_layer_bias * config.num_hidden_layers + config.has_shared_bias,
        passes=3 if remat == "block" else 2,
        unread=unread,
    )


def kept_bytes(recipe: Recipe) -> int:
    """What an image keeps of a recipe from the forward to the backward pass, by tracing it: `memory` needs it.

    Raises:
        BeitJaxError: as `workload`.
    """
    program = _program(recipe)
    dtype, remat = recipe.model.dtype, recipe.model.remat
    with traced_for_several_devices():
        # An objective may leave out the block that is computed again.
        return max(program.objective.activations, activation_bytes(program.config, dtype=dtype, remat=remat))


def _program(recipe: Recipe) -> Program:
    """For one device, which only describes it."""
    alone = replace(recipe, run=replace(recipe.run, mesh=(1, 1, 1)), optim=replace(recipe.optim, accumulate=1))
    return abstract_program(alone, jax.devices()[:1])


def _elements(tree: Nested) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- Rings: bytes that reach each of `group` chips --------------------------------------------------------------------


def all_gather(size: float, group: float) -> float:
    """Of an array of `size` bytes, everything but the own part: size (n - 1) / n."""
    return size * (group - 1) / group


def reduce_scatter(size: float, group: float) -> float:
    """The same number of bytes, the other way round: size (n - 1) / n."""
    return size * (group - 1) / group


def all_reduce(size: float, group: float) -> float:
    """A reduce-scatter and an all-gather: 2 size (n - 1) / n."""
    return 2 * size * (group - 1) / group


# --- Within a slice ---------------------------------------------------------------------------------------------------


def parameter_bytes(work: Workload, layout: Layout) -> float:
    """The parameters that fsdp splits, gathered in bfloat16 once for each pass and part; frozen ones once a step.

    ``(parts 2 reads / tensor + 2 frozen) (f - 1) / f``, twice as much where all-reduces gather (`GATHERED_UP_TO`).
    """
    gather = all_gather if layout.fsdp <= GATHERED_UP_TO else all_reduce
    learned = layout.parts * BFLOAT16 * work.reads / layout.tensor
    return gather(learned + BFLOAT16 * work.frozen, layout.fsdp)


def gradient_bytes(work: Workload, layout: Layout) -> float:
    """Gradients of each part: all-reduced over fsdp, which keeps its share, then that share over data.

    ``parts 2 G / tensor ((f - 1) / f + 1 / f (d - 1) / d)`` with d the data axis within a slice. G: bfloat16 of qkv's
    and fc1's kernels, float32 of all else.
    """
    size = layout.parts * work.gradient_bytes / layout.tensor
    return all_reduce(size, layout.fsdp) + all_reduce(size / layout.fsdp, layout.inside)


def tensor_bytes(work: Workload, layout: Layout) -> float:
    """What the chips of a tensor axis add up: after out and fc2 forward, in float32, and again where blocks are
    recomputed; before qkv and fc1 backward, in bfloat16.

    ``images blocks n d (2 * 4 (passes - 1) + 2 * 2) * 2 (t - 1) / t``, images of one tensor group.
    """
    values = work.batch / layout.replicas * work.blocks * work.tokens * work.width
    return all_reduce(values * (2 * FLOAT32 * (work.passes - 1) + 2 * BFLOAT16), layout.tensor)


# --- Between slices ---------------------------------------------------------------------------------------------------


def between_slices_bytes(work: Workload, layout: Layout) -> float:
    """Each chip all-reduces its share of gradients with its like in other slices.

    ``2 (s - 1) / s * parts G / tensor / (d f)``: hierarchical, reduced and scattered within a slice before, gathered
    there afterwards, which `gradient_bytes` holds.
    """
    size = layout.parts * work.gradient_bytes / layout.tensor
    return all_reduce(size / (layout.inside * layout.fsdp), layout.slices)


# --- Main memory ------------------------------------------------------------------------------------------------------


def activation_traffic(work: Workload, layout: Layout) -> float:
    """``images blocks 4 n d (2 + out RESIDUAL_PASSES)``.

    Images of a chip; out: the share that does not stay on it (`ON_CHIP`), unlike each block's input, which is stored
    and read back. A tensor axis splits 1 - `WHOLE` of the passes. Where nothing is computed again, a third of the
    passes is missing.
    """
    residual = FLOAT32 * work.tokens * work.width
    images = work.batch / layout.replicas
    out = images / layout.parts * RESIDUALS_AT_ONCE * residual / ON_CHIP - 1
    passes = RESIDUAL_PASSES * (WHOLE + (1 - WHOLE) / layout.tensor) * work.passes / 3
    return images * work.blocks * residual * (2 + min(max(out, 0), 1) * passes)


def teacher_traffic(work: Workload, layout: Layout) -> float:
    """``images FLOP of tokenizer or teacher / TEACHER_INTENSITY``."""
    return work.batch / layout.replicas * work.teacher_flops / TEACHER_INTENSITY


def position_bias_traffic(work: Workload, layout: Layout) -> float:
    """``parts biases LOOKUP_PASSES heads / tensor n^2 4``: the lookup in the tables, whatever the number of images."""
    matrix = FLOAT32 * work.heads / layout.tensor * work.tokens**2
    return layout.parts * work.biases * LOOKUP_PASSES * work.passes / 3 * matrix


def parameter_traffic(work: Workload, layout: Layout) -> float:
    """``parts (4 reads + 2 G) / tensor``: bfloat16 copies and gradients, each written once and read once."""
    copies = 2 * BFLOAT16 * work.reads
    return layout.parts * (copies + 2 * work.gradient_bytes) / layout.tensor


def optimizer_traffic(work: Workload, layout: Layout) -> float:
    """``7 * 4 P / (f tensor)``: parameter, gradient and two moments are read, all but the gradient written."""
    return 7 * FLOAT32 * work.parameters / (layout.fsdp * layout.tensor)


# --- Times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds of a step if nothing else took time, by what takes them."""

    products: float
    memory: float
    interconnect: float
    between_slices: float

    @property
    def network(self) -> float:
        return self.interconnect + self.between_slices

    @property
    def bounds(self) -> tuple[float, float]:
        """If all of them overlap, and if none do."""
        every = (self.products, self.memory, self.interconnect, self.between_slices)
        return max(every), sum(every)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(vars(self), key=vars(self).__getitem__)


def product_seconds(work: Workload, layout: Layout) -> float:
    """``flops batch / chips / peak``."""
    return work.flops * work.batch / layout.chips / layout.chip.flops


def fixed_traffic(work: Workload, layout: Layout) -> float:
    """Bytes of main memory that a step takes whatever its number of images: more chips do not make them fewer."""
    return sum(term(work, layout) for term in (position_bias_traffic, parameter_traffic, optimizer_traffic))


def memory_seconds(work: Workload, layout: Layout) -> float:
    """All that passes through main memory, over its bandwidth."""
    terms = (activation_traffic, teacher_traffic, fixed_traffic)
    return sum(term(work, layout) for term in terms) / layout.chip.hbm_bandwidth


def shared_bytes(work: Workload, layout: Layout) -> float:
    """What data and fsdp exchange within a slice."""
    return parameter_bytes(work, layout) + gradient_bytes(work, layout)


def interconnect_seconds(work: Workload, layout: Layout) -> float:
    """What data and fsdp exchange over all their links, and what tensor does over the one link between neighbours."""
    shared, tensor = shared_bytes(work, layout), tensor_bytes(work, layout) / layout.chip.link
    return (shared / layout.bandwidth if shared else 0.0) + tensor  # a chip alone has no links


def between_slices_seconds(work: Workload, layout: Layout) -> float:
    """`between_slices_bytes`, over this chip's share of the data centre's network."""
    return between_slices_bytes(work, layout) / layout.chip.dcn


def times(work: Workload, layout: Layout) -> Times:
    """The four times of a step."""
    return Times(
        products=product_seconds(work, layout),
        memory=memory_seconds(work, layout),
        interconnect=interconnect_seconds(work, layout),
        between_slices=between_slices_seconds(work, layout),
    )


def utilisation(work: Workload, layout: Layout, seconds: float) -> float:
    """The model's own operations, without those that are made twice, over the peak of the chips."""
    return work.model_flops * work.batch / (layout.chips * layout.chip.flops * seconds)


# --- Meshes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """How chips become a mesh.

    Attributes:
        sharded: whether fsdp takes what tensor leaves of a slice; otherwise data does.
    """

    name: str
    sharded: bool
    tensor: int = 1

    def mesh(self, slices: int, chips: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) of so many chips in all."""
        fsdp = chips // slices // self.tensor if self.sharded else 1
        return chips // fsdp // self.tensor, fsdp, self.tensor


SCHEMES = (Scheme("data", False), Scheme("fsdp", True), Scheme("fsdp, tensor 2", True, 2))


def layout(topology: Topology, mesh: tuple[int, int, int], *, parts: int = 1) -> Layout:
    """A mesh over a topology that exists.

    The tensor axis lies along one axis of the interconnect, preferably all of it; the groups that it leaves side by
    side share that axis's links.
    """
    data, fsdp, tensor = mesh
    assert isinstance(topology, Slices), "the formulas are of TPUs"
    assert data * fsdp * tensor == topology.chips, f"{mesh} over {topology.chips} chips"
    bandwidth, chip = topology.bandwidth, topology.chip
    if tensor > 1:
        along = tensor if tensor in topology.shape else topology.shape[-1]
        ring = along % chip.wrap == 0 and (chip.axes == 2 or all(size % chip.wrap == 0 for size in topology.shape))
        bandwidth -= chip.link * (1 + ring) * (1 if along == tensor else 1 - 1 / tensor)
    return Layout(chip, bandwidth, topology.slices, data, fsdp, tensor, parts)


def memory(work: Workload, layout: Layout, kept: int) -> Memory:
    """`estimate.budget` of a chip, for one part of the batch. A tensor axis is not taken to split activations.

    Args:
        kept: as `kept_bytes`.
    """
    images = -(-work.batch // round(layout.replicas * layout.parts))
    return estimate.memory(
        FLOAT32 * work.parameters,
        images * kept,
        others=FLOAT32 * work.frozen,
        accumulate=layout.parts,
        shards=round(layout.fsdp * layout.tensor),
    )


def fitted(work: Workload, whole: Layout, kept: int) -> Layout | None:
    """In the fewest parts, powers of two, that fit `SLACK` times; None: the batch does not divide, or never fits."""
    parts = 1
    while work.batch % (whole.replicas * parts) == 0:
        found = replace(whole, parts=parts)
        if SLACK * memory(work, found, kept).total <= whole.chip.hbm:
            return found
        parts *= 2
    return None


# --- Where scaling bends ----------------------------------------------------------------------------------------------


def stretched(chip: Chip, scheme: Scheme, chips: float) -> Layout:
    """Any number of chips, whole or not: a slice whose axes are lines, or from 256 on slices of 16 x 16, rings.

    So one formula holds below 256 chips, and another from there on. The batch is in one part.
    """
    rings = chips >= MAX_SLICE
    slices = chips / MAX_SLICE if rings else 1.0
    per_axis = (1 + rings) * chip.link
    bandwidth = per_axis * (chip.axes - 1 + 1 / scheme.tensor)
    fsdp = chips / slices / scheme.tensor if scheme.sharded else 1.0
    return Layout(chip, bandwidth, slices, chips / fsdp / scheme.tensor, fsdp, scheme.tensor)


def crossing(excess: Callable[[float], float], low: float, high: float) -> float | None:
    """Where a function that grows passes zero between two numbers, by bisection; None: it does not.

    `low` where it is positive already there.
    """
    if excess(low) >= 0:
        return low
    if excess(high) < 0:
        return None
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) >= 0 else (middle, high)
    return high


@dataclass(frozen=True)
class Bend:
    """Chips from which on something takes longer than the products, at a recipe's own batch in one part.

    Attributes:
        lines: in a slice of fewer than 256 chips; None: never there.
        rings: in slices of 256 chips.
    """

    lines: float | None
    rings: float | None


def bend(work: Workload, chip: Chip, scheme: Scheme) -> Bend:
    """Where `Times.network` is as long as `Times.products`."""

    def excess(chips: float) -> float:
        found = times(work, stretched(chip, scheme, chips))
        return found.network / found.products - 1

    return _bend(excess, scheme)


def floor(work: Workload, chip: Chip, scheme: Scheme) -> Bend:
    """Where `fixed_traffic` takes as long as the products: the same question, of main memory."""

    def excess(chips: float) -> float:
        where = stretched(chip, scheme, chips)
        return fixed_traffic(work, where) / chip.hbm_bandwidth / product_seconds(work, where) - 1

    return _bend(excess, scheme)


def _bend(excess: Callable[[float], float], scheme: Scheme) -> Bend:
    """Of a function that grows with the chips as long as the links are the same."""
    smallest = float(scheme.tensor * (2 if scheme.sharded else 1))
    return Bend(crossing(excess, smallest, MAX_SLICE - 1e-6), crossing(excess, MAX_SLICE, 1e9))


def bend_of_data(work: Workload, chip: Chip) -> float:
    """`bend` of a mesh of data alone over slices of 256 chips, solved by hand.

    With c = flops batch / peak, i the interconnect's seconds, and k = 2 G / 256 / dcn those between infinitely many
    slices: ``c / N = i + k (1 - 256 / N)``, so ``N = (c + 256 k) / (i + k)``.
    """
    one = stretched(chip, SCHEMES[0], MAX_SLICE)
    products = product_seconds(work, one) * MAX_SLICE
    between = 2 * work.gradient_bytes / MAX_SLICE / chip.dcn
    return (products + MAX_SLICE * between) / (interconnect_seconds(work, one) + between)
