"""Pre-training against torch: losses, metrics, every gradient leaf, and five steps of each objective.

References are put together here from transformers' layers, as the originals describe them. As in test_finetuning, the
epsilon of Adam is far above the rounding of gradients (1e-8): where a gradient is rounding alone, its quotient is, too.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from cases import thorough
from flax import nnx
from tolerances import GRADIENT, MARGIN, TRAINING

from beit_jax.config import BeitConfig
from beit_jax.convert import to_torch, tokenizers
from beit_jax.hub import resolve
from beit_jax.models.build import Model, abstract_model
from beit_jax.tokenizers.build import build_tokenizer
from beit_jax.train.objectives.data2vec import Data2vecOptions, Data2vecRecipe, data2vec, standardised
from beit_jax.train.objectives.masked_tokens import MaskedTokensRecipe, TokenOptions, masked_tokens
from beit_jax.train.recipe import STATISTICS, DataOptions, MaskOptions, OptimOptions
from beit_jax.train.step.criterion import Criterion
from beit_jax.train.step.optim import optimizer
from beit_jax.train.step.schedule import decay_table, schedule_table
from beit_jax.train.step.state import initial_state
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import Nested, flatten, unflatten

Converted = Callable[[torch.nn.Module], Model]
Arrays = dict[str, np.ndarray]
Metrics = dict[str, torch.Tensor]
STEPS, BATCH, PATCHES, VOCABULARY = 5, 8, 16, 24
HIDDEN = (9, 1, 6, 9, 8, 4, 7, 9)  # patches, image by image; 9 at most
CONFIG = reference.TINY | reference.BIAS["shared"] | {
    "num_hidden_layers": 3, "image_size": 16, "patch_size": 4, "use_mask_token": True, "vocab_size": VOCABULARY,
}  # fmt: skip
OPTIM = OptimOptions(
    lr=2e-2, min_lr=1e-3, epochs=1.0, warmup_epochs=0.4, warmup_lr=5e-3, weight_decay=0.3, epsilon=2e-3, clip=0.5
)
RECIPE = MaskedTokensRecipe(
    "test", data=DataOptions(statistics="imagenet"), mask=MaskOptions(patches=max(HIDDEN)), optim=OPTIM
)


# --- The originals ----------------------------------------------------------------------------------------------------


def pixels(images: np.ndarray) -> torch.Tensor:
    mean, deviation = (np.asarray(values, np.float32) for values in STATISTICS["imagenet"])
    return reference.to_torch(((images / np.float32(255) - mean) / deviation).astype(np.float32))


def hidden_states(model: torch.nn.Module, batch: Arrays, *, masked: bool = True) -> tuple[list[torch.Tensor], Any]:
    """What the embeddings and then each layer gives, and the bias of positions that all layers share."""
    inputs = pixels(batch["image"])
    beit, sides = model.beit, inputs.shape[2:]
    grid = tuple(side // model.config.patch_size for side in sides)
    states = [beit.embeddings(inputs, bool_masked_pos=torch.from_numpy(batch["mask"]) if masked else None)]
    bias = beit.shared_position_bias(grid, dim_size=states[0].shape[1])
    for layer in beit.layers:
        states.append(layer(states[-1], attention_mask=bias, resolution=sides))
    return states, bias


def hidden_labels(batch: Arrays) -> torch.Tensor:
    return torch.from_numpy(batch["tokens"][batch["mask"]]).long()


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(-1) == labels).float().mean()


def tokens_loss(model: torch.nn.Module, teacher: torch.nn.Module, batch: Arrays) -> Metrics:
    """BEiT: transformers' own loss."""
    mask, labels = torch.from_numpy(batch["mask"]), hidden_labels(batch)
    output = model(pixels(batch["image"]), bool_masked_pos=mask, labels=labels)
    return {"loss": output.loss, "masked_accuracy": accuracy(output.logits[mask], labels)}


