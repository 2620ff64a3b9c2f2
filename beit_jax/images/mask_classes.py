"""What the numbers or colours of somebody's masks mean: class names from files, and masks as a model's class numbers.

A model counts its classes from 0. Masks may count from 1, leave numbers out, name classes by colours, or have numbers
of no class. `MaskClasses` says which number is which class, and `MaskClasses.read` renumbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Int32

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.class_files import MOST_NUMBER, Colour, read_colours, read_names
from beit_jax.images.label_maps import IGNORED, LabelMap, decode_label_map, decode_stored, ignored_number

_FOREGROUND: Final = 255  # of a mask of two classes in 8 bits; 1 as well
_LOSSY_FROM: Final = 128  # in a JPEG, which smears 0 and 255


@dataclass(frozen=True)
class MaskClasses:
    """Which numbers of masks are which classes.

    Attributes:
        names: of the classes, by the model's number.
        numbers: of each class in masks, growing.
        ignored: numbers in masks that are no class.
        colours: by colour, a number; None where masks hold numbers.
        binary: masks have two classes, 0 and 255 (or 1).
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    ignored: frozenset[int] = frozenset({IGNORED})
    colours: Mapping[Colour, int] | None = field(default=None, hash=False)
    binary: bool = False

    @property
    def no_class(self) -> int:
        """The number of pixels of no class in what `read` returns."""
        return ignored_number(len(self.names))

    @property
    def reduces(self) -> bool | None:
        """`do_reduce_labels` of a model of these classes: whether its masks count from 1, and 0 is no class.

        None where they count in a way of their own, so that only a prepared data set can be evaluated.
        """
        if self.colours is not None:
            return None
        count = len(self.numbers)
        if self.ignored <= {self.no_class} and self.numbers == tuple(range(count)):
            return False
        if self.ignored - {self.no_class} == {0} and self.numbers == tuple(range(1, count + 1)):
            return True
        return None

    @cached_property
    def _table(self) -> Int32[np.ndarray, " numbers"]:
        """The class of every number up to 65535; -1: it has none."""
        table = np.full(MOST_NUMBER + 1, -1, np.int32)
        table[[number for number in self.ignored if 0 <= number <= MOST_NUMBER]] = self.no_class
        table[list(self.numbers)] = np.arange(len(self.numbers))
        return table

    def read(self, data: bytes, name: str) -> LabelMap:
        """Classes from 0, and `no_class`, in the bytes of a mask: [h, w] int32.

        Args:
            name: of the mask, for errors; printable.

        Raises:
            BeitJaxError: as `decode_label_map`; a number or a colour that is neither a class nor ignored.
        """
        numbers = self._numbers(data, name)
        known = (numbers >= 0) & (numbers <= MOST_NUMBER)
        labels = np.where(known, self._table[np.where(known, numbers, 0)], -1)
        labels[np.isin(numbers, [number for number in self.ignored if number < 0])] = self.no_class
        wrong = labels < 0
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            raise BeitJaxError(
                f"{name}: number {numbers[row, column]} at row {row}, column {column} has no name, expected "
                f"{self._expected}; {int(wrong.sum())} such pixels; {self._advice(int(numbers[row, column]))}"
            )
        return labels

    @property
    def _expected(self) -> str:
        first, last, count = self.numbers[0], self.numbers[-1], len(self.numbers)
        whole = f"{first} to {last}" if last - first + 1 == count else f"one of {count} from {first} to {last}"
        ignored = ", ".join(str(number) for number in sorted(self.ignored))
        return f"{whole} or {ignored} (ignored)" if ignored else whole

    def _advice(self, number: int) -> str:
        one = "--labels-from-one if 0 is no class, " if number == len(self.numbers) and self.numbers[0] == 0 else ""
        return f"pass {one}--ignore {number} if it is none, or name it in --labels"

    def _numbers(self, data: bytes, name: str) -> LabelMap:
        if self.colours is not None:
            return self._of_colours(decode_stored(data, name, palettes=True), name)
        if not self.binary:
            return decode_label_map(data, name, grey_colours=True)
        values = decode_stored(data, name, lossy=True)
        if values.ndim == 3:
            values = values.astype(np.int32).mean(axis=-1).astype(np.int32)
        if data.startswith((b"\xff\xd8", b"RIFF")):
            return (values >= _LOSSY_FROM).astype(np.int32)
        wrong = ~np.isin(values, (0, 1, _FOREGROUND))
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            raise BeitJaxError(
                f"{name}: {values[row, column]} at row {row}, column {column}, expected 0 and 255 (--binary); export "
                "the mask without smooth edges, or leave --binary out if it has more classes"
            )
        return (values != 0).astype(np.int32)

    def _of_colours(self, values: np.ndarray, name: str) -> LabelMap:
        assert self.colours is not None
        if values.ndim == 2:
            values = np.repeat(values[..., None], 3, axis=-1)
        packed = _packed(values)
        known = np.array(sorted(_packed(np.array(colour)) for colour in self.colours))
        numbers = np.array([self.colours[_unpacked(int(value))] for value in known], np.int32)
        places = np.minimum(np.searchsorted(known, packed), len(known) - 1)
        wrong = known[places] != packed
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            raise BeitJaxError(
                f"{name}: colour {tuple(values[row, column].tolist())} at row {row}, column {column} is none of "
                f"--colors; {int(wrong.sum())} such pixels; add it there, or export the mask without smooth edges"
            )
        return numbers[places]


