"""The placement of activations on a mesh of devices. Without a mesh, nothing is moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ("data", "fsdp")
"""The mesh axes that a batch is split over. The second axis splits parameters too."""


def spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """`PartitionSpec` with types: for every dimension the mesh axes that split it."""
    return PartitionSpec(*axes)


def constrain(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """`x`, split along its first axis over `BATCH_AXES` and whole along the others.

    With this constraint, XLA's partitioner gathers the parameters of one block at a time. Without it, the partitioner
    sees only that parameters and batch share a mesh axis, and also moves activations, which are larger.

    The constraint is set only inside `jax.set_mesh`, with both axes in Auto mode and a batch that they divide.
    """
    return x if shards_of(x.shape[0]) is None else jax.lax.with_sharding_constraint(x, spec(BATCH_AXES))


def each_shard(x: Float[Array, "*dims"], batch: int) -> Float[Array, "shards *dims"]:
    """A copy of `x` for every shard of a batch of this size, on the shard's own devices; one copy without a mesh.

    An array that is computed from a parameter and added to activations has a gradient on every device. The partitioner
    sums these gradients at once, however large the array is. An array that is computed from these copies keeps its
    gradients apart; only the gradient of the small parameter is summed.
    """
    shards = shards_of(batch)
    copies = jnp.broadcast_to(x, (shards or 1, *x.shape))
    if shards is None:
        return copies
    free = (PartitionSpec.UNCONSTRAINED,) * x.ndim
    return jax.lax.with_sharding_constraint(copies, PartitionSpec(BATCH_AXES, *free))


@contextmanager
def traced_for_several_devices() -> Iterator[None]:
    """Functions traced within are traced for several devices, on one CPU too, where a pod's programs are described."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("devices",), (AxisType.Auto,))):
        yield


def shards_of(batch: int) -> int | None:
    """The number of parts that `constrain` splits a batch into; None if it sets no constraint."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(types.get(axis) != AxisType.Auto for axis in BATCH_AXES):
        return None
    shards = prod(mesh.shape[axis] for axis in BATCH_AXES)
    return None if batch % shards else shards
