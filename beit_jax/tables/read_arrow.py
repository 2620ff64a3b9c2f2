"""Features in ``.arrow`` and ``.parquet``, by pyarrow. Arrow's files are mapped, Parquet's decoded as they stream."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.errors import BeitJaxError, needs_extra, printable
from beit_jax.tables.features import METADATA, Block, FeatureTable, not_features, parsed_metadata

COLUMNS = ("image", "features")


def pyarrow() -> Any:
    """The package, with its modules for both formats.

    Raises:
        BeitJaxError: it is not installed; says how to install it.
    """
    with needs_extra("tables"):
        import pyarrow as arrow
        import pyarrow.ipc
        import pyarrow.parquet
    return arrow


class _Columns(FeatureTable):
    """A table with the columns image and features; others are not read."""

    def __init__(self, path: Path, schema: Any):
        arrow = pyarrow()
        missing = [name for name in COLUMNS if name not in schema.names]
        if missing:
            found = printable(", ".join(schema.names) or "nothing")
            raise not_features(path, "the columns image and features", found)
        kind = schema.field("features").type
        if isinstance(kind, arrow.BaseExtensionType):  # a tensor of Arrow's own kind, or of Ray's
            kind = kind.storage_type
        lists = (arrow.types.is_fixed_size_list, arrow.types.is_list, arrow.types.is_large_list)
        if not any(is_list(kind) for is_list in lists) or not arrow.types.is_floating(kind.value_type):
            raise not_features(path, "features to be lists of floats", printable(kind))
        self.path, self.metadata = path, parsed_metadata((schema.metadata or {}).get(METADATA.encode()), path)
        self.width = kind.list_size if arrow.types.is_fixed_size_list(kind) else 0

    def _block(self, batch: Any, start: int) -> Block:
        """The rows of a record batch that have features.

        Args:
            start: rows before it, for messages.
        """
        arrow = pyarrow()
        images, lists = batch.column("image"), batch.column("features")
        if isinstance(lists.type, arrow.BaseExtensionType):
            lists = lists.storage
        if lists.null_count:
            kept = lists.is_valid()
            images, lists = images.filter(kept), lists.filter(kept)
        fixed = arrow.types.is_fixed_size_list(lists.type)
        if not fixed and len(lists):
            lengths = np.diff(np.asarray(lists.offsets))
            wrong = np.flatnonzero(lengths != (self.width or lengths[0]))
            if wrong.size:
                row, expected = int(wrong[0]), self.width or int(lengths[0])
                raise BeitJaxError(
                    f"{printable(self.path)}: row {start + row}: expected {expected} numbers as those before, found "
                    f"{lengths[row]}; keep features of one model"
                )
        values = lists.flatten()  # of these rows alone, without a copy where none is null
        if values.null_count:
            raise BeitJaxError(f"{printable(self.path)}: rows from {start}: a number is missing; write the table again")
        numbers = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        return Block(numbers.reshape(len(lists), -1) if len(lists) else np.empty((0, self.width), np.float32),
                     lambda: images.cast("string").to_pylist())  # fmt: skip

    def _measure(self) -> None:
        """Finds the width where the type does not say it."""
        if not self.width:
            first = next((part for part in self.parts(1) if len(part)), None)
            if first is None:
                raise not_features(self.path, "a row", "none")
            self.width = first.features.shape[1]

    def _blocks(self, batches: Iterable[Any]) -> Iterator[Block]:
        start = 0
        for batch in batches:
            yield self._block(batch, start)
            start += len(batch)


class ArrowTable(_Columns):
    """Arrow's files of record batches, as Feather 2 and as a stream (which `datasets` of Hugging Face writes)."""

    def __init__(self, path: Path):
        arrow = pyarrow()
        with _explained(path, "Arrow"):
            mapped = arrow.memory_map(str(path))
            try:
                self._reader = arrow.ipc.open_file(mapped)
                self._batches = None
            except arrow.ArrowInvalid:
                mapped.seek(0)
                stream = arrow.ipc.open_stream(mapped)
                self._reader, self._batches = stream, list(stream)  # views of the mapped file
        super().__init__(path, self._reader.schema)
        self._measure()

    def parts(self, rows: int, values: bool = True) -> Iterator[Block]:
        with _explained(self.path, "Arrow"):
            yield from self._blocks(self._all())

    def _all(self) -> Iterator[Any]:
        if self._batches is not None:
            yield from self._batches
        else:
            yield from (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))


class ParquetTable(_Columns):
    """Parquet's files: row groups, of which one batch is in memory at a time."""

    def __init__(self, path: Path):
        arrow = pyarrow()
        with _explained(path, "Parquet"):
            self._file = arrow.parquet.ParquetFile(path, memory_map=True)
            schema = self._file.schema_arrow
        super().__init__(path, schema)
        self._measure()

    def parts(self, rows: int, values: bool = True) -> Iterator[Block]:
        with _explained(self.path, "Parquet"):
            yield from self._blocks(self._file.iter_batches(batch_size=min(rows, 1 << 16), columns=list(COLUMNS)))


class _explained:
    """Makes one line of what pyarrow says of a damaged file."""

    def __init__(self, path: Path, kind: str):
        self._path, self._kind = path, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (pyarrow().ArrowException, OSError)):
            raise BeitJaxError(
                f"{printable(self._path)}: damaged or no {self._kind} file ({printable(error)}); write it again"
            ) from None
