"""Which columns of a table say what about its images, and what that is: classes, several of them, or numbers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from beit_jax.choices import ProblemType, nearest
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import read_json_array, read_text

from .cells import Raw, flag, listed, number, one_label, several_labels
from .rows import Row, Table
from .targets import LABEL, LABELS, VALUES, Target

IMAGE_COLUMNS: Final = (
    *("file_name", "image", "image_path", "path", "file", "filename", "filepath", "file_path"),
    *("image_file", "image_file_name", "image_name", "img", "image_id"),
)
LABEL_COLUMNS: Final = "label labels class classes category categories target tags".split()
SEPARATORS: Final = (";", "|")
NO_SEPARATOR: Final = "none"


@dataclass(frozen=True)
class TableOptions:
    """Where a table says what.

    Attributes:
        image_column: the column of the images' names; by default the first of `IMAGE_COLUMNS` that there is.
        label_columns: one column of classes, or a column of 0 and 1 for every class; by default the first of
            `LABEL_COLUMNS` that there is.
        value_columns: columns of numbers to learn, in place of classes.
        separator: between the classes in a cell. By default ``;`` or ``|``, where a cell has one of these; a list needs
            none, in JSON or as Python prints it. NO_SEPARATOR: every cell is the name of one class, whatever it holds.
        split_column: the column of the splits; by default ``split`` where there is one.
        image_folder: that the images' names are relative to; by default the table's.
        classes: a file with the names of the classes in their order: a line or an element of a JSON list for each.
        allow_unlabelled: an empty cell of classes means that the image has none of them.
    """

    image_column: str | None = None
    label_columns: tuple[str, ...] = ()
    value_columns: tuple[str, ...] = ()
    separator: str | None = None
    split_column: str | None = None
    image_folder: Path | None = None
    classes: Path | None = None
    allow_unlabelled: bool = False


# --- Columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The columns that are read."""

    image: str
    labels: tuple[str, ...]
    values: tuple[str, ...]
    split: str | None
    guessed: bool  # nobody has named the column of labels

    @classmethod
    def of(cls, table: Table, options: TableOptions) -> "Columns":
        """The columns that the options name, or that have one of the usual names.

        Raises:
            BeitJaxError: a column that is not there, or is named for two things; labels and values.
        """
        if options.label_columns and options.value_columns:
            raise BeitJaxError("--label-columns and --value-columns were both given; an image has classes or numbers")
        image = (
            table.known(IMAGE_COLUMNS)
            if options.image_column is None
            else table.column(options.image_column, "--image-column")
        )
        if image is None:
            raise _unknown(table, "the images' names", "--image-column", IMAGE_COLUMNS)
        split = table.known(["split"]) if options.split_column is None else options.split_column
        labels, guessed = options.label_columns, not options.label_columns and not options.value_columns
        if guessed:
            label = table.known(LABEL_COLUMNS)
            if label is None:
                raise _unknown(table, "labels", "--label-columns or --value-columns", LABEL_COLUMNS)
            labels = (label,)
        found = cls(image, labels, options.value_columns, split, guessed)
        used = [image, *labels, *options.value_columns, *([split] if split else [])]
        twice = next((name for name in used if used.count(name) > 1), None)
        if twice is not None:
            raise BeitJaxError(f"the column {printable(twice, 60)} is named for two things; name each column once")
        return found

    @property
    def splits(self) -> list[str]:
        """Where splits come from, for people; empty for nowhere."""
        return [] if self.split is None else [f"splits from {self.split}"]

    def checked(self, table: Table) -> Table:
        """The table, which has these columns.

        Raises:
            BeitJaxError: it lacks one; names the option.
        """
        table.column(self.image, "--image-column")
        for name in self.labels:
            table.column(name, "--label-columns")
        for name in self.values:
            table.column(name, "--value-columns")
        if self.split is not None:
            table.column(self.split, "--split-column")
        return table


def _unknown(table: Table, what: str, option: str, names: Sequence[str]) -> BeitJaxError:
    found = ", ".join(printable(name, 60) for name in table.columns[:20])
    return BeitJaxError(
        f"{printable(table.path)}: no column of {what} ({', '.join(names)}), found {found}; name it with {option}"
    )


# --- What is said -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meaning:
    """What the rows say: the target, how a row's cells are read, and this in words."""

    target: Target
    read: Callable[[Row], Raw]
    described: str


def meaning_of(rows: Sequence[Row], columns: Columns, options: TableOptions) -> Meaning:
    """What rows say in these columns.

    Raises:
        BeitJaxError: a cell that says nothing or cannot be understood, naming its row and column; options that what
            the rows say has no use for.
    """
    if columns.values:
        _refuse_for_values(options)
        target = Target(VALUES, "regression", columns.values, held="float_list")
        return Meaning(
            target,
            lambda row: np.asarray([number(row, column) for column in columns.values], np.float32),
            f"numbers from {', '.join(columns.values)}",
        )
    if len(columns.labels) > 1:
        return _flags(columns.labels, options)
    (column,) = columns.labels
    separator = _separator(rows, column, options)
    if separator is None:
        if options.allow_unlabelled:
            raise BeitJaxError(
                f"--allow-unlabelled: for images of several classes, and --separator {NO_SEPARATOR} says that each has "
                "one; leave one of them out"
            )
        if columns.guessed:
            _refuse_numbers(rows, column)
        return _named(rows, column, "single_label_classification", options, lambda row: [one_label(row, column)])
    words = "lists" if separator == "" else f"{separator!r} between them"
    found = _named(
        rows,
        column,
        "multi_label_classification",
        options,
        lambda row: several_labels(row, column, separator, empty=options.allow_unlabelled),
    )
    return Meaning(found.target, found.read, f"{found.described} ({words})")


