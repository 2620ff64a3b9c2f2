"""What is traced for one CPU or for several devices, computed on the one that there is."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from beit_jax.models.one_cpu import traced_for
from beit_jax.models.partition import traced_for_several_devices


def traced(function: Callable[..., Any], *arguments: Any, several: bool = False) -> Any:
    """The jaxpr of a function."""
    with traced_for_several_devices() if several else traced_for("cpu"):
        return jax.make_jaxpr(function)(*arguments)


def computed(function: Callable[..., Any], *arguments: Any, several: bool = False) -> list[Any]:
    """The arrays that it returns, compiled: operation by operation each is a program that takes as long to compile."""
    return jax.jit(jaxpr_as_fun(traced(function, *arguments, several=several)))(*arguments)
