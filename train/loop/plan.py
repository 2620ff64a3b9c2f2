"""A training run, resolved: every choice made and every shape known before an array exists."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from beit_jax import weights
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor
from beit_jax.terminal import Progress, no_progress
from beit_jax.tokenizers.tokenizer import read_tokenizer

from ..data.batches import Dataset, splits, train_batches
from ..data.stored_tokens import StoredTokens, token_contract, write_tokens
from ..distributed.sharding import check_batch, make_mesh
from ..objectives.model_config import image_processor
from ..objectives.supervised import Classification, Probe, Segmentation
from ..objectives.task import Images, Sources
from ..objectives.unsupervised import Data2vec, Dvae, MaskedTokens, Vqkd
from ..recipe import UNSUPERVISED, Objective, Recipe
from ..step.optim import optimizer
from .program import Program, learning_rates


@dataclass(frozen=True)
class Plan(Program):
    """What a run consists of: a program, and what it reads.

    Attributes:
        validation: None where the data has no such split, which only learning without labels can do without.
    """

    processor: ImageProcessor
    sources: Sources
    training: Images
    validation: Images | None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.training) // self.recipe.data.batch_size


Kind = (
    type[Classification]
    | type[Segmentation]
    | type[Probe]
    | type[MaskedTokens]
    | type[Data2vec]
    | type[Vqkd]
    | type[Dvae]
)
KINDS: Mapping[Objective, Kind] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "linear_probe": Probe,
    "masked_tokens": MaskedTokens,
    "data2vec": Data2vec,
    "vqkd": Vqkd,
    "dvae": Dvae,
}
_SOURCES: Mapping[str, Sequence[Objective]] = {
    "init": ("classification", "segmentation", "linear_probe", "masked_tokens", "data2vec"),
    "tokenizer": ("masked_tokens",),
    "decoder": ("masked_tokens",),
    "stored-tokens": ("masked_tokens",),
    "teacher": ("vqkd",),
}
"""What each option that names something to read is for."""


def make_plan(
    recipe: Recipe,
    data: Path,
    init: Path | None = None,
    *,
    tokenizer: Path | None = None,
    decoder: Path | None = None,
    stored_tokens: Path | None = None,
    teacher: Path | None = None,
) -> Plan:
    """Resolves a checked recipe against the data, what else it reads, and the devices.

    Args:
        init: native checkpoint that training starts from.
        tokenizer, decoder: native tokenizer, and decoder of its tokens, of pre-training on visual tokens.
        stored_tokens: the tokens themselves, stored for this recipe, data and tokenizer by `beit-jax tokenize`.
        teacher: native checkpoint that a tokenizer learns from.

    Raises:
        BeitJaxError: data or checkpoints that are missing, not asked for, or do not fit the recipe or each other; a
            mesh that does not fit the devices; fewer images than a batch.
    """
    given = {
        "init": init,
        "tokenizer": tokenizer,
        "decoder": decoder,
        "stored-tokens": stored_tokens,
        "teacher": teacher,
    }
    for name, path in given.items():
        if path is not None and recipe.objective not in _SOURCES[name]:
            raise BeitJaxError(f"--{name}: {recipe.objective} does not use it, leave it out; found {path}")
    kind = KINDS[recipe.objective]
    training, validation = kind.open(data, "train"), _validation(kind, recipe, data)
    if validation is not None and training.labels != validation.labels:
        raise BeitJaxError(f"{data}: the splits train and validation have different labels; prepare them together")
    mesh = make_mesh(recipe.run.mesh)
    _check_sizes(recipe, data, training, validation, mesh)
    sources = Sources(
        start=None if init is None else weights.load(init),
        tokenizer=None if tokenizer is None else read_tokenizer(tokenizer),
        decoder=None if decoder is None else read_tokenizer(decoder),
        teacher=None if teacher is None else weights.load(teacher),
    )
    config = kind.configure(recipe, training.labels, sources)
    rates = learning_rates(recipe, len(training))
    task = kind(recipe, config, sources, len(rates))
    if stored_tokens is not None:
        assert isinstance(task, MaskedTokens)
        sources = replace(sources, tokens=_stored(stored_tokens, task, training))
        task = replace(task, sources=sources)
    return Plan(
        recipe=recipe,
        config=config,
        processor=image_processor(recipe, config),
        sources=sources,
        training=training,
        validation=validation,
        mesh=mesh,
        task=task,
        tx=optimizer(recipe.optim, config),
        rates=rates,
    )


def store_tokens(plan: Plan, directory: Path, progress: Progress = no_progress, *, overwrite: bool = False) -> int:
    """Computes the tokens of all images of a run, as its steps would, and writes them; how many images that are.

    Raises:
        BeitJaxError: as `stored_tokens.write_tokens`; a run of another kind, or of several hosts.
    """
    task, size = plan.task, plan.recipe.data.batch_size
    if not isinstance(task, MaskedTokens) or not isinstance(plan.training, Dataset):
        raise BeitJaxError(f"{plan.recipe.name}: {plan.recipe.objective} predicts no tokens; choose another recipe")
    if jax.process_count() > 1:
        raise BeitJaxError("tokenize runs on one host; start one process")
    positions = plan.steps * size
    with train_batches(plan.training, plan.recipe.data, task.views, seed=plan.recipe.run.seed, start_step=0) as batches:
        write_tokens(
            directory,
            batches,
            task.tokens_of,
            tokens_contract(task, plan.training),
            positions=positions,
            patches=prod(task.config.grid),
            vocab_size=task.config.vocab_size,
            progress=progress,
            overwrite=overwrite,
        )
    return positions


def tokens_contract(task: MaskedTokens, images: Images) -> dict[str, Any]:
    """What tokens must have been computed from to be those of a run."""
    recipe = task.recipe
    return token_contract(images.contract(), recipe.run.seed, task.views, task.tokenizer, recipe.tokens.dtype)


def _stored(directory: Path, task: MaskedTokens, images: Images) -> StoredTokens:
    tokens = StoredTokens.open(directory, tokens_contract(task, images))
    needed = task.steps * task.recipe.data.batch_size
    if tokens.positions < needed:
        raise BeitJaxError(
            f"{directory}: tokens of {tokens.positions:,} images ({tokens.epochs:g} epochs) are stored, "
            f"the run sees {needed:,}; store those of more epochs, or train for fewer"
        )
    return tokens


def _check_sizes(recipe: Recipe, data: Path, training: Images, validation: Images | None, mesh: Mesh) -> None:
    """Refuses batches that images or devices cannot fill."""
    size = recipe.data.batch_size
    if len(training) < size:
        raise BeitJaxError(f"{data}: {len(training)} training images, fewer than --data.batch-size {size}")
    check_batch(size, mesh, parts=recipe.optim.accumulate)
    if validation is None or recipe.objective == "segmentation":  # which evaluates images one by one
        return
    check_batch(recipe.eval_batch_size, mesh, option="--data.eval-batch-size")
    if recipe.objective in UNSUPERVISED and len(validation) < recipe.eval_batch_size:  # in whole batches
        raise BeitJaxError(
            f"{data}: {len(validation)} images to evaluate, fewer than --data.eval-batch-size {recipe.eval_batch_size}"
        )


def _validation(kind: Kind, recipe: Recipe, data: Path) -> Images | None:
    if recipe.objective in UNSUPERVISED and "validation" not in splits(data):
        return None
    return kind.open(data, "validation")
