"""A training run, resolved: every choice made and every shape known before an array exists."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jax.sharding import Mesh

from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, read_tokenizer
from beit_jax.weights.native import NativeCheckpoint, load

from ..adapting import adapter_of
from ..data.datasets import splits
from ..distributed.sharding import check_batch, make_mesh
from ..initial.pixels import with_channels, with_pixels
from ..objectives import objective_of
from ..objectives.objective import Objective, SourceName, Sources
from ..recipe import Recipe, spelled
from ..step.optim import optimizer
from .best import Best, watched
from .program import Program, learning_rates

if TYPE_CHECKING:
    from ..objectives.objective import Images


@dataclass(frozen=True)
class Plan(Program):
    """A program, and what its run reads.

    Attributes:
        validation: None where the data has no such split, which only learning without labels can do without.
    """

    processor: ImageProcessor
    sources: Sources
    training: "Images"
    validation: "Images | None"

    def begun(self) -> Self:
        return replace(super().begun(), sources=self.sources.begun())

    @cached_property
    def watched(self) -> Best | None:
        """The score by which the best model is kept and the run may end early; None if there is none.

        Raises:
            BeitJaxError: the run has no such score.
        """
        return watched(self.recipe.run, () if self.validation is None else self.objective.score_names)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.training) // self.recipe.data.batch_size


def make_plan(
    recipe: Recipe,
    data: str | Path,
    init: str | Path | NativeCheckpoint | None = None,
    *,
    tokenizer: str | Path | TokenizerCheckpoint | None = None,
    decoder: str | Path | TokenizerCheckpoint | None = None,
    stored_tokens: str | Path | None = None,
    teacher: str | Path | NativeCheckpoint | None = None,
    objective: type[Objective[Any]] | None = None,
) -> Plan:
    """Resolves a checked recipe against the data, what else it reads, and the devices.

    Args:
        init: native checkpoint that training starts from: its directory, or read already (`beit_jax.convert.load`).
        tokenizer, decoder: native tokenizer, and decoder of its tokens, of pre-training on visual tokens; as `init`.
        stored_tokens: the tokens themselves, stored for this recipe, data and tokenizer by `beit-jax tokenize`.
        teacher: native checkpoint that a tokenizer learns from; as `init`.
        objective: what the run learns; by default the objective that the recipe names.

    Raises:
        BeitJaxError: data or checkpoints that are missing, not asked for, or do not fit the recipe or each other; a
            mesh that does not fit the devices; fewer images than a batch.
    """
    data = Path(data)
    given: dict[SourceName, object] = {
        "init": init,
        "tokenizer": tokenizer,
        "decoder": decoder,
        "stored_tokens": stored_tokens,
        "teacher": teacher,
    }
    kind = objective_of(recipe) if objective is None else objective
    for name, source in given.items():
        if source is not None and name not in kind.reads:
            raise BeitJaxError(f"--{spelled(name)}: {recipe.objective} does not use it, leave it out")
    if init is None and adapter_of(recipe) is not None:
        raise BeitJaxError("--adapter.rank: an adapter changes a trained model; name it with --init CHECKPOINT")
    training, validation = kind.open(data, "train"), _validation(kind, data)
    if validation is not None and training.labels != validation.labels:
        raise BeitJaxError(f"{data}: the splits train and validation have different labels; prepare them together")
    mesh = make_mesh(recipe.run.mesh)
    _check_sizes(kind, recipe, data, training, validation, mesh)
    sources = Sources(
        start=with_channels(_model(init), recipe.model),
        tokenizer=_tokenizer(tokenizer),
        decoder=_tokenizer(decoder),
        teacher=_model(teacher),
    )
    config = kind.configure(recipe, training.labels, sources)
    recipe = with_pixels(recipe, config, sources.start)
    rates = learning_rates(recipe, len(training))
    learned = kind(recipe, config, sources, len(rates)).fitted(training)
    config = learned.config
    training = replace(training, reading=learned.reading)
    validation = None if validation is None else replace(validation, reading=learned.reading)
    if stored_tokens is not None:
        learned = learned.with_stored_tokens(Path(stored_tokens), training)
    plan = Plan(
        recipe=recipe,
        config=config,
        processor=learned.image_processor,
        sources=learned.sources,
        training=training,
        validation=validation,
        mesh=mesh,
        objective=learned,
        tx=optimizer(recipe.optim, config, learned.division),
        rates=rates,
    )
    plan.watched  # noqa: B018  # refuses a score that the run does not have
    return plan


def _model(source: str | Path | NativeCheckpoint | None) -> NativeCheckpoint | None:
    return load(Path(source)) if isinstance(source, str | Path) else source


def _tokenizer(source: str | Path | TokenizerCheckpoint | None) -> TokenizerCheckpoint | None:
    return read_tokenizer(Path(source)) if isinstance(source, str | Path) else source


def _check_sizes(
    kind: type[Objective[Any]], recipe: Recipe, data: Path, training: "Images", validation: "Images | None", mesh: Mesh
) -> None:
    """Refuses batches that images or devices cannot fill."""
    size = recipe.data.batch_size
    if len(training) < size:
        raise BeitJaxError(f"{data}: {len(training)} training images, fewer than --data.batch-size {size}")
    check_batch(size, mesh, parts=recipe.optim.accumulate)
    if validation is None or kind.evaluation == "single images":
        return
    check_batch(recipe.eval_batch_size, mesh, option="--data.eval-batch-size")
    if kind.evaluation == "whole batches" and len(validation) < recipe.eval_batch_size:
        raise BeitJaxError(
            f"{data}: {len(validation)} images to evaluate, fewer than --data.eval-batch-size {recipe.eval_batch_size}"
        )


def _validation(kind: type[Objective[Any]], data: Path) -> "Images | None":
    if not kind.needs_validation and "validation" not in splits(data):
        return None
    return kind.open(data, "validation")
