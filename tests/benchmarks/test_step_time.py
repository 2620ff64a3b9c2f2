"""The formulas of scaling: limits, numbers computed by hand, and the programs that libtpu compiled."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import pytest
from scaling import compiled_rows
from step_time import (
    LOOKUP_PASSES,
    ON_CHIP,
    RESIDUAL_PASSES,
    RESIDUALS_AT_ONCE,
    SCHEMES,
    SLACK,
    TEACHER_INTENSITY,
    Layout,
    Workload,
    activation_traffic,
    all_gather,
    all_reduce,
    bend,
    bend_of_data,
    between_slices_bytes,
    fitted,
    fixed_traffic,
    floor,
    gradient_bytes,
    kept_bytes,
    layout,
    memory,
    parameter_bytes,
    position_bias_traffic,
    product_seconds,
    reduce_scatter,
    shared_bytes,
    stretched,
    tensor_bytes,
    times,
    utilisation,
    workload,
)

from beit_jax.models.build import num_params
from beit_jax.train.costs.work import BETWEEN_SLICES
from beit_jax.train.distributed.chips import CHIPS
from beit_jax.train.distributed.topology import Topology, parse_topology
from beit_jax.train.forecast.aot import abstract_program
from beit_jax.train.recipes import recipe_named

V5E = CHIPS["v5e"]
DATA, FSDP, TENSOR = SCHEMES
# 2 blocks of 5 tokens, width 8, 2 heads; 1000 parameters, of which 600 have gradients of two bytes.
TOY = Workload(
    name="toy", batch=64, flops=3e12, model_flops=2e12, parameters=1000, narrow=600, frozen=0, teacher_flops=0,
    tokens=5, width=8, heads=2, blocks=2, biases=2, passes=3,
)  # fmt: skip
GRADIENTS = 2 * 600 + 4 * 400


def on(name: str, mesh: tuple[int, int, int], parts: int = 1) -> Layout:
    return layout(parse_topology(name), mesh, parts=parts)


def test_rings() -> None:
    """Every chip sends what it has to its neighbour, then what it got: 3 of 4 quarters reach each, in 3 steps."""
    own, reached = [{chip} for chip in range(4)], [0] * 4
    for step in range(3):
        for chip in range(4):
            own[chip].add((chip - 1 - step) % 4)
            reached[chip] += 25  # bytes of a quarter
    assert all(len(parts) == 4 for parts in own)
    assert reached == [all_gather(100, 4)] * 4 == [75] * 4
    assert reduce_scatter(100, 4) == 75
    assert all_reduce(100, 4) == all_gather(100, 4) + reduce_scatter(100, 4)


def test_one_chip_has_no_network() -> None:
    alone = times(TOY, on("v5e:1x1", (1, 1, 1)))
    assert alone.network == 0
    assert alone.products == pytest.approx(64 * 3e12 / 197e12)


def test_data_by_hand() -> None:
    """Eight chips as 2 x 4: no rings, so one link along each axis, 50 GB/s each."""
    eight = on("v5e:2x4", (8, 1, 1))
    assert eight.bandwidth == 2 * 50e9
    assert parameter_bytes(TOY, eight) == 0
    assert gradient_bytes(TOY, eight) == 2 * GRADIENTS * 7 / 8
    assert times(TOY, eight).interconnect == pytest.approx(2 * GRADIENTS * 7 / 8 / 100e9)


def test_fsdp_by_hand() -> None:
    """Three gathers of bfloat16 parameters; gradients are summed as they are over data."""
    eight = on("v5e:2x4", (1, 8, 1))
    assert parameter_bytes(TOY, eight) == 3 * 2 * 1000 * 7 / 8
    assert gradient_bytes(TOY, eight) == 2 * GRADIENTS * 7 / 8


def test_fsdp_beside_data() -> None:
    """All-reduced over 4, then each quarter over 2."""
    both = on("v5e:2x4", (2, 4, 1))
    assert gradient_bytes(TOY, both) == 2 * GRADIENTS * 3 / 4 + 2 * GRADIENTS / 4 * 1 / 2


def test_large_groups_gather_by_reducing() -> None:
    sixteen, more = on("v5e:4x4", (1, 16, 1)), on("v5e:8x8", (1, 64, 1))
    assert parameter_bytes(TOY, sixteen) == 6000 * 15 / 16
    assert parameter_bytes(TOY, more) == 2 * 6000 * 63 / 64


def test_looking_biases_up_takes_memory_alone() -> None:
    """So many passes over two matrices of 2 heads, 5 x 5 tokens, four bytes each; a tensor axis splits the heads."""
    without = replace(TOY, biases=0)
    eight, two = on("v5e:2x4", (8, 1, 1)), on("v5e:2x4", (1, 4, 2))
    assert position_bias_traffic(TOY, eight) == pytest.approx(LOOKUP_PASSES * 2 * (2 * 5 * 5 * 4))
    assert position_bias_traffic(TOY, two) == position_bias_traffic(TOY, eight) / 2
    assert position_bias_traffic(without, eight) == 0
    assert times(without, eight).network == times(TOY, eight).network


def test_few_images_stay_on_the_chip() -> None:
    """Of 64 images six arrays like a block's residual stream: where they fit, its input alone passes."""
    one = on("v5e:1x1", (1, 1, 1))
    once = 64 * 2 * 5 * 8 * 4  # bytes of all inputs
    assert activation_traffic(TOY, one) == 2 * once
    images = ON_CHIP / (4 * RESIDUALS_AT_ONCE * 5 * 8)
    fits, half, none = (replace(TOY, batch=round(images * share)) for share in (0.99, 1.5, 2))
    per_image = [activation_traffic(work, one) / work.batch - 2 * once / 64 for work in (fits, half, none)]
    passed = 2 * 4 * RESIDUAL_PASSES * 5 * 8
    assert per_image == pytest.approx([0, passed / 2, passed], rel=1e-4)


