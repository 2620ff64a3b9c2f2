"""Training steps of one small model on meshes of eight virtual devices and on one device without a mesh, as JSON.

Run as a script in a process of its own: how many devices there are is settled when JAX starts.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from beit_jax.config import BeitConfig
from beit_jax.models.build import abstract_model
from beit_jax.train.distributed.sharding import init_sharded, make_mesh, place, put_batch, replicated, state_shardings
from beit_jax.train.objectives.classification import ClassificationRecipe, classification
from beit_jax.train.recipe import AugmentOptions, ModelOptions, OptimOptions
from beit_jax.train.step.optim import optimizer
from beit_jax.train.step.schedule import decay_table
from beit_jax.train.step.state import State, initial_state
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import Nested, flatten, unflatten

CONFIG = BeitConfig(
    task="image_classification",
    image_size=(32, 32),
    patch_size=(8, 8),
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
    position_bias="both",
    drop_path_rate=0.1,
    hidden_dropout_prob=0.1,
    labels=tuple("abcdefgh"),
)
RECIPE = ClassificationRecipe(
    name="sharded",
    model=ModelOptions(dtype="float32", remat="block"),
    augment=AugmentOptions(mixup=0.8, cutmix=1.0, erasing=0.25),
    optim=OptimOptions(clip=1.0, layer_decay=0.8),
)
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))
STEPS, BATCH, PARTS, RATE, DECAY = 5, 16, 2, 1e-3, 0.9


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8),
            "label": rng.integers(0, CONFIG.num_labels, BATCH, dtype=np.int32),
        }
        for _ in range(STEPS)
    ]


def host_params(config: BeitConfig) -> Nested:
    """Random parameters that keep activations near unit size, none at zero."""
    rng = np.random.default_rng(1)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = rng.standard_normal(shape).astype(np.float32)
        return 1 + 0.1 * value if name.endswith(("scale", "gamma_1", "gamma_2")) else 0.05 * value

    return unflatten({name: values(name, leaf.shape) for name, leaf in flatten(abstract_model(config)[1]).items()})


class Run:
    """The functions of a run."""

    def __init__(self, config: BeitConfig) -> None:
        graph, self.shapes = abstract_model(config)
        tx, rates = optimizer(RECIPE.optim, config), np.full(STEPS, RATE, np.float32)
        self.initial = partial(initial_state, tx=tx, average=True)
        self.step = make_train_step(
            graph,
            classification(RECIPE, config),
            tx,
            rates,
            accumulate=PARTS,
            decays=decay_table(OptimOptions(ema=DECAY), STEPS),
        )
        self.params = host_params(config)

    def start(self, mesh: Mesh) -> State:
        shardings = state_shardings(jax.eval_shape(self.initial, self.shapes), mesh)
        return init_sharded(self.initial, mesh, place(self.params, shardings.params))

    def compile(self, state: State, mesh: Mesh) -> Any:
        step = jax.jit(self.step, donate_argnums=0, out_shardings=(state_shardings(state, mesh), replicated(mesh)))
        return step.lower(state, put_batch(batches()[0], mesh)).compile()


def on_one_device() -> tuple[dict[str, Any], State]:
    """What every mesh must compute as well."""
    run = Run(CONFIG)
    start, losses, step = run.initial(run.params), [], jax.jit(run.step)
    state = start
    for batch in batches():
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    moved = difference(state.params, start.params)
    return {"losses": losses, "moved": moved, "steps": int(state.step), "skipped": int(state.skipped)}, state


def on_mesh(shape: tuple[int, int, int], expected: State) -> dict[str, Any]:
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        run, losses = Run(CONFIG), []
        state = run.start(mesh)
        before, step = placement(state), run.compile(state, mesh)
        for batch in batches():
            state, metrics = step(state, put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        drawn = init_sharded(draw, mesh)
    return {
        "losses": losses,
        "params": difference(state.params, expected.params),
        "average": difference(state.average, expected.average),
        "before": before,
        "after": placement(state),
        "collectives": collectives(step),
        "bias crosses": bias_crosses(step),
        "same draw": np.array_equal(drawn["classifier"]["kernel"], draw()["classifier"]["kernel"]),
    }


def draw() -> Nested:
    return {"classifier": {"kernel": jax.random.normal(jax.random.key(0), (512, 128))}}


def difference(a: Nested, b: Nested) -> float:
    """Largest absolute difference over all leaves."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), a, b)))


def placement(state: State) -> dict[str, Any]:
    """Bytes in all, bytes on every device, and the shape of what a device holds of every parameter."""
    parts = {"params": state.params, "moments": state.opt, "average": state.average}
    return {
        "total": {part: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for part, tree in parts.items()},
        "held": {part: held(tree) for part, tree in parts.items()},
        "shards": {name: leaf.addressable_shards[0].data.shape for name, leaf in flatten(state.params).items()},
    }


def held(tree: Any) -> list[int]:
    """Bytes on every device, from the buffers themselves."""
    sizes: Counter[int] = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device.id] += shard.data.nbytes
    return [sizes[device.id] for device in jax.devices()]


def collectives(step: Any) -> dict[str, int]:
    """How often each collective operation stands in the compiled program. The body of a loop counts once."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    return dict(Counter(re.findall(rf" ({kinds})(?:-start)?\(", step.as_text())))


def bias_crosses(step: Any) -> bool:
    """Whether devices sum, gather or exchange arrays with an element for every two tokens."""
    tokens = 1 + CONFIG.grid[0] * CONFIG.grid[1]
    moved = re.findall(r"= (.*) (?:all-|reduce-scatter|collective-)[\w-]*\(", step.as_text())
    return any(f"{tokens},{tokens}]" in shapes for shapes in moved)


def deeper(shape: tuple[int, int, int]) -> dict[str, int]:
    """The collectives of a model twice as deep."""
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        run = Run(replace(CONFIG, num_hidden_layers=2 * CONFIG.num_hidden_layers))
        return collectives(run.compile(run.start(mesh), mesh))


def main() -> None:
    one, expected = on_one_device()
    meshes = {"x".join(map(str, shape)): on_mesh(shape, expected) for shape in MESHES}
    json.dump({"one": one, "meshes": meshes, "deeper": deeper(MESHES[1])}, sys.stdout)


if __name__ == "__main__":
    main()
