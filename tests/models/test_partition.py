"""Constraints on activations exist under a mesh only, and never change a value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from beit_jax.config import BeitConfig
from beit_jax.models.build import abstract_model, build_model, param_shapes
from beit_jax.models.partition import BATCH_AXES, constrain, each_shard
from beit_jax.tree import unflatten

CONFIG = BeitConfig(
    task="image_classification",
    image_size=(16, 16),
    patch_size=(8, 8),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    position_bias="shared",
    labels=("a", "b"),
)
PIXELS = np.random.default_rng(1).standard_normal((4, 16, 16, 3)).astype(np.float32)


def mesh(names: tuple[str, ...] = ("data", "fsdp", "tensor"), kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((1,) * len(names), names, axis_types=(kind,) * len(names), devices=jax.devices()[:1])


def logits(params: Any, pixels: Any) -> Any:
    return build_model(CONFIG, params)(pixels).logits


def params() -> Any:
    rng = np.random.default_rng(0)
    return unflatten({n: rng.standard_normal(s).astype(np.float32) * 0.2 for n, s in param_shapes(CONFIG).items()})


def constraints(function: Any, *args: Any) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("sharding_constraint[")


def test_the_model_constrains_embeddings_and_blocks_under_a_mesh_only() -> None:
    assert constraints(logits, params(), PIXELS) == 0
    with jax.set_mesh(mesh()):
        # After the embeddings; in the body of the scan; and the copies of the table of positions.
        assert constraints(logits, params(), PIXELS) == 3
        abstract_model(CONFIG)  # made without arrays, constraints or not


def test_one_device_computes_the_same_bits_with_and_without() -> None:
    plain = jax.jit(logits)(params(), PIXELS)
    with jax.set_mesh(mesh()):
        assert np.array_equal(jax.jit(logits)(params(), PIXELS), plain)


def test_the_batch_alone_is_split() -> None:
    with jax.set_mesh(mesh()):
        (equation,) = jax.make_jaxpr(constrain)(jnp.zeros((4, 3, 2))).eqns
    assert equation.params["sharding"].spec == P(BATCH_AXES)


@pytest.mark.parametrize("names", [("data",), ("x", "y")])
def test_other_meshes_are_left_alone(names: tuple[str, ...]) -> None:
    with jax.set_mesh(mesh(names)):
        assert constraints(constrain, jnp.zeros((4, 3, 2))) == 0


def test_explicit_axes_and_shard_map_are_left_alone() -> None:
    with jax.set_mesh(mesh(kind=AxisType.Explicit)):
        assert constraints(constrain, jnp.zeros((4, 3, 2))) == 0
    with jax.set_mesh(mesh()):
        by_hand = jax.shard_map(constrain, in_specs=P("data"), out_specs=P("data"))
        assert constraints(by_hand, jnp.zeros((4, 3, 2))) == 0


def test_a_batch_that_does_not_divide_is_left_alone() -> None:
    four = jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(four):
        assert constraints(constrain, jnp.zeros((6, 3, 2))) == 0
        assert constraints(constrain, jnp.zeros((8, 3, 2))) == 1


def test_copies_for_every_shard() -> None:
    table = jnp.arange(6.0).reshape(2, 3)
    four = jax.sharding.AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    assert np.array_equal(each_shard(table, 8), table[None])
    with jax.sharding.use_abstract_mesh(four):
        assert jax.eval_shape(lambda table: each_shard(table, 8), table).shape == (4, 2, 3)
        assert jax.eval_shape(lambda table: each_shard(table, 6), table).shape == (1, 2, 3)
