"""Peak memory of segmentation with BEiT-base at 640 pixels and 150 classes, each case in a fresh process.

    python benchmarks/segmentation_memory.py [--case NAME ...] [--json FILE]

Cases: `forward` 4 images of 640 x 640 at once; `sliding` one image of 2048 x 1024 at its own size, in windows of 640
every 426; `training` the loss of 4 images of 640 x 640 and its gradients, as XLA plans it, without running it, once as
it is and once with blocks recomputed (`remat`).
On a CPU the measure is the process's peak resident memory beyond that after loading the parameters; on an accelerator
it is the device's own peak in use.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from beit_jax.images import ImageProcessor
from beit_jax.inference.segmentation import Inference, segment
from beit_jax.models.build import abstract_model, build_model, param_shapes
from beit_jax.models.interface import Remat
from beit_jax.train.objectives.segmentation import segmentation_loss
from beit_jax.tree import unflatten
from beit_jax.variants import VARIANTS

CONFIG = VARIANTS["beit_base_patch16_640_ade20k"]
SIZE, BATCH, PANORAMA = 640, 4, (1024, 2048)


def model() -> Any:
    """The model with random parameters."""
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(np.abs(draw) + 0.5 if name.endswith("/var") else draw * 0.02)
        for name, shape in param_shapes(CONFIG).items()
        for draw in [rng.standard_normal(shape, np.float32)]
    }
    return build_model(CONFIG, unflatten(params))


def forward() -> None:
    ours, pixels = model(), jnp.zeros((BATCH, SIZE, SIZE, 3))
    measured(lambda: jax.jit(lambda m, x: m(x).logits)(ours, pixels).block_until_ready())


def sliding() -> None:
    ours = model()
    image = np.random.default_rng(1).integers(0, 256, (*PANORAMA, 3), dtype=np.uint8)
    measured(lambda: segment(ours, ImageProcessor(resize=None), image, Inference("slide", batch_size=1)))


def training() -> None:
    graph, shapes = abstract_model(CONFIG)

    def planned(remat: Remat) -> int:
        def loss(params: Any, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
            ours = nnx.merge(graph, params)
            value = segmentation_loss(ours(pixels, train=True, remat=remat), labels, CONFIG)
            return value, nnx.to_pure_dict(nnx.state(ours, nnx.BatchStat))

        pixels = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32)
        labels = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE), jnp.int32)
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(shapes, pixels, labels).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    print(json.dumps({"temporary_bytes": planned("none"), "temporary_bytes_remat": planned("block")}))


CASES = {function.__name__: function for function in (forward, sliding, training)}


def measured(run: Any) -> None:
    """Runs it once and prints the peak beyond what was in use before, and the seconds."""
    device, before, start = jax.devices()[0], _in_use(), time.perf_counter()
    run()
    stats = device.memory_stats()
    peak = stats["peak_bytes_in_use"] if stats else _status("VmHWM")
    result = {"peak_bytes_beyond_parameters": peak - before, "parameter_and_program_bytes": before}
    print(json.dumps(result | {"seconds_with_compilation": time.perf_counter() - start, "device": device.device_kind}))


def _in_use() -> int:
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else _status("VmRSS")


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args()
    result = {}
    for case in options.case:
        command = [sys.executable, __file__, "--child", case]
        result[case] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        CASES[sys.argv[2]]()
    else:
        main()
