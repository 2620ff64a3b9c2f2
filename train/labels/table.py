"""A table with a row for every image: the files that it names, with what it says about each."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.files import read_image_file
from beit_jax.images.listing import SUFFIXES

from .cells import Raw
from .meaning import Columns, TableOptions, meaning_of
from .rows import METADATA, Row, read_table, real_path, table_file
from .splits import SPLIT_FOLDERS, split_named
from .targets import Target


@dataclass(frozen=True)
class TableImages:
    """The images that a table names. They are read like a `datasets.Dataset`.

    Attributes:
        directory: the table's path, which stands for it in messages.
        raw: what the table says about every image: the number of its class, the numbers of its classes, or values.
        names: of the images, as the table has them.
        splits: of the images; empty where the table has none.
        described: which columns were read and how, for people.
    """

    directory: Path
    target: Target
    paths: tuple[Path, ...]
    raw: tuple[Raw, ...] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    splits: tuple[str, ...] = field(repr=False)
    described: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        return self.target.names

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {
            "image": read_image_file(path),
            "label": self.target.label(self.raw[index]),
            "file_name": str(path),
        }

    def of_split(self, split: str) -> "TableImages":
        """The images of a split; all of them where the table has no splits.

        Raises:
            BeitJaxError: the table has splits, but not this one.
        """
        if not self.splits:
            return self
        chosen = [index for index, name in enumerate(self.splits) if name == split]
        if not chosen:
            known = ", ".join(sorted(set(self.splits)))
            raise BeitJaxError(
                f"{printable(self.directory)}: no image of the split {printable(split)}, found {known}; name one with "
                "--split"
            )

        def of(column: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(column[index] for index in chosen)

        return TableImages(
            self.directory,
            self.target,
            of(self.paths),
            of(self.raw),
            of(self.names),
            of(self.splits),
            self.described,
        )


def find_tables(source: Path) -> dict[str | None, Path]:
    """The table of a path, or the tables of its folders of splits, by split; None stands for no split.

    Raises:
        BeitJaxError: no table there; a file that is none; a folder with two.
    """
    if (own := table_file(source)) is not None:
        return {None: own}
    found: dict[str | None, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            inner = table_file(source / name) if (source / name).is_dir() else None
            if inner is not None:
                if split in found:
                    raise BeitJaxError(f"{printable(source)}: two folders of the split {split} have tables; remove one")
                found[split] = inner
    if not found:
        what = "nothing" if not source.exists() else f"a folder without {' or '.join(METADATA)}"
        raise BeitJaxError(f"{printable(source)}: expected a table, or a folder that has one, found {what}")
    return found


def has_table(source: Path) -> bool:
    """Whether there is a table at a path, in its folder or in its folders of splits."""
    names = ["", *(name for names in SPLIT_FOLDERS.values() for name in names)]
    return any((source / name / table).is_file() for name in names for table in METADATA)


def read_images(source: Path, options: TableOptions, *, allow_missing: bool = False) -> TableImages:
    """The images that a table names, or the tables of a folder's splits.

    Args:
        allow_missing: an image that is no file is an error when it is read, not here.

    Raises:
        BeitJaxError: no table; a column that is not there; a cell that says nothing or cannot be understood; an image
            that is missing or stands twice. The error names the table, the row and the column.
    """
    tables = {split: read_table(path) for split, path in find_tables(source).items()}
    columns = Columns.of(next(iter(tables.values())), options)
    rows = [(split, row) for split, table in tables.items() for row in columns.checked(table).rows]
    meaning = meaning_of([row for _, row in rows], columns, options)
    paths, splits = [], []
    seen: dict[str, Row] = {}
    listed: Listed = {}
    missing: list[BeitJaxError] = []
    for folder_split, row in rows:
        name = row.text(columns.image)
        if not name:
            raise row.error(columns.image, "empty; name the image's file")
        path = _image(row, columns.image, name, options.image_folder or row.table.parent, listed)
        if (first := seen.setdefault(real_path(path), row)) is not row:
            raise row.error(columns.image, f"{printable(name)} stands in row {first.number} too; give an image one row")
        if not path.is_file():
            missing.append(row.error(columns.image, f"{printable(path)}: no such file"))
        paths.append(path)
        if columns.split is not None:
            splits.append(_split(row, columns.split))
        elif folder_split is not None:
            splits.append(folder_split)
    if missing and not allow_missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BeitJaxError(f"{missing[0]}{more}; correct the table, name the folder with --image-folder, or --skip-bad")
    return TableImages(
        source,
        meaning.target,
        tuple(paths),
        tuple(meaning.read(row) for _, row in rows),
        tuple(row.text(columns.image) for _, row in rows),
        tuple(splits),
        f"images from {columns.image}, {meaning.described}"
        + (f", splits from {columns.split}" if columns.split else ""),
    )


# --- Images and splits ------------------------------------------------------------------------------------------------

Listed = dict[Path, dict[str, list[str]]]
"""The images of folders by their names without suffixes, as far as they were asked for."""


def _image(row: Row, column: str, name: str, folder: Path, listed: Listed) -> Path:
    """The file of an image. A name without a suffix means the only image of the folder that is called so."""
    if "\0" in name:
        raise row.error(column, f"{printable(name)}: no name of a file")
    path = folder / name
    if path.suffix.lower() in SUFFIXES or path.is_file():
        return path
    if path.parent not in listed:
        listed[path.parent] = _by_stem(path.parent)
    named = listed[path.parent].get(path.name, [])
    if len(named) > 1:
        raise row.error(column, f"{printable(name)} may be {' or '.join(sorted(named)[:3])}; write the suffix")
    return path.parent / named[0] if named else path


def _by_stem(folder: Path) -> dict[str, list[str]]:
    """The images of a folder, by their names without suffixes."""
    found: dict[str, list[str]] = {}
    for entry in os.listdir(folder) if folder.is_dir() else ():
        stem, suffix = os.path.splitext(entry)
        if suffix.lower() in SUFFIXES:
            found.setdefault(stem, []).append(entry)
    return found


def _split(row: Row, column: str) -> str:
    found = row.text(column)
    split = split_named(found)
    if split is None:
        known = ", ".join(name for names in SPLIT_FOLDERS.values() for name in names)
        raise row.error(column, f"expected {known}, found {printable(found, 60) if found else 'nothing'}")
    return split
