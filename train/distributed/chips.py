"""TPU chips: what they can do, and how Google Cloud writes so many of them.

Every number is one device's, as JAX counts devices. A chip of v4, v5e, v5p and v6e is one device. A chip of TPU7x is
two, which share its memory, its links and its network.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from beit_jax.errors import BeitJaxError, printable

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The memory and the largest rates of a device of a chip.

    Attributes:
        hbm: bytes that a program may take, as the compiler counts them: a little less than the data sheet says.
        flops: floating point operations per second, in dense bfloat16 products.
        hbm_bandwidth: bytes per second.
        axes: the axes of the interconnect; a chip has two links along each.
        link: bytes per second over one link in one direction.
        wrap: an axis whose length is a multiple of this is a ring; a shorter axis is a line.
        dcn: bytes per second over the data centre's network: this device's share of its host's network. None where that
            is not published.
        clock: cycles per second, the peak divided by the products of a cycle; None where the sheet does not say enough.
        source: where all these numbers but `hbm` come from.
        devices: of a chip.
        inside: bytes per second in one direction between the devices of a chip.
        settings: what libtpu has to be told beside the name.
        cores: the TensorCores of a chip, which Google Cloud counts in names as v5p-8; 1 where it counts chips.
    """

    name: str
    hbm: int
    flops: float
    hbm_bandwidth: float
    axes: int
    link: float
    wrap: int
    dcn: float | None
    clock: float | None
    source: str
    devices: int = 1
    inside: float = 0.0
    settings: tuple[tuple[str, str], ...] = ()
    cores: int = 1


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # `link`: half of a chip's bidirectional bandwidth, divided by its links. `hbm`: the memory that libtpu 0.0.42.1
        # and 0.0.50.1 say is available when a program does not fit, the smaller of the two.
        # `wrap`: https://jax-ml.github.io/scaling-book/tpus/.
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
            cores=2,
        ),
        Chip(
            name="v4",
            hbm=int(30.75 * GIB),
            flops=275e12,
            hbm_bandwidth=1200e9,
            axes=3,
            link=1.1e15 / 4096 / 6,  # all-reduce of a pod of 4096 chips
            wrap=4,
            dcn=None,
            clock=275e12 / (2 * 2 * 4 * 128**2),
            source="https://cloud.google.com/tpu/docs/v4",
            # Both cores are one device, as on Cloud TPUs. Without this libtpu describes each core as a device.
            settings=(("chip_config_name", "megacore"),),
            cores=2,
        ),
        Chip(
            name="tpu7x",
            hbm=int(94.74 * GIB),
            flops=2307e12 / 2,
            hbm_bandwidth=7380e9 / 2,
            axes=3,
            link=1200e9 / 2 / 6 / 2,
            wrap=4,
            dcn=100e9 / 8 / 2,
            clock=None,
            source="https://docs.cloud.google.com/tpu/docs/tpu7x",
            devices=2,
            inside=6 * 1200e9 / 2 / 6,  # six times a link of the chip, says the page
            cores=2,
        ),
    )
}

_CALLED: Mapping[str, str] = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
    "v6": "v6e",
    "v6lite": "v6e",
    "ironwood": "tpu7x",
    "tpu7": "tpu7x",
    "v7": "tpu7x",
    "v7x": "tpu7x",
    "7x": "tpu7x",
}
"""What else chips are called: by Google Cloud, by its announcements, and by analogy."""


def chip_named(name: str) -> Chip | None:
    """The chip of a name that people use for it, in any case of letters."""
    plain = name.lower()
    return CHIPS.get(_CALLED.get(plain, plain))


def shape_of(chip: Chip, count: int, text: str) -> tuple[int, ...]:
    """The shape of a slice of Google Cloud's accelerator type CHIP-COUNT, as v5litepod-8 or v5p-128.

    The count of v4, v5p and TPU7x is of TensorCores, two a chip; that of v5e and v6e is of chips.

    Args:
        text: as it was typed, for the message.

    Raises:
        BeitJaxError: no slice has so many.
    """
    chips, rest = divmod(count, chip.cores)
    shape = None if rest else (_FLAT.get(chips) if chip.axes == 2 else _SMALL.get(chips) or _cubes(chips))
    if shape is None:
        counted = "TensorCores, two a chip" if chip.cores == 2 else "chips"
        sizes = _FLAT if chip.axes == 2 else _SMALL
        known = ", ".join(str(chip.cores * size) for size in sizes)
        more = "" if chip.axes == 2 else f" or a multiple of {64 * chip.cores}"
        raise BeitJaxError(
            f"--topology: {printable(text)} is no slice: {chip.name}-N counts {counted}, and N is {known}{more}; "
            f"or give a shape, as {chip.name}:{'x'.join(['2'] * chip.axes)}"
        )
    return shape


# https://cloud.google.com/tpu/docs/v5e, /v6e, /v4, /v5p and /tpu7x: "Configurations".
_FLAT: Mapping[int, tuple[int, ...]] = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16),
}  # fmt: skip
_SMALL: Mapping[int, tuple[int, ...]] = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}


def _cubes(chips: int) -> tuple[int, ...] | None:
    """The most compact block of whole cubes of 4 x 4 x 4; None for a number that is no multiple of 64, or too large."""
    cubes, rest = divmod(chips, 64)
    if rest or not 0 < cubes <= 144:  # 9,216 chips are the largest pod, of TPU7x
        return None
    sides = [size for size in range(1, cubes + 1) if cubes % size == 0]
    blocks = (block for block in product(sides, repeat=3) if prod(block) == cubes and list(block) == sorted(block))
    best = min(blocks, key=sum)
    return tuple(4 * size for size in best)


def is_accelerator_type(text: str) -> re.Match[str] | None:
    """Matches CHIP-COUNT: the slices, the chip, the count."""
    return re.fullmatch(r"(?:([1-9]\d*)x)?([A-Za-z0-9]*[A-Za-z]\w*)-([1-9]\d*)", text)