def test_a_mesh_of_fsdp_reads_and_writes_what_one_of_data_does() -> None:
    """Parameters are gathered before they are multiplied: no partial sums pass through memory."""
    large = replace(TOY, tokens=5000, batch=1024)
    data, split = on("v5e:4x4", (16, 1, 1)), on("v5e:4x4", (1, 16, 1))
    assert activation_traffic(large, data) == activation_traffic(large, split)


def test_teachers_pass_through_memory() -> None:
    taught = replace(TOY, teacher_flops=1e9)
    one = on("v5e:1x1", (1, 1, 1))
    added = times(taught, one).memory - times(TOY, one).memory
    assert added == pytest.approx(64 * 1e9 / TEACHER_INTENSITY / V5E.hbm_bandwidth)


def test_tensor_by_hand() -> None:
    """Per block two sums forward, two again, four bytes each, and two backward, two bytes each: 20 bytes a value."""
    two = on("v5e:2x4", (1, 4, 2))
    assert tensor_bytes(TOY, two) == 16 * 2 * 5 * 8 * 20
    assert two.bandwidth == 50e9, "the other axis is all that is left"
    assert parameter_bytes(TOY, two) == 3 * 2 * 500 * 3 / 4
    once = replace(TOY, passes=2)
    assert tensor_bytes(once, two) == 16 * 2 * 5 * 8 * 12


def test_slices_exchange_their_own_share() -> None:
    """Four slices of 16: each chip has a sixteenth of the gradients, three quarters of it twice over the network."""
    expected = 2 * GRADIENTS / 16 * 3 / 4
    for mesh in ((64, 1, 1), (4, 16, 1), (16, 4, 1)):
        assert between_slices_bytes(TOY, on("4xv5e:4x4", mesh)) == pytest.approx(expected)
    assert between_slices_bytes(TOY, on("v5e:8x8", (64, 1, 1))) == 0
    seconds = times(TOY, on("4xv5e:4x4", (64, 1, 1))).between_slices
    assert seconds == pytest.approx(expected / (6.4e12 / 8 / 256))


def test_slices_leave_the_interconnect_alone() -> None:
    one, four = on("v5e:16x16", (256, 1, 1)), on("4xv5e:16x16", (1024, 1, 1))
    assert times(TOY, one).interconnect == times(TOY, four).interconnect


def test_parts_exchange_once_each() -> None:
    for mesh in ((8, 1, 1), (1, 8, 1)):
        once, twice = on("v5e:2x4", mesh), on("v5e:2x4", mesh, parts=2)
        assert shared_bytes(TOY, twice) == 2 * shared_bytes(TOY, once)
        assert times(TOY, twice).products == times(TOY, once).products


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_weak_scaling_keeps_products_and_activations(scheme: Any) -> None:
    """Chips and images doubled: the same products; no network grows beyond twice, however many chips."""
    small, large = (stretched(V5E, scheme, chips) for chips in (64, 128))
    double = replace(TOY, batch=2 * TOY.batch)
    assert times(double, large).products == times(TOY, small).products
    assert times(double, large).interconnect == pytest.approx(times(TOY, small).interconnect, rel=0.02)


