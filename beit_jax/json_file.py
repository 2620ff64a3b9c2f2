"""JSON files that may be damaged, hostile or simply something else: every error names the file and the key."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beit_jax.errors import BeitJaxError, printable

MAX_BYTES = 1 << 28
"""Larger files are refused: the index of the largest sharded checkpoint has less than a hundredth of this."""


def read_json(path: Path, *, advice: str = "a model directory needs it") -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        advice: the end of an error, which says what the file is for or what to do.

    Raises:
        BeitJaxError: the file is missing, unreadable, no regular file or too large; it is no JSON, has a key twice, or
            is no object.
    """
    content = _parse(path, advice, regular=True)
    if not isinstance(content, dict):
        raise BeitJaxError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def read_json_array(path: Path, *, advice: str) -> list[Any]:
    """Reads a JSON array from a file or a pipe that the user named.

    Args:
        advice: the end of an error.

    Raises:
        BeitJaxError: as `read_json`; or it is no array.
    """
    content = _parse(path, advice, regular=False)
    if not isinstance(content, list):
        raise BeitJaxError(f"{printable(path)}: expected a JSON array, found a {type(content).__name__}; {advice}")
    return content


def read_text(path: Path, *, advice: str) -> str:
    """Reads a text file in UTF-8 that lies beside others in a directory.

    Args:
        advice: the end of an error.

    Raises:
        BeitJaxError: the file is missing, unreadable, no regular file, too large or no UTF-8.
    """
    try:
        return _read(path, regular=True).decode("utf-8")
    except OSError as error:
        raise BeitJaxError(f"{printable(path)}: cannot be read ({error.strerror}); {advice}") from None
    except UnicodeDecodeError as error:
        raise BeitJaxError(f"{printable(path)}: no UTF-8 text at byte {error.start}; {advice}") from None


def has_value(path: Path, key: str, value: object) -> bool:
    """Returns True if a file is a JSON object with this value under this key."""
    try:
        return bool(read_json(path).get(key) == value)
    except BeitJaxError:
        return False


class DuplicateKeyError(ValueError):
    """A JSON object has one key twice; the message is the key."""


def parse_json(data: bytes) -> Any:
    """Parses JSON in UTF-8. Of two equal keys Python's parser keeps the last one; this one refuses them.

    Raises:
        DuplicateKeyError: an object has a key twice.
        ValueError, RecursionError: the bytes are no JSON, nest too deep, or hold a number of too many digits.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise DuplicateKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return result

    return json.loads(data.decode("utf-8"), object_pairs_hook=unique)


def _parse(path: Path, advice: str, *, regular: bool) -> Any:
    try:
        return parse_json(_read(path, regular=regular))
    except DuplicateKeyError as error:
        raise BeitJaxError(f"{path}: the key {printable(error)} stands twice; keep one") from None
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise BeitJaxError(f"{printable(path)}: {reason}; {advice}") from None
    except BeitJaxError:
        raise
    except (ValueError, RecursionError) as error:
        raise BeitJaxError(f"{printable(path)}: not JSON ({printable(error)}); {advice}") from None


def _read(path: Path, *, regular: bool) -> bytes:
    # Without O_NONBLOCK, opening a FIFO in somebody's model directory would wait for ever.
    flag = os.O_NONBLOCK if regular else 0
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | flag)) as file:
        if regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BeitJaxError(f"{printable(path)}: expected a regular file, found a device or a pipe")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BeitJaxError(f"{printable(path)}: expected at most {MAX_BYTES:,} bytes of JSON, found more")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object for people to read: indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Fields:
    """Looks up values of a parsed JSON object and checks their types.

    Args:
        content: the object.
        file: the name with which every error begins.
    """

    def __init__(self, content: Mapping[str, Any], file: str):
        self.content, self.file = content, file

    def error(self, key: str, expected: str) -> BeitJaxError:
        """The error for a key: what was expected, and what was found."""
        found = printable(json.dumps(self.content[key])) if key in self.content else "nothing"
        return BeitJaxError(f"{self.file}: {key}: expected {expected}, found {found}")

    def inside(self, key: str) -> "Fields":
        """The fields of the object under a key; none where it is absent."""
        return Fields(self.typed(key, dict, {}), f"{self.file}: {key}")

    def typed(self, key: str, kind: type, default: Any) -> Any:
        """The value as `kind`: bool, int, float (integers are taken too), str or dict."""
        value = self.content.get(key, default)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
            names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "an object"}
            raise self.error(key, names[kind])
        try:
            return kind(value)
        except OverflowError:
            raise self.error(key, "a number that a float can hold") from None

    def choice(self, key: str, accepted: tuple[str, ...], default: str | None) -> Any:
        """The value; refuses one that is not among `accepted`."""
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
    """Yields (dotted name, old, new) for every value in which two parsed JSON documents differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
