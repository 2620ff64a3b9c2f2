"""`beit-jax prepare`, `train` and `evaluate` as people type them: what is printed, what is refused, and how."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from beit_jax.cli.main import main
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, read_tokenizer, save_tokenizer
from beit_jax.tokenizers.dvae import DvaeEncoder, DvaeEncoderConfig
from beit_jax.train.recipes import RECIPES, recipe_named
from beit_jax.tree import flatten

RUN = ["train", "digits_finetune", "--data", "DATA", "--out", "OUT"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("data") / "digits"
    assert main(["prepare", "digits", str(destination)]) == 0
    return destination


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that exits with 2."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_prepare_says_what_it_wrote(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "digits", str(tmp_path / "again"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"] == {"train": 1347, "validation": 450}
    assert found["labels"][3] == "three"
    assert "already exists" in refused(["prepare", "digits", digits], capsys)
    assert "expected SOURCE DEST, found 1 names" in refused(["prepare", "folder", tmp_path / "x"], capsys)


def test_dry_run_prints_the_recipe_and_writes_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "digits_finetune", "--data", str(digits), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*run, "--optim.lr", "0.003", "--model.remat", "block", "--optim.ema", "0.99"]) == 0
    printed = capsys.readouterr().out
    assert "optim.lr = 0.003" in printed
    assert "1,347 images to train, 450 to evaluate, 10 classes" in printed
    assert main([*run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 60 * (1347 // 32)
    assert found["recipe"]["optim"]["lr"] == 2e-3
    assert found["memory"]["total"] > 16 * found["parameters"]
    assert not (tmp_path / "run").exists()


def test_help_lists_the_recipes_and_shows_a_recipes_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    listed = "".join(capsys.readouterr().out.replace("│", "").split())
    assert all(name in listed for name in RECIPES)
    with pytest.raises(SystemExit):
        main(["train", "beit_large_ft1k", "--help"])
    shown = capsys.readouterr().out
    assert "86.0 top-1" in shown
    assert "beit_large_patch16_224" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "beit_base_ft2k"], "no recipe is called beit_base_ft2k; the nearest is beit_base_ft22k"),
        ([*RUN, "--optim.lr", "-1"], "--optim.lr: expected a positive number, found -1"),
        ([*RUN, "--data", "NONE"], "no data set here"),
        ([*RUN, "--out", "NONE/run"], "does not exist; create it first"),
        (["train", "digits_probe", *RUN[2:]], "a linear probe needs an encoder"),
        ([*RUN, "--model.image-size", "32", "32", "32"], "--model.image-size: expected INT|{INT INT}, found 32 32 32"),
        ([*RUN, "--model.image-size", "32", "30"], "image_size (32, 30) is not a multiple of patch_size"),
        ([*RUN, "--model.depth", "0"], "--model.depth: expected a positive integer up to 256, found 0"),
        ([*RUN, "--model.heads", "3"], "hidden_size 64 is not a multiple of 3 heads"),
        ([*RUN, "--model.variant", "beit_huge"], "--model.variant: no variant is called beit_huge"),
        ([*RUN, "--data.batch-size", "2048"], "1347 training images, fewer than --data.batch-size 2048"),
        ([*RUN, "--run.mesh", "3", "1", "1"], "--run.mesh: expected sizes of"),
        ([*RUN, "--init", "NONE"], "NONE"),
        (["evaluate", "NONE"], "give --data to evaluate a classifier, or --images and --annotations"),
        (["evaluate", "NONE", "--data", "DATA", "--images", "DATA"], "give --data to evaluate a classifier"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"DATA": digits, "OUT": tmp_path / "run", "NONE": tmp_path / "NONE", "NONE/run": tmp_path / "NONE" / "run"}
    assert message in refused([places.get(argument, argument) for argument in arguments], capsys)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_option_names_the_right_one(digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "beit_jax", "train", "digits_finetune", "--data", str(digits), "--out", "x"]
    done = subprocess.run(
        [*command, "--model.drop-pth", "0.3"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert "--model.drop-path" in done.stderr


def test_evaluate_a_classifier(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded classifier, trained by PyTorch, on the held-out digits: its recorded accuracy."""
    assert main(["demo", "--out", str(tmp_path / "native"), "--json"]) == 0
    recorded = json.loads(capsys.readouterr().out)["held_out_accuracy"]
    picture = tmp_path / "mistakes.png"
    command = ["evaluate", str(tmp_path / "native"), "--data", str(digits), "--workers", "0"]
    assert main([*command, "--confusion", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 450
    assert found["top1"] == pytest.approx(recorded, abs=1e-9)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--per-class"]) == 0
    assert "three" in capsys.readouterr().out
    assert "ending in .png" in refused([*command, "--confusion", tmp_path / "mistakes.txt"], capsys)


# --- Pre-training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fits `digits_pretrain`: four pixels for a token."""
    config = DvaeEncoderConfig(n_hid=4, vocab_size=12, group_count=3, n_blk_per_group=1, image_size=(16, 16))
    params = flatten(nnx.to_pure_dict(nnx.state(DvaeEncoder(config, rngs=nnx.Rngs(0)))))
    directory = tmp_path_factory.mktemp("tokenizer") / "native"
    directory.mkdir()
    save_tokenizer(directory, TokenizerCheckpoint(config, {name: np.asarray(leaf) for name, leaf in params.items()}))
    return directory


@pytest.mark.parametrize("recipe", ["digits_pretrain", "digits_data2vec", "digits_tokenizer"])
def test_dry_run_of_pretraining(
    recipe: str, digits: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", recipe, "--data", str(digits), "--out", str(tmp_path / "run"), "--dry-run", "--json"]
    run += ["--tokenizer", str(tokenizer)] if recipe == "digits_pretrain" else []
    assert main(run) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["training_images"], found["validation_images"]) == (1347, 450)
    assert found["steps"] == recipe_named(recipe).optim.epochs * (1347 // 32)
    beside = {"digits_data2vec": 4 * found["parameters"], "digits_tokenizer": 0}
    tokenizers = sum(4 * leaf.size for leaf in read_tokenizer(tokenizer).params.values())
    assert found["memory"]["average"] == beside.get(recipe, tokenizers)
    assert found["flops_per_image"] > 6 * found["parameters"]
    assert (
        found["network"]["vocab_size"] == {"digits_pretrain": 12, "digits_data2vec": 64, "digits_tokenizer": 64}[recipe]
    )
    assert not (tmp_path / "run").exists()


def test_tokens_are_computed_once_and_read(
    digits: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For runs that are no longer; whoever wants more is told before it begins."""
    stored = tmp_path / "tokens"
    sources = ["digits_pretrain", "--data", str(digits), "--tokenizer", str(tokenizer)]
    assert main(["tokenize", *sources, "--out", str(stored), "--epochs", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"directory": str(stored), "images": 21 * 32, "epochs": 0.5}
    tokens = np.load(stored / "tokens.npy")
    assert tokens.shape == (21 * 32, 16) and tokens.max() < 12 and len(np.unique(tokens)) > 1
    again = ["tokenize", *sources, "--out", stored, "--epochs", "0.25"]
    assert "already exists" in refused(again, capsys)
    assert main([str(argument) for argument in (*again, "--overwrite")]) == 0
    assert f"{stored}: tokens of 320 images, 0.25 epochs" in capsys.readouterr().out
    run = ["train", *sources, "--out", str(tmp_path / "run"), "--stored-tokens", str(stored), "--dry-run"]
    assert main([*run, "--optim.epochs", "0.25", "--optim.warmup-epochs", "0"]) == 0
    assert "optim.epochs = 0.25" in capsys.readouterr().out
    assert "tokens of 320 images" in refused(run, capsys)
    assert "computed with view/flip 0.0, now it is 0.5" in refused([*run, "--augment.flip", "0.5"], capsys)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("digits_tokenizer", ["--model.hidden-size", "32"]),
        ("digits_tokenizer", ["--model.variant", "digits"]),
        ("dvae", ["--model.position-bias", "both"]),
        ("vqkd_base", ["--model.epsilon", "1e-12"]),
        ("vqkd_base", ["--model.absolute-positions", "False"]),
    ],
)
def test_tokenizers_refuse_what_they_do_not_have(
    recipe: str, options: list[str], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(["train", recipe, "--data", digits, "--out", tmp_path / "run", *options], capsys)
    assert f"{options[0]}: expected None, {recipe_named(recipe).objective} has no use for it" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "digits_data2vec"], "digits_data2vec: data2vec predicts no tokens; choose another recipe"),
        (["tokenize", "digits_finetune"], "digits_finetune: classification predicts no tokens; choose another recipe"),
        (["tokenize", "digits_pretrane"], "the nearest is digits_pretrain"),
        (["tokenize", "digits_pretrain", "--epochs", "0"], "--epochs: expected a positive number, found 0"),
        (["tokenize", "digits_pretrain", "--epochs", "-1"], "--epochs: expected a positive number, found -1"),
        (["tokenize", "digits_pretrain", "--epochs", "0.001"], "expected at least one step"),
        (["tokenize", "digits_pretrain", "--mask.patches", "17"], "--mask.patches: expected 1 to 16, found 17"),
        (["tokenize", "digits_pretrain", "--tokenizer", "NONE"], "NONE"),
        (
            ["tokenize", "digits_pretrain", "--tokens.aggregate-from", "9", "--tokens.aggregation-layers", "2"],
            "--tokens.aggregate-from: expected at most the 4 blocks, found 9",
        ),
        (["tokenize", "digits_pretrain", "--model.image-size", "4", "32"], "parts of 2x2 patches and more, found 1x8"),
    ],
)
def test_what_cannot_be_tokenized(
    arguments: list[str], message: str, digits: Path, tokenizer: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["--data", str(digits), "--out", str(tmp_path / "tokens")]
    given += [] if "--tokenizer" in arguments else ["--tokenizer", str(tokenizer)]
    assert message in refused([*arguments[:2], *given, *arguments[2:]], capsys)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("recipe", "source"),
    [
        ("beit_base_pt22k", "DALL-E"),
        ("beitv2_base_pt1k", "vqkd_encoder_base_decoder_3x768x12_clip"),
        ("data2vec_large_1600", "student/"),
        ("vqkd_base", "--teacher"),
        ("digits_pretrain", "digits_tokenizer"),
    ],
)
@pytest.mark.parametrize("command", ["train", "tokenize"])
def test_help_names_where_what_is_read_comes_from(
    command: str, recipe: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, recipe, "--help"])
    shown = capsys.readouterr().out
    assert source in shown and f"beit-jax {command}" in shown.split("Try:")[1]
    assert "--tokenizer" in shown
    assert ("--mask.patches" in shown) == ("mask" in recipe_named(recipe).groups()), "options that are read, no others"


def test_images_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose runs evaluate what was held out, or nothing."""
    pictures = tmp_path / "pictures" / "deep"
    pictures.mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (9 + i, 12), (6 * i, 0, 0)).save(pictures / f"{i}.png")
    for share, splits in ((None, {"train": 40}), ("0.1", {"train": 36, "validation": 4})):
        destination = tmp_path / f"data{share}"
        options = [] if share is None else ["--held-out", share]
        assert main(["prepare", "images", str(pictures.parent), str(destination), *options, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["splits"], found["labels"]) == (splits, ["unlabelled"])
        run = ["train", "digits_data2vec", "--data", str(destination), "--out", str(tmp_path / "run"), "--dry-run"]
        run += ["--data.eval-batch-size", "2"]
        assert main([*run, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["validation_images"] == splits.get("validation", 0)
    finetune = ["train", "digits_finetune", "--data", tmp_path / "dataNone", "--out", tmp_path / "run"]
    assert "dataNone" in refused(finetune, capsys)


def test_without_the_extra_a_line_says_what_to_install(digits: Path, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['grain'] = None; from beit_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", hidden, "train", "digits_finetune", "--data", str(digits), "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (2, "error: grain is not installed; pip install 'beit-jax[train]'\n")


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        ("digits_pretrain", "--augment.randaugment"),
        ("digits_pretrain", "--augment.erasing"),
        ("digits_pretrain", "--augment.mixup"),
        ("digits_pretrain", "--data2vec.beta"),
        ("digits_pretrain", "--vqkd.decay"),
        ("digits_data2vec", "--tokens.interpolation"),
        ("vqkd_base", "--mask.patches"),
        ("dvae", "--mask.exact"),
        ("digits_finetune", "--mask.patches"),
        ("digits_finetune", "--dvae.width"),
        ("digits_finetune", "--segment.scale"),
        ("beit_base_ade20k", "--augment.mixup"),
        ("digits_probe", "--segment.flip"),
        ("digits_finetune", "--head.out-indices"),
    ],
)
@pytest.mark.parametrize("command", ["train", "tokenize", "aot"])
def test_options_of_another_objective_are_refused(
    command: str, recipe: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the value apart or behind an equals sign."""
    objective = recipe_named(recipe).objective
    for arguments in ([option, "1"], [f"{option}=1"]):
        message = refused([command, recipe, *arguments], capsys)
        assert option in message and objective in message
