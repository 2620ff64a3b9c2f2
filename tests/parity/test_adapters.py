"""LoRA and DoRA as in PEFT, on transformers' models: gradients, steps, files in both directions, mergers."""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import reference
import torch
import transformers
from cases import thorough
from forward import logits_of
from safetensors.numpy import load_file, save_file
from tolerances import GRADIENT, MODEL, TRAINING

from beit_jax import convert
from beit_jax.adapters.file import AdapterRecord
from beit_jax.adapters.low_rank import PROJECTIONS, Adapter
from beit_jax.convert import Options
from beit_jax.convert.adapters.written import peft_config, peft_tensors, write_peft
from beit_jax.errors import BeitJaxError
from beit_jax.models.build import Model, abstract_model
from beit_jax.train.augmentation.labels import soft_cross_entropy
from beit_jax.train.recipe import OptimOptions
from beit_jax.train.step.adapting import Adapted
from beit_jax.train.step.criterion import Batch, Criterion, Metrics
from beit_jax.train.step.optim import optimizer
from beit_jax.train.step.state import State, initial_state
from beit_jax.train.step.step import make_train_step
from beit_jax.tree import Nested, flatten, unflatten
from beit_jax.weights import NativeCheckpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers 5 for it
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias"),  # PEFT takes its own lora_bias for a fragment
]
SIZE = reference.TINY | reference.BIAS["per_layer"] | {"num_labels": 5}
PEFT = "base_model.model."
QUERY = f"{PEFT}beit.layers.0.attention.q_proj"
QV = ["q_proj", "v_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
# An epsilon that does not magnify the rounding of the smallest gradients.
OPTIM = OptimOptions(lr=1e-2, weight_decay=0.05, epsilon=1e-3, clip=None)
STEPS = 20


def base(directory: Path, family: str = "beit", **options: Any) -> torch.nn.Module:
    model = reference.random_model(family, **(SIZE | options))
    reference.save(model, directory)
    return model


# --- Training ---------------------------------------------------------------------------------------------------------

TRAINED = {
    "LoRA": ("beit", Adapter(4, ("q", "v"), alpha=16.0)),
    "of everything, rank-stabilised": ("beit", Adapter(4, tuple(PROJECTIONS), rslora=True, also=("norms",))),
    "DoRA": ("beit", Adapter(4, tuple(PROJECTIONS), alpha=16.0, dora=True)),
    "DoRA of Data2Vec": ("data2vec-vision", Adapter(4, ("q", "out", "fc2"), dora=True, also=("positions",))),
}


class Pair:
    """The same adapted model in both libraries, every factor away from its start, and a batch."""

    def __init__(self, directory: Path, family: str, adapter: Adapter):
        self.adapter, self.division = adapter, Adapted(adapter)
        original = base(directory / "base", family)
        self.checkpoint = convert.load(directory / "base")
        params = unflatten({name: jnp.asarray(leaf) for name, leaf in self.checkpoint.params.items()})
        learned, self.fixed = self.division.divide(params, jax.random.key(0))
        rng = np.random.default_rng(0)
        self.learned = unflatten(
            {name: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for name, leaf in flatten(learned).items()}
        )
        directory.joinpath("adapter").mkdir()
        whole = {name: np.asarray(leaf) for name, leaf in flatten(self.learned).items() if "/adapter/" not in name}
        moved = replace(self.checkpoint, params={**self.checkpoint.params, **whole})
        record = self.record(self.learned)
        write_peft(directory / "adapter", moved, record, peft_tensors(moved, record))
        found = transformers.AutoModelForImageClassification.from_pretrained(
            directory / "base", attn_implementation="eager"
        )
        self.peft = peft.PeftModel.from_pretrained(found, directory / "adapter", is_trainable=True).eval()
        self.pixels = reference.pixels(original, batch=4)
        self.labels = np.random.default_rng(3).integers(0, 5, 4)

    def record(self, learned: Nested) -> AdapterRecord:
        return self.division.record(learned, (), {})

    def named(self, learned: Nested) -> dict[str, np.ndarray]:
        """What learns, or its gradients, by PEFT's names."""
        flat = {name: np.asarray(leaf) for name, leaf in flatten(learned).items()}
        checkpoint = NativeCheckpoint(self.checkpoint.config, self.checkpoint.processor, flat)
        return peft_tensors(checkpoint, self.record(unflatten(flat)))

    def theirs(self) -> dict[str, torch.nn.Parameter]:
        """PEFT's trainable parameters by the names in its files."""
        found = {name: leaf for name, leaf in self.peft.named_parameters() if leaf.requires_grad}
        return {
            name.replace(".modules_to_save.default", "").replace(".default", ""): leaf for name, leaf in found.items()
        }

    def loss(self) -> torch.Tensor:
        logits = self.peft(reference.to_torch(self.pixels)).logits
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(self.labels))


