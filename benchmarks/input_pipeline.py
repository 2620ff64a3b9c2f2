"""Training images per second and core: `beit_jax.train.data.batches.train_batches` against timm in a torch DataLoader.

    python benchmarks/input_pipeline.py [--batches 8] [--rounds 5] [--json FILE]

Needs timm, torchvision and 500 MB in the temporary directory. Writes JPEG files of 500 x 375 pixels and ImageNet's mean
size, as a folder of classes and as a prepared data set, and reads both with one worker process: crop to 224, flip,
RandAugment (BEiT's fine-tuning).
Three pipelines take turns, each while the others' workers sleep:

    ours    uint8 batches; normalising and erasing are done on the device, inside the training step
    float   timm's `create_transform` as BEiT's fine-tuning calls it: normalised float32, erased on the CPU
    uint8   the same with `use_prefetcher`, which leaves normalising and erasing to the GPU

Images per second count wall time, and CPU milliseconds those of the worker process, which other load on the machine
disturbs less. The second table holds one process's CPU time per image for each stage.
"""

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, auto_augment, create_transform

from beit_jax.train.augmentation.classification import train_transform
from beit_jax.train.augmentation.decode import decode
from beit_jax.train.data.batches import train_batches
from beit_jax.train.data.datasets import open_dataset
from beit_jax.train.data.prepare import prepare_folder
from beit_jax.train.recipe import STATISTICS, AugmentOptions, DataOptions

SIZE, STORED, BATCH = 224, (500, 375), 64
PICTURES, COPIES = 128, 16  # Grain's shuffling of a few records takes longer than that of many
OPTIONS = AugmentOptions()
MEAN, DEVIATION = STATISTICS["half"]
PACKAGES = ("pillow", "simplejpeg", "numba", "numpy", "grain", "torch", "torchvision", "timm")


