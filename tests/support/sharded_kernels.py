"""Gradients of one small model with the kernels of attention, on meshes of eight virtual devices, as JSON.

Run as a script in a process of its own: how many devices there are is settled when JAX starts.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from beit_jax.config import BeitConfig
from beit_jax.kernels import tpu
from beit_jax.models.build import abstract_model
from beit_jax.train.distributed.sharding import make_mesh, place, put_batch, state_shardings
from beit_jax.tree import Nested, flatten, unflatten

CONFIG = BeitConfig(
    task="image_classification",
    image_size=(16, 32),
    patch_size=(8, 8),
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    position_bias="both",
    labels=("a", "b", "c"),
)
# Data, fsdp, tensor; the batch. Two images of eight devices' batch are not divided: the textbook form.
MESHES = ((8, 1, 1, 8), (2, 4, 1, 16), (2, 2, 2, 8), (1, 1, 8, 2), (8, 1, 1, 4))


def drawn(batch: int) -> tuple[Nested, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = flatten(abstract_model(CONFIG)[1])
    params = {name: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    return unflatten(params), rng.standard_normal((batch, *CONFIG.image_size, 3)).astype(np.float32)


def gradient(params: Nested, pixels: Any) -> Nested:
    graph = abstract_model(CONFIG)[0]
    return jax.grad(
        lambda params: jnp.square(nnx.merge(graph, params)(pixels, key=jax.random.key(0), remat="block").logits).sum()
    )(params)


def on_mesh(data: int, fsdp: int, tensor: int, batch: int) -> dict[str, Any]:
    params, pixels = drawn(batch)
    expected = flatten(jax.jit(lambda *given: gradient(*given))(params, pixels))
    mesh = make_mesh((data, fsdp, tensor))
    with jax.set_mesh(mesh):
        placed = place(params, state_shardings(params, mesh))
        whole = batch % (data * fsdp) == 0
        images = put_batch({"image": pixels}, mesh)["image"] if whole else pixels
        with tpu.interpreted():
            program = jax.jit(lambda *given: gradient(*given))
            kernels = str(jax.make_jaxpr(program)(placed, images)).count("name=attention_rows")
        found = flatten(program(placed, images))
    apart = {
        name: float(np.abs(np.asarray(found[name]) - expected[name]).max() / np.abs(expected[name]).max())
        for name in expected
    }
    return {"kernels": kernels, "apart": apart}


def main() -> None:
    json.dump({"x".join(map(str, mesh)): on_mesh(*mesh) for mesh in MESHES}, sys.stdout)


if __name__ == "__main__":
    main()