def aggregated_loss(model: torch.nn.Module, teacher: torch.nn.Module, batch: Arrays) -> Metrics:
    """BEiT v2: the last layers of `model` are those that aggregate. Head, norm and position bias are shared."""
    first, count = AGGREGATION["aggregate_from"], AGGREGATION["aggregation_layers"]
    states, bias = hidden_states(model, batch)
    depth = len(model.beit.layers) - count
    x = torch.cat([states[depth][:, :1], states[first][:, 1:]], dim=1)
    for layer in model.beit.layers[depth:]:
        x = layer(x, attention_mask=bias, resolution=(CONFIG["image_size"],) * 2)
    mask, labels, metrics = torch.from_numpy(batch["mask"]), hidden_labels(batch), {}
    for suffix, kind, state in (("", "patches", states[depth]), ("_aggregated", "aggregated", x)):
        logits = model.lm_head(model.layernorm(state[:, 1:][mask]))
        metrics[f"loss_{kind}"] = torch.nn.functional.cross_entropy(logits, labels)
        metrics[f"masked_accuracy{suffix}"] = accuracy(logits, labels)
    return metrics | {"loss": metrics["loss_patches"] + metrics["loss_aggregated"]}


def data2vec_loss(options: Data2vecOptions) -> Callable[[torch.nn.Module, torch.nn.Module, Arrays], Metrics]:
    """data2vec: a teacher's last layers, of all patches, normalised by torch's own norm and its default epsilon."""

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:])

    def loss(model: torch.nn.Module, teacher: torch.nn.Module, batch: Arrays) -> Metrics:
        mask = torch.from_numpy(batch["mask"])
        with torch.no_grad():
            last = hidden_states(teacher, batch, masked=False)[0][-options.target_layers :]
            targets = torch.stack([normalised(state[:, 1:]) for state in last]).mean(0)
            targets = normalised(targets) if options.normalise_mean else targets
        student = hidden_states(model, batch)[0][-1][:, 1:][mask]
        predictions = model.lm_head(model.layernorm(student))
        value = torch.nn.functional.smooth_l1_loss(predictions, targets[mask], beta=options.beta)
        spread = {"target_deviation": targets[mask], "prediction_deviation": predictions}
        return {"loss": value} | {name: x.std(0, correction=0).mean() for name, x in spread.items()}

    return loss


def decays(name: str, parameter: torch.nn.Parameter) -> bool:
    """The original's rule: no vectors, no biases, no class token; tables and the mask token are matrices."""
    return parameter.ndim != 1 and not name.endswith((".bias", ".cls_token"))


def average_decay(options: OptimOptions, step: int) -> float:
    if options.ema_start is None or step >= options.ema_steps:
        return options.ema or 0.0
    return options.ema_start + step * ((options.ema or 0.0) - options.ema_start) / options.ema_steps


# --- Cases ------------------------------------------------------------------------------------------------------------

AGGREGATION = {"aggregate_from": 2, "aggregation_layers": 2}
WIDE = {"vocab_size": CONFIG["hidden_size"]}
ONCE = Data2vecOptions(target_layers=1, normalise_mean=False, beta=0.5)


@dataclass(frozen=True)
class Case:
    """One objective, and what makes its reference.

    Attributes:
        layers: of the torch model that are no blocks of ours, but aggregate.
    """

    loss: Callable[[torch.nn.Module, torch.nn.Module, Arrays], Metrics]
    config: dict[str, Any]
    recipe: MaskedTokensRecipe | Data2vecRecipe = RECIPE
    layers: int = 0
    optim: OptimOptions = OPTIM

    def objective(self, model: Model) -> Criterion:
        graph = nnx.split(model)[0]
        return (
            data2vec(self.recipe, graph)
            if isinstance(self.recipe, Data2vecRecipe)
            else masked_tokens(self.recipe, None)
        )

    def names(self, config: BeitConfig, params: Nested) -> Arrays:
        """Our parameters under the names of the torch model's."""
        flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
        for name in [name for name in flat if name.startswith("aggregation/")]:
            block = name.replace("aggregation/", "beit/")
            flat[block] = np.concatenate([flat[block], flat.pop(name)])
        config = replace(config, aggregate_from=0, aggregation_layers=0,
                         num_hidden_layers=config.num_hidden_layers + self.layers)  # fmt: skip
        return to_torch(config, flat)

    def ours(self, model: Model) -> Model:
        """With the last `layers` blocks of a converted model as aggregation layers."""
        if not self.layers:
            return model
        depth = model.config.num_hidden_layers - self.layers
        config = replace(model.config, num_hidden_layers=depth, **AGGREGATION)
        flat = flatten(nnx.to_pure_dict(nnx.state(model)))
        blocks = {name: leaf for name, leaf in flat.items() if name.startswith("beit/blocks/")}
        flat |= {name: leaf[:depth] for name, leaf in blocks.items()}
        flat |= {name.replace("beit/", "aggregation/"): leaf[depth:] for name, leaf in blocks.items()}
        return nnx.merge(abstract_model(config)[0], unflatten(flat))


