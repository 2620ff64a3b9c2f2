"""What made a table of features, against what makes the features of a query: only one model's can be compared."""

from pathlib import Path

from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import ImageProcessor
from beit_jax.json_file import changes
from beit_jax.tables.features import FeatureTable

_COMPARED = ("weights", "processor", "pooling")


def check_model(table: FeatureTable, name: str, weights: str, processor: ImageProcessor) -> None:
    """Refuses a model that did not make a table, as far as the table says what did.

    Args:
        name: of the model, for the message.
        weights: the digest of its weights.

    Raises:
        BeitJaxError: the weights or the preparation of images are others.
    """
    place, said = printable(table.path), table.metadata
    if said.get("weights") not in (None, weights):
        made = printable(said.get("model", "another model"))
        raise BeitJaxError(
            f"{place}: made by {made} (weights {printable(said['weights'], 16)}), but {printable(name)} has the "
            f"weights {weights[:16]}; give the model that made the table with --model, or make the table again"
        )
    for key, here, there in changes(said["processor"], processor.to_hf()) if said.get("processor") else ():
        raise BeitJaxError(
            f"{place}: its images were prepared with {printable(key)} {printable(here)}, {printable(name)} prepares "
            f"them with {printable(there)}; give the model as it was, or make the table again"
        )


def check_tables(index: FeatureTable, queries: FeatureTable) -> None:
    """Refuses queries that another model made than the index, as far as both say.

    Raises:
        BeitJaxError: the weights, the preparation of images or the pooling are others, or the width of the rows.
    """
    if index.width != queries.width:
        raise BeitJaxError(
            f"{printable(queries.path)}: {queries.width} numbers in a row, {printable(index.path)} has {index.width}; "
            "give tables of one model"
        )
    for key in _COMPARED:
        here, there = index.metadata.get(key), queries.metadata.get(key)
        if here is not None and there is not None and here != there:
            raise BeitJaxError(
                f"{printable(queries.path)}: {key} {printable(there, 60)}, {printable(index.path)} was made with "
                f"{printable(here, 60)}; give tables of one model"
            )


def same_table(index: Path, queries: Path) -> bool:
    """True if the queries are the rows of the index itself."""
    return index.exists() and queries.exists() and index.samefile(queries)
