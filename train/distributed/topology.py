"""Slices of TPUs and machines with cards by their names, and their devices for compiling where there are none."""

import importlib.metadata
import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies

from beit_jax.errors import BeitJaxError, printable

from .cards import CARDS, Card, card_named
from .chips import CHIPS, Chip, chip_named, is_accelerator_type, shape_of


class Topology(ABC):
    """Devices that are not here, to compile for: slices of TPUs or machines with cards.

    Attributes:
        chip: what a device is; every number of it is one device's.
        slices: joined by a network that is slower than what joins the devices within one.
        noun: what people call a chip of it.
    """

    chip: Chip | Card
    slices: int
    noun: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `parse_topology` reads."""

    @property
    @abstractmethod
    def slice_chips(self) -> int: ...

    @property
    def chips(self) -> int:
        return self.slices * self.slice_chips

    @property
    def slice_size(self) -> int:
        """Devices of a slice."""
        return self.slice_chips * (self.chip.devices if isinstance(self.chip, Chip) else 1)

    @property
    def size(self) -> int:
        """Devices."""
        return self.slices * self.slice_size

    @property
    @abstractmethod
    def bandwidth(self) -> float:
        """Bytes per second that reach a device from the others of its slice."""

    @abstractmethod
    def devices(self) -> list[jax.Device]:
        """Devices to compile for. They hold no arrays and run nothing.

        Raises:
            BeitJaxError: the compiler is missing, or refuses these devices.
        """


@dataclass(frozen=True)
class Slices(Topology):
    """Slices of TPUs of the same shape, joined by the data centre's network.

    Attributes:
        shape: the number of chips along each axis of a slice.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1
    noun: ClassVar[str] = "chip"

    @property
    def slice_name(self) -> str:
        """The name of one slice in libtpu: v5e:2x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        return self.slice_name if self.slices == 1 else f"{self.slices}x{self.slice_name}"

    @property
    def slice_chips(self) -> int:
        return prod(self.shape)

    @property
    def bandwidth(self) -> float:
        """That of the chip with the fewest links, of which there are two along a ring, one along a line."""
        rings = [size % self.chip.wrap == 0 for size in self.shape]
        if self.chip.axes == 3:  # rings are closed by optical switches, which only whole cubes of 4 x 4 x 4 have
            rings = [all(rings)] * len(rings)
        links = sum(1 + ring for size, ring in zip(self.shape, rings, strict=True) if size > 1)
        return links * self.chip.link or self.chip.inside

    def devices(self) -> list[jax.Device]:
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise BeitJaxError("--topology: the compiler for TPUs is not installed; pip install 'jax[tpu]'")
        several = {} if self.slices == 1 else {"num_slices": self.slices}
        try:
            with _set(_NO_TPU):
                described = topologies.get_topology_desc(self.slice_name, "tpu", **several, **dict(self.chip.settings))
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            raise BeitJaxError(f"--topology: libtpu refuses {self.name}: {_first_line(error)}") from None
        found = list(described.devices)
        if len(found) != self.size:
            raise BeitJaxError(
                f"--topology: libtpu describes {self.name} as {len(found)} devices, where {self.size} were expected; "
                "another version of libtpu may know it"
            )
        return found


@dataclass(frozen=True)
class Machines(Topology):
    """Machines with equally many cards, joined by their network adapters.

    Attributes:
        cards: of a machine.
    """

    chip: Card
    cards: int = 1
    slices: int = 1
    noun: ClassVar[str] = "card"

    @property
    def name(self) -> str:
        one = f"{self.chip.name}:{self.cards}"
        return one if self.slices == 1 else f"{self.slices}x{one}"

    @property
    def slice_chips(self) -> int:
        return self.cards

    @property
    def bandwidth(self) -> float:
        """Over several machines at most what all adapters of a machine bring: each byte may enter by any of them."""
        between = self.cards * self.chip.dcn if self.slices > 1 and self.chip.dcn else float("inf")
        return min(self.chip.link, between)

    def devices(self) -> list[jax.Device]:
        _check_plugin()
        shape = f"{self.slices}x1x{self.cards}"
        try:
            with _set({"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}):  # the plugin asks for a card's driver otherwise
                described = topologies.get_topology_desc(platform="cuda", target_config=self.chip.sheet, topology=shape)
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            raise BeitJaxError(f"--topology: XLA's plugin refuses {self.name}: {_first_line(error)}") from None
        return list(described.devices)


AOT_GPU = "pip install 'beit-jax[aot-gpu]'"


def _check_plugin() -> None:
    """Checks what compiles for cards: JAX's plugin of the same version, and NVIDIA's assembler.

    Raises:
        BeitJaxError: something is missing or of another version.
    """
    names = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")
    found = {name: _version(name) for name in names}
    missing = [name for name, version in found.items() if version is None]
    if missing:
        raise BeitJaxError(
            f"--topology: the compiler for GPUs is not installed ({', '.join(missing)} missing); {AOT_GPU}"
        )
    others = [f"{name} {found[name]}" for name in names[:2] if found[name] != jax.__version__]
    if others:
        raise BeitJaxError(f"--topology: {others[0]} is installed beside jax {jax.__version__}; {AOT_GPU}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__)


_SHAPE = re.compile(r"(?:([1-9]\d*)x)?([A-Za-z0-9][\w -]*?)(?::([1-9]\d*(?:x[1-9]\d*)*))?")


def parse_topology(text: str) -> Topology:
    """Reads TPUs, as ``v5e:2x4``, ``2xv5e:4x4`` for two slices, or as Google Cloud names them, ``v5litepod-8`` or
    ``v5p-128``; and cards, as ``h100:8`` or ``2xh100:8`` for two machines.

    Raises:
        BeitJaxError: nothing has this name; the chip's interconnect has another number of axes; there are no slices or
            machines of this size.
    """
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise BeitJaxError(
            "--topology: expected a chip and a shape, as v5e:2x4, 2xv5e:4x4 or h100:8, found " + printable(text)
        )
    several, name, sizes = found.groups()
    slices = int(several or 1)
    if (chip := chip_named(name)) is not None:
        return _slices(chip, sizes, slices, text)
    typed = is_accelerator_type(text)
    if typed and (chip := chip_named(typed[2])) is not None:
        return _checked(Slices(chip, shape_of(chip, int(typed[3]), text), slices))
    if (card := card_named(name)) is not None:
        return _machines(card, sizes, slices, text)
    raise BeitJaxError(
        f"--topology: no chip is called {printable(name)}; choose {', '.join(CHIPS)}, or a card: {', '.join(CARDS)}"
    )


def _slices(chip: Chip, sizes: str | None, slices: int, text: str) -> Slices:
    shape = tuple(map(int, sizes.split("x"))) if sizes else ()
    if len(shape) != chip.axes:
        example = "x".join(["2"] * chip.axes)
        raise BeitJaxError(
            f"--topology: {chip.name} has {chip.axes} axes, as {chip.name}:{example}, found {printable(text)}"
        )
    return _checked(Slices(chip, shape, slices))


def _checked(topology: Slices) -> Slices:
    if topology.slices > 1 and topology.chip.dcn is None:
        raise BeitJaxError(
            f"--topology: what {topology.chip.name} has between slices is not published; give one slice, as "
            f"{topology.slice_name}"
        )
    return topology


def _machines(card: Card, sizes: str | None, machines: int, text: str) -> Machines:
    if sizes and "x" in sizes:
        raise BeitJaxError(
            f"--topology: cards have no shape: {card.name}:8 for eight, 2x{card.name}:8 for two machines, found "
            + printable(text)
        )
    cards = int(sizes or 1)
    if cards > card.joined:
        whole = f", as {-(-cards // card.joined)}x{card.name}:{card.joined}" if card.dcn else ""
        raise BeitJaxError(
            f"--topology: a machine has up to {card.joined} {card.name}, found {cards}; give machines and cards{whole}"
            if card.dcn
            else f"--topology: a machine has up to {card.joined} {card.name}, found {cards}"
        )
    if machines > 1 and card.dcn is None:
        raise BeitJaxError(
            f"--topology: what joins machines with {card.name} is not published; give one machine, as "
            f"{card.name}:{cards}"
        )
    return Machines(card, cards, machines)


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


_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not look for the metadata of a cloud machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # libtpu requires a value; only the requested topology counts
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock protects chips, and no chip is used
}
"""What libtpu needs while it is loaded where there is no TPU."""


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets those of these environment variables that are not set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
