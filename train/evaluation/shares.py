"""Shares of a whole, for people and for JSON."""

import math


def share(part: int, whole: int) -> float:
    """The share of `part` in `whole`; NaN where the whole is 0."""
    return part / whole if whole else float("nan")


def json_number(value: float) -> float | None:
    """The number; None for one that is not finite, which JSON does not have."""
    return float(value) if math.isfinite(value) else None