@pytest.fixture(params=thorough(TRAINED, but=["of everything, rank-stabilised", "DoRA"]))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(tmp_path, *TRAINED[request.param])


def loss(model: Model, batch: Batch, key: Any, teacher: Nested | None) -> tuple[jax.Array, Metrics]:
    return soft_cross_entropy(model(batch["image"], key=None).logits, batch["target"]), {}


def test_gradients_and_twenty_steps(pair: Pair) -> None:
    graph, tx = abstract_model(pair.checkpoint.config)[0], optimizer(OPTIM, pair.checkpoint.config)
    batch = {"image": jnp.asarray(pair.pixels), "target": jax.nn.one_hot(pair.labels, 5)}

    @jax.jit
    def gradient(learned: Nested) -> Nested:
        def of(learned: Nested) -> jax.Array:
            params = pair.division.trained(learned, pair.fixed, jax.random.key(0))
            return loss(build_from(graph, params), batch, None, None)[0]

        found: Nested = jax.grad(of)(learned)
        return found

    pair.loss().backward()
    found, theirs = pair.named(gradient(pair.learned)), pair.theirs()
    assert found.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert leaf.grad is not None
        scale = leaf.grad.abs().max().item()
        assert scale > 0, name
        assert np.abs(found[name] - leaf.grad.numpy()).max() <= GRADIENT * scale, name

    step = jax.jit(
        make_train_step(
            graph, Criterion(lambda batch, key: batch, loss), tx, np.full(STEPS, OPTIM.lr), division=pair.division
        )
    )
    state: State = initial_state(pair.learned, tx, fixed=pair.fixed)
    groups = [
        {"params": [leaf for leaf in theirs.values() if (leaf.ndim > 1) == decays], "weight_decay": 0.05 * decays}
        for decays in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.epsilon)
    before = {name: leaf.detach().numpy().copy() for name, leaf in theirs.items()}
    for _ in range(STEPS):
        state, _ = step(state, batch)
        adamw.zero_grad()
        pair.loss().backward()
        adamw.step()
    for name, leaf in pair.named(state.params).items():
        way = np.abs(theirs[name].detach().numpy() - before[name]).max()
        assert way > 0 and np.abs(leaf - theirs[name].detach().numpy()).max() <= TRAINING * way, name
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state.fixed), jax.tree.leaves(pair.fixed), strict=True)
    )


def build_from(graph: Any, params: Nested) -> Model:
    from flax import nnx

    model: Model = nnx.merge(graph, params)
    return model


# --- Ours in PEFT -----------------------------------------------------------------------------------------------------


