"""Nothing that a person made is removed or replaced. A row is what stands at the destination, a column a command."""

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from trees import tree

from beit_jax.cli.main import main
from beit_jax.convert import tokenizers
from beit_jax.tokenizers.build import tokenizer_shapes
from beit_jax.tokenizers.dvae import DvaeEncoderConfig
from beit_jax.train.loop import results

DIGITS = Path(str(files("beit_jax") / "digits"))
IMAGE = next(iter(sorted((DIGITS / "images").iterdir())))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read, and what they wrote before: hf, encoder.pth, native, tokenizer, exported, original."""
    made = tmp_path_factory.mktemp("made")
    shutil.copytree(DIGITS, made / "hf")
    config = DvaeEncoderConfig(n_hid=8, vocab_size=16, group_count=2, n_blk_per_group=1)
    draw = np.random.default_rng(0)
    params = {name: draw.normal(size=shape).astype(np.float32) for name, shape in tokenizer_shapes(config).items()}
    tensors = tokenizers.to_torch(config, params)
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, made / "encoder.pth")
    for arguments in (
        ["convert", "hf", "native"],
        ["convert", "encoder.pth", "tokenizer"],
        ["export", "native", "exported"],
        ["export", "native", "original", "--to", "original"],
    ):
        names = [str(made / each) if i in (1, 2) else each for i, each in enumerate(arguments)]
        assert main(names) == 0
    return made


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work", symlinks=True)
    return tmp_path / "work"


def thesis(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


def settings(out: Path) -> None:
    """Many programs call their settings config.json."""
    thesis(out)
    (out / "config.json").write_text('{"model_type": "beit", "beit_jax": {}}')


def notes_in(name: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        shutil.copytree(out.parent / name, out)
        (out / "notes.md").write_text("a person's")

    return make


def folder_in(name: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        shutil.copytree(out.parent / name, out)
        (out / "config.json").unlink(missing_ok=True)
        (out / "config.json").mkdir()

    return make


def trained_further(out: Path) -> None:
    """transformers keeps the key beit_jax of an exported config.json, but writes weights of its own."""
    shutil.copytree(out.parent / "exported", out)
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt"})


def own_checkpoint(out: Path) -> None:
    out.mkdir()
    torch.save({"model": {"a": torch.zeros(3)}, "epoch": 3}, out / "checkpoint.pth")


def link_to(name: str) -> Callable[[Path], None]:
    return lambda out: out.symlink_to(name, target_is_directory=True)


CONVERT = ["convert", "hf", "out", "--overwrite"]
TOKENIZER = ["convert", "encoder.pth", "out", "--overwrite"]
EXPORT = ["export", "native", "out", "--overwrite"]
ORIGINAL = [*EXPORT, "--to", "original"]
PREPARE = ["prepare", "digits", "out", "--overwrite"]
COMMANDS = {"convert": CONVERT, "tokenizer": TOKENIZER, "export": EXPORT, "original": ORIGINAL, "prepare": PREPARE}
OTHERS: dict[str, Callable[[Path], None]] = {
    "a thesis": thesis,
    "settings": settings,
    "a model trained further": trained_further,
    "a training script's checkpoint": own_checkpoint,
    "a model of transformers": lambda out: shutil.copytree(out.parent / "hf", out) and None,
    "notes beside a native checkpoint": notes_in("native"),
    "notes beside a tokenizer": notes_in("tokenizer"),
    "notes beside an export": notes_in("exported"),
    "a folder in a native checkpoint": folder_in("native"),
    "a folder in an export": folder_in("exported"),
    "a link to the source": link_to("hf"),
    "a link to a native checkpoint": link_to("native"),
    "a link to an export": link_to("exported"),
    "a link to the folder of all": link_to("."),
}


def run(work: Path, arguments: list[str]) -> int:
    """The first two arguments of a command are names in `work`."""
    names = [str(work / each) if i in (1, 2) and each != "digits" else each for i, each in enumerate(arguments)]
    return main(names)


def refused(work: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], *needles: str) -> None:
    before = tree(work)
    capsys.readouterr()
    assert run(work, arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    for needle in needles:
        assert needle in captured.err
    assert tree(work) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("other", OTHERS)
def test_what_it_did_not_write_is_kept(
    work: Path, capsys: pytest.CaptureFixture[str], command: str, other: str
) -> None:
    OTHERS[other](work / "out")
    refused(work, COMMANDS[command], capsys, str(work / "out"), "choose another name")


SOURCES = [
    (["convert", "hf", "hf", "--overwrite"], "holds no native checkpoint"),
    (["export", "native", "native", "--overwrite"], "holds the source itself"),
    (["export", "native", "native", "--overwrite", "--to", "original"], "holds the source itself"),
    (["export", "exported", "exported", "--overwrite"], "not a native checkpoint"),
    (["export", "native", "tokenizer", "--overwrite"], "holds no export"),
    (["convert", "hf", "exported", "--overwrite"], "holds no native checkpoint"),
]


@pytest.mark.parametrize(("arguments", "found"), SOURCES, ids=[" ".join(arguments) for arguments, _ in SOURCES])
def test_a_source_is_not_replaced(
    work: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], found: str
) -> None:
    refused(work, arguments, capsys, found)


@pytest.mark.parametrize("command", ["convert", "tokenizer", "export"])
def test_a_destination_around_the_source(work: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = [str(work) if each == "out" else each for each in COMMANDS[command]]
    refused(work, arguments, capsys, str(work))


def test_a_source_by_another_name(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "named").symlink_to("native", target_is_directory=True)
    refused(work, ["export", "named", "native", "--overwrite"], capsys, "holds the source itself")


def test_a_source_whose_files_lie_in_the_destination(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the hub's cache, where a model is a folder of links."""
    (work / "links").mkdir()
    for name in ("config.json", "preprocessor_config.json", "flax_model.safetensors"):
        (work / "links" / name).symlink_to(f"../native/{name}")
    refused(work, ["export", "links", "native", "--overwrite"], capsys, "holds the source itself")


