"""Cases of which a quick run needs a part."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def thorough(cases: Iterable[Any], *, but: Iterable[Any]) -> list[Any]:
    """Returns cases for ``parametrize``: all are marked as thorough but these, which run always.

    Raises:
        ValueError: one of these is no case.
    """
    every, always = list(cases), list(but)
    for case in always:
        every.index(case)
    return [case if case in always else pytest.param(case, marks=pytest.mark.thorough) for case in every]


def pairwise(*values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Returns few of all combinations, in which any two values of two parameters meet.

    Greedy: of the combinations that are left, the first with the most pairs that have not met.
    """
    every = list(product(*(range(len(each)) for each in values)))

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), 2))

    missing, chosen = set().union(*map(pairs, every)), []
    while missing:
        chosen.append(max(every, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(each[place] for each, place in zip(values, case, strict=True)) for case in chosen]
