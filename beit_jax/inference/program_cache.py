"""A cache of traced forward passes: a second process computes without tracing, and imports neither Flax nor models.

JAX's compilation cache saves a process the work of XLA. To look a program up there, JAX has to trace it first. Flax,
building the model and tracing it take a third of a second start (benchmarks/RESULTS.md). This module therefore stores
traced programs beside JAX's compiled ones, as portable StableHLO: some ten kilobytes each, without weights.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.typing import ArrayLike
from jaxtyping import Array

from beit_jax.atomic import new_file
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.inference.packing import packed
from beit_jax.inference.predictor import OutputName, Predictor, params_of
from beit_jax.kernels.cpu import library
from beit_jax.kernels.cpu.calls import Packed
from beit_jax.tree import unflatten
from beit_jax.version import source_digest
from beit_jax.weights.native import NativeCheckpoint

SUFFIX = ".stablehlo"

Params = Mapping[str, Array | Packed]
Program = Callable[[Params, ArrayLike], Array]


@dataclass(frozen=True)
class _Traced:
    """A traced forward pass: its StableHLO, and the shape of its float32 result."""

    shape: tuple[int, ...]
    stablehlo: bytes


def predictor(checkpoint: NativeCheckpoint, *, many: bool = False) -> Predictor:
    """The predictor of a checkpoint; it uses the cache where `cache_directory` names one.

    Args:
        many: for so many images that kernels are laid out for the processor first, see `packing.packed`: this takes the
            parameters out of the checkpoint.
    """
    directory = cache_directory()
    if directory is None:
        from beit_jax.inference import predict  # not at the top: it imports Flax

        return predict.predictor(predict.build(checkpoint, packed=many), checkpoint.processor)
    # By default JAX stores only what takes more than a second to compile, which no small model's forward pass does.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    params = packed(checkpoint.params) if many else params_of(checkpoint)
    compute = forward(checkpoint.config, params, directory)
    return Predictor(checkpoint.config, checkpoint.processor, compute)


def cache_directory() -> Path | None:
    """The directory of the traced programs, inside JAX's compilation cache (JAX_COMPILATION_CACHE_DIR).

    Returns:
        None if JAX has no such cache, or a remote one; and on anything but one CPU device. A program for several
        devices depends on how they divide the work, and starting a GPU or a TPU takes longer than this cache saves.
    """
    settings = jax.config.values
    directory = settings["jax_compilation_cache_dir"]
    if not directory or "://" in directory or not settings["jax_enable_compilation_cache"]:
        return None
    return Path(directory) / "beit-jax" if jax.default_backend() == "cpu" and jax.device_count() == 1 else None


def forward(config: BeitConfig, params: Params, directory: Path) -> Callable[[ArrayLike, OutputName], Array]:
    """The forward pass `beit_jax.inference.predict.forward` of a model, through the cache.

    A damaged file is traced again. A file that cannot be written, or a JAX that cannot call a stored program, costs a
    warning, and the result is computed all the same.

    Args:
        params: flat, float32; kernels may be packed.
    """

    @lru_cache
    def program(shape: tuple[int, ...], output: OutputName) -> Program:
        path = directory / (_key(config, params, shape, output) + SUFFIX)
        try:
            traced = _load(path)
            if traced is None:
                traced = _trace(config, params, shape, output)
                _save(path, traced)
            return jax.jit(_callable(traced, params, shape))
        except (ImportError, AttributeError, TypeError) as error:
            warnings.warn(f"this JAX has no jax.export as expected ({error}); no program is stored", stacklevel=2)
            return jax.jit(_model_forward(config, output))

    return lambda pixel_values, output: program(np.shape(pixel_values), output)(params, pixel_values)


def _key(config: BeitConfig, params: Params, shape: tuple[int, ...], output: OutputName) -> str:
    """A digest of all that a traced program depends on: the model, the shapes, JAX's settings, versions, our code."""
    laid_out = sorted(name for name, leaf in params.items() if isinstance(leaf, Packed))
    versions = [version(name) for name in ("jax", "jaxlib", "flax")]
    settings = [(name, value) for name, value in sorted(jax.config.values.items()) if "_cache_" not in name]
    digest = xxhash.xxh3_128(repr((config, laid_out, shape, output, versions, settings)).encode())
    digest.update(source_digest().encode() + library.identity().encode())
    return digest.hexdigest()


def _model_forward(config: BeitConfig, output: OutputName) -> Program:
    from beit_jax.inference import predict  # not at the top: they import Flax
    from beit_jax.models import build

    def compute(params: Params, pixel_values: ArrayLike) -> Array:
        return predict.forward(build.build_model(config, unflatten(params)), pixel_values, output)

    return compute


def _trace(config: BeitConfig, params: Params, shape: tuple[int, ...], output: OutputName) -> _Traced:
    exported = _export(_model_forward(config, output), params, shape, platform="cpu")
    return _Traced(exported.out_avals[0].shape, exported.mlir_module_serialized)


def _callable(traced: _Traced, params: Params, shape: tuple[int, ...]) -> Program:
    """A function that computes a traced program.

    jax.export reads files of its own only where the package flatbuffers is installed. This function exports a trivial
    program with the same arguments and the same result instead, and replaces its StableHLO. The trivial program is for
    a TPU, because `call` of a program for a CPU first imports SciPy's LAPACK (0.1 s), which no model needs.
    """
    trivial = _export(lambda params, pixel_values: jnp.zeros(traced.shape, jnp.float32), params, shape, platform="tpu")
    return replace(trivial, mlir_module_serialized=traced.stablehlo).call


def _export(function: Program, params: Params, shape: tuple[int, ...], *, platform: str) -> "jax.export.Exported":
    from jax import export  # not at the top: only the cache needs it

    jitted = jax.jit(function, keep_unused=True)  # so that every program takes all parameters; features need no head
    checks = [export.DisabledSafetyCheck.platform(), *map(export.DisabledSafetyCheck.custom_call, library.targets())]
    with library.stored_here():
        exporting = export.export(jitted, platforms=[platform], disabled_checks=checks)
        return exporting(params, jax.ShapeDtypeStruct(shape, jnp.float32))


def _load(path: Path) -> _Traced | None:
    """Reads a program; None if there is no file, or if its content does not have the digest at its beginning."""
    if not os.access(path, os.R_OK):
        return None
    content = path.read_bytes()
    digest, rest = content[:16], content[16:]
    if xxhash.xxh3_128_digest(rest) != digest:
        return None
    shape, program = rest.split(b"\n", 1)
    if library.PREFIX.encode() in program and not library.available():
        return None  # it calls kernels that cannot be loaded any more
    return _Traced(tuple(json.loads(shape)), program)


def _save(path: Path, traced: _Traced) -> None:
    content = json.dumps(traced.shape).encode() + b"\n" + traced.stablehlo
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            partial.write_bytes(xxhash.xxh3_128_digest(content) + content)
    except (BeitJaxError, OSError) as error:
        warnings.warn(f"{path}: the program was not stored; the next start traces it again ({error})", stacklevel=2)