@pytest.mark.parametrize(
    ("command", "earlier"),
    [("convert", "native"), ("convert", "tokenizer"), ("tokenizer", "native"), ("tokenizer", "tokenizer"),
     ("export", "exported"), ("export", "original"), ("original", "exported"), ("original", "original")],
)  # fmt: skip
def test_what_it_wrote_is_replaced(work: Path, command: str, earlier: str) -> None:
    shutil.copytree(work / earlier, work / "out")
    assert run(work, COMMANDS[command]) == 0
    written = {"convert": "native", "export": "exported"}.get(command, command)
    assert tree(work / "out").keys() == tree(work / written).keys()
    assert [path.name for path in work.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("command", "earlier"), [(CONVERT, "native"), (TOKENIZER, "tokenizer"), (EXPORT, "exported"),
    (ORIGINAL, "original"), (EXPORT, None), (CONVERT, None)])  # fmt: skip
def test_what_people_and_systems_put_beside_it_is_kept(work: Path, command: list[str], earlier: str | None) -> None:
    """A README, and what a clone of a repository or a file browser leaves. None: nothing else is there."""
    if earlier is None:
        (work / "out").mkdir()
    else:
        shutil.copytree(work / earlier, work / "out")
    (work / "out" / ".git").mkdir()
    beside = {"README.md": b"a person's", ".gitattributes": b"", ".DS_Store": b"", ".git/config": b"[core]"}
    for name, content in beside.items():
        (work / "out" / name).write_bytes(content)
    assert run(work, command) == 0
    after = tree(work / "out")
    written = earlier or ("native" if command is CONVERT else "exported")
    assert {name: after[name] for name in beside} == beside
    assert after.keys() - beside.keys() - {".git"} == tree(work / written).keys()


def test_an_export_without_marks_is_nobodys(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As builds before 0.1.0 wrote it, and as transformers does."""
    trained_further(work / "out")
    refused(work, EXPORT, capsys, "marks", "remove it yourself")


@pytest.mark.thorough
def test_a_training_run_keeps_what_is_put_into_its_model(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs: a directory that is not empty is no place to begin a run."""
    save = results._write
    mine = {"model/thesis.md": b"years of work", "model/pictures/a.png": b"a person's", "model/.hidden": b""}

    def put_first(*arguments: Any) -> None:
        for name, content in mine.items():
            (work / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "run" / name).write_bytes(content)
        save(*arguments)

    monkeypatch.setattr(results, "_write", put_first)
    assert main(["prepare", "digits", str(work / "data")]) == 0
    options = ["--data", str(work / "data"), "--init", str(work / "native"), "--out", str(work / "run")]
    assert main(["train", "digits_finetune", *options, "--optim.epochs", "0.05", "--optim.warmup-epochs", "0"]) == 0
    after = tree(work / "run")
    assert {name: after[name] for name in mine} == mine
    assert main(["export", str(work / "run" / "model"), str(work / "again")]) == 0


def test_a_destination_inside_the_source_costs_nothing(work: Path) -> None:
    before = tree(work / "native")
    assert main(["export", str(work / "native"), str(work / "native" / "exported")]) == 0
    after = tree(work / "native")
    assert {name: content for name, content in after.items() if not name.startswith("exported")} == before


def test_features_do_not_replace_an_input(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(IMAGE, work / "picture.npz")
    refused(work, ["features", "native", "picture.npz", "-o", str(work / "picture.npz")], capsys, "picture.npz")
