"""Our training step beside PyTorch's own BEiT on a TPU, by one compiler: transformers through torchax, and ours.

    python -m venv ENV && ENV/bin/pip install 'jax[tpu]==0.12.0.1' torch==2.12.1 torchax==0.0.13 transformers==5.23.0
    ENV/bin/pip install -e '.[train]'
    ENV/bin/python benchmarks/torchax_cycles.py [--only WORD ...] [--again]

Both steps are compiled by the same libtpu for one v5e chip that is not there, and counted by the same program
(`train/costs/work.py`). Nothing is run. Rows go to benchmarks/torchax_cycles.json, the page to torchax_cycles.md; a row
takes one to five minutes on two cores.

torchax 0.0.13 needs two workarounds for this: torch 2.12.1 (with 2.13 its import fails), and the index of the position
bias made on the host (`host_index`), because torchax cannot assign to slices of integers while it traces. Blocks are
computed again by wrapping `BeitLayer.forward` in `jax.checkpoint`, as torchax's `gradient_checkpoint` does.

Stochastic depth is off on both sides: torchax would draw once, at tracing. Images per step, products, AdamW, float32
parameters and moments are the same. Ours computes more: normalisation of 8-bit pixels, mixup or erasing, label
smoothing, the gradient's norm, a check that all is finite, a learning rate for every layer.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "torchax_cycles.json", HERE / "torchax_cycles.md"
GIB = 2**30
COUNTING = 1
PEAK = 2 * 4 * 128**2  # operations of a cycle: four units of 128 x 128 multiply-adds
PACKAGES = ("jax", "libtpu", "torch", "torchax", "transformers")


@dataclass(frozen=True)
class Case:
    """What both sides compute.

    Attributes:
        recipe: ours; its variant has the size.
        again: whether blocks are computed again on the way back; else nothing that has a product is.
    """

    name: str
    recipe: str
    image: int
    images: int
    again: bool = False

    @property
    def large(self) -> bool:
        return "_large" in self.recipe

    @property
    def tokens(self) -> int:
        return 1 + (self.image // 16) ** 2


CASES = {
    case.name: case
    for case in (
        Case("B/16 224, 64 images", "beit_base_ft1k", 224, 64),
        Case("L/16 384, 4 images", "beit_large_ft22k_ft1k_384", 384, 4),
        Case("L/16 512, 4 images, blocks again", "beit_large_ft22k_ft1k_512", 512, 4, again=True),
    )
}
SIDES = {
    "torchax, sdpa": "bfloat16: residual stream, LayerNorm, softmax, all products",
    "torchax, eager": "bfloat16: residual stream, LayerNorm, all products; float32: softmax",
    "ours, exact": "bfloat16: products; float32: residual stream, LayerNorm, scores and softmax (autocast's)",
    "ours, equal": "as exact, but the residual stream is bfloat16 (`--model.residual bfloat16`)",
}
"""Every side, and what it computes in which precision. Parameters, moments and the loss are float32 on all."""
EQUAL = {"residual": "bfloat16"}
"""Options of the model by which ours rounds what torchax rounds, but for LayerNorm and softmax: float32 in any case."""


def chip() -> Any:
    """One v5e chip, described."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from beit_jax.train.distributed.topology import parse_topology

    return parse_topology("v5e:1x1").devices()[0]


# --- Ours


def ours(case: Case, *, equal: bool) -> Any:
    """The step of a recipe, lowered."""
    from beit_jax.train.forecast.aot import abstract_program
    from beit_jax.train.recipes import recipe_named

    recipe, device = recipe_named(case.recipe), chip()
    chosen: dict[str, Any] = EQUAL if equal else {}
    model = replace(recipe.model, remat="block" if case.again else "dots", drop_path=0.0, **chosen)
    recipe = replace(
        recipe,
        model=model,
        data=replace(recipe.data, batch_size=case.images),
        optim=replace(recipe.optim, accumulate=1),
        run=replace(recipe.run, mesh=(1, 1, 1)),
    )
    return abstract_program(recipe, [device]).lower()


