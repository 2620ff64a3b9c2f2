"""Whole runs without labels, at toy sizes: what they leave behind and who can use it, stopped and continued to the same
bits, refused where what they read does not fit."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from objectives import ENCODER, TEACHER, recipe_with
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor
from beit_jax.inference import predict
from beit_jax.models.build import param_shapes
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, load_decoder, load_tokenizer, save_tokenizer
from beit_jax.tokenizers.dvae import DvaeDecoder, DvaeDecoderConfig, DvaeEncoder
from beit_jax.tokenizers.vqkd import VqkdTokenizer
from beit_jax.train.checkpoints.checkpointer import Checkpoints
from beit_jax.train.data.prepare import prepare_digits, prepare_images
from beit_jax.train.loop.plan import Plan, make_plan
from beit_jax.train.loop.run import Outcome, train
from beit_jax.train.recipes import recipe_named
from beit_jax.train.step.state import State, from_saved, to_saved
from beit_jax.tree import flatten
from beit_jax.weights import NativeCheckpoint, load, save

Options = Mapping[str, Any]


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled() -> Iterator[None]:
    """Programs are small and many: most of the time would go into optimizing their machine code."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


STEPS, HALF, VALIDATION = 20, 10, 450
BATCH, EPOCH = 16, 1347 // 16
SMALL = {"model.image-size": 16, "data.batch-size": BATCH, "run.log-every": 1, "run.save-every": 3}
LONG = {"optim.epochs": STEPS / EPOCH, "optim.warmup-epochs": HALF / EPOCH}
SHORT = {"optim.epochs": 2 / EPOCH, "optim.warmup-epochs": 1 / EPOCH}
MASK = {"mask.patches": 7, "mask.min-block": 2}
MASKED = SMALL | MASK | LONG | {
    "model.dropout": 0.1,
    "model.drop-path": 0.1,
    "optim.accumulate": 2,
    "tokens.interpolation": "lanczos",
    "tokens.aggregate-from": 2,
    "tokens.aggregation-layers": 2,
    "run.eval-every-epochs": HALF / EPOCH,
}  # fmt: skip
DATA2VEC = SMALL | LONG | {
    "model.dropout": 0.1,
    "optim.ema": 0.9,
    "optim.ema-start": 0.5,
    "optim.ema-steps": 10,
    "mask.patches": 10,
    "mask.min-block": 2,
}  # fmt: skip
TOKENIZER = {"optim.epochs": HALF / EPOCH, "optim.warmup-epochs": 1 / EPOCH}
DVAE = SMALL | TOKENIZER | {
    "dvae.vocab-size": 16, "dvae.width": 8, "dvae.groups": 2, "dvae.embedding": 8,
}  # fmt: skip
VQKD = SMALL | TOKENIZER | {
    "model.variant": "digits",
    "model.dtype": "float32",
    "data.eval-batch-size": 90,
    "data.workers": 0,
    "vqkd.vocab-size": 32,
    "vqkd.codebook-dim": 8,
    "vqkd.decoder-layers": 1,
}  # fmt: skip
DECODER = DvaeDecoderConfig(n_init=8, n_hid=8, vocab_size=16, group_count=2, n_blk_per_group=1)


@dataclass(frozen=True)
class Places:
    """What runs read."""

    digits: Path
    images: Path
    """A data set without labels and without a validation split."""
    tokenizer: Path
    decoder: Path
    teacher: Path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("places")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{i:03}.png")
    kept: Mapping[str, tuple[Any, nnx.Module]] = {
        "tokenizer": (ENCODER, DvaeEncoder(ENCODER, rngs=nnx.Rngs(0))),
        "decoder": (DECODER, DvaeDecoder(DECODER, rngs=nnx.Rngs(0))),
    }
    for name, (config, model) in kept.items():
        params = {path: np.asarray(leaf) for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()}
        (root / name).mkdir()
        save_tokenizer(root / name, TokenizerCheckpoint(config, params, {"source": "a test"}))
    (root / "teacher").mkdir()
    save(root / "teacher", random_encoder(TEACHER))
    return Places(
        prepare_digits(root / "digits").directory,
        prepare_images(root / "pictures", root / "images").directory,
        root / "tokenizer",
        root / "decoder",
        root / "teacher",
    )


