"""Topologies: their names, what their chips and cards can do, and the order of devices over slices."""

import importlib.util
import os
import random
from dataclasses import dataclass

import numpy as np
import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.train.costs.estimate import peak_flops
from beit_jax.train.distributed import topology
from beit_jax.train.distributed.cards import CARDS, FRACTION, Card
from beit_jax.train.distributed.chips import CHIPS
from beit_jax.train.distributed.topology import Slices, arrange, parse_topology

needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs XLA for GPUs: beit-jax[aot-gpu]"
)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: jax[tpu]")


@dataclass(frozen=True)
class Device:
    """As much of a device as the order of a mesh depends on."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "none"


@pytest.mark.parametrize(
    "name",
    ["v5e:2x4", "v6e:4x4", "v5p:2x2x2", "2xv5e:4x4", "3xv5p:4x4x4", "v4:2x2x1", "tpu7x:2x2x1", "l4:1", "2xh100:8"],
)
def test_names_are_read_and_written_alike(name: str) -> None:
    assert parse_topology(name).name == name


@pytest.mark.parametrize(
    ("typed", "name"),
    # https://docs.cloud.google.com/tpu/docs/v5e, /v6e, /v4, /v5p, /tpu7x: "Configurations".
    [
        ("v5litepod-8", "v5e:2x4"),
        ("v5e-8", "v5e:2x4"),
        ("V5E-256", "v5e:16x16"),
        ("2xv5litepod-16", "2xv5e:4x4"),
        ("v6e-1", "v6e:1x1"),
        ("trillium-8", "v6e:2x4"),
        ("v4-8", "v4:2x2x1"),
        ("v4-32", "v4:2x2x4"),
        ("v5p-64", "v5p:2x4x4"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-384", "v5p:4x4x12"),
        ("v5p-512", "v5p:4x8x8"),
        ("v5p-1152", "v5p:4x12x12"),
        ("v5p-1536", "v5p:8x8x12"),
        ("tpu7x-8", "tpu7x:2x2x1"),
        ("ironwood:2x2x1", "tpu7x:2x2x1"),
        ("v7x:4x4x4", "tpu7x:4x4x4"),
        ("h100", "h100:1"),
        ("H100-SXM5-80GB:8", "h100:8"),
        ("NVIDIA H100 80GB HBM3:2", "h100:2"),
        ("nvidia-tesla-a100-80gb:4", "a100-80gb:4"),
        ("a100_40gb", "a100-40gb:1"),
        ("rtx4090", "rtx-4090:1"),
        ("GeForce RTX 5090", "rtx-5090:1"),
        ("rtx-a6000:2", "rtx-a6000:2"),
        ("gb200:72", "gb200:72"),
    ],
)
def test_names_that_people_type_are_understood(typed: str, name: str) -> None:
    assert parse_topology(typed).name == name


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_found_by_what_jax_calls_it(name: str) -> None:
    """And a run on it reckons with the same peak."""
    found = parse_topology(CARDS[name].kind)
    assert found.name == f"{name}:1"
    assert found.chip.flops == peak_flops(CARDS[name].kind)


def test_a_chip_may_be_two_devices_which_share_it() -> None:
    found = parse_topology("tpu7x-8")
    assert (found.chips, found.size, found.slice_size) == (4, 8, 8)
    assert 2 * found.chip.flops == 2307e12
    assert found.bandwidth == 2 * found.chip.link == 100e9  # two links of 100 GB/s in a corner, for two devices
    assert parse_topology("tpu7x:1x1x1").bandwidth == 600e9  # what joins both devices


def test_several_machines_are_as_fast_as_their_adapters() -> None:
    assert parse_topology("h100:8").bandwidth == 450e9
    assert parse_topology("2xh100:8").bandwidth == 8 * 50e9
    assert parse_topology("2xh100:1").bandwidth == 50e9


def test_of_a_cards_memory_a_share_is_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    card = CARDS["h100"]
    monkeypatch.delenv(FRACTION, raising=False)
    assert card.hbm == int(0.75 * card.memory)
    monkeypatch.setenv(FRACTION, ".9")
    assert card.hbm == int(0.9 * card.memory)
    for wrong in ("90%", "0", "1.5", "-1"):
        monkeypatch.setenv(FRACTION, wrong)
        with pytest.raises(BeitJaxError, match=f"{FRACTION}: expected a share of the memory, as .9, found"):
            _ = card.hbm


def test_without_the_compiler_for_gpus_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"jax-cuda13-plugin": "0.1", "jax-cuda13-pjrt": "0.1", "nvidia-cuda-nvcc": "13.5", "nvidia-nvvm": "13.5"}
    monkeypatch.setattr(topology, "_version", versions.get)
    with pytest.raises(BeitJaxError, match=r"jax-cuda13-plugin 0.1 is installed beside jax .*'beit-jax\[aot-gpu\]'"):
        parse_topology("h100:8").devices()
    del versions["nvidia-nvvm"]
    with pytest.raises(BeitJaxError, match=r"not installed \(nvidia-nvvm missing\); pip install 'beit-jax\[aot-gpu\]'"):
        parse_topology("h100:8").devices()


@needs_gpu_compiler
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["h100:2", "a100-40gb:1", "2xb200:8", "rtx-5090:1"])
def test_cards_are_described_where_there_are_none(name: str) -> None:
    before = dict(os.environ)
    found = parse_topology(name)
    devices = found.devices()
    assert len(devices) == found.size
    assert isinstance(found.chip, Card) and {device.device_kind for device in devices} == {found.chip.kind}
    assert len({device.slice_index for device in devices}) == found.slices
    assert dict(os.environ) == before


def test_chips_are_those_of_all_slices() -> None:
    found = parse_topology("2xv5e:4x8")
    assert (found.slices, found.shape, found.slice_chips, found.chips) == (2, (4, 8), 32, 64)
    assert found.slice_name == "v5e:4x8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x4", "--topology: no chip is called v9; choose v5e, v6e, v5p, v4, tpu7x, or a card: a100-40gb, "),
        ("v5e:2x2x2", "--topology: v5e has 2 axes, as v5e:2x2, found v5e:2x2x2"),
        ("v5p:2x4", "--topology: v5p has 3 axes, as v5p:2x2x2, found v5p:2x4"),
        ("v5e:2x\x1b[31m", "--topology: expected a chip and a shape, as v5e:2x4, 2xv5e:4x4 or h100:8, found"),
        ("v7x", "--topology: tpu7x has 3 axes, as tpu7x:2x2x2, found v7x"),
        ("v5e-6", "--topology: v5e-6 is no slice: v5e-N counts chips, and N is 1, 4, 8, 16, 32, 64, 128, 256; or give"),
        (
            "v5p-7",
            "--topology: v5p-7 is no slice: v5p-N counts TensorCores, two a chip, and N is 2, 8, 16, 32, 64 or a",
        ),
        ("v4-99999872", "--topology: v4-99999872 is no slice: v4-N counts TensorCores"),
        ("2xv4-8", "--topology: what v4 has between slices is not published; give one slice, as v4:2x2x1"),
        ("a100:8", "--topology: A100 have 40 or 80 GB; say a100-40gb or a100-80gb instead of a100"),
        ("h100:2x4", "--topology: cards have no shape: h100:8 for eight, 2xh100:8 for two machines, found h100:2x4"),
        ("h100:16", "--topology: a machine has up to 8 h100, found 16; give machines and cards, as 2xh100:8"),
        ("l4:9", "--topology: a machine has up to 8 l4, found 9"),
        ("2xl4:1", "--topology: what joins machines with l4 is not published; give one machine, as l4:1"),
        ("mi300x:8", "--topology: no chip is called mi300x; choose v5e, "),
    ],
)
def test_other_names_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(BeitJaxError) as refused:
        parse_topology(name)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("v5e:2x4", 2),  # the chip in a corner has one neighbour along each axis
        ("v5e:8x16", 3),  # the longer axis is a ring
        ("v5e:16x16", 4),
        ("v5p:2x2x1", 2),
        ("v5p:2x4x4", 3),  # less than a cube has no rings
        ("v5p:4x4x8", 6),
    ],
)
def test_the_chip_with_the_fewest_links_decides(name: str, links: int) -> None:
    found = parse_topology(name)
    assert found.bandwidth == links * found.chip.link


@pytest.mark.parametrize(
    ("name", "kind", "one_way"),
    # The bandwidth of a link in one direction as https://jax-ml.github.io/scaling-book/tpus/ states it.
    [
        ("v5e", "TPU v5 lite", 4.5e10),
        ("v6e", "TPU v6 lite", 9e10),
        ("v5p", "TPU v5p", 9e10),
        ("v4", "TPU v4", 4.5e10),
        ("tpu7x", "TPU7x", 4.5e10),
    ],
)
def test_chips_agree_with_what_others_state(name: str, kind: str, one_way: float) -> None:
    chip = CHIPS[name]
    assert chip.flops == peak_flops(kind)
    assert chip.link == pytest.approx(one_way, rel=0.12)
    if chip.clock is not None:
        assert 1.0e9 < chip.clock < 1.8e9


@pytest.mark.parametrize(("slices", "sizes"), [(2, (2, 4, 1)), (2, (4, 2, 1)), (2, (2, 2, 2)), (4, (8, 1, 1))])
def test_only_the_data_axis_crosses_slices(slices: int, sizes: tuple[int, int, int]) -> None:
    devices = [Device(id=i, slice_index=i * slices // 8) for i in range(8)]
    random.Random(0).shuffle(devices)
    mesh = arrange(sizes, devices)
    assert mesh.shape == sizes
    assert {device.id for device in mesh.flat} == set(range(8))
    where = np.vectorize(lambda device: device.slice_index)(mesh)
    per_slice = sizes[0] // slices
    expected = np.broadcast_to((np.arange(sizes[0]) // per_slice)[:, None, None], sizes)
    np.testing.assert_array_equal(where, expected)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (3, 2, 1)])
def test_a_data_axis_that_slices_do_not_divide_is_refused(sizes: tuple[int, int, int]) -> None:
    devices = [Device(id=i, slice_index=i // 4) for i in range(8)]
    message = f"--run.mesh: over 2 slices the data axis must be a multiple of 2, found {sizes[0]}"
    with pytest.raises(BeitJaxError, match=message):
        arrange(sizes, devices)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(BeitJaxError, match=r"not installed; pip install 'jax\[tpu\]'"):
        parse_topology("v5e:2x4").devices()


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v5e:2x4", "TPU v5 lite"),
        ("2xv6e:2x2", "TPU v6 lite"),
        ("v4-8", "TPU v4"),
        ("v5p-8", "TPU v5"),
        ("tpu7x-8", "TPU7x"),
    ],
)
def test_devices_are_those_of_the_topology(name: str, kind: str) -> None:
    before = dict(os.environ)
    found = parse_topology(name)
    devices = found.devices()
    assert len(devices) == found.size
    assert {device.device_kind for device in devices} == {kind}
    if found.slices > 1:
        assert {device.slice_index for device in devices} == {0, 1}
    assert dict(os.environ) == before


@needs_libtpu
@pytest.mark.tpu
def test_a_shape_that_is_not_sold_is_refused_in_one_line() -> None:
    with pytest.raises(BeitJaxError, match="--topology: libtpu refuses v5e:3x5: ") as refused:
        Slices(CHIPS["v5e"], (3, 5)).devices()
    assert "\n" not in str(refused.value)
