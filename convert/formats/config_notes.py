"""What a user should know of a ``config.json`` that is read without an error."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from beit_jax.config_file import KNOWN_KEYS, MOST_LABELS, class_number, names_by_number
from beit_jax.errors import printable

_SHOWN = 5  # numbers in a note


def hf_notes(config: Mapping[str, Any], *, file: str = "config.json") -> list[str]:
    """Notes for the user on a Hugging Face configuration that is read without an error: unknown keys, remote code."""
    notes = [f"{file}: {note}" for note in label_notes(config)]
    if "auto_map" in config:
        notes.append(f"{file}: auto_map names code to import; ignored, nothing of it is run")
    for key in sorted(set(config) - set(KNOWN_KEYS)):
        near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        notes.append(f"{file}: unknown key {printable(key)} ignored{hint}")
    return notes


def label_notes(config: Mapping[str, Any]) -> list[str]:
    """Says how class names were read, where not everybody would read them so; nothing of a map that is refused."""
    names = config.get("id2label")
    if names is None:
        return _notes_without_map(config)
    keys = {key: class_number(key) for key in names} if isinstance(names, Mapping) else {}
    numbers = sorted(number for number in keys.values() if number is not None)
    if not names or len(set(numbers)) != len(names):
        return []
    notes = [*_numbering_notes(numbers), *_contradiction_notes(config)]
    nameless = sum(name is None for name in names.values())
    if nameless:
        notes.append(f"id2label: {nameless} of its {len(names)} names are null: LABEL_i in their place")
    count = config.get("num_labels")
    if type(count) is int and count != len(names):
        notes.append(
            f"num_labels says {count}, id2label has {len(names)} names: id2label counts (transformers gives its names "
            "up for LABEL_i)"
        )
    return notes


def _notes_without_map(config: Mapping[str, Any]) -> list[str]:
    names, count = names_by_number(config.get("label2id")), config.get("num_labels")
    if names is None:
        return []
    if count is not None and count != len(names):
        return [f"label2id has {len(names)} names, num_labels says {printable(count)}: names left out, LABEL_i instead"]
    if all(name == f"LABEL_{number}" for number, name in names.items()):
        return []
    return ["no id2label: the names of classes are label2id's (transformers reads id2label alone, and says LABEL_i)"]


def _numbering_notes(numbers: Sequence[int]) -> list[str]:
    """Of numbers that are not 0 to n - 1, growing: how they are read here, and what transformers makes of them."""
    count = len(numbers)
    wrong = next((output for output, number in enumerate(numbers) if output != number), None)
    if wrong is None:
        return []
    far = numbers[-1] >= 2 * MOST_LABELS
    missing = [] if far else sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    gaps = f", without {_few(missing)}" if missing else ""
    nameless = sorted(set(range(count)) - set(numbers)) if count <= MOST_LABELS else []
    return [
        f"id2label numbers its {count} names from {numbers[0]} to {numbers[-1]}{gaps}: read in this order as the "
        f"names of outputs 0 to {count - 1}. transformers looks an output up by its number: it has no name for "
        f"{_few(nameless)}, and gives outputs from {wrong} on those of other classes. The numbers are kept; "
        "convert --labels with a file of these names counts them from 0"
    ]


def _few(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:_SHOWN]))}{', ...' if len(numbers) > _SHOWN else ''}"


def _contradiction_notes(config: Mapping[str, Any]) -> list[str]:
    """Says which names ``label2id`` numbers otherwise than ``id2label``. One of several classes of a name is right."""
    stated = config.get("label2id")
    if stated is None:
        return []
    if not isinstance(stated, Mapping):
        return ["label2id: expected an object, ignored; id2label has the names"]
    names = {class_number(key): name for key, name in config["id2label"].items()}
    odd = [name for name, value in stated.items() if str(names.get(class_number(value))) != str(name)]
    if not odd:
        return []
    shown = f"{printable(odd[0], 40)} is {printable(stated[odd[0]], 40)} there"
    return [
        f"label2id contradicts id2label in {len(odd)} of {len(stated)} names ({shown}): id2label counts, as in "
        "transformers, which names outputs by it"
    ]