def test_strong_scaling_halves_products_only() -> None:
    small, large = on("v5e:4x8", (32, 1, 1)), on("v5e:8x8", (64, 1, 1))
    assert times(TOY, large).products == times(TOY, small).products / 2
    assert fixed_traffic(TOY, large) == fixed_traffic(TOY, small)
    assert times(TOY, large).interconnect > times(TOY, small).interconnect


def test_links() -> None:
    """Rings from 16 chips on; groups that a tensor axis leaves side by side share its links."""
    found = {
        "v5e:8x8": on("v5e:8x8", (64, 1, 1)).bandwidth,
        "v5e:16x16": on("v5e:16x16", (256, 1, 1)).bandwidth,
        "tensor": on("v5e:16x16", (1, 128, 2)).bandwidth,
        "tensor, lines": on("v5e:8x8", (1, 32, 2)).bandwidth,
    }
    assert {name: value / 50e9 for name, value in found.items()} == {
        "v5e:8x8": 2, "v5e:16x16": 4, "tensor": 3, "tensor, lines": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["v5e", "v6e"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_stretched_sizes_are_those_of_topologies(kind: str, scheme: Any) -> None:
    """Where a topology exists, the continuous formula is that of the topology."""
    for name, chips in ((f"{kind}:8x8", 64), (f"{kind}:16x16", 256), (f"4x{kind}:16x16", 1024)):
        topology = parse_topology(name)
        assert stretched(CHIPS[kind], scheme, chips) == layout(topology, scheme.mesh(topology.slices, chips))


# --- Bends


KEPT = 135_947_853  # bytes of an image of it


@cache
def large() -> Workload:
    """BEiT-L at 384 pixels, 512 images, by numbers."""
    return Workload(
        name="large", batch=512, flops=1426.9e9, model_flops=1145.5e9, parameters=304_998_888, narrow=176_160_768,
        frozen=0, teacher_flops=0, tokens=577, width=1024, heads=16, blocks=24, biases=24, passes=3,
        unread=24 * 1024 * 4096,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["v5e", "v6e"])
@pytest.mark.parametrize("scheme", [DATA, FSDP], ids=lambda scheme: scheme.name)
def test_network_and_products_are_equal_at_the_bend(kind: str, scheme: Any) -> None:
    found, chip = bend(large(), CHIPS[kind], scheme), CHIPS[kind]
    assert found.lines is not None and found.lines > 2
    for chips in {found.lines, found.rings} - {256}:
        assert chips is not None
        at, before, after = (times(large(), stretched(chip, scheme, chips * factor)) for factor in (1, 0.99, 1.01))
        assert at.network == pytest.approx(at.products, rel=1e-6)
        assert before.network < before.products < 1.05 * after.network
    fixed_bend = floor(large(), chip, scheme)
    where = fixed_bend.lines or fixed_bend.rings
    assert where is not None
    at_floor = stretched(chip, scheme, where)
    fixed = fixed_traffic(large(), at_floor) / chip.hbm_bandwidth
    assert fixed == pytest.approx(product_seconds(large(), at_floor), rel=1e-6)


def test_bend_of_data_is_the_formula_solved() -> None:
    assert bend(large(), V5E, DATA).rings == pytest.approx(bend_of_data(large(), V5E), rel=1e-6)
    twice = replace(large(), batch=2 * large().batch)
    ratio = bend_of_data(twice, V5E) / bend_of_data(large(), V5E)
    assert 1.5 < ratio < 2, "more images bend it later, but the network between slices grows on the way"


def test_a_tensor_axis_is_never_hidden() -> None:
    """Both it and the products shrink alike with more chips: no number of chips helps."""
    assert bend(large(), V5E, TENSOR).lines == 4
    assert tensor_bytes(large(), stretched(V5E, TENSOR, 64)) / V5E.link > product_seconds(
        large(), stretched(V5E, TENSOR, 64)
    )


@pytest.mark.parametrize("kind", ["v5e", "v6e"])
@pytest.mark.parametrize("chips", [64, 256])
def test_data_alone_is_best_on_many_chips(kind: str, chips: int) -> None:
    """What benchmarks/scaling.md advises."""
    sums = [times(large(), stretched(CHIPS[kind], scheme, chips)).bounds[1] for scheme in SCHEMES]
    assert sums == sorted(sums)


# --- Memory and recipes


def test_parts_are_the_fewest_that_fit() -> None:
    whole = on("v5e:2x4", (8, 1, 1))
    found = fitted(large(), whole, KEPT)
    assert found is not None and found.parts > 1
    fewer = replace(found, parts=found.parts // 2)
    assert SLACK * memory(large(), found, KEPT).total <= V5E.hbm < SLACK * memory(large(), fewer, KEPT).total
    assert fitted(large(), on("4xv5e:16x16", (1024, 1, 1)), KEPT) is None, "512 images for 1024 chips"
    assert fitted(large(), on("4xv5e:16x16", (4, 128, 2)), KEPT) is not None


def test_fsdp_splits_the_state() -> None:
    data, split = (memory(large(), on("v5e:8x8", mesh), KEPT) for mesh in ((64, 1, 1), (1, 64, 1)))
    assert data.activations == split.activations
    assert data.params == 4 * large().parameters and split.params == -(-data.params // 64)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_recipe_is_described_by_its_own_model(remat: Any) -> None:
    recipe = recipe_named("beit_large_ft22k_ft1k_384")
    recipe = replace(recipe, model=replace(recipe.model, remat=remat))
    program = abstract_program(replace(recipe, run=replace(recipe.run, mesh=(1, 1, 1))), jax.devices()[:1])
    found = workload(recipe)
    assert found.parameters == num_params(program.config) == 304_998_888
    assert found.narrow == 24 * (3 + 4) * 1024**2
    assert (found.tokens, found.blocks, found.biases, found.frozen) == (577, 24, 24, 0)
    last = 2 * 577 * 24 * 1024 * 4096 / found.model_flops  # of a block, which is not computed again
    expected = {"none": 1.014, "block": 4 / 3 + 0.014 - last}[remat]
    assert found.flops / found.model_flops == pytest.approx(expected, rel=0.01)
    if remat == "block":
        assert found.flops == pytest.approx(large().flops, rel=1e-4)
        assert kept_bytes(recipe) == KEPT


@pytest.mark.thorough
def test_aggregation_layers_are_described() -> None:
    """Two blocks more, the frozen tokenizer, and a head that predicts twice."""
    found = workload(recipe_named("beitv2_base_pt1k"))
    hidden = 768
    kernels = 14 * 12 * hidden**2 + 16**2 * 3 * hidden + hidden * 8192
    assert found.blocks == 14 and found.biases == 1 and found.frozen > 0
    assert 1 < found.parameters / kernels < 1.01
    assert kept_bytes(recipe_named("beitv2_base_pt1k")) > kept_bytes(recipe_named("beit_base_pt22k"))


def test_utilisation_counts_the_model_alone() -> None:
    one = Layout(V5E, V5E.link, 1, 1)
    assert utilisation(TOY, one, product_seconds(TOY, one)) == pytest.approx(2 / 3)


# --- Compiled programs


@cache
def recomputed(name: str) -> Workload:
    recipe = recipe_named(name)
    return workload(replace(recipe, model=replace(recipe.model, remat="block")))


@pytest.mark.parametrize("name", compiled_rows())
def test_terms_are_those_of_compiled_programs(name: str) -> None:
    """Products within 1.5 %. Bytes within a slice from 0.78 to 1.17 of the compiled, between slices from 0.75.

    On data alone in one slice they are gradients and nothing else, within 6 %: position biases are summed as tables.
    What is not met: some gathers serve two passes, and a tokenizer's parameters are gathered more than once; between
    slices a share is padded.
    """
    row = compiled_rows()[name]
    topology: Topology = parse_topology(row["topology"])
    mesh: Any = tuple(row["mesh"].values())
    work, where = recomputed(row["recipe"]), layout(topology, mesh, parts=row["accumulate"])
    assert row["remat"] == "block"
    assert work.flops * work.batch / where.chips == pytest.approx(row["flops"], rel=0.015)
    sent = {one["kind"]: one["bytes"] for one in row["collectives"]}
    across = sent.pop(BETWEEN_SLICES, 0.0)
    near = shared_bytes(work, where) + tensor_bytes(work, where)
    assert 0.78 < near / sum(sent.values()) < 1.17
    if mesh == (where.chips, 1, 1) and where.slices == 1:
        assert near == pytest.approx(sum(sent.values()), rel=0.06)
    assert 0.8 < times(work, where).memory * where.chip.hbm_bandwidth / row["traffic"] < 1.35
    far = between_slices_bytes(work, where)
    assert 0.75 < far / across < 1.0 if across else far == 0
