"""Nested dicts of arrays and their flat form, ``{"a/b/c": leaf}``: how parameters are named everywhere at rest."""

from collections.abc import Mapping
from typing import Any

Nested = dict[str, Any]


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
