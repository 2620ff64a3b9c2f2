"""What is traced for one device or for several, computed on the one that there is."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, AxisType


def traced(function: Callable[..., Any], *arguments: Any, devices: int = 1) -> Any:
    """The jaxpr of a function on a mesh of so many devices."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((devices,), ("data",), (AxisType.Auto,))):
        return jax.make_jaxpr(function)(*arguments)


def computed(function: Callable[..., Any], *arguments: Any, devices: int = 1) -> list[Any]:
    """The arrays that it returns."""
    return jaxpr_as_fun(traced(function, *arguments, devices=devices))(*arguments)
