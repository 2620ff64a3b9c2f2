"""The pages of source formats: each is one module and one line, and no other module decides by a format."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from beit_jax.convert import exporter, formats, load
from beit_jax.convert.formats import LAYOUTS, PAGES
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve

CONVERT = Path(__file__).parents[3] / "convert"
PARTS = {
    "__init__", "config_notes", "format", "heads", "rules", "segmentation", "writing",
    "openmmlab.names", "openmmlab.settings",
}  # fmt: skip


def test_every_page_is_listed() -> None:
    """Pages of one family may lie in a package of their own, beside the parts that they share."""
    formats = CONVERT / "formats"
    files = {path.relative_to(formats).with_suffix("").parts for path in formats.rglob("*.py")}
    assert {".".join(parts) for parts in files if parts[1:] != ("__init__",)} == PARTS | PAGES.keys()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_with_a_layout_writes_it(page: str) -> None:
    found = import_module(f"beit_jax.convert.formats.{page}").FORMATS
    assert any(each.write for each in found) == (PAGES[page] is not None)
    assert all(each in formats.FORMATS for each in found)


def named(path: Path) -> Iterator[str]:
    """Yields the parts of every relative import of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from (*(node.module or "").split("."), *(name.name for name in node.names))


@pytest.mark.parametrize("path", sorted(CONVERT.glob("*.py")), ids=lambda path: path.stem)
def test_no_module_outside_the_pages_knows_one(path: Path) -> None:
    """Except the tokenizers, whose VQ-KD is made of two of unilm's transformers."""
    assert PAGES.keys() & set(named(path)) <= ({"unilm"} if path.stem == "tokenizers" else set())


def test_the_first_layout_is_the_default_of_the_command_line() -> None:
    assert LAYOUTS[0] == "hf" and set(LAYOUTS) >= {"hf", "original", "timm", "mmpretrain", "mmseg"}


def test_an_unknown_layout_is_named(tmp_path: Path) -> None:
    checkpoint = load(resolve(CONVERT.parent / "beit_jax" / "digits"))
    with pytest.raises(BeitJaxError, match="keras"):
        exporter.export(checkpoint, tmp_path / "out", "keras")
    assert not any(tmp_path.iterdir())
