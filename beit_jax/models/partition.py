"""Where activations lie on a mesh of devices, and whether there is but one. Without a mesh, nothing is moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp")
"""The mesh axes that a batch is split over; parameters are split over the second of them too."""


def spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """`PartitionSpec`, which has no types: for every dimension the mesh axes that split it."""
    return PartitionSpec(*axes)


def constrain(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """`x`, split along its first axis over `BATCH_AXES` and whole along the others.

    The partitioner sees only that parameters and batch share an axis. Told where activations lie, it gathers the
    parameters of one block at a time; left to itself it also moves activations, which are larger.

    Does nothing unless `jax.set_mesh` is in force with both axes in Auto mode and the batch divides among them.
    """
    return x if _shards(x.shape[0]) is None else jax.lax.with_sharding_constraint(x, spec(BATCH_AXES))


def each_shard(x: Float[Array, "*dims"], batch: int) -> Float[Array, "shards *dims"]:
    """`x` once for every shard of a batch of this size, each where that shard lies; once where nothing is split.

    What is made of a parameter and then added to activations has a gradient on every device, which the partitioner
    sums at once, however large. Made of this instead, it is summed only as the small parameter's own gradient.
    """
    shards = _shards(batch)
    copies = jnp.broadcast_to(x, (shards or 1, *x.shape))
    if shards is None:
        return copies
    free = (PartitionSpec.UNCONSTRAINED,) * x.ndim
    return jax.lax.with_sharding_constraint(copies, PartitionSpec(BATCH_AXES, *free))


def on_one_cpu() -> bool:
    """Whether this is traced for one CPU. What is fast there would move around what several devices share out."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1)


@contextmanager
def traced_for_several_devices() -> Iterator[None]:
    """What is traced within is not for one CPU, even if there is but that: a pod's programs are described on it."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("devices",), (AxisType.Auto,))):
        yield


def _shards(batch: int) -> int | None:
    """Into how many parts `constrain` splits a batch; None where it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(types.get(axis) != AxisType.Auto for axis in BATCH_AXES):
        return None
    shards = prod(mesh.shape[axis] for axis in BATCH_AXES)
    return None if batch % shards else shards
