"""JSON from files that are not to be trusted: every complaint names the file and the key."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beit_jax.errors import BeitJaxError, printable


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BeitJaxError: the file is missing or unreadable, is no JSON, holds a key twice, or is no object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise BeitJaxError(f"{path}: the key {printable(twice)} stands twice; keep one")
        return result

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise BeitJaxError(f"{path}: {reason}; a model directory needs it") from None
    except BeitJaxError:
        raise
    except (ValueError, RecursionError) as error:  # a number of five thousand digits is a ValueError
        raise BeitJaxError(f"{path}: not JSON ({printable(error)})") from None
    if not isinstance(content, dict):
        raise BeitJaxError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


class Fields:
    """Typed look-ups in a parsed JSON object.

    Args:
        content: the object.
        file: what begins every complaint.
    """

    def __init__(self, content: Mapping[str, Any], file: str):
        self.content, self.file = content, file

    def error(self, key: str, expected: str) -> BeitJaxError:
        """The one line that says what `key` should have been and what it is."""
        found = printable(json.dumps(self.content[key])) if key in self.content else "nothing"
        return BeitJaxError(f"{self.file}: {key}: expected {expected}, found {found}")

    def typed(self, key: str, kind: type, default: Any) -> Any:
        """The value as `kind`: bool, int, float (integers are taken too), str or dict."""
        value = self.content.get(key, default)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
            names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object"}
            raise self.error(key, names[kind])
        return kind(value)

    def choice(self, key: str, accepted: tuple[str, ...], default: str | None) -> Any:
        """The value, which must be one of `accepted`."""
        value = self.content.get(key, default)
        if value not in accepted:
            raise self.error(key, " or ".join(accepted))
        return value

    def pair(self, key: str, default: int) -> tuple[int, int]:
        """[height, width], or one integer for both."""
        value = self.content.get(key, default)
        sides = value if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or not all(type(side) is int for side in sides):
            raise self.error(key, "an integer or [height, width]")
        return sides[0], sides[1]

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of integers; `default` where the key is absent or null."""
        value = self.content.get(key)
        if value is None:
            return default
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise self.error(key, "a list of integers")
        return tuple(value)


def changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every value in which what came from JSON differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
