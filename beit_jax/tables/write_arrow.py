"""Tables by pyarrow, of the extra `tables`: Parquet, and Arrow's IPC file (Feather, version 2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import numpy as np

from beit_jax.errors import BeitJaxError
from beit_jax.tables.schema import ERROR, IMAGE, VALUES, Column, Part, Parts, Schema, regrouped, utf8

METADATA: Final = b"beit_jax"
GROUP_BYTES: Final = 1 << 25  # values of a group of rows: what a reader takes at a time
MOST_ROWS: Final = 1 << 12


def check_arrow(name: str, schema: Schema) -> None:
    """Refuses to go on without pyarrow.

    Raises:
        BeitJaxError: it is not installed; says how to install it.
    """
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise BeitJaxError(
            f"{name}: pyarrow is not installed; pip install 'beit-jax[tables]', or choose a name ending in .jsonl, .csv"
            " or .npz"
        ) from None


def write_parquet(path: Path, schema: Schema, parts: Parts) -> int:
    """Writes Parquet; values are a list of fixed size a row. Returns the rows.

    Where images may have errors, the type of the lists has no fixed size: pyarrow up to 21 cannot read a missing list
    of a fixed size from Parquet.
    """
    from pyarrow import parquet

    def opened(arrow: Any) -> AbstractContextManager[Any]:
        plain = [name for name in arrow.names if name != VALUES]
        return parquet.ParquetWriter(path, arrow, compression="snappy", use_dictionary=plain, version="2.6")

    return _write(opened, schema, parts, fixed=not schema.errors)


def write_ipc(path: Path, schema: Schema, parts: Parts) -> int:
    """Writes Arrow's IPC file, uncompressed, so that readers can map it into memory. Returns the rows."""
    import pyarrow as pa

    return _write(lambda arrow: pa.OSFile(str(path), "wb"), schema, parts, pa.ipc.new_file)


def _write(
    opened: Callable[[Any], AbstractContextManager[Any]],
    schema: Schema,
    parts: Parts,
    wrapped: Callable[[Any, Any], AbstractContextManager[Any]] | None = None,
    *,
    fixed: bool = True,
) -> int:
    arrow, count = arrow_schema(schema, fixed=fixed), 0
    with opened(arrow) as file:
        if wrapped is None:
            for batch in record_batches(schema, parts(), fixed=fixed):
                file.write_batch(batch)
                count += batch.num_rows
        else:
            with wrapped(file, arrow) as writer:
                for batch in record_batches(schema, parts(), fixed=fixed):
                    writer.write_batch(batch)
                    count += batch.num_rows
    return count


def record_batches(schema: Schema, parts: Iterator[Part], *, fixed: bool = True) -> Iterator[Any]:
    """The rows as `pyarrow.RecordBatch`es of some megabytes."""
    rows = max(1, min(MOST_ROWS, GROUP_BYTES // max(4 * schema.width, 1)))
    for part in regrouped(parts, rows):
        yield record_batch(schema, part, fixed=fixed)


def arrow_schema(schema: Schema, *, fixed: bool = True) -> Any:
    """The `pyarrow.Schema` of a table.

    Args:
        fixed: the lists of values have a fixed size.
    """
    import pyarrow as pa

    fields = [pa.field(IMAGE, pa.string(), nullable=False)]
    fields += [pa.field(name, _type(column)) for name, column in schema.columns.items()]
    if schema.shape is not None:
        fields.append(pa.field(VALUES, pa.list_(pa.float32(), schema.width if fixed else -1)))
    if schema.errors:
        fields.append(pa.field(ERROR, pa.string()))
    return pa.schema(fields, {METADATA: schema.described.encode()})


def _type(column: Column) -> Any:
    import pyarrow as pa

    if isinstance(column, str):
        return {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}[column]
    return pa.list_(pa.struct([pa.field(name, _type(kind)) for name, kind in column.items()]))


def record_batch(schema: Schema, part: Part, *, fixed: bool = True) -> Any:
    """The `pyarrow.RecordBatch` of some rows; `fixed` as in `arrow_schema`."""
    import pyarrow as pa

    arrow = arrow_schema(schema, fixed=fixed)
    arrays = [pa.array([utf8(row[IMAGE]) for row in part.rows], pa.string())]
    for name in schema.columns:
        arrays.append(pa.array([row.get(name) for row in part.rows], arrow.field(name).type))
    if part.values is not None:
        arrays.append(_lists(part.values, part.rows, schema.width, fixed=fixed))
    if schema.errors:
        arrays.append(pa.array([row.get(ERROR) for row in part.rows], pa.string()))
    return pa.RecordBatch.from_arrays(arrays, schema=arrow)


def _lists(values: np.ndarray, rows: Sequence[Mapping[str, Any]], width: int, *, fixed: bool) -> Any:
    import pyarrow as pa

    bad = np.array([row.get(ERROR) is not None for row in rows])
    mask = pa.array(bad) if bad.any() else None
    if fixed:
        flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
        return pa.FixedSizeListArray.from_arrays(flat, width, mask=mask)
    flat = pa.array(np.ascontiguousarray(values[~bad], np.float32).ravel())
    ends = np.concatenate([[0], np.cumsum(np.where(bad, 0, width))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), flat, mask=mask)