def _refuse_for_values(options: TableOptions) -> None:
    for name in ("separator", "classes", "allow_unlabelled"):
        if getattr(options, name):
            raise BeitJaxError(
                f"--{name.replace('_', '-')}: for classes, and --value-columns are numbers; leave it out"
            )


def _flags(names: tuple[str, ...], options: TableOptions) -> Meaning:
    """A column of 0 and 1 for every class."""
    if options.separator is not None:
        raise BeitJaxError("--separator: for one column of classes; several columns hold 0 or 1 each; leave it out")
    if options.allow_unlabelled:
        raise BeitJaxError("--allow-unlabelled: a column for every class has 0 for none; leave it out")
    classes = names if options.classes is None else _class_list(options.classes)
    if set(classes) != set(names):
        odd = sorted(set(classes) ^ set(names))[0]
        raise BeitJaxError(
            f"{printable(options.classes)}: expected the names of the columns of classes, found a difference in "
            f"{printable(odd, 60)}"
        )

    def read(row: Row) -> Raw:
        return tuple(index for index, name in enumerate(classes) if flag(row, name))

    target = Target(LABELS, "multi_label_classification", classes)
    return Meaning(target, read, f"0 or 1 for each of {len(names)} classes")


def _named(
    rows: Sequence[Row],
    column: str,
    problem_type: ProblemType,
    options: TableOptions,
    labels_of: Callable[[Row], list[str]],
) -> Meaning:
    """Classes by their names."""
    found = [labels_of(row) for row in rows]
    if options.classes is None:
        classes = _ordered({label for labels in found for label in labels})
    else:
        classes = _class_list(options.classes)
    numbers = {name: index for index, name in enumerate(classes)}
    for row, labels in zip(rows, found, strict=True):
        for label in labels:
            if label not in numbers:
                near = nearest(label, classes) or classes[0]
                raise row.error(
                    column,
                    f"{printable(label, 60)} is not in {printable(options.classes)}; is it {printable(near, 60)}?",
                )
            if not label.isprintable():
                raise row.error(column, f"{printable(label, 60)}: a class needs a printable name")
    if not classes:
        raise BeitJaxError(f"column {printable(column)}: no image has a class, so that there is nothing to learn")
    if problem_type == "single_label_classification":
        return Meaning(
            Target(LABEL, problem_type, classes), lambda row: numbers[labels_of(row)[0]], f"classes from {column}"
        )
    return Meaning(
        Target(LABELS, problem_type, classes),
        lambda row: tuple(sorted(numbers[label] for label in labels_of(row))),
        f"several classes from {column}",
    )


def _ordered(names: set[str]) -> tuple[str, ...]:
    """Sorted as text, or as numbers where all are integers."""
    if all(name.isascii() and name.removeprefix("-").isdecimal() and len(name) < 20 for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _separator(rows: Sequence[Row], column: str, options: TableOptions) -> str | None:
    """What separates several classes in a cell: text, "" for lists; None where every image has one class."""
    if options.separator is not None:
        if not options.separator:
            raise BeitJaxError("--separator: expected the text between two classes, found nothing")
        return None if options.separator == NO_SEPARATOR else options.separator
    cells = [row.cells[column] for row in rows]
    texts = [cell for cell in cells if isinstance(cell, str) and listed(cell) is None]
    used = [each for each in SEPARATORS if any(each in text for text in texts)]
    if len(used) > 1:
        raise BeitJaxError(
            f"{printable(rows[0].table)}: column {printable(column, 60)}: found {' and '.join(used)} in cells; say "
            "which separates classes with --separator"
        )
    if used:
        return used[0]
    if any(listed(cell) is not None for cell in cells):
        return ""
    return SEPARATORS[0] if options.allow_unlabelled else None  # only images of several classes may have none


def _refuse_numbers(rows: Sequence[Row], column: str) -> None:
    """Refuses a column that nobody has named, whose cells are numbers with decimals: these are no classes."""
    texts = [row.text(column) for row in rows]
    try:
        values = [float(text) for text in texts]
    except ValueError:
        return
    if any(not value.is_integer() for value in values):
        raise BeitJaxError(
            f"{printable(rows[0].table)}: column {printable(column, 60)} holds numbers such as "
            f"{next(t for t, v in zip(texts, values, strict=True) if not v.is_integer())}; learn them with "
            f"--value-columns {printable(column, 60)}, or take them for names with --label-columns"
        )


def _class_list(path: Path) -> tuple[str, ...]:
    """The names of classes in a file: elements of a JSON list, or lines."""
    advice = "give a file with the name of a class in every line"
    if path.suffix.lower() == ".json":
        names = read_json_array(path, advice=advice)
        if not all(isinstance(name, str) for name in names):
            raise BeitJaxError(f"{printable(path)}: expected a list of names; {advice}")
    else:
        names = [line.strip() for line in read_text(path, advice=advice).removeprefix("\ufeff").splitlines()]
        while names and not names[-1]:
            names.pop()
    counts = Counter(names)
    for index, name in enumerate(names, start=1):
        if not name or not name.isprintable() or counts[name] > 1:
            found = "a name that stands twice" if counts[name] > 1 else "no printable name"
            raise BeitJaxError(f"{printable(path)}: class {index}: {printable(name, 60)}: {found}; {advice}")
    if not names:
        raise BeitJaxError(f"{printable(path)}: no names; {advice}")
    return tuple(names)
