"""From a cold process to the first label, and what compiling costs as models grow deeper.

    python benchmarks/startup.py [--rounds 5] [--json FILE]

Needs transformers and torch. Labels one image with BEiT-base and random weights: `beit-jax classify` without a
compilation cache, with an empty one (JAX_COMPILATION_CACHE_DIR) and again with what it left there, and transformers,
each in a new process, in random turns, files in memory. Then the same architecture at several depths is compiled and
run, forward and gradient.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from beit_jax.convert import export
from beit_jax.images import preset
from beit_jax.models.build import build_model, param_shapes
from beit_jax.tree import unflatten
from beit_jax.variants import VARIANTS
from beit_jax.weights import NativeCheckpoint, save

CONFIG = VARIANTS["beit_base_patch16_224"]
DEPTHS = (6, 12, 24, 48)
THEIRS = """
import sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, BeitForImageClassification
model = BeitForImageClassification.from_pretrained(sys.argv[1])
processor = AutoImageProcessor.from_pretrained(sys.argv[1], backend="pil")
with torch.inference_mode():
    logits = model(**processor(Image.open(sys.argv[2]), return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])
"""


def seconds(command: list[str], **variables: str) -> float:
    """Of a new process with these variables in its environment, to its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu"} | variables
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def first_label(rounds: int) -> dict[str, list[float]]:
    """Seconds of every round."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch, rng = Path(temporary), np.random.default_rng(0)
        params = {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in param_shapes(CONFIG).items()}
        checkpoint = NativeCheckpoint(CONFIG, preset("hf"), params)
        (scratch / "native").mkdir()
        save(scratch / "native", checkpoint)
        export(checkpoint, scratch / "hf", "hf")
        image = scratch / "image.png"
        Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8)).save(image)
        ours = [sys.executable, "-m", "beit_jax", "classify", str(scratch / "native"), str(image), "--top", "1"]
        theirs = [sys.executable, "-c", THEIRS, str(scratch / "hf"), str(image)]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "cache")}
        turns: list[dict[str, tuple[list[str], dict[str, str]]]] = [
            {"ours, no cache": (ours, {})},
            {"ours, empty cache": (ours, cache), "ours, second start": (ours, cache)},
            {"transformers": (theirs, {})},
        ]
        found: dict[str, list[float]] = {name: [] for turn in turns for name in turn}
        for _ in range(rounds):
            shutil.rmtree(scratch / "cache", ignore_errors=True)
            random.shuffle(turns)
            for name, (command, variables) in (item for turn in turns for item in turn.items()):
                found[name].append(seconds(command, **variables))
    return found


def depths(rounds: int) -> list[dict[str, Any]]:
    """Seconds of compiling and of a call, by depth; narrow models, of which computing takes little."""
    rows = []
    for depth in DEPTHS:
        config = replace(CONFIG, num_hidden_layers=depth, hidden_size=192, num_attention_heads=3, intermediate_size=768)
        params = {n: 0.02 * jax.random.normal(jax.random.key(0), s) for n, s in param_shapes(config).items()}
        model, pixels = build_model(config, unflatten(params)), jnp.zeros((1, 224, 224, 3))

        def loss(model: Any, pixels: Any) -> Any:
            return jnp.square(model(pixels).logits).sum()

        row: dict[str, Any] = {"depth": depth}
        for name, function in {"forward": loss, "gradient": jax.grad(loss)}.items():
            start = time.perf_counter()
            compiled = jax.jit(function).lower(model, pixels).compile()
            row[f"{name}, compile"] = time.perf_counter() - start
            taken = []
            for _ in range(rounds):
                start = time.perf_counter()
                jax.block_until_ready(compiled(model, pixels))
                taken.append(time.perf_counter() - start)
            row[f"{name}, a block"] = statistics.median(taken) / depth
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    result = {"first_label": first_label(options.rounds), "depths": depths(2 * options.rounds)}
    print("| to the first label | s, median | least | most |\n|---|---|---|---|")
    for name, found in result["first_label"].items():
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |")
    print("\n| " + " | ".join(result["depths"][0]) + " |\n" + "|---" * len(result["depths"][0]) + "|")
    for row in result["depths"]:
        print("| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