def test_an_adapter_loads_in_peft_with_nothing_missing(pair: Pair, tmp_path: Path) -> None:
    """By both of its ways; PEFT's own state dict of the loaded model has exactly the names and values of the file."""
    directory = tmp_path / "adapter"
    written = load_file(directory / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(pair.peft)
    loaded = {f"{name}.weight" if name.endswith("vector") else name: leaf for name, leaf in loaded.items()}
    assert written.keys() == loaded.keys()
    assert all(np.array_equal(leaf, loaded[name].numpy()) for name, leaf in written.items())
    logits = pair.peft(reference.to_torch(pair.pixels)).logits.detach().numpy()
    params = pair.division.join(pair.learned, pair.fixed)
    assert np.abs(logits_of(pair.checkpoint.config, flatten(params), pair.pixels) - logits).max() <= MODEL

    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base", attn_implementation="eager")
    info = model.load_adapter(str(directory))
    assert not info.missing_keys and not info.unexpected_keys
    found = model.eval()(reference.to_torch(pair.pixels)).logits.detach().numpy()
    assert np.abs(found - logits).max() <= MODEL


def test_an_adapter_comes_back_onto_its_base(pair: Pair, tmp_path: Path) -> None:
    """Onto the directory it came from, and onto the native checkpoint."""
    expected = flatten(pair.division.join(pair.learned, pair.fixed))
    convert.convert(tmp_path / "base", tmp_path / "native")
    for each in ("base", "native"):
        found = convert.load(tmp_path / "adapter", Options(base=str(tmp_path / each)))
        assert found.config == pair.checkpoint.config and found.params.keys() == expected.keys()
        assert all(np.abs(found.params[name] - leaf).max() <= 1e-6 for name, leaf in expected.items())


# --- Theirs here ------------------------------------------------------------------------------------------------------

SAVED: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "LoRA with a head": ({"target_modules": QV, "modules_to_save": ["classifier"]}, {}),
    "a task type": ({"target_modules": QV, "task_type": "SEQ_CLS"}, {}),
    "all linear": ({"target_modules": "all-linear"}, {}),
    "rank-stabilised": ({"target_modules": EVERY, "use_rslora": True, "lora_alpha": 16}, {}),
    "DoRA": ({"target_modules": EVERY, "use_dora": True, "modules_to_save": ["classifier"]}, {}),
    "patterns": (
        {
            "target_modules": [*QV, "fc1"],
            "rank_pattern": {"layers.0.attention.q_proj": 2, "fc1": 3},
            "alpha_pattern": {"^beit.layers.1.mlp.fc1": 32},
        },
        {},
    ),
    "some blocks": ({"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}, {}),
    "the patch projection": ({"target_modules": ["projection", "q_proj"], "use_dora": True}, {}),
    "all biases": ({"target_modules": QV, "bias": "all", "modules_to_save": ["classifier"]}, {}),
    "biases of what is adapted": ({"target_modules": [*QV, "fc1"], "bias": "lora_only"}, {}),
    "a bias of B": ({"target_modules": ["q_proj", "fc1"], "lora_bias": True}, {}),
    "norms": ({"target_modules": QV, "modules_to_save": ["classifier", "layernorm_before", "layernorm"]}, {}),
    "Data2Vec": ({"target_modules": ["query", "value", "dense"], "use_dora": True}, {"family": "data2vec-vision"}),
    "bfloat16": ({"target_modules": QV, "modules_to_save": ["classifier"]}, {"dtype": torch.bfloat16}),
    "DoRA on bfloat16": ({"target_modules": EVERY, "use_dora": True}, {"dtype": torch.bfloat16}),
}


def saved(directory: Path, config: Mapping[str, Any], family: str = "beit", dtype: torch.dtype | None = None) -> Any:
    """PEFT's model with an adapter away from its start, saved beside its base."""
    model = base(directory / "base", family)
    if dtype is not None:
        model = model.to(dtype)
        model.save_pretrained(directory / "base")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, **config)).eval()
    generator = torch.Generator().manual_seed(0)
    for _, leaf in sorted(adapted.named_parameters()):
        if leaf.requires_grad:
            leaf.data += (0.2 * torch.randn(leaf.shape, generator=generator)).to(leaf.dtype)
    adapted.save_pretrained(directory / "adapter")
    return adapted


def assert_merged(directory: Path, adapted: Any, name: str = "adapter", options: Options | None = None) -> None:
    """The adapter on its base is what peft merges, in the base's own dtype."""
    found = convert.load(directory / name, options or Options(base=str(directory / "base")))
    merged = adapted.merge_and_unload()
    expected = reference.in_file_names(merged, dict(merged.state_dict()))
    tensors = convert.to_torch(found.config, found.params)
    assert tensors.keys() <= expected.keys()
    for each, leaf in tensors.items():
        wide = expected[each].float().numpy()
        close = 1e-6 if expected[each].dtype == torch.float32 else 2.0**-8 * np.abs(wide).max()
        assert np.abs(leaf.astype(np.float32) - wide).max() <= close, each


