"""Images of prepared data sets: ArrayRecord files of TFDS, by their directory or by the name that TFDS knows."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from beit_jax.bulk.images import HeldImage, Stamp, Stored
from beit_jax.errors import BeitJaxError, printable

TFDS: Final = "tfds:"


class RecordImages:
    """The images of a split, a `Source`. This process reads the records, workers decode them."""

    def __init__(self, records: Any) -> None:
        self._records = records
        facts = json.dumps({"directory": records.name, **records.contract()}, sort_keys=True)
        self._stamp = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:8], "little")

    def __len__(self) -> int:
        return len(self._records)

    def images(self, start: int, stop: int) -> Iterator[Stored]:
        for place in range(start, stop):
            record = self._records[place]
            yield HeldImage(record["file_name"], record["image"])

    def facts(self, start: int, stop: int) -> Iterator[tuple[str, Stamp]]:
        for place in range(start, stop):
            yield f"{place}", (self._stamp,)

    def names(self) -> Iterator[str]:
        return (f"{self._stamp}/{place}" for place in range(len(self)))

    def paths(self) -> Iterator[str]:
        return iter(())


def open_records(name: str) -> RecordImages:
    """Opens a split of a data set.

    Args:
        name: ``DIR#SPLIT``, or ``tfds:NAME[/CONFIG][:VERSION]#SPLIT`` of what TFDS has prepared; without a split the
            only one. A split may be a part of one: ``train[:1%]``.

    Raises:
        BeitJaxError: no data set there, one without images, no such split, or the extra `train` is not installed.
    """
    place, _, split = name.partition("#")
    try:
        from beit_jax.train.data import datasets
    except ModuleNotFoundError as error:
        raise BeitJaxError(f"{printable(name)}: {error.name} is not installed; pip install 'beit-jax[train]'") from None
    directory = _prepared(place.removeprefix(TFDS)) if place.startswith(TFDS) else Path(place)
    found = datasets.splits(directory)
    if not split and len(found) != 1:
        raise BeitJaxError(
            f"{printable(name)}: has the splits {', '.join(found)}; name one: {printable(place)}#{found[0]}"
        )
    return RecordImages(datasets.open_images(directory, split or found[0]))


def _prepared(name: str) -> Path:
    """The directory of a data set that TFDS has prepared in its usual place (TFDS_DATA_DIR)."""
    import tensorflow_datasets as tfds

    try:
        return Path(tfds.builder(name).data_path)
    except Exception as error:  # whatever TFDS' registry and its importing of a data set's code raise
        reason = printable(" ".join(str(error).split()), 200)
        raise BeitJaxError(
            f"{TFDS}{printable(name)}: TFDS finds no such data set here ({reason}); give its directory"
        ) from None
