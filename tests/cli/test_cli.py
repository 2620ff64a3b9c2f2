"""The command as users run it: exit codes, one-line errors, output for people and for programs."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from beit_jax.cli import conversion
from beit_jax.cli.main import COMMANDS, RECIPE_COMMANDS, main

DIGITS = Path(str(files("beit_jax") / "digits"))
IMAGES = [str(path) for path in sorted((DIGITS / "images").iterdir())]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("cli") / "native"
    assert main(["convert", str(DIGITS), str(destination)]) == 0
    return destination


def output(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error of a command that must fail with code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = output(capsys, "demo")
    assert "logits       equal: at most " in text and "classified   50 of 50 held-out images correctly" in text
    assert (tmp_path / "beit-jax-demo" / "flax_model.safetensors").exists()
    found = json.loads(output(capsys, "demo", "--json"))  # replaces its own earlier result
    assert found["passed"] and found["correct"] == 50 and found["max_error"] <= 1e-5


def test_demo_keeps_what_is_not_its_own(capsys: pytest.CaptureFixture[str], native: Path) -> None:
    assert "already exists" in error(capsys, "demo", "--out", native)


def test_convert_and_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(output(capsys, "convert", DIGITS, tmp_path / "n", "--json"))
    assert found["parameters"] == 207_818 and found["destination"] == str(tmp_path / "n")
    before = output(capsys, "inspect", DIGITS)
    after = output(capsys, "inspect", tmp_path / "n")
    shared = [line for line in before.splitlines() if line.split()[0] in ("model", "encoder", "positions", "images")]
    assert len(shared) == 4 and all(line in after for line in shared)
    assert "BeitForImageClassification, 207,818 parameters, 10 classes" in after


def test_inspect_lists_tensors(capsys: pytest.CaptureFixture[str], native: Path) -> None:
    found = json.loads(output(capsys, "inspect", native, "--tensors", "--json"))
    assert found["tensors"]["beit/blocks/attention/qkv_kernel"] == {"shape": [4, 64, 3, 4, 16], "dtype": "float32"}
    assert "4x64x3x4x16  beit/blocks/attention/qkv_kernel" in output(capsys, "inspect", native, "--tensors")
    assert "beit.encoder.layer.3.lambda_1" in output(capsys, "inspect", DIGITS, "--tensors")


def test_classify(capsys: pytest.CaptureFixture[str], native: Path) -> None:
    found = json.loads(output(capsys, "classify", native, *IMAGES[:3], "--top", "2", "--json"))
    assert [entry["image"] for entry in found] == IMAGES[:3]
    assert [len(entry["classes"]) for entry in found] == [2, 2, 2]
    assert found[0]["classes"][0]["label"] == "two"
    assert "two" in output(capsys, "classify", native, IMAGES[0])


def test_features(capsys: pytest.CaptureFixture[str], native: Path, tmp_path: Path) -> None:
    output(capsys, "features", native, *IMAGES[:3], "-o", tmp_path / "f.npz", "--pooling", "tokens")
    with np.load(tmp_path / "f.npz") as saved:
        assert saved["features"].shape == (3, 65, 64) and saved["images"].tolist() == IMAGES[:3]


def test_parity(capsys: pytest.CaptureFixture[str]) -> None:
    stages = json.loads(output(capsys, "parity", DIGITS, "--json"))
    assert [stage["name"] for stage in stages] == [
        "embeddings", "block 1", "block 2", "block 3", "block 4", "last hidden state", "pooled", "logits",
    ]  # fmt: skip
    assert all(stage["passed"] and stage["max_error"] < 1e-5 for stage in stages)
    text = output(capsys, "parity", DIGITS, "--image", *IMAGES[:2])
    assert "all stages agree with PyTorch" in text and "DIFFERENT" not in text


def test_parity_names_the_first_stage_that_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tanh form of GELU, the mistake most ports make, the first block already differs."""
    import jax

    from beit_jax.models import elementary

    wrong = {**elementary.ACTIVATIONS, "gelu": jax.nn.gelu}
    monkeypatch.setattr(elementary, "ACTIVATIONS", wrong)
    text = output(capsys, "parity", DIGITS, code=1)
    assert "first difference at block 1" in text and "DIFFERENT" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere: no such file or directory, and not a hub name"),
        (["inspect", "\x1b[31mred"], r"\x1b[31mred: no such file"),
        (["classify", DIGITS, "missing.png"], "missing.png"),
        (["classify", DIGITS, DIGITS / "config.json"], "config.json"),
        (["features", DIGITS, IMAGES[0], "-o", "features.txt"], "features.txt: expected a name ending in .jsonl, .csv"),
        (["inspect", DIGITS, "--revision", "main"], "a revision was given, but this is a local path"),
        (["inspect", DIGITS / "images"], "images holds no weights: expected one of model.safetensors"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[object], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_parity_of_a_native_checkpoint_is_refused(capsys: pytest.CaptureFixture[str], native: Path) -> None:
    assert "a native checkpoint; give the Hugging Face directory" in error(capsys, "parity", native)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"beit-jax {command}" in capsys.readouterr().out.split("Try:")[1]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out.split()
    assert {*COMMANDS, *RECIPE_COMMANDS} <= set(shown) and {"prepare", "reconstruct"} <= COMMANDS.keys()


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_help_of_a_command_for_recipes_teaches_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "beit_base_pt1k", "--help"])
    about, _, examples = capsys.readouterr().out.partition("Try:")
    assert "800 epochs" in about and f"beit-jax {command}" in examples


