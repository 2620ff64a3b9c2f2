"""The command `neighbours`: images like others, found in a table of features. Imports wait until it runs."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from beit_jax.cli.arguments import Hub, Json, SkipBad, Switch, refuse_given, require_counts
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.bad_images import BadImages
from beit_jax.memory import imports
from beit_jax.terminal import image_progress, print_json, print_lines, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from beit_jax.search.index import Neighbour
    from beit_jax.search.picture import Row
    from beit_jax.tables.features import Block, FeatureTable

SCORES = {"cosine": "similarity", "dot": "product", "euclidean": "distance"}


@dataclass(frozen=True)
class MakingArguments:
    """How the features of query images are computed."""

    model: Annotated[str | None, arg(metavar="SOURCE", help_behavior_hint="")] = None
    """The model that made the table, by default as the table says."""
    pooling: Annotated[Literal["pooled", "mean", "cls", "tokens"] | None, arg(help_behavior_hint="")] = None
    """The features, by default as the table says, or else pooled."""
    batch_size: Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")] = None
    """Images computed at once, by default 8."""


def neighbours(
    index: Positional[Annotated[Path, arg(metavar="INDEX", help="A table of features, or a folder of its parts.")]],
    images: Positional[
        Annotated[
            tuple[str, ...],
            arg(
                metavar="IMAGE...",
                help="Images, as `features` takes them, or one other table of features.",
                help_behavior_hint="(at least one)",
            ),
        ]
    ],
    *,
    top: int = 5,
    metric: Literal["cosine", "dot", "euclidean"] = "cosine",
    exclude_self: FlagCreatePairsOff[Switch] = False,
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PNG", help_behavior_hint="")] = None,
    making: Annotated[MakingArguments, arg(name="")] = MakingArguments(),
    json: Json = False,
    skip: Annotated[SkipBad, arg(name="")] = SkipBad(),
    hub: Annotated[Hub, arg(name="")] = Hub(),
) -> int:
    """Find the images of a table of features that are nearest to given images, or to the rows of another table.

    The search is exact, on the device, and a table of any size streams. The table says which model made it; of one that
    does not (CSV, JSON lines), give --model.

    Try:
      beit-jax features ./native ./photos -o photos.parquet
      beit-jax neighbours photos.parquet cat.jpg --top 8 -o like-the-cat.png
      beit-jax neighbours photos.parquet photos.parquet --exclude-self --top 1 --json

    Args:
        top: Neighbours of an image.
        metric: What makes images near: a small angle, a large inner product, or a small distance.
        exclude_self: No image is its own neighbour: leave out rows with the name of the query, or, where the queries
            are the index itself, the query's own row.
        output: Picture to write, ending in .png: the images with their neighbours beside them, at most 64.
    """
    require_counts(top=top, batch_size=making.batch_size)
    _check_output(output, index, images, top)
    from beit_jax.search.index import search
    from beit_jax.tables.reading import is_features, open_features

    table, others = open_features(index), [name for name in images if is_features(Path(name))]
    if others and len(images) > 1:
        raise BeitJaxError(f"{printable(others[0])}: a table of features among other queries; give it alone")
    queries: Queries
    if others:
        for options in (making, skip, hub):
            refuse_given(options, "for images, and the queries are features already")
        queries = _of_table(table, Path(others[0]))
    else:
        queries = _of_images(table, images, making, skip, hub, output)
    _check_drawn(output, queries.count)
    how: Any = {"top": top, "metric": metric, "excluding": queries.own if exclude_self else "nobody"}
    with image_progress(table.count or 0, "searching", first="compiling") as advance:
        found = list(search(table, queries.blocks, advance=advance, **how))
    if output is not None:
        _draw(found, output, table)
    if json:
        unread = [{"image": name, "error": reason} for name, reason in queries.unread]
        print_json([_as_json(name, nearest, SCORES[metric]) for name, nearest in found] + unread)
        return 0
    digits = "{:.4f}" if metric == "cosine" else "{:.6g}"
    rows = [
        [printable(name, 1024) if place == 0 else "", digits.format(near.score), printable(near.image, 1024)]
        for name, nearest in found
        for place, near in enumerate(nearest)
    ]
    print_table(["image", SCORES[metric], "neighbour"], rows)
    lines = [f"left out     {reason}" for _, reason in queries.unread]
    print_lines([*lines, *([] if output is None else [f"written      {printable(output)}"])])
    return 0


@dataclass
class Queries:
    """What is looked for.

    Attributes:
        blocks: their features.
        count: how many there are; None where only reading tells.
        own: by what the rows of an index that are a query itself are known.
        unread: the name of every image that could not be read, and why.
    """

    blocks: "Iterator[Block]"
    count: int | None
    own: Literal["row", "name"] = "name"
    unread: list[tuple[str, str]] = field(default_factory=list)


def _of_table(table: "FeatureTable", path: Path) -> Queries:
    """The rows of another table as queries, or those of the index itself."""
    from beit_jax.search.index import QUERIES
    from beit_jax.search.origin import check_tables, same_table
    from beit_jax.tables.reading import open_features

    queries = open_features(path)
    check_tables(table, queries)
    return Queries(queries.blocks(QUERIES), queries.count, "row" if same_table(table.path, path) else "name")


def _of_images(
    table: "FeatureTable",
    images: tuple[str, ...],
    making: MakingArguments,
    skip: SkipBad,
    hub: Hub,
    output: Path | None,
) -> Queries:
    """Images as queries, whose features the model computes that made the table.

    Raises:
        BeitJaxError: the table does not say its model and none was given, another one is given, or the pooling is
            another.
    """
    with imports():
        from beit_jax.bulk.devices import computing
        from beit_jax.bulk.inputs import list_images
        from beit_jax.bulk.tasks import Features
        from beit_jax.bulk.work import Options, Work
        from beit_jax.inference import program_cache
        from beit_jax.search.index import QUERIES
        from beit_jax.search.origin import check_model
        from beit_jax.tables.features import Block
    listing, said = list_images(images), table.metadata
    _check_drawn(output, len(listing))
    name, made = making.model or said.get("model"), said.get("pooling")
    if not isinstance(name, str):
        raise BeitJaxError(f"{printable(table.path)}: does not say which model made it; give --model SOURCE")
    if made is not None and making.pooling not in (None, made):
        raise BeitJaxError(f"--pooling {making.pooling}: {printable(table.path)} holds {printable(made)} features")
    if making.model is None and hub.revision is None and isinstance(said.get("revision"), str):
        hub = replace(hub, revision=said["revision"])
    try:
        source = hub.resolve(name)
    except BeitJaxError as error:
        if making.model is not None:
            raise
        raise BeitJaxError(f"{printable(table.path)}: made by {error}; give the model with --model") from None
    model = computing(source, program_cache.predictor)
    check_model(table, name, model.facts["weights"], model.processor)
    work = Work(
        model,
        Features(making.pooling or made or "pooled"),
        listing,
        Options(making.batch_size or 8, max_bad=skip.share()),
        progress=partial(image_progress, description="computing features", first="compiling"),
    )
    ranges = [(start, min(len(listing), start + QUERIES)) for start in range(0, len(listing), QUERIES)]

    computed, unread = list[Block](), list[tuple[str, str]]()
    for part in work.parts(ranges, BadImages(len(listing), skip.share())):
        unread += [(row["image"], row["error"]) for row in part.rows if row.get("error") is not None]
        kept = part.kept()
        if kept.values is not None and len(kept):
            names = [row["image"] for row in kept.rows]
            computed.append(Block(kept.values.reshape(len(kept), -1), names.copy))
    return Queries(iter(computed), len(listing), unread=unread)


def _check_output(output: Path | None, index: Path, images: tuple[str, ...], top: int) -> None:
    """Refuses a picture that cannot be written, before any work is done."""
    from beit_jax.atomic import check_file
    from beit_jax.search.picture import MOST

    if output is None:
        return
    if output.suffix.lower() != ".png":
        raise BeitJaxError(f"{printable(output)}: expected a name ending in .png")
    if top > MOST:
        raise BeitJaxError(f"--top {top}: a picture shows at most {MOST} neighbours of an image; leave out --output")
    check_file(output, inputs=[index, *map(Path, images)])


def _check_drawn(output: Path | None, queries: int | None) -> None:
    """Refuses a picture of too many queries."""
    from beit_jax.search.picture import MOST

    if output is not None and queries is not None and queries > MOST:
        raise BeitJaxError(
            f"{printable(output)}: a picture of {queries:,} images with their neighbours, expected at most {MOST}; "
            "give fewer, or leave out --output"
        )


def _draw(found: "Sequence[Row]", output: Path, table: "FeatureTable") -> None:
    from beit_jax.atomic import new_file
    from beit_jax.images.processor import ImageProcessor
    from beit_jax.search.images import small_images
    from beit_jax.search.picture import SIDE, neighbour_sheet

    _check_drawn(output, len(found))
    said = table.metadata.get("processor")
    processor = ImageProcessor.from_hf(said, printable(table.path)) if said else None
    bands: Any = {} if processor is None else {"channels": processor.num_channels, "select": processor.bands}
    names = [name for name, _ in found] + [near.image for _, nearest in found for near in nearest]
    pictures = small_images(names, table.path.parent, SIDE, **bands)
    with new_file(output) as partial:
        neighbour_sheet(found, pictures).save(partial, format="PNG")


def _as_json(name: str, nearest: "Sequence[Neighbour]", score: str) -> dict[str, Any]:
    rows = [{"row": near.row, "image": near.image, score: near.score} for near in nearest]
    return {"image": name, "neighbours": rows}
