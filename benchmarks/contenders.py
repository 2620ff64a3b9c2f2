"""One implementation of BEiT doing one thing again and again, in a process of its own; `speed.py` starts it.

    python benchmarks/contenders.py '{"contender": "ours", "kind": "forward", ...}'

It answers with a line of JSON once it is ready, and then, for every number that it reads, with the seconds of so many
calls. Between them it sleeps: contenders take turns on an idle machine. What they compute (logits, or the losses of the
first steps) goes to a file, by which `speed.py` sees that they compute the same.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]
"""Does it once and returns the result, complete."""
RATE, DECAY, SMOOTHING, HIDDEN = 1e-4, 0.05, 0.1, 75


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        contender: a name in `CONTENDERS`.
        kind: "forward", "finetune" (classification), "pretrain" (masked tokens), "segment" (a forward pass), or
            "products": those of all blocks with their parameters, and nothing else.
        directory: holds the same weights as ``native``, ``hf`` and ``timm``, and ``inputs.npz``.
        output: file for what was computed.
        accelerator: whether to run on a GPU.
        cpu_time: whether seconds are those that the processor worked for this process, not those of the clock.
    """

    contender: str
    kind: str
    directory: str
    output: str
    dtype: str = "float32"
    threads: int = 2
    accelerator: bool = False
    cpu_time: bool = False

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        with np.load(Path(self.directory, "inputs.npz")) as file:
            return dict(file)

    def encoded(self) -> str:
        return json.dumps(asdict(self))


def ours(job: Job, kernels: str = "auto") -> Call:
    """This library, as its documents say to use it; `kernels` "off": without the kernels of a CPU."""
    os.environ["BEIT_JAX_CPU_KERNELS"] = kernels
    import beit_jax

    beit_jax.keep_freed_memory()
    import jax

    if not job.accelerator:
        jax.config.update("jax_platforms", "cpu")
    if job.kind == "products":
        return _our_products(job)
    return _our_step(job) if job.kind in ("finetune", "pretrain") else _our_forward(job)


def _our_products(job: Job) -> Call:
    import jax
    import jax.numpy as jnp

    x, *kernels = (jnp.asarray(value, job.dtype) for value in job.inputs.values())

    @jax.jit
    def run(x: Any, kernels: Any) -> Any:
        def block(x: Any, kernels: Any) -> tuple[Any, None]:
            qkv, out, up, down = kernels
            return (x @ qkv)[:, : x.shape[1]] @ out @ up @ down, None

        return jax.lax.scan(block, x, kernels)[0]

    return lambda: jax.block_until_ready(run(x, kernels))


def _our_forward(job: Job) -> Call:
    import jax
    import jax.numpy as jnp

    import beit_jax

    model, _ = beit_jax.from_pretrained(Path(job.directory, "native"), dtype=job.dtype)
    pixels = jnp.asarray(job.inputs["pixels"])
    forward = jax.jit(lambda model, pixels: model(pixels).logits)
    if not job.accelerator:
        return lambda: jax.block_until_ready(forward(model, pixels))
    from beit_jax.train.distributed.sharding import make_mesh

    mesh = make_mesh((1, 1, 1), jax.devices()[:1])

    def call() -> Any:
        with jax.set_mesh(mesh):  # attention by kernels
            return jax.block_until_ready(forward(model, pixels))

    return call


def _our_step(job: Job) -> Call:
    import jax

    from beit_jax.train.data.stored_tokens import StoredTokens
    from beit_jax.train.forecast.aot import abstract_program
    from beit_jax.train.objectives.classification import ClassificationRecipe
    from beit_jax.train.objectives.masked_tokens import MaskedTokensRecipe
    from beit_jax.train.recipe import AugmentOptions, DataOptions, OptimOptions
    from beit_jax.weights import load

    inputs, start = job.inputs, load(Path(job.directory, "native"))
    pretrains = job.kind == "pretrain"
    data = DataOptions(batch_size=len(inputs["image"]))
    optim = OptimOptions(lr=RATE, weight_decay=DECAY, warmup_epochs=0, epochs=1)
    plain = AugmentOptions(randaugment=None, erasing=0.0, smoothing=SMOOTHING)
    recipe = (
        MaskedTokensRecipe(job.kind, data=data, optim=optim)
        if pretrains
        else ClassificationRecipe(job.kind, data=data, optim=optim, augment=plain)
    )
    model = replace(recipe.model, dtype=job.dtype, drop_path=0.0)
    program = abstract_program(replace(recipe, model=model), jax.devices()[:1], start=start, classes=1000)
    if pretrains:
        stored = StoredTokens(Path(), start.config.vocab_size or 0, 0, 0.0, np.zeros((0, 0)))
        sources = replace(program.objective.sources, tokens=stored)
        program = replace(program, objective=program.objective.replaced(sources=sources))
    names = program.objective.batch(1)
    state, batch = program.first_state(), {name: jax.device_put(inputs[name]) for name in names}

    def call() -> Any:
        nonlocal state
        with jax.set_mesh(program.mesh):
            state, metrics = program.step(state, batch)
        return jax.block_until_ready(metrics["loss"])

    return call


