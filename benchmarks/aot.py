"""Published recipes compiled for TPUs and GPUs: memory, collectives and bounds of the step time, without a device.

   python benchmarks/aot.py [--only WORD ...] [--largest] [--again]
   python benchmarks/aot.py --other DIR --only compared    the same rows by the product of another checkout

Needs `pip install 'jax[tpu]'`, for cards `pip install 'beit-jax[aot-gpu]'`; rows whose compiler is not installed are
left out. A row takes one to ten minutes on two cores, with `--largest` three times as long. Each is compiled in a
process of its own, and then benchmarks/aot.md is written. Rows that benchmarks/aot.json has are not compiled again,
except by `--again`.

To compare two versions, `git worktree add DIR COMMIT` and `--other DIR`: the step is that checkout's, the compiler and
the way to count are these.

Every recipe keeps its published batch on TPUs. Where that is too much for the chips at once, it is computed in parts.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

GIB = 2**30
HERE = Path(__file__).parent
ROOT = HERE.parent
RECORDS = HERE / "aot.json"
COUNTING = 5
"""Of this program's ways to count and of the training step's programs; rows of earlier ones are compiled again."""
OTHER = ", before"
"""What the name of a row ends with that was compiled of another checkout."""


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        part: of the page.
        remat: None: the recipe as it is, for the topology that it names.
        images: on a device at once, at most.
        batch: of a step; None: the published one.
        sharded: whether parameters, moments and gradients are split over the devices of a slice.
        newest: whether the row is one of the newest JAX's only; None: of any.
    """

    part: str
    recipe: str
    topology: str
    remat: str | None = "block"
    images: int = 0
    batch: int | None = None
    sharded: bool = False
    newest: bool | None = None

    @property
    def name(self) -> str:
        line = {None: "", True: ", newest", False: ", jax 0.10"}[self.newest]
        return f"{self.part}: {self.recipe} {self.topology}".rstrip() + line


_AS_THEY_ARE = """beit_base_pt22k data2vec_large_800 beit_large_ade20k_640 beitv2_large_ft21k dvae vqkd_base
    beit_base_ft22k beit_large_ade20k beitv2_large_pt1k beit_large_ft22k_ft1k_512 beit_base_ade20k_640""".split()
"""Of every kind of recipe those that need most."""
COMPARED, EVERY, AS_THEY_ARE = "compared", "every TPU", "as it is"


def cases() -> Iterator[Case]:
    """Every row of the page."""
    for recipe, images, sharded in (
        ("beit_large_ft22k_ft1k_512", 32, True),
        ("beit_large_ft22k_ft1k_384", 64, True),
        ("beit_base_pt1k", 128, False),
        ("beit_large_pt22k", 64, True),
    ):
        yield Case(COMPARED, recipe, "v5e:4x4", images=images, sharded=sharded)
    yield Case(COMPARED, "beit_base_pt1k", "h100:1", "dots", 256, 256)
    yield Case(COMPARED, "beit_large_ft22k_ft1k_384", "h100:1", "block", 32, 32)
    for topology in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
        for newest in (False, True):
            yield Case(EVERY, "beit_base_ft1k", topology, images=64, batch=256, newest=newest)
    for recipe in _AS_THEY_ARE:
        yield Case(AS_THEY_ARE, recipe, "", None)


def compiled(case: Case, *, largest: bool) -> dict[str, Any]:
    """The numbers of a row."""
    from beit_jax.train.forecast.aot import report

    recipe, topology = laid_out(case)
    return report(recipe, topology, largest=largest, say=lambda line: print(line, file=sys.stderr)).as_dict()


