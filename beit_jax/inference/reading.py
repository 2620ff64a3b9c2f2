"""Reads a checkpoint of any format into memory as a native one, with another head if one is asked for."""

import os
from dataclasses import replace

from beit_jax.choices import ProblemType
from beit_jax.hub import Source, resolve
from beit_jax.models.heads import HeadChange, Labels, change_head
from beit_jax.weights.native import NativeCheckpoint, is_native, load


def read(source: Source) -> NativeCheckpoint:
    """Loads a native checkpoint, or converts any other source in memory.

    Raises:
        BeitJaxError: the checkpoint cannot be read completely; names the file or the tensor.
    """
    if source.path.is_dir() and is_native(source.path):
        return load(source.path)
    from beit_jax.convert import importer  # not at the top: reading native checkpoints needs no converter

    return importer.load(source)


def load_any(
    source: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> NativeCheckpoint:
    """A checkpoint in memory: configuration, image processor, and its parameters as they are stored.

    Args:
        source: a native checkpoint, which is checked against its digests, whatever `beit-jax convert` reads (converted
            in memory), or a hub name.
        revision, cache_dir: of a hub name, as huggingface_hub has them.

    Raises:
        BeitJaxError: the source does not exist or cannot be read completely; names the file or the tensor.
    """
    return read(resolve(os.fspath(source), revision=revision, cache_dir=None if cache_dir is None else str(cache_dir)))


def with_head(
    checkpoint: NativeCheckpoint,
    labels: Labels | int | None = None,
    problem_type: ProblemType | None = None,
    *,
    seed: int = 0,
) -> tuple[NativeCheckpoint, HeadChange]:
    """The checkpoint with another head, and what became of the old one.

    Args:
        labels, problem_type, seed: as `change_head` has them; its record goes into the provenance.

    Raises:
        BeitJaxError: as `change_head`.
    """
    change = change_head(checkpoint.config, labels, problem_type, seed=seed)
    params = {new: checkpoint.params[old] for new, old in change.moved.items()}
    for name, (origins, make) in change.made.items():
        params[name] = make({origin: checkpoint.params[origin] for origin in origins})
    record = {"head": list(change.notes)} if change.notes else {}
    return (
        replace(
            checkpoint,
            config=change.config,
            params=dict(sorted(params.items())),
            provenance={**checkpoint.provenance, **record},
        ),
        change,
    )
