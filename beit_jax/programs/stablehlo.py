"""Writes a model as a StableHLO program by `jax.export`: what `beit_jax.load_program` loads.

One program serves CPUs, NVIDIA GPUs and TPUs: where the platforms have forms of their own (`models.one_cpu`), it holds
each of them, and the one of the device is compiled. Its batch is free, unless it is fixed, and so are height and width
on request, of models without tables of positions.

No name of a file of this machine gets into it: JAX's locations of source lines are left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import save_file

from beit_jax.atomic import check_destination, new_directory
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR
from beit_jax.inference.predictor import params_of
from beit_jax.json_file import write_json
from beit_jax.models.build import param_shapes
from beit_jax.programs import manifest as manifests
from beit_jax.programs.manifest import EXPORTED, FORMAT, PROGRAM, WEIGHTS, Manifest, Tensor
from beit_jax.programs.options import DEFAULT, ProgramOptions
from beit_jax.programs.program import check_flatbuffers, load_program, version_number
from beit_jax.programs.signature import Program, program, takes_mask
from beit_jax.weights.native import NativeCheckpoint

PLATFORMS: Final = ("cpu", "cuda", "tpu")

OLDEST_JAX: Final = "0.10.2"
"""The oldest JAX that this library runs on."""

STABLEHLO_OF: Final[Mapping[str, str]] = {OLDEST_JAX: "1.17.0"}
"""The newest StableHLO that a release of JAX reads (`stablehlo.get_current_version`), by the release. An older reader
than the first is not supported; one between two of them reads what the one before it does."""

TOLERANCE: Final[Mapping[str, float]] = {"float32": 1e-5, "bfloat16": 3e-2}
"""The largest difference between the program and the model, as a share of the largest output above 1."""


def export_program(
    checkpoint: NativeCheckpoint,
    destination: str | Path,
    options: ProgramOptions = DEFAULT,
    *,
    overwrite: bool = False,
    source: str | Path | None = None,
) -> list[str]:
    """Writes the program of a checkpoint as a new directory, whole or not at all.

    The written program is loaded and compared with the model on noise before the directory gets its name.

    Args:
        overwrite: replace an earlier program, which stays whole until the new one is complete.
        source: where the checkpoint was read from, which is never replaced.

    Returns:
        Notes for the user: what the program takes and gives, and how far it is from the model.

    Raises:
        BeitJaxError: a model without free sides that was to have them; a floor that is no version or too old;
            flatbuffers is missing; the destination cannot be written.
    """
    destination, source = Path(destination), None if source is None else Path(source)
    check_export(destination, checkpoint.config, options, overwrite=overwrite, source=source)
    weights = {name: np.asarray(leaf) for name, leaf in params_of(checkpoint).items()}
    with _no_locations():
        call = _call(checkpoint.config, weights, options)
        used = call.used(weights)
        exported = call.exported(used, PLATFORMS)
    size = sum(leaf.nbytes for leaf in used.values())
    with new_directory(destination, overwrite=overwrite, contents=PROGRAM, source=source, need_bytes=size) as directory:
        (directory / EXPORTED).write_bytes(_serialized(exported, options.jax_floor))
        save_file(used, directory / WEIGHTS, metadata={"format": FORMAT})
        (directory / WEIGHTS).chmod((directory / EXPORTED).stat().st_mode & 0o777)  # the library writes for the owner
        write_json(directory / CONFIG, checkpoint.config.to_hf())
        write_json(directory / PROCESSOR, checkpoint.processor.to_hf())
        manifests.write(directory, _manifest(checkpoint, options, exported, directory, call.names))
        error = _difference(directory, call, used, TOLERANCE[options.dtype])
        notes = _notes(directory, error)
    return notes


def check_export(
    destination: Path,
    config: BeitConfig,
    options: ProgramOptions,
    *,
    overwrite: bool = False,
    source: Path | None = None,
) -> None:
    """Refuses what `export_program` would refuse, before the checkpoint is read.

    Raises:
        BeitJaxError: as `export_program`.
    """
    check_flatbuffers()
    options.check()
    floor = options.jax_floor
    if floor is not None:
        number = version_number(floor)
        if not number or number < version_number(OLDEST_JAX) or number > version_number(jax.__version__):
            raise BeitJaxError(
                f"--jax-floor {printable(floor, 40)}: expected a version from {OLDEST_JAX} to {jax.__version__}, the "
                "JAX that writes"
            )
    if options.free_sides and (needs := _needs_sides(config)):
        raise BeitJaxError(
            f"--free-sides: {needs} need a known height and width; leave it out, and export once for each size"
        )
    check_destination(destination, overwrite=overwrite, contents=PROGRAM, source=source)


def _needs_sides(config: BeitConfig) -> str | None:
    """What of a model is computed for one height and width, as `models.position.check_known` refuses it."""
    if config.position_bias != "none":
        return "tables of relative position bias"
    if config.use_absolute_position_embeddings:
        return "absolute position embeddings"
    if config.task == "semantic_segmentation" or (config.task == "backbone" and config.add_fpn):
        return "the feature pyramid and the heads on it"
    return None


@dataclass(frozen=True)
class _Call:
    """A function to export and its inputs.

    Attributes:
        inputs: shapes and dtypes after the weights; sizes may be symbolic.
        names: of the inputs.
        shapes: of all weights of the model.
    """

    function: Program
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def used(self, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The weights that the outputs depend on: an auxiliary head, for one, is for the loss alone."""
        jaxpr = jax.make_jaxpr(self.function)(_abstract(weights), *self.inputs).jaxpr
        live = set(_variables(jaxpr.outvars))
        for equation in reversed(jaxpr.eqns):
            if not live.isdisjoint(equation.outvars):
                live.update(_variables(equation.invars))
        names = sorted(weights)  # as JAX flattens a dict
        return {name: weights[name] for name, given in zip(names, jaxpr.invars, strict=False) if given in live}

    def compute(self, weights: Mapping[str, Any], *inputs: Any) -> dict[str, jax.Array]:
        """The function of the used weights."""
        rest = {name: jnp.zeros(shape) for name, shape in self.shapes.items() if name not in weights}
        return self.function({**weights, **rest}, *inputs)

    def exported(self, weights: Mapping[str, np.ndarray], platforms: tuple[str, ...]) -> export.Exported:
        def beit(weights: Mapping[str, Any], *inputs: Any) -> dict[str, jax.Array]:
            return self.compute(weights, *inputs)

        jitted = jax.jit(beit, keep_unused=True)
        return export.export(jitted, platforms=platforms)(_abstract(weights), *self.inputs)


