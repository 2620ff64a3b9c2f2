"""Opens tables of features of any format: one file, or a folder of several."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Float

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import changes
from beit_jax.tables.features import Block, FeatureTable
from beit_jax.tables.read_arrays import open_npz, open_safetensors
from beit_jax.tables.read_arrow import ArrowTable, ParquetTable
from beit_jax.tables.read_text import CsvTable, JsonLinesTable

FORMATS: Final[Mapping[str, Callable[[Path], FeatureTable]]] = {
    ".parquet": ParquetTable,
    ".arrow": ArrowTable,
    ".feather": ArrowTable,
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".jsonl": JsonLinesTable,
    ".csv": CsvTable,
}


class Features(NamedTuple):
    """A whole table in memory.

    Attributes:
        names: of the images, a name for every row.
        features: [n, d] float32, read-only where they lie in a mapped file. Those of tokens lie one after the other;
            `metadata["shape"]` is that of one image.
        metadata: what the table says of the model that made it; empty where it says nothing.
    """

    names: list[str]
    features: Float[np.ndarray, "n d"]
    metadata: Mapping[str, Any]


def read_features(path: str | Path) -> Features:
    """Reads a table of features: Parquet, Arrow, ``.npz``, safetensors, JSON lines, CSV, or a folder of such files.

    `open_features` reads the same in blocks, whatever their number.

    Raises:
        BeitJaxError: as `open_features`.
    """
    table = open_features(path)
    blocks = list(table.parts(1 << 40))  # as the file has them: one of a mapped file is not copied
    names = [name for block in blocks for name in block.names()]
    arrays = [block.features for block in blocks]
    features = arrays[0] if len(arrays) == 1 else np.concatenate([np.empty((0, table.width), np.float32), *arrays])
    return Features(names, features, table.metadata)


def open_features(path: str | Path) -> FeatureTable:
    """Opens a table of features, of which nothing but its form is read.

    Args:
        path: a file, whose ending says its format, or a folder of such files, which are one table in the order of their
            names: what Ray Data, Spark or several jobs write.

    Raises:
        BeitJaxError: there is no such file, it is damaged or no table of features, or files of a folder were made by
            different models.
    """
    path = Path(path)
    if path.is_dir():
        return FolderTable(path)
    if not path.is_file():
        raise BeitJaxError(f"{printable(path)}: no such file; expected a table of features")
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise BeitJaxError(f"{printable(path)}: no table of features: expected a name ending in {', '.join(FORMATS)}")
    try:
        return FORMATS[suffix](path)
    except UnicodeDecodeError as error:
        raise BeitJaxError(f"{printable(path)}: no UTF-8 text at byte {error.start}; write the table again") from None
    except OSError as error:
        raise BeitJaxError(f"{printable(path)}: cannot be read ({error.strerror}); check its permissions") from None


def is_features(path: Path) -> bool:
    """True if a path names a table of features and no images, as an array file with an image or a folder may.

    A folder is one if it holds nothing but tables, and the first is one of features.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
        if not entries or not all(entry.suffix.lower() in FORMATS for entry in entries):
            return False
        path = entries[0]
    elif suffix != ".npz":
        return suffix in FORMATS
    try:
        open_features(path)
    except BeitJaxError:
        return False
    return True


class FolderTable(FeatureTable):
    """Tables of a folder, one after the other."""

    def __init__(self, path: Path):
        files = sorted(
            entry
            for entry in path.iterdir()
            if entry.suffix.lower() in FORMATS and not entry.name.startswith((".", "_")) and entry.is_file()
        )
        if not files:
            raise BeitJaxError(f"{printable(path)}: no table of features in this folder; expected {', '.join(FORMATS)}")
        self.path, self._files = path, files
        first = open_features(files[0])
        self.width, self.metadata = first.width, first.metadata

    def parts(self, rows: int, values: bool = True) -> Iterator[Block]:
        for file in self._files:
            table = open_features(file)
            for name, here, there in changes(dict(self.metadata), dict(table.metadata)):
                raise BeitJaxError(
                    f"{printable(file)}: {printable(name)} is {_shown(there)}, that of {printable(self._files[0])} is "
                    f"{_shown(here)}; expected tables of one model"
                )
            if table.width != self.width:
                raise BeitJaxError(
                    f"{printable(file)}: {table.width} numbers in a row, {printable(self._files[0])} has {self.width}; "
                    "expected tables of one model"
                )
            yield from table.parts(rows, values)


def _shown(value: Any) -> str:
    return printable(json.dumps(value), 60)
