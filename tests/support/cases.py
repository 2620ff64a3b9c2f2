"""Cases of which a quick run needs a part."""

from collections.abc import Iterable
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
