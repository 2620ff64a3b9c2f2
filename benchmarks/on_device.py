"""What nobody could measure without a GPU or a TPU: start this on one, and keep what it prints.

    python benchmarks/on_device.py --json FILE          on a machine with a GPU or a TPU; ends within six minutes
    python benchmarks/on_device.py --quick              anywhere: kernels interpreted, small models, no times that count

Needs `pip install -e '.[train]'` and JAX for the device; for the comparisons on a GPU also torch for it, and
transformers. First which device it is. Then attention by the kernels of `beit_jax/kernels`: averages, and gradients of
queries, keys, values and the bias table, each beside the textbook form on the same device, both against float64 of
NumPy; and the time of both. Then forward passes and training steps, as `speed.py` takes them, with the model's FLOPs
over the peak of the device; on a GPU beside transformers (sdpa, torch.compile).

What would not end in time is left out, and said. The exit code is 1 if a kernel is not as exact as the textbook form.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import speed
from speed import Case

from beit_jax.config import BeitConfig
from beit_jax.peers.bench import versions
from beit_jax.train.costs.estimate import peak_flops

MINUTES = 6.0
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "torch", "transformers")
NAMES = ("averages", "queries", "keys", "values", "table")
"""Of results: the averages, and the gradients of all else."""
WORSE = {"bfloat16": 1.1, "float32": 2.0}
"""How many times as far from float64 as the textbook form a kernel may be."""
CLOSE = {"bfloat16": 1e-2, "float32": 1e-5}
"""Or how far of the norm in any case."""


@dataclass(frozen=True)
class Heads:
    """Attention of one size.

    Attributes:
        side: patches of a side; tokens are one more than its square.
        batch: of which times are taken; what is compared are two images.
    """

    side: int
    heads: int
    width: int
    batch: int

    @property
    def tokens(self) -> int:
        return 1 + self.side**2

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, {self.heads} heads of {self.width}"


ATTENTION = (Heads(14, 12, 64, 128), Heads(24, 16, 64, 32), Heads(32, 16, 64, 16))
QUICK_ATTENTION = (Heads(3, 2, 64, 2),)


@dataclass(frozen=True)
class Small(Case):
    """A model that is computed anywhere in a moment."""

    @property
    def config(self) -> BeitConfig:
        size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        return replace(super().config, **size)


THEIRS = "transformers, sdpa, compiled"
MODELS = (
    Case("forward", "base", 224, 128, ("ours", THEIRS), "bfloat16"),
    Case("finetune", "base", 224, 128, ("ours", THEIRS), "bfloat16"),
    Case("finetune", "large", 384, 16, ("ours", THEIRS), "bfloat16"),
    Case("forward", "large", 384, 32, ("ours", THEIRS), "bfloat16"),
)
QUICK_MODELS = (Small("forward", "base", 32, 2, ("ours",)), Small("finetune", "base", 32, 2, ("ours",)))


# --- Attention, in a process of its own: a TPU belongs to one process at a time


def attention(quick: bool) -> Iterator[dict[str, Any]]:
    """Which device, and of every size and dtype how exact kernels and textbook form are, and how fast."""
    import jax

    if quick:
        jax.config.update("jax_platforms", "cpu")
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    yield {
        "kind": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory": memory,
        "peak": peak_flops(device.device_kind),
    }
    for size in QUICK_ATTENTION if quick else ATTENTION:
        for dtype in ("bfloat16", "float32"):
            for target in ("tpu", "gpu") if quick else (device.platform,):
                yield compared(size, dtype, target, device, quick=quick)


def compared(size: Heads, dtype: str, target: str, device: Any, *, quick: bool) -> dict[str, Any]:
    """Of one size and dtype: the distance from float64 of both forms, as a share of its norm, and their times."""
    import jax
    import jax.numpy as jnp

    from beit_jax.models.attention import attend
    from beit_jax.train.distributed.sharding import make_mesh

    rng = np.random.default_rng(0)
    n, e, offsets = size.tokens, size.width, (2 * size.side - 1) ** 2 + 3
    shapes = (2, n, 3, size.heads, e), (offsets, size.heads), (2, n, size.heads, e)
    drawn = [rng.standard_normal(shape, np.float32) for shape in shapes]
    qkv, upstream = (np.asarray(jnp.asarray(drawn[place], dtype), np.float32) for place in (0, 2))
    given = jnp.asarray(qkv, dtype), jnp.asarray(drawn[1]), jnp.asarray(upstream, dtype)
    true = exact(qkv, drawn[1], upstream, size.side)
    found: dict[str, Any] = {"size": size.name, "dtype": dtype, "kernels": target, "batch": size.batch}
    with ExitStack() as stack:
        if quick:
            stack.enter_context(interpreted(target))
        stack.enter_context(jax.set_mesh(make_mesh((1, 1, 1), [device])))
        stack.enter_context(jax.default_matmul_precision("highest" if dtype == "float32" else "default"))
        for name, form in (("kernel", attend), ("textbook", unwrap(attend))):
            run = jax.jit(partial(both_ways, form, size.side))
            if name == "kernel" and "pallas_call" not in str(jax.make_jaxpr(run)(*given)):
                return found | {"kernels": None}  # none for this dtype on this device
            start = time.perf_counter()
            try:
                made = [np.asarray(one, np.float64) for one in run(*given)]
            except Exception as error:  # of a compiler or a driver, by whatever name
                return found | {"failed": f"{name}: {str(error).splitlines()[0]}"}
            seconds = time.perf_counter() - start
            errors = dict(zip(NAMES, map(apart, made, true), strict=True))
            found[name] = {"errors": errors, "first_call_seconds": seconds}
            if not quick:
                found[name]["seconds"] = timed(run, (tiled(given[0], size), given[1], tiled(given[2], size)))
    return found


@contextmanager
def interpreted(target: str) -> Iterator[None]:
    from beit_jax.kernels import gpu, tpu

    with {"tpu": tpu, "gpu": gpu}[target].interpreted():
        yield


def both_ways(form: Callable[..., Any], side: int, qkv: Any, table: Any, upstream: Any) -> tuple[Any, ...]:
    """The averages, and the gradients of queries, keys, values and the table."""
    import jax

    from beit_jax.models.position import attention_bias

    def averages(qkv: Any, table: Any) -> Any:
        return form(qkv, attention_bias(table, (side, side), (side, side), "bicubic", len(qkv)).written)[0]

    found, back = jax.vjp(averages, qkv, table)
    of_qkv, of_table = back(upstream)
    return found, *(of_qkv[:, :, part] for part in range(3)), of_table


def exact(qkv: np.ndarray, table: np.ndarray, upstream: np.ndarray, side: int) -> tuple[np.ndarray, ...]:
    """The same by NumPy in float64, by the formulas of softmax's derivative."""
    from beit_jax.models.attention import relative_position_index

    index = relative_position_index((side, side))
    query, key, value = np.moveaxis(qkv.astype(np.float64), (2, 3), (0, 2))
    given = np.swapaxes(upstream.astype(np.float64), 1, 2)
    scale = query.shape[-1] ** -0.5
    scores = scale * query @ np.swapaxes(key, -1, -2) + np.moveaxis(table.astype(np.float64)[index], -1, 0)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = given @ np.swapaxes(value, -1, -2)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True))
    of_table = np.zeros(table.shape)
    np.add.at(of_table, index, np.moveaxis(of_scores.sum(0), 0, -1))
    results = (
        weights @ value,
        scale * of_scores @ key,
        scale * np.swapaxes(of_scores, -1, -2) @ query,
        np.swapaxes(weights, -1, -2) @ given,
    )
    return *(np.swapaxes(one, 1, 2) for one in results), of_table


