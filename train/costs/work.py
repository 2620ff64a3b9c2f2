"""The work of a compiled program on one device: products, memory traffic, transfers. Read from its optimised HLO.

XLA's own cost analysis counts the body of a loop once, but the blocks of these models are one loop. Here the body of a
loop counts as often as it runs. Compilers invent instructions: what is not known here counts by the shapes that it
reads and writes, and is named.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from .hlo import Computation, Instruction, read


@dataclass(frozen=True)
class Collective:
    """All transfers of one kind in a run of the program.

    Attributes:
        kind: the opcode, or "between slices" for data from other slices.
        count: the number of transfers.
        bytes: bytes that reach one device, by the algorithms that send least.
    """

    kind: str
    count: int
    bytes: float


@dataclass(frozen=True)
class Work:
    """The work of one device in a run of a program.

    Attributes:
        flops: FLOPs of products of matrices and convolutions; a multiply-add is two.
        traffic: bytes between main memory and the chip: each kernel's inputs and outputs, counted once.
        cycles: the compiler's estimate for all kernels one after the other, without transfers; 0 where it has none.
        collectives: transfers by kind.
        unknown_loops: the number of loops whose length depends on data; their bodies count once.
        opaque: of `flops`, those of kernels that the compiler does not look into: `cycles` has nothing of them.
        unknown: kinds of instructions that are not known here, or not in this form; they count by their shapes alone.
    """

    flops: float
    traffic: float
    cycles: int
    collectives: tuple[Collective, ...]
    unknown_loops: int
    unknown: tuple[str, ...] = ()
    opaque: float = 0.0


BETWEEN_SLICES = "between slices"
_KINDS = (
    "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute collective-broadcast".split()
)
_FREE = set(
    """parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id
    opt-barrier add-dependency send recv call-start call-update async-update domain""".split()
)
_PLAIN = set(
    """abs acos acosh add all-gather all-reduce all-to-all ragged-all-to-all collective-permute collective-broadcast
    reduce-scatter and asin asinh atan2 atanh async-start batch-norm-grad batch-norm-inference batch-norm-training
    bitcast-convert broadcast cbrt ceil cholesky clamp compare complex concatenate convert convolution copy copy-start
    cosine cosh count-leading-zeros custom-call divide dot dynamic-reshape dynamic-slice dynamic-slice-start
    dynamic-update-slice erf exponential exponential-minus-one fft floor fusion gather get-dimension-size imag infeed
    iota is-finite log log-plus-one logistic map maximum minimum multiply negate not or outfeed pad popcnt power real
    reduce reduce-precision reduce-window remainder reshape reverse rng rng-bit-generator rng-get-and-update-state
    round-nearest-afz round-nearest-even rsqrt scan scatter select select-and-scatter set-dimension-size shift-left
    shift-right-arithmetic shift-right-logical sign sine sinh slice slice-start sort sqrt stochastic-convert subtract
    tan tanh topk transpose triangular-solve xor""".split()
)
"""What reads its operands and writes its result. Source: the opcodes of XLA, xla/hlo/ir/hlo_opcode.h."""
_HANDLES = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective", "AssumeGatherIndicesInBound")  # no kernels
_NO_ESTIMATE = 2**62  # cycles of a kernel that runs elsewhere: the compiler writes the largest number


def work(text: str, devices: int) -> Work:
    """Adds up the work of a program.

    Every branch of a condition counts. A transfer in several parts, which overlap with computation, counts as one.

    Args:
        text: HLO, from ``jax.stages.Compiled.as_text``.
        devices: the number of devices of the program, or of a slice where there are several.
    """
    computations, entry = read(text)
    counter = _Counter(computations, devices)
    if entry in computations:
        counter.run(entry, 1)
    else:
        counter.unknown.add("program without an entry")
    return Work(
        counter.flops,
        counter.traffic,
        counter.cycles,
        counter.collectives(),
        counter.unknown_loops,
        tuple(sorted(counter.unknown)),
        counter.opaque,
    )


class _Counter:
    def __init__(self, computations: Mapping[str, Computation], devices: int):
        self.computations, self.devices = computations, devices
        self.flops, self.opaque, self.traffic, self.cycles, self.unknown_loops = 0.0, 0.0, 0.0, 0, 0
        self.unknown: set[str] = set()
        self._transfers: dict[tuple[str, str], tuple[int, float]] = {}

    def run(self, name: str, times: int, *, fused: bool = False) -> None:
        """Adds a computation that runs `times` times; of a `fused` one, only products and transfers are added."""
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            try:
                _check_known(instruction.opcode)
                flops = self._products(instruction, computation)
                transfer = self._transfer(instruction, name, computation)
                traffic = 0.0 if fused else self._touched(instruction, computation)
                inner = [*self._inner(instruction, computation)]
            except (LookupError, ValueError):  # an operand, an attribute or an axis of its kind is missing
                self.unknown.add(instruction.opcode)
                flops, transfer, inner = 0.0, None, []
                traffic = 0.0 if fused else self._by_shapes(instruction, computation)
            self.flops += times * flops
            self.opaque += times * _stated(instruction)
            self.traffic += times * traffic
            self.cycles += 0 if fused else times * _estimated(instruction)
            if transfer is not None:
                key, size = transfer
                # All parts of a transfer have the same channel. Parts before and after a loop run less often than those
                # in it.
                self._transfers[key] = max(self._transfers.get(key, (0, 0.0)), (times, size))
            for called, often, is_fused in inner:
                self.run(called, times * often, fused=fused or is_fused)

    def collectives(self) -> tuple[Collective, ...]:
        totals: dict[str, Collective] = {}
        for (kind, _), (count, size) in self._transfers.items():
            before = totals.get(kind, Collective(kind, 0, 0.0))
            totals[kind] = Collective(kind, before.count + count, before.bytes + count * size)
        return tuple(totals[kind] for kind in sorted(totals))

    def _inner(self, instruction: Instruction, computation: Computation) -> Iterator[tuple[str, int, bool]]:
        """The computations that an instruction runs, how often, and whether each is a part of one kernel."""
        opcode = instruction.opcode
        if opcode == "while":
            body, condition = (self._called(instruction, name) for name in ("body", "condition"))
            length = _length(instruction, computation, self.computations[condition], self.computations[body])
            self.unknown_loops += length is None
            yield body, 1 if length is None else length, False
        elif opcode == "conditional":
            for branch in _branches(instruction):
                self.computations[branch]
                yield branch, 1, False
        elif opcode in ("call", "call-start"):  # a start runs it on other cores; its update and done bring operands
            yield self._called(instruction, "to_apply"), 1, False
        elif (called := instruction.called("calls")) in self.computations:
            yield str(called), 1, True

    def _called(self, instruction: Instruction, attribute: str) -> str:
        name = instruction.called(attribute)
        if name not in self.computations:
            raise LookupError(attribute)
        return str(name)

    @staticmethod
    def _products(instruction: Instruction, computation: Computation) -> float:
        if instruction.opcode == "custom-call":
            return _library_flops(instruction, computation)
        return _flops(instruction, computation) if instruction.opcode in ("dot", "convolution") else 0.0

    def _transfer(
        self, instruction: Instruction, name: str, computation: Computation
    ) -> tuple[tuple[str, str], float] | None:
        """A transfer's kind and channel, and its bytes; None for anything else."""
        kind = instruction.opcode.removesuffix("-start")
        if kind not in ("recv", *_KINDS):
            return None
        if kind == "recv":
            kind, size = BETWEEN_SLICES, float(instruction.leaves[0].bytes)
        else:
            operands = [computation.instructions[operand] for operand in instruction.operands]
            given = sum(leaf.bytes for operand in operands for leaf in operand.leaves)
            if "all-reduce-scatter" in name:  # a fusion of both, in which each device keeps its part
                kind = "reduce-scatter"
            size = _received(kind, given, _group(instruction.attributes) or self.devices)
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        return (kind, channel[1] if channel else f"{name}/{instruction.name}"), size

    def _touched(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes of main memory that an instruction reads and writes."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or any(name in instruction.attributes for name in _HANDLES):
            return 0
        operands = _operands(instruction, computation)
        if opcode == "fusion-start":  # its result: the operands, what the fusion writes, and a context
            given = sum(len(operand.leaves) for operand in operands)
            fusion = replace(instruction, opcode="fusion", leaves=instruction.leaves[given:-1])
            return self._touched(fusion, computation)
        if opcode.endswith("-start"):
            target = instruction.leaves[0 if opcode == "copy-start" else 1]
            source = sum(leaf.held for operand in operands for leaf in operand.leaves)
            return min(source, target.bytes) + target.held
        inner = self.computations.get(instruction.called("calls") or "")
        if inner is not None:
            reads = sum(_read(self.computations, inner, place, operand) for place, operand in enumerate(operands))
            return reads + _written(inner, instruction)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return sum(leaf.held for leaf in instruction.leaves) + min(operands[0].leaves[0].held, _size(instruction))
        if opcode == "dynamic-update-slice":
            return 2 * min(operands[1].leaves[0].bytes, instruction.leaves[0].held)
        if opcode == "custom-call":  # a kernel that reads parts of one array has it as an operand for every part
            operands = list({operand.name: operand for operand in operands}.values())
        return sum(leaf.held for whole in (instruction, *operands) for leaf in whole.leaves)

    @staticmethod
    def _by_shapes(instruction: Instruction, computation: Computation) -> float:
        """Bytes of all operands and results, without padding, wherever they lie."""
        return sum(_size(one) for one in (instruction, *_operands(instruction, computation)))


def _check_known(opcode: str) -> None:
    """Raises LookupError for an opcode that may stand for work of any kind, within a kernel too."""
    base = opcode.removesuffix("-start").removesuffix("-done")
    if not {opcode, base} & (_PLAIN | _FREE):
        raise LookupError(opcode)


def _operands(instruction: Instruction, computation: Computation) -> list[Instruction]:
    return [computation.instructions[name] for name in instruction.operands if name in computation.instructions]


def _estimated(instruction: Instruction) -> int:
    """The compiler's estimate of cycles; 0 where it has none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    cycles = int(found[1]) if found else 0
    return cycles if cycles < _NO_ESTIMATE else 0


def _size(instruction: Instruction) -> int:
    return sum(leaf.bytes for leaf in instruction.leaves)


def _read(computations: Mapping[str, Computation], fused: Computation, place: int, operand: Instruction) -> float:
    """Bytes that a fusion reads of an operand: only the slices if it reads nothing but slices of it."""
    whole = sum(leaf.held for leaf in operand.leaves)
    parameter = _parameter(fused, place)
    if parameter is None or not whole:
        return whole
    parts = list(_slices(computations, fused, parameter.name))
    return whole if None in parts else min(whole, sum(part or 0 for part in parts))


def _parameter(fused: Computation, place: int) -> Instruction | None:
    known = fused.instructions.values()
    return next((one for one in known if one.opcode == "parameter" and one.literal == str(place)), None)


def _slices(computations: Mapping[str, Computation], fused: Computation, name: str) -> Iterator[int | None]:
    """Bytes of every slice taken from a value, also in fusions inside fusions; None for any other use of the value."""
    for user in fused.users[name]:
        inner = computations.get(user.called("calls") or "") if user.opcode == "fusion" else None
        if inner is not None:
            for place, operand in enumerate(user.operands):
                parameter = _parameter(inner, place) if operand == name else None
                if parameter is not None:
                    yield from _slices(computations, inner, parameter.name)
        elif user.opcode == "bitcast":
            yield from _slices(computations, fused, user.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            yield _size(user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            yield 0  # changed in place
        else:
            yield None


def _written(fused: Computation, fusion: Instruction) -> float:
    """Bytes that a fusion writes: only the change of an array that is changed in place."""
    root = fused.instructions[fused.root]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    total = 0.0
    for leaf, name in zip(fusion.leaves, results, strict=False):
        found = fused.find(name)
        if found is not None and found.opcode == "dynamic-update-slice":
            total += min(leaf.held, _size(fused.instructions[found.operands[1]]))
        else:
            total += leaf.held
    return total


def _branches(instruction: Instruction) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if several:
        return re.findall(r"%([\w.-]+)", several[1])
    return [name for which in ("true", "false") if (name := instruction.called(f"{which}_computation"))]


def _length(loop: Instruction, outside: Computation, condition: Computation, body: Computation) -> int | None:
    """The number of runs of a loop, as the compiler states it or as an index counts it between constants; else None."""
    said = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if said:
        return int(said[1])
    try:
        return _counted(loop, outside, condition, body)
    except LookupError:  # a loop of another form
        return None


def _counted(loop: Instruction, outside: Computation, condition: Computation, body: Computation) -> int | None:
    test = condition.find(condition.root)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    index, end = condition.find(test.operands[0]), condition.constant(test.operands[1])
    if index is None or index.opcode != "get-tuple-element" or end is None:
        return None
    place = int(re.findall(r"index=(\d+)", index.attributes)[0])
    given, after = outside.find(loop.operands[0]), body.find(body.root)
    if given is None or after is None or given.opcode != "tuple" or after.opcode != "tuple":
        return None
    start, step = outside.constant(given.operands[place]), _step(body, after.operands[place])
    return None if start is None or not step else max(0, -(-(end - start) // step))


def _step(body: Computation, name: str) -> int | None:
    """The number that a loop adds to its index; None if it is not constant."""
    found = body.find(name)
    if found is None or found.opcode != "add":
        return None
    return next((value for operand in found.operands if (value := body.constant(operand)) is not None), None)


def _group(attributes: str) -> int | None:
    """The number of devices that exchange data with each other; None: all."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", mesh[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'([\w.]+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    return None


def _received(kind: str, given: int, group: int) -> float:
    """Bytes that reach one device in a transfer, if each device gives `given` bytes."""
    others = (group - 1) / group
    factors = {"all-gather": group - 1, "all-reduce": 2 * others, "reduce-scatter": others, "all-to-all": others}
    return given * factors.get(kind, 1.0)


def _flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a product: two for every pair of values that are multiplied."""
    left, right = (computation.instructions[name].leaves[0].shape for name in instruction.operands[:2])
    result = instruction.leaves[0].shape
    if instruction.opcode == "dot":
        return 2.0 * prod(result) * prod(left[axis] for axis in instruction.numbers("lhs_contracting_dims"))
    return _convolved(instruction.attributes, left, right, result)


_Shape = tuple[int, ...]


def _convolved(attributes: str, left: _Shape, right: _Shape, result: _Shape) -> float:
    """FLOPs of a convolution of the inputs `left` with the kernel `right`."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if found is None:
        raise LookupError("dim_labels")
    named = zip(found.groups(), (left, right, result), strict=True)
    inputs, kernel, outputs = (dict(zip(names, shape, strict=True)) for names, shape in named)
    window = _Window(attributes)
    pairs = prod(
        window.pairs(place, inputs[str(place)], kernel[str(place)], outputs[str(place)])
        for place in range(len(result) - 2)
    )
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    return 2.0 * pairs * kernel["i"] * outputs["f"] * inputs["b"] / (int(groups[1]) if groups else 1)


def _stated(instruction: Instruction) -> float:
    """FLOPs that a kernel of a library says it has; 0 for anything else."""
    found = re.search(_STATED, instruction.attributes)
    return float(found[1] or found[2]) if found and instruction.opcode == "custom-call" else 0.0


_STATED = r'"cost_estimate":\{"flops":"?(\d+)|serialized_metadata = "\{\\22flops\\22: \\22(\d+)'
"""As libtpu writes it, and as JAX does for GPUs."""


def _library_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a product that GPUs leave to cuBLAS or cuDNN; of a kernel, what it says of itself; 0 for another call.

    A call of cuDNN for a gradient keeps the labels of the convolution, forward, of which it is the gradient.
    """
    found = re.search(r'custom_call_target="__(cublas|cudnn)\$(\w+)', instruction.attributes)
    if found is None:
        return _stated(instruction)
    library, what = found.groups()
    left, right = (computation.instructions[name].leaves[0].shape for name in instruction.operands[:2])
    result = instruction.leaves[0].shape
    if library == "cublas":
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        if contracted is None:
            raise LookupError("lhs_contracting_dimensions")
        return 2.0 * prod(result) * prod(left[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
    if not what.startswith("conv"):
        raise LookupError(what)
    if what == "convBackwardInput":
        return _convolved(instruction.attributes, result, right, left)
    if what == "convBackwardFilter":
        return _convolved(instruction.attributes, left, result, right)
    return _convolved(instruction.attributes, left, right, result)


class _Window:
    """The window of a convolution, ``window={size=3x3 stride=2x2 pad=1_1x1_1 lhs_dilate=2x2}``."""

    def __init__(self, attributes: str):
        found = re.search(r"window=\{([^}]*)\}", attributes)
        self._fields = dict(entry.split("=") for entry in found[1].split()) if found else {}

    def pairs(self, axis: int, size: int, kernel: int, outputs: int) -> int:
        """Along one axis: the pairs of an output and a kernel element that meet a value, not padding or a gap."""
        pad = int(self._fields["pad"].split("x")[axis].split("_")[0]) if "pad" in self._fields else 0
        gap = self._number("lhs_dilate", axis)
        starts = np.arange(outputs) * self._number("stride", axis) - pad
        places = starts[:, None] + np.arange(kernel) * self._number("rhs_dilate", axis)
        return int(np.sum((places >= 0) & (places <= (size - 1) * gap) & (places % gap == 0)))

    def _number(self, name: str, axis: int) -> int:
        return int(self._fields[name].split("x")[axis]) if name in self._fields else 1
