"""The classes, or numbers, of data matched with the outputs of a model, by their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beit_jax.errors import BeitJaxError, printable


@dataclass(frozen=True)
class ClassOrder:
    """The model's class for every class of the data, and the rule that says so, for people."""

    indices: tuple[int, ...]
    rule: str


WORDNET_ID = re.compile(r"n\d{8}")
PLACEHOLDER = re.compile(r"LABEL_\d+")


def class_order(found: Sequence[str], labels: Sequence[str], source: str) -> ClassOrder:
    """Matches the classes of data, by their names, with the classes of a model. The first rule that applies decides:

    - All names are classes of the model: matched by name. Classes may be missing from the data.
    - All names are numbers: they are the model's indices, of which some may be missing, too. ImageNet-V2 has the
      folders "0", "1", "10", "100", ...; sorted as text, as torchvision's ImageFolder does, 988 of 1000 would be wrong.
    - 1000 WordNet ids, and a model with 1000 classes: ImageNet numbers its classes in the order of their ids.
    - The model's classes are LABEL_0, LABEL_1, ..., which transformers writes where names are missing: matched in
      sorted order.

    Args:
        source: stands for the data in errors.

    Raises:
        BeitJaxError: no rule applies, or one applies ambiguously.
    """
    if set(found) <= set(labels):
        return _by_name(found, labels, source)
    if all(name.isascii() and name.isdecimal() for name in found):
        numbers = tuple(int(name) for name in found)
        if len(set(numbers)) < len(numbers) or max(numbers) >= len(labels):
            seen = f"{len(numbers)} numbers from {min(numbers)} to {max(numbers)}"
            raise BeitJaxError(
                f"{source}: classes are {seen}, expected each of 0 to {len(labels) - 1} once at most, the model's "
                "classes"
            )
        return ClassOrder(numbers, "number" + _some(found, labels))
    if len(found) != len(labels):
        raise BeitJaxError(
            f"{source}: {len(found)} classes, but the model has {len(labels)}; their names would have to be its labels"
        )
    ranks = tuple(int(rank) for rank in np.argsort(np.argsort(np.asarray(found))))
    if len(labels) == 1000 and all(WORDNET_ID.fullmatch(name) for name in found):
        return ClassOrder(ranks, "the order of WordNet ids, ImageNet's")
    if all(PLACEHOLDER.fullmatch(label) for label in labels):
        return ClassOrder(ranks, "the order of their names, as the model's have none")
    strange = next(name for name in found if name not in set(labels))
    raise BeitJaxError(
        f"{source}: class {printable(strange, 40)} is none of the model's, whose first is {printable(labels[0], 40)}; "
        "name the data's classes by the model's labels, or by their numbers"
    )


def _by_name(found: Sequence[str], labels: Sequence[str], source: str) -> ClassOrder:
    twice = next((name for name in found if list(labels).count(name) > 1), None)
    if twice is not None:
        raise BeitJaxError(
            f"{source}: the model has several classes called {printable(twice, 40)}; name the data's by their numbers"
        )
    where = {label: index for index, label in enumerate(labels)}
    return ClassOrder(tuple(where[name] for name in found), "name" + _some(found, labels))


def _some(found: Sequence[str], labels: Sequence[str]) -> str:
    return f" ({len(found)} of {len(labels)} occur)" if len(found) < len(labels) else ""


def value_order(found: Sequence[str], labels: Sequence[str], source: str) -> ClassOrder:
    """Matches the numbers of data, by their names, with the outputs of a model that gives numbers.

    In the order of the outputs where the model names them LABEL_0, LABEL_1, ..., as transformers does where names are
    missing. The data may lack some of them.

    Raises:
        BeitJaxError: another name than the model's, or another count where it has none.
    """
    if set(found) <= set(labels):
        return _by_name(found, labels, source)
    if len(found) == len(labels) and all(PLACEHOLDER.fullmatch(label) for label in labels):
        return ClassOrder(tuple(range(len(found))), "their order, as the model's have no names")
    known = ", ".join(printable(label, 40) for label in labels[:10])
    raise BeitJaxError(
        f"{source}: numbers called {', '.join(printable(name, 40) for name in found[:10])}, but the model's are "
        f"{known}; name the data's as the model's"
    )
