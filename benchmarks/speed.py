"""Our speed beside transformers', timm's and torch.compile's: the same weights, inputs and threads, taking turns.

    python benchmarks/speed.py                            # every case for a CPU
    python benchmarks/speed.py --only forward --rounds 3
    python benchmarks/speed.py --threads 1 --cpu-time    # on a machine that others use too
    python benchmarks/speed.py --device gpu --json FILE

Needs transformers, timm, ONNX Runtime with onnxscript, OpenVINO, and a C++ compiler; what is not installed is left out
and named. Every implementation runs in a process of its own (`contenders.py`); a case counts only if all of them
compute the same. Then they take turns, in another order every round, while the others sleep. "ours is faster by" is the
median over rounds of the other's time divided by ours; its range stands beside it. "ours, XLA" is ours without the
kernels of a CPU.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, HIDDEN, Job

from beit_jax.config import BeitConfig
from beit_jax.convert import export
from beit_jax.images import preset
from beit_jax.models.build import param_shapes
from beit_jax.train.costs.estimate import flops
from beit_jax.variants import VARIANTS
from beit_jax.weights import NativeCheckpoint, save

TURN = 1.5  # seconds that a contender computes before the next one does
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest output
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "timm", "onnxruntime", "openvino", "numpy")
PRODUCTS = ("ours", "torch")
FORWARD = tuple(name for name in CONTENDERS if name != "torch")  # which has products only
ALL = tuple(name for name in FORWARD if name not in ("onnxruntime", "openvino"))  # which do not train
NO_TIMM = tuple(name for name in ALL if not name.startswith("timm"))


@dataclass(frozen=True)
class Case:
    """One row of comparisons.

    Attributes:
        kind: as of `contenders.Job`.
        size: "base" or "large".
        image: pixels of a side.
    """

    kind: str
    size: str
    image: int
    batch: int
    contenders: tuple[str, ...] = ALL
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.size[0].upper()}/16 {self.image}, batch {self.batch}, {self.dtype}"

    @property
    def config(self) -> BeitConfig:
        """With timm's epsilon, transformers' blocks to segment by, and nothing random, so that all compute the same."""
        ending = {"pretrain": "_pt22k", "segment": "_ade20k"}.get(self.kind, "")
        base = VARIANTS[f"beit_{self.size}_patch16_{640 if self.kind == 'segment' else 224}{ending}"]
        config = replace(base, image_size=(self.image, self.image), layer_norm_eps=1e-6, drop_path_rate=0.0)
        return replace(config, feature_taps="hf") if self.kind == "segment" else config

    @property
    def gigaflops(self) -> float:
        """Of the model, per call."""
        found = flops(self.config)
        if self.kind == "products":
            return self.batch * found.dense / 1e9
        return self.batch * (found.training() if self.kind in ("finetune", "pretrain") else found.forward) / 1e9


CPU = (
    Case("products", "base", 224, 8, PRODUCTS),
    *(Case("forward", "base", image, batch, FORWARD) for image in (224, 384) for batch in (1, 8)),
    Case("forward", "base", 512, 1, FORWARD),
    Case("finetune", "base", 224, 8),
    Case("pretrain", "base", 224, 8, NO_TIMM),
    Case("segment", "base", 640, 1, NO_TIMM),
)
_FAST = ("ours", "transformers, sdpa, compiled", "timm", "timm, compiled")
GPU = (
    Case("products", "large", 224, 64, PRODUCTS, "bfloat16"),
    *(
        Case("forward", size, image, batch, _FAST, "bfloat16")
        for size in ("base", "large")
        for image, batch in ((224, 1), (224, 128), (384, 64))
    ),
    *(Case("finetune", size, 224, batch, _FAST, "bfloat16") for size, batch in (("base", 128), ("large", 64))),
    Case("pretrain", "base", 224, 128, NO_TIMM, "bfloat16"),
    Case("pretrain", "large", 224, 64, NO_TIMM, "bfloat16"),
    Case("segment", "base", 640, 4, NO_TIMM, "bfloat16"),
)


def prepare(case: Case, directory: Path) -> None:
    """The weights of a case, drawn with unit gain so that activations keep their size, and its inputs."""
    rng, config = np.random.default_rng(0), case.config
    tokens = 1 + config.grid[0] * config.grid[1]
    if case.kind == "products":
        hidden, wide, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden))
        kernels = {
            f"kernel{i}": rng.standard_normal((depth, *s), np.float32) * s[0] ** -0.5 for i, s in enumerate(shapes)
        }
        np.savez(directory / "inputs.npz", x=rng.standard_normal((case.batch * tokens, hidden), np.float32), **kernels)
        return
    params = {}
    for name, shape in param_shapes(config).items():
        draw = rng.standard_normal(shape, np.float32)
        params[name] = draw * fan_in(name, shape) ** -0.5 if name.endswith("kernel") else 0.1 * draw
        if name.endswith(("scale", "var")):
            params[name] = 1 + np.abs(params[name])
    checkpoint = NativeCheckpoint(config, preset("timm", config.image_size), params)
    (directory / "native").mkdir()
    save(directory / "native", checkpoint)
    export(checkpoint, directory / "hf", "hf")
    if any(name.startswith("timm") for name in case.contenders):
        export(checkpoint, directory / "timm", "timm")
    image = rng.integers(0, 256, (case.batch, case.image, case.image, 3), np.uint8)
    np.savez(
        directory / "inputs.npz",
        image=image,
        pixels=(image / np.float32(255) - np.float32(0.5)) / np.float32(0.5),
        label=rng.integers(0, 1000, case.batch, np.int32),
        mask=rng.permuted(np.tile(np.arange(tokens - 1) < HIDDEN, (case.batch, 1)), axis=1),
        tokens=rng.integers(0, 8192, (case.batch, tokens - 1), np.int32),
    )


def fan_in(name: str, shape: Sequence[int]) -> int:
    """Inputs that one output of a kernel sums over."""
    stacked = "blocks/" in name
    if name.endswith("qkv_kernel"):
        return shape[1]
    return int(np.prod(shape[stacked:-1]))


class Contender:
    """A process that computes when it is told to."""

    def __init__(self, job: Job, stack: ExitStack):
        command = [sys.executable, str(Path(__file__).with_name("contenders.py")), job.encoded()]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": str(job.threads)}
        self.errors = stack.enter_context(Path(job.output).with_suffix(".errors").open("w+"))
        self.process = stack.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
            )
        )
        stack.callback(self.process.kill)
        self.job = job
        self.ready = self._answer()
        self.calls, self.rounds = 1, list[list[float]]()
        self.calls = max(1, round(TURN / statistics.median(self._turn())))

    def measure(self) -> None:
        """One turn."""
        self.rounds.append(self._turn())

    @property
    def medians(self) -> list[float]:
        """Seconds of a call, in every round."""
        return [statistics.median(taken) for taken in self.rounds]

    def _turn(self) -> list[float]:
        assert self.process.stdin
        self.process.stdin.write(f"{self.calls}\n")
        self.process.stdin.flush()
        return list(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(f"{self.job.contender} failed at {self.job.kind}:\n{self.errors.read()}")
        return json.loads(line)


def run(
    case: Case, rounds: int, accelerator: bool, contenders: Sequence[str], threads: int = 0, cpu_time: bool = False
) -> dict[str, Any]:
    """Measures a case."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        directory, running = Path(temporary), dict[str, Contender]()
        prepare(case, directory)
        for number, name in enumerate(contenders):
            output = directory / f"{number}.npy"
            job = Job(
                name, case.kind, str(directory), str(output), case.dtype, threads or os.cpu_count() or 1, accelerator
            )
            job = replace(job, cpu_time=cpu_time)
            running[name] = Contender(job, stack)
        difference = check(case, running)
        for turn in range(rounds):
            order = list(running.values())
            for contender in order[turn % len(order) :] + order[: turn % len(order)]:
                contender.measure()
    mine = running["ours"].medians
    return {
        "case": case.name,
        "gigaflops": case.gigaflops,
        "largest_relative_difference": difference,
        "contenders": {
            name: {
                "seconds": statistics.median(contender.medians),
                "rounds": contender.medians,
                "ours_is_faster_by": ratio_of(contender.medians, mine),
                **contender.ready,
            }
            for name, contender in running.items()
        },
    }