def _variables(atoms: Iterable[Any]) -> Iterator[Any]:
    """Of what an equation reads, all but the literals, which have a value."""
    return (atom for atom in atoms if not hasattr(atom, "val"))


def _abstract(weights: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}


def _call(config: BeitConfig, weights: Mapping[str, np.ndarray], options: ProgramOptions) -> _Call:
    scope = export.SymbolicScope()
    batch = "b" if options.batch is None else str(options.batch)
    (rows, columns), (high, wide) = config.grid, config.patch_size
    sides = (f"{high}*h", f"{wide}*w") if options.free_sides else config.image_size
    patches = "h*w" if options.free_sides else rows * columns
    pixels = export.symbolic_shape(f"{batch}, {sides[0]}, {sides[1]}, {config.num_channels}", scope=scope)
    inputs, names = [jax.ShapeDtypeStruct(pixels, jnp.float32)], ["pixel_values"]
    if takes_mask(config, options.features):
        mask = export.symbolic_shape(f"{batch}, {patches}", scope=scope)
        inputs.append(jax.ShapeDtypeStruct(mask, jnp.bool))
        names.append("bool_masked_pos")
    function = program(config, dtype=options.dtype, features=options.features)
    shapes = {name: tuple(shape) for name, shape in param_shapes(config).items()}
    return _Call(function, tuple(inputs), tuple(names), shapes)


@contextmanager
def _no_locations() -> Iterator[None]:
    """JAX notes no lines of source files, whose paths are this machine's, in what is traced and lowered within."""
    limit = "jax_traceback_in_locations_limit"
    before = jax.config.values[limit]
    jax.config.update(limit, 0)
    try:
        yield
    finally:
        jax.config.update(limit, before)


