"""The error for a mistake of the user: one line that says what is wrong, where, and what to do."""

from pathlib import PurePath
from typing import ClassVar


class BeitJaxError(ValueError):
    """A mistake of the user. The message is one line, which the command prints; it then exits with `exit_code`."""

    exit_code: ClassVar[int] = 2


def printable(name: object, limit: int | None = None) -> str:
    """Makes text safe for a terminal: control characters are escaped, and the text is cut after `limit` characters.

    Args:
        name: text from a file or from the user.
        limit: by default 120 characters; 1024 for paths, whose end matters most.
    """
    if limit is None:
        limit = 1024 if isinstance(name, PurePath) else 120
    text = str(name).encode("unicode_escape").decode("ascii")
    return text if len(text) <= limit else text[: limit - 3] + "..."
