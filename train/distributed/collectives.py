"""Small values exchanged by the processes of a run. All processes call every function, in the same order."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from beit_jax.errors import BeitJaxError


def is_first() -> bool:
    """True in process 0, which decides for all processes."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The values that the processes gave, in the order of the processes. A value is anything that JSON has."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).reshape(-1)
    length = 1 << (int(sizes.max()) | 1023).bit_length()  # few lengths: each new one compiles a program
    padded = np.pad(text, (0, length - text.size))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(find: Callable[[], Any]) -> Any:
    """Calls `find` in process 0 alone, and returns its result in all processes.

    Raises:
        BeitJaxError: in all processes: `find` raised it.
    """
    found, failure = None, None
    if is_first():
        try:
            found = find()
        except BeitJaxError as error:
            failure = error
    found, message = gather([found, None if failure is None else str(failure)])[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise BeitJaxError(message)
    return found


def on_host(leaf: jax.Array) -> np.ndarray:
    """The whole array, of any shape, gathered from all processes that hold parts of it."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
