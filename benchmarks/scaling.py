"""A training step on 8 to 1024 chips, on paper: times by formulas, where scaling bends, which mesh to pick.

   python benchmarks/scaling.py              writes benchmarks/scaling.md in half a minute; compiles nothing
   python benchmarks/scaling.py --compile    first compiles what benchmarks/scaling.json lacks (pip install 'jax[tpu]')

The formulas are benchmarks/step_time.py. benchmarks/aot.json and benchmarks/scaling.json hold compiled programs to
check them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
from step_time import (
    RESIDUAL_PASSES,
    SCHEMES,
    SLACK,
    TEACHER_INTENSITY,
    Bend,
    Layout,
    Scheme,
    Times,
    Workload,
    bend,
    bend_of_data,
    between_slices_bytes,
    fitted,
    fixed_traffic,
    floor,
    interconnect_seconds,
    kept_bytes,
    layout,
    memory,
    product_seconds,
    shared_bytes,
    stretched,
    tensor_bytes,
    times,
    utilisation,
    workload,
)

from beit_jax.train.costs.work import BETWEEN_SLICES
from beit_jax.train.distributed.chips import CHIPS, GIB
from beit_jax.train.distributed.topology import parse_topology
from beit_jax.train.forecast.aot import report
from beit_jax.train.recipe import Recipe
from beit_jax.train.recipes import recipe_named

HERE = Path(__file__).parent
PAGE, RECORDS, COMPILED = HERE / "scaling.md", HERE / "scaling.json", HERE / "aot.json"
RECIPES = ("beit_base_pt1k", "beit_large_pt22k", "beit_large_ft22k_ft1k_384", "beit_large_ft22k_ft1k_512")
KINDS = ("v5e", "v6e")
SIZES = {8: "{}:2x4", 64: "{}:8x8", 256: "{}:16x16", 1024: "4x{}:16x16"}
WEAK = 64  # chips whose share of a recipe's batch every chip has in the tables of weak scaling
CHECKS = (
    ("beit_large_ft22k_ft1k_384", "v5e:8x8", (1, 64, 1), 1),
    ("beit_large_ft22k_ft1k_384", "v5e:2x4", (1, 4, 2), 1),
    ("beit_base_pt1k", "v5e:16x16", (256, 1, 1), 1),
)
"""Recipe, topology, mesh and parts of programs at sizes and meshes that benchmarks/aot.json does not have."""


def recomputed(name: str) -> Recipe:
    """A recipe whose blocks are computed again on the way back, as in benchmarks/aot.json."""
    recipe = recipe_named(name)
    return replace(recipe, model=replace(recipe.model, remat="block"))


@cache
def described(name: str) -> Workload:
    return workload(recomputed(name))


@cache
def kept(name: str) -> int:
    return kept_bytes(recomputed(name))


# --- Tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A scheme on so many chips. `where` None: the batch does not divide, or nothing fits."""

    work: Workload
    scheme: Scheme
    chips: int
    mesh: tuple[int, int, int]
    where: Layout | None

    @property
    def times(self) -> Times:
        assert self.where is not None
        return times(self.work, self.where)

    @property
    def slowest(self) -> float:
        return self.times.bounds[1] if self.where else float("inf")


def cases(work: Workload, chip: str, chips: int) -> list[Case]:
    """The candidate meshes."""
    topology = parse_topology(SIZES[chips].format(chip))
    found = []
    for scheme in SCHEMES:
        mesh = scheme.mesh(topology.slices, chips)
        found.append(Case(work, scheme, chips, mesh, fitted(work, layout(topology, mesh), kept(work.name))))
    return found


def best(found: Sequence[Case]) -> Case:
    """With the lowest sum: how much of it overlaps is the same guess for all."""
    return min(found, key=lambda case: case.slowest)


def table(head: Sequence[str], rows: Iterator[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *rows])


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.0995 else f"{seconds * 1e3:.1f}"


_HEAD = (
    "chips", "mesh", "images a chip", "GiB", "products", "memory (fixed)", "interconnect", "between slices",
    "step, ms", "bound", "utilisation", "images/s",
)  # fmt: skip


