"""Writes a live model as a native checkpoint, and an adapter beside the model that it was merged into."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from beit_jax.atomic import check_destination, new_directory
from beit_jax.errors import BeitJaxError
from beit_jax.hub import ADAPTER_WEIGHTS
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference.packing import unpacked
from beit_jax.models.build import Model, param_shapes
from beit_jax.tree import flatten
from beit_jax.weights.native import NATIVE, NativeCheckpoint, load, save

_KEPT = (jnp.float32, jnp.bfloat16)


def save_pretrained(
    directory: str | os.PathLike[str],
    model: Model,
    processor: ImageProcessor,
    *,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a live model as a native checkpoint, which `load`, `from_pretrained` and every command read.

    The directory appears when all of it is written and verified. On several hosts one process writes.

    Args:
        model: as `from_pretrained` or `build_model` made it, with parameters of float32 or bfloat16 on any devices of
            this process.
        processor: turns images into the model's input.
        provenance: JSON values to record beside the weights: where they came from.
        overwrite: replace a native checkpoint that stands there.

    Raises:
        BeitJaxError: the directory exists or cannot be written; a parameter has another shape than `model.config` says,
            is of another dtype, or lies on another host.
    """
    destination = Path(directory)
    check_destination(destination, overwrite=overwrite, contents=NATIVE)
    params = unpacked(flatten(nnx.to_pure_dict(nnx.state(model))))
    shapes = param_shapes(model.config)
    if params.keys() != shapes.keys():
        odd = ", ".join(sorted(params.keys() ^ shapes.keys()))
        raise BeitJaxError(f"{odd}: expected the parameters that model.config describes, found others")
    for name, leaf in params.items():
        if leaf.shape != shapes[name]:
            raise BeitJaxError(f"{name}: expected shape {shapes[name]} by model.config, found {leaf.shape}")
        if leaf.dtype not in _KEPT:
            raise BeitJaxError(f"{name}: expected float32 or bfloat16, found {leaf.dtype}; cast the parameters first")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise BeitJaxError(
                f"{name}: lies on other hosts as well; jax.experimental.multihost_utils.process_allgather it first"
            )
    checkpoint = NativeCheckpoint(
        model.config, processor, {name: np.asarray(leaf) for name, leaf in params.items()}, dict(provenance or {})
    )
    save_checkpoint(destination, checkpoint, overwrite=overwrite)


def save_checkpoint(
    directory: str | os.PathLike[str], checkpoint: NativeCheckpoint, *, overwrite: bool = False
) -> None:
    """Writes a native checkpoint, which `beit_jax.load` gave or whose parameters somebody changed.

    The directory appears when all of it is written and verified; an empty one that stands there is replaced.

    Args:
        overwrite: replace a native checkpoint that stands there.

    Raises:
        BeitJaxError: the directory exists or cannot be written.
    """
    destination = Path(directory)
    empty = destination.is_dir() and not any(destination.iterdir())
    with new_directory(destination, overwrite=overwrite or empty, contents=NATIVE) as partial:
        save(partial, checkpoint)


def save_adapters(models: Iterable[Path], say: Callable[[str], None]) -> tuple[Path, ...]:
    """Writes the adapters that models were merged with, as PEFT reads them: ``adapter`` beside ``model``.

    Args:
        models: native checkpoints; those without factors are passed over.
        say: is told which adapter cannot be written for PEFT, and why.

    Returns:
        The directories.
    """
    written: list[Path] = []
    for model in models:
        if not (model / ADAPTER_WEIGHTS).is_file():
            continue
        from beit_jax.convert import exporter  # not at the top: writing native checkpoints needs no converter
        from beit_jax.convert.formats import PEFT

        name = model.name
        directory = model.with_name(name.replace("model", "adapter") if "model" in name else f"{name}-adapter")
        try:
            exporter.export(load(model), directory, PEFT, overwrite=True, source=model)
        except BeitJaxError as error:  # the factors lie beside the model
            say(f"note: no adapter for peft: {error}")
        else:
            written.append(directory)
    return tuple(written)
