"""The one error a user's mistake becomes: a single line that says what, where, expected, found and what to do."""

from pathlib import PurePath
from typing import ClassVar


class BeitJaxError(ValueError):
    """Bad input. The message is one line; the command line prints it after ``error: `` and exits with `exit_code`."""

    exit_code: ClassVar[int] = 2


def printable(name: object, limit: int | None = None) -> str:
    """`name` without control characters and cut at `limit`: names in a file are not to be trusted on a terminal.

    By default names are cut at 120 characters, and paths, whose end matters most, at 1024.
    """
    if limit is None:
        limit = 1024 if isinstance(name, PurePath) else 120
    text = str(name).encode("unicode_escape").decode("ascii")
    return text if len(text) <= limit else text[: limit - 3] + "..."
