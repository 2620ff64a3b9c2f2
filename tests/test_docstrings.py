"""What the API reference is built from: every public name says what it is, every array argument what shape it has."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import beit_jax

ROOT = Path(__file__).parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef
FILES = {
    ".".join([package, *path.relative_to(ROOT / room).with_suffix("").parts]).removesuffix(".__init__"): path
    for room, package in (("beit_jax", "beit_jax"), ("convert", "beit_jax.convert"), ("train", "beit_jax.train"))
    for path in sorted((ROOT / room).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
SHAPED = re.compile(r"\b(?:Float|Int|Integer|UInt|Bool|Key|Shaped|Num|Inexact)\d*\[[^\[\]]*\]")
ARRAY = re.compile(r"\b(?:Array|ndarray|ArrayLike)\b")
COLLECTION = re.compile(r"^(?:Mapping|dict|Callable)\[")  # by name, or made elsewhere: no shape is common to them


def public(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Classes and functions that users see, with what they are called."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and (not node.name.startswith("_") or node.name == "__call__"):
            yield f"{owner}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{owner}.{node.name}")


def decorators(node: ast.ClassDef | Function) -> set[str]:
    return {ast.unparse(decorator) for decorator in node.decorator_list}


def is_method(name: str, module: str) -> bool:
    return name.removeprefix(f"{module}.").count(".") == 1


NAMES = [(module, name, node) for module, tree in TREES.items() for name, node in public(tree.body, module)]
# A method that overrides or implements another one, of a base class or a protocol, means what that one says.
DESCRIBED = {node.name for module, name, node in NAMES if is_method(name, module) and ast.get_docstring(node)}


@pytest.mark.parametrize("module", FILES)
def test_everything_public_says_what_it_is(module: str) -> None:
    """Modules, classes, functions, and methods that neither only name a value nor follow a described one."""
    missing = [] if ast.get_docstring(TREES[module]) else [module]
    for owner, name, node in NAMES:
        if owner != module or ast.get_docstring(node) or decorators(node) & {"property", "cached_property", "overload"}:
            continue
        if not (is_method(name, module) and (node.name in DESCRIBED or node.name == "__call__")):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("module", FILES)
def test_array_arguments_have_shapes(module: str) -> None:
    """In the annotation, or in brackets in the docstring of the function or of its class."""
    missing = []
    classes = {name: ast.get_docstring(node) or "" for _, name, node in NAMES if isinstance(node, ast.ClassDef)}
    for owner, name, node in NAMES:
        if owner != module or isinstance(node, ast.ClassDef):
            continue
        told = (ast.get_docstring(node) or "") + classes.get(name.rpartition(".")[0], "")
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            bare = ARRAY.search(SHAPED.sub("", kind)) and not COLLECTION.match(kind)
            if bare and not re.search(r"\[[\w., /*+-]+\]|any shape", told):
                missing.append(f"{name}({argument.arg}: {kind})")
    assert missing == []


def test_exported_names_are_described() -> None:
    for name in beit_jax.__all__:
        value = getattr(beit_jax, name)
        assert value.__doc__ or name == "VARIANTS", name  # a mapping: its module's docstring describes it


def test_the_reference_leaves_no_module_out() -> None:
    """As docs/build_api.py finds them."""
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    assert spec is not None and spec.loader is not None
    build_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_api)
    found = build_api.modules()
    assert len(found) == len(set(found)) and FILES.keys() - set(found) == {"beit_jax.cli.main"}
