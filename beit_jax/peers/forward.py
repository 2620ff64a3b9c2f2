"""A forward pass by this library and by its peers, each as its own documents say to use it: the table of all."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from beit_jax.peers.by_torch import timm, transformers
from beit_jax.peers.job import Call, Job


def begin_ours(job: Job, kernels: str | None = None) -> None:
    """Sets this process up for this library, as its documents say to.

    Args:
        kernels: as BEIT_JAX_CPU_KERNELS has it: "off" is without the kernels of a CPU. None: as the environment says.
    """
    if kernels is not None:
        os.environ["BEIT_JAX_CPU_KERNELS"] = kernels
    from beit_jax.memory import keep_freed_memory

    keep_freed_memory()
    import jax

    if not job.accelerator:
        jax.config.update("jax_platforms", "cpu")


def ours(job: Job, kernels: str | None = None) -> Call:
    """This library; `kernels` as of `begin_ours`."""
    begin_ours(job, kernels)
    import jax
    import jax.numpy as jnp

    from beit_jax.inference.predict import from_pretrained

    model, _ = from_pretrained(Path(job.directory, "native"), dtype=job.dtype, packed=True)
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


def engine(job: Job, name: str) -> Call:
    """An engine for inference, with transformers' model."""
    from beit_jax.peers import engines

    found: Call = getattr(engines, name)(Path(job.directory), job.inputs["pixels"], job.threads)
    return found


FORWARD: Mapping[str, Callable[[Job], Call]] = {
    "ours": ours,
    "transformers, sdpa": lambda job: transformers(job, "sdpa"),
    "transformers, eager": lambda job: transformers(job, "eager"),
    "transformers, sdpa, compiled": lambda job: transformers(job, "sdpa", compiled=True),
    "timm": timm,
    "timm, compiled": lambda job: timm(job, compiled=True),
    "ours, XLA": lambda job: ours(job, kernels="off"),
    "onnxruntime": lambda job: engine(job, "onnxruntime"),
    "openvino": lambda job: engine(job, "openvino"),
}
"""By the names and in the order of `beit_jax.peers.needs.NEEDS`."""
