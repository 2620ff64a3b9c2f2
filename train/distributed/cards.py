"""NVIDIA's cards: what they can do, and their data sheets as XLA's compiler reads them where there is no card.

XLA's plugin carries such sheets, but gives nobody a way to choose one (jax 0.12.0.1): a program says what it compiles
for in text, `GpuTargetConfigProto`. The text here has what XLA's own sheets have without their table of units.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from beit_jax.errors import BeitJaxError, printable

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""The environment variable with the share of a card's memory that JAX takes for its arrays and programs."""


@dataclass(frozen=True)
class Architecture:
    """What all cards of a compute capability have in common.

    Source: NVIDIA's CUDA C++ programming guide, "Technical specifications per compute capability".

    Attributes:
        major, minor: the compute capability.
        accelerated: whether XLA compiles for this very architecture, as sm_90a.
        shared: bytes of shared memory of a multiprocessor, and the most that a block may have of them.
        threads: of a multiprocessor.
        units: float32 units of a multiprocessor.
    """

    major: int
    minor: int
    accelerated: bool
    shared: tuple[int, int]
    threads: int
    units: int


_AMPERE = Architecture(8, 0, False, (167_936, 166_912), 2048, 64)
_AMPERE_86 = Architecture(8, 6, False, (102_400, 101_376), 1536, 128)
_ADA = Architecture(8, 9, False, (102_400, 101_376), 1536, 128)
_HOPPER = Architecture(9, 0, True, (233_472, 232_448), 2048, 128)
_BLACKWELL = Architecture(10, 0, True, (233_472, 232_448), 2048, 128)
_BLACKWELL_103 = Architecture(10, 3, True, (233_472, 232_448), 2048, 128)
_BLACKWELL_120 = Architecture(12, 0, False, (102_400, 101_376), 1536, 128)


@dataclass(frozen=True)
class Card:
    """The memory and the largest rates of a card.

    Attributes:
        kind: as JAX calls the card, `jax.Device.device_kind`.
        cores: multiprocessors.
        memory: bytes.
        flops: floating point operations per second, in dense bfloat16 products that accumulate in float32.
        hbm_bandwidth: bytes per second.
        l2: bytes of cache.
        ghz: the highest clock.
        link: bytes per second in one direction between a card and the others of its machine: NVLink, else PCIe.
        joined: the most cards of a machine, or of what NVLink joins.
        dcn: bytes per second of a card's own network adapter in NVIDIA's machines; None where a card has none.
        source: where all these numbers come from.
    """

    name: str
    kind: str
    architecture: Architecture
    cores: int
    memory: int
    flops: float
    hbm_bandwidth: float
    l2: int
    ghz: float
    link: float
    joined: int
    dcn: float | None
    source: str
    clock: None = None  # XLA does not reckon with cycles of a program

    @property
    def fraction(self) -> float:
        """The share of the memory that JAX takes.

        Raises:
            BeitJaxError: the environment variable is no share.
        """
        said = os.environ.get(FRACTION, "0.75")
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", said) or float(said) <= 0:
            raise BeitJaxError(f"{FRACTION}: expected a share of the memory, as .9, found {printable(said)}")
        return float(said)

    @property
    def hbm(self) -> int:
        """Bytes that a program may take: the share of the memory that JAX takes."""
        return int(self.memory * self.fraction)

    @property
    def sheet(self) -> str:
        """The card as `GpuTargetConfigProto`, in protobuf's text form."""
        made = self.architecture
        feature = "ACCELERATED_FEATURES" if made.accelerated else "NONE"
        fields = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49_152,
            "shared_memory_per_core": made.shared[0],
            "shared_memory_per_block_optin": made.shared[1],
            "threads_per_core_limit": made.threads,
            "core_count": self.cores,
            "fpus_per_core": made.units,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65_535,
            "block_dim_limit_z": 65_535,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "registers_per_core_limit": 65_536,
            "registers_per_block_limit": 65_536,
            "memory_bandwidth": int(self.hbm_bandwidth),
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.ghz,
            "device_memory_size": self.memory,
            "device_address_bits": 64,
        }
        lines = [f"  {name}: {value}" for name, value in fields.items()]
        capability = f"{{ major: {made.major} minor: {made.minor} feature_extension: {feature} }}"
        versions = [f'  {name}_version: "13.0.0"' for name in ("driver", "runtime", "compile_time_toolkit")]
        return "\n".join(
            [
                "gpu_device_info {",
                *lines,
                f"  cuda_compute_capability {capability}",
                '  device_vendor: "NVIDIA Corporation"',
                *versions,
                "}",
                'platform_name: "CUDA"',
                "dnn_version_info { major: 9 minor: 12 }",
                f'device_description_str: "{self.kind}"',
                "",
            ]
        )


