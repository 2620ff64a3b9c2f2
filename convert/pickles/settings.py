"""The entries beside the weights of a training checkpoint, as plain data."""

import datetime
from collections.abc import Mapping

from beit_jax.errors import printable

from .names import Forbidden, Global, Module, Namespace, NumpyDtype, PickledTensor, Storage, UnsupportedTensor

_MAX_VALUES = 10_000  # settings kept of one entry
_MAX_DEPTH = 32
_MAX_ENTRIES = 100


class _TooLarge(ValueError):
    """An entry is no settings: it holds tensors, or too many values."""


def settings_of(others: Mapping[object, object]) -> tuple[dict[str, object], list[str]]:
    """Returns the plain data of the entries beside the weights, and a note for each entry."""
    metadata: dict[str, object] = {}
    notes: list[str] = []
    for key, value in list(others.items())[:_MAX_ENTRIES]:
        name = str(key)
        try:
            if name.startswith("optimizer"):
                raise _TooLarge
            metadata[name] = _Plain().convert(value)
            notes.append(f"{printable(name)} ({kind_of(value)}) kept as metadata")
        except _TooLarge:
            notes.append(f"{printable(name)} ({kind_of(value)}) ignored")
    if len(others) > _MAX_ENTRIES:
        notes.append(f"{len(others) - _MAX_ENTRIES} further entries ignored")
    return metadata, notes


class _Plain:
    """Copies one entry into dicts, lists and scalars. It counts values, because a pickle can be a graph."""

    def __init__(self) -> None:
        self._left = _MAX_VALUES

    def convert(self, value: object, depth: int = 0) -> object:
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH:
            raise _TooLarge
        match value:
            case None | bool() | int() | float() | str():
                return value
            case bytes():
                return f"<{len(value)} bytes>"
            case Namespace(values=values):
                return self.convert(values, depth + 1)
            case dict():
                return {str(key): self.convert(entry, depth + 1) for key, entry in value.items()}
            case list() | tuple():
                return [self.convert(entry, depth + 1) for entry in value]
            case Global(name=name):
                return name
            case NumpyDtype(code=code):
                return code
            case datetime.datetime() | datetime.date() | datetime.time() | datetime.timedelta() | datetime.timezone():
                return str(value)
        raise _TooLarge


def kind_of(value: object) -> str:
    """What a value of a pickle is, for people: a type's name, and how many values it holds."""
    match value:
        case Namespace():
            return "argparse.Namespace"
        case PickledTensor():
            return "tensor"
        case UnsupportedTensor(kind=kind):
            return f"{printable(kind)} tensor"
        case Storage():
            return "storage without a tensor"
        case Global(name=name) | Forbidden(name=name) | Module(kind=name):
            return printable(name)
    return type(value).__name__
