"""Mistakes on the command line: one line with the nearest word of that command, exit code 2, nothing done.

Rows: the arguments, and what the line must hold. A mistake is refused before data or a checkpoint is looked at, so the
files that the rows name do not exist.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

from beit_jax import __version__
from beit_jax.cli import main as cli
from beit_jax.cli.main import COMMANDS, RECIPE_COMMANDS, main
from beit_jax.errors import BeitJaxError
from beit_jax.train.recipe import MOST, Range
from beit_jax.train.recipes import RECIPES, recipe_named

CLASSIFY = ["classify", "nowhere", "x.png"]
TRAIN = ["train", "digits_finetune", "--data", "nowhere", "--out", "run"]


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must end with exit code 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["expected a command", "see beit-jax --help"]),
        (["clasify"], ["clasify", "the nearest is classify", "see beit-jax --help"]),
        (["--jsn"], ["expected a command", "--jsn"]),
        (["--tyro-print-completion"], ["expected SHELL", "found nothing"]),
        (["--tyro-print-completion", "bsh"], ["bash, zsh, tcsh or fish", "found bsh"]),
        (["list", "extra"], ["extra", "list takes no such argument", "see beit-jax list --help"]),
        ([*CLASSIFY, "--tpo", "3"], ["--tpo", "the nearest is --top", "see beit-jax classify --help"]),
        ([*CLASSIFY, "--top"], ["--top", "expected INT, found nothing"]),
        ([*CLASSIFY, "--top", "three"], ["--top", "expected INT, found three"]),
        ([*CLASSIFY, "--top=three"], ["--top", "found three"]),
        ([*CLASSIFY, "--batch_sise", "3"], ["--batch_sise", "the nearest is --batch-size"]),
        (["classify"], ["SOURCE", "missing", "see beit-jax classify --help"]),
        (["convert", "only-one"], ["DEST", "missing"]),
        (["convert", "a", "b", "--position-resize", "timm"], ["expected bilinear, geometric or geometric_linear,"]),
        (["convert", "a", "b", "--num-heads", "x"], ["--num-heads: expected INT, found x"]),
        (["inspect", "a", "--tensor"], ["the nearest is --tensors"]),
        (["features", "a", "b.png", "--pooling", "cl"], ["--pooling", "pooled, mean, cls or tokens", "found cl"]),
        (["export", "a", "b", "--to", "tim"], ["--to", "the nearest is timm"]),
        (["prepare", "digit", "x"], ["KIND", "the nearest is digits"]),
        (["plot"], ["attention", "parity", "see beit-jax plot --help"]),
        (["plot", "attnetion", "a"], ["the nearest is attention"]),
        (["plot", "attention", "a"], ["IMAGE", "missing", "see beit-jax plot attention --help"]),
        (["plot", "curves", "run", "--metrc", "loss"], ["the nearest is --metrics", "see beit-jax plot curves --help"]),
        (["train"], ["RECIPE", "--data DIR", "--out DIR", "missing", "see beit-jax train --help"]),
        (["train", "digits_finetun"], ["the nearest is digits_finetune"]),
        (["train", "--data", "a", "--out", "b", "digits_finetune"], ["--data", "name the recipe before all options"]),
        (TRAIN[:4], ["--out DIR is missing", "see beit-jax train digits_finetune --help"]),
        ([*TRAIN[:4], "--oot", "run"], ["--oot", "the nearest is --out"]),
        ([*TRAIN, "--optim.epoch", "3"], ["--optim.epoch", "the nearest is --optim.epochs", "digits_finetune --help"]),
        ([*TRAIN, "--optim.lr", "fast"], ["--optim.lr", "expected FLOAT, found fast"]),
        ([*TRAIN, "--run.mesh", "1", "1"], ["--run.mesh", "found 1 1"]),
        ([*TRAIN, "--model.pooling", "CLS"], ["--model.pooling", "mean or cls", "found CLS"]),
        ([*TRAIN, "--mask.patches", "3"], ["--mask.patches", "classification does not use it"]),
        (["aot", "digits_finetune", "--topologi", "v5e:2x4"], ["the nearest is --topology"]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(arguments, capsys)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("optim.epochs", ["1e300", "0", "-1", "nan", "inf"]),
        ("optim.lr", ["nan", "inf", "-1e-3", "1e300"]),
        ("optim.warmup-epochs", ["-1", "1e300"]),
        ("optim.accumulate", ["0", "-4", str(10**30)]),
        ("data.batch-size", ["0", "-5", str(10**30)]),
        ("data.eval-batch-size", ["0", "-5"]),
        ("data.workers", ["-3", "100000"]),
        ("data.max-bad", ["-0.1", "1.1", "nan"]),
        ("model.image-size", ["0", "-32", str(10**9)]),
        ("model.layer-scale", ["-1", "nan"]),
        ("augment.randaugment", ["strong", "rand-m", "rand-m9-x3"]),
        ("run.seed", ["-1", str(2**32)]),
        ("run.mesh", ["0 0 0", "1 -2 1", f"{10**30} 1 1"]),
        ("run.profile-steps", ["-1", str(10**30)]),
        ("run.log-every", ["0", str(10**30)]),
        ("hosts.wait", ["nan", "-1"]),
    ],
)
def test_values_out_of_range_are_refused_at_once(
    option: str, values: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        line = refused([*TRAIN, f"--{option}", *value.split()], capsys)
        assert f"--{option}: expected " in line and "found " in line


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (
            ["tokenize", "digits_pretrain", "--data", "a", "--out", "b", "--tokenizer", "c", "--epochs", "1e300"],
            "epochs",
        ),
        (["aot", "digits_finetune", "--classes", "-4"], "classes"),
    ],
)
def test_other_commands_on_recipes_have_ranges_too(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--{option}: expected " in refused(arguments, capsys)


def numbers(kind: type) -> Iterator[tuple[str, type]]:
    """The options of a group that are numbers or several, and their type: int or float."""
    for name, hint in get_type_hints(kind).items():
        found = {*(get_args(hint) or [hint])} & {int, float}
        if found:
            yield name, found.pop()


WRONG = {int: [10**30, -(10**30)], float: [float("nan"), float("inf"), -float("inf"), 1e300]}


@pytest.mark.parametrize("name", ["digits_finetune", "beit_base_pt1k", "beit_base_ade20k", "vqkd_base", "dvae",
                                  "data2vec_base_800", "beit_base_linear"])  # fmt: skip
def test_no_number_of_a_recipe_is_beyond_all_bounds(name: str) -> None:
    recipe = recipe_named(name)
    for group, kind in recipe.group_types().items():
        options = getattr(recipe, group)
        for option, number in numbers(kind):
            value = getattr(options, option)
            for wrong in WRONG[number]:
                changed = (wrong, *value[1:]) if isinstance(value, tuple) else wrong
                broken = dataclasses.replace(options, **{option: changed})
                with pytest.raises(BeitJaxError, match=rf"^--{group}.{option.replace('_', '-')}: expected "):
                    dataclasses.replace(recipe, **{group: broken}).check()


def test_every_number_of_a_recipe_has_a_range() -> None:
    """Without one, zero and negative numbers would pass."""
    kinds = {kind for build in RECIPES.values() for kind in type(build()).group_types().values()}
    hints = {kind: get_type_hints(kind, include_extras=True) for kind in kinds}
    free = {
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, _ in numbers(kind)
        if not any(isinstance(entry, Range) for entry in getattr(hints[kind][name], "__metadata__", ()))
    }
    assert free == set()
    assert MOST < 10**10


def test_more_steps_than_a_table_can_hold_are_refused() -> None:
    from beit_jax.train.recipe import OptimOptions
    from beit_jax.train.step.schedule import MOST_STEPS, total_steps

    with pytest.raises(BeitJaxError, match=r"^--optim.epochs: expected at most 10,000,000 steps"):
        total_steps(OptimOptions(epochs=1e6), MOST_STEPS)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"beit-jax {__version__}\n"


@pytest.mark.parametrize("width", [40, 60, 200])
def test_help_keeps_to_the_width(width: int) -> None:
    lines = cli.overview(width).splitlines()
    assert max(map(len, lines)) <= width
    assert {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "} == set(cli.EVERY)


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [*([name] for name in COMMANDS), *([name, "digits_finetune"] for name in RECIPE_COMMANDS),
     *(["plot", kind] for kind in ("attention", "rollout", "position-bias", "curves", "parity"))],
)  # fmt: skip
def test_help_says_defaults_in_words(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is no word for it, and is named only where it is a value to give: `--optim.clip FLOAT|None`."""
    monkeypatch.setenv("COLUMNS", "600")  # nothing is wrapped
    text = help_of(arguments, capsys)
    for nothing in ("(default: )", "(default: None)", "(default: False)", "{None"):
        assert nothing not in text


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("arguments", [["convert"], ["prepare"], ["train"], ["aot", "beit_base_pt1k"]])
def test_paragraphs_of_help_keep_to_the_width(
    arguments: list[str], width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    blocks = help_of(arguments, capsys).partition("╭")[0].split("\n\n")[1:]
    prose = [block for block in blocks if not block.startswith(("Try:", "SOURCE:"))]
    assert prose and max(len(line) for block in prose for line in block.splitlines()) <= width


@pytest.mark.parametrize("gone", ["module", "on_parse_error", "UnrecognizedArgs"])
def test_another_release_of_tyro_answers_itself(
    gone: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hook for mistakes is private, and may be gone: then its box tells the mistake, with the same exit code."""
    from beit_jax.cli import usage

    left = {name: value for name, value in vars(usage.mistakes).items() if name != gone}
    monkeypatch.setattr(usage, "mistakes", None if gone == "module" else SimpleNamespace(**left))
    with pytest.raises(SystemExit, match="2"):
        main([*CLASSIFY, "--top", "three"])
    assert "--top" in capsys.readouterr().err


def test_none_takes_a_recipes_value_back(capsys: pytest.CaptureFixture[str]) -> None:
    """digits_finetune clips, and --optim.clip None stops that: the next thing that is missing is the data."""
    assert "FLOAT|None" in help_of(["train", "digits_finetune"], capsys)
    assert "nowhere: no data set" in refused([*TRAIN, "--optim.clip", "None"], capsys)


def test_a_switch_that_may_be_on_has_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    """`--optim.no-decay-bias-tables  Apply weight decay ...` alone would be a double negative."""
    text = help_of(["train", "digits_finetune"], capsys)
    assert "--optim.decay-bias-tables, --optim.no-decay-bias-tables" in text
    assert "--no-" not in text
