"""Any amount of images, for programs: a table in a file, or its rows as they come."""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from beit_jax.atomic import check_place
from beit_jax.bulk.chunks import folder_of
from beit_jax.bulk.devices import computing
from beit_jax.bulk.inputs import Listing, list_images
from beit_jax.bulk.table import Host, Outcome, Table, check_output
from beit_jax.bulk.tasks import Classes, Features, Task
from beit_jax.bulk.work import Options, Work
from beit_jax.errors import BeitJaxError
from beit_jax.hub import resolve
from beit_jax.images.bad_images import BadImages
from beit_jax.inference import program_cache
from beit_jax.inference.predictor import Pooling, check_counts
from beit_jax.tables.schema import ERROR, VALUES, Part

Named: TypeAlias = str | os.PathLike[str]


def write_features(
    source: Named,
    images: Named | Iterable[Named],
    output: Named,
    *,
    pooling: Pooling = "pooled",
    batch_size: int = 8,
    max_bad: float = 0.0,
    workers: int | None = None,
    chunk: int | None = None,
    members: tuple[str, ...] = (),
    process: int = 0,
    processes: int = 1,
) -> Outcome:
    """Writes the features of any number of images to a table, as ``beit-jax features`` does, or goes on with it.

    >>> write_features("./native", "./photos", "features.parquet")

    Args:
        source: a checkpoint of any format, a program of ``export --to stablehlo``, or a hub name.
        images: files, folders, patterns, ``@list.txt``, tar archives, prepared data: `beit_jax.bulk.inputs`.
        output: a name ending in .npz, .safetensors, .parquet, .arrow, .csv or .jsonl.
        pooling: as in `beit_jax.features`.
        batch_size: images computed at once, on all devices of this host.
        max_bad: the share of images that may be left out because they cannot be read.
        workers: processes that prepare images, by default half of the cores, and none for few images. A script that
            starts some needs ``if __name__ == "__main__":``.
        chunk: images after which rows are safe from an interruption, by default about 512.
        members: endings of images in archives.
        process, processes: which of several processes this is. Each makes its share; whoever ends last joins the table.

    Raises:
        BeitJaxError: an input or the output cannot be used, a number is out of range, or an image cannot be read.
    """
    task = Features(pooling)
    making = _work(source, images, members, Options(batch_size, chunk, workers, max_bad), task, Path(output))
    return Table(making, Path(output), _host(process, processes)).make()


def write_classes(
    source: Named,
    images: Named | Iterable[Named],
    output: Named,
    *,
    top: int = 5,
    batch_size: int = 8,
    max_bad: float = 0.0,
    workers: int | None = None,
    chunk: int | None = None,
    members: tuple[str, ...] = (),
    process: int = 0,
    processes: int = 1,
) -> Outcome:
    """Writes the most probable classes of any number of images to a table, as ``beit-jax classify --output`` does.

    Args:
        output: a name ending in .parquet, .arrow, .csv or .jsonl.
        top: classes of an image.
        source, images, batch_size, max_bad, workers, chunk, members, process, processes: as in `write_features`.

    Raises:
        BeitJaxError: as `write_features`; a model without a classifier.
    """
    check_counts(top=top)
    making = _work(source, images, members, Options(batch_size, chunk, workers, max_bad), top, Path(output))
    return Table(making, Path(output), _host(process, processes)).make()


def feature_rows(
    source: Named,
    images: Named | Iterable[Named],
    *,
    pooling: Pooling = "pooled",
    batch_size: int = 8,
    max_bad: float = 0.0,
    workers: int | None = None,
    members: tuple[str, ...] = (),
) -> Iterator[dict[str, Any]]:
    """Yields a dictionary for every image as it is computed: ``image``, and ``features`` [...] float32 or ``error``.

    Args:
        source, images, pooling, batch_size, max_bad, workers, members: as in `write_features`.

    Raises:
        BeitJaxError: as `write_features`.
    """
    for part in _parts(source, images, members, Options(batch_size, None, workers, max_bad), Features(pooling)):
        assert part.values is not None
        for row, values in zip(part.rows, part.values, strict=True):
            yield dict(row) if row.get(ERROR) is not None else {**row, VALUES: values}


def record_batches(
    source: Named,
    images: Named | Iterable[Named],
    *,
    pooling: Pooling = "pooled",
    batch_size: int = 8,
    max_bad: float = 0.0,
    workers: int | None = None,
    members: tuple[str, ...] = (),
) -> Iterator[Any]:
    """Yields the table of `write_features` as `pyarrow.RecordBatch`es, as it is computed. Needs the extra `tables`.

    Args:
        source, images, pooling, batch_size, max_bad, workers, members: as in `write_features`.

    Raises:
        BeitJaxError: as `write_features`; pyarrow is not installed.
    """
    from beit_jax.tables.write_arrow import check_arrow, record_batch

    options = Options(batch_size, None, workers, max_bad)
    making = _work(source, images, members, options, Features(pooling))
    schema = making.schema(making.shape)
    check_arrow("record_batches", schema)
    return (record_batch(schema, part) for part in _all_parts(making))


def _parts(
    source: Named, images: Named | Iterable[Named], members: tuple[str, ...], options: Options, task: Task
) -> Iterator[Part]:
    return _all_parts(_work(source, images, members, options, task))


def _all_parts(making: Work) -> Iterator[Part]:
    count, size = len(making.listing), making.size
    ranges = [(start, min(start + size, count)) for start in range(0, count, size)]
    return making.parts(ranges, BadImages(count, making.max_bad))


def _work(
    source: Named,
    images: Named | Iterable[Named],
    members: tuple[str, ...],
    options: Options,
    task: Task | int,
    output: Path | None = None,
) -> Work:
    """The work of a task; a number is that of the classes of an image."""
    check_counts(batch_size=options.batch_size, chunk=1 if options.chunk is None else options.chunk)
    if options.workers is not None and options.workers < 0:
        raise BeitJaxError(f"workers: expected an integer of at least 0, found {options.workers}")
    if not 0.0 <= options.max_bad <= 1.0:
        raise BeitJaxError(f"max_bad: expected a share from 0 to 1, found {options.max_bad}")
    listing = _listing(images, members, output)
    if output is not None:
        check_output(output, listing)
    model = computing(resolve(os.fspath(source)), partial(program_cache.predictor, many=True))
    return Work(model, Classes(model.config, task) if isinstance(task, int) else task, listing, options)


def _listing(images: Named | Iterable[Named], members: tuple[str, ...], output: Path | None) -> Listing:
    if output is not None:
        check_place(output)
    named = [images] if isinstance(images, str | os.PathLike) else images
    return list_images(named, members=members, leave_out=[] if output is None else [folder_of(output)])


def _host(process: int, processes: int) -> Host:
    check_counts(processes=processes)
    if not 0 <= process < processes:
        raise BeitJaxError(f"process: expected 0 to {processes - 1}, found {process}")
    return Host(process, processes)
