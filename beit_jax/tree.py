"""Nested dicts of arrays and their flat form, ``{"a/b/c": leaf}``, which names parameters in files and tables."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from beit_jax.errors import BeitJaxError, printable

Nested = dict[str, Any]
T = TypeVar("T")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": leaf}}`` to ``{"a/b": leaf}``, sorted by name."""
    flat: dict[str, Any] = {}
    for key in sorted(nested):
        value = nested[key]
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> Nested:
    """The inverse of `flatten`."""
    nested: Nested = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def first_match(rules: Sequence[tuple[str, T]], name: str) -> T:
    """The value of the first rule whose pattern, a regular expression, matches the whole flat name.

    Raises:
        BeitJaxError: no rule matches. A table of rules must cover every parameter, so that none is forgotten.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise BeitJaxError(f"{printable(name)}: none of {len(rules)} rules covers this parameter; add one")