def steps(works: dict[int, Workload], chip: str) -> str:
    """A row for every mesh on every number of chips."""

    def rows() -> Iterator[list[str]]:
        for chips, work in works.items():
            found = cases(work, chip, chips)
            yield from (_row(case, best(found) is case) for case in found)

    return table(_HEAD, rows())


def _row(case: Case, chosen: bool) -> list[str]:
    mesh = "x".join(map(str, case.mesh))
    first = [f"{case.chips:,}", f"**{mesh}**" if chosen else mesh]
    work, where = case.work, case.where
    if where is None:
        return [*first, "cannot be", *[""] * (len(_HEAD) - 3)]
    found = case.times
    low, high = found.bounds
    share = [utilisation(work, where, seconds) for seconds in (high, low)]
    return [
        *first,
        f"{work.batch / where.chips:g}" + (f" in {where.parts}" if where.parts > 1 else ""),
        f"{memory(work, where, kept(work.name)).total / GIB:.1f}",
        ms(found.products),
        f"{ms(found.memory)} ({ms(fixed_traffic(work, where) / where.chip.hbm_bandwidth)})",
        ms(found.interconnect),
        ms(found.between_slices) if where.slices > 1 else "",
        f"{ms(low)} to {ms(high)}",
        found.bound.replace("_", " "),
        f"{share[0]:.0%} to {share[1]:.0%}",
        f"{work.batch / high:,.0f} to {work.batch / low:,.0f}",
    ]


def strong(name: str) -> dict[int, Workload]:
    return dict.fromkeys(SIZES, described(name))


