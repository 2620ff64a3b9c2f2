"""No module needs JAX's private modules when it is imported, and one process on one machine never needs them."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from beit_jax.version import source_files

PRIVATE = ("jax._src", "jax.extend", "jax.interpreters", "jaxlib")
DIGITS = Path(str(files("beit_jax") / "digits"))
IMAGES = [str(path) for path in sorted((DIGITS / "images").iterdir())[:2]]


def is_private(name: str) -> bool:
    return any(name == private or name.startswith(f"{private}.") for private in PRIVATE)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below that runs when the module is imported: none in a function or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from at_import(child)


def imported(source: str) -> set[str]:
    """Absolute names that a module imports when it is imported."""
    names: set[str] = set()
    for node in at_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_reader_sees_every_kind_of_import() -> None:
    for line in ("import jax._src.core", "from jax import extend", "try:\n    import jaxlib\nfinally:\n    pass"):
        assert any(map(is_private, imported(line))), line
    for line in ("import jax.export", "def f():\n    import jaxlib", "if TYPE_CHECKING:\n    import jaxlib"):
        assert not any(map(is_private, imported(line))), line


@pytest.mark.parametrize("module", sorted(source_files()))
def test_no_module_imports_private_jax(module: str) -> None:
    names = imported(source_files()[module].read_text(encoding="utf-8"))
    assert sorted(filter(is_private, names)) == []


HOOK = """
import builtins, json, os, sys
from pathlib import Path

places, private = map(tuple, json.loads(sys.argv.pop(1)))
real = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    if not level and str((globals or {}).get("__file__")).startswith(places):
        for full in (name, *(f"{name}.{part}" for part in fromlist or ())):
            if full.startswith(private):
                raise ImportError(f"{full} is refused to {globals['__file__']}")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
try:  # the guard works: our files are refused, others are not
    exec("import jaxlib", {"__file__": os.path.join(places[0], "guarded.py"), "__builtins__": builtins})
except ImportError:
    import jaxlib
else:
    sys.exit("the guard let an import of jaxlib pass")

from beit_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def guarded(*arguments: object, **variables: str) -> Any:
    """What a command prints as JSON while private names are refused to every file of ours."""
    places = sorted({str(path.parent) + os.sep for path in source_files().values()})
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    settings = json.dumps([places, PRIVATE])
    environment |= {"JAX_PLATFORMS": "cpu"} | variables
    command = [sys.executable, "-c", HOOK, settings, *map(str, arguments), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr  # a feature that is off would say so
    return json.loads(run.stdout)


def test_demo_and_classify_need_no_private_jax(tmp_path: Path) -> None:
    assert guarded("demo", "--out", tmp_path / "native")["passed"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    plain, first, second = (guarded("classify", tmp_path / "native", *IMAGES, **more) for more in ({}, cache, cache))
    assert [image["classes"][0]["label"] for image in plain] == [image["classes"][0]["label"] for image in first]
    assert first == second
    assert list((tmp_path / "cache" / "beit-jax").iterdir())


@pytest.mark.slow
def test_training_needs_no_private_jax(tmp_path: Path) -> None:
    guarded("prepare", "digits", tmp_path / "data")
    short = ["--optim.epochs", "0.1", "--optim.warmup-epochs", "0", "--data.workers", "0"]
    run = ["train", "digits_finetune", "--data", tmp_path / "data", "--out", tmp_path / "run"]
    assert guarded(*run, *short)["step"] == 4
