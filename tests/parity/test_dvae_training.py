"""Training a discrete VAE gives the losses, gradients and weights of a PyTorch model with PyTorch's own distributions.

DALL-E's training code was never published: the reference is the paper's text (arXiv 2102.12092, appendix A) in torch's
words. The Gumbel-softmax is torch's, and so are the logit-Laplace distribution (a sigmoid of a Laplace variable) and
the divergence of two categorical ones. Parameters keep our names and layout, convolutions take them transposed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from cases import thorough
from flax import nnx
from tolerances import GRADIENT, TRAINING
from torch import distributions

from beit_jax.train.objectives.dvae import DvaeOptions, DvaeRecipe, abstract_dvae, code_noise, dvae, initial_dvae
from beit_jax.tree import Nested, flatten, unflatten

Tensors = dict[str, torch.Tensor]
TOTAL, STEPS, RATE, DECAY = 20, 5, 3e-3, 0.05
# Adam divides by the gradient's size: with the usual 1e-8 a gradient that is all rounding would move its weight as far
# as others, and some unit of a ReLU, a pooling or an absolute value to its other side.
EPSILON = 1e-4
ROUNDINGS = 4
"""Of a weight in five steps, which end on the grid of float32."""
CASES = {
    "two groups of one block": DvaeOptions(vocab_size=24, width=8, groups=2, blocks=1, embedding=12, divergence=6.6),
    "three groups of two blocks": DvaeOptions(
        vocab_size=20, width=16, groups=3, blocks=2, embedding=10, divergence=3.0
    ),
}


class Reference:
    """Encoder, decoder and loss on a dict of parameters."""

    def __init__(self, params: dict[str, np.ndarray], options: DvaeOptions):
        self.params = {name: torch.from_numpy(leaf.copy()).requires_grad_() for name, leaf in params.items()}
        self.options = options

    def convolve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kernel = self.params[f"{name}/kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, self.params[f"{name}/bias"], padding=kernel.shape[-1] // 2)

    def residual(self, name: str, x: torch.Tensor) -> torch.Tensor:
        path = x
        for i in (1, 2, 3, 4):
            path = self.convolve(f"{name}/conv_{i}", torch.relu(path))
        straight = self.convolve(f"{name}/shortcut", x) if f"{name}/shortcut/kernel" in self.params else x
        return straight + path / (self.options.groups * self.options.blocks) ** 2

    def network(self, name: str, x: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = self.convolve(f"{name}/input", x)
        for group in range(1, self.options.groups + 1):
            x = x if group == 1 else between(x)
            for block in range(1, self.options.blocks + 1):
                x = self.residual(f"{name}/group_{group}/block_{block}", x)
        return self.convolve(f"{name}/output", torch.relu(x))

    def loss(self, image: np.ndarray, temperature: float, beta: float) -> tuple[torch.Tensor, dict[str, float]]:
        """All of it summed over an image, then divided by its 3 h w values."""
        pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
        x = 0.8 * pixels + 0.1
        logits = self.network("encoder", x, lambda y: F.max_pool2d(y, 2))
        codes = F.gumbel_softmax(logits, tau=temperature, dim=1)
        mean, log_scale = self.network("decoder", codes, lambda y: F.interpolate(y, scale_factor=2)).chunk(2, dim=1)
        pixel = distributions.TransformedDistribution(
            distributions.Laplace(mean, log_scale.exp()), distributions.SigmoidTransform()
        )
        nll = -pixel.log_prob(x).sum(dim=(1, 2, 3))
        token = distributions.Categorical(logits=logits.permute(0, 2, 3, 1))
        uniform = distributions.Categorical(probs=torch.full_like(token.probs, 1 / self.options.vocab_size))
        divergence = distributions.kl_divergence(token, uniform)
        values = image[0].size
        shown = ((torch.sigmoid(mean) - 0.1) / 0.8).clamp(0, 1)
        chosen = torch.unique(logits.argmax(dim=1), return_counts=True)[1] / divergence.numel()
        metrics = {
            "reconstruction": nll.mean().item() / values,
            "divergence": divergence.mean().item(),
            "mse": F.mse_loss(shown, pixels).item(),
            "codebook_used": len(chosen) / self.options.vocab_size,
            "perplexity": distributions.Categorical(probs=chosen).entropy().exp().item(),
        }
        return (nll + beta * divergence.sum(dim=(1, 2))).mean() / values, metrics

    def gradients(self) -> dict[str, np.ndarray]:
        return {name: leaf.grad.numpy() for name, leaf in self.params.items()}


class Pair:
    """Our model and the reference with the same parameters, images and noise."""

    def __init__(self, options: DvaeOptions, monkeypatch: pytest.MonkeyPatch):
        self.options = options
        size = (16, 24)
        self.objective = dvae(DvaeRecipe(dvae=options), TOTAL)
        self.graph, _ = abstract_dvae(options, size)
        self.image = squares(3, *size)
        self.params = randomised(initial_dvae(options, size, jax.random.key(0)), self.graph, self.image)
        self.theirs = Reference(flatten(self.params), options)
        self.noise = np.zeros(0)
        # What torch's gumbel_softmax draws, it draws by this method.
        monkeypatch.setattr(torch.Tensor, "exponential_", lambda drawn: drawn.copy_(self.exponential()))
        self.ours = jax.jit(jax.value_and_grad(self._ours, has_aux=True))

    def exponential(self) -> torch.Tensor:
        return torch.from_numpy(np.exp(-self.noise)).permute(0, 3, 1, 2)

    def _ours(self, params: Nested, key: Any, scalars: dict[str, Any]) -> Any:
        batch = self.objective.prepare({"image": jnp.asarray(self.image)}, key)
        return self.objective.loss(nnx.merge(self.graph, params), {**batch, **scalars}, key, None)

    def run(self, step: int, params: Nested) -> tuple[Any, torch.Tensor, dict[str, float]]:
        """Ours ((loss, metrics), gradients), their loss and metrics; their gradients are on their parameters."""
        scalars = self.objective.schedule(jnp.int32(step))
        key = jax.random.key(step + 7)
        height, width = (side // 2 ** (self.options.groups - 1) for side in self.image.shape[1:3])
        self.noise = np.asarray(code_noise(key, (len(self.image), height, width, self.options.vocab_size)))
        loss, metrics = self.theirs.loss(self.image, float(scalars["temperature"]), float(scalars["divergence_weight"]))
        loss.backward()
        return self.ours(params, key, scalars), loss, metrics


def squares(batch: int, height: int, width: int) -> np.ndarray:
    """[b, h, w, 3] uint8: squares of one colour each, so that tokens differ, under noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 192, (batch, height // 4, width // 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (colours + rng.integers(0, 64, colours.shape)).astype(np.uint8)


def randomised(params: Nested, graph: nnx.GraphDef[Any], images: np.ndarray) -> Nested:
    """Biases drawn too, except that logits are zero on average over the images: one token would win everywhere.

    They are also far enough from zero for a divergence that can be seen.
    """
    rng = np.random.default_rng(1)
    flat = {name: np.array(leaf) for name, leaf in flatten(params).items()}
    for name, leaf in flat.items():
        leaf += 0.1 * rng.standard_normal(leaf.shape) * name.endswith("bias")
    flat["encoder/output/kernel"] *= 6
    logits = nnx.merge(graph, unflatten(flat)).encoder(images / np.float32(255))
    flat["encoder/output/bias"] -= np.asarray(logits.mean(axis=(0, 1, 2)))
    return unflatten(flat)


@pytest.fixture(params=thorough(CASES, but=["two groups of one block"]))
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair(CASES[request.param], monkeypatch)


def test_loss_metrics_and_every_gradient_leaf(pair: Pair) -> None:
    """At a temperature of 0.4, with beta at its final value."""
    ((loss, metrics), gradients), their_loss, their_metrics = pair.run(6, pair.params)
    assert their_metrics["divergence"] > 0.1 and their_metrics["perplexity"] > 4
    assert float(loss) == pytest.approx(their_loss.item(), rel=1e-5, abs=1e-6)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(their_metrics, rel=1e-5, abs=1e-6)
    found, expected = flatten(gradients), pair.theirs.gradients()
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        scale = np.abs(reference).max()
        assert scale > 0, f"{name}: the reference has no gradient, so nothing is tested"
        assert np.abs(found[name] - reference).max() <= GRADIENT * scale, name


def test_five_adamw_steps(pair: Pair) -> None:
    """While beta grows and the temperature falls to 0.7, with fresh noise in each."""
    ours, theirs = pair.params, pair.theirs.params
    first = {name: leaf.detach().numpy().copy() for name, leaf in theirs.items()}
    optimizer = optax.adamw(RATE, eps=EPSILON, weight_decay=DECAY)
    moments = optimizer.init(ours)
    torch_optimizer = torch.optim.AdamW(theirs.values(), RATE, eps=EPSILON, weight_decay=DECAY)
    for step in range(STEPS):
        torch_optimizer.zero_grad()
        ((loss, _), gradients), their_loss, _ = pair.run(step, ours)
        # The logarithm of a density: its terms are of magnitude 1, their sum passes through zero.
        assert float(loss) == pytest.approx(their_loss.item(), rel=TRAINING, abs=0.1 * TRAINING), step
        updates, moments = optimizer.update(gradients, moments, ours)
        ours = optax.apply_updates(ours, updates)
        torch_optimizer.step()
    for name, leaf in flatten(ours).items():
        expected = theirs[name].detach().numpy()
        way, unit = np.abs(expected - first[name]).max(), np.spacing(np.abs(expected).max())
        assert way > 100 * ROUNDINGS * unit, f"{name}: hardly moved, so nothing is tested"
        assert np.abs(np.asarray(leaf) - expected).max() <= TRAINING * way + ROUNDINGS * unit, name
