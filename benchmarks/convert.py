"""Conversion against a plain file copy: BEiT-large (1.2 GB) in Hugging Face format, interleaved, warm cache.

    python benchmarks/convert.py [--repeat 5] [--json FILE]

Prints the medians, their ratio, and the peak memory of a converting process beyond that of one that has only imported
what it needs. Needs 4 GB of free disk in the temporary directory; writes random weights there and removes them.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from beit_jax.convert import convert, to_torch
from beit_jax.hub import resolve
from beit_jax.models.build import param_shapes
from beit_jax.variants import VARIANTS

VARIANT = "beit_large_patch16_224_pt22k"


def make_source(directory: Path) -> Path:
    """A Hugging Face directory of the variant with random weights."""
    config, rng = VARIANTS[VARIANT], np.random.default_rng(0)
    params = {name: rng.standard_normal(shape, np.float32) for name, shape in param_shapes(config).items()}
    directory.mkdir()
    save_file(to_torch(config, params), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    return directory


def seconds_of_copy(source: Path, scratch: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source / "model.safetensors", scratch / "copy")
    elapsed = time.perf_counter() - start
    (scratch / "copy").unlink()
    return elapsed


def seconds_of_conversion(source: Path, scratch: Path) -> float:
    start = time.perf_counter()
    convert(resolve(source), scratch / "native")
    elapsed = time.perf_counter() - start
    shutil.rmtree(scratch / "native")
    return elapsed


def peak_memory(*arguments: str) -> int:
    """Bytes of resident memory at the peak of a fresh process that runs `child` with these arguments."""
    run = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, check=True)
    return int(run.stdout)


def child(arguments: list[str]) -> None:
    """Plans a conversion (imports, tracing, names and shapes) and, given a destination, does it; prints the peak."""
    from beit_jax.convert import plan

    plan(resolve(arguments[0])).checkpoint.close()
    if len(arguments) > 1:
        convert(resolve(arguments[0]), Path(arguments[1]))
    status = Path("/proc/self/status").read_text()  # getrusage's peak would be inherited from the parent
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="rounds of one copy and one conversion")
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        source = make_source(scratch / "source")
        copies, conversions = [], []
        for _ in range(options.repeat):
            copies.append(seconds_of_copy(source, scratch))
            conversions.append(seconds_of_conversion(source, scratch))
        baseline = peak_memory(str(source))
        result = {
            "variant": VARIANT,
            "bytes": (source / "model.safetensors").stat().st_size,
            "copy_seconds": statistics.median(copies),
            "convert_seconds": statistics.median(conversions),
            "copy_all": copies,
            "convert_all": conversions,
            "ratio": statistics.median(conversions) / statistics.median(copies),
            "peak_bytes_beyond_baseline": peak_memory(str(source), str(scratch / "native")) - baseline,
            "baseline_bytes": baseline,
        }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
