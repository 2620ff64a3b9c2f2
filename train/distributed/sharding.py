"""Where arrays lie on a mesh of devices: one table for parameters, optimizer moments, averages and restored arrays.

The mesh has three axes: "data" splits batches; "fsdp" splits batches, parameters and every array of the shape of a
parameter; "tensor" splits attention heads and hidden units of the MLP. A training step runs under `jax.set_mesh`, which
turns on the constraints on activations (`beit_jax.models.partition`).
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey
from jaxtyping import Int

from beit_jax.errors import BeitJaxError
from beit_jax.models.partition import BATCH_AXES, spec
from beit_jax.tree import Nested, first_match

from .topology import arrange

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
SMALL = 2**15
"""A leaf with fewer elements is not split over "fsdp": gathering it would cost more than holding it."""

RULES: Sequence[tuple[str, PartitionSpec]] = (
    # Factors of kernels lie as the axes of their kernels do; no axis of a rank is split.
    (r".*attention/adapter/[qkv]/lora_a", spec(None, "fsdp", None)),
    (r".*attention/adapter/[qkv]/lora_b", spec(None, None, "tensor", None)),
    (r".*attention/adapter/[qkv]/magnitude", spec(None, "tensor", None)),
    (r".*attention/adapter/out/lora_a", spec(None, "tensor", None, None)),
    (r".*mlp/adapter/fc1/lora_a", spec(None, "fsdp", None)),
    (r".*mlp/adapter/fc1/lora_b", spec(None, None, "tensor")),
    (r".*mlp/adapter/fc1/magnitude", spec(None, "tensor")),
    (r".*mlp/adapter/fc2/lora_a", spec(None, "tensor", None)),
    (r".*adapter/(out|fc2)/lora_b", spec(None, None, "fsdp")),
    (r".*adapter/(out|fc2)/magnitude", spec()),
    (r".*blocks/attention/qkv_kernel", spec(None, "fsdp", None, "tensor", None)),
    (r".*blocks/attention/out_kernel", spec(None, "tensor", None, "fsdp")),
    (r".*blocks/attention/bias_table", spec(None, None, "tensor")),
    (r".*blocks/attention/(q_bias|v_bias)", spec(None, "tensor", None)),
    (r".*blocks/attention/qkv_bias", spec(None, None, "tensor", None)),
    (r".*blocks/mlp/fc1/kernel", spec(None, "fsdp", "tensor")),
    (r".*blocks/mlp/fc1/bias", spec(None, "tensor")),
    (r".*blocks/mlp/fc2/kernel", spec(None, "tensor", "fsdp")),
    (r".*shared_bias_table", spec(None, "tensor")),
    (r".*embeddings/patch_kernel", spec(None, None, None, "fsdp")),
    (r".*embeddings/position_embeddings", spec(None, None, "fsdp")),
    (r".*(fpn|decode_head|auxiliary_head)/.*kernel", spec(None, None, None, "fsdp")),
    (r".*lm_head/kernel", spec("fsdp", "tensor")),
    (r".*(classifier|embedding_head)/kernel", spec("fsdp", None)),
    (r".*heads/kernel", spec(None, "fsdp", None)),
    (r".*(encode|decode)_task/fc[12]/kernel", spec("fsdp", None)),
    (r"((encoder|decoder)/)?(input|output|group_\d+/block_\d+/\w+)/kernel", spec(None, None, None, "fsdp")),
    (r".*codebook/.*", spec()),
    (r".*(bias|scale|gamma_1|gamma_2|cls_token|mask_token|mean|var)", spec()),
)
"""The axes of every tensor by flat name; blocks are stacked on a leading axis. A tensor without a rule is an error."""


def make_mesh(shape: tuple[int, int, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of (data, fsdp, tensor) over devices, by default all of the run. -1 stands for the devices that are left.

    With several slices of TPUs, the data axis is divided among the slices (`topology.arrange`).

    Raises:
        BeitJaxError: the shape does not use every device exactly once, its tensor axis spans hosts, or its data axis is
            no multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(shape, len(devices))
    local = sum(device.process_index == devices[0].process_index for device in devices)
    if local % sizes[2]:  # a host would have to read the images of another host
        raise BeitJaxError(f"--run.mesh: the tensor axis must divide the {local} devices of a host, found {sizes[2]}")
    # Under the default, Explicit, parameters and batch could not share an axis.
    types = (AxisType.Auto,) * len(AXES)
    if len({getattr(device, "slice_index", None) for device in devices}) > 1:
        return Mesh(arrange(sizes, devices), AXES, axis_types=types)
    # The first argument is positional: jax 0.12 renamed it.
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def _sizes(shape: tuple[int, int, int], count: int) -> tuple[int, ...]:
    known = prod(size for size in shape if size != -1)
    if len(shape) != len(AXES) or any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise BeitJaxError(
            f"--run.mesh: expected positive numbers (data, fsdp, tensor), at most one of them -1, found {shape}"
        )
    if count % known or (-1 not in shape and known != count):
        raise BeitJaxError(
            f"--run.mesh: expected sizes of (data, fsdp, tensor) whose product is {count} devices, found {shape}"
        )
    return tuple(count // known if size == -1 else size for size in shape)


def state_shardings(state: T, mesh: Mesh) -> T:
    """The sharding of every leaf of a pytree whose dicts name parameters: a `State`, an optimizer state, parameters.

    The keys of the dicts around a leaf name it, so moments and averages lie where their parameters lie. Scalars are
    copied to every device.

    Args:
        state: arrays or shapes.

    Raises:
        BeitJaxError: no rule of `RULES` matches a leaf.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(_name(path), leaf.shape, mesh) if leaf.shape else spec())

    return jax.tree_util.tree_map_with_path(one, state)


