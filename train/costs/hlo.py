"""The text of a compiled program, optimised HLO, as instructions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod


@dataclass(frozen=True)
class Leaf:
    """An array in the result of an instruction: its type and its layout in memory.

    Attributes:
        layout: axes (minor first), tiles and memory space, as ``1,0:T(8,128)S(1)``; empty where the text has none.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Bytes of the values, without padding."""
        return prod(self.shape) * _width(self.dtype) // 8

    @property
    def held(self) -> int:
        """Bytes of main memory, with the padding of tiles; 0 for an array on the chip itself or on a host."""
        if re.search(r"S\([1-9]", self.layout):
            return 0
        order, _, rest = self.layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", rest)
        if tile is None or not order:
            return self.bytes
        sizes = [self.shape[int(axis)] for axis in order.split(",")]
        for place, size in enumerate(reversed(tile[1].split(","))):
            if place < len(sizes):
                sizes[place] += -sizes[place] % int(size)
        return prod(sizes) * _width(self.dtype) // 8


@dataclass(frozen=True)
class Instruction:
    """A line of HLO: ``name = type opcode(operands), attributes``."""

    name: str
    leaves: tuple[Leaf, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str

    def called(self, attribute: str) -> str | None:
        """The name of the computation that an attribute gives."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return found and found[1]

    def numbers(self, attribute: str) -> list[int]:
        """The numbers of ``attribute={1,2}``; empty where the attribute is missing."""
        found = re.search(rf"\b{attribute}={{([\d,]*)}}", self.attributes)
        return [int(number) for number in found[1].split(",") if number] if found else []


@dataclass
class Computation:
    """A function of the program, with its instructions in order."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def users(self) -> Mapping[str, Sequence[Instruction]]:
        """The instructions that read a value, by the name of the value."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands) & found.keys():
                found[operand].append(instruction)
        return found

    def find(self, name: str) -> Instruction | None:
        """The instruction of this name; if it is a copy or a reshape, the instruction whose value it copies."""
        found = self.instructions.get(name)
        while found is not None and found.opcode in ("bitcast", "copy", "copy-done", "copy-start", "reshape"):
            found = self.instructions.get(found.operands[0])
        return found

    def constant(self, name: str) -> int | None:
        """The integer constant of this name; None if it is something else."""
        found = self.find(name)
        known = found is not None and found.opcode == "constant" and re.fullmatch(r"-?\d+", found.literal)
        return int(found.literal) if found is not None and known else None


_LEAF = re.compile(r"(\w+)\[((?:(?:<=)?\d+,?)*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")


def read(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the entry computation.

    Args:
        text: HLO, from ``jax.stages.Compiled.as_text``.
    """
    computations: dict[str, Computation] = {}
    current, entry = Computation(), ""
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and " = " not in line.partition("(")[0]:
            current = computations[head[2]] = Computation()
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], line[found.end() :])
            current.instructions[instruction.name] = instruction
            if found[1]:
                current.root = instruction.name
    return computations, entry


UNREADABLE = "unreadable line"


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ") - 1
    if end < 0 or "(" not in rest[end:]:
        return Instruction(name, (), UNREADABLE, (), rest, "")
    leaves = tuple(
        Leaf(dtype, tuple(int(size.removeprefix("<=")) for size in shape.split(",") if size), layout)
        for dtype, shape, layout in _LEAF.findall(rest[: end + 1])
    )
    opcode, _, tail = rest[end + 2 :].partition("(")
    end = _closing("(" + tail, 0)
    inside = tail[: end - 1]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(name, leaves, opcode, operands, tail[end:], inside)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _width(dtype: str) -> int:
    """The bits of a value of this type."""
    if dtype in ("token", "opaque"):
        return 0
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8  # pred
