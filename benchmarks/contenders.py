"""One implementation of BEiT doing one thing again and again, in a process of its own; `speed.py` starts it.

    python benchmarks/contenders.py '{"contender": "ours", "kind": "forward", ...}'

`beit_jax.peers.process` says what a process is told and answers; forward passes are those of `beit_jax.peers.forward`.
Here are the other kinds: "finetune" (classification) and "pretrain" (masked tokens), whose outputs are the losses of
the first two steps, and "products": those of all blocks with their parameters, and nothing else.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.peers import by_torch, forward
from beit_jax.peers.by_torch import finished, torch_device
from beit_jax.peers.forward import begin_ours
from beit_jax.peers.job import Call, Job
from beit_jax.peers.needs import KINDS
from beit_jax.peers.process import serve

RATE, DECAY, SMOOTHING, HIDDEN = 1e-4, 0.05, 0.1, 75
TRAINING = ("finetune", "pretrain")


def ours(job: Job, kernels: str = "auto") -> Call:
    """This library, as its documents say to use it; `kernels` "off": without the kernels of a CPU."""
    if job.kind in KINDS:
        return forward.ours(job, kernels)
    begin_ours(job, kernels)
    return _our_products(job) if job.kind == "products" else _our_step(job)


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


def _our_step(job: Job) -> Call:
    import jax

    from beit_jax.train.data.stored_tokens import StoredTokens
    from beit_jax.train.forecast.aot import abstract_program
    from beit_jax.train.loop.dispatch import Dispatch
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
    dispatch, mesh = Dispatch(program.step, program.mesh), program.mesh

    def call() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = dispatch(state, batch)
        return jax.block_until_ready(metrics["loss"])

    return call


def transformers(job: Job, attention: str, compiled: bool) -> Call:
    """Transformers' model of the kind, with one of its implementations of attention."""
    if job.kind in KINDS:
        return by_torch.transformers(job, attention, compiled)
    return _torch_step(job, by_torch.transformers_model(job.directory, attention), lambda found: found.logits, compiled)


def timm(job: Job, compiled: bool) -> Call:
    """timm's model; it has none for pre-training or segmentation."""
    if job.kind in KINDS:
        return by_torch.timm(job, compiled)
    return _torch_step(job, by_torch.timm_model(job.directory), lambda found: found, compiled)


def products(job: Job) -> Call:
    """torch's matrix products alone."""
    import torch

    device, dtype = torch_device(job)
    x, *kernels = (torch.from_numpy(value).to(device, dtype) for value in job.inputs.values())
    blocks = list(zip(*(kernel.mT.contiguous() for kernel in kernels), strict=True))

    def run() -> Any:
        y = x
        with torch.inference_mode():
            for qkv, out, up, down in blocks:
                y = torch.nn.functional.linear(y, qkv)[:, : x.shape[1]]
                for weight in (out, up, down):
                    y = torch.nn.functional.linear(y, weight)
        return finished(job, y)

    return run


def _torch_step(job: Job, model: Any, logits: Callable[[Any], Any], compiled: bool) -> Call:
    import torch

    device, dtype = torch_device(job)
    inputs = {name: torch.from_numpy(value).to(device) for name, value in job.inputs.items()}
    pixels = inputs["pixels"].permute(0, 3, 1, 2).contiguous()
    model = model.to(device)
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
        return finished(job, loss.detach())

    return step


CONTENDERS: dict[str, Callable[[Job], Call]] = {
    **forward.FORWARD,
    "ours": ours,
    "transformers, sdpa": partial(transformers, attention="sdpa", compiled=False),
    "transformers, eager": partial(transformers, attention="eager", compiled=False),
    "transformers, sdpa, compiled": partial(transformers, attention="sdpa", compiled=True),
    "timm": partial(timm, compiled=False),
    "timm, compiled": partial(timm, compiled=True),
    "ours, XLA": partial(ours, kernels="off"),
    "torch": products,
}


if __name__ == "__main__":
    serve(Job(**json.loads(sys.argv[1])), CONTENDERS)
