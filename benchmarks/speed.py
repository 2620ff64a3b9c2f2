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
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, HIDDEN, TRAINING

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.peers.bench import versions
from beit_jax.peers.job import INPUTS, Job, cores
from beit_jax.peers.needs import NEEDS, missing
from beit_jax.peers.race import Contender, ContenderFailed, require_same, summary, take_turns
from beit_jax.peers.same_model import drawn, inputs, write
from beit_jax.train.costs.estimate import flops
from beit_jax.variants import VARIANTS

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "timm", "onnxruntime", "openvino", "numpy")
PROCESS = (sys.executable, str(Path(__file__).with_name("contenders.py")))
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
        return self.batch * (found.training() if self.kind in TRAINING else found.forward) / 1e9


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
    layouts = ("hf", "timm") if any(name.startswith("timm") for name in case.contenders) else ("hf",)
    for refused in write(drawn(config, rng), directory, layouts).values():
        sys.exit(refused)
    np.savez(
        directory / INPUTS,
        **inputs(config, case.batch, rng),
        label=rng.integers(0, 1000, case.batch, np.int32),
        mask=rng.permuted(np.tile(np.arange(tokens - 1) < HIDDEN, (case.batch, 1)), axis=1),
        tokens=rng.integers(0, 8192, (case.batch, tokens - 1), np.int32),
    )


def run(
    case: Case, rounds: int, accelerator: bool, contenders: Sequence[str], threads: int = 0, cpu_time: bool = False
) -> dict[str, Any]:
    """Measures a case."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        directory, running = Path(temporary), dict[str, Contender]()
        prepare(case, directory)
        try:
            for number, name in enumerate(contenders):
                job = Job(
                    name,
                    case.kind,
                    temporary,
                    str(directory / f"{number}.npy"),
                    case.dtype,
                    threads or cores(),
                    accelerator,
                    cpu_time,
                    outputs=2 if case.kind in TRAINING else 1,
                )
                running[name] = Contender(job, stack, PROCESS)
            difference = require_same(running, case.name)
            take_turns(list(running.values()), rounds)
        except ContenderFailed as error:
            sys.exit(f"{error}\n{error.errors}")
        except BeitJaxError as error:
            sys.exit(str(error))
    return {
        "case": case.name,
        "gigaflops": case.gigaflops,
        "largest_relative_difference": difference,
        "contenders": summary(running),
    }


def installed() -> list[str]:
    """Contenders whose packages there are."""
    return [name for name in CONTENDERS if not (missing(name) if name in NEEDS else find_spec(name) is None)]


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
    found = versions(PACKAGES)
    print(", ".join(f"{name} {version}" for name, version in found.items()), end="\n\n")
    results = []
    for case in cases:
        if not re.search(options.only, case.name):
            continue
        theirs = [name for name in case.contenders if name in there and re.search(options.contenders, name)]
        chosen = [name for name in case.contenders if name == "ours" or name in theirs]
        results.append(run(case, options.rounds, options.device == "gpu", chosen, options.threads, options.cpu_time))
        print(table(results[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"versions": found, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
