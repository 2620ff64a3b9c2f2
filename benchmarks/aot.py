"""Published recipes compiled for TPUs: memory, collectives and bounds of the step time, without a TPU.

   python benchmarks/aot.py [--only WORD ...] [--largest]

Needs `pip install 'jax[tpu]'`; a row takes one to three minutes on two cores, with `--largest` three times as long.
Rows that benchmarks/aot.json has are not compiled again; delete it to start anew. Each row is compiled in a process of
its own, and then benchmarks/aot.md is written.

Every recipe keeps its published batch. Where that is too much for the chips at once, it is computed in parts.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

GIB, MIB = 2**30, 2**20
HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "aot.json", HERE / "aot.md"
COUNTING = 4
"""Of this program's ways to count and of the training step's programs; rows of earlier ones are compiled again."""
IS = " as it is"
TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v6e:4x4", "2xv5e:4x4")


@dataclass(frozen=True)
class Kind:
    """How a recipe is laid out, to be compared on several topologies.

    Attributes:
        images: on a chip at once, at most; of v5e, and of v6e, which has twice the memory.
        sharded: whether parameters, moments and gradients are split over the chips of a slice.
    """

    recipe: str
    remat: str
    images: int
    sharded: bool


KINDS = (
    Kind("beit_base_pt1k", "block", 128, sharded=False),
    Kind("beit_large_pt22k", "block", 64, sharded=True),
    Kind("beit_base_ft22k_ft1k_384", "block", 64, sharded=False),
    Kind("beit_large_ft22k_ft1k_384", "block", 64, sharded=True),
    Kind("beit_large_ft22k_ft1k_512", "block", 32, sharded=True),
)


AS_THEY_ARE = (
    "beit_base_pt22k",
    "data2vec_large_800",
    "beit_large_ade20k_640",
    "beitv2_large_ft21k",
    "dvae",
    "vqkd_base",
    "beit_base_ft22k",
    "beit_large_ade20k",
    "beitv2_large_pt1k",
    "beit_large_ft22k_ft1k_512",
    "beit_base_ade20k_640",
)
"""Recipes compiled without a change for the topology they name: of every kind those that need most."""


def compiled(kind: Kind | None, recipe_name: str, name: str, *, largest: bool) -> dict[str, Any]:
    """The numbers of a row."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine, if there is one, stays free

    from beit_jax.train.distributed.topology import parse_topology
    from beit_jax.train.forecast.aot import report
    from beit_jax.train.recipes import recipe_named

    topology, recipe = parse_topology(name), recipe_named(recipe_name)
    if kind is None:
        return report(recipe, topology, largest=largest, say=lambda line: print(line, file=sys.stderr)).as_dict()
    at_once = topology.chips * kind.images * (2 if topology.chip.name == "v6e" else 1)
    mesh = (topology.slices, -1, 1) if kind.sharded else (-1, 1, 1)
    recipe = replace(
        recipe,
        model=replace(recipe.model, remat=kind.remat),
        optim=replace(recipe.optim, accumulate=max(1, recipe.data.batch_size // at_once)),
        run=replace(recipe.run, mesh=mesh),
    )
    return report(recipe, topology, largest=largest, say=lambda line: print(line, file=sys.stderr)).as_dict()


def page(records: dict[str, dict[str, Any]]) -> str:
    """The tables and what they say."""
    head = (
        "recipe", "topology", "mesh", "remat", "batch", "parts", "GiB of", "TFLOP", "GB", "FLOP/B", "collectives, MB",
        "step, ms", "compiler, ms", "utilisation", "largest",
    )  # fmt: skip
    tables = []
    for carried in (False, True):
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name, record in records.items():
            if name.endswith(IS) == carried:
                lines.append("| " + " | ".join(_cells(record["row"])) + " |")
        tables.append("\n".join(lines))
    return _TEXT.format(table=tables[0], carried=tables[1], versions=versions())


def _cells(row: dict[str, Any]) -> list[str]:
    mesh = "x".join(str(size) for size in row["mesh"].values())
    memory = f"{row['memory'] / GIB:.2f} of {row['hbm'] / GIB:.2f}" + ("" if row["fits"] else " **too much**")
    first = [row["recipe"], row["topology"], mesh, row["remat"], f"{row['batch']:,}", str(row["accumulate"]), memory]
    largest = "" if row["largest_batch"] is None else f"{row['largest_batch']:,}"
    if not row["fits"]:
        return [*first, *[""] * 7, largest]
    collectives = ", ".join(f"{one['kind']} {one['count']:,}: {one['bytes'] / 1e6:,.0f}" for one in row["collectives"])
    low, high = (f"{seconds * 1e3:,.0f}" for seconds in row["step_seconds"])
    kernels, best = row["kernel_seconds"], row["utilisation"]
    spread = f"{best[1]:.0%} to {best[0]:.0%}"
    return [
        *first,
        f"{row['flops'] / 1e12:.1f}",
        f"{row['traffic'] / 1e9:.0f}",
        f"{row['intensity']:.0f}",
        collectives,
        f"{low} to {high}",
        "" if kernels is None else f"{kernels * 1e3:,.0f}",
        spread,
        largest,
    ]


_TEXT = """# Recipes compiled for TPUs

`python benchmarks/aot.py`: the sharded training step of published recipes, compiled by libtpu for chips that nobody had
at hand. Nothing was run. {versions}.

## On four topologies

{table}

## As they are

Without a change, on the topology that each names (`beit-jax aot RECIPE`): eleven, of every kind those that need most.

{carried}

## What the columns say

Mesh: data x fsdp x tensor. Batch: the published one, of all chips; parts: computed one after the other. The columns
from TFLOP on are of one chip in one step. Collectives: how many, and the MB that reach a chip; "between slices" crosses
the data centre's network, everything else stays within a slice. Step: the longest of products, memory and networks by
the data sheets (`train/distributed/topology.py` names them), and their sum. Compiler: what libtpu reckons with for all
kernels in a row, transfers apart, and for the kernels of attention, of which it knows no cycles, their products at the
chip's peak; for v6e the clock that would turn its cycles into time is not published. Utilisation: the model's own
operations, without what is computed again, over the chips' peak, if a step took these bounds. Largest: the largest
batch that fits in as many parts, where it was looked for (`--largest`).

The kernels of attention count with the products that they say they have (4 n n e of a head forward, 10 backward, where
scores are computed again) and with their arrays, each read or written once: scores stay on the chip.
"""


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu", "flax"))


def cases() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Every row: its name, the recipe, the topology, and how the recipe is laid out."""
    from beit_jax.train.recipes import recipe_named

    for kind in KINDS:
        for topology in TOPOLOGIES:
            yield f"{kind.recipe} {topology}", kind.recipe, topology, asdict(kind)
    for name in AS_THEY_ARE:
        recipe = recipe_named(name)
        as_it_is = {"remat": recipe.model.remat, "mesh": list(recipe.run.mesh), "parts": recipe.optim.accumulate}
        yield f"{name}{IS}", name, recipe.topology, as_it_is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="rows that one of these words is part of")
    parser.add_argument("--largest", action="store_true", help="look for the largest batch too")
    options = parser.parse_args()
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    rows = list(cases())
    for name, recipe, topology, chosen in rows:
        layout = chosen | {"versions": versions(), "counting": COUNTING}
        known = records.get(name, {})
        done = known.get("layout") == layout and (known["row"]["largest_batch"] is not None or not options.largest)
        if done or not any(word in name for word in options.only):
            continue
        command = [sys.executable, __file__, "--child", recipe, topology, str(name.endswith(IS))]
        found = subprocess.run([*command, str(options.largest)], stdout=subprocess.PIPE, text=True, check=True)
        records[name] = {"layout": layout, "row": json.loads(found.stdout)}
        records = {name: records[name] for name, *_ in rows if name in records}
        RECORDS.write_text(json.dumps(records, indent=1) + "\n")
        PAGE.write_text(page(records))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        recipe, topology, as_it_is, largest = sys.argv[2:]
        chosen = None if as_it_is == "True" else next(kind for kind in KINDS if kind.recipe == recipe)
        print(json.dumps(compiled(chosen, recipe, topology, largest=largest == "True")))
    else:
        main()
