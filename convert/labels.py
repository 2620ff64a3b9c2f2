"""The classes that ``convert --labels`` and ``--num-labels`` ask for: the file of names or numbers, and the head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit_jax.config import BeitConfig
from beit_jax.config_file import read_labels
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import Fields, parse_json
from beit_jax.models.heads import HeadChange, Labels, change_head

from .options import Options

_MOST_BYTES = 1 << 26
_FORMS = (
    'expected a name or a number on every line; or JSON: ["first", "second"], [3, 7], {"0": "first", "1": "second"} or '
    "a config.json with id2label"
)


def asked_head(config: BeitConfig, options: Options) -> HeadChange:
    """What becomes of a checkpoint's head by the options; without one of them it stays as it is.

    Raises:
        BeitJaxError: as `change_head` and `read_classes`, naming the option.
    """
    labels = asked(options)
    try:
        return change_head(config, labels, options.problem_type, seed=options.seed or 0)
    except BeitJaxError as error:
        option = f"--labels {printable(options.labels)}" if options.labels is not None else "--num-labels"
        text = str(error)
        if text.startswith("seed"):
            raise BeitJaxError(f"--{text}") from None
        if text.startswith("problem_type"):
            raise BeitJaxError(f"--problem-type{text.removeprefix('problem_type')}") from None
        raise BeitJaxError(f"{option}: {text.removeprefix('labels: ')}") from None


def asked(options: Options) -> Labels | int | None:
    """The classes that the options name or count; None where they do not.

    Raises:
        BeitJaxError: as `read_classes`.
    """
    return options.num_labels if options.labels is None else read_classes(options.labels)


def read_classes(path: Path) -> Labels:
    """Names of classes in the order of the file, or numbers of a checkpoint's classes.

    Lines that are all numbers are numbers, as in timm's files of ImageNet's subsets; names made of digits are given in
    JSON, as text. Blanks around a name and blank lines at the end do not count.

    Raises:
        BeitJaxError: the file is missing, is neither, or has no class; names it and the line.
    """
    try:
        if not path.is_file():
            kind = "no such file" if not path.exists() else "expected a file, found a directory or a device"
            raise BeitJaxError(f"--labels {printable(path)}: {kind}; {_FORMS}")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise BeitJaxError(f"--labels {printable(path)}: cannot be read ({error.strerror})") from None
    if len(data) > _MOST_BYTES:
        raise BeitJaxError(f"--labels {printable(path)}: more than {_MOST_BYTES:,} bytes; {_FORMS}")
    text = _text(path, data)
    found = _from_json(path, text) if text.lstrip()[:1] in ("[", "{") else _from_lines(path, text)
    if not found:
        raise BeitJaxError(f"--labels {printable(path)}: holds no class; {_FORMS}")
    return found


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BeitJaxError(
            f"--labels {printable(path)}: expected text in UTF-8, found byte {data[error.start]:#04x} at {error.start}"
        ) from None


def _from_lines(path: Path, text: str) -> Labels:
    lines = [line.strip() for line in text.rstrip().splitlines()]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise BeitJaxError(f"--labels {printable(path)}: line {number}: expected a class, found nothing")
    if lines and all(line.isascii() and line.isdecimal() and len(line) < 10 for line in lines):
        return [int(line) for line in lines]
    return lines


def _from_json(path: Path, text: str) -> Labels:
    try:
        content: Any = parse_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise BeitJaxError(f"--labels {printable(path)}: not JSON ({printable(error)}); {_FORMS}") from None
    if isinstance(content, Mapping):
        read = Fields({"id2label": content.get("id2label", content)}, f"--labels {printable(path)}")
        return list(read_labels(read)) if read.typed("id2label", dict, {}) else []
    kinds = {type(item) for item in content}
    if kinds not in ({str}, {int}, set()):
        odd = next(item for item in content if type(item) is not str)
        raise BeitJaxError(
            f"--labels {printable(path)}: expected names only, or numbers only, found {printable(odd, 60)}; {_FORMS}"
        )
    return list(content)
