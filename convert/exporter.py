"""Flax parameters become PyTorch checkpoints, through the same rules as the import."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from beit_jax.adapters.file import load_adapter
from beit_jax.atomic import Contents, check_destination, new_directory
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR
from beit_jax.weights.leaves import shapes as param_shapes
from beit_jax.weights.native import NativeCheckpoint, is_native
from beit_jax.weights.native import load as load_native

from . import importer
from .adapters import written
from .formats import LAYOUTS, PEFT, writers
from .formats.format import SourceFormat
from .formats.writing import PTH, SAFETENSORS, SETTINGS, is_written_here

EXPORT = Contents("export", (CONFIG, PROCESSOR, SAFETENSORS, PTH, SETTINGS), is_written_here)
"""What an export may replace: an earlier export, but no native checkpoint and nobody else's model."""

ADAPTER = Contents("adapter", (*written.FILES, CONFIG, PROCESSOR), written.is_written_here)
"""The same of an adapter."""


def to_torch(
    config: BeitConfig, params: Mapping[str, np.ndarray], naming: SourceFormat | None = None
) -> dict[str, np.ndarray]:
    """The flat parameters of a model as torch tensors by name, contiguous, in the dtype they have.

    The tensors of a converted checkpoint come back bit for bit, with two exceptions. Tensors that were float16 or
    float64 are float32. Batch norm's counters of batches, which nothing reads, are zero.

    Args:
        naming: the format whose names the tensors get; by default the one that transformers writes for the model.
    """
    if naming is None:
        possible = writers(LAYOUTS[0])
        naming = next((each for each in possible if each.refusal(config) is None), possible[-1])
    return naming.to_torch(config, params)


def export(
    checkpoint: NativeCheckpoint | str | Path,
    destination: str | Path,
    layout: str = LAYOUTS[0],
    *,
    overwrite: bool = False,
    source: str | Path | None = None,
) -> list[str]:
    """Writes a PyTorch checkpoint as a new directory, whole or not at all.

    Args:
        checkpoint: in memory; or the directory of a native one, or a source of `convert`, which is read.
        layout: one of `LAYOUTS`. hf is for transformers' ``from_pretrained``, timm for
            ``timm.create_model("local-dir:...")``, original for unilm's scripts or, with a segmentation model, mmseg.
            mmpretrain and mmseg are for these libraries of Open-MMLab from 1.0 on. These three need torch to write.
            peft is the adapter of which the model is the merger, which lies in `source`.
        overwrite: replace an earlier export, which stays whole until the new one is complete.
        source: where the checkpoint was read from, which is never replaced.

    Returns:
        Notes for the user: facts of the checkpoint that have no place in the layout.

    Raises:
        BeitJaxError: the layout has no such model; torch is missing; the destination cannot be written; there is no
            such checkpoint.
    """
    if not isinstance(checkpoint, NativeCheckpoint):
        source = checkpoint if source is None else source
        checkpoint = load_native(checkpoint) if is_native(checkpoint) else importer.load(checkpoint)
    destination, source = Path(destination), None if source is None else Path(source)
    check_export(destination, layout, checkpoint.config, overwrite=overwrite, source=source)
    if layout == PEFT:
        return _export_adapter(checkpoint, destination, overwrite=overwrite, source=source)
    naming = _writer(layout, checkpoint.config)
    size = sum(leaf.nbytes for leaf in checkpoint.params.values())
    with new_directory(destination, overwrite=overwrite, contents=EXPORT, source=source, need_bytes=size) as directory:
        assert naming.write is not None  # `writers`
        return naming.write(naming, directory, checkpoint)


def _export_adapter(
    checkpoint: NativeCheckpoint, destination: Path, *, overwrite: bool, source: Path | None
) -> list[str]:
    if source is None:
        raise BeitJaxError("layout peft: needs the directory of the checkpoint, in which its factors lie; give source")
    record = load_adapter(source, {name: leaf.shape for name, leaf in checkpoint.params.items()})
    tensors = written.peft_tensors(checkpoint, record)  # refuses before a directory is made
    size = sum(leaf.nbytes for leaf in tensors.values())
    with new_directory(destination, overwrite=overwrite, contents=ADAPTER, source=source, need_bytes=size) as directory:
        return written.write_peft(directory, checkpoint, record, tensors)


def check_export(
    destination: Path, layout: str, config: BeitConfig, *, overwrite: bool = False, source: Path | None = None
) -> None:
    """Refuses what `export` would refuse, before the checkpoint is read.

    Raises:
        BeitJaxError: the layout has no such model, or the destination cannot be written.
    """
    if layout == PEFT and (reason := written.refusal(config)) is not None:
        raise BeitJaxError(reason)
    if layout != PEFT:
        _writer(layout, config)
    contents = ADAPTER if layout == PEFT else EXPORT
    check_destination(destination, overwrite=overwrite, contents=contents, source=source)


def _writer(layout: str, config: BeitConfig) -> SourceFormat:
    """The first format of a layout that can hold the model.

    Raises:
        BeitJaxError: there is none; says why, and which layouts hold it.
    """
    if layout not in LAYOUTS:
        expected = ", ".join((*LAYOUTS, PEFT))
        raise BeitJaxError(f"layout {printable(layout)}: expected one of {expected}")
    held_by = {each: next((n for n in writers(each) if _refusal(n, config) is None), None) for each in LAYOUTS}
    found = held_by[layout]
    if found is None:
        others = " or ".join(f"--to {each}" for each in LAYOUTS if held_by[each])
        raise BeitJaxError(f"{_refusal(writers(layout)[-1], config)}{f': export {others}' if others else ''}")
    return found


def _refusal(naming: SourceFormat, config: BeitConfig) -> str | None:
    """Why a format cannot hold a model: what its page says, or a parameter without a name there; None if it can."""
    if config.chained_pooling:
        return (
            "its pooling scales read one another, as in transformers' TensorFlow code; no library of PyTorch computes "
            "that, and it stays a native checkpoint"
        )
    reason = naming.refusal(config)
    if reason is not None:
        return reason
    named = {rule.flax for rule in naming.rules(config, naming.own_prefix(config))}
    nameless = param_shapes(config).keys() - named
    return f"{naming.name} has no name for {min(nameless)}" if nameless else None
