"""What kernels are to a mesh: whose devices compute them, and of which part of the arrays; compilers divide none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from math import prod
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
from jax import export
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

P = ParamSpec("P")
R = TypeVar("R")

BATCH_AXES = ("data", "fsdp")
"""The mesh axes that a batch is split over, those of `models.partition`, a room above."""
HEAD_AXIS = "tensor"
"""The mesh axis that heads are split over."""
AVERAGES = "attention averages"
"""The name of what the kernel makes, for `jax.checkpoint`: kept, nothing of the kernel is computed twice."""
TPU_SWITCH = "BEIT_JAX_TPU_ATTENTION"
"""The environment variable that leaves attention of TPUs to its kernels ("rows") or not ("xla")."""
KEPT = "kept on accelerators"
"""The name of what else the way back needs and "dots" keeps, where products are fast and memory is slow."""


class Target:
    """A kind of device that has kernels: where functions are traced for it, other forms of them are computed.

    Args:
        platforms: what JAX calls it.
        alone: the platform whose forms are computed without a mesh too, where there is one device and no other.
    """

    def __init__(self, *platforms: str, alone: str | None = None) -> None:
        self._platforms, self._alone = platforms, alone
        self._interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)

    @property
    def interpret(self) -> bool:
        """Whether kernels are interpreted, see `interpreted`."""
        return self._interpreted.get()

    def alone(self) -> jax.Device | None:
        """The device of this kind, if it is the only device: no compiler has anything to divide there."""
        device = jax.devices()[0] if self._alone and jax.device_count() == 1 else None
        return device if device is not None and device.platform == self._alone else None

    @contextmanager
    def interpreted(self) -> Iterator[None]:
        """Functions traced within compute the kernels, operation by operation, on whatever device: for tests.

        A function under `jax.jit` must be new: JAX keeps its first trace.
        """
        before = self._interpreted.set(True)
        try:
            yield
        finally:
            self._interpreted.reset(before)

    def computes(self, form: Callable[Concatenate[Callable[P, R], P], R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorates a textbook form: a function compiled for such devices of a mesh computes `form` instead.

        Without a mesh both are traced where the device is `alone`, and the compiler takes that of its platform.

        The form takes the textbook form first, and then its arguments.
        """

        def decorate(textbook: Callable[P, R]) -> Callable[P, R]:
            @wraps(textbook)
            def chosen(*arguments: P.args, **options: P.kwargs) -> R:
                device = jax.sharding.get_abstract_mesh().abstract_device
                here = self.interpret or (device is not None and device.platform in self._platforms)
                if here:
                    return form(textbook, *arguments, **options)
                if device is None and self._alone and self.alone() is not None:
                    other = {self._alone: lambda: form(textbook, *arguments, **options)}
                    return jax.lax.platform_dependent(default=lambda: textbook(*arguments, **options), **other)
                return textbook(*arguments, **options)

            return chosen

        return decorate


@dataclass(frozen=True)
class Split:
    """The axes of the mesh that arrays are split over; nothing, where there is nothing to split.

    Attributes:
        batch, heads: axes.
        shards: parts of the batch.
        parts: parts of the heads.
        interpret: whether kernels are interpreted.
    """

    batch: tuple[str, ...] = ()
    heads: str | None = None
    shards: int = 1
    parts: int = 1
    interpret: bool = False

    def over_devices(self, function: Callable[..., Any], like: str, to: str) -> Callable[..., Any]:
        """`function` of each device's part.

        Args:
            like, to: what each argument and each result is: q for [b n 3 heads e], a for [b n heads e], r for
                [b heads n], and B for a bias [shards heads n n].
        """
        if not self.batch and self.heads is None:
            return function
        batch, heads = self.batch or None, self.heads
        places = {
            "q": PartitionSpec(batch, None, None, heads, None),
            "a": PartitionSpec(batch, None, heads, None),
            "r": PartitionSpec(batch, heads, None),
            "B": PartitionSpec(batch, heads, None, None),
        }
        given, made = (tuple(places[kind] for kind in kinds) for kinds in (like, to))
        return jax.shard_map(function, in_specs=given, out_specs=made, check_vma=False)


def split_of(
    qkv: Float[Array, "b n 3 heads e"], bias: Float[Array, "shards heads n n"] | None, *, interpret: bool
) -> Split | None:
    """How the mesh divides the arrays; None if it cannot, or if a size is 0 or symbolic (`jax.export`)."""
    if any(export.is_symbolic_dim(size) for size in qkv.shape) or not qkv.size:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    modes = {types[name] for name in sizes}
    if modes <= {AxisType.Manual}:  # one device, or a part of the arrays, as somebody else has divided them
        return Split(interpret=interpret)
    if modes != {AxisType.Auto}:
        return None
    batch = tuple(name for name in BATCH_AXES if name in sizes)
    shards, parts = prod(sizes[name] for name in batch), sizes.get(HEAD_AXIS, 1)
    if qkv.shape[0] % shards or (bias is not None and len(bias) not in (1, shards)):
        return None
    heads, parts = (None, 1) if parts == 1 or qkv.shape[3] % parts else (HEAD_AXIS, parts)
    return Split(batch, heads, shards, parts, interpret)
