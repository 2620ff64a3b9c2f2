"""TPU chips and slices: what they can do, and their devices for compiling where there is no TPU."""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

from beit_jax.errors import BeitJaxError, printable

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The memory and the largest rates of a chip.

    Attributes:
        hbm: bytes that a program may take, as the compiler counts them: a little less than the data sheet says.
        flops: floating point operations per second, in dense bfloat16 products.
        hbm_bandwidth: bytes per second.
        axes: the axes of the interconnect; a chip has two links along each.
        link: bytes per second over one link in one direction.
        wrap: an axis whose length is a multiple of this is a ring; a shorter axis is a line.
        dcn: bytes per second over the data centre's network: this chip's share of its host's network.
        clock: cycles per second, the peak divided by the products of a cycle; None where the sheet does not say enough.
        source: where all these numbers but `hbm` come from.
    """

    name: str
    hbm: int
    flops: float
    hbm_bandwidth: float
    axes: int
    link: float
    wrap: int
    dcn: float
    clock: float | None
    source: str


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # `link`: half of a chip's bidirectional bandwidth, divided by its links. `hbm`: the memory that libtpu 0.0.42.1
        # says is available when a program does not fit. `wrap`: https://jax-ml.github.io/scaling-book/tpus/.
        Chip(
            name="v5e",
            hbm=int(15.75 * GIB),
            flops=197e12,
            hbm_bandwidth=819e9,
            axes=2,
            link=400e9 / 2 / 4,
            wrap=16,
            dcn=6.4e12 / 8 / 256,  # of a pod of 256 chips
            clock=197e12 / (2 * 4 * 128**2),  # four units of 128 x 128 multiply-adds
            source="https://cloud.google.com/tpu/docs/v5e",
        ),
        Chip(
            name="v6e",
            hbm=int(31.25 * GIB),
            flops=918e12,
            hbm_bandwidth=1600e9,
            axes=2,
            link=800e9 / 2 / 4,
            wrap=16,
            dcn=25.6e12 / 8 / 256,
            clock=None,
            source="https://cloud.google.com/tpu/docs/v6e",
        ),
        Chip(
            name="v5p",
            hbm=int(95.74 * GIB),
            flops=459e12,
            hbm_bandwidth=2765e9,
            axes=3,
            link=1200e9 / 2 / 6,
            wrap=4,
            dcn=50e9 / 8,
            clock=459e12 / (2 * 2 * 4 * 128**2),  # two cores as v5e's
            source="https://cloud.google.com/tpu/docs/v5p",
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """Slices of the same shape, joined by the data centre's network.

    Attributes:
        shape: the number of chips along each axis of a slice.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """The name of one slice in libtpu: v5e:2x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """The name that `parse_topology` reads."""
        return self.slice_name if self.slices == 1 else f"{self.slices}x{self.slice_name}"

    @property
    def slice_chips(self) -> int:
        return prod(self.shape)

    @property
    def chips(self) -> int:
        return self.slices * self.slice_chips

    @property
    def bandwidth(self) -> float:
        """Bytes per second that reach the chip with the fewest links: two along a ring, one along a line."""
        rings = [size % self.chip.wrap == 0 for size in self.shape]
        if self.chip.axes == 3:  # rings are closed by optical switches, which only whole cubes of 4 x 4 x 4 have
            rings = [all(rings)] * len(rings)
        links = sum(1 + ring for size, ring in zip(self.shape, rings, strict=True) if size > 1)
        return links * self.chip.link

    def devices(self) -> list[jax.Device]:
        """Devices to compile for. They hold no arrays and run nothing.

        Raises:
            BeitJaxError: libtpu is missing, or refuses this shape.
        """
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise BeitJaxError("--topology: the compiler for TPUs is not installed; pip install 'jax[tpu]'")
        several = {} if self.slices == 1 else {"num_slices": self.slices}
        try:
            with _no_tpu_needed():
                described = topologies.get_topology_desc(self.slice_name, "tpu", **several)
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BeitJaxError(f"--topology: libtpu refuses {self.name}: {printable(reason)}") from None
        return list(described.devices)


def parse_topology(text: str) -> Topology:
    """Reads ``v5e:2x4``, ``v5p:2x2x2``, or, for two slices, ``2xv5e:4x4``.

    Raises:
        BeitJaxError: no chip has this name, or its interconnect has another number of axes.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):([1-9]\d*(?:x[1-9]\d*)*)", text)
    if found is None:
        raise BeitJaxError(f"--topology: expected a chip and a shape, as v5e:2x4 or 2xv5e:4x4, found {printable(text)}")
    slices, name, sizes = found.groups()
    if name not in CHIPS:
        raise BeitJaxError(f"--topology: no chip is called {printable(name)}; choose {', '.join(CHIPS)}")
    chip, shape = CHIPS[name], tuple(map(int, sizes.split("x")))
    if len(shape) != chip.axes:
        example = "x".join(["2"] * chip.axes)
        raise BeitJaxError(f"--topology: {name} has {chip.axes} axes, as {name}:{example}, found {printable(text)}")
    return Topology(chip, shape, int(slices or 1))


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges the devices of several slices as a mesh of these sizes.

    The first axis is divided among the slices. So only the collectives along this axis, one gradient a step, use the
    slow network between slices. Within a slice, `mesh_utils` puts neighbours in the mesh next to each other.

    Args:
        devices: devices with a ``slice_index``; every slice has equally many.

    Raises:
        BeitJaxError: the size of the first axis is no multiple of the number of slices.
    """
    slices = len({device.slice_index for device in devices})
    if sizes[0] % slices:
        raise BeitJaxError(
            f"--run.mesh: over {slices} slices the data axis must be a multiple of {slices}, found {sizes[0]}"
        )
    inner, outer = (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
    # On a 2-D interconnect, an fsdp axis over a whole slice has to combine both physical axes.
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not look for the metadata of a cloud machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # libtpu requires a value; only the requested topology counts
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock protects chips, and no chip is used
}


@contextmanager
def _no_tpu_needed() -> Iterator[None]:
    """Sets the environment variables that libtpu needs while it is loaded where there is no TPU."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
