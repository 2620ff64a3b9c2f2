"""The forward pass of BEiT, from pixels to logits, can be read in one sitting."""

import ast
from pathlib import Path

import beit_jax.models

ROOM = Path(beit_jax.models.__file__).parent
FORWARD = ("attention.py", "layers.py", "encoder.py", "classifier.py")  # from the formula to the logits
MOST_LINES = 450
DOOR = "one_cpu"  # the one module that may ask what machine a function is traced for


def names(file: Path) -> set[str]:
    """Every name and attribute in a file's code."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    }


def test_four_files_hold_the_forward_pass() -> None:
    lines = {name: len((ROOM / name).read_text().splitlines()) for name in FORWARD}
    assert len(lines) <= 4 and sum(lines.values()) <= MOST_LINES, lines


def test_the_file_of_attention_shows_the_formula_alone() -> None:
    """Numbers are axes, small counts and the cache of indices: none is as large as a machine's cache."""
    tree = ast.parse((ROOM / "attention.py").read_text())
    numbers = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) in (int, float)
    }
    assert max(numbers) <= 16
    assert not any(
        "cpu" in ast.unparse(node.test).lower() for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)
    )


def test_one_file_asks_for_the_machine() -> None:
    conditions = {"on_one_cpu", "default_backend", "get_abstract_mesh"}
    asking = {file.stem: sorted(names(file) & conditions) for file in ROOM.glob("*.py") if names(file) & conditions}
    # The placement of activations asks for the mesh, to split them by it, and for nothing else.
    assert asking == {DOOR: ["get_abstract_mesh", "on_one_cpu"], "partition": ["get_abstract_mesh"]}


def test_the_textbook_asks_the_door_by_decorators_alone() -> None:
    for name in FORWARD:
        tree = ast.parse((ROOM / name).read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == f"beit_jax.models.{DOOR}"
            for alias in node.names
        }
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        decorators = [one for function in functions for one in function.decorator_list if isinstance(one, ast.Call)]
        chosen = {one.args[0].id for one in decorators if ast.unparse(one.func) == "for_one_cpu"}
        assert imported == (chosen | {"for_one_cpu"} if chosen else set()), name