def ratio_of(theirs: Sequence[float], mine: Sequence[float]) -> list[float]:
    """Least, median and largest ratio of the same round."""
    ratios = [one / other for one, other in zip(theirs, mine, strict=True)]
    return [min(ratios), statistics.median(ratios), max(ratios)]


def check(case: Case, running: dict[str, Contender]) -> float:
    """The largest difference of any outputs from ours, as a share of ours; ends the program if it is too large."""
    mine = np.load(running["ours"].job.output)
    worst = 0.0
    for name, contender in running.items():
        found = np.load(contender.job.output)
        if case.kind == "segment" and found.shape != mine.shape:
            found = np.moveaxis(found, -3, -1)
        share = float(np.abs(found - mine).max() / np.abs(mine).max())
        if not share <= TOLERANCE[case.dtype]:
            sys.exit(f"{case.name}: {name} computes something else than ours: {share:.1e} of the largest output")
        worst = max(worst, share)
    return worst


def installed() -> list[str]:
    """Contenders whose packages there are."""
    return [name for name in CONTENDERS if name.startswith("ours") or find_spec(name.split(",")[0])]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"### {result['case']}",
        "",
        f"{result['gigaflops']:.0f} GFLOP a call; outputs agree to {result['largest_relative_difference']:.0e}.",
        "",
        "| | ms a call | GFLOP/s | ours is faster by | first call, s | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["contenders"].items():
        low, middle, high = found["ours_is_faster_by"]
        ratio = "" if name == "ours" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            f"| {name} | {found['seconds'] * 1e3:.4g} | {result['gigaflops'] / found['seconds']:,.0f} | {ratio} | "
            f"{found['first_call_seconds']:.1f} | {found['peak_bytes'] / 1e9:.2f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--contenders", default="", help="contenders likewise; ours is always one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of each contender; by default one for every core")
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's seconds, not the clock's")
    parser.add_argument("--json", type=Path, help="write the results to this file too, after every case")
    options = parser.parse_args()
    there, cases = installed(), CPU if options.device == "cpu" else GPU
    for name in sorted(set(CONTENDERS) - set(there)):
        print(f"{name}: not installed, left out", file=sys.stderr)
    versions = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES if find_spec(name)
    }
    print(", ".join(f"{name} {version}" for name, version in versions.items()), end="\n\n")
    results = []
    for case in cases:
        if not re.search(options.only, case.name):
            continue
        theirs = [name for name in case.contenders if name in there and re.search(options.contenders, name)]
        chosen = [name for name in case.contenders if name == "ours" or name in theirs]
        results.append(run(case, options.rounds, options.device == "gpu", chosen, options.threads, options.cpu_time))
        print(table(results[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"versions": versions, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