def transformers(job: Job, attention: str, compiled: bool) -> Call:
    """Transformers' model of the kind, with one of its implementations of attention."""
    import transformers as library

    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    name = {"pretrain": "MaskedImageModeling", "segment": "SemanticSegmentation"}.get(job.kind, "ImageClassification")
    model = getattr(library, f"BeitFor{name}").from_pretrained(Path(job.directory, "hf"), attn_implementation=attention)
    return _torch(job, model, lambda output: output.logits, compiled)


def timm(job: Job, compiled: bool) -> Call:
    """timm's model; it has none for pre-training or segmentation."""
    import timm as library

    model = library.create_model(f"local-dir:{Path(job.directory, 'timm')}", pretrained=True)
    return _torch(job, model, lambda output: output, compiled)


def engine(job: Job, name: str) -> Call:
    """An engine for inference, with transformers' model."""
    import engines

    found: Call = getattr(engines, name)(Path(job.directory), job.inputs["pixels"], job.threads)
    return found


def products(job: Job) -> Call:
    """torch's matrix products alone."""
    import torch

    device, dtype = _torch_device(job)
    x, *kernels = (torch.from_numpy(value).to(device, dtype) for value in job.inputs.values())
    blocks = list(zip(*(kernel.mT.contiguous() for kernel in kernels), strict=True))

    def run() -> Any:
        y = x
        with torch.inference_mode():
            for qkv, out, up, down in blocks:
                y = torch.nn.functional.linear(y, qkv)[:, : x.shape[1]]
                for weight in (out, up, down):
                    y = torch.nn.functional.linear(y, weight)
        return _finished(job, y)

    return run


def _torch(job: Job, model: Any, logits: Callable[[Any], Any], compiled: bool) -> Call:
    import torch

    device, dtype = _torch_device(job)
    inputs = {name: torch.from_numpy(value).to(device) for name, value in job.inputs.items()}
    pixels = inputs["pixels"].permute(0, 3, 1, 2).contiguous()
    model = model.to(device)
    if job.kind in ("forward", "segment"):
        model, pixels = model.eval().to(dtype), pixels.to(dtype)
        model = torch.compile(model) if compiled else model

        def forward() -> Any:
            with torch.inference_mode():
                return _finished(job, logits(model(pixels)))

        return forward

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    model = model.train()
    model = torch.compile(model) if compiled else model
    entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.0 if job.kind == "pretrain" else SMOOTHING)
    mask = inputs.get("mask")

    def step() -> Any:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if job.kind == "pretrain":
                found, labels = logits(model(pixels, bool_masked_pos=mask))[mask], inputs["tokens"][mask].long()
            else:
                found, labels = logits(model(pixels)), inputs["label"].long()
            loss = entropy(found.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return _finished(job, loss.detach())

    return step


def _torch_device(job: Job) -> tuple[Any, Any]:
    """Where torch computes, and in what; on so many threads."""
    import torch

    torch.set_num_threads(job.threads)
    return torch.device("cuda" if job.accelerator else "cpu"), getattr(torch, job.dtype)


def _finished(job: Job, result: Any) -> Any:
    """`result`, once a GPU has made it."""
    import torch

    if job.accelerator:
        torch.cuda.synchronize()
    return result


CONTENDERS: dict[str, Callable[[Job], Call]] = {
    "ours": ours,
    "transformers, sdpa": lambda job: transformers(job, "sdpa", False),
    "transformers, eager": lambda job: transformers(job, "eager", False),
    "transformers, sdpa, compiled": lambda job: transformers(job, "sdpa", True),
    "timm": lambda job: timm(job, False),
    "timm, compiled": lambda job: timm(job, True),
    "ours, XLA": lambda job: ours(job, kernels="off"),
    "onnxruntime": lambda job: engine(job, "onnxruntime"),
    "openvino": lambda job: engine(job, "openvino"),
    "torch": products,
}


def peak_bytes(accelerator: bool) -> int:
    """The most memory of the GPU, or else of the process, so far."""
    if not accelerator:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    if "torch" in sys.modules:
        import torch

        return torch.cuda.max_memory_allocated()
    import jax

    return int((jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"])


def main(job: Job) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if hasattr(os, "sched_setaffinity"):  # some libraries start as many threads as there are cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-job.threads :])
    clock = time.process_time if job.cpu_time else time.perf_counter
    call = CONTENDERS[job.contender](job)
    start = time.perf_counter()
    first = call()
    seconds = time.perf_counter() - start
    outputs = [first, call()] if job.kind in ("finetune", "pretrain") else [first]
    np.save(job.output, np.stack([_host(output) for output in outputs]))
    call()
    print(json.dumps({"first_call_seconds": seconds, "peak_bytes": peak_bytes(job.accelerator)}), flush=True)
    for line in sys.stdin:
        taken = []
        for _ in range(int(line)):
            start = clock()
            call()
            taken.append(clock() - start)
        print(json.dumps(taken), flush=True)


def _host(output: Any) -> np.ndarray:
    """float32, whatever device and dtype it has."""
    return np.asarray(output.detach().float().cpu() if hasattr(output, "detach") else output, np.float32)


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