def laid_out(case: Case) -> tuple[Any, Any]:
    """The recipe and the topology."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # a device of this machine, if there is one, stays free

    from beit_jax.train.distributed.topology import parse_topology
    from beit_jax.train.recipes import recipe_named

    recipe = recipe_named(case.recipe)
    topology = parse_topology(case.topology or recipe.topology)
    if case.remat is None:
        return recipe, topology
    batch = case.batch or recipe.data.batch_size
    recipe = replace(
        recipe,
        model=replace(recipe.model, remat=case.remat),
        data=replace(recipe.data, batch_size=batch),
        optim=replace(recipe.optim, accumulate=max(1, batch // (topology.size * case.images))),
        run=replace(recipe.run, mesh=(topology.slices, -1, 1) if case.sharded else (-1, 1, 1)),
    )
    return recipe, topology


# --- Another checkout


def text_of(case: Case, path: Path) -> dict[str, Any]:
    """Writes the program that this process's product makes of a row; what only the product knows of it."""
    from beit_jax.train.forecast.aot import abstract_program, compile_step

    recipe, topology = laid_out(case)
    program = abstract_program(recipe, topology.devices())
    made = compile_step(program)
    if made.compiled is not None:
        path.write_text(made.compiled.as_text() or "")
    return {
        "memory": made.needed,
        "mesh": dict(program.mesh.shape),
        "model_flops": program.objective.flops * recipe.data.batch_size,
        "seconds": made.seconds,
    }


def compiled_elsewhere(case: Case, checkout: Path) -> dict[str, Any]:
    """The numbers of a row, of another checkout's product, counted by this one."""
    from beit_jax.train.costs.work import work
    from beit_jax.train.forecast.aot import Report

    recipe, topology = laid_out(case)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "step.txt")
        environment = os.environ | {"PYTHONPATH": str(as_installed(checkout, Path(temporary, "product")))}
        found = child(["--text", encoded(case), str(path)], environment)
        counted = work(path.read_text(), topology.slice_size) if path.exists() else None
    return Report(recipe=recipe, topology=topology, work=counted, largest=None, **found).as_dict()


def as_installed(checkout: Path, place: Path) -> Path:
    """Lays a checkout's folders out as they are installed, so that `place` is one to import from."""
    package = place / "beit_jax"
    package.mkdir(parents=True)
    inside = {entry.name: entry for entry in (checkout / "beit_jax").resolve(strict=True).iterdir()}
    for name, entry in (inside | {room: checkout / room for room in ("convert", "train")}).items():
        (package / name).symlink_to(entry.resolve(strict=True))
    return place


# --- The page


def page(records: dict[str, dict[str, Any]]) -> str:
    """The tables and what they say."""
    now = {name: record for name, record in records.items() if not name.endswith(OTHER)}
    rows = {case.name: case for case in cases()}

    def part(name: str) -> list[dict[str, Any]]:
        return [now[known] for known, case in rows.items() if case.part == name and known in now]

    compared = [
        (records[name + OTHER], now[name])
        for name, case in rows.items()
        if case.part == COMPARED and name in now and name + OTHER in records
    ]
    commits = sorted({before["checkout"] for before, _ in compared})
    return _TEXT.format(
        commits=", ".join(commits),
        compared=table(_SIDE_BY_SIDE, (side_by_side(*pair) for pair in compared)),
        table=table(_HEAD, (cells(record) for record in part(COMPARED))),
        every=table(_HEAD, (cells(record) for record in part(EVERY))),
        carried=table(_HEAD, (cells(record) for record in part(AS_THEY_ARE))),
        carried_note=_OLD if any(record["layout"].get("counting") != COUNTING for record in part(AS_THEY_ARE)) else "",
    )


def table(head: Sequence[str], rows: Iterator[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *rows])


_SIDE_BY_SIDE = (
    "recipe", "topology", "mesh", "remat", "parts", "GB", "ratio", "step, upper bound, ms", "ratio", "GiB", "ratio",
    "compiled by, of",
)  # fmt: skip