def test_summaries_are_the_first_lines_of_the_docstrings() -> None:
    summaries = {name: command.summary for name, command in {**COMMANDS, **RECIPE_COMMANDS}.items()}
    functions = {name: command.load() for name, command in COMMANDS.items()}
    functions |= {name: command.load()([name]) for name, command in RECIPE_COMMANDS.items()}
    assert summaries == {name: (function.__doc__ or "").partition("\n")[0] for name, function in functions.items()}


def test_completion_scripts_hold_the_options_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--tyro-print-completion", "bash"])
    assert not ended.value.code
    script = capsys.readouterr().out
    assert "--labels-from-zero" in script and "--mask-patches" in script and "--held-out" in script


@pytest.mark.parametrize("arguments", ["", "main(['--help'])"])
def test_help_imports_nothing_heavy_and_answers_at_once(arguments: str) -> None:
    code = (
        "import sys, time; start = time.process_time(); from beit_jax.cli.main import main\n"
        f"try: {arguments or 'pass'}\n"
        "except SystemExit: pass\n"
        "took = time.process_time() - start; "
        "heavy = {'jax', 'flax', 'numpy', 'PIL', 'scipy', 'torch', 'huggingface_hub'} & set(sys.modules); "
        "print(heavy, took)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy, took = run.stdout.splitlines()[-1].rsplit(maxsplit=1)
    assert heavy == "set()" and float(took) < (1.0 if arguments else 0.5)


def test_a_reader_may_leave() -> None:
    """As `head` does: no traceback."""
    for arguments in (["list"], ["list", "--json"]):
        command = [sys.executable, "-m", "beit_jax", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stderr
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.returncode == 1


def test_another_broken_pipe_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(conversion, "demo", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["demo"])


def test_models_that_keep_their_size_need_no_splines() -> None:
    """SciPy's take half a second of the time to a first label."""
    used = "beit_jax.inference.predict, beit_jax.inference.reading, beit_jax.inference.program_cache"
    code = f"import sys, {used}; print([name for name in sys.modules if name.startswith('scipy')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


def test_tokenizers_convert_and_inspect_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from beit_jax.convert import tokenizers
    from beit_jax.tokenizers.build import tokenizer_shapes
    from beit_jax.tokenizers.dvae import DvaeEncoderConfig

    config = DvaeEncoderConfig(n_hid=8, vocab_size=16, n_blk_per_group=1)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tokenizer_shapes(config).items()}
    save_file(tokenizers.to_torch(config, params), tmp_path / "encoder.safetensors")
    output(capsys, "convert", tmp_path / "encoder.safetensors", tmp_path / "native")
    before = json.loads(output(capsys, "inspect", tmp_path / "encoder.safetensors", "--json"))
    after = json.loads(output(capsys, "inspect", tmp_path / "native", "--json"))
    assert before == after and after["config"]["vocab_size"] == 16
    assert "dall" in output(capsys, "inspect", tmp_path / "native").lower()