MIB = 2**20
_XLA = "openxla/xla, xla/backends/gpu/target_config/specs"
_PCIE4, _PCIE5 = 32e9, 64e9  # 16 lanes

CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        # Multiprocessors, memory, cache and clock of A100, H100, H200, B200, B300, GB200, GB300 and RTX PRO 6000: XLA's
        # own sheets. `flops`: where NVIDIA counts sparsity, half of what it states. `link`: half of what it states for
        # both directions. `dcn`: the adapters of its DGX machines, one for each card.
        Card("a100-40gb", "NVIDIA A100-SXM4-40GB", _AMPERE, 108, 42_331_013_120, 312e12, 1555.2e9, 40 * MIB, 1.41,
             300e9, 16, 25e9, f"nvidia.com/en-us/data-center/a100; {_XLA}"),
        Card("a100-80gb", "NVIDIA A100-SXM4-80GB", _AMPERE, 108, 85_100_068_864, 312e12, 2039e9, 40 * MIB, 1.41,
             300e9, 16, 25e9, f"nvidia.com/en-us/data-center/a100; {_XLA}"),
        Card("a10", "NVIDIA A10", _AMPERE_86, 72, 24 * 10**9, 125e12, 600e9, 6 * MIB, 1.695,
             _PCIE4, 8, None, "nvidia.com/en-us/data-center/products/a10-gpu"),
        Card("a40", "NVIDIA A40", _AMPERE_86, 84, 48 * 10**9, 149.7e12, 696e9, 6 * MIB, 1.74,
             _PCIE4, 8, None, "nvidia.com/en-us/data-center/a40"),
        Card("rtx-a6000", "NVIDIA RTX A6000", _AMPERE_86, 84, 51_041_271_808, 154.8e12, 768e9, 6 * MIB, 1.8,
             _PCIE4, 8, None, f"NVIDIA Ampere GA102 whitepaper; {_XLA}"),
        Card("rtx-3090", "NVIDIA GeForce RTX 3090", _AMPERE_86, 82, 24 * 2**30, 71e12, 936e9, 6 * MIB, 1.695,
             _PCIE4, 8, None, "NVIDIA Ampere GA102 whitepaper"),
        Card("l4", "NVIDIA L4", _ADA, 58, 24 * 10**9, 121e12, 300e9, 48 * MIB, 2.04,
             _PCIE4, 8, None, "nvidia.com/en-us/data-center/l4"),
        Card("l40s", "NVIDIA L40S", _ADA, 142, 48 * 10**9, 362e12, 864e9, 96 * MIB, 2.52,
             _PCIE4, 8, None, "nvidia.com/en-us/data-center/l40s"),
        Card("rtx-6000-ada", "NVIDIA RTX 6000 Ada Generation", _ADA, 142, 48 * 10**9, 364.2e12, 960e9, 96 * MIB, 2.505,
             _PCIE4, 8, None, "NVIDIA Ada GPU architecture whitepaper"),
        Card("rtx-4090", "NVIDIA GeForce RTX 4090", _ADA, 128, 24 * 2**30, 165.2e12, 1008e9, 72 * MIB, 2.52,
             _PCIE4, 8, None, "NVIDIA Ada GPU architecture whitepaper"),
        Card("h100", "NVIDIA H100 80GB HBM3", _HOPPER, 132, 84_942_979_072, 989.5e12, 3352.32e9, 50 * MIB, 1.98,
             450e9, 8, 50e9, f"nvidia.com/en-us/data-center/h100; {_XLA}"),
        Card("h100-pcie", "NVIDIA H100 PCIe", _HOPPER, 114, 84_942_979_072, 756e12, 2039.04e9, 50 * MIB, 1.755,
             _PCIE5, 8, None, f"nvidia.com/en-us/data-center/h100; {_XLA}"),
        Card("h200", "NVIDIA H200", _HOPPER, 132, 151_397_597_184, 989.5e12, 4800e9, 50 * MIB, 1.98,
             450e9, 8, 50e9, f"nvidia.com/en-us/data-center/h200; {_XLA}"),
        Card("b200", "NVIDIA B200", _BLACKWELL, 148, 191_514_411_008, 2250e12, 7672.32e9, 132_644_864, 1.965,
             900e9, 8, 50e9, f"nvidia.com/en-us/data-center/hgx; {_XLA}"),
        Card("b300", "NVIDIA B300", _BLACKWELL_103, 158, 297_021_865_984, 2250e12, 7936e9, 135_528_448, 1.965,
             900e9, 8, 100e9, f"nvidia.com/en-us/data-center/hgx; {_XLA}"),
        Card("gb200", "NVIDIA GB200", _BLACKWELL, 152, 197_897_748_480, 2500e12, 7928.064e9, 135_528_448, 2.062,
             900e9, 72, 50e9, f"nvidia.com/en-us/data-center/gb200-nvl72; {_XLA}"),
        Card("gb300", "NVIDIA GB300", _BLACKWELL_103, 152, 297_021_079_552, 2500e12, 7928.064e9, 135_528_448, 2.07,
             900e9, 72, 100e9, f"nvidia.com/en-us/data-center/gb300-nvl72; {_XLA}"),
        Card("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell", _BLACKWELL_120, 188, 103_079_215_104, 503.8e12, 1792e9,
             128 * MIB, 2.6, _PCIE5, 8, None, f"NVIDIA RTX Blackwell PRO GPU architecture; {_XLA}"),
        Card("rtx-5090", "NVIDIA GeForce RTX 5090", _BLACKWELL_120, 170, 32 * 2**30, 209.5e12, 1792e9, 96 * MIB, 2.407,
             _PCIE5, 8, None, "NVIDIA RTX Blackwell GPU architecture"),
    )
}  # fmt: skip