def data2vec_case(options: Data2vecOptions, **optim: Any) -> Case:
    ema = {"ema": 0.9} | optim
    return Case(
        data2vec_loss(options),
        CONFIG | WIDE,
        RECIPE.derive(Data2vecRecipe, data2vec=options),
        optim=replace(OPTIM, **ema),
    )


CASES = {
    "BEiT": Case(tokens_loss, CONFIG),
    "BEiT, accumulation": Case(tokens_loss, CONFIG, optim=replace(OPTIM, accumulate=4)),
    "BEiT v2": Case(
        aggregated_loss,
        CONFIG | {"num_hidden_layers": 5},
        replace(RECIPE, tokens=TokenOptions(**AGGREGATION)),
        layers=AGGREGATION["aggregation_layers"],
        optim=replace(OPTIM, clip=3.0),
    ),
    "data2vec": data2vec_case(Data2vecOptions(target_layers=2)),
    "data2vec, annealed decay": data2vec_case(Data2vecOptions(target_layers=3), ema_start=0.5, ema_steps=3),
    "data2vec, last layer, normalised once": data2vec_case(ONCE, accumulate=2),
}


def batches(case: Case) -> list[Arrays]:
    """Noise, masks that hide as many patches as `HIDDEN` says, and tokens."""
    rng = np.random.default_rng(5)
    made = []
    for _ in range(STEPS):
        ranks = rng.permuted(np.tile(np.arange(PATCHES), (BATCH, 1)), axis=1)
        made.append({
            "image": rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8),
            "mask": ranks < np.asarray(HIDDEN)[:, None],
            "tokens": rng.integers(0, VOCABULARY, (BATCH, PATCHES)).astype(np.int32),
        })  # fmt: skip
    return made


@pytest.fixture
def pair(request: pytest.FixtureRequest, converted: Converted) -> tuple[Case, torch.nn.Module, Model]:
    """A case, torch's model and the same in ours."""
    case = CASES[request.param]
    theirs = reference.random_model(task="masked_image_modeling", **case.config)
    return case, theirs, case.ours(converted(theirs))


Pair = tuple[Case, torch.nn.Module, Model]


