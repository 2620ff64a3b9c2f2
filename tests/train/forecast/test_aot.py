"""Recipes compiled for machines that are not there: the same program as a run's, and what is said of it."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor
from beit_jax.train.costs.work import BETWEEN_SLICES, Collective, Work
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.distributed.chips import GIB
from beit_jax.train.distributed.topology import parse_topology
from beit_jax.train.forecast.aot import Attempt, Report, abstract_program, largest_batch, memory_needed, report
from beit_jax.train.loop.plan import make_plan
from beit_jax.train.recipe import Recipe
from beit_jax.train.recipes import recipe_named
from beit_jax.weights import NativeCheckpoint

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: jax[tpu]")


def test_the_program_is_that_of_a_run(tmp_path: Path) -> None:
    prepare_digits(tmp_path / "digits")
    recipe = recipe_named("digits_finetune")
    plan = make_plan(recipe, tmp_path / "digits")
    ours = abstract_program(recipe, jax.devices()[:1], images=len(plan.training))
    with jax.set_mesh(plan.mesh):
        theirs = plan.step.lower(plan.abstract_state, ours.abstract_batch)
    assert ours.lower().as_text() == theirs.as_text()
    assert ours.abstract_state == plan.abstract_state


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("beit_large_ft22k", 21_841),  # classes of the variant
        ("beit_base_ft1k", 1000),
        ("beit_base_ade20k", 150),
        ("beit_base_linear", 1000),
        ("digits_finetune", 10),
    ],
)
def test_labels_are_as_many_as_the_variant_was_published_with(name: str, outputs: int) -> None:
    assert abstract_program(_for_one_device(name), jax.devices()[:1]).config.num_labels == outputs


@pytest.mark.parametrize(
    ("name", "steps"),
    # ADE20K's published steps; 100 epochs of 1,251 batches; 60 of 42.
    [("beit_base_ade20k", 160_000), ("beit_base_ft1k", 125_100), ("digits_finetune", 2_520)],
)
def test_schedules_are_as_long_as_a_run_is(name: str, steps: int) -> None:
    assert abstract_program(_for_one_device(name), jax.devices()[:1]).steps == steps


@pytest.mark.parametrize("name", ["beit_base_pt1k", "beitv2_base_pt1k", "data2vec_base_800", "vqkd_base", "dvae"])
def test_tokenizers_and_teachers_are_there_by_their_shapes(name: str) -> None:
    program = abstract_program(_for_one_device(name), jax.devices()[:1])
    frozen = sum(leaf.size for leaf in jax.tree.leaves((program.abstract_state.average, program.abstract_state.frozen)))
    # DALL-E's encoder as published; VQ-KD's 12 + 3 blocks of 7.09; a teacher as large as the model.
    millions = {
        "beit_base_pt1k": 53.8,
        "beitv2_base_pt1k": 15 * 7.09 + 3,
        "data2vec_base_800": 86.6,
        "vqkd_base": 86,
        "dvae": 0,
    }
    assert frozen / 1e6 == pytest.approx(millions[name], rel=0.02, abs=0.1)
    assert ("token_image" in program.abstract_batch) == (name == "beit_base_pt1k")  # at 112 pixels, the dVAE's


def _for_one_device(name: str) -> Recipe:
    recipe = recipe_named(name)
    return replace(recipe, run=replace(recipe.run, mesh=(-1, 1, 1)), optim=replace(recipe.optim, accumulate=1))


class Chip:
    """Memory of a chip over the batch, and what was asked of it."""

    def __init__(self, memory: int, needs: list[tuple[int, int]]):
        self.memory, self.needs, self.asked = memory, dict(needs), list[int]()

    def attempt(self, batch: int) -> Attempt:
        self.asked.append(batch)
        needed = self.needs[batch]
        return Attempt(batch, needed, object() if needed <= self.memory else None, 0.0)  # type: ignore[arg-type]

    def largest(self, batch: int, unit: int) -> int | None:
        return largest_batch(self.attempt(batch), self.attempt, unit, self.memory)


def line(start: int, per_image: int, unit: int) -> list[tuple[int, int]]:
    return [(unit * 2**k, start + per_image * unit * 2**k) for k in range(12)]


@pytest.mark.parametrize("first", [8, 32, 256, 1024])
def test_the_largest_batch_on_a_line_takes_three_programs(first: int) -> None:
    chip = Chip(16_000, line(1_000, 20, 8))
    assert chip.largest(first, 8) == 512  # 11,240 of 16,000, and twice as many images need 21,480
    assert len(chip.asked) <= 3
    assert 512 in chip.asked  # confirmed, not only foretold


def test_where_memory_is_no_line_smaller_batches_are_tried() -> None:
    needs = [(8, 1_000), (16, 1_100), (32, 4_000), (64, 9_000), (128, 20_000), (256, 41_000), (512, 90_000)]
    chip = Chip(16_000, [*needs, (1024, 180_000)])
    assert chip.largest(8, 8) == 64


def test_no_batch_fits_a_model_that_is_too_large() -> None:
    chip = Chip(16_000, line(20_000, 20, 8))
    assert chip.largest(64, 8) is None
    assert chip.asked[-1] == 8


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (32.03G) "
            "exceeds available HBM (15.75G).",
            int(32.03 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 640.50M of 15.75G hbm.",
            int(640.5 * 2**20),
        ),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)
def test_what_the_compiler_asks_for_is_read(message: str, needed: int | None) -> None:
    assert memory_needed(message) == needed


def test_bounds_follow_from_the_data_sheet() -> None:
    topology = parse_topology("2xv5e:2x4")
    collectives = (Collective("all-reduce", 3, 2e9), Collective(BETWEEN_SLICES, 2, 6.25e8))
    made = Report(
        recipe=recipe_named("beit_base_ft1k"),
        topology=topology,
        mesh={"data": 16, "fsdp": 1, "tensor": 1},
        memory=4 * GIB,
        work=Work(flops=19.7e12, traffic=81.9e9, cycles=300_000_000, collectives=collectives, unknown_loops=0),
        model_flops=16 * 9.85e12,
        largest=2048,
        seconds=60.0,
    )
    # 19.7 TFLOP at 197 a second; 81.9 GB at 819; 2 GB over two links of 50; 0.625 GB of 200 Gb/s for 8 chips.
    expected = {"products": 0.1, "memory": 0.1, "network": 0.02, "between slices": 0.2}
    assert made.times == pytest.approx(expected)
    assert made.bounds == pytest.approx((0.2, 0.42))
    assert made.utilisation(0.1) == pytest.approx(0.5)
    assert made.kernels == pytest.approx(0.2, rel=0.01)  # 300 million cycles of 1.5 GHz
    opaque = replace(made, work=replace(made.work, opaque=1.97e12))
    assert opaque.kernels == pytest.approx(0.21, rel=0.01)  # and a hundredth of what the chip multiplies in a second
    printed = "\n".join(made.lines())
    assert "4.00 of 15.75 GiB a chip: fits" in printed
    assert "utilisation 25% to 12%" in printed
    assert json.loads(json.dumps(made.as_dict()))["largest_batch"] == 2048


def test_instructions_that_are_not_known_are_named() -> None:
    made = Work(1e12, 1e9, cycles=0, collectives=(), unknown_loops=0, unknown=("scaled-dot", "warp-gather"))
    found = Report(recipe_named("beit_base_ft1k"), parse_topology("v5e:2x4"), {"data": 8}, GIB, made, 1e12, None, 1.0)
    assert "counted by their shapes: scaled-dot, warp-gather" in "\n".join(found.lines())
    assert json.loads(json.dumps(found.as_dict()))["unknown"] == ["scaled-dot", "warp-gather"]
    known = replace(found, work=replace(made, unknown=()))
    assert "unknown" not in "\n".join(known.lines())


def test_a_program_that_does_not_fit_says_so() -> None:
    recipe, topology = recipe_named("beit_base_ft1k"), parse_topology("v5e:2x4")
    made = Report(recipe, topology, {"data": 8}, 32 * GIB, None, 1e15, 512, 20.0)
    assert "32.00 of 15.75 GiB a chip: DOES NOT FIT" in "\n".join(made.lines())
    assert made.as_dict()["fits"] is False


@needs_libtpu
@pytest.mark.tpu
def test_a_step_is_compiled_for_tpus() -> None:
    recipe, said = recipe_named("digits_finetune"), list[str]()
    made = report(recipe, parse_topology("v5e:2x2"), largest=False, say=said.append)
    assert said == ["compiling digits_finetune for v5e:2x2, batch 32"]
    assert made.fits and made.work is not None
    assert made.mesh == {"data": 4, "fsdp": 1, "tensor": 1}
    # The patch projection has no gradient of pixels, softmax and sums are no products: the model's own count.
    assert made.work.flops == pytest.approx(made.model_flops / 4, rel=0.05)
    program = abstract_program(recipe, jax.devices()[:1])
    learned = sum(4 * leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    # One gradient of every parameter. That of the position bias may be summed before it is brought back to its table.
    config = program.config
    tokens = 1 + config.grid[0] * config.grid[1]
    gathered = 4 * tokens**2 * config.num_attention_heads * config.num_hidden_layers
    (reduced,) = made.work.collectives
    assert reduced.kind == "all-reduce"
    assert 2 * 3 / 4 * learned <= reduced.bytes <= 2 * 3 / 4 * 1.01 * (learned + gathered)


@needs_libtpu
@pytest.mark.tpu
def test_over_slices_only_gradients_cross() -> None:
    recipe = recipe_named("digits_finetune")
    recipe = replace(recipe, run=replace(recipe.run, mesh=(2, -1, 1)))
    made = report(recipe, parse_topology("2xv5e:2x2"), largest=False)
    assert made.work is not None and made.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    crossed = {one.kind: one for one in made.work.collectives}[BETWEEN_SLICES]
    program = abstract_program(replace(recipe, run=replace(recipe.run, mesh=(-1, 1, 1))), jax.devices()[:1])
    learned = sum(4 * leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    assert crossed.bytes < 2 * learned / 4  # a quarter each, padded a little


@needs_libtpu
@pytest.mark.tpu
def test_a_mesh_that_does_not_fit_is_refused() -> None:
    recipe = recipe_named("digits_finetune")
    with pytest.raises(BeitJaxError, match="product is 4 devices"):
        report(replace(recipe, run=replace(recipe.run, mesh=(3, 1, 1))), parse_topology("v5e:2x2"))


OWN = BeitConfig(
    image_size=(32, 48),
    patch_size=(8, 8),
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=100,
    use_absolute_position_embeddings=True,
)


def test_of_a_checkpoint_the_architecture_counts() -> None:
    """And its classes, where it has some; no tensor is read."""
    recipe = _for_one_device("digits_finetune")
    start = NativeCheckpoint(OWN, ImageProcessor(resize=OWN.image_size), {})
    program = abstract_program(recipe, jax.devices()[:1], start=start)
    assert (program.config.hidden_size, program.config.image_size, program.config.num_labels) == (48, (32, 48), 10)
    assert program.abstract_batch["image"].shape == (recipe.data.batch_size, 32, 48, 3)
    classifier = replace(OWN, task="image_classification", labels=("a", "b", "c"))
    named = NativeCheckpoint(classifier, ImageProcessor(resize=OWN.image_size), {})
    assert abstract_program(recipe, jax.devices()[:1], start=named).config.num_labels == 3
    assert abstract_program(recipe, jax.devices()[:1], start=named, classes=7).config.num_labels == 7
    with pytest.raises(BeitJaxError, match=r"--init: dvae does not use it, leave it out"):
        abstract_program(_for_one_device("dvae"), jax.devices()[:1], start=start)


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "devices"),
    [("v4:2x2x1", 4), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8)],
)
def test_an_architecture_of_ones_own_is_compiled_for_every_tpu(
    topology: str, devices: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn at random, of an oblong size; with attention by kernels, and no instruction that is not known."""
    options = "--model.hidden-size 192 --model.depth 2 --model.heads 3 --model.mlp 768 --model.image-size 64 96"
    command = ["aot", "beit_base_ft1k", "--topology", topology, "--data.batch-size", "8", "--quick", "--json"]
    assert main([*command, *options.split(), "--run.mesh", "-1", "1", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["recipe"] == "beit_base_ft1k"
    assert found["devices"] == devices and found["unknown"] == [] and found["opaque"] > 0
