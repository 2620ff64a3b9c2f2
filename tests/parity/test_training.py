"""Steps three and four of parity: gradients of the loss, leaf by leaf, and steps of the optimizer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import torch
from cases import thorough
from flax import nnx
from tolerances import GRADIENT, STEP

from beit_jax.config import BeitConfig
from beit_jax.convert import to_torch
from beit_jax.models.build import Model
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.step.optim import adam, optimizer
from beit_jax.tree import flatten, unflatten

Converted = Callable[[torch.nn.Module], Model]
CASES = {
    "classification": ("image_classification", reference.TINY | reference.BIAS["both"] | {"num_labels": 5}),
    "classification by class token": (
        "image_classification",
        reference.TINY | {"use_mean_pooling": False, "use_absolute_position_embeddings": True, "num_labels": 5},
    ),
    "masked": ("masked_image_modeling", reference.TINY | reference.BIAS["shared"] | {"use_mask_token": True}),
    "base size": ("masked_image_modeling", reference.BIAS["shared"] | {"use_mask_token": True}),
}


@pytest.fixture
def case(request: pytest.FixtureRequest, converted: Converted) -> tuple[torch.nn.Module, Model, dict[str, np.ndarray]]:
    """The reference with gradients of its own loss in ``.grad``, our model, and the batch."""
    task, options = CASES[request.param]
    theirs = reference.random_model(task=task, **options)
    pixel_values = reference.pixels(theirs)
    rng = np.random.default_rng(3)
    if task == "image_classification":
        batch = {"pixel_values": pixel_values, "labels": rng.integers(0, theirs.config.num_labels, len(pixel_values))}
        loss = theirs(reference.to_torch(pixel_values), labels=torch.from_numpy(batch["labels"])).loss
    else:
        mask = reference.mask(theirs, pixel_values)
        batch = {
            "pixel_values": pixel_values,
            "mask": mask,
            "labels": rng.integers(0, theirs.config.vocab_size, mask.shape),
        }
        labels = torch.from_numpy(batch["labels"][mask])
        loss = theirs(reference.to_torch(pixel_values), torch.from_numpy(mask), labels=labels).loss
    loss.backward()
    return theirs, converted(theirs), batch


def loss_and_gradients(model: Model, batch: dict[str, np.ndarray]) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Cross entropy over the images, or over the masked patches, and its gradients under torch's names."""
    graph, state = nnx.split(model)

    def loss(params: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(batch["pixel_values"], batch.get("mask")).logits
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch["labels"]))
        return each.mean() if "mask" not in batch else (each * batch["mask"]).sum() / batch["mask"].sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(nnx.to_pure_dict(state))
    return value, to_torch(model.config, jax.tree.map(np.asarray, flatten(gradients)))


@pytest.mark.parametrize("case", thorough(CASES, but=[name for name in CASES if name != "base size"]), indirect=True)
def test_every_gradient_leaf(case: tuple[torch.nn.Module, Model, dict[str, np.ndarray]]) -> None:
    theirs, ours, batch = case
    _, gradients = loss_and_gradients(ours, batch)
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_as_in_files(theirs).items()}
    assert gradients.keys() == expected.keys()
    for name, reference_gradient in expected.items():
        scale = np.abs(reference_gradient).max()
        assert scale > 0, f"{name}: the reference has no gradient, so nothing is tested"
        assert np.abs(gradients[name] - reference_gradient).max() <= GRADIENT * scale, name


@pytest.mark.parametrize("case", [name for name in CASES if name != "base size"], indirect=True)
def test_one_adamw_step(case: tuple[torch.nn.Module, Model, dict[str, np.ndarray]]) -> None:
    theirs, ours, batch = case
    rate = 1e-2
    _, gradients = loss_and_gradients(ours, batch)
    params = to_torch(ours.config, jax.tree.map(np.asarray, flatten(nnx.to_pure_dict(nnx.state(ours)))))
    tx = optax.chain(adam(0.9, 0.98, 1e-8), optax.add_decayed_weights(0.05))
    updates, _ = tx.update(gradients, tx.init(params), params)
    stepped = jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates)
    torch.optim.AdamW(theirs.parameters(), rate, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.05).step()
    for name, parameter in reference.named_as_in_files(theirs).items():
        # Adam's first step is the sign of the gradient: where that drowns in rounding, it is arbitrary in both.
        gradient = np.abs(parameter.grad.numpy())
        clear = gradient > 1e-3 * gradient.max()
        assert clear.mean() > 0.2, name
        difference = np.abs(np.asarray(stepped[name]) - parameter.detach().numpy())[clear]
        assert difference.max() <= STEP * rate, name


ADAMS = {
    "BEiT's": OptimOptions(beta2=0.98, weight_decay=0.05),
    "torch's": OptimOptions(weight_decay=0.01),
    "slow": OptimOptions(beta1=0.95, beta2=0.9999, weight_decay=0.0),
    "of large epsilon": OptimOptions(epsilon=1e-3, weight_decay=0.05),
    "without a first moment": OptimOptions(beta1=0.0, beta2=0.99, weight_decay=0.0),
}


@pytest.mark.parametrize("scale", [1e-4, 1.0])
@pytest.mark.parametrize("name", ADAMS)
def test_twenty_steps_of_adamw(name: str, scale: float) -> None:
    """The same gradients for both. The way is as long as the parameters are large, so that it shows in all digits."""
    options = replace(ADAMS[name], lr=0.1, clip=None, layer_decay=1.0)
    rng = np.random.default_rng(0)
    params = {"classifier": {"kernel": rng.standard_normal((40, 500)).astype(np.float32)}}
    theirs = torch.nn.Parameter(torch.from_numpy(params["classifier"]["kernel"].copy()))
    adamw = torch.optim.AdamW(
        [theirs], options.lr, (options.beta1, options.beta2), options.epsilon, options.weight_decay
    )
    tx = optimizer(options, BeitConfig())
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(20):
        gradient = (scale * rng.standard_normal((40, 500))).astype(np.float32)
        theirs.grad = torch.from_numpy(gradient)
        adamw.step()
        updates, state = update({"classifier": {"kernel": gradient}}, state, params)
        params = jax.tree.map(lambda leaf, change: leaf - np.float32(options.lr) * change, params, updates)
        expected = theirs.detach().numpy()
        assert np.abs(params["classifier"]["kernel"] - expected).max() <= 1e-6 * np.abs(expected).max()


def test_unflatten_inverts_flatten() -> None:
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert unflatten(flatten(nested)) == nested
