"""How fast a forward pass of this library is beside the peers that are installed: what `beit-jax bench` measures."""

import platform
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.kernels.cpu import library
from beit_jax.peers import race
from beit_jax.peers.job import INPUTS, Job, cores
from beit_jax.peers.needs import NEEDS, missing
from beit_jax.peers.same_model import inputs, write
from beit_jax.terminal import Progress, no_progress
from beit_jax.weights.leaves import num_params
from beit_jax.weights.native import NativeCheckpoint

CONTENDERS = tuple(name for name in NEEDS if name != "transformers, eager")  # which sdpa replaced
PACKAGES = ("beit-jax", "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "timm", "onnxruntime", "openvino")
DEVICES = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*", "kfd")


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        model: the class of the model, as transformers names it.
        image_size: pixels, (height, width).
        clock: "wall", or "cpu": seconds that the processor worked.
        difference: the largest of any two outputs, as a share of the largest output.
        contenders: as `beit_jax.peers.race.summary` has them, with images per second.
        left_out: why a contender was not measured.
        computed_by: what computes ours.
        accelerator: the file of one that this machine seems to have, and that was left alone.
    """

    model: str
    parameters: int
    image_size: tuple[int, int]
    batch_size: int
    threads: int
    rounds: int
    clock: str
    difference: float
    contenders: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    computed_by: str
    accelerator: str | None
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    @property
    def head(self) -> str:
        """What was measured, in a line."""
        height, width = self.image_size
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"A forward pass of {self.model}, {self.parameters:,} parameters, {height} x {width} pixels, "
            f"batch {self.batch_size}, float32, on {threads} of the CPU"
        )

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The titles and rows of a table."""
        seconds, rates = ("ms a call", "images/s") if self.clock == "wall" else ("CPU ms a call", "images/CPU s")
        rows = []
        for name, found in self.contenders.items():
            low, middle, high = found["ours_is_faster_by"]
            ratio = "-" if name == race.OURS else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            peak = f"{found['peak_bytes'] / 1e9:.2f}"
            rate = found["images_per_second"]
            rows.append([name, f"{found['seconds'] * 1e3:.4g}", f"{rate:.{1 if rate < 1e3 else 0}f}", ratio, peak])
        return ["contender", seconds, rates, "ours is faster by", "peak memory, GB"], rows

    def lines(self) -> list[str]:
        """What is said below the table."""
        found = [
            f"faster by: the other's time divided by ours, median of {self.rounds} rounds (least to largest); "
            f"all outputs agree to {self.difference:.0e}",
            f"ours is computed by {self.computed_by}",
            *(f"left out: {name} ({reason})" for name, reason in self.left_out.items()),
        ]
        if self.accelerator:
            found.append(f"only the CPU was measured: an accelerator ({self.accelerator}) was left alone")
        return [*found, ", ".join(f"{name} {version}" for name, version in self.versions.items())]


def bench(
    checkpoint: NativeCheckpoint,
    *,
    batch_size: int = 1,
    threads: int | None = None,
    rounds: int = 7,
    cpu_time: bool = False,
    contenders: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> Measured:
    """Lets all contenders compute the same images by the same weights, in turns.

    A contender that is not installed, cannot have the model or fails to start is left out, ours excepted.

    Args:
        checkpoint: a classifier, with parameters of float32.
        threads: of each contender, by default one for every core.
        cpu_time: count the processor's seconds, not the clock's: on a machine that others use too.
        contenders: of `beit_jax.peers.needs.NEEDS`, by default `CONTENDERS`; ours is one of them.
        progress: counts turns, of which starting is the first.

    Raises:
        BeitJaxError: contenders compute different outputs; ours fails; one of them ends on the way.
    """
    threads, left_out = threads or cores(), dict[str, str]()
    names = CONTENDERS if contenders is None else contenders
    for name in names:
        if absent := missing(name):
            left_out[name] = f"not installed: {', '.join(absent)}"
    there = [name for name in names if name not in left_out]
    computed_by = library.state()  # compiles the kernels where that has not been done yet
    with (
        tempfile.TemporaryDirectory(prefix="beit-jax-bench-") as temporary,
        ExitStack() as stack,
        progress(len(there) * (1 + rounds)) as done,
    ):
        directory, running = Path(temporary), dict[str, race.Contender]()
        layouts = {_layout(name) for name in there} - {"native"}
        refused = write(checkpoint, directory, sorted(layouts))
        np.savez(directory / INPUTS, **inputs(checkpoint.config, batch_size, np.random.default_rng(0)))  # type: ignore[arg-type]
        for number, name in enumerate(there):
            if _layout(name) in refused:
                left_out[name] = refused[_layout(name)]
                done(1 + rounds)
                continue
            output = str(directory / f"{number}.npy")
            job = Job(name, "forward", temporary, output, threads=threads, cpu_time=cpu_time)
            try:
                running[name] = race.Contender(job, stack)
                done(1)
            except race.ContenderFailed as error:
                if _layout(name) == "native":
                    raise
                left_out[name] = f"failed: {error.reason}"
                done(1 + rounds)
        difference = race.require_same(running)
        race.take_turns(list(running.values()), rounds, done)
        found = race.summary(running)
    for row in found.values():
        row["images_per_second"] = batch_size / row["seconds"]
    return Measured(
        model=checkpoint.config.to_hf()["architectures"][0],
        parameters=num_params(checkpoint.config),
        image_size=checkpoint.config.image_size,
        batch_size=batch_size,
        threads=threads,
        rounds=rounds,
        clock="cpu" if cpu_time else "wall",
        difference=difference,
        contenders=found,
        left_out=left_out,
        computed_by=computed_by,
        accelerator=next((str(path) for pattern in DEVICES for path in Path("/dev").glob(pattern)), None),
        versions=versions(PACKAGES),
    )


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed, by the names of their distributions."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _layout(contender: str) -> str:
    """The folder that a contender reads."""
    return {"ours": "native", "timm": "timm"}.get(contender.split(",")[0], "hf")