# --- Theirs


def theirs(case: Case, attention: str) -> Any:
    """The step that a user of torchax writes, lowered: `functional_call`, a loss, optax's AdamW."""
    device = chip()
    import jax
    import jax.numpy as jnp
    import optax
    import torch
    import torchax
    from jax.sharding import SingleDeviceSharding
    from torchax.interop import jax_view, torch_view
    from transformers import BeitConfig, BeitForImageClassification
    from transformers.models.beit import modeling_beit

    host_index(modeling_beit, torch_view)
    if case.again:
        checkpointed(modeling_beit.BeitLayer, jax_view, torch_view)
    size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = BeitConfig(
        **(size if case.large else {}),
        image_size=case.image,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        num_labels=1000,
        attn_implementation=attention,
    )
    with torch.device("meta"):
        model = BeitForImageClassification(config).train()
    environment, tx = torchax.default_env(), optax.adamw(1e-3, weight_decay=0.05)

    def loss(params: Any, pixels: Any, labels: Any) -> Any:
        narrow = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
        with environment:
            given = torch_view(pixels.astype(jnp.bfloat16))
            logits = torch.func.functional_call(model, torch_view(narrow), (given,)).logits
        found = jax_view(logits).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    def step(params: Any, moments: Any, pixels: Any, labels: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, pixels, labels)
        updates, moments = tx.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    here = SingleDeviceSharding(device)

    def shaped(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    params = {name: shaped(tuple(value.shape), jnp.float32) for name, value in model.named_parameters()}
    moments = jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype), jax.eval_shape(tx.init, params))
    pixels, labels = shaped((case.images, 3, case.image, case.image), jnp.float32), shaped((case.images,), jnp.int32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, moments, pixels, labels)


def host_index(modeling: Any, torch_view: Any) -> None:
    """The index of the position bias as a constant that NumPy has made."""
    import jax.numpy as jnp

    from beit_jax.models.attention import relative_position_index

    def index(window: tuple[int, int]) -> Any:
        return torch_view(jnp.asarray(relative_position_index(window)))

    modeling.BeitRelativePositionBias.generate_relative_position_index = staticmethod(index)


def checkpointed(layer: Any, jax_view: Any, torch_view: Any) -> None:
    """`layer.forward` computed again on the way back."""
    import jax

    forward = layer.forward

    def again(self: Any, hidden_states: Any, *arguments: Any, **options: Any) -> Any:
        def run(hidden: Any) -> Any:
            return jax_view(forward(self, torch_view(hidden), *arguments, **options))

        return torch_view(jax.checkpoint(run)(jax_view(hidden_states)))

    layer.forward = again


# --- Counting


def row(case: Case, side: str) -> dict[str, Any]:
    """Compiles, and counts."""
    from beit_jax.train.costs.estimate import compiled_bytes
    from beit_jax.train.costs.work import work

    owner, form = side.split(", ")
    lowered = theirs(case, form) if owner == "torchax" else ours(case, equal=form == "equal")
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    found, held = work(compiled.as_text() or "", 1), compiled_bytes(compiled)
    code = compiled.memory_analysis().generated_code_size_in_bytes
    return {
        "cycles": found.cycles,
        "kernels": kernel_cycles(found.opaque, case.tokens),
        "flops": found.flops,
        "traffic": found.traffic,
        "memory": (held or 0) + code,
        "unknown": found.unknown,
        "compile_seconds": seconds,
    }


