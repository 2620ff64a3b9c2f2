"""TPU topologies: their names, what their chips can do, and the order of devices over slices."""

import importlib.util
import os
import random
from dataclasses import dataclass

import numpy as np
import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.train.costs.estimate import peak_flops
from beit_jax.train.distributed.topology import CHIPS, Topology, arrange, parse_topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: jax[tpu]")


@dataclass(frozen=True)
class Device:
    """As much of a device as the order of a mesh depends on."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "none"


@pytest.mark.parametrize("name", ["v5e:2x4", "v6e:4x4", "v5p:2x2x2", "2xv5e:4x4", "3xv5p:4x4x4"])
def test_names_are_read_and_written_alike(name: str) -> None:
    assert parse_topology(name).name == name


def test_chips_are_those_of_all_slices() -> None:
    found = parse_topology("2xv5e:4x8")
    assert (found.slices, found.shape, found.slice_chips, found.chips) == (2, (4, 8), 32, 64)
    assert found.slice_name == "v5e:4x8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x4", "--topology: no chip is called v9; choose v5e, v6e, v5p"),
        ("v5e:2x2x2", "--topology: v5e has 2 axes, as v5e:2x2, found v5e:2x2x2"),
        ("v5p:2x4", "--topology: v5p has 3 axes, as v5p:2x2x2, found v5p:2x4"),
        ("v5e-8", "--topology: expected a chip and a shape, as v5e:2x4 or 2xv5e:4x4, found v5e-8"),
        ("0xv5e:2x4", "--topology: expected a chip and a shape, as v5e:2x4 or 2xv5e:4x4, found 0xv5e:2x4"),
        ("v5e:2x\x1b[31m", "--topology: expected a chip and a shape, as v5e:2x4 or 2xv5e:4x4, found"),
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
    [("v5e", "TPU v5 lite", 4.5e10), ("v6e", "TPU v6 lite", 9e10), ("v5p", "TPU v5p", 9e10)],
)
def test_chips_agree_with_what_others_state(name: str, kind: str, one_way: float) -> None:
    chip = CHIPS[name]
    assert chip.flops == peak_flops(kind)
    assert chip.link == pytest.approx(one_way, rel=0.12)
    if chip.clock is not None:
        assert 1.4e9 < chip.clock < 1.8e9


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
@pytest.mark.parametrize(("name", "kind"), [("v5e:2x4", "TPU v5 lite"), ("2xv6e:2x2", "TPU v6 lite")])
def test_devices_are_those_of_the_topology(name: str, kind: str) -> None:
    before = dict(os.environ)
    topology = parse_topology(name)
    devices = topology.devices()
    assert len(devices) == topology.chips
    assert {device.device_kind for device in devices} == {kind}
    if topology.slices > 1:
        assert {device.slice_index for device in devices} == {0, 1}
    assert dict(os.environ) == before


@needs_libtpu
@pytest.mark.tpu
def test_a_shape_that_is_not_sold_is_refused_in_one_line() -> None:
    with pytest.raises(BeitJaxError, match="--topology: libtpu refuses v5e:3x5: ") as refused:
        Topology(CHIPS["v5e"], (3, 5)).devices()
    assert "\n" not in str(refused.value)
