"""Files with a JSON object per line, each with a "step": appended to, cut back when a run resumes, read again."""

import json
import math
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.atomic import new_file
from beit_jax.errors import BeitJaxError, printable

METRICS = "metrics.jsonl"


def open_to_append(path: Path) -> FileIO:
    """Opens a file of records for `append`.

    Raises:
        BeitJaxError: the file cannot be written.
    """
    try:
        return path.open("ab", buffering=0)
    except OSError as error:
        raise BeitJaxError(f"{path}: cannot be written ({error.strerror}); choose another directory") from None


def append(file: FileIO, record: dict[str, Any]) -> None:
    """Writes a record at once, past all buffers: what a failed write left in a buffer would fail again at closing.

    Raises:
        BeitJaxError: the file cannot be written; the disk is full, for example.
    """
    line = json.dumps(record).encode() + b"\n"
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise BeitJaxError(
            f"{file.name}: cannot be written ({error.strerror}); free space and start the run again"
        ) from None


def keep_until(path: Path, step: int) -> None:
    """Removes the records after `step` from a file, and an unfinished last line, which a killed process leaves.

    With step 0 the file becomes empty.

    Raises:
        BeitJaxError: a finished line is no record; the error names the line.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    finished = [(number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]
    kept = [line for number, line in finished if _record_of(path, number, line)["step"] <= step] if step else []
    if kept != lines:
        with new_file(path) as partial:
            partial.write_bytes(b"".join(kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a file that a `Log` wrote, in its order. NaN stands for values that were not finite.

    An unfinished last line is skipped: the run still writes, or was killed.

    Raises:
        BeitJaxError: the file cannot be read, or a finished line is no record of numbers; the error names the line.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise BeitJaxError(
            f"{printable(path)}: cannot be read ({error.strerror}); give the directory of a run, which has a {METRICS}"
        ) from None
    return [_numbers(path, number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


_LARGEST = float(np.finfo(np.float64).max)  # integers in JSON have no bounds


def _numbers(path: Path, number: int, line: bytes) -> dict[str, float]:
    record = _record_of(path, number, line)
    for name, value in record.items():
        if value is not None and (type(value) not in (int, float) or not abs(value) <= _LARGEST):
            raise BeitJaxError(
                f"{printable(path)}: line {number}: {printable(name)}: expected a number or null, found "
                f"{printable(json.dumps(value), 40)}; repair or remove the line"
            )
    return {name: math.nan if value is None else float(value) for name, value in record.items()}


def _record_of(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise BeitJaxError(
            f'{printable(path)}: line {number}: expected a JSON object with a "step"; move the file away'
        )
    return record