def side_by_side(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Bytes, the bound that nothing overlaps and memory: before, now, and what is left of it."""
    old, new = before["row"], now["row"]
    cells = [new["recipe"], new["topology"], mesh_of(new), new["remat"], str(new["accumulate"])]
    for of in (_traffic, _upper, _memory):
        was, is_ = of(old), of(new)
        digits = 0 if was >= 100 else 1 if was >= 20 else 2
        cells += [f"{was:,.{digits}f} : {is_:,.{digits}f}", f"{is_ / was:.2f}"]
    assert compiler(before) == compiler(now), "one compiler for both"
    assert before["layout"] == now["layout"], "the same step"
    return [*cells, made_by(now)]


def _traffic(row: dict[str, Any]) -> float:
    return row["traffic"] / 1e9


def _upper(row: dict[str, Any]) -> float:
    return row["step_seconds"][1] * 1e3


def _memory(row: dict[str, Any]) -> float:
    return row["memory"] / GIB


def compiler(record: dict[str, Any]) -> str:
    """Which compiled a row, as the page says it: libtpu's version, or for cards that of JAX and its plugin."""
    versions = dict(one.split(" ") for one in record["versions"].split(", "))
    card = record["row"]["topology"].partition(":")[0].lstrip("0123456789x")[:1] in ("h", "a", "b", "l")
    return f"jax {versions['jax']}" if card else f"libtpu {versions.get('libtpu', '?')}"


def made_by(record: dict[str, Any]) -> str:
    """The compiler of a row, and the checkout."""
    return f"{compiler(record)}, {record['checkout']}" if record["checkout"] else compiler(record)


def mesh_of(row: dict[str, Any]) -> str:
    return "x".join(str(size) for size in row["mesh"].values())


_HEAD = (
    "recipe", "topology", "mesh", "remat", "batch", "parts", "GiB of", "TFLOP", "GB", "FLOP/B", "collectives, MB",
    "step, ms", "compiler, ms", "utilisation", "largest", "compiled by, of",
)  # fmt: skip


def cells(record: dict[str, Any]) -> list[str]:
    row = record["row"]
    memory = f"{row['memory'] / GIB:.2f} of {row['hbm'] / GIB:.2f}" + ("" if row["fits"] else " **too much**")
    first = [row["recipe"], row["topology"], mesh_of(row), row["remat"]]
    first += [f"{row['batch']:,}", str(row["accumulate"]), memory]
    last = ["" if row["largest_batch"] is None else f"{row['largest_batch']:,}", made_by(record)]
    if not row["fits"]:
        return [*first, *[""] * 7, *last]
    collectives = ", ".join(f"{one['kind']} {one['count']:,}: {one['bytes'] / 1e6:,.0f}" for one in row["collectives"])
    low, high = (f"{seconds * 1e3:,.0f}" for seconds in row["step_seconds"])
    kernels, best = row["kernel_seconds"], row["utilisation"]
    return [
        *first,
        f"{row['flops'] / 1e12:.1f}",
        f"{row['traffic'] / 1e9:.0f}",
        f"{row['intensity']:.0f}",
        collectives,
        f"{low} to {high}",
        "" if kernels is None else f"{kernels * 1e3:,.0f}",
        f"{best[1]:.0%} to {best[0]:.0%}",
        *last,
    ]


_OLD = """Rows without a checkout are of the training step before the kernels of attention, which needed more bytes
and memory: they were not compiled again."""
_TEXT = """# Recipes compiled for TPUs and GPUs

`python benchmarks/aot.py`: the sharded training step of published recipes, compiled by libtpu, and by XLA for GPUs, for
devices that nobody had at hand. Nothing was run: bytes, products and memory are those of the compiled programs, times
are bounds by the data sheets. Each row says which compiler made it, and of which checkout, by its last commit.

## Before the kernels of attention, and now

The step of an earlier checkout ({commits}) and this one's, by the same compiler, counted in the same way
(`--other DIR`). Before : now, and the ratio.

{compared}

## The same rows as they are now

{table}

## Every TPU

One recipe on each TPU that libtpu knows, by the oldest JAX that is supported and by the newest.

{every}

## As they are

Recipes without a change, on the topology that each names (`beit-jax aot RECIPE`).
{carried_note}

{carried}

## What the columns say

Mesh: data x fsdp x tensor. Batch: of all chips; parts: computed one after the other. The columns from TFLOP on are of
one device in one step. Collectives: how many, and the MB that reach a device; "between slices" crosses the data
centre's network, everything else stays within a slice. Step: the longest of products, memory and networks by the data
sheets (`train/distributed/chips.py` and `cards.py` name them), and their sum; the upper bound above is that sum.
Compiler, ms: what libtpu reckons with for all kernels in a row, transfers apart, and for the kernels of attention, of
which it knows no cycles, their products at the chip's peak, which is too little; for v6e and TPU7x the clock that would
turn its cycles into time is not published, and XLA for GPUs reckons with nothing. Utilisation: the model's own
operations, without what is computed again, over the chips' peak, if a step took these bounds. Largest: the largest
batch that fits in as many parts, where it was looked for (`--largest`).

**How a kernel of attention counts.** To a compiler it is a custom call that it does not look into. Its products are
what the kernel says of itself: 4 n n e of a head forward, 10 backward, where scores are computed again. Its bytes are
its arrays, with the padding of their tiles, each read or written once, also where it reads several parts of one array:
scores stay on the chip. `tests/train/costs/test_hlo.py` holds such a call as libtpu writes it, with both numbers by
hand.
"""


# --- Running


def versions() -> str:
    """Of what compiles, as far as it is there."""
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if _installed(name))


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def can_compile(case: Case) -> bool:
    """Whether this environment has the row's compiler, and is of the JAX that it asks for."""
    card = case.topology.startswith("h100")
    newest = importlib.metadata.version("jax").split(".")[:2] != ["0", "10"]
    return _installed("jax-cuda13-plugin" if card else "libtpu") and case.newest in (None, newest)


