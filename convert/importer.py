"""A PyTorch checkpoint becomes Flax parameters: first a plan, checked by names and shapes, and then the bytes.

Nothing is guessed: every tensor of the source is used, or known to be computed and not learned, and every leaf is
filled exactly once.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.atomic import check_destination, new_directory
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable, size_near
from beit_jax.hub import WEIGHTS, Source, as_source, resolve
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.adapt import Adaptation, adaptations
from beit_jax.terminal import Progress, no_progress
from beit_jax.weights.leaves import shapes as param_shapes
from beit_jax.weights.native import NATIVE, NativeCheckpoint, is_native, save_json
from beit_jax.weights.sizes import check_sizes
from beit_jax.weights.tensors import LeafSpec

from . import formats
from .adapters.base import native_base
from .adapters.merge import composed, onto
from .adapters.read import PeftAdapter, holds_adapter, read_adapter
from .files.checkpoint import Checkpoint, TensorInfo, holds_weights, open_checkpoint, open_weights
from .formats.format import SourceFormat
from .formats.rules import Step, steps
from .identify import Identity, groups, identify
from .images import Images, find_images
from .labels import asked, asked_head
from .options import DEFAULT, Options
from .provenance import digests as find_digests
from .provenance import provenance
from .reading import BFLOAT16, LeafReader
from .training_folders import holds_checkpoints, located
from .validation import FLOATS, check_tensors

_PLANNED_AT_ONCE = 1 << 14  # sizes with which a plan takes no time


@dataclass(frozen=True)
class Plan:
    """The plan of an import, made before any tensor is read.

    Attributes:
        config: the model of the result.
        images: how images are prepared, if that is known.
        naming: the source format, a page of `formats`.
        hosted: the file is another model's, which holds the encoder.
        steps: for every leaf of the model as it lies in the file, the tensors that fill it.
        specs: shape and dtype of every leaf of the result.
        adaptations: the leaves of the result that are made from other leaves, see `beit_jax.models.adapt`.
        dropped: tensors of the source that are computed and not learned, or that belong to a model around it.
        notes: lines for the user.
        digests: SHA-256 of every weight file, if it was asked for or is known.
        adapter: the name of the adapter that is merged into the source, which is its base; None without one.
    """

    source: Source
    config: BeitConfig
    images: Images
    checkpoint: Checkpoint
    naming: SourceFormat
    hosted: bool
    steps: Mapping[str, Step]
    specs: Mapping[str, LeafSpec]
    adaptations: Mapping[str, tuple[tuple[str, ...], Adaptation]]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    options: Options
    digests: Mapping[str, str | None]
    adapter: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def processor(self) -> ImageProcessor:
        """How images are prepared.

        Raises:
            BeitJaxError: what the source says of it cannot be used.
        """
        return self.images.processor

    @property
    def reader(self) -> LeafReader:
        return LeafReader(self.checkpoint, self.steps, self.specs, self.adaptations, self.options.allow_nonfinite)

    def provenance(self) -> dict[str, Any]:
        """Returns the origin of the weights, as the native checkpoint records it."""
        found = provenance(self.source, self.checkpoint, self.naming.name, self.digests, self.options.asked())
        return found if self.adapter is None else found | {"adapter": self.adapter}


def plan(source: Source | str | Path, options: Options = DEFAULT) -> Plan:
    """Reads names, shapes and configuration of a checkpoint, and checks that they belong together.

    Raises:
        BeitJaxError: a file cannot be read; the model is of another family; tensors are missing, unexpected, of another
            shape than the configuration says, or not floating point. The message names the file and the tensors.
    """
    given, adapter, which, notes = as_source(source), None, options, tuple[str, ...]()
    if options.base is not None:
        if holds_checkpoints(given.path):
            given, notes = located(given, options, holds_adapter)
            which = replace(options, checkpoint=None)  # of the source, not of the base
        given, adapter = resolve(options.base), read_adapter(given.path, open_weights)
    source, chosen = located(given, which, holds_weights)
    checkpoint = _open(source, options, adapter)
    checkpoint.notes = (*notes, *chosen, *checkpoint.notes)
    try:
        decided = _plan(source, checkpoint, options, adapter)
        return decided if adapter is None else replace(decided, adapter=str(adapter.path))
    except BaseException:
        checkpoint.close()
        raise


def _open(source: Source, options: Options, adapter: PeftAdapter | None) -> Checkpoint:
    if adapter is not None and source.path.is_dir() and is_native(source.path):
        return Checkpoint(source.path, [native_base(source.path)])
    beside = None if adapter is None else adapter.directory
    return open_checkpoint(source.path, prefer=options.weights, format=options.format, adapter=beside)


def _plan(source: Source, checkpoint: Checkpoint, options: Options, adapter: PeftAdapter | None) -> Plan:
    digests = find_digests(checkpoint, options)
    found = identify(source, checkpoint, formats.FORMATS, options)
    naming, prefix, described = found.place.format, found.place.prefix, found.described
    config, origin = described.config, described.origin
    checkpoint, tensors = found.part, found.part.tensors
    where = f"{source.path}{f', under {printable(found.place.outer)}' if found.place.outer else ''}"
    held = {name: info.shape for name, info in tensors.items()}
    check_sizes(config, held, origin or str(source.path), str(source.path), at_least=_PLANNED_AT_ONCE)
    shapes = param_shapes(config)
    rules = [rule for rule in naming.rules(config, prefix) if rule.flax in shapes]
    nameless = shapes.keys() - {rule.flax for rule in rules}
    if nameless:
        raise BeitJaxError(
            f"{origin or source.path}: describes a model with {printable(min(nameless))} and {len(nameless) - 1} "
            f"more parameters that {naming.name} files have no names for; correct it, or convert the original file"
        )
    planned = steps(rules, shapes)
    used = {name for step in planned.values() for names in step.layers for name in names}
    left_out, notes = _left_out(found, used)
    check_tensors(planned, tensors, left_out, config, where, origin)
    dropped = tuple(sorted([*(found.place.outer + name for name in left_out), *checkpoint.outside]))
    head = asked_head(config, options) if adapter is None else onto(adapter, config, formats.FORMATS, asked(options))
    target = _target(head.config, options)
    resized = adaptations(
        head.config,
        target,
        channels_from=options.channels_from,
        stored=_leaf_dtype_in_file(planned, tensors, "embeddings/patch_kernel"),
    )
    adapted = {**head.made, **composed(resized, head.made)}
    moved = {name: planned[old] for name, old in head.moved.items()}
    sources = {origin for origins, _ in head.made.values() for origin in origins}
    planned = {origin: planned[origin] for origin in sources - moved.keys()} | moved
    specs = {
        path: LeafSpec(shape, _leaf_dtype([planned[name] for name in adapted.get(path, ((path,),))[0]], tensors))
        for path, shape in param_shapes(target).items()
    }
    images = find_images(source, checkpoint, described, target, options)
    channels = _channel_notes(config.num_channels, target.num_channels, options.channels_from)
    found_in_file = [*checkpoint.notes, *_dtype_notes(planned, tensors)]
    notes = [*described.seen, *channels, *images.notes, *notes, *head.notes, *found_in_file]
    return Plan(
        source,
        target,
        images,
        checkpoint,
        naming,
        found.hosted,
        planned,
        specs,
        adapted,
        dropped,
        tuple(notes),
        options,
        digests,
    )


def convert(
    source: Source | str | Path,
    destination: str | Path,
    options: Options = DEFAULT,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Plan:
    """Converts a checkpoint into a native one at `destination`. Memory holds the tensors of one layer at a time.

    The result is written beside its destination, read back, compared with its digests, and then renamed.

    Args:
        overwrite: replace an existing destination, which stays whole until the new one is complete.
        progress: opened with the number of bytes to move, and called with each number of bytes that was moved. Every
            tensor counts twice: it is written and verified.

    Raises:
        BeitJaxError: as `plan`; NaN or infinite weights; a destination that cannot be written, or that is no model or
            holds the source. Nothing is left behind.
    """
    source, destination = as_source(source), Path(destination)
    check_destination(destination, overwrite=overwrite, contents=NATIVE, source=source.path)
    decided = plan(source, options)
    # The base of an adapter is not replaced either.
    check_destination(destination, overwrite=overwrite, contents=NATIVE, source=decided.source.path)
    with (
        decided.checkpoint,
        new_directory(
            destination, overwrite=overwrite, contents=NATIVE, source=source.path, need_bytes=decided.nbytes
        ) as directory,
        progress(2 * decided.nbytes) as advance,
    ):
        save_json(directory, decided.config, decided.processor)
        decided.reader.write(directory / WEIGHTS, decided.provenance(), advance)
    return decided


def load(source: Source | str | Path, options: Options = DEFAULT) -> NativeCheckpoint:
    """Converts a checkpoint in memory.

    Raises:
        BeitJaxError: as `convert`.
    """
    decided = plan(source, options)
    with decided.checkpoint:
        processor, params = decided.processor, decided.reader.params()
    return NativeCheckpoint(decided.config, processor, params, decided.provenance())


def _target(config: BeitConfig, options: Options) -> BeitConfig:
    """The configuration of the result."""
    changes: dict[str, Any] = {}
    if options.position_bias:
        changes["position_bias"] = options.position_bias
    if options.position_resize:
        changes["position_resize"] = options.position_resize
    if options.patch_size is not None:
        changes["patch_size"] = _pair(options.patch_size)
        changes["image_size"] = tuple(n * p for n, p in zip(config.grid, changes["patch_size"], strict=True))
    if options.image_size is not None:
        changes["image_size"] = _pair(options.image_size)
    if options.channels is not None or options.channels_from is not None:
        changes["num_channels"] = options.channels or len(options.channels_from or ())
    if options.channels_from is not None and max(options.channels_from) >= config.num_channels:
        raise BeitJaxError(
            f"--channels-from {' '.join(map(str, options.channels_from))}: expected channels of the checkpoint, 0 to "
            f"{config.num_channels - 1}"
        )
    sides, patch = changes.get("image_size", config.image_size), changes.get("patch_size", config.patch_size)
    if any(side % step for side, step in zip(sides, patch, strict=True)):
        raise BeitJaxError(
            f"--image-size {sides[0]} {sides[1]}: expected multiples of the patch {patch[0]}x{patch[1]}, such as "
            f"{' '.join(map(str, size_near(sides, patch)))}"
        )
    return replace(config, **changes)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _tensors_of(names: Collection[str]) -> str:
    """How many tensors, as a sentence begins."""
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'} of"


def _left_out(found: Identity, used: Collection[str]) -> tuple[set[str], list[str]]:
    """Tensors of the part that are no parameters of the model, and notes for the user about those that were learned."""
    naming, outer, tensors = found.place.format, found.place.outer, found.part.tensors
    derived = {name for name in tensors if naming.derived.search(name)}
    foreign = {name for name in tensors if naming.foreign.search(name) and name not in used}
    heads = {name for rule in naming.heads for name in rule.torch} if found.hosted else set()
    unused = {name for name in heads & tensors.keys() if name not in used}
    notes = []
    if foreign:
        notes.append(f"{_tensors_of(foreign)} parts that do not exist here left out: {groups(foreign, '')}")
    if outer:
        others = [*found.part.outside, *(outer + name for name in unused)]
        rest = f"; {_tensors_of(others)} the model around it left out: {groups(others, outer)}" if others else ""
        notes.append(f"{'encoder' if found.hosted else 'model'} taken from {printable(outer)!r}{rest}")
    if naming.classifier & unused:
        size = next(tensors[name].shape[0] for name in sorted(naming.classifier & unused))
        notes.append(
            f"among them a classifier of {size} classes that the encoder had before: the model around it does not use "
            "it, and it fits no longer if the encoder was trained further; --keep-head keeps it"
        )
    return {*derived, *foreign, *unused}, notes


def _leaf_dtype(steps: Sequence[Step], tensors: Mapping[str, TensorInfo]) -> np.dtype[Any]:
    """bfloat16 stays bfloat16. Any other dtype becomes float32, which holds every float16 exactly."""
    stored = {tensors[name].dtype for step in steps for names in step.layers for name in names}
    return BFLOAT16 if stored == {BFLOAT16} else np.dtype(np.float32)


def _leaf_dtype_in_file(planned: Mapping[str, Step], tensors: Mapping[str, TensorInfo], leaf: str) -> np.dtype[Any]:
    """The type of the tensor that a leaf is made of, whatever stands before its name."""
    (step,) = (step for name, step in planned.items() if name == leaf or name.endswith(f"/{leaf}"))
    return tensors[step.layers[0][0]].dtype


def _channel_notes(old: int, new: int, origin: tuple[int, ...] | None) -> list[str]:
    if old == new and origin is None:
        return []
    if new == 1 and origin is None:
        return [f"patch projection for 1 channel instead of {old}: their sum"]
    order = origin or [channel % old for channel in range(new)]
    shown = " ".join(map(str, order[:16])) + (" ..." if new > 16 else "")
    return [f"patch projection for {new} channels instead of {old}: {shown} (from 0), times {old}/{new}"]


def _dtype_notes(planned: Mapping[str, Step], tensors: Mapping[str, TensorInfo]) -> list[str]:
    used = [tensors[name] for step in planned.values() for names in step.layers for name in names]
    count = {dtype: sum(tensor.dtype == dtype for tensor in used) for dtype in FLOATS}
    said = {
        np.float16: "float16 widened to float32",
        np.float64: "float64 rounded to float32",
        BFLOAT16: "kept bfloat16",
    }
    return [f"{count[np.dtype(dtype)]} tensors {what}" for dtype, what in said.items() if count[np.dtype(dtype)]]