@pytest.mark.parametrize("name", SAVED)
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(name: str, tmp_path: Path) -> None:
    config, options = SAVED[name]
    assert_merged(tmp_path, saved(tmp_path, config, **options))


def test_names_of_transformers_4(tmp_path: Path) -> None:
    """As adapters on the hub have them: query, key, value and dense of encoder.layer."""
    adapted = saved(tmp_path, {"target_modules": EVERY, "modules_to_save": ["classifier"]})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    old = (
        ("layers.", "encoder.layer."), ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    tensors = {}
    for name, leaf in load_file(file).items():
        for new, before in old:
            name = name.replace(new, before)
        tensors[name] = leaf
    save_file(tensors, file)
    assert_merged(tmp_path, adapted)


def test_names_of_timm_are_of_weights_that_lie_as_in_torch(tmp_path: Path) -> None:
    """PaddleClas has the same names for weights that lie [in, out]: of square ones, no shape tells which are meant."""
    base, draw = Path(__file__).parents[1] / "convert/foreign/lightning/last.ckpt", np.random.default_rng(0)
    sizes = {"attn.proj": (16, 16), "attn.qkv": (48, 16), "mlp.fc1": (32, 16)}
    factors = {name: (draw.normal(size=(2, i)), draw.normal(size=(o, 2))) for name, (o, i) in sizes.items()}
    tensors = {
        f"{PEFT}blocks.0.{name}.lora_{kind}.weight": factor.astype(np.float32)
        for name, pair in factors.items()
        for kind, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj", "qkv", "fc1"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before, after = convert.load(base), convert.load(tmp_path, Options(base=str(base)))
    expected = torch_names(before)
    for name, (a, b) in factors.items():
        expected[f"beit.{name}"] = expected[f"beit.{name}"] + b @ a
    found = torch_names(after)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)


def torch_names(checkpoint: NativeCheckpoint) -> dict[str, np.ndarray]:
    """Weights of the first block by the original's names, [out, in]."""
    names = convert.to_torch(checkpoint.config, checkpoint.params)
    block = "beit.encoder.layer.0"
    qkv = [names[f"{block}.attention.attention.{part}.weight"] for part in ("query", "key", "value")]
    return {
        "beit.attn.proj": names[f"{block}.attention.output.dense.weight"],
        "beit.attn.qkv": np.concatenate(qkv),
        "beit.mlp.fc1": names[f"{block}.intermediate.dense.weight"],
    }


def test_half_precision_and_pickled_adapters(tmp_path: Path) -> None:
    adapted = saved(tmp_path, {"target_modules": QV})
    for leaf in (leaf for leaf in adapted.parameters() if leaf.requires_grad):
        leaf.data = leaf.data.half().float()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    half = {name: torch.from_numpy(leaf).half() for name, leaf in load_file(file).items()}
    torch.save(half, tmp_path / "adapter" / "adapter_model.bin")
    file.unlink()
    assert_merged(tmp_path, adapted)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_a_bias_of_keys_is_left_out_because_it_changes_nothing(tmp_path: Path) -> None:
    """peft cannot merge it, as keys have no bias of their own."""
    adapted = saved(tmp_path, {"target_modules": ["k_proj", "v_proj"], "lora_bias": True})
    found = convert.load(tmp_path / "adapter", Options(base=str(tmp_path / "base")))
    pixels = reference.pixels(adapted)
    logits = adapted(reference.to_torch(pixels)).logits.detach().numpy()
    assert np.abs(logits_of(found.config, found.params, pixels) - logits).max() <= MODEL


def test_adapters_in_directories_by_name_are_told(tmp_path: Path) -> None:
    adapted = saved(tmp_path, {"target_modules": QV})
    adapted.add_adapter("second", peft.LoraConfig(target_modules=["fc1"]))
    adapted.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    with pytest.raises(BeitJaxError, match=r"holds adapters by name, second; name one, .*/both/second$"):
        convert.load(tmp_path / "both", Options(base=str(tmp_path / "base")))
    convert.load(tmp_path / "both" / "second", Options(base=str(tmp_path / "base")))


def test_of_a_trainers_directory_the_adapter_of_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, {"target_modules": QV})
    output, base = tmp_path / "output", str(tmp_path / "base")
    for step in (1, 2):
        shutil.copytree(tmp_path / "adapter", output / f"checkpoint-{step}")
    older = output / "checkpoint-1" / "adapter_model.safetensors"
    save_file({name: leaf * 2 for name, leaf in load_file(older).items()}, older)
    latest, first = (convert.plan(output, Options(base=base, checkpoint=wanted)) for wanted in (None, "1"))
    assert latest.adapter == str(output / "checkpoint-2") and first.adapter == str(output / "checkpoint-1")
    assert any("checkpoint-2 taken, the latest of 1, 2" in note for note in latest.checkpoint.notes)
    with pytest.raises(BeitJaxError, match="choose one of 1, 2"):
        convert.plan(output, Options(base=base, checkpoint="best"))