def weak(name: str) -> dict[int, Workload]:
    work = described(name)
    return {chips: replace(work, batch=work.batch // WEAK * chips) for chips in SIZES}


def choices() -> str:
    """The best mesh of every recipe, kind and number of chips."""

    def rows() -> Iterator[list[str]]:
        for name in RECIPES:
            for chip in KINDS:
                cells = []
                for chips in SIZES:
                    chosen = best(cases(described(name), chip, chips))
                    low, high = chosen.times.bounds
                    cells.append(f"{'x'.join(map(str, chosen.mesh))}: {ms(low)} to {ms(high)}")
                yield [name, chip, f"{described(name).batch:,}", *cells]

    return table(("recipe", "chip", "batch", *(f"{chips:,} chips" for chips in SIZES)), rows())


def gain(few: int, many: int) -> str:
    """How much shorter steps become, least and most of all recipes and kinds."""
    found = []
    for name in RECIPES:
        for kind in KINDS:
            before, after = (best(cases(described(name), kind, chips)).slowest for chips in (few, many))
            found.append(before / after)
    return f"{min(found):.1f} to {max(found):.1f}"


def fsdp_takes(chips: int) -> str:
    """A step with fsdp over one of data alone, least and most of all recipes and kinds."""
    found = []
    for name in RECIPES:
        for kind in KINDS:
            data, fsdp = cases(described(name), kind, chips)[:2]
            found.append(fsdp.slowest / data.slowest)
    return f"{min(found):.1f} to {max(found):.1f}"


def faster() -> str:
    """Steps of v5e over those of v6e, least and most of all recipes and numbers of chips."""
    found = []
    for name in RECIPES:
        for chips in SIZES:
            slow, fast = (best(cases(described(name), kind, chips)).slowest for kind in ("v5e", "v6e"))
            found.append(slow / fast)
    return f"{min(found):.1f} to {max(found):.1f}"


def between() -> str:
    """Milliseconds between four slices of v5e, least and most of all recipes."""
    found = [best(cases(described(name), "v5e", 1024)).times.between_slices * 1e3 for name in RECIPES]
    return f"{min(found):.1f} to {max(found):.1f}"


# --- Bends ------------------------------------------------------------------------------------------------------------


def bends() -> str:
    """Where the network, and where fixed traffic of main memory, overtakes the products."""

    def rows() -> Iterator[list[str]]:
        for name in RECIPES:
            for kind in KINDS:
                work, chip = described(name), CHIPS[kind]
                network = (_range(bend(work, chip, scheme)) for scheme in SCHEMES)
                yield [name, kind, *network, *(_range(floor(work, chip, scheme)) for scheme in SCHEMES[:2])]

    head = ("network: data", "network: fsdp", "network: fsdp, tensor 2", "memory: data", "memory: fsdp")
    return table(("recipe", "chip", *head), rows())


def _range(found: Bend) -> str:
    """From how many chips on, in words."""
    if found.lines is None:
        return f"{found.rings:,.0f}"
    if found.lines <= 4:
        return "always"
    if found.rings is not None and found.rings > 256:
        return f"{found.lines:,.0f} to 255, then {found.rings:,.0f}"
    return f"{found.lines:,.0f}"


def equations() -> str:
    """The numbers of the bend of a mesh of data alone."""

    def rows() -> Iterator[list[str]]:
        for name in RECIPES:
            for kind in KINDS:
                work, chip = described(name), CHIPS[kind]
                one = stretched(chip, SCHEMES[0], 256)
                c, i = product_seconds(work, one) * 256, interconnect_seconds(work, one)
                k = 2 * work.gradient_bytes / 256 / chip.dcn
                chips = bend_of_data(work, chip)
                yield [
                    name, kind, f"{c:,.2f}", ms(i), ms(k), f"{chips:,.0f}", f"{work.batch / chips:.1f}",
                ]  # fmt: skip

    return table(("recipe", "chip", "c, s", "i, ms", "k, ms", "N", "images a chip there"), rows())


# --- Checks -----------------------------------------------------------------------------------------------------------


def compiled_rows() -> dict[str, dict[str, Any]]:
    """The programs of both files whose batch is the published one, by name; blocks are computed again in all."""
    rows = {name: entry["row"] for name, entry in json.loads(COMPILED.read_text()).items()}
    rows = {name: row for name, row in rows.items() if name.startswith("compared: ") and not name.endswith(", before")}
    rows = {name: row for name, row in rows.items() if row["topology"].partition(":")[0].endswith(KINDS)}
    return rows | (json.loads(RECORDS.read_text()) if RECORDS.exists() else {})


def laid_out(row: dict[str, Any]) -> Layout:
    mesh: tuple[int, int, int] = tuple(row["mesh"].values())
    return layout(parse_topology(row["topology"]), mesh, parts=row["accumulate"])


def checks() -> str:
    """The terms beside compiled programs."""

    def rows() -> Iterator[list[str]]:
        for row in compiled_rows().values():
            work, where = described(row["recipe"]), laid_out(row)
            sent = {one["kind"]: one["bytes"] for one in row["collectives"]}
            across = sent.pop(BETWEEN_SLICES, 0.0)
            near = shared_bytes(work, where) + tensor_bytes(work, where)
            far = between_slices_bytes(work, where)
            memory_bytes = times(work, where).memory * where.chip.hbm_bandwidth
            yield [
                row["recipe"], row["topology"], "x".join(map(str, row["mesh"].values())), str(row["accumulate"]),
                f"{work.flops * work.batch / where.chips / row['flops']:.3f}",
                f"{near / 1e6:,.0f} of {sum(sent.values()) / 1e6:,.0f}: {near / sum(sent.values()):.2f}",
                f"{far / 1e6:,.0f} of {across / 1e6:,.0f}: {far / across:.2f}" if across else "",
                f"{memory_bytes / row['traffic']:.2f}",
                f"{memory(work, where, kept(work.name)).total / GIB:.1f} of {row['memory'] / GIB:.1f}",
            ]  # fmt: skip

    head = (
        "recipe", "topology", "mesh", "parts", "products", "interconnect, MB", "between slices, MB", "traffic",
        "GiB",
    )  # fmt: skip
    return table(head, rows())


def compile_missing() -> None:
    """Compiles the programs of `CHECKS` that are not recorded, a minute or two each."""
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for name, topology, mesh, parts in CHECKS:
        key = f"{name} {topology} {'x'.join(map(str, mesh))}"
        if key in records:
            continue
        recipe = recomputed(name)
        recipe = replace(recipe, run=replace(recipe.run, mesh=mesh), optim=replace(recipe.optim, accumulate=parts))
        found = report(recipe, parse_topology(topology), largest=False, say=lambda line: print(line, file=sys.stderr))
        records[key] = found.as_dict()
        RECORDS.write_text(json.dumps(records, indent=1) + "\n")


# --- Page -------------------------------------------------------------------------------------------------------------


def page() -> str:
    sections = []
    for name in RECIPES:
        for kind in KINDS:
            share = described(name).batch // WEAK
            sections += [
                f"### {name} on {kind}, batch {described(name).batch:,}",
                steps(strong(name), kind),
                f"Weak scaling, {share} images a chip: {share * 8:,} to {share * 1024:,} a step, another recipe.",
                steps(weak(name), kind),
            ]
    return _TEXT.format(
        choices=choices(), bends=bends(), equations=equations(), checks=checks(),
        to_256=gain(64, 256), to_1024=gain(256, 1024), fsdp_8=fsdp_takes(8), fsdp_64=fsdp_takes(64),
        between=between(), faster=faster(),
        steps="\n\n".join(sections), slack=SLACK, passes=RESIDUAL_PASSES, teacher=TEACHER_INTENSITY,
    )  # fmt: skip


_TEXT = """# A step on 8 to 1024 chips, on paper

`python benchmarks/scaling.py`: nothing was run or compiled for this page. Each time is a formula of
`benchmarks/step_time.py` over the chip's data sheet (`train/distributed/topology.py`), so all of them are bounds: no
program reaches the peak. Blocks are computed again on the way back (`--model.remat block`), batches are the published
ones, in as few parts as fit. Slices: 2x4, 8x8, 16x16 chips; 1,024 chips are four slices of 256, the most that v5e and
v6e have.

## Which mesh to pick

{choices}

Mesh: data x fsdp x tensor; then ms of a step, from the longest of products, memory and both networks to their sum.
The mesh with the lowest sum is shown. In words:

1. **Data alone** (`--run.mesh -1 1 1`), whatever the number of chips and slices, as long as its state fits: 16 bytes
   a parameter, 1.4 GiB for BEiT-B and 4.6 GiB for BEiT-L, leave room on 16 GB.
2. **fsdp** (`--run.mesh SLICES -1 1`) where the state does not fit otherwise. On 8 chips a step takes {fsdp_8} times
   that of data alone, on 64 chips {fsdp_64} times: parameters travel three times a step, on 64 chips by all-reduces, of
   twice the bytes; the optimizer reads and writes less.
3. **No tensor axis.** Two chips exchange 20 bytes of every activation of every block over one link, which takes
   longer than the block's products on any number of chips. Its one use is more chips than images, as 1,024 chips for
   a batch of 512.
4. **Up to 256 chips.** From 64 to 256, four times the chips, steps become {to_256} times as short; from 256 to 1,024
   {to_1024} times. More chips pay with more images a step only (weak scaling below), which is another recipe.
5. **A v6e is {faster} v5e** for these models, not the 4.7 of its products: it has twice the memory bandwidth and
   links, no more.
6. **Slices cost little**: between four of them {between} ms on v5e, as each chip sends a 256th of the gradients.

## Where scaling bends

Chips from which on, at the recipe's own batch, something takes longer than the products. "Network": interconnect and
data centre together. "Memory": what a chip reads and writes of parameters, gradients, moments and position biases,
which more chips do not make less. Below 256 chips both axes of a slice are lines, from there on rings, with twice the
links; "a to 255, then b" is a network that is overtaken at a, catches up at 256, and is overtaken for good at b.

{bends}

With data alone it is memory that bends first, or both at once: the optimizer's traffic, rather than the network, is
what a larger pod of the same batch runs into. With fsdp it is the network.

A mesh of data alone over slices of 256 chips, solved by hand. Products take c / N seconds on N chips, c = FLOP x
batch / peak. The interconnect takes i = 2 x G x 255 / 256 / (4 links), G bytes of gradients. Between N / 256
slices it takes k x (1 - 256 / N), k = 2 x G / 256 / bandwidth. So

    c / N = i + k x (1 - 256 / N)    gives    N = (c + 256 k) / (i + k)

{equations}

An N below 256 says that the network takes longer than the products on all slices of 256 chips. Images a chip there is
the better rule: with fewer than that the network, on data alone, takes longer than the products.

## Formulas

P parameters, R those of 3 P that three passes read (all but each block's last kernel in the pass that computes blocks
again), n tokens, d width, L blocks, t, f, s: tensor axis, fsdp axis, slices; r = data x f / s chips of a slice
that share out images; images: of one such chip. Everything but the optimizer is once for each part of a batch.

    ring of m chips     all-gather, reduce-scatter: bytes x (m - 1) / m; all-reduce: twice that
    products            FLOP x batch / chips / peak
    parameters          all-gather of 2 R / t over f: bfloat16, forward, again, and backward; f > 16: all-reduce
    gradients           all-reduce of G / t over f, then of G / t / f over r / f
                        G: 2 bytes for the kernels of qkv and fc1, 4 for all other parameters
    tensor              all-reduce of images x L x n x d x (2 x 4 + 2 x 4 + 2 x 2) over t, on one link
    between slices      all-reduce of G / t / r over s
    activations         images x L x 4 x n d x (2 + out x {passes:g}); out, from 0 to 1: images x 4 x 6 n d / 128 MiB
                        - 1, images of a part: the share that does not stay on the chip
    teacher             FLOP of a tokenizer or teacher / {teacher}
    lookup of biases    3.7 x 4 x heads x n^2 / t for each table
    parameters' memory  (4 R + 2 G) / t, and 28 P / (f t) for the optimizer
    interconnect        2 links an axis where it is a ring, 1 where it is a line; tensor groups share one axis's links

Rings and axes: https://jax-ml.github.io/scaling-book/. What travels, in which type and how often: the compiled
programs below.

## The formulas beside compiled programs

Programs of [aot.md](aot.md) and of `python benchmarks/scaling.py --compile`; "a of b: q" is the formula, the program,
and their ratio. tests/benchmarks/test_step_time.py holds products to 1.5 % and bytes
within a slice to 0.78 to 1.17 (on data alone in one slice to 6 %), and traffic of main memory to 0.8 to 1.35.

{checks}

* Interconnect: of a frozen tokenizer's gathers the formula counts one a step. It counts three gathers of parameters, of
  which the program saves a part. Gradients that the formula takes for float32 (patches, head) sometimes travel as
  bfloat16.
* Between slices: the program pads shares, and sends those of qkv and fc1 partly in float32.
* Traffic: the numbers of passes are fitted to these programs. How much of a block stays on the chip with few images is
  the roughest of them.
* The programs are of 16 chips, without a tensor axis. What the formulas say of more chips and of a tensor axis was seen
  in programs of before the kernels of attention, and of before parameters were gathered ahead of their products.
* GiB: `estimate.Memory`, without what the compiler adds. Meshes above are taken to fit with {slack} times as
  much; one program, with a tokenizer and on two slices, took 2.2 times as much.

## What is not counted

Latency: if a hop takes a microsecond, an all-reduce over 16x16 takes 32 of them at least, which adds 1.6 ms to a step
of BEiT-L with data alone and 3.3 ms with fsdp (49 and 103 of them). Products below peak: norms, softmax, small shapes
on 128 x 128 units; libtpu's own estimate of all kernels in a row is 1.2 to 1.4 times the sums of [aot.md](aot.md).
Tokenizers' activations. Input: 1,000 images/s take four cores of a host (RESULTS.md), and 100,000 images/s take four
hundred. Shared networks.

## Tables

"Images a chip", "in 2": in two parts, one after the other. GiB: `estimate.Memory`. Times in ms; "fixed" is that part
of memory's that does not depend on images. Step: the longest to the sum. Utilisation: the model's own operations over
the peak. "Cannot be": the batch does not divide over the chips.

{steps}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the programs that scaling.json lacks")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine, if there is one, stays free
    if options.compile:
        compile_missing()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