def picture(rng: np.random.Generator) -> Image.Image:
    """Structure at every scale with the spectrum of photographs (1/f), and the noise of a sensor."""
    width, height = STORED
    pixels = np.full((height, width, 3), 128.0)
    for cells in (3, 6, 12, 25, 50, 100, 200):
        coarse = rng.normal(size=(cells * height // width + 2, cells + 2, 3)).astype(np.float32)
        layers = (
            Image.fromarray(layer).resize(STORED, Image.Resampling.BICUBIC) for layer in np.moveaxis(coarse, 2, 0)
        )
        pixels += 80 / cells**0.5 * np.stack(list(layers), axis=-1)
    pixels += rng.normal(0, 8, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(PICTURES):
        path = folder / f"class{index % 4}" / f"{index:03}_00.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng).save(path, quality=92)
        for copy in range(1, COPIES):
            path.with_name(f"{index:03}_{copy:02}.jpg").hardlink_to(path)


def repair_timm() -> None:
    """Pillow 13 refuses to posterize to 0 bits, which timm asks for at level 10; before, the image became black."""
    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]

    def to_black(image: Image.Image, bits: int, **options: Any) -> Image.Image:
        return posterize(image, bits, **options) if bits else Image.new("RGB", image.size)

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = to_black


def timm_transform(use_prefetcher: bool) -> Any:
    return create_transform(
        SIZE,
        is_training=True,
        color_jitter=0.4,
        auto_augment=OPTIONS.randaugment,
        interpolation="bicubic",
        re_prob=OPTIONS.erasing,
        re_mode="pixel",
        re_count=1,
        mean=MEAN,
        std=DEVIATION,
        use_prefetcher=use_prefetcher,
    )


def timm_batches(folder: Path, use_prefetcher: bool) -> Iterator[Any]:
    images = ImageDataset(str(folder), transform=timm_transform(use_prefetcher))
    endless = torch.utils.data.RandomSampler(images, replacement=True, num_samples=10**9)
    return iter(torch.utils.data.DataLoader(images, BATCH, sampler=endless, num_workers=1))


@dataclass
class Pipeline:
    """Batches of one worker process, and what it took."""

    batches: Iterator[Any]
    worker: int
    rates: list[float]
    cpu: list[float]

    def measure(self, count: int) -> None:
        """Images per second and CPU milliseconds per image of `count` batches, after those that lie ready."""
        while True:
            start = time.perf_counter()
            next(self.batches)
            if time.perf_counter() - start > 0.05:  # the worker has just finished this one
                break
        start, cpu = time.perf_counter(), cpu_seconds(self.worker)
        for _ in range(count):
            next(self.batches)
        images = count * BATCH
        self.rates.append(images / (time.perf_counter() - start))
        self.cpu.append((cpu_seconds(self.worker) - cpu) / images * 1e3)
        time.sleep(1.5)  # its worker makes batches ahead, then sleeps


def started(open_batches: Callable[[], Iterator[Any]]) -> Pipeline:
    before = {process.pid for process in multiprocessing.active_children()}
    batches = open_batches()
    next(batches)
    (worker,) = {process.pid for process in multiprocessing.active_children()} - before
    assert worker is not None
    return Pipeline(batches, worker, [], [])


def cpu_seconds(process: int) -> float:
    """What the threads of a running process have spent on a CPU; Linux."""
    threads = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def pipelines(folder: Path, prepared: Path, options: argparse.Namespace) -> dict[str, Any]:
    transform = train_transform(OPTIONS, (SIZE, SIZE), MEAN)
    with ExitStack() as stack:
        # torch's workers are forks of this process: they come before Grain's threads.
        running = {
            "float": started(lambda: timm_batches(folder, False)),
            "uint8": started(lambda: timm_batches(folder, True)),
        }
        data = train_batches(
            open_dataset(prepared, "train"), DataOptions(BATCH, workers=1), transform, seed=0, start_step=0
        )
        running["ours"] = started(lambda: stack.enter_context(data))
        time.sleep(3)
        for _ in range(options.rounds):
            for pipeline in running.values():
                pipeline.measure(options.batches)
    return {
        name: {
            "images_per_second": statistics.median(pipeline.rates),
            "worker_cpu_ms": statistics.median(pipeline.cpu),
            "rounds": pipeline.rates,
        }
        for name, pipeline in running.items()
    }


def stages(folder: Path, rounds: int) -> dict[str, float]:
    """CPU milliseconds per image of one process, the least of all rounds."""
    files = [path.read_bytes() for path in sorted(folder.rglob("*_00.jpg"))]
    arrays = [decode(data, "image") for data in files]
    images = [Image.fromarray(pixels) for pixels in arrays]
    ours, plain = (train_transform(o, (SIZE, SIZE), MEAN) for o in (OPTIONS, AugmentOptions(randaugment=None)))
    rng, float32, uint8 = np.random.default_rng(0), timm_transform(False), timm_transform(True)
    tasks: dict[str, Callable[[int], object]] = {
        "decode, ours": lambda i: decode(files[i], "image"),
        "decode, Pillow": lambda i: Image.open(io.BytesIO(files[i])).convert("RGB"),
        "crop and flip, ours": lambda i: plain(arrays[i], rng),
        "transform, ours": lambda i: ours(arrays[i], rng),
        "transform, timm float": lambda i: float32(images[i]),
        "transform, timm uint8": lambda i: uint8(images[i]),
    }
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.process_time()
            for index in range(len(files)):
                task(index)
            found[name].append((time.process_time() - start) / len(files) * 1e3)
    return {name: min(values) for name, values in found.items()}


def report(result: dict[str, Any]) -> str:
    ours, lines = result["pipelines"]["ours"], ["pipeline    images/s  CPU ms/image   ours is faster by (wall, CPU)"]
    for name, found in result["pipelines"].items():
        rate, cpu = found["images_per_second"], found["worker_cpu_ms"]
        ratios = f"{ours['images_per_second'] / rate:.2f}, {cpu / ours['worker_cpu_ms']:.2f}"
        lines.append(f"{name:10} {rate:9.0f} {cpu:13.2f}   {ratios}")
    lines += ["", "stage                    CPU ms/image"]
    lines += [f"{name:24} {value:12.2f}" for name, value in result["stages"].items()]
    return "\n".join([*lines, "", ", ".join(f"{name} {version}" for name, version in result["versions"].items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="of 64 images, per pipeline and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repair_timm()
    with tempfile.TemporaryDirectory() as scratch:
        folder, prepared = Path(scratch, "pictures"), Path(scratch, "prepared")
        write_pictures(folder)
        prepare_folder(folder, prepared)
        result: dict[str, Any] = {
            "jpeg_kilobytes": statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg")) / 1e3,
            "pipelines": pipelines(folder, prepared, options),
            "stages": stages(folder, options.rounds),
        }
    result["versions"] = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
