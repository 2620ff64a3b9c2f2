"""The floor plan: rooms of few modules, and imports that only go down. The library imports no torch."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"beit_jax": "beit_jax", "convert": "beit_jax.convert", "train": "beit_jax.train"}
# Packages, lowest first. A module may import modules of its own package and of the packages above it in this list.
# `beit_jax` is the ground: the modules that lie in that folder itself. `beit_jax.convert` and `beit_jax.train` are the
# modules at those folders' doors.
ORDER = [
    "beit_jax",
    "beit_jax.images",
    "beit_jax.tables",
    "beit_jax.weights",
    "beit_jax.adapters",
    "beit_jax.kernels.cpu",
    "beit_jax.kernels",
    "beit_jax.models",
    "beit_jax.tokenizers",
    "beit_jax.convert.pickles",
    "beit_jax.convert.strangers",
    "beit_jax.convert.files",
    "beit_jax.convert.formats",
    "beit_jax.convert.formats.cae",
    "beit_jax.convert.formats.openmmlab",
    "beit_jax.convert.adapters",
    "beit_jax.convert",
    "beit_jax.inference",
    "beit_jax.programs",
    "beit_jax.publishing",
    "beit_jax.looking",
    "beit_jax.search",
    "beit_jax.train",
    "beit_jax.train.costs",
    "beit_jax.train.distributed",
    "beit_jax.train.checkpoints",
    "beit_jax.train.labels",
    "beit_jax.train.augmentation",
    "beit_jax.train.data",
    "beit_jax.train.evaluation",
    "beit_jax.train.initial",
    "beit_jax.train.step",
    "beit_jax.train.objectives",
    "beit_jax.train.recipes",
    "beit_jax.train.loop",
    "beit_jax.train.forecast",
    "beit_jax.bulk",
    "beit_jax.peers",
    "beit_jax.cli",
]
MOST_MODULES = 15
LONGEST_CHAIN = 12


def _modules() -> dict[str, Path]:
    """Returns the file of every module by its name; a package's name stands for its `__init__`."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


FILES = _modules()
PACKAGES = {name: path for name, path in FILES.items() if path.name == "__init__.py"}
# The face is what people import: `beit_jax/__init__.py`, and `__main__`, which `python -m beit_jax` runs.
MODULES = [name for name in FILES if name not in PACKAGES and name != "beit_jax.__main__"]
FACES = ("beit_jax", "beit_jax.__main__", "beit_jax.convert", "beit_jax.images", "beit_jax.train", "beit_jax.weights")


When = Literal["import", "call", "table", "never"]


class Import(NamedTuple):
    """One imported name, ours or another's, and when it is imported.

    Attributes:
        when: when the module is imported, when a function runs, by name from a table, or for type checkers only.
    """

    name: str
    when: When


def _package(module: str) -> str:
    return module if module in PACKAGES else module.rpartition(".")[0]


def _read(node: ast.AST, package: str, when: When) -> Iterator[Import]:
    match node:
        case ast.Import(names=names):
            yield from (Import(alias.name, when) for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            base = ".".join([*parents, *([module] if module else [])])
            for alias in names:
                inside = f"{base}.{alias.name}"  # `from package import module`, or a name that a module defines
                foreign = base.partition(".")[0] != "beit_jax"
                yield Import(inside if foreign or inside in FILES else base, when)
        case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(name)), *_]):
            yield Import(name, when)
        case ast.Call(func=ast.Name(id="import_module"), args=[ast.JoinedStr(), *_]) if package not in FACES:
            # A table of names, as of source formats and commands: any module of the package.
            yield from (Import(name, "table") for name in MODULES if _package(name) == package)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        when = "call" if when == "import" else when
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _read(child, package, "never")
        for child in node.orelse:
            yield from _read(child, package, when)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _read(child, package, when)


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Returns all imports of a module: relative and absolute, at its top and in its functions."""
    return tuple(_read(ast.parse(FILES[module].read_text()), _package(module), "import"))


def needed(module: str, *without: When) -> set[str]:
    """Returns the modules of this project that a module imports sooner or later."""
    whens = {"import", "call", "table"} - {*without}
    return {found.name for found in imports(module) if found.when in whens and found.name in FILES} - {module}


def chains(*without: When) -> dict[str, list[str]]:
    """Returns the longest chain of imports that ends with each module; fails at a cycle."""
    known: dict[str, list[str]] = {}

    def follow(module: str, above: tuple[str, ...]) -> list[str]:
        if module in above:
            pytest.fail("a cycle: " + " > ".join([*above[above.index(module) :], module]))
        if module not in known:
            below = [follow(name, (*above, module)) for name in sorted(needed(module, *without))]
            known[module] = [*max(below, key=len, default=[]), module]
        return known[module]

    return {module: follow(module, ()) for module in FILES}


def test_every_package_has_its_place() -> None:
    assert set(PACKAGES) == set(ORDER)
    folders = {path.parent for path in FILES.values()}
    assert folders == {path.parent for path in PACKAGES.values()}, "a folder without an __init__.py"


@pytest.mark.parametrize("package", ORDER)
def test_a_room_has_few_modules(package: str) -> None:
    assert len(list(PACKAGES[package].parent.glob("[!_]*.py"))) <= MOST_MODULES


@pytest.mark.parametrize("package", ORDER)
def test_a_room_says_what_it_may_import(package: str) -> None:
    """Its docstring names every room that its modules import; "the library", "below" and "everything" name several."""
    docstring = " ".join((ast.get_docstring(ast.parse(PACKAGES[package].read_text())) or "").split())
    named = re.search(r"May import:? (.*)", docstring)
    assert named, f"{PACKAGES[package].relative_to(ROOT)} does not say what the room may import"
    for module in (name for name in MODULES if _package(name) == package):
        for name in (name for name in needed(module) if _package(name) not in (package, "beit_jax")):
            words = ["everything", "below", *name.split(".")[-2:]]
            words += [] if name.startswith(("beit_jax.convert.", "beit_jax.train.")) else ["the library"]
            assert any(word in named[1] for word in words), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    """Imports inside functions count: what a module needs later it needs."""
    below = ORDER[: ORDER.index(_package(module)) + 1]
    assert {name for name in needed(module) if _package(name) not in below} == set()


def test_there_are_no_cycles() -> None:
    chains()


def test_no_chain_of_imports_is_long() -> None:
    """Rows of a table do not count: who reads a table need not read what it lists."""
    longest = max(chains("table").values(), key=len)
    assert len(longest) <= LONGEST_CHAIN, " > ".join(longest)


def test_modules_are_imported_where_they_are_defined() -> None:
    """No module goes through an `__init__` that only collects names: that is for users of the library."""
    assert [(module, found.name) for module in MODULES for found in imports(module) if found.name in FACES] == []


def test_training_reads_native_checkpoints_only() -> None:
    training = [module for module in FILES if module.startswith("beit_jax.train")]
    converter = [(module, found.name) for module in training for found in imports(module) if "convert" in found.name]
    assert converter == []


@pytest.mark.parametrize("module", FILES)
def test_torch_is_not_imported(module: str) -> None:
    tops = {found.name.partition(".")[0] for found in imports(module) if found.when == "import"}
    assert not tops & {"torch", "transformers", "timm"}


def test_the_wheel_holds_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(PACKAGES)
