"""Processes of one run telling each other small things. Every function is called by all of them, in the same order."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from beit_jax.errors import BeitJaxError


def is_first() -> bool:
    """Whether this process decides for all."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """What every process gave, anything that JSON can say, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).reshape(-1)
    room = 1 << (int(sizes.max()) | 1023).bit_length()  # few sizes: every new one is compiled for
    padded = np.pad(text, (0, room - text.size))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(find: Callable[[], Any]) -> Any:
    """What `find` returns in the first process, alone called there, for all; what it raises is raised by all.

    Raises:
        BeitJaxError: `find` raised one.
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
    """The whole array, of any shape, from all processes that hold parts of it."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
