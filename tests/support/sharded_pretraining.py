"""Pre-training steps of small models on meshes of eight virtual devices and on one device, as JSON.

Run as a script in a process of its own: how many devices there are is settled when JAX starts.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.images import ImageProcessor
from beit_jax.models.build import param_shapes
from beit_jax.tokenizers.build import tokenizer_shapes
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
from beit_jax.tokenizers.dvae import DvaeEncoderConfig
from beit_jax.train.distributed.sharding import make_mesh, put_batch
from beit_jax.train.loop.plan import Plan
from beit_jax.train.objectives.data2vec import Data2vec, Data2vecOptions, Data2vecRecipe
from beit_jax.train.objectives.masked_tokens import MaskedTokens, MaskedTokensRecipe, TokenOptions
from beit_jax.train.objectives.objective import Sources
from beit_jax.train.objectives.vqkd import Vqkd, VqkdOptions, VqkdRecipe
from beit_jax.train.recipe import MaskOptions, ModelOptions, OptimOptions
from beit_jax.train.step.optim import optimizer
from beit_jax.train.step.state import State
from beit_jax.tree import flatten
from beit_jax.weights import NativeCheckpoint

MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2))
STEPS, BATCH, PATCHES, MOST, RATE = 5, 16, 16, 9, 1e-3
VOCABULARY = 256
STUDENT = BeitConfig(
    task="masked_image_modeling",
    image_size=(32, 32),
    patch_size=(8, 8),
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=512,
    position_bias="shared",
    use_mask_token=True,
    drop_path_rate=0.1,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    vocab_size=VOCABULARY,
)
ENCODER = replace(
    STUDENT, task="features", pooling="cls", use_mask_token=False, drop_path_rate=0.0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
DVAE = DvaeEncoderConfig(n_hid=128, vocab_size=VOCABULARY, group_count=2, n_blk_per_group=1, image_size=(8, 8))
RECIPE = MaskedTokensRecipe(
    name="sharded",
    model=ModelOptions(dtype="float32"),
    mask=MaskOptions(patches=MOST, min_block=1),
    optim=OptimOptions(lr=RATE, clip=3.0),
)


def checkpoint(config: BeitConfig, seed: int) -> NativeCheckpoint:
    """Random parameters that keep activations near unit size, none at zero."""
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = rng.standard_normal(shape).astype(np.float32)
        return 1 + 0.1 * value if name.endswith(("scale", "gamma_1", "gamma_2")) else 0.05 * value

    params = {name: values(name, shape) for name, shape in param_shapes(config).items()}
    return NativeCheckpoint(config, ImageProcessor(mean=(0.5,) * 3, std=(0.5,) * 3), params)


def masked_tokens() -> MaskedTokens:
    config = replace(STUDENT, aggregate_from=1, aggregation_layers=1)
    rng = np.random.default_rng(1)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    tokenizer = TokenizerCheckpoint(DVAE, {name: values(shape) for name, shape in tokenizer_shapes(DVAE).items()})
    tokens, optim = TokenOptions(aggregate_from=1, aggregation_layers=1), replace(RECIPE.optim, accumulate=2)
    recipe = replace(RECIPE, tokens=tokens, optim=optim)
    return MaskedTokens(recipe, config, Sources(tokenizer=tokenizer), STEPS)


def data2vec() -> Data2vec:
    config = replace(STUDENT, vocab_size=STUDENT.hidden_size)
    options = replace(RECIPE.optim, ema=0.9)
    recipe = RECIPE.derive(Data2vecRecipe, data2vec=Data2vecOptions(target_layers=2), optim=options)
    return Data2vec(recipe, config, Sources(start=checkpoint(config, 2)), STEPS)


def vqkd() -> Vqkd:
    options = VqkdOptions(vocab_size=32, codebook_dim=8, decoder_layers=1)
    model = replace(RECIPE.model, drop_path=0.0)
    recipe = RECIPE.derive(VqkdRecipe, model=model, vqkd=options)
    return Vqkd(recipe, ENCODER, Sources(teacher=checkpoint(ENCODER, 3)), STEPS)


OBJECTIVES: dict[str, Callable[[], Any]] = {"masked_tokens": masked_tokens, "data2vec": data2vec, "vqkd": vqkd}


def batches() -> list[dict[str, np.ndarray]]:
    """Patches of different colours, and masks that hide three to nine of them."""
    rng = np.random.default_rng(0)

    def batch() -> dict[str, np.ndarray]:
        colours = rng.integers(0, 200, (BATCH, 4, 4, 3))
        coarse = colours.repeat(2, axis=1).repeat(2, axis=2) + rng.integers(0, 56, (BATCH, 8, 8, 3))
        image = colours.repeat(8, axis=1).repeat(8, axis=2) + rng.integers(0, 56, (BATCH, 32, 32, 3))
        ranks = rng.permuted(np.tile(np.arange(PATCHES), (BATCH, 1)), axis=1)
        return {
            "image": image.astype(np.uint8),
            "token_image": coarse.astype(np.uint8),
            "mask": ranks < rng.integers(3, MOST + 1, (BATCH, 1)),
        }

    return [batch() for _ in range(STEPS)]


def planned(name: str, shape: tuple[int, int, int]) -> Plan:
    """A run as `make_plan` makes it, of data that nobody reads."""
    objective, data = OBJECTIVES[name](), range(BATCH)
    return Plan(
        recipe=objective.recipe,
        config=objective.config,
        processor=ImageProcessor(),
        sources=objective.sources,
        training=data,  # type: ignore[arg-type]
        validation=None,
        mesh=make_mesh(shape, jax.devices()[: int(np.prod(shape))]),
        objective=objective,
        tx=optimizer(objective.recipe.optim, objective.config),
        rates=np.full(STEPS, RATE, np.float32),
    )


Held = dict[str, list[int]]


def steps(name: str, shape: tuple[int, int, int]) -> tuple[list[float], tuple[State, Held], State]:
    """Losses; the state at the start, in host memory, as steps consume it, and where it lay; and the one at the end."""
    plan = planned(name, shape)
    with jax.set_mesh(plan.mesh):
        state, losses = plan.first_state(), []
        before = jax.tree.map(np.array, state), placement(state)
        for batch in batches():
            wanted = {part: batch[part] for part in plan.objective.batch(BATCH)}
            state, metrics = plan.step(state, put_batch(wanted, plan.mesh))
            losses.append(float(metrics["loss"]))
    return losses, before, state


def on_one_device(name: str) -> tuple[dict[str, Any], State]:
    """What every mesh must compute as well."""
    losses, (before, _), state = steps(name, (1, 1, 1))
    return {
        "losses": losses,
        "moved": {name: difference(part, parts(before)[name]) for name, part in parts(state).items()},
        "steps": int(state.step),
        "skipped": int(state.skipped),
    }, jax.tree.map(np.array, state)


def on_mesh(name: str, shape: tuple[int, int, int], expected: State) -> dict[str, Any]:
    losses, (_, first), state = steps(name, shape)
    return {
        "losses": losses,
        **{name: difference(part, parts(expected)[name]) for name, part in parts(state).items()},
        "held": placement(state),
        "held at first": first,
        "sizes": {path: leaf.shape for path, leaf in flatten(state.average or state.frozen).items()},
    }


def parts(state: State) -> dict[str, Any]:
    """The parameters, the second network (the frozen one, or the average), and running statistics."""
    return {"params": state.params, "second": state.frozen or state.average, "stats": state.stats}


def difference(a: Any, b: Any) -> float:
    """Largest absolute difference over all leaves; zero without any."""
    leaves = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), a, b)
    return max(jax.tree.leaves(leaves), default=0.0)


def placement(state: State) -> Held:
    """Bytes of the parameters and of the second network."""
    return {name: held(part) for name, part in parts(state).items() if name != "stats"}


def held(tree: Any) -> list[int]:
    """Bytes on every device, from the buffers themselves."""
    sizes: Counter[int] = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device.id] += shard.data.nbytes
    return [sizes[device.id] for device in jax.devices()]


def main() -> None:
    found = {}
    for name in OBJECTIVES:
        one, expected = on_one_device(name)
        meshes = {"x".join(map(str, shape)): on_mesh(name, shape, expected) for shape in MESHES}
        found[name] = {"one": one, "meshes": meshes}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