def numpy(tensors: dict[str, torch.Tensor]) -> Arrays:
    """Copies."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


# --- One batch --------------------------------------------------------------------------------------------------------


def metrics_and_gradients(
    model: Model, objective: Criterion, batch: Arrays, teacher: Nested | None
) -> tuple[dict[str, float], Nested]:
    graph, params = nnx.split(model)

    @jax.jit
    def differentiate(params: Nested, teacher: Nested | None) -> Any:
        ready = objective.prepare({name: jnp.asarray(array) for name, array in batch.items()}, jax.random.key(0))

        def loss(params: Nested) -> Any:
            value, metrics = objective.loss(nnx.merge(graph, params), ready, None, teacher)
            return value, metrics | {"loss": value}

        return jax.grad(loss, has_aux=True)(params)

    gradients, metrics = differentiate(nnx.to_pure_dict(params), teacher)
    return {name: float(value) for name, value in metrics.items()}, gradients


def assert_same_metrics(found: dict[str, float], expected: Metrics) -> None:
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=TRAINING), name


def assert_same_gradients(found: Arrays, theirs: torch.nn.Module) -> None:
    expected = {name: leaf.grad.numpy() for name, leaf in reference.named_as_in_files(theirs).items()}
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        scale = np.abs(leaf).max()
        assert scale > 1e-4, f"{name}: the reference has hardly a gradient, so nothing is tested"
        assert np.abs(found[name] - leaf).max() <= GRADIENT * scale, name


@pytest.mark.parametrize("pair", [name for name in CASES if "accumulation" not in name], indirect=True)
def test_loss_metrics_and_every_gradient_leaf(pair: Pair, converted: Converted) -> None:
    """data2vec's teacher is another model here, or its loss would be that of a run's first step alone."""
    case, theirs, ours = pair
    batch = batches(case)[0]
    teacher = reference.random_model(task="masked_image_modeling", seed=1, **case.config)
    kept = nnx.to_pure_dict(nnx.state(converted(teacher))) if case.optim.ema is not None else None
    expected = case.loss(theirs, teacher, batch)
    expected["loss"].backward()

    metrics, gradients = metrics_and_gradients(ours, case.objective(ours), batch, kept)
    assert_same_metrics(metrics, expected)
    assert_same_gradients(case.names(ours.config, gradients), theirs)


@pytest.mark.parametrize("scale", [1e-4, 3e-3, 1.0, 100.0])
def test_the_norm_of_targets_has_torchs_default_epsilon(scale: float) -> None:
    """The models above have features of magnitude 1, which do not show it; those of a run that begins are smaller."""
    x = (scale * np.random.default_rng(8).standard_normal((3, 5, 32)) + 2 * scale).astype(np.float32)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (32,)).numpy()
    np.testing.assert_allclose(standardised(jnp.asarray(x)), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


# --- Five steps -------------------------------------------------------------------------------------------------------


def train_torch(
    case: Case, model: torch.nn.Module, data: list[Arrays], rates: np.ndarray
) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """The metrics of every step, and the moving average at the end. `model` is trained in place."""
    named, options = dict(model.named_parameters()), case.optim
    groups = [
        {"params": [leaf], "weight_decay": options.weight_decay if decays(name, leaf) else 0.0}
        for name, leaf in reference.named_as_in_files(model).items()
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(options.beta1, options.beta2), eps=options.epsilon)
    teacher, history = copy.deepcopy(model), []
    for step, (batch, rate) in enumerate(zip(data, rates, strict=True)):
        parts = [{name: array[i :: options.accumulate] for name, array in batch.items()}
                 for i in range(options.accumulate)]  # fmt: skip
        adam.zero_grad()
        found = [case.loss(model, teacher, part) for part in parts]
        for part in found:
            (part["loss"] / len(found)).backward()
        metrics = {name: float(np.mean([part[name].item() for part in found])) for name in found[0]}
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(named.values(), options.clip).item()
        for group in adam.param_groups:
            group["lr"] = float(rate)
        adam.step()
        decay = average_decay(options, step)
        with torch.no_grad():
            for name, average in teacher.named_parameters():
                average.mul_(decay).add_(named[name], alpha=1.0 - decay)
        history.append(metrics)
    return history, teacher


def train_ours(case: Case, model: Model, data: list[Arrays], rates: np.ndarray) -> tuple[list[Any], Nested, Nested]:
    graph, params = nnx.split(model)
    options, tx = case.optim, optimizer(case.optim, model.config)
    step = make_train_step(
        graph, case.objective(model), tx, rates, accumulate=options.accumulate, decays=decay_table(options, len(rates))
    )
    compiled = jax.jit(step, donate_argnums=0)
    state = initial_state(nnx.to_pure_dict(params), tx, average=options.ema is not None)
    history = []
    for batch in data:
        state, metrics = compiled(state, batch)
        assert metrics["finite"]
        history.append({name: float(value) for name, value in metrics.items()})
    return history, state.params, state.average


def assert_went_the_same_way(start: Arrays, found: Arrays, expected: Arrays) -> None:
    """Differences are small against the movement, which is itself no rounding."""
    assert found.keys() == expected.keys() == start.keys()
    for name, leaf in expected.items():
        movement = np.abs(leaf - start[name]).max()
        assert movement > 1e-3 * np.abs(leaf).max(), f"{name} hardly moved, so that nothing is tested"
        assert np.abs(found[name] - leaf).max() <= TRAINING * movement, name


@pytest.mark.parametrize("pair", thorough(CASES, but=["BEiT v2", "data2vec"]), indirect=True)
def test_five_steps(pair: Pair) -> None:
    """Parameters, and data2vec's teacher: at the start the student's copy, as in a run."""
    case, theirs, ours = pair
    data, rates = batches(case), schedule_table(case.optim, STEPS)
    start = numpy(reference.named_as_in_files(theirs))

    history, params, average = train_ours(case, ours, data, rates)
    expected, teacher = train_torch(case, theirs, data, rates)

    for found, wanted in zip(history, expected, strict=True):
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=TRAINING), name
    norms = [metrics["grad_norm"] for metrics in expected]
    assert max(norms) > 1.1 * case.optim.clip, "clipping had nothing to do"
    trained = numpy(reference.named_as_in_files(theirs))
    assert_went_the_same_way(start, case.names(ours.config, params), trained)
    assert bool(average) == (case.optim.ema is not None)
    if average:
        assert_went_the_same_way(start, case.names(ours.config, average), numpy(reference.named_as_in_files(teacher)))


# --- The tokenizer in the loop ----------------------------------------------------------------------------------------


def small_dvae(images: np.ndarray) -> tuple[torch.nn.Module, np.ndarray]:
    """The `dall_e` package's encoder, drawn at random, and its logits of `images` uint8: no token wins everywhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dall_e = pytest.importorskip("dall_e", reason="the dall_e package is not installed: pip install DALL-E")
    model = dall_e.Encoder(n_hid=16, n_blk_per_group=1, vocab_size=VOCABULARY).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            scale = parameter[0].numel() ** -0.5 if parameter.ndim == 4 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        inputs = dall_e.map_pixels(reference.to_torch(images.astype(np.float32) / 255))
        [bias] = (parameter for parameter in model.blocks.output.conv.parameters() if parameter.ndim == 1)
        bias -= model(inputs).mean((0, 2, 3))
        return model, model(inputs).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("pair", ["BEiT", "BEiT v2"], indirect=True)