def random_encoder(config: BeitConfig) -> NativeCheckpoint:
    rng = np.random.default_rng(1)
    params = {
        name: (0.3 * rng.standard_normal(shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in param_shapes(config).items()
    }
    processor = ImageProcessor(resize=config.image_size, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
    return NativeCheckpoint(config, processor, params, {"source": "a test"})


@dataclass(frozen=True)
class Done:
    """A run that came to its end."""

    plan: Plan
    out: Path
    outcome: Outcome

    @property
    def log(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    @property
    def training(self) -> list[dict[str, float]]:
        """What was recorded of the steps, without what depends on the clock."""
        timing = {"images_per_second", "input_wait"}
        records = [entry for entry in self.log if "loss" in entry]
        return [{name: value for name, value in entry.items() if name not in timing} for entry in records]

    @property
    def scores(self) -> dict[int, dict[str, float]]:
        """Of every evaluation, by step."""
        records = [dict(entry) for entry in self.log if "validation_loss" in entry]
        return {int(entry.pop("step")): entry for entry in records}

    def state(self) -> State:
        """Of the last checkpoint."""
        with Checkpoints(self.out / "checkpoints", keep=2) as checkpoints:
            restored = checkpoints.restore(to_saved(self.plan.abstract_state))
        assert restored is not None
        return from_saved(restored.state, self.plan.abstract_state)


def sha256(state: State) -> dict[str, str]:
    digests = {}
    for name in ("step", "params", "stats", "opt", "average", "frozen"):
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(getattr(state, name)):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        digests[name] = digest.hexdigest()
    return digests


def run(plan: Plan, out: Path, *, quiet: bool = True) -> Done:
    outcome = train(plan, out, quiet=quiet)
    assert (outcome.step, outcome.exit_code) == (plan.steps, 0)
    assert not outcome.scores or tuple(outcome.scores) == plan.objective.score_names
    return Done(plan, out, outcome)


@pytest.fixture(scope="module")
def masked(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Done:
    plan = make_plan(recipe_with("digits_pretrain", MASKED), places.digits, tokenizer=places.tokenizer)
    assert plan.steps == STEPS
    return run(plan, tmp_path_factory.mktemp("runs") / "masked")


@pytest.fixture(scope="module")
def data2vec(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Done:
    plan = make_plan(recipe_with("digits_data2vec", DATA2VEC), places.digits)
    return run(plan, tmp_path_factory.mktemp("runs") / "data2vec")


@pytest.fixture(scope="module")
def vqkd(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Done:
    plan = make_plan(recipe_with("vqkd_base", VQKD), places.digits, teacher=places.teacher)
    return run(plan, tmp_path_factory.mktemp("runs") / "vqkd")


@pytest.fixture(scope="module")
def dvae(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Done:
    plan = make_plan(recipe_with("digits_tokenizer", DVAE), places.digits)
    return run(plan, tmp_path_factory.mktemp("runs") / "dvae")


@pytest.fixture(scope="module")
def seen(places: Places, dvae: Done, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Pre-training on the tokens of the run above, with pictures of it."""
    recipe = recipe_with("digits_pretrain", SMALL | MASK | SHORT)
    made = {"tokenizer": dvae.out / "tokenizer", "decoder": dvae.out / "decoder"}
    return run(make_plan(recipe, places.digits, **made), tmp_path_factory.mktemp("runs") / "seen")


# --- What runs leave behind -------------------------------------------------------------------------------------------


def test_visual_tokens(masked: Done) -> None:
    """The model is the trained one, without the aggregation layers, and stands for itself."""
    found, state = load(masked.out / "model"), flatten(masked.state().params)
    assert masked.outcome.models == (masked.out / "model",)
    assert (found.config.vocab_size, found.config.aggregate_from, found.config.aggregation_layers) == (16, 0, 0)
    dropped = {name for name in state if name.startswith("aggregation/")}
    assert dropped and found.params.keys() == state.keys() - dropped
    assert all(np.array_equal(found.params[name], state[name]) for name in found.params)
    model, processor = predict.from_pretrained(masked.out / "model")
    logits = model(processor([Image.new("RGB", (8, 8))]), np.ones((1, 16), bool)).logits
    assert logits is not None and logits.shape == (1, 16, 16)


def test_the_tokenizer_lies_beside_the_model_and_nothing_moves_it(masked: Done) -> None:
    before, after = flatten(masked.plan.first_state().frozen), flatten(masked.state().frozen)
    assert before.keys() == masked.plan.sources.tokenizer.params.keys() == after.keys()
    for name, leaf in masked.plan.sources.tokenizer.params.items():
        assert np.array_equal(leaf, before[name]) and np.array_equal(leaf, after[name])


def test_the_loss_falls_and_everything_is_recorded(masked: Done) -> None:
    assert [entry["step"] for entry in masked.training] == list(range(1, STEPS + 1))
    losses = [entry["loss"] for entry in masked.training]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    for entry in masked.training:
        assert entry["loss"] == pytest.approx(entry["loss_patches"] + entry["loss_aggregated"], rel=1e-6)
        assert entry["target_perplexity"] > 2, "the tokens of the fixture are not all one"
    assert {"masked_accuracy", "masked_accuracy_aggregated", "predicted_perplexity"} <= masked.training[0].keys()


def test_data2vec_makes_three_models(data2vec: Done) -> None:
    """Student and teacher as encoders, whose features are those of the state; and the student with its head."""
    state, out = data2vec.state(), data2vec.out
    assert data2vec.outcome.models == (out / "model", out / "model-ema", out / "student")
    pixels = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    outputs = {}
    for name, params in (("model", state.params), ("model-ema", state.average)):
        model, _ = predict.from_pretrained(out / name)
        outputs[name] = np.asarray(model(pixels).last_hidden_state)
        whole = nnx.merge(data2vec.plan.objective.graph, params)
        expected = whole.norm(whole.beit(pixels).last_hidden_state)
        np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=1e-5)
    assert np.abs(outputs["model"] - outputs["model-ema"]).max() > 1e-2
    student, _ = predict.from_pretrained(out / "student")
    assert student.config == data2vec.plan.config and student.config.vocab_size == 64
    kept = load(out / "student").params
    assert all(np.array_equal(kept[name], leaf) for name, leaf in flatten(state.params).items())


def test_vqkd_makes_a_tokenizer(vqkd: Done) -> None:
    model, state = load_tokenizer(vqkd.out / "tokenizer"), vqkd.state()
    assert isinstance(model, VqkdTokenizer) and vqkd.outcome.models == (vqkd.out / "tokenizer",)
    codes, before = (part.stats["codebook"]["embedding"] for part in (state, vqkd.plan.first_state()))
    assert np.array_equal(model.codebook.embedding[...], codes)
    assert not np.array_equal(codes, before)
    tokens = np.asarray(model.tokens(np.random.default_rng(0).random((3, 16, 16, 3)).astype(np.float32)))
    assert tokens.shape == (3, 4, 4) and 0 <= tokens.min() <= tokens.max() < 32
    losses = [entry["loss"] for entry in vqkd.training]
    assert losses[-1] < losses[0]


def test_dvae_makes_a_tokenizer_and_a_decoder(dvae: Done) -> None:
    encoder, decoder = load_tokenizer(dvae.out / "tokenizer"), load_decoder(dvae.out / "decoder")
    assert isinstance(encoder, DvaeEncoder)
    tokens = encoder.tokens(np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32))
    assert tokens.shape == (2, 8, 8) and decoder.decode(tokens).shape == (2, 16, 16, 3)
    params = dvae.state().params
    assert np.array_equal(load_decoder(dvae.out / "decoder").output.kernel[...], params["decoder"]["output"]["kernel"])
    losses = [entry["reconstruction"] for entry in dvae.training]
    assert losses[-1] < losses[0]


# --- Validation -------------------------------------------------------------------------------------------------------


def scored(done: Done, state: State) -> tuple[dict[str, float], int]:
    """Scores, and how many images they are of."""
    plan, images = done.plan, []
    with jax.set_mesh(plan.mesh):
        assert plan.validation is not None
        scores = plan.objective.scores(state, plan.validation, plan.processor, plan.mesh, images.append)
    return scores, sum(images)


@pytest.mark.parametrize("name", ["masked", "data2vec", "vqkd", "dvae"])
def test_validation_can_be_repeated(name: str, request: pytest.FixtureRequest) -> None:
    done: Done = request.getfixturevalue(name)
    again, images = scored(done, done.state())
    assert again == scored(done, done.state())[0] == done.outcome.scores == done.scores[done.plan.steps]
    assert images == VALIDATION and next(iter(again)) == "validation_loss"
    assert {name.removeprefix("validation_") for name in again} <= done.training[-1].keys()
    assert all(np.isfinite(value) for value in again.values())


def test_validation_is_of_the_state_and_as_often_as_asked(masked: Done) -> None:
    assert list(masked.scores) == [HALF, STEPS]
    assert masked.scores[STEPS]["validation_loss"] < masked.scores[HALF]["validation_loss"]
    before, _ = scored(masked, masked.plan.first_state())
    # Of two heads that know nothing of 16 tokens.
    assert before["validation_loss"] == pytest.approx(2 * np.log(16), rel=0.3)


# --- What they make is of use -----------------------------------------------------------------------------------------


@pytest.mark.exact
def test_stored_tokens_are_those_computed_on_the_way(masked: Done, places: Places, tmp_path: Path) -> None:
    """Same losses, parameters and scores, bit for bit; the tokenizer is not on the devices."""
    assert masked.plan.objective.store_tokens(masked.plan.training, tmp_path / "tokens") == STEPS * BATCH
    plan = make_plan(masked.plan.recipe, places.digits, tokenizer=places.tokenizer, stored_tokens=tmp_path / "tokens")
    assert "token_image" in masked.plan.objective.batch(4) and "token_image" not in plan.objective.batch(4)
    stored = run(plan, tmp_path / "run")
    assert stored.training == masked.training
    assert stored.scores == masked.scores
    state, expected = stored.state(), masked.state()
    assert not state.frozen
    assert {**sha256(state), "frozen": ""} == {**sha256(expected), "frozen": ""}
    other = replace(masked.plan.recipe, run=replace(masked.plan.recipe.run, seed=1))
    with pytest.raises(BeitJaxError, match=r"tokens: computed with seed 0, now it is 1"):
        make_plan(other, places.digits, tokenizer=places.tokenizer, stored_tokens=tmp_path / "tokens")
    longer = recipe_with("digits_pretrain", MASKED | {"optim.epochs": 1})
    with pytest.raises(
        BeitJaxError, match=r"tokens of 320 images .* are stored, the run sees 1,344; store those of more"
    ):
        make_plan(longer, places.digits, tokenizer=places.tokenizer, stored_tokens=tmp_path / "tokens")


def test_a_second_stage_goes_on_from_the_student_without_validation(
    data2vec: Done, places: Places, tmp_path: Path
) -> None:
    """The head is kept, the teacher is a copy of the student; images without labels and validation serve."""
    recipe = recipe_with("digits_data2vec", DATA2VEC | {"optim.epochs": 1, "optim.warmup-epochs": 0.5})
    plan = make_plan(recipe, places.images, data2vec.out / "student")
    first, student = plan.first_state(), load(data2vec.out / "student").params
    for tree in (first.params, first.average):
        flat = flatten(tree)
        assert flat.keys() == student.keys() and "lm_head/kernel" in flat
        assert all(np.array_equal(flat[name], student[name]) for name in flat)
    assert plan.validation is None and plan.steps == 2
    second = run(plan, tmp_path / "run")
    assert second.outcome.scores == {} == second.scores
    after = second.state()
    assert not np.array_equal(after.params["lm_head"]["kernel"], after.average["lm_head"]["kernel"])


@pytest.mark.parametrize("name", ["digits_probe", "digits_finetune"])
@pytest.mark.parametrize("source", ["data2vec/model", "data2vec/model-ema", "masked/model"])
def test_encoders_are_starting_points(name: str, source: str, places: Places, request: pytest.FixtureRequest) -> None:
    run_name, model = source.split("/")
    directory = request.getfixturevalue(run_name).out / model
    plan = make_plan(recipe_with(name, {"model.image-size": 16}), places.digits, directory)
    state = plan.first_state()
    encoder = flatten(state.frozen if name == "digits_probe" else state.params)
    taken = {path.removeprefix("beit/"): leaf for path, leaf in load(directory).params.items()}
    for path in ("blocks/attention/qkv_kernel", "blocks/mlp/fc2/kernel", "embeddings/cls_token"):
        assert np.array_equal(encoder[f"beit/{path}"], taken[path]), path
    tables = encoder["beit/blocks/attention/bias_table"]
    assert all(np.array_equal(table, taken["shared_bias_table"]) for table in tables)


def test_vqkds_tokens_are_predicted(vqkd: Done, places: Places, tmp_path: Path) -> None:
    """Of the student's own view, as both have the same size and filter; so nothing else is read."""
    options = SMALL | MASK | SHORT | {"augment.interpolation": "bicubic"}
    recipe, tokenizer = recipe_with("digits_pretrain", options), vqkd.out / "tokenizer"
    plan = make_plan(recipe, places.digits, tokenizer=tokenizer)
    assert plan.objective.batch(4).keys() == {"image", "mask"} and plan.config.vocab_size == 32
    done = run(plan, tmp_path / "run")
    assert done.scores[2]["validation_target_perplexity"] > 2
    assert load(done.out / "model").config.vocab_size == 32
    with pytest.raises(BeitJaxError, match=r"^--decoder: .*features, not for pixels"):
        make_plan(recipe, places.digits, tokenizer=tokenizer, decoder=places.decoder)


def images_in(out: Path) -> list[tuple[int, str, int, int]]:
    """Step, name, height and width of the pictures in TensorBoard's files."""
    found = []
    for path in (out / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its checksum (4), event, its checksum (4)
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                if value.HasField("image"):
                    found.append((event.step, value.tag, value.image.height, value.image.width))
            at += 16 + size
    return found


def test_pictures_of_what_is_predicted(seen: Done, masked: Done) -> None:
    (picture,) = images_in(seen.out)
    step, name, height, width = picture
    assert (step, name) == (2, "reconstruction") and height > 4 * 160 and width > 4 * 160
    assert images_in(masked.out) == []


def test_reconstruct_shows_it_to_people(
    seen: Done, dvae: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8), 200).save(tmp_path / "digit.png")
    parts = ["--tokenizer", str(dvae.out / "tokenizer"), "--decoder", str(dvae.out / "decoder")]
    command = ["reconstruct", str(seen.out / "model"), str(tmp_path / "digit.png"), *parts]
    assert main([*command, "-o", str(tmp_path / "seen.png"), "--mask-patches", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["hidden"] for entry in found["images"]] == [5]
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) > 160


# --- Warnings ---------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_says_nothing_is_noticed_once(
    masked: Done, places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zeros for a tokenizer: one token for all patches. The warning waits for the warmup, and comes once."""
    zeros = {name: np.zeros_like(leaf) for name, leaf in masked.plan.sources.tokenizer.params.items()}
    (tmp_path / "zeros").mkdir()
    save_tokenizer(tmp_path / "zeros", TokenizerCheckpoint(ENCODER, zeros, {"source": "a test"}))
    plan = make_plan(masked.plan.recipe, places.digits, tokenizer=tmp_path / "zeros")
    done = run(plan, tmp_path / "run", quiet=False)
    assert [entry["target_perplexity"] for entry in done.training] == [1.0] * STEPS
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert (
        f"warning: step {HALF + 1}: target_perplexity is 1, expected more than 1.5: the tokenizer gives nearly all "
        "patches one token"
    ) in warnings
    names = [line.split()[3] for line in warnings]
    assert len(set(names)) == len(names) and set(names) <= {"predicted_perplexity", "target_perplexity"}


# --- Stopped and continued --------------------------------------------------------------------------------------------


def start(places: Places, out: Path) -> subprocess.Popen[str]:
    """The run `masked` as a user starts it, in a process of its own."""
    command = [sys.executable, "-m", "beit_jax", "train", "digits_pretrain", "--data", str(places.digits)]
    command += ["--out", str(out), "--tokenizer", str(places.tokenizer)]
    for name, value in MASKED.items():
        command += [f"--{name}", str(value)]
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, errors


def newest(out: Path) -> int:
    return max((int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit()), default=-1)


@pytest.mark.thorough
def test_killed_and_continued_visual_tokens_end_in_the_same_bits(masked: Done, places: Places, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(places, out)
    while newest(out) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    code, errors = finish(process)
    assert code == -signal.SIGKILL, errors
    assert 3 <= newest(out) < STEPS
    code, errors = finish(start(places, out))
    assert code == 0 and "continuing after step" in errors, errors
    continued = Done(masked.plan, out, masked.outcome)
    assert sha256(continued.state()) == sha256(masked.state())
    assert continued.training == masked.training
    assert continued.scores[STEPS] == masked.scores[STEPS]


def test_stopped_and_continued_data2vec_ends_in_the_same_bits(
    data2vec: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an error that the loop does not expect, after the eighth step; the teacher continues too."""
    plan, step = data2vec.plan, data2vec.plan.step
    calls = 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setitem(plan.__dict__, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(plan, tmp_path / "run", quiet=True)
    monkeypatch.setitem(plan.__dict__, "step", step)
    assert newest(tmp_path / "run") == 6
    assert train(plan, tmp_path / "run", resume="must", quiet=True).step == STEPS
    continued = Done(plan, tmp_path / "run", data2vec.outcome)
    digests = sha256(continued.state())
    assert digests == sha256(data2vec.state()) and digests["average"] != digests["params"]
    assert continued.training == data2vec.training


def test_another_tokenizer_or_teacher_is_not_gone_on_with(
    masked: Done, vqkd: Done, places: Places, tmp_path: Path
) -> None:
    params = masked.plan.sources.tokenizer.params
    (tmp_path / "other").mkdir()
    save_tokenizer(tmp_path / "other", TokenizerCheckpoint(ENCODER, params, {"source": "another"}))
    changed = make_plan(masked.plan.recipe, places.digits, tokenizer=tmp_path / "other")
    with pytest.raises(BeitJaxError, match=r"begun with tokenizer.source a test, now it is another"):
        train(changed, masked.out, quiet=True)
    (tmp_path / "teacher").mkdir()
    save(tmp_path / "teacher", replace(random_encoder(TEACHER), provenance={"source": "another"}))
    changed = make_plan(vqkd.plan.recipe, places.digits, teacher=tmp_path / "teacher")
    with pytest.raises(BeitJaxError, match=r"begun with teacher.source a test, now it is another"):
        train(changed, vqkd.out, quiet=True)


# --- Refused ----------------------------------------------------------------------------------------------------------

PLAIN = SMALL | MASK
Given = Callable[[Places], dict[str, Path]]
REFUSED: Mapping[str, tuple[str, Options, Given, str]] = {
    "no tokenizer": (
        "digits_pretrain", PLAIN, lambda at: {}, "masked_tokens needs a tokenizer: give --tokenizer DIR",
    ),
    "stored tokens alone": (
        "digits_pretrain", PLAIN, lambda at: {"stored_tokens": at.tokenizer}, "masked_tokens needs a tokenizer: .*",
    ),
    "a decoder for a tokenizer": (
        "digits_pretrain", PLAIN, lambda at: {"tokenizer": at.decoder}, "--tokenizer: expected an encoder, found a .*",
    ),
    "a tokenizer for a decoder": (
        "digits_pretrain", PLAIN, lambda at: {"tokenizer": at.tokenizer, "decoder": at.tokenizer},
        "--decoder: expected a decoder, found an encoder; .*",
    ),
    "no tokens stored there": (
        "digits_pretrain", PLAIN, lambda at: {"tokenizer": at.tokenizer, "stored_tokens": at.decoder},
        ".*/decoder: no stored tokens here .*; see beit-jax tokenize",
    ),
    "more masks than patches": (
        "digits_pretrain", PLAIN | {"mask.patches": 26}, lambda at: {"tokenizer": at.tokenizer},
        "--mask.patches: expected 1 to 16, found 26",
    ),
    "a teacher of tokens": (
        "digits_pretrain", PLAIN, lambda at: {"tokenizer": at.tokenizer, "teacher": at.teacher},
        "--teacher: masked_tokens does not use it, leave it out.*",
    ),
    "a tokenizer of data2vec": (
        "digits_data2vec", DATA2VEC, lambda at: {"tokenizer": at.tokenizer}, "--tokenizer: data2vec does not use it.*",
    ),
    "more targets than blocks": (
        "digits_data2vec", DATA2VEC | {"data2vec.target-layers": 5}, lambda at: {},
        "--data2vec.target-layers: expected at most the 4 blocks, found 5",
    ),
    "masks of data2vec": (
        "digits_data2vec", DATA2VEC | {"mask.patches": 17}, lambda at: {}, "--mask.patches: expected 1 to 16, found 17",
    ),
    "no teacher": ("vqkd_base", VQKD, lambda at: {}, "vqkd needs a teacher: give --teacher CHECKPOINT"),
    "a start of vqkd": (
        "vqkd_base", VQKD, lambda at: {"teacher": at.teacher, "init": at.teacher}, "--init: vqkd does not use it.*",
    ),
    "a teacher of another grid": (
        "vqkd_base", VQKD | {"model.image-size": 32}, lambda at: {"teacher": at.teacher},
        r"--teacher: its grid of patches is \(4, 4\), the tokenizer's \(8, 8\); .*",
    ),
    "drop path of vqkd": (
        "vqkd_base", VQKD | {"model.drop-path": 0.1}, lambda at: {"teacher": at.teacher},
        "--model.drop-path: a tokenizer of this kind has none; .*",
    ),
    "a decoder of a dvae": (
        "digits_tokenizer", DVAE, lambda at: {"decoder": at.decoder}, "--decoder: dvae does not use it, leave it out.*",
    ),
    "no size of a dvae": (
        "digits_tokenizer", DVAE | {"model.image-size": None}, lambda at: {},
        "--model.image-size: expected pixels of the tokenizer's images, found None",
    ),
    "a tokenizer of fine-tuning": (
        "digits_finetune", {}, lambda at: {"tokenizer": at.tokenizer}, "--tokenizer: classification does not use it.*",
    ),
    "stored tokens of a probe": (
        "digits_probe", {}, lambda at: {"stored_tokens": at.tokenizer}, "--stored-tokens: linear_probe does not use .*",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_cannot_read(case: str, places: Places) -> None:
    name, options, given, message = REFUSED[case]
    with pytest.raises(BeitJaxError, match=rf"^{message}$"):
        make_plan(recipe_with(name, options), places.digits, **given(places))


def test_a_decoder_of_other_tokens(places: Places, tmp_path: Path) -> None:
    """Found before the run, not by its first picture."""
    for change, message in (
        ({"vocab_size": 32}, "--decoder: expected 16 tokens, as the tokenizer has, found 32; give the one that .*"),
        ({"group_count": 3}, "--decoder: expected 2 pixels per token, as the tokenizer has, found 4; give .*"),
    ):
        config = replace(DECODER, **change)
        params = nnx.to_pure_dict(nnx.state(DvaeDecoder(config, rngs=nnx.Rngs(0))))
        directory = tmp_path / str(config.vocab_size)
        directory.mkdir()
        leaves = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
        save_tokenizer(directory, TokenizerCheckpoint(config, leaves))
        recipe = recipe_with("digits_pretrain", PLAIN)
        with pytest.raises(BeitJaxError, match=rf"^{message}$"):
            make_plan(recipe, places.digits, tokenizer=places.tokenizer, decoder=directory)


def test_data_that_labels_need_is_refused_without_them(places: Places) -> None:
    with pytest.raises(BeitJaxError, match=r"validation|label"):
        make_plan(recipe_named("digits_finetune"), places.images)


def test_tokens_of_a_run_that_predicts_none(data2vec: Done, tmp_path: Path) -> None:
    with pytest.raises(BeitJaxError, match=r"^digits_data2vec: data2vec predicts no tokens; choose another recipe$"):
        data2vec.plan.objective.store_tokens(data2vec.plan.training, tmp_path / "tokens")
