"""The outputs of a model for batches, on every host, in the order of the images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from beit_jax.inference.predictor import OutputName, named
from beit_jax.tree import Nested

from ..distributed.sharding import make_mesh, replicated
from .stepping import EvalStep, HostBatch, on_every_device, stream

Outputs = tuple[np.ndarray, np.ndarray]
"""(float32 [n, outputs], labels [n, ...]) of the images of a batch."""
Observe = Callable[[np.ndarray, np.ndarray], None]


@lru_cache(maxsize=8)
def make_output_step(graph: nnx.GraphDef[Any], mesh: Mesh, output: OutputName = "logits") -> EvalStep:
    """The compiled step: (nested) parameters and a batch -> outputs, labels and which rows are valid, of all hosts."""

    def step(params: Nested, batch: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        found = named(nnx.merge(graph, params)(batch["image"]), output)
        return found.astype(jnp.float32), batch["label"], batch["valid"]

    return jax.jit(step, out_shardings=replicated(mesh))


def outputs(
    model: nnx.Module | tuple[nnx.GraphDef[Any], Nested],
    batches: Iterable[HostBatch],
    *,
    mesh: Mesh | None = None,
    columns: Sequence[int] | None = None,
    output: OutputName = "logits",
    observe: Observe | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Iterator[Outputs]:
    """Yields the outputs of a model for every batch, and its labels; rows that only fill up are left out.

    Args:
        model, mesh, advance: as for `accuracy.evaluate_classification`.
        batches: of this host: dicts as `evaluation_batches.eval_batches` makes them, with any kind of label.
        columns: the outputs that count, in this order; by default all.
        output: the model's logits, which it must have, or one of its features.
        observe: called with the outputs and labels of every batch too.
    """
    mesh = make_mesh((-1, 1, 1)) if mesh is None else mesh
    graph, params = model if isinstance(model, tuple) else on_every_device(model, mesh)
    sent = ({name: batch[name] for name in ("image", "label", "valid")} for batch in batches)
    for result in stream(make_output_step(graph, mesh, output), params, sent, mesh):
        found, label, valid = (np.asarray(array) for array in result)
        advance(int(valid.sum()))
        found, label = (found if columns is None else found[:, list(columns)])[valid], label[valid]
        if observe is not None:
            observe(found, label)
        yield found, label
