"""Freezing: groups of a model's parameters that stay as they start, named as people name them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.build import param_shapes, statistics
from beit_jax.models.interface import runs
from beit_jax.tree import Nested, first_match, flatten, unflatten

from .division import EVERYTHING, Division

GROUPS: Sequence[tuple[str, str]] = (
    (r"(beit/)?embeddings/.*", "embeddings"),
    (r"(beit/)?blocks/.*", "blocks"),
    (r"(beit/)?shared_bias_table", "shared_bias"),
    (r"(beit/)?(norm|pooler_norm)/.*", "norm"),
    (r".*", "head"),
)
"""The group of every parameter by its flat name. The norm is the last one of the encoder, or of what it pools."""
ENCODER = ("embeddings", "blocks", "shared_bias", "norm")
"""The groups that "encoder" stands for."""
_BLOCKS = re.compile(r"blocks\.(\d{1,5})(?:-(\d{1,5}))?")


@dataclass(frozen=True)
class Frozen(Division):
    """Some parameters are fixed: whole ones, and rows of those that are stacked over blocks.

    Attributes:
        names: flat names of the parameters that are fixed whole.
        depth: how many blocks there are.
        fixed_blocks: numbers of the blocks that are fixed, ascending; none if all are, which `names` then has.
    """

    names: frozenset[str]
    depth: int
    fixed_blocks: tuple[int, ...] = ()

    def divide(self, params: Nested, key: Key[Array, ""]) -> tuple[Nested, Nested]:
        learned, fixed = dict[str, Any](), dict[str, Any]()
        for name, leaf in flatten(params).items():
            if name in self.names:
                fixed[name] = leaf
            elif self.fixed_blocks and _group(name) == "blocks":
                learned[name], fixed[name] = self._rows(leaf, fixed=False), self._rows(leaf, fixed=True)
            else:
                learned[name] = leaf
        return unflatten(learned), unflatten(fixed)

    def join(self, params: Nested, fixed: Nested) -> Nested:
        learned, stays = flatten(params), flatten(fixed)
        both = {name: self._stacked(learned[name], stays[name]) for name in learned.keys() & stays.keys()}
        return unflatten(dict(sorted((learned | stays | both).items())))

    def _rows(self, leaf: Array, *, fixed: bool) -> Array:
        """The rows of the blocks that are fixed, or of the others."""
        return jnp.concatenate([leaf[run.start : run.stop] for run, of in self._runs if of == fixed])

    def _stacked(self, learned: Array, fixed: Array) -> Array:
        """The rows of all blocks in their order, of those that learn and those that are fixed."""
        parts = {
            of: iter(jax.lax.split(leaf, [len(run) for run, is_fixed in self._runs if is_fixed == of]))
            for of, leaf in ((False, learned), (True, fixed))
        }
        return jnp.concatenate([next(parts[is_fixed]) for _, is_fixed in self._runs])

    @property
    def _runs(self) -> list[tuple[range, bool]]:
        return runs(self.depth, self.fixed_blocks)


def division(freeze: str | None, config: BeitConfig) -> Division:
    """What learns of a model of which some groups are frozen.

    Args:
        freeze: `OptimOptions.freeze`: names of groups, separated by commas; None: everything learns.

    Raises:
        BeitJaxError: a name that no group has, a block that the model does not have, or nothing left that learns.
    """
    return EVERYTHING if freeze is None else _frozen(freeze, config)


@lru_cache(maxsize=8)
def _frozen(freeze: str, config: BeitConfig) -> Frozen:
    learned = param_shapes(config).keys() - statistics(config)
    members: dict[str, frozenset[str]] = {}
    for name in learned:
        for group in {_group(name), *([name.split("/")[0]] if _group(name) == "head" else [])}:
            members[group] = members.get(group, frozenset()) | {name}
    depth, names, rows = config.num_hidden_layers, set[str](), set[int]()
    for choice in (part.strip() for part in freeze.split(",")):
        if found := _BLOCKS.fullmatch(choice):
            rows |= _numbers(choice, int(found[1]), int(found[2] or found[1]), depth)
        else:
            names |= _members(choice, members, depth)
    if len(rows) == depth or members["blocks"] <= names:
        names, rows = names | members["blocks"], set()
    if learned <= names:
        raise BeitJaxError(f"--optim.freeze {printable(freeze)}: nothing is left that learns; name fewer groups")
    return Frozen(frozenset(names), depth, tuple(sorted(rows)))


def _numbers(choice: str, first: int, last: int, depth: int) -> set[int]:
    if not first <= last < depth:
        raise BeitJaxError(
            f"--optim.freeze: expected blocks.A-B with A <= B <= {depth - 1}, the model has {depth} blocks, counted "
            f"from 0; found {choice}"
        )
    return set(range(first, last + 1))


def _members(choice: str, members: Mapping[str, frozenset[str]], depth: int) -> frozenset[str]:
    named = {**members, "encoder": frozenset().union(*(members.get(group, frozenset()) for group in ENCODER))}
    if choice not in named:
        first = [name for name in (*ENCODER, "encoder") if name in named]
        there = ", ".join([*first, *sorted(named.keys() - set(first))])
        found = printable(choice) if choice else "nothing"
        raise BeitJaxError(
            f"--optim.freeze: found {found}, expected groups of the model, which are {there}, and single blocks and "
            f"ranges from blocks.0 to blocks.{depth - 1}, as blocks.0-{depth - 1}"
        )
    return named[choice]


def _group(name: str) -> str:
    return first_match(GROUPS, name)