def _packed(colours: np.ndarray) -> np.ndarray:
    return np.asarray(colours.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1]))


def _unpacked(value: int) -> Colour:
    return value >> 16, value >> 8 & 255, value & 255


def mask_classes(
    labels: Path | None = None,
    colours: Path | None = None,
    *,
    ignore: Sequence[str] = (),
    from_one: bool = False,
    binary: bool = False,
    highest: int | None = None,
) -> MaskClasses:
    """What the numbers of masks mean, from what a user says of them.

    Args:
        labels: a file of class names (`read_names`).
        colours: a file of colours and class names (`read_colours`).
        ignore: numbers or names of no class, besides 255 where that has no name.
        from_one: 0 is no class. A list of names then begins with that of 1.
        highest: the largest number in masks, where no file says the names: LABEL_0 to that of `highest`. Of two classes
            the names are background and foreground.

    Raises:
        BeitJaxError: a file is missing or says something else; fewer than two classes; options that contradict.
    """
    by_colour = None if colours is None else read_colours(colours)
    if by_colour is not None:
        if labels is not None or from_one or binary:
            raise BeitJaxError("--colors names the classes: leave --labels, --labels-from-one and --binary out")
        known = list(dict.fromkeys(name for _, name in by_colour))
        named = dict(enumerate(known))
        table = {colour: known.index(name) for colour, name in by_colour}
    else:
        named, table = _named(labels, highest, from_one=from_one, binary=binary), None
    ignored = {0} if from_one else set()
    if not binary and table is None and IGNORED not in named:
        ignored.add(IGNORED)
    for word in ignore:
        ignored |= _ignored(word, named)
    kept = {number: name for number, name in sorted(named.items()) if number not in ignored}
    source = labels or colours
    where = "masks" if source is None else printable(source)
    if len(kept) < 2:
        raise BeitJaxError(f"{where}: {len(kept)} classes, expected two or more; keep the background as a class")
    return MaskClasses(tuple(kept.values()), tuple(kept), frozenset(ignored), table, binary)


def _named(labels: Path | None, highest: int | None, *, from_one: bool, binary: bool) -> dict[int, str]:
    if labels is not None:
        named = read_names(labels, first=int(from_one))
    elif binary:
        named = {0: "background", 1: "foreground"}
    else:
        last = 1 if highest is None else highest
        named = {number: f"LABEL_{number - from_one}" for number in range(int(from_one), last + 1)}
    if binary and (from_one or sorted(named) not in ([0, 1], [0, _FOREGROUND])):
        raise BeitJaxError(
            f"--binary: expected two classes, 0 and 255, found the numbers {printable(str(sorted(named)), 60)}"
            f"{' from --labels-from-one' if from_one else ''}; leave --binary out, or name two classes"
        )
    return dict(enumerate(named.values())) if binary else named


def _ignored(word: str, named: Mapping[int, str]) -> set[int]:
    found = {number for number, name in named.items() if name == word}
    if found:
        return found
    try:
        return {int(word)}
    except ValueError:
        known = ", ".join(printable(name, 30) for name in list(named.values())[:8])
        raise BeitJaxError(f"--ignore {printable(word)}: neither a number nor a class; classes are {known}") from None