def apart(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def tiled(two: Any, size: Heads) -> Any:
    """So many images as times are taken of."""
    import jax.numpy as jnp

    return jnp.tile(two, (size.batch // 2, *[1] * (two.ndim - 1)))


def timed(run: Callable[..., Any], given: tuple[Any, ...]) -> float:
    """Seconds of a call: the median of many, each of which waits for its end."""
    import jax

    jax.block_until_ready(run(*given))
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(run(*given))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a kernel failed, or is further from float64 than the textbook form."""
    if "failed" in row:
        return True
    if row["kernels"] is None:
        return False
    mine, other, dtype = row["kernel"]["errors"], row["textbook"]["errors"], row["dtype"]
    return any(not mine[name] <= max(WORSE[dtype] * other[name], CLOSE[dtype]) for name in NAMES)


# --- Models


def models(device: dict[str, Any], until: float, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Every case that ends in time, one after the other."""
    longest = 0.0
    there = speed.installed()
    for case in QUICK_MODELS if quick else MODELS:
        known = [name for name in case.contenders if name in there and (name == "ours" or device["platform"] == "gpu")]
        begin = time.monotonic()
        if begin + longest > until:
            yield {"case": case.name, "left_out": "no time is left"}
            continue
        try:
            found = speed.run(case, 2, device["platform"] != "cpu", known)
        except SystemExit as error:  # a contender that failed, or computes something else
            found = {"case": case.name, "failed": str(error)}
        longest = max(longest, time.monotonic() - begin)
        for one in found.get("contenders", {}).values():
            peak = device["peak"]
            one["utilisation"] = None if peak is None else found["gigaflops"] * 1e9 / one["seconds"] / peak
        yield found


# --- Report


def attention_lines(row: dict[str, Any]) -> Iterator[str]:
    head = f"attention, {row['size']}, {row['dtype']}"
    if "failed" in row:
        yield f"{head}: FAILED, {row['failed']}"
        return
    if row["kernels"] is None:
        yield f"{head}: the textbook form, there is no kernel"
        return
    verdict = "WRONG" if is_wrong(row) else "right"
    errors = ", ".join(
        f"{name} {row['kernel']['errors'][name]:.1e} ({row['textbook']['errors'][name]:.1e})" for name in NAMES
    )
    yield f"{head}, {row['kernels']}: {verdict}; from float64, of its norm, kernel (textbook form): {errors}"
    if "seconds" in row["kernel"]:
        mine, other = row["kernel"]["seconds"], row["textbook"]["seconds"]
        yield f"  forward and backward, {row['batch']} images: {mine * 1e3:.3g} ms ({other * 1e3:.3g} ms)"


def model_lines(row: dict[str, Any]) -> Iterator[str]:
    if "contenders" not in row:
        yield f"{row['case']}: {'FAILED, ' + row['failed'] if 'failed' in row else 'left out, ' + row['left_out']}"
        return
    for name, one in row["contenders"].items():
        share = "" if one["utilisation"] is None else f", {one['utilisation']:.0%} of the peak"
        ratio = "" if name == "ours" else f", {one['ours_is_faster_by'][1]:.2f} of our time"
        yield (
            f"{row['case']}: {name} {one['seconds'] * 1e3:.4g} ms{share}{ratio}, "
            f"{one['peak_bytes'] / 1e9:.1f} GB at most, first call {one['first_call_seconds']:.0f} s"
        )


def driver() -> str | None:
    """What NVIDIA's tool says of the card: name, driver, limit of power."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def child(quick: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """What `attention` yields in another process, as far as it comes in time."""
    command = [sys.executable, str(Path(__file__)), "--child", *(["--quick"] if quick else [])]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    until = time.monotonic() + seconds
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        for line in process.stdout:
            yield json.loads(line)
            if time.monotonic() > until:
                process.kill()
                return
        if process.wait():
            sys.exit(f"attention failed, exit code {process.returncode}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers to this file, after every one of them")
    parser.add_argument("--quick", action="store_true", help="on a CPU: that this program works")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the longest that it may take")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    found: dict[str, Any] = {"versions": versions(PACKAGES), "driver": driver(), "attention": [], "models": []}

    def keep(lines: Iterator[str]) -> None:
        for line in lines:
            print(line, flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1, default=asdict) + "\n")

    rows = child(options.quick, 0.4 * 60 * options.minutes)
    found["device"] = device = next(rows)
    memory = "" if device["memory"] is None else f", {device['memory'] / 2**30:.1f} GiB"
    keep(iter([f"{device['kind']} ({device['platform']}, {device['devices']}{memory}); {found['driver'] or ''}"]))
    if device["platform"] == "cpu" and not options.quick:
        rows.close()
        print("no GPU and no TPU here: JAX sees a CPU; --quick shows that this program works", file=sys.stderr)
        return 2
    keep(iter([", ".join(f"{name} {version}" for name, version in versions.items())]))
    for row in rows:
        found["attention"].append(row)
        keep(attention_lines(row))
    for row in models(device, start + 60 * options.minutes, quick=options.quick):
        found["models"].append(row)
        keep(model_lines(row))
    found["seconds"] = time.monotonic() - start
    wrong = [row for row in found["attention"] if is_wrong(row)]
    failed = [row for row in found["models"] if "failed" in row]
    keep(iter([f"{found['seconds']:.0f} s; {len(wrong)} kernels wrong, {len(failed)} models failed"]))
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    if "--child" in sys.argv:
        for one in attention("--quick" in sys.argv):
            print(json.dumps(one), flush=True)
    else:
        sys.exit(main())