def _serialized(exported: export.Exported, floor: str | None) -> bytes:
    """The bytes of a program, in the StableHLO of the release `floor` or of the release before it in the table."""
    if floor is not None:
        release = max((each for each in STABLEHLO_OF if _at_most(each, floor)), key=version_number)
        exported = replace(exported, mlir_module_serialized=_written_as(exported, STABLEHLO_OF[release]))
    return bytes(exported.serialize())


def _at_most(version: str, other: str) -> bool:
    return version_number(version) <= version_number(other)


def _written_as(exported: export.Exported, version: str) -> bytes:
    """The StableHLO of a program in the format of another version."""
    from jax.extend.mlir import ir  # not at the top: only a floor needs it, and JAX promises little of it
    from jax.extend.mlir.dialects import stablehlo

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        written: bytes = stablehlo.serialize_portable_artifact(module, version)
        return written


def _manifest(
    checkpoint: NativeCheckpoint,
    options: ProgramOptions,
    exported: export.Exported,
    directory: Path,
    names: tuple[str, ...],
) -> Manifest:
    inputs = exported.in_avals[-len(names) :]
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return Manifest(
        task=checkpoint.config.task,
        dtype=options.dtype,
        inputs={name: _tensor(aval) for name, aval in zip(names, inputs, strict=True)},
        outputs={name: _tensor(aval) for name, aval in outputs.items()},
        platforms=exported.platforms,
        jax=jax.__version__,
        oldest_jax=options.jax_floor or (jax.__version__ if options.free else OLDEST_JAX),
        calling_convention=exported.calling_convention_version,
        labels=tuple(checkpoint.config.labels),
        origin=public_origin(checkpoint.provenance),
        files={name: manifests.sha256(directory / name) for name in manifests.DIGESTED},
    )


def _tensor(aval: Any) -> Tensor:
    shape = tuple(str(size) if export.is_symbolic_dim(size) else int(size) for size in aval.shape)
    return Tensor(shape, str(aval.dtype))


def public_origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Of where weights are from, what may leave this machine: a hub name and its revision, and digests of files.

    The name of a local source is a path, and stays here.
    """
    hub = provenance.get("revision") is not None
    found = {key: provenance.get(key) for key in ("source", "revision")} if hub else {}
    files = provenance.get("files")
    return {**found, **({"files": dict(files)} if isinstance(files, Mapping) else {})}


Difference = tuple[float, float]


def _difference(directory: Path, call: _Call, weights: Mapping[str, np.ndarray], tolerance: float) -> Difference:
    """How far the program, loaded, is from the model on noise: the largest difference, and the largest output.

    Raises:
        BeitJaxError: further than the tolerance.
    """
    loaded = load_program(directory)
    rng, shapes = np.random.default_rng(0), {name: tensor.shape for name, tensor in loaded.inputs.items()}
    sizes = {"b": 2, "h": 2, "w": 3}
    inputs = [
        _noise(rng, name, tuple(manifests.size_of(dim, sizes) for dim in shape)) for name, shape in shapes.items()
    ]
    model: Callable[..., dict[str, jax.Array]] = jax.jit(call.compute)
    found, expected = loaded(*inputs), model(weights, *inputs)
    errors = [float(np.abs(np.asarray(found[name]) - np.asarray(expected[name])).max()) for name in expected]
    largest = max(float(np.abs(np.asarray(each)).max()) for each in expected.values())
    if not max(errors) <= tolerance * max(1.0, largest):
        raise BeitJaxError(
            f"{printable(directory.name)}: the written program is {max(errors):.1e} from the model, expected at most "
            f"{tolerance:.0e} of {largest:.3g}; nothing was kept, report it with the versions of jax and jaxlib"
        )
    return max(errors), largest


def _noise(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape).astype(np.float32)
    return values > 0 if name == "bool_masked_pos" else values


def _notes(directory: Path, error: Difference) -> list[str]:
    told = manifests.read(directory)
    return [
        *(f"takes {name} {tensor}" for name, tensor in told.inputs.items()),
        *(f"gives {name} {tensor}" for name, tensor in told.outputs.items()),
        f"for {', '.join(told.platforms)}; called by jax {told.oldest_jax} and newer, written by {told.jax}",
        f"loaded and compared with the model: at most {error[0]:.1e} from it (largest output {error[1]:.3g})",
    ]
