"""A forward pass by torch: transformers' model or timm's, in any of their forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit_jax.peers.job import Call, Job


def transformers(job: Job, attention: str, compiled: bool = False) -> Call:
    """Transformers' model, with one of its implementations of attention."""
    return by_torch(job, transformers_model(job.directory, attention), lambda output: output.logits, compiled)


def transformers_model(directory: str | Path, attention: str) -> Any:
    """The model of ``hf`` in a job's directory, of the class that its config.json names."""
    import transformers as library

    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    path = Path(directory, "hf")
    (name,) = library.AutoConfig.from_pretrained(path).architectures
    return getattr(library, name).from_pretrained(path, attn_implementation=attention)


def timm(job: Job, compiled: bool = False) -> Call:
    """timm's model, which classifies."""
    return by_torch(job, timm_model(job.directory), lambda output: output, compiled)


def timm_model(directory: str | Path) -> Any:
    """The model of ``timm`` in a job's directory."""
    import timm as library

    return library.create_model(f"local-dir:{Path(directory, 'timm')}", pretrained=True)


def by_torch(job: Job, model: Any, logits: Callable[[Any], Any], compiled: bool) -> Call:
    """A forward pass of a torch module, whose output has these logits."""
    import torch

    device, dtype = torch_device(job)
    pixels = torch.from_numpy(job.inputs["pixels"]).to(device).permute(0, 3, 1, 2).contiguous()
    model, pixels = model.to(device).eval().to(dtype), pixels.to(dtype)
    model = torch.compile(model) if compiled else model

    def forward() -> Any:
        with torch.inference_mode():
            return finished(job, logits(model(pixels)))

    return forward


def torch_device(job: Job) -> tuple[Any, Any]:
    """Where torch computes, and in what; on so many threads."""
    import torch

    torch.set_num_threads(job.threads)
    return torch.device("cuda" if job.accelerator else "cpu"), getattr(torch, job.dtype)


def finished(job: Job, result: Any) -> Any:
    """`result`, once a GPU has made it."""
    import torch

    if job.accelerator:
        torch.cuda.synchronize()
    return result