def test_a_new_head_on_an_encoder_of_another_task(tmp_path: Path) -> None:
    """The base was pre-trained; the head is the adapter's, its classes get the names that are asked for."""
    pretrained = reference.random_model(
        task="masked_image_modeling", **(reference.TINY | reference.BIAS["per_layer"] | {"use_mask_token": False})
    )
    reference.save(pretrained, tmp_path / "base")
    model = transformers.BeitForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=3, attn_implementation="eager"
    )
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=QV, modules_to_save=["classifier", "pooler.layernorm"])
    )
    for leaf in (leaf for leaf in adapted.parameters() if leaf.requires_grad):
        leaf.data += 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "names.txt").write_text("cat\ndog\nnewt\n")
    options = Options(base=str(tmp_path / "base"), labels=tmp_path / "names.txt")
    found = convert.load(tmp_path / "adapter", options)
    assert found.config.labels == ("cat", "dog", "newt")
    pixels = reference.pixels(pretrained)
    logits = adapted.eval()(reference.to_torch(pixels)).logits.detach().numpy()
    assert np.abs(logits_of(found.config, found.params, pixels) - logits).max() <= MODEL


REFUSED: Mapping[str, tuple[Callable[[dict[str, Any], dict[str, np.ndarray]], None], str]] = {
    "another kind": (lambda config, tensors: config.update(peft_type="IA3"), "of the kind IA3, expected LORA"),
    "a changed base": (lambda config, tensors: config.update(init_lora_weights="pissa"), "pissa changes the base"),
    "another rank": (lambda config, tensors: config.update(r=8), "expected factors of rank 8"),
    "half a pair": (lambda config, tensors: tensors.pop(f"{QUERY}.lora_B.weight"), "lora_B is missing"),
    "NaN": (lambda config, tensors: tensors[f"{PEFT}classifier.bias"].fill(np.nan), "holds NaN"),
    "another base": (
        lambda config, tensors: tensors.update({f"{PEFT}classifier.weight": np.zeros((5, 7), np.float32)}),
        r"expected \[5, 32\] by the base, found \[5, 7\]",
    ),
    "an unknown name": (
        lambda config, tensors: tensors.update({f"{PEFT}vit.thing.weight": np.zeros(3, np.float32)}),
        "vit.thing.weight: no tensor of the base",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    saved(directory, {"target_modules": QV, "modules_to_save": ["classifier"]})
    return directory


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused(name: str, lora: Path, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    config = json.loads((lora / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter" / "adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BeitJaxError, match=message) as refused:
        convert.convert(tmp_path, tmp_path / "native", Options(base=str(lora / "base")))
    assert "\n" not in str(refused.value) and not (tmp_path / "native").exists()


def test_peft_reads_our_configuration_as_its_own(pair: Pair) -> None:
    found = peft.LoraConfig(
        **{k: v for k, v in peft_config(pair.checkpoint, pair.record(pair.learned)).items() if k != "peft_type"}
    )
    adapter = pair.adapter
    assert (found.r, found.lora_alpha, found.use_dora, found.use_rslora) == (
        adapter.rank, adapter.alpha, adapter.dora, adapter.rslora,
    )  # fmt: skip
