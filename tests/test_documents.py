"""The documents: marked blocks run as they stand, every command parses, and what is named exists."""

import functools
import glob
import re
import tomllib
from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import jaxtyping
import pytest
import yaml
from documents import PAGES, ROOT, anchors, blocks, commands, links, mentions, offered

import beit_jax
from beit_jax.cli import training
from beit_jax.cli.main import COMMANDS, RECIPE_COMMANDS, main
from beit_jax.config import BeitConfig
from beit_jax.convert import formats
from beit_jax.convert.formats import rules
from beit_jax.convert.formats.flax import FLAX
from beit_jax.models.build import param_shapes

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def runnable(*kinds: str) -> list[Path]:
    """Pages with blocks of any of these kinds."""
    return [page for page in PAGES if any(block.run in kinds for block in blocks(page.read_text(encoding="utf-8")))]


PLACEHOLDERS = {"COMMAND", "RECIPE", "..."}


def run_blocks(page: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """In order, in one directory, where of the clone there is the embedded checkpoint alone; offline."""
    (directory / "beit_jax").mkdir()
    (directory / "beit_jax" / "digits").symlink_to(str(files("beit_jax") / "digits"))
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(formats, "FORMATS", formats.FORMATS)  # to which a page adds
    if page.stem == "serving":  # annotations say that sizes are integers, and a free batch behaves like one
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.run not in kinds:
            continue
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
            continue
        lines = commands(block.code)
        assert len(lines) == len(re.sub(r"\\\n", "", block.code).splitlines()), f"{where}: not beit-jax alone"
        for arguments in lines:
            expanded = [name for argument in arguments for name in sorted(glob.glob(argument)) or [argument]]
            assert main(expanded) == 0, f"{where}: {arguments}"


@pytest.mark.parametrize("page", runnable("quick"), ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_blocks(page, tmp_path, monkeypatch, "quick")


@pytest.mark.thorough
@pytest.mark.parametrize("page", runnable("thorough"), ids=lambda page: page.name)
def test_longer_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the others of their page."""
    run_blocks(page, tmp_path, monkeypatch, "quick", "thorough")


@pytest.mark.slow
@pytest.mark.parametrize("page", runnable("slow"), ids=lambda page: page.name)
def test_long_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the others of their page."""
    run_blocks(page, tmp_path, monkeypatch, "quick", "slow")


def test_what_every_page_is_for_runs() -> None:
    """Those for work that needs no machine or data of one's own have blocks that run."""
    assert {page.stem for page in runnable("quick", "thorough", "slow")} >= {
        "converting", "running", "own_data", "own_loop", "finetuning", "pretraining", "serving",
        "adding_a_source_format", "adding_an_objective", "migrating_from_flaxbeit",
    }  # fmt: skip


def idle(command: Callable[..., int]) -> Callable[..., int]:
    """A command that takes what the other takes, and does nothing."""

    @functools.wraps(command)
    def nothing(*arguments: object, **options: object) -> int:
        return 0

    return nothing


@pages
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All in code blocks, with their names, values and recipes; nothing is carried out."""
    for command in COMMANDS.values():
        module = import_module(f"beit_jax.cli.{command.module}")
        monkeypatch.setattr(module, command.function, idle(getattr(module, command.function)))
    for name in ("_train", "_tokenize", "_aot"):
        monkeypatch.setattr(training, name, idle(getattr(training, name)))
    for block in blocks(page.read_text(encoding="utf-8")):
        for arguments in commands(block.code):
            if PLACEHOLDERS & set(arguments):
                continue
            assert main(arguments) == 0, (f"{page.name}:{block.line}", arguments, capsys.readouterr().err)


@pages
def test_options_that_are_named_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of sentences too."""
    for name, options in mentions(page.read_text(encoding="utf-8")):
        if options and name in {**COMMANDS, **RECIPE_COMMANDS}:
            recipe = ["digits_finetune"] if name in RECIPE_COMMANDS else []
            kinds = [[kind] for kind in ("attention", "rollout", "position-bias", "curves", "parity")]
            every = [offered(capsys, name, *rest) for rest in (kinds if name == "plot" else [recipe])]
            assert set(options) <= set().union(*every) | {"--help"}, name


def test_every_command_is_described() -> None:
    described = {name for page in PAGES for name, _ in mentions(page.read_text(encoding="utf-8"))}
    assert described >= COMMANDS.keys() | RECIPE_COMMANDS.keys()


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    rooms = "beit_jax|convert|train|tests|docs|benchmarks|launch"
    named = re.findall(
        rf"(?<![\w/])((?:{rooms})/[\w./-]*\.(?:py|md|sh|sbatch|json))\b", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pages
def test_library_names_exist(page: Path) -> None:
    """`beit_jax.x.y` in a sentence can be imported."""
    for name in set(re.findall(r"`(beit_jax(?:\.\w+)+)", page.read_text(encoding="utf-8"))):
        __import__("pkgutil").resolve_name(name)


def test_flaxbeit_names_are_those_of_the_table() -> None:
    page = (ROOT / "docs" / "migrating_from_flaxbeit.md").read_text(encoding="utf-8")
    section = page.partition("## 4. Parameters")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in section.splitlines() if row.startswith("| `")]
    told = [(tuple(re.findall(r"`([^`]+)`", theirs)), re.findall(r"`([^`]+)`", ours)[0]) for theirs, ours in rows]
    expected = (*FLAX.backbone, *FLAX.heads)
    assert told == [(rule.torch, rule.flax) for rule in expected]


def test_the_operations_of_the_format_page_are_all_there_are() -> None:
    page = (ROOT / "docs" / "adding_a_source_format.md").read_text(encoding="utf-8")
    listed = page.partition("The operations are ")[2].partition("(")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == {
        name for name, value in vars(rules).items() if isinstance(value, rules.Op)
    }


def test_shapes_in_the_conversion_page() -> None:
    """What it says of stacked leaves."""
    shapes = param_shapes(BeitConfig(num_hidden_layers=3, position_bias="per_layer"))
    assert shapes["blocks/attention/qkv_kernel"] == (3, 768, 3, 12, 64)


# --- Version, citation, licence ---------------------------------------------------------------------------------------


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert project["version"] == beit_jax.__version__ == citation["version"] == newest
    assert project["license"] == citation["license"]


def test_citation() -> None:
    """The required fields of the Citation File Format 1.2.0, and the works that this one implements."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"] and citation["authors"] == [{"name": "the beit-jax developers"}]
    identifiers = [entry["identifiers"][0]["value"] for entry in citation["references"]]
    assert identifiers == [f"arXiv:{number}" for number in ("2106.08254", "2208.06366", "2202.03555", "2102.12092")]
    assert all(entry["type"] == "article" and entry["title"] and entry["authors"] for entry in citation["references"])


def test_licence_is_the_one_that_is_named() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
