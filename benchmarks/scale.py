"""Features of many small JPEGs: `beit-jax features` beside torch's DataLoader and transformers' pipeline.

    python benchmarks/scale.py                                   # 20,000 images; an hour on two cores
    python benchmarks/scale.py --images 2000 --rounds 1 --model-images 64    # a quick look
    python benchmarks/scale.py --only digits --json FILE

The images are made here. Every contender is a process of its own that begins with the files and ends with a table of
features; they take turns, in another order every round, each with a tenth of the images and with all of them. What is
compared is the difference of both, per image: without starting, loading and compiling. (Below 10,000 images ours reads
the short run without its faster libraries, which need 1,000 images, so that the difference says less.) "CPU"
counts the seconds of all of a contender's processes on all cores. "ours is faster by" is the median over rounds of the
other's time divided by ours; its range stands beside it. The forward passes alone are measured as `speed.py` does,
in the same run.

Memory is the peak of all of a contender's processes together (shared pages counted once), for all images and for half
as many more. Needs transformers and a C++ compiler (for torch.compile).
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import speed
from PIL import Image, ImageFilter

from beit_jax.convert import convert, export
from beit_jax.peers.race import ratio_of
from beit_jax.peers.same_model import drawn, write
from beit_jax.variants import VARIANTS
from beit_jax.weights import load

PARTS = 20  # folders of the images: two of them are the short run
SHORT, MORE = 2, 10  # parts of the short run, and parts beyond all images for the second measurement of memory
PAUSE = 0.2  # seconds between two looks at the memory
ALIKE = 0.999  # cosine of the angle between two contenders' features of an image; their image libraries differ
HEIGHT, WIDTH = 192, 256
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "pillow", "numpy")


@dataclass(frozen=True)
class Case:
    """A model, and who computes its features.

    Attributes:
        contenders: besides ours.
        of_model: the model counts, and not reading: fewer images, and the forward passes alone beside them.
    """

    name: str
    contenders: tuple[str, ...]
    batch: int
    of_model: bool = False


CASES = (
    Case("two layers, 224", ("loader",), 64),
    Case("digits", ("loader",), 64),
    Case("B/16", ("loader", "pipeline"), 8, of_model=True),
)


def write_images(folder: Path, count: int) -> list[Path]:
    """Different JPEGs of some ten kilobytes, in folders of `count` / PARTS, and MORE folders beyond."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (96, 128, 3), np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    picture = noise.filter(ImageFilter.GaussianBlur(1))
    parts = [folder / f"{part:02}" for part in range(PARTS + MORE)]
    for part in parts:
        part.mkdir(parents=True)
        for number in range(count // PARTS):
            left, top = rng.integers(0, (1600 - WIDTH, 1200 - HEIGHT))
            crop = picture.crop((left, top, left + WIDTH, top + HEIGHT))
            crop.save(part / f"{number:05}.jpg", quality=int(rng.integers(80, 95)))
    return parts


def write_models(case: Case, directory: Path) -> None:
    """The same weights as ``native`` and as ``hf``."""
    if case.name == "digits":
        with as_file(files("beit_jax") / "digits") as digits:
            convert(digits, directory / "native")
        export(load(directory / "native"), directory / "hf", "hf")
        return
    config = replace(VARIANTS["beit_base_patch16_224"], task="features", labels=(), layer_norm_eps=1e-6)
    if case.name != "B/16":
        small = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        config = replace(config, num_hidden_layers=2, **small)
    write(drawn(config, np.random.default_rng(0), "hf"), directory, ["hf"])


@dataclass(frozen=True)
class Usage:
    """Of one run: seconds by the clock and of all cores, and the peak of its memory, where it was looked at."""

    wall: float
    cpu: float
    peak: int = 0


def run(command: Sequence[str], *, memory: bool = False) -> Usage:
    """Runs a command to its end."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        peak = 0
        while memory and process.poll() is None:
            peak = max(peak, proportional(process.pid))
            time.sleep(PAUSE)
        # The times of a process that has ended are those of its ended children too.
        before = os.times()
        process.wait()
        wall, after = time.perf_counter() - start, os.times()
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command[:6])} ... failed:\n{output.read()[-4000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Usage(wall, cpu, peak)


def proportional(pid: int) -> int:
    """Bytes of a process and its descendants in memory, shared ones divided among those that share them; Linux."""
    total = 0
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = 1024 * int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])  # type: ignore[index]
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(map(proportional, map(int, children.read_text().split())))
    except (OSError, TypeError):  # it has just ended
        pass
    return total


def command(name: str, case: Case, models: Path, output: Path, workers: int | None, parts: Sequence[Path]) -> list[str]:
    """What a contender is started with."""
    if name == "ours":
        asked = [] if workers is None else ["--workers", f"{workers}"]
        ours = [
            "features",
            f"{models / 'native'}",
            *map(str, parts),
            "-o",
            f"{output}",
            "--batch-size",
            f"{case.batch}",
        ]
        return [sys.executable, "-m", "beit_jax", *ours, *asked]
    script, count = Path(__file__).with_name("scale_contenders.py"), max(1, (os.cpu_count() or 1) // 2)
    asked = ["--batch", f"{case.batch}", "--workers", f"{count if workers is None else workers}"]
    return [sys.executable, f"{script}", name, f"{models / 'hf'}", f"{output}", *map(str, parts), *asked]


def check(case: Case, outputs: dict[str, Path]) -> float:
    """The smallest cosine between ours and another's features of an image; ends the program if it is too small."""
    found = {
        name: np.load(path)["features"].reshape(-1, np.load(path)["features"].shape[-1])
        for name, path in outputs.items()
    }
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in found.items()}
    least = min(float((unit["ours"] * rows).sum(axis=1).min()) for rows in unit.values())
    if not least > ALIKE:
        sys.exit(f"{case.name}: contenders compute different features: a cosine of {least:.4f}")
    return least


