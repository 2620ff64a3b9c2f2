"""Training of VQ-KD against torch code written here from its description; parameters are named and laid out as ours.

As for fine-tuning, epsilon is well above the rounding of gradients, which Adam would otherwise blow up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tolerances import GRADIENT, TRAINING
from torch.nn import functional as F

from beit_jax.tokenizers.build import abstract_tokenizer, build_tokenizer
from beit_jax.tokenizers.vqkd import VqkdConfig
from beit_jax.train.objectives.vqkd import VqkdOptions, VqkdRecipe, tokenizer_statistics, vqkd
from beit_jax.train.recipe import ModelOptions, OptimOptions, Recipe
from beit_jax.train.step.optim import optimizer
from beit_jax.train.step.state import State, initial_state, variables
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import Nested, flatten, unflatten

STEPS, BATCH, PATCH = 5, 8, 8
TINY = VqkdConfig(
    image_size=(32, 32),
    patch_size=(PATCH, PATCH),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    decoder_hidden_size=24,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=3,
    decoder_intermediate_size=40,
    vocab_size=40,
    codebook_dim=6,
    target_size=10,
)
RECIPE = VqkdRecipe(
    "parity",
    model=ModelOptions(dtype="float32", drop_path=0.0),
    vqkd=VqkdOptions(decay=0.9, commitment=0.7, kmeans=False),
    optim=OptimOptions(beta2=0.99, weight_decay=0.3, epsilon=1e-3),
)
RATES = np.linspace(1e-3, 5e-3, STEPS, dtype=np.float32)
Arrays = dict[str, np.ndarray]
Tensors = Mapping[str, torch.Tensor]


class PatchTeacher(nnx.Module):
    """A teacher that is no encoder of the library: a nonlinear function of every patch's pixels."""

    def __init__(self, target_size: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (PATCH * PATCH * 3, target_size)))

    @property
    def target_size(self) -> int:
        return self.kernel.shape[1]

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        b, h, w, _ = pixel_values.shape
        cut = pixel_values.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, 3).swapaxes(2, 3)
        return jnp.tanh(cut.reshape(b, h // PATCH, w // PATCH, -1) @ self.kernel[...])


def random_params() -> Arrays:
    """None at zero, codes of length one."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        inputs = {"qkv_kernel": shape[1:2], "out_kernel": shape[1:3], "patch_kernel": shape[:3]}
        fan_in = np.prod(inputs.get(name.split("/")[-1], shape[-2:-1]))
        scale = fan_in**-0.5 if name.endswith("kernel") else 0.2
        values = scale * rng.standard_normal(shape) + name.endswith("scale")
        if name == "codebook/embedding":
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        return np.abs(values).astype(np.float32) if name == "codebook/usage" else values.astype(np.float32)

    shapes = flatten(abstract_tokenizer(TINY)[1])
    return {name: draw(name, leaf.shape) for name, leaf in shapes.items()} | {"codebook/initialised": np.ones(1, "f")}


def batches() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8) for _ in range(STEPS)]


# --- The description, in torch ----------------------------------------------------------------------------------------


def below(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def norm(x: torch.Tensor, p: Tensors, name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], eps=1e-6)


def dense(x: torch.Tensor, p: Tensors, name: str) -> torch.Tensor:
    return F.linear(x, p[f"{name}/kernel"].T, p[f"{name}/bias"])


def block(x: torch.Tensor, p: Tensors) -> torch.Tensor:
    q, k, v = torch.einsum("bnd,dkhe->kbhne", norm(x, p, "norm1"), p["attention/qkv_kernel"])
    q, v = q + p["attention/q_bias"][:, None], v + p["attention/v_bias"][:, None]
    attended = F.scaled_dot_product_attention(q, k, v)
    x = x + torch.einsum("bhne,hed->bnd", attended, p["attention/out_kernel"]) + p["attention/out_bias"]
    return x + dense(F.gelu(dense(norm(x, p, "norm2"), p, "mlp/fc1")), p, "mlp/fc2")


def transformer(x: torch.Tensor, p: Tensors) -> torch.Tensor:
    """[b, c, h, w] to normalised patch tokens [b, patches, d]."""
    kernel = p["embeddings/patch_kernel"].permute(3, 2, 0, 1)
    patches = F.conv2d(x, kernel, p["embeddings/patch_bias"], stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([p["embeddings/cls_token"].expand(len(x), -1, -1), patches], 1) + p["embeddings/position_embeddings"]
    blocks = below(p, "blocks/")
    for layer in range(len(blocks["norm1/scale"])):
        x = block(x, {name: stacked[layer] for name, stacked in blocks.items()})
    return norm(x[:, 1:], p, "pooler_norm")


def task_layer(x: torch.Tensor, p: Tensors, name: str) -> torch.Tensor:
    return dense(torch.tanh(dense(x, p, f"{name}/fc1")), p, f"{name}/fc2")


@dataclass
class TorchVqkd:
    """Parameters, codebook and options; `loss` moves the codebook as the original's forward pass in training does."""

    params: dict[str, torch.Tensor]
    codes: torch.Tensor
    usage: torch.Tensor
    teacher: torch.Tensor
    options: VqkdOptions

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        encoded = transformer(pixels.permute(0, 3, 1, 2) * 2 - 1, below(self.params, "encoder/"))
        return F.normalize(task_layer(encoded, self.params, "encode_task"), dim=-1)

    def loss(self, images: np.ndarray) -> tuple[torch.Tensor, dict[str, float]]:
        pixels = torch.from_numpy(images).float() / 255
        z = self.features(pixels)
        tokens = torch.cdist(z.detach().double(), self.codes.double().expand(len(z), -1, -1)).argmin(-1)
        drawn = self.codes[tokens]
        passed = z + (drawn - z).detach()
        self.move(z.detach().flatten(0, 1), tokens.flatten())

        side = 32 // PATCH
        decoded = transformer(passed.transpose(1, 2).unflatten(2, (side, side)), below(self.params, "decoder/"))
        predicted = task_layer(decoded, self.params, "decode_task")
        cut = pixels.unflatten(2, (side, PATCH)).unflatten(1, (side, PATCH)).transpose(2, 3)
        target = torch.tanh(cut.flatten(3).flatten(1, 2) @ self.teacher)
        rebuilt = (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()
        committed = self.options.commitment * F.mse_loss(z, drawn)
        share = torch.bincount(tokens.flatten()) / tokens.numel()
        return rebuilt + committed, {
            "rec_loss": rebuilt.item(),
            "quant_loss": committed.item(),
            "codebook_used": len(tokens.unique()) / len(self.codes),
            "perplexity": torch.distributions.Categorical(share).entropy().exp().item(),
        }

    @torch.no_grad()
    def move(self, samples: torch.Tensor, tokens: torch.Tensor) -> None:
        decay, codes = self.options.decay, self.codes.clone()
        for token in tokens.unique():
            mean = F.normalize(samples[tokens == token].mean(0), dim=0)
            codes[token] = decay * self.codes[token] + (1 - decay) * mean
        self.codes = F.normalize(codes, dim=-1)
        self.usage = decay * self.usage + (1 - decay) * torch.bincount(tokens, minlength=len(codes))


def torch_vqkd(params: Arrays, teacher: np.ndarray, options: VqkdOptions) -> TorchVqkd:
    learned = {name: torch.tensor(leaf) for name, leaf in params.items() if not name.startswith("codebook/")}
    codes, usage = (torch.tensor(params[f"codebook/{name}"]) for name in ("embedding", "usage"))
    for tensor in learned.values():
        tensor.requires_grad_()
    return TorchVqkd(learned, codes, usage, torch.tensor(teacher), options)


def train_torch(model: TorchVqkd, data: list[np.ndarray], options: OptimOptions) -> Iterator[dict[str, float]]:
    """Loss and metrics of every step: means over its parts, which are every n-th image."""
    groups = [
        {"params": [tensor], "weight_decay": options.weight_decay if name.endswith("kernel") else 0.0}
        for name, tensor in model.params.items()
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(options.beta1, options.beta2), eps=options.epsilon)
    for images, rate in zip(data, RATES, strict=True):
        adam.zero_grad()
        logs = []
        for part in range(options.accumulate):
            loss, log = model.loss(images[part :: options.accumulate])
            (loss / options.accumulate).backward()
            logs.append(log | {"loss": loss.item()})
        for group in adam.param_groups:
            group["lr"] = float(rate)
        adam.step()
        yield {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}


# --- Ours -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The same parameters, teacher and images for both."""

    params: Arrays
    graph: nnx.GraphDef[PatchTeacher]
    teacher: Nested

    def nested(self) -> Nested:
        return unflatten({name: jnp.asarray(leaf) for name, leaf in self.params.items()})

    def theirs(self, options: VqkdOptions) -> TorchVqkd:
        return torch_vqkd(self.params, np.asarray(self.teacher["kernel"]), options)


@pytest.fixture(scope="module")
def case() -> Case:
    graph, teacher = nnx.split(PatchTeacher(TINY.target_size, nnx.Rngs(2)))
    return Case(random_params(), graph, nnx.to_pure_dict(teacher))


def train_ours(case: Case, data: list[np.ndarray], recipe: Recipe) -> tuple[list[dict[str, float]], State]:
    names = tokenizer_statistics(TINY)
    tx, objective = optimizer(recipe.optim, TINY.encoder), vqkd(recipe, case.graph)
    state = initial_state(case.nested(), tx, statistics=names, frozen=jax.tree.map(jnp.copy, case.teacher))
    graph, logs = abstract_tokenizer(TINY)[0], []
    step = jax.jit(make_train_step(graph, objective, tx, RATES, accumulate=recipe.optim.accumulate), donate_argnums=0)
    for images in data:
        state, metrics = step(state, {"image": images})
        logs.append({name: float(value) for name, value in metrics.items()})
    return logs, state


def assert_close(found: Any, expected: np.ndarray, tolerance: float, scale: float, name: str) -> None:
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * scale, name


def test_loss_and_every_gradient(case: Case) -> None:
    images, objective = batches()[0], vqkd(RECIPE, case.graph)
    theirs = case.theirs(RECIPE.vqkd)
    expected, log = theirs.loss(images)
    expected.backward()

    params = case.nested()
    stats = {"codebook": params.pop("codebook")}

    def loss(params: Nested) -> Any:
        batch = objective.prepare({"image": jnp.asarray(images)}, jax.random.key(0))
        model = build_tokenizer(TINY, variables(params, stats))
        return objective.loss(model, batch, jax.random.key(1), case.teacher)

    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(value, expected.item(), rtol=TRAINING)
    assert metrics.keys() == log.keys() and log["codebook_used"] > 0.3
    for name, number in log.items():
        np.testing.assert_allclose(metrics[name], number, rtol=TRAINING, err_msg=name)
    found = flatten(gradients)
    assert found.keys() == theirs.params.keys()
    for name, tensor in theirs.params.items():
        assert tensor.grad is not None
        largest = tensor.grad.abs().max().item()
        assert largest > 1e-5, f"{name} has no gradient to speak of"
        assert_close(found[name], tensor.grad.numpy(), GRADIENT, largest, name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_five_steps(case: Case, accumulate: int) -> None:
    """Losses, parameters, and the codebook, which moves after it was used, for every part of a batch."""
    recipe = replace(RECIPE, optim=replace(RECIPE.optim, accumulate=accumulate))
    theirs, data = case.theirs(recipe.vqkd), batches()
    expected_logs = list(train_torch(theirs, data, recipe.optim))
    logs, state = train_ours(case, data, recipe)

    for log, expected in zip(logs, expected_logs, strict=True):
        for name, number in expected.items():
            np.testing.assert_allclose(log[name], number, rtol=TRAINING, err_msg=name)
    after = flatten(state.params)
    for name, tensor in theirs.params.items():
        movement = np.abs(tensor.detach().numpy() - case.params[name]).max()
        assert movement > 1e-3, f"{name} hardly moved, so that nothing is tested"
        assert_close(after[name], tensor.detach().numpy(), TRAINING, movement, name)
    book = state.stats["codebook"]
    for name, tensor in (("embedding", theirs.codes), ("usage", theirs.usage)):
        movement = np.abs(tensor.numpy() - case.params[f"codebook/{name}"]).max()
        assert movement > 0.1
        assert_close(book[name], tensor.numpy(), TRAINING, movement, name)
    for name in ("cluster_size", "embedding_average", "initialised"):
        assert np.array_equal(book[name], case.params[f"codebook/{name}"])
    for name, leaf in flatten(case.teacher).items():
        assert np.array_equal(flatten(state.frozen)[name], leaf)


def test_clusters_of_the_first_batch(case: Case) -> None:
    """k-means of the batch's directions makes the codes of which that batch's tokens are taken."""
    recipe = replace(RECIPE, vqkd=replace(RECIPE.vqkd, kmeans=True))
    fresh = replace(case, params=case.params | {"codebook/initialised": np.zeros(1, "f")})
    images, key = batches()[0], jax.random.key(5)
    theirs = fresh.theirs(recipe.vqkd)
    with torch.no_grad():
        samples = theirs.features(torch.from_numpy(images).float() / 255).flatten(0, 1)
    chosen = np.asarray(jax.random.permutation(key, len(samples))[: TINY.vocab_size])
    centres = samples[torch.tensor(chosen)]
    for _ in range(10):
        nearest = (samples @ centres.T).argmax(-1)
        members = [samples[nearest == cluster] for cluster in range(len(centres))]
        means = [own.mean(0) if len(own) else old for own, old in zip(members, centres, strict=True)]
        centres = F.normalize(torch.stack(means), dim=-1)
    theirs.codes = centres
    expected, _ = theirs.loss(images)

    objective = vqkd(recipe, case.graph)

    @jax.jit
    def ours(params: Nested) -> tuple[jax.Array, Nested]:
        model: Any = build_tokenizer(TINY, params)
        value, _ = objective.loss(model, objective.prepare({"image": jnp.asarray(images)}, key), key, case.teacher)
        return value, nnx.to_pure_dict(nnx.state(model.codebook))

    value, book = ours(fresh.nested())
    np.testing.assert_allclose(value, expected.item(), rtol=TRAINING)
    np.testing.assert_array_equal(book["cluster_size"], [len(own) for own in members])
    np.testing.assert_allclose(book["embedding"], theirs.codes.numpy(), atol=TRAINING)
    np.testing.assert_allclose(book["usage"], theirs.usage.numpy(), rtol=TRAINING)
    assert book["initialised"] == 1
