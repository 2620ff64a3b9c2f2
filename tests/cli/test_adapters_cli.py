"""Adapters by the command line: a run that trains one, what it leaves behind, and the way to PEFT and back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import reference
import transformers
from cases import thorough
from forward import logits_of
from tolerances import MODEL

from beit_jax import train as python
from beit_jax.adapters.file import load_adapter
from beit_jax.cli.main import main
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.weights import load

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SHAPE = reference.TINY | reference.BIAS["shared"] | {"image_size": 16, "patch_size": 4, "num_labels": 7}
RUN = (
    "--optim.epochs", "0.1", "--optim.warmup-epochs", "0", "--optim.lr", "1e-2", "--data.batch-size", "32",
    "--data.workers", "0", "--run.save-every", "2", "--run.keep", "9", "--model.dtype", "float32",
    "--model.image-size", "16",
)  # fmt: skip
STEPS = 4
RANK = ("--adapter.rank", "4")
ADAPTERS = {
    "LoRA": (*RANK, "--adapter.targets", "v,fc2", "--adapter.train-also", "norms"),
    "DoRA": (
        *RANK, "--adapter.targets", "qkv,out,fc2", "--adapter.dora", "--adapter.dropout", "0.1",
        "--adapter.alpha", "16", "--adapter.train-also", "norms", "--optim.ema", "0.9",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``theirs``, a model of transformers with other labels and shared positions; and ``base``, the same converted."""
    place = tmp_path_factory.mktemp("adapters")
    prepare_digits(place / "digits")
    reference.save(reference.random_model(**SHAPE), place / "theirs")
    assert main(["convert", str(place / "theirs"), str(place / "base")]) == 0
    return place


@pytest.fixture(scope="module", params=thorough(ADAPTERS, but=["LoRA"]))
def run(request: pytest.FixtureRequest, place: Path) -> Path:
    """A run that learned the digits by an adapter."""
    run = place / request.param
    assert train(place, run, *ADAPTERS[request.param]) == 0
    return run


def train(place: Path, out: Path, *options: str, init: str | None = "base") -> int:
    start = () if init is None else ("--init", str(place / init))
    arguments = ("--data", str(place / "digits"), "--out", str(out), *start, *RUN, *options)
    return main(["train", "digits_finetune", *arguments])


def logits(directory: Path, pixels: np.ndarray) -> np.ndarray:
    checkpoint = load(directory)
    return logits_of(checkpoint.config, checkpoint.params, pixels)


def peft_logits(base: Path, adapter: Path, pixels: np.ndarray) -> np.ndarray:
    """The base with the configuration beside the adapter, whose head and positions differ."""
    model = transformers.AutoModelForImageClassification.from_pretrained(
        base, config=transformers.AutoConfig.from_pretrained(adapter), attn_implementation="eager",
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    found = peft.PeftModel.from_pretrained(model, adapter).eval()
    assert peft.get_peft_model_state_dict(found, save_embedding_layers=False).keys() == {
        name.replace("vector.weight", "vector") for name in peft_names(adapter)
    }
    return np.asarray(found(reference.to_torch(pixels)).logits.detach().numpy())


def peft_names(adapter: Path) -> set[str]:
    from safetensors.numpy import load_file

    return set(load_file(adapter / "adapter_model.safetensors"))


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)


