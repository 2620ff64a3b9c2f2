"""The documents as programs read them: code blocks, commands, links, headings.

A block that is to be run follows a line ``<!-- run -->``: fenced Python, or indented lines of `beit-jax` commands. One
of a page that takes a minute follows ``<!-- run: thorough -->``, one that takes longer ``<!-- run: slow -->``.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from beit_jax.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_MARKS: dict[str, Literal["quick", "thorough", "slow"]] = {
    "<!-- run -->": "quick",
    "<!-- run: thorough -->": "thorough",
    "<!-- run: slow -->": "slow",
}
_FENCE = re.compile(r"^(`{3,})(\w*)$")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: of its fence; empty if it has none.
        line: of the page, where the code begins, from 1.
    """

    language: str
    line: int
    code: str
    run: Literal["no", "quick", "thorough", "slow"]


def blocks(text: str) -> Iterator[Block]:
    """All blocks of a page, in order."""
    lines, i = text.splitlines(), 0
    run: Literal["no", "quick", "thorough", "slow"] = "no"
    while i < len(lines):
        fence, start = _FENCE.match(lines[i]), i
        if fence:
            i = start = i + 1
            while lines[i] != fence[1]:
                i += 1
            yield Block(fence[2], start + 1, "\n".join(lines[start:i]) + "\n", run)
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            while i + 1 < len(lines) and (lines[i + 1].startswith("    ") or not lines[i + 1]):
                i += 1
            code = "\n".join(line.removeprefix("    ") for line in lines[start : i + 1])
            yield Block("", start + 1, code.rstrip("\n") + "\n", run)
        if lines[i]:
            run = _MARKS.get(lines[i], "no")
        i += 1


def prose(text: str) -> str:
    """A page without its blocks: nothing in code is a link or a heading."""
    lines = text.splitlines()
    for block in blocks(text):
        for i in range(block.line - 1, block.line - 1 + block.code.count("\n")):
            lines[i] = ""
    return "\n".join(lines)


def commands(code: str) -> list[list[str]]:
    """The arguments of every `beit-jax` command line, as a shell splits them but for patterns."""
    joined = re.sub(r"\\\n\s*", " ", code)
    pieces = [piece.strip() for line in joined.splitlines() for piece in line.split("&&")]
    found = (re.fullmatch(r"(?:\.venv/bin/)?beit-jax (.+)", piece) for piece in pieces)
    return [shlex.split(match[1], comments=True) for match in found if match]


def mentions(text: str) -> list[tuple[str, list[str]]]:
    """Every `beit-jax WORD` in a text, in code or not, with the options that follow on its line."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [piece for line in lines for piece in re.findall(r"beit-jax ([a-z]+)\b([^`;|&\"]*)", line)]
    return [(name, re.findall(r"(?<!\S)--[a-z][\w.-]*", rest)) for name, rest in found]


def offered(capsys: pytest.CaptureFixture[str], *command: str) -> set[str]:
    """The options that `--help` of a command lists."""
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return set(re.findall(r"^.{2}(?:-\w, )?(--[\w.-]+)", capsys.readouterr().out, re.MULTILINE))


def links(text: str) -> list[str]:
    """Targets of the links of a page that lead to files of the repository or to headings."""
    targets = re.findall(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])+\]\(([^()\s]+)\)", prose(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """What a link may name after ``#``, by GitHub's rule."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} (.+)$", prose(text), re.MULTILINE):
        bare = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        number = next(number for number in range(100) if _numbered(bare, number) not in found)
        found.add(_numbered(bare, number))
    return found


def _numbered(anchor: str, number: int) -> str:
    return f"{anchor}-{number}" if number else anchor