def kernel_cycles(flops: float, tokens: int) -> float:
    """Cycles of kernels of attention, of which libtpu estimates none: more than they should take, nothing overlapped.

    Products at half the peak, as heads of 64 numbers fill half of a unit of 128. For every score of the 14 x 64
    operations forward and backward, 24 operations of the vector unit, which makes 4,096 a cycle, and two exponentials,
    of which there are 1,024 a cycle. Rows are as long as the tiles that hold them.
    """
    scores = flops / (14 * 64) * (-(-tokens // 128) * 128) / tokens
    return flops / (PEAK / 2) + scores * (24 / 4096 + 2 / 1024)


# --- The page


def page(records: dict[str, dict[str, Any]]) -> str:
    shown = next(iter(records.values()))["versions"]
    precisions = "\n".join(f"| {side} | {text} |" for side, text in SIDES.items())
    return _TEXT.format(versions=shown, table="\n".join(lines(records)), precisions=precisions)


def lines(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| step | side | Mcycles | of them kernels | of torchax, sdpa | TFLOP | GB | GiB | of torchax, sdpa |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in CASES:
        first = records.get(key(name, "torchax, sdpa"))
        for side in SIDES:
            record = records.get(key(name, side))
            if record is None:
                continue
            found = record["row"]
            ratio = room = ""
            if first is not None:
                ratio = f"{total(found) / total(first['row']):.2f}"
                room = f"{found['memory'] / first['row']['memory']:.2f}"
            yield (
                f"| {name} | {side} | {total(found) / 1e6:.0f} | {found['kernels'] / 1e6:.0f} | {ratio} | "
                f"{found['flops'] / 1e12:.2f} | {found['traffic'] / 1e9:.1f} | {found['memory'] / GIB:.2f} | {room} |"
            )


def total(found: dict[str, Any]) -> float:
    return found["cycles"] + found["kernels"]


def key(name: str, side: str) -> str:
    return f"{name}: {side}"


_TEXT = """# PyTorch's BEiT on a TPU, and ours

`python benchmarks/torchax_cycles.py`: a training step of transformers' BEiT through torchax, and ours for the same
products, compiled by the same libtpu for one v5e chip, counted by the same program. Nothing was run.
{versions}.

{table}

Mcycles: what libtpu reckons with for all kernels in a row, in millions, and for kernels of attention, of which it
reckons nothing, more than they should take (`kernel_cycles`): products at half the peak, and the work of the vector
unit as if nothing overlapped. TFLOP: products of the compiled step. GB: what a step reads and writes of main memory.
GiB: what the step holds of the chip's 15.75.

| side | in which precision |
|---|---|
{precisions}

Parameters, moments and the loss are float32 on every side. Stochastic depth is off. Ours computes more in a step:
normalisation of 8-bit pixels, mixup or erasing, label smoothing, the norm of the gradient, a check that all is finite,
a learning rate for every layer.

L/16 at 384 pixels with four images is the narrowest: 305 million parameters for four images. Both sides hold about 4.6
GiB of parameters, moments and gradients, and AdamW reads and writes 8.4 GB of them in every step; ours reads 1.2 GB
more for the norm of the gradient, and 1.1 for kernels as bfloat16. These do not shrink with the precision of
activations.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="rows that one of these words is part of")
    parser.add_argument("--again", action="store_true", help="compile rows that are there already")
    parser.add_argument("--records", type=Path, default=RECORDS, help="keeps all rows; the page stands beside it")
    options = parser.parse_args()
    records = read_records(options.records)
    for case in CASES.values():
        for side in SIDES:
            name, layout = key(case.name, side), asdict(case) | {"counting": COUNTING}
            done = records.get(name, {}).get("layout") == layout and not options.again
            if done or not any(word in name for word in options.only):
                continue
            command = [sys.executable, __file__, "--child", case.name, side]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(found.stdout.splitlines()[-1])
            records[name] = {"layout": layout, "versions": versions(), "row": row}
            options.records.write_text(json.dumps(records, indent=1) + "\n")
    if records:
        options.records.with_suffix(".md").write_text(page(records))


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(row(CASES[sys.argv[2]], sys.argv[3])))
    else:
        main()