def test_a_run_goes_to_peft_and_back(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [path for path in (run / "model", run / "model-ema") if path.exists()]
    assert len(models) == 1 + ("DoRA" in run.name)
    for path in models:
        adapter = path.with_name(path.name.replace("model", "adapter"))
        expected = logits(path, pixels())
        assert np.abs(peft_logits(place / "theirs", adapter, pixels()) - expected).max() <= MODEL

    assert main(["export", str(run / "model"), str(tmp_path / "peft"), "--to", "peft"]) == 0
    assert f"belongs to {place / 'theirs'}" in capsys.readouterr().out
    for file in (run / "adapter").iterdir():
        assert (tmp_path / "peft" / file.name).read_bytes() == file.read_bytes()

    for base in ("theirs", "base"):
        back = tmp_path / base
        assert main(["convert", str(tmp_path / "peft"), str(back), "--base", str(place / base)]) == 0
        found, model = load(back), load(run / "model")
        assert found.config == model.config and found.params.keys() == model.params.keys()
        assert all(np.abs(found.params[name] - leaf).max() <= 1e-6 for name, leaf in model.params.items())
        assert found.provenance["adapter"] == str(tmp_path / "peft")


@pytest.mark.thorough
def test_python_leaves_what_the_command_leaves(place: Path, tmp_path: Path) -> None:
    options = {
        "optim.epochs": 0.05, "optim.warmup-epochs": 0, "data.batch-size": 32, "data.workers": 0, "adapter.rank": 2,
        "model.image-size": 16, "model.dtype": "float32",
    }  # fmt: skip
    found = python.run(
        "digits_finetune", place / "digits", tmp_path / "run", init=place / "base", options=options, quiet=True
    )
    adapter = tmp_path / "run" / "adapter"
    assert found.models == (tmp_path / "run" / "model", adapter)
    assert np.abs(peft_logits(place / "theirs", adapter, pixels()) - logits(found.models[0], pixels())).max() <= MODEL


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["converted before", "by the run", "a run before"])
def test_an_adapter_holds_what_changed_before_training(
    way: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Channels in another order, and positions of every layer: the checkpoint as it was published has neither."""
    order, base = ("--model.channels-from", "2", "1", "0"), place / "theirs"
    if way == "converted before":
        order, changes = (), ("--channels-from", "2", "1", "0", "--image-size", "16", "--position-bias", "per_layer")
        assert main(["convert", str(place / "theirs"), str(tmp_path / "start"), *changes]) == 0
    elif way == "a run before":
        assert train(place, tmp_path / "first") == 0
        assert main(["export", str(tmp_path / "first" / "model"), str(tmp_path / "torch")]) == 0
        base = tmp_path / "torch"
    start = {"converted before": "start", "by the run": str(place / "base"), "a run before": "first"}[way]
    assert train(place, tmp_path / "run", *order, *ADAPTERS["LoRA"], init=str(tmp_path / start)) == 0
    adapter, expected = tmp_path / "run" / "adapter", logits(tmp_path / "run" / "model", pixels())
    assert np.abs(peft_logits(base, adapter, pixels()) - expected).max() <= MODEL
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run" / "model"), str(tmp_path / "peft"), "--to", "peft"]) == 0
    named = "the model it was trained on" if way == "a run before" else str(base)
    assert f"belongs to {named}" in capsys.readouterr().out


def test_the_merged_model_is_an_ordinary_one(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run / "model"), "--data", str(place / "digits"), "--workers", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "accuracy_top5" in line]
    assert found["top1"] == pytest.approx(scores[-1]["accuracy"])


def test_what_was_fixed_is_the_base(run: Path, place: Path) -> None:
    base, found = load(place / "base").params, load(run / "model").params
    for name in ("embeddings/patch_kernel", "blocks/mlp/fc1/kernel", "blocks/attention/q_bias", "blocks/gamma_1"):
        assert np.array_equal(found[f"beit/{name}"], base[f"beit/{name}"]), name
    for name in ("blocks/mlp/fc2/kernel", "blocks/attention/qkv_kernel", "blocks/norm1/scale"):
        assert not np.array_equal(found[f"beit/{name}"], base[f"beit/{name}"]), name


@pytest.mark.thorough
def test_a_run_that_goes_on_ends_in_the_same_bits(run: Path, place: Path, tmp_path: Path) -> None:
    again = tmp_path / run.name
    shutil.copytree(run, again)
    for name in ("model", "adapter", f"checkpoints/{STEPS}"):
        shutil.rmtree(again / name)
    assert train(place, again, *ADAPTERS[run.name]) == 0
    then, now = load(run / "model"), load(again / "model")
    assert all(np.array_equal(leaf, now.params[name]) for name, leaf in then.params.items())
    shapes = {name: leaf.shape for name, leaf in then.params.items()}
    before, after = (load_adapter(each / "model", shapes).factors for each in (run, again))
    assert all(np.array_equal(leaf, after[name]) for name, leaf in before.items())
    assert (again / "adapter").is_dir()


@pytest.mark.thorough
def test_a_dry_run_counts_what_learns(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Mapping[str, Any]] = []
    for options in (("--adapter.rank", "2"), RANK, ()):
        assert train(place, tmp_path / "run", *options, "--dry-run", "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    thin, thick, full = found
    assert thick["parameters"] - thin["parameters"] == 2 * 2 * 2 * (32 + 32)  # blocks, projections, two more ranks
    assert thick["memory"]["optimizer"] == 8 * thick["parameters"] < 0.1 * full["memory"]["optimizer"]
    assert thick["flops_per_image"] < 0.8 * full["flops_per_image"]


REFUSED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "an unknown projection": ((*RANK, "--adapter.targets", "query"), "--adapter.targets: expected names"),
    "an unknown part": ((*RANK, "--adapter.train-also", "all"), "--adapter.train-also: expected names"),
    "no rank": (("--adapter.dora",), "--adapter.dora True: there is no adapter without --adapter.rank"),
    "rank zero": (("--adapter.rank", "0"), "--adapter.rank: expected a positive integer"),
    "a freeze": ((*RANK, "--optim.freeze", "embeddings"), "--optim.freeze embeddings: an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = REFUSED[name]
    assert train(place, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_adapter_needs_a_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, tmp_path / "run", *RANK, init=None) == 2
    assert "--adapter.rank: an adapter changes a trained model; name it with --init" in capsys.readouterr().err


def test_only_adapted_models_are_exported_as_adapters(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(place / "base"), str(tmp_path / "peft"), "--to", "peft"]) == 2
    assert "was not trained with an adapter" in capsys.readouterr().err and not (tmp_path / "peft").exists()


def test_factors_of_another_model_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference.save(reference.random_model(**(SHAPE | {"hidden_size": 16})), tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "narrow")]) == 0
    shutil.copy(run / "model" / "flax_adapter.safetensors", tmp_path / "narrow")
    assert main(["export", str(tmp_path / "narrow"), str(tmp_path / "peft"), "--to", "peft"]) == 2
    assert "flax_adapter.safetensors: " in capsys.readouterr().err


def test_neither_adapter_nor_base_is_replaced(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, base = run / "adapter", place / "base"
    for destination in (base, adapter):
        assert main(["convert", str(adapter), str(destination), "--base", str(base), "--overwrite"]) == 2
        assert str(destination) in capsys.readouterr().err
    assert load(base)
