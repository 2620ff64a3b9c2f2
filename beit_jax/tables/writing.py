"""The formats of tables, by the endings of their files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from beit_jax.choices import nearest
from beit_jax.errors import BeitJaxError, printable
from beit_jax.tables.schema import Parts, Schema


@dataclass(frozen=True)
class Format:
    """How tables of a format are written.

    Attributes:
        module: in this package, imported when a table is written.
        writer: its function ``(path, schema, parts) -> number of images``.
        check: its function ``(name, schema)``, which refuses what the format cannot hold; empty: it holds everything.
    """

    module: str
    writer: str
    check: str = ""

    def _function(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(f"beit_jax.tables.{self.module}"), name)
        return found

    def checked(self, name: str, schema: Schema) -> None:
        """Refuses what the format cannot hold, before any work is done."""
        if self.check:
            self._function(self.check)(name, schema)

    def write(self, path: Path, schema: Schema, parts: Parts) -> int:
        """Writes a table to a file, and returns the number of images."""
        count: int = self._function(self.writer)(path, schema, parts)
        return count


FORMATS: Final[Mapping[str, Format]] = {
    ".jsonl": Format("write_text", "write_jsonl"),
    ".csv": Format("write_text", "write_csv", "check_csv"),
    ".parquet": Format("write_arrow", "write_parquet", "check_arrow"),
    ".arrow": Format("write_arrow", "write_ipc", "check_arrow"),
    ".npz": Format("write_arrays", "write_npz", "check_arrays"),
    ".safetensors": Format("write_arrays", "write_safetensors", "check_arrays"),
}


def format_of(path: Path) -> Format:
    """The format of a table, by the ending of its name.

    Raises:
        BeitJaxError: no table has this ending.
    """
    ending = path.suffix.lower()
    if ending not in FORMATS:
        near = nearest(ending, list(FORMATS))
        advice = f"; did you mean {near}?" if near else ""
        raise BeitJaxError(f"{printable(path)}: expected a name ending in {', '.join(FORMATS)}{advice}")
    return FORMATS[ending]