_ALSO: Mapping[str, str] = {
    "a10080": "a100-80gb",
    "a10040": "a100-40gb",
    "h10080gb": "h100",
    "h10080gbhbm3": "h100",
    "h100sxm": "h100",
    "h100sxm5": "h100",
    "h200141gb": "h200",
    "b200180gb": "b200",
    "nvl72": "gb200",
    "a6000": "rtx-a6000",
    "rtx6000ada": "rtx-6000-ada",
    "rtx6000pro": "rtx-pro-6000",
    "rtxpro6000blackwell": "rtx-pro-6000",
}
"""What else people type, without what `_plain` leaves out."""


def _plain(name: str) -> str:
    """A name without the words that all cards share, spaces and hyphens: tesla-A100_80GB is a10080gb."""
    words = re.sub(r"nvidia|tesla|geforce|sxm\d?(?=[-_ ]?\d+gb)|generation", "", name.lower())
    return re.sub(r"[-_ ]", "", words)


def card_named(name: str) -> Card | None:
    """The card of a name that people use for it, as ``h100``, ``NVIDIA-A100-SXM4-80GB`` or ``rtx4090``.

    Raises:
        BeitJaxError: the name is of two cards.
    """
    plain = _plain(name)
    if plain == "a100":
        raise BeitJaxError(
            f"--topology: A100 have 40 or 80 GB; say a100-40gb or a100-80gb instead of {printable(name)}"
        )
    known = {_plain(each): each for each in CARDS} | dict(_ALSO)
    return CARDS[known[plain]] if plain in known else None
