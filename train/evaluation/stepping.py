"""A compiled step over the batches of an evaluation: on every device, on all hosts, one batch ahead."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from beit_jax.images.bad_images import BadImages
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.partition import BATCH_AXES
from beit_jax.tree import Nested

from ..data.evaluation_batches import Images, eval_batches
from ..distributed.sharding import place, put_batch, replicated

HostBatch = Mapping[str, np.ndarray]
EvalStep = Callable[[Any, Mapping[str, Array]], Any]


def host_batches(
    images: Images,
    processor: ImageProcessor,
    batch_size: int,
    *,
    workers: int | None = None,
    bad: BadImages | None = None,
) -> Iterator[HostBatch]:
    """This host's part of `evaluation_batches.eval_batches`, which takes, yields and raises the same."""
    return eval_batches(
        images,
        processor,
        batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=workers,
        bad=bad,
    )


def stream(step: EvalStep, params: Any, batches: Iterable[HostBatch], mesh: Mesh) -> Iterator[Any]:
    """Yields the result of `step` for every batch. Each host gives its part of a batch; missing rows are padded.

    A result is yielded once the next batch was sent, so that hosts prepare images while devices compute. All hosts must
    give equally many batches of equal size, as `evaluation_batches.eval_batches` does: the others would wait for a host
    that gave fewer.
    """
    share_of_host = prod(mesh.shape[axis] for axis in BATCH_AXES) // jax.process_count()
    rows, pending = 0, None
    for batch in batches:
        needed = -(-len(batch["label"]) // share_of_host) * share_of_host
        rows = max(rows, needed)
        sent = put_batch({name: padded(array, rows) for name, array in batch.items()}, mesh)
        with jax.set_mesh(mesh):
            result = step(params, sent)
        if pending is not None:
            yield pending
        pending = result
    if pending is not None:
        yield pending


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    """The array [b, ...], filled up with zeros (``valid``: False) to [rows, ...]."""
    if len(array) == rows:
        return array
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def on_every_device(model: nnx.Module, mesh: Mesh) -> tuple[nnx.GraphDef[Any], Nested]:
    """A model's graph, and its parameters, copied to every device of the mesh."""
    graph, state = nnx.split(model)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
    return graph, place(params, jax.tree.map(lambda leaf: replicated(mesh), params))
