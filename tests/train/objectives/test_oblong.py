"""Every objective at a size that is no square, and on an architecture that nobody published: shapes of a whole step."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from objectives import MASK, RUNS, recipe_with

from beit_jax.train.forecast.aot import abstract_program
from beit_jax.train.objectives import OBJECTIVES

HEIGHT, WIDTH = 32, 48
OWN: Mapping[str, Any] = {"model.image-size": (HEIGHT, WIDTH)}
TRANSFORMER = {
    "model.patch-size": (8, 16), "model.hidden-size": 24, "model.depth": 4, "model.heads": 3, "model.mlp": 40,
}  # fmt: skip
POSITIONS = {
    "model.position-bias": "both", "model.absolute-positions": True, "model.epsilon": 1e-5, "model.activation": "relu",
    "model.layer-scale": 0.0,
}  # fmt: skip
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "classification": TRANSFORMER | POSITIONS,
    "linear_probe": TRANSFORMER | POSITIONS,
    "segmentation": TRANSFORMER | POSITIONS | {"data.batch-size": 16},
    "masked_tokens": TRANSFORMER | POSITIONS | MASK,
    "data2vec": TRANSFORMER | POSITIONS | MASK,
    "vqkd": TRANSFORMER,
    "dvae": {},
}


def described(tree: Any) -> Any:
    """Shapes and dtypes of a tree's leaves."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_at_an_oblong_size(objective: str) -> None:
    """A step, what the host makes of an image that is as oblong the other way round, and the evaluation's images."""
    name, options, _ = RUNS[objective]
    recipe = recipe_with(name, {**options, **OWN, **CHANGES[objective], "run.mesh": (1, 1, 1)})
    program = abstract_program(recipe, jax.devices()[:1], classes=5)
    learned, batch = program.objective, program.abstract_batch
    with jax.set_mesh(program.mesh):
        after, metrics = jax.eval_shape(program.step, program.abstract_state, batch)
    assert described(after) == described(program.abstract_state)
    assert metrics["loss"].shape == ()
    assert batch["image"].shape == (recipe.data.batch_size, HEIGHT, WIDTH, 3)
    if objective == "segmentation":  # whose views tests/train/augmentation has
        return
    image = np.random.default_rng(0).integers(0, 256, (90, 50, 3), dtype=np.uint8)
    found = learned.transform(image, np.random.default_rng(0))
    views = found if isinstance(found, dict) else {"image": found}
    expected = {name: (leaf.shape[1:], leaf.dtype) for name, leaf in batch.items() if name != "label"}
    assert described(views) == expected
    if objective in ("masked_tokens", "data2vec"):
        assert views["mask"].shape == ((HEIGHT // 8) * (WIDTH // 16),)
    if objective == "masked_tokens":  # VQ-KD's tokens stand for 16 x 16 pixels, one for each patch of 8 x 16
        assert views["token_image"].shape == (64, 48, 3)
    assert learned.processor(recipe, learned.config)(image).shape == (1, HEIGHT, WIDTH, 3)