def measure(case: Case, parts: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Measures a case."""
    with tempfile.TemporaryDirectory() as temporary:
        models = Path(temporary)
        write_models(case, models)
        if case.of_model:
            parts = fewer(parts, options.model_images, models)
        names = ("ours", *case.contenders)
        outputs = {name: models / f"{name}.npz" for name in names}
        start: dict[str, Callable[..., list[str]]] = {
            name: partial(command, name, case, models, outputs[name], options.workers) for name in names
        }
        count = len(list(parts[0].iterdir()))
        rounds: dict[str, list[tuple[Usage, Usage]]] = {name: [] for name in names}
        for turn in range(options.rounds):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for name in order:
                rounds[name].append((run(start[name](parts[:SHORT])), run(start[name](parts[:PARTS]))))
        result: dict[str, Any] = {"case": case.name, "images": PARTS * count, "batch": case.batch}
        result["least_cosine"] = check(case, outputs)
        images, contenders = (PARTS - SHORT) * count, dict[str, Any]()
        mine = differences(rounds["ours"])
        for name in names:
            each = differences(rounds[name])
            contenders[name] = {
                clock: {
                    "images_per_second": images / statistics.median(each[clock]),
                    "ours_is_faster_by": ratio_of(each[clock], mine[clock]),
                    "ours_is_faster_by_whole_runs": ratio_of(*whole_runs(rounds, name, clock)),
                    "whole_run_seconds": [getattr(whole, clock) for _, whole in rounds[name]],
                    "short_run_seconds": [getattr(short, clock) for short, _ in rounds[name]],
                }
                for clock in ("wall", "cpu")
            }
            if options.memory and not case.of_model:
                runs = [run(start[name](parts[:some]), memory=True).peak for some in (PARTS, PARTS + MORE)]
                contenders[name]["peak_bytes"] = runs
        result["contenders"] = contenders
        if case.of_model:
            alone = speed.Case("forward", "base", 224, case.batch, ("ours", "transformers, sdpa, compiled"))
            found = speed.run(alone, options.rounds + 2, False, alone.contenders)
            result["forward_alone"] = found["contenders"]["transformers, sdpa, compiled"]["ours_is_faster_by"]
    return result


def whole_runs(rounds: dict[str, list[tuple[Usage, Usage]]], name: str, clock: str) -> tuple[list[float], list[float]]:
    """Seconds of another's whole runs, and of ours."""
    theirs, mine = ([getattr(whole, clock) for _, whole in rounds[each]] for each in (name, "ours"))
    return theirs, mine


def differences(rounds: Sequence[tuple[Usage, Usage]]) -> dict[str, list[float]]:
    """Seconds of a whole run without a short one, in every round; NaN where there are too few images to say."""
    found = {
        clock: [getattr(whole, clock) - getattr(short, clock) for short, whole in rounds] for clock in ("wall", "cpu")
    }
    return {clock: [value if value > 0 else float("nan") for value in values] for clock, values in found.items()}


def fewer(parts: Sequence[Path], images: int, directory: Path) -> list[Path]:
    """Folders of the first images of every part, `images` of them in PARTS folders."""
    found = []
    for part in parts[:PARTS]:
        folder = directory / "images" / part.name
        folder.mkdir(parents=True)
        for file in sorted(part.iterdir())[: max(1, images // PARTS)]:
            (folder / file.name).symlink_to(file)
        found.append(folder)
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"### {result['case']}, {result['images']:,} images, batch {result['batch']}",
        "",
        "| | images/s | images per CPU second | ours is faster by | by CPU time | whole runs | peak, MB | half more |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["contenders"].items():
        ratios = ["", "", ""]
        if name != "ours":
            spans = [found[clock]["ours_is_faster_by"] for clock in ("wall", "cpu")]
            spans.append(found["cpu"]["ours_is_faster_by_whole_runs"])
            ratios = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in spans]
        peaks = [f"{peak / 1e6:,.0f}" for peak in found.get("peak_bytes", ())] or ["", ""]
        rates = [f"{found[clock]['images_per_second']:,.1f}" for clock in ("wall", "cpu")]
        lines.append(f"| {name} | {' | '.join([*rates, *ratios, *peaks])} |")
    if "forward_alone" in result:
        low, middle, high = result["forward_alone"]
        lines += ["", f"Forward passes alone, torch.compile's against ours: {middle:.2f} ({low:.2f} to {high:.2f})."]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="a multiple of 20")
    parser.add_argument("--model-images", type=int, default=320, help="where the model counts; a multiple of 20")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="processes that prepare images; by default each contender's own")
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the two runs for memory")
    parser.add_argument("--json", type=Path, help="write the results to this file too, after every case")
    options = parser.parse_args()
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), end="\n\n")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        parts = write_images(Path(folder), options.images)
        for case in CASES:
            if not re.search(options.only, case.name):
                continue
            results.append(measure(case, parts, options))
            print(table(results[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"versions": versions, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
