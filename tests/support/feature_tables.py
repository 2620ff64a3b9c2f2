"""Tables of features written by other programs: NumPy, safetensors, csv, json and pyarrow, and not by this library."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from safetensors.numpy import save_file

ENDINGS = ("parquet", "arrow", "npz", "safetensors", "jsonl", "csv")
WITH_METADATA = ENDINGS[:4]


def write(
    path: Path, names: Sequence[str], features: np.ndarray, metadata: dict[str, Any] | None = None, batch: int = 1 << 20
) -> Path:
    """Writes [n, d] as the format of the path's ending; a NaN as the first number stands for an unreadable image."""
    said = json.dumps(metadata) if metadata else None
    bad, flat = np.isnan(features[:, 0]), features.reshape(len(features), -1)
    match path.suffix[1:]:
        case "npz":
            arrays = {"features": features[~bad], "images": np.array(names)[~bad]}
            np.savez(path, **arrays, **({"beit_jax": np.array(said)} if said else {}))
        case "safetensors":
            kept = [name for name, lost in zip(names, bad, strict=True) if not lost]
            texts = {"images": json.dumps(kept), **({"beit_jax": said} if said else {})}
            save_file({"features": np.ascontiguousarray(features[~bad])}, path, texts)
        case "jsonl":
            rows: list[dict[str, Any]] = [
                {"image": name, "error": "unreadable"} if lost else {"image": name, "features": row.tolist()}
                for name, row, lost in zip(names, flat, bad, strict=True)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["image", *(f"f{i}" for i in range(flat.shape[1])), "error"])
                for name, row, lost in zip(names, flat, bad, strict=True):
                    writer.writerow([name, *([""] * len(row) if lost else row), "unreadable" if lost else ""])
        case _:
            table = arrow_table(names, flat, bad, said)
            if path.suffix == ".parquet":
                pyarrow.parquet.write_table(table, path, row_group_size=batch)
            else:
                with pyarrow.ipc.new_file(path, table.schema) as writer:
                    writer.write_table(table, max_chunksize=batch)
    return path


def arrow_table(names: Sequence[str], flat: np.ndarray, bad: np.ndarray, said: str | None) -> pa.Table:
    """The columns image, features and, if an image was unreadable, error."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1], mask=pa.array(bad))
    columns = {"image": pa.array(list(names)), "features": lists}
    if bad.any():
        columns["error"] = pa.array(["unreadable" if lost else None for lost in bad])
    return pa.table(columns).replace_schema_metadata({"beit_jax": said} if said else None)
