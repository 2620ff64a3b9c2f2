"""The forward pass of a model on the devices of this host: as today on one, sharded over the images on several."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from beit_jax.bulk.tasks import Compute, Computing
from beit_jax.hub import Source
from beit_jax.inference.predictor import OutputName, Predictor
from beit_jax.weights.native import NativeCheckpoint


def computing(source: Source, alone: Callable[[NativeCheckpoint], Predictor]) -> Computing:
    """The model of a source: a checkpoint of any format, or a program that `export --to stablehlo` wrote.

    Args:
        alone: the predictor of a checkpoint on one device, such as `beit_jax.inference.program_cache.predictor`.

    Raises:
        BeitJaxError: it cannot be read.
    """
    import jax

    from beit_jax.programs.manifest import is_program

    if is_program(source.path):
        return _program(source)
    from beit_jax.inference.reading import read

    checkpoint = read(source)
    facts = facts_of(source, checkpoint)
    devices = jax.local_devices()
    if len(devices) == 1:
        found = alone(checkpoint)
        return Computing(found.config, found.processor, found.compute, facts)
    from beit_jax.inference import predict

    compute = _sharded(predict.build(checkpoint), predict.forward)
    return Computing(checkpoint.config, checkpoint.processor, compute, facts, len(devices))


def facts_of(source: Source, checkpoint: NativeCheckpoint) -> dict[str, Any]:
    """What the outputs of a checkpoint depend on, for JSON: as `Computing.facts`."""
    from beit_jax.weights.digest import weights_digest

    return {
        "model": source.name,
        "revision": source.revision,
        "weights": weights_digest(checkpoint),
        "processor": checkpoint.processor.to_hf(),
    }


def _sharded(model: Any, forward: Callable[..., Any]) -> Compute:
    """The forward pass with the model on every device, and the images of a batch divided among them."""
    import jax

    from beit_jax.train.distributed.sharding import batch_sharding, make_mesh, replicated

    mesh = make_mesh((-1, 1, 1), jax.local_devices())
    copied, divided = jax.device_put(model, replicated(mesh)), batch_sharding(mesh)

    def compute(pixels: np.ndarray, output: OutputName) -> Any:
        with jax.set_mesh(mesh):
            return forward(copied, jax.device_put(pixels, divided), output)

    return compute


def _program(source: Source) -> Computing:
    from beit_jax.programs.manifest import MANIFEST
    from beit_jax.programs.program import load_program

    program = load_program(source.path)
    found = program.predictor
    facts = {
        "model": source.name,
        "revision": None,
        "weights": xxhash.xxh3_128_hexdigest((Path(source.path) / MANIFEST).read_bytes()),
        "processor": found.processor.to_hf(),
    }
    return Computing(found.config, found.processor, found.compute, facts, batch=program.manifest.batch)