def encoded(case: Case) -> str:
    return json.dumps(asdict(case))


def child(arguments: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What another process of this program prints. It imports the product for itself: compilers keep what they are."""
    command = [sys.executable, __file__, "--child", *arguments]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=HERE)
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="rows that one of these words is part of")
    parser.add_argument("--largest", action="store_true", help="look for the largest batch too")
    parser.add_argument("--other", type=Path, metavar="DIR", help="another checkout, whose rows stand beside these")
    parser.add_argument("--again", action="store_true", help="compile rows that are there already")
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument("--records", type=Path, default=RECORDS, help="keeps all rows; the page stands beside it")
    options = parser.parse_args()
    rows = [] if options.page else [case for case in cases() if can_compile(case)]
    for case in rows:
        name = case.name + (OTHER if options.other else "")
        layout = asdict(case) | {"counting": COUNTING}
        known = read_records(options.records).get(name, {})
        done = known.get("layout") == layout and (known["row"]["largest_batch"] is not None or not options.largest)
        if (done and not options.again) or not any(word in name for word in options.only):
            continue
        if options.other:
            found = compiled_elsewhere(case, options.other)
        else:
            found = child(["--report", encoded(case), str(options.largest)])
        checkout = commit_of(options.other or ROOT)
        record = {"layout": layout, "versions": versions(), "checkout": checkout, "row": found}
        # Read again: another environment's rows may have been written meanwhile.
        records = read_records(options.records) | {name: record}
        order = [each + ending for each in (case.name for case in cases()) for ending in (OTHER, "")]
        options.records.write_text(
            json.dumps({name: records[name] for name in order if name in records}, indent=1) + "\n"
        )
        options.records.with_suffix(".md").write_text(page(read_records(options.records)))
    if options.page:
        options.records.with_suffix(".md").write_text(page(read_records(options.records)))


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, which, *rest = sys.argv[2:]
        case = Case(**json.loads(which))
        answer = compiled(case, largest=rest[0] == "True") if what == "--report" else text_of(case, Path(rest[0]))
        print(json.dumps(answer))
    else:
        main()