def test_tokens_of_a_tokenizer_that_sees_the_image_at_another_size(pair: Pair, tmp_path: Path) -> None:
    """16 patches of 4 pixels, and 16 tokens of 8 pixels: losses and gradients are those of the reference's tokens."""
    case, theirs, ours = pair
    batch = batches(case)[0]
    squares = np.random.default_rng(6).integers(0, 256, (BATCH, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    views = {"image": batch["image"], "mask": batch["mask"], "token_image": squares.astype(np.uint8)}
    encoder, logits = small_dvae(views["token_image"])
    second, first = np.moveaxis(np.partition(logits, -2)[..., -2:], -1, 0)
    assert (first - second).min() > MARGIN, "a near tie, which rounding may decide"
    tokens = logits.argmax(-1).reshape(BATCH, PATCHES)
    assert len(np.unique(tokens[batch["mask"]])) > 5

    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    checkpoint = tokenizers.load(resolve(tmp_path / "encoder.pth"))
    graph, params = nnx.split(build_tokenizer(checkpoint.config, unflatten(checkpoint.params)))
    expected = case.loss(theirs, theirs, batch | {"tokens": tokens})
    expected["loss"].backward()
    objective = masked_tokens(case.recipe, graph)
    metrics, gradients = metrics_and_gradients(ours, objective, views, nnx.to_pure_dict(params))
    assert_same_metrics(metrics, expected)
    assert_same_gradients(case.names(ours.config, gradients), theirs)