def _name(path: tuple[Any, ...]) -> str:
    """The flat name: the keys of the innermost dicts, without the dataclasses and tuples around them."""
    keys: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, DictKey):
            break
        keys.append(str(entry.key))
    return "/".join(reversed(keys))


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The axes of the rule, without axes that do not divide their dimension, and without "fsdp" for small leaves."""
    small = prod(shape) < SMALL

    def usable(axis: str | None, size: int) -> str | None:
        dropped = axis is None or size % mesh.shape[axis] or (small and axis == "fsdp")
        return None if dropped else axis

    axes = first_match(RULES, name)
    return spec(*(usable(axis, size) for axis, size in zip(axes, shape[: len(axes)], strict=True)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is copied to every device."""
    return NamedSharding(mesh, spec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is split along its first axis."""
    return NamedSharding(mesh, spec(BATCH_AXES))


def check_batch(size: int, mesh: Mesh, *, parts: int = 1, option: str = "--data.batch-size") -> None:
    """Refuses a global batch size that the devices cannot share equally, in each of its `parts`.

    Args:
        option: the option that gave the size, for errors.

    Raises:
        BeitJaxError: naming a number of which the size must be a multiple.
    """
    shards = prod(mesh.shape[axis] for axis in BATCH_AXES)
    if size % (shards * parts):
        split = f"{shards} (data x fsdp of --run.mesh)" + (f" x {parts} (--optim.accumulate)" if parts > 1 else "")
        raise BeitJaxError(f"{option}: expected a multiple of {split}, found {size}")


def batch_rows(mesh: Mesh, size: int) -> Int[np.ndarray, " local"]:
    """The rows of a global batch that lie on this process's devices, ascending.

    A row is the same image for any number of hosts. So code that pairs rows, or draws random numbers for them, computes
    the same for any number of hosts.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    parts = {place[0].indices(size) for place in places if place is not None}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def put_batch(local: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Builds the global batch. Every host gives the rows that `batch_rows` names; all hosts give equally many.

    Raises:
        BeitJaxError: the devices cannot share the batch equally.
    """
    sharding, size = batch_sharding(mesh), len(next(iter(local.values()))) * jax.process_count()
    check_batch(size, mesh)
    rows = batch_rows(mesh, size)

    def put(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(rows, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: put(array) for name, array in local.items()}


def init_sharded(fn: Callable[..., T], mesh: Mesh, *args: Any) -> T:
    """``fn(*args)``, computed where `state_shardings` places the result: no device ever holds all of it.

    Plain `jax.jit` would put its outputs, such as an optimizer's moments, on a single device.
    """
    return jax.jit(fn, out_shardings=state_shardings(jax.eval_shape(fn, *args), mesh))(*args)


def place(params: Nested, shardings: Nested) -> Nested:
    """Places arrays of the host on devices. Every device receives only its own part."""

    def one(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, params, shardings)
