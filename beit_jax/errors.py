"""The error for a mistake of the user: one line that says what is wrong, where, and what to do."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, ClassVar

_UNSAFE = re.compile(r"[^ -~]")


class BeitJaxError(ValueError):
    """A mistake of the user. The message is one line, which the command prints; it then exits with `exit_code`."""

    exit_code: ClassVar[int] = 2


class Note(str):
    """A note of an exception (`BaseException.add_note`) that the command prints behind it, unlike notes of others."""

    __slots__ = ()


def notes_of(error: BaseException) -> list[str]:
    """Our notes of an exception, in the order in which they were added."""
    return [note for note in getattr(error, "__notes__", ()) if isinstance(note, Note)]


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Encloses imports that need an extra of the installation.

    Args:
        name: of the extra, as pip takes it: "train".

    Raises:
        BeitJaxError: a package is not installed; says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise BeitJaxError(f"{error.name} is not installed; pip install 'beit-jax[{name}]'") from None


def environment_choice(variable: str, *words: str) -> str:
    """What an environment variable says: one of these words, the first where it is not set.

    Raises:
        BeitJaxError: it says something else.
    """
    said = os.environ.get(variable, words[0])
    if said not in words:
        expected = ", ".join(words[:-1]) + f" or {words[-1]}"
        raise BeitJaxError(f"{variable}: expected {expected}, found {printable(said)}")
    return said


def size_near(sides: Sequence[Any], steps: Sequence[int]) -> tuple[Any, ...]:
    """The image size nearest to these sides that is made of multiples of the steps, for a message.

    A side that is symbolic (`jax.export`) becomes the step times itself.
    """
    return tuple(
        max(1, round(side / step)) * step if isinstance(side, int) else step * side
        for side, step in zip(sides, steps, strict=True)
    )


def printable(name: object, limit: int | None = None) -> str:
    """Makes text safe for a terminal: all but printable ASCII is escaped, and of long text both ends are kept.

    Safe text stays as it is, so that nothing is escaped twice. Text without a visible character is put into quotes.

    Args:
        name: text from a file or from the user.
        limit: the most characters; by default 120, and 1024 for paths.
    """
    if limit is None:
        limit = 1024 if isinstance(name, PurePath) else 120
    text = str(name)
    text = _UNSAFE.sub(_escaped, text if text.strip() else repr(text))
    if len(text) <= limit:
        return text
    end = (limit - 3) // 3  # the end of a name often says more than its middle
    return f"{text[: limit - 3 - end]}...{text[len(text) - end :]}"


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
