"""Forward passes that outlive their process: the next one finds them traced, and imports neither Flax nor the models.

JAX's compilation cache saves a process the work of XLA; but to ask for a program, it has to trace it again. What that
takes (Flax, a model, its tracing) is a third of a second start (benchmarks/RESULTS.md). So programs are kept beside
those that JAX has compiled, as portable StableHLO: some ten kilobytes each, without weights.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax import export
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import func, stablehlo
from jax.interpreters import mlir
from jax.typing import ArrayLike
from jaxtyping import Array

from beit_jax.atomic import new_file
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.inference.predictor import Predictor, Wanted, parameters
from beit_jax.tree import unflatten
from beit_jax.version import source_digest
from beit_jax.weights.native import NativeCheckpoint

SUFFIX = ".stablehlo"


@dataclass(frozen=True)
class _Program:
    """Of the leaves of parameters and pixel_values, by name, a float32 array of this shape."""

    shape: tuple[int, ...]
    stablehlo: bytes

    def __call__(self, params: Mapping[str, Array], pixel_values: ArrayLike) -> Array:
        return _call.bind(*jax.tree.leaves((params, pixel_values)), program=self)


_call = Primitive("kept_program")  # `jax.export` has a call, too, but it imports SciPy's linear algebra first: 0.1 s
_call.def_abstract_eval(lambda *arguments, program: jax.core.ShapedArray(program.shape, jnp.float32))


def _lower(context: mlir.LoweringRuleContext, *arguments: Any, program: _Program) -> Sequence[Any]:
    module, symbols = context.module_context.module, context.module_context.symbol_table
    parsed = stablehlo.deserialize_portable_artifact(module.context, program.stablehlo)
    name = mlir.merge_mlir_modules(module, "kept", parsed, dst_symtab=symbols)
    main: Any = symbols[name]
    return func.CallOp(main.type.results, name, arguments).results


mlir.register_lowering(_call, _lower)


def predictor(checkpoint: NativeCheckpoint) -> Predictor:
    """Of a checkpoint that was read, by a kept program where programs are kept (see `directory`)."""
    place = directory()
    if place is None:
        from beit_jax.inference import predict  # not at the top: it imports Flax

        return predict.predictor(predict.build(checkpoint), checkpoint.processor)
    # By default JAX keeps only what it compiles for more than a second, which is no forward pass of the smaller models.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Predictor(checkpoint.config, checkpoint.processor, forward(checkpoint.config, parameters(checkpoint), place))


def directory() -> Path | None:
    """Where programs are kept: in JAX's compilation cache (JAX_COMPILATION_CACHE_DIR), if it is a local directory.

    Only programs for one CPU are: models for several devices are told how to divide their work when they are traced,
    and what starts a GPU or a TPU takes longer than what this saves.
    """
    settings = jax.config.values
    place = settings["jax_compilation_cache_dir"]
    if not place or "://" in place or not settings["jax_enable_compilation_cache"]:
        return None
    return Path(place) / "beit-jax" if jax.default_backend() == "cpu" and jax.device_count() == 1 else None


def forward(config: BeitConfig, params: Mapping[str, Array], place: Path) -> Callable[[ArrayLike, Wanted], Array]:
    """What `beit_jax.inference.predict.forward` computes of the model with these (flat, float32) parameters.

    A damaged program is traced again. One that cannot be written is used all the same, with a warning, as JAX has it.
    """

    @lru_cache
    def program(shape: tuple[int, ...], wanted: Wanted) -> Callable[[Mapping[str, Array], ArrayLike], Array]:
        path = place / (_key(config, shape, wanted) + SUFFIX)
        found = _load(path)
        if found is None:
            found = _traced(config, params, shape, wanted)
            _save(path, found)
        return jax.jit(found)

    return lambda pixel_values, wanted: program(np.shape(pixel_values), wanted)(params, pixel_values)


def _key(config: BeitConfig, shape: tuple[int, ...], wanted: Wanted) -> str:
    """A digest of all that a traced program depends on: the question, the versions, JAX's settings, and our code."""
    versions = [version(name) for name in ("jax", "jaxlib", "flax")]
    settings = [(name, value) for name, value in sorted(jax.config.values.items()) if "_cache_" not in name]
    digest = xxhash.xxh3_128(repr((config, shape, wanted, versions, settings)).encode())
    digest.update(source_digest().encode())
    return digest.hexdigest()


def _traced(config: BeitConfig, params: Mapping[str, Array], shape: tuple[int, ...], wanted: Wanted) -> _Program:
    from beit_jax.inference import predict  # not at the top: they import Flax
    from beit_jax.models import build

    def compute(params: Mapping[str, Array], pixel_values: Array) -> Array:
        return predict.forward(build.build_model(config, unflatten(params)), pixel_values, wanted)

    jitted = jax.jit(compute, keep_unused=True)  # features need no classifier, but are given one
    found = export.export(jitted)(params, jax.ShapeDtypeStruct(shape, jnp.float32))
    return _Program(found.out_avals[0].shape, found.mlir_module_serialized)


def _load(path: Path) -> _Program | None:
    """The program in a file; None if there is none, or if its digest, which stands in front, is not its own."""
    if not os.access(path, os.R_OK):
        return None
    content = path.read_bytes()
    digest, rest = content[:16], content[16:]
    if xxhash.xxh3_128_digest(rest) != digest:
        return None
    shape, program = rest.split(b"\n", 1)
    return _Program(tuple(json.loads(shape)), program)


def _save(path: Path, program: _Program) -> None:
    content = json.dumps(program.shape).encode() + b"\n" + program.stablehlo
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            partial.write_bytes(xxhash.xxh3_128_digest(content) + content)
    except (BeitJaxError, OSError) as error:
        warnings.warn(f"{path}: the program was not kept, the next start will trace it again ({error})", stacklevel=2)
