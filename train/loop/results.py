"""The models that a run writes: those of its end, and the best ones beside them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from beit_jax.adapters.file import AdapterRecord, save_adapter
from beit_jax.atomic import new_directory
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError
from beit_jax.hub import WEIGHTS
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, save_tokenizer
from beit_jax.tree import flatten
from beit_jax.weights.native import NATIVE, NativeCheckpoint, is_native, save
from beit_jax.weights.tensors import read_metadata

from ..distributed.collectives import on_host
from ..step.state import State

if TYPE_CHECKING:
    from ..objectives.objective import Result
    from .plan import Plan

BEST = "best"


def write_results(
    plan: "Plan", state: State, out: Path, facts: Mapping[str, Any], named: Callable[[str], str] = str
) -> tuple[Path, ...]:
    """Writes the models that a state makes. All processes call it; the first one writes.

    Args:
        out: directory of the run.
        facts: what the record of where a model comes from says beside its recipe and data.
        named: the directory's name in `out`, of the name of a result.

    Returns:
        The directories.

    Raises:
        BeitJaxError: a directory cannot be written; the disk is full, for example.
    """
    written, adapters = [], plan.objective.adapters(state)
    for name, result in plan.objective.results(plan.whole(state)).items():
        leaves = {path: on_host(leaf) for path, leaf in flatten(result.params).items()}
        adapter = adapters.get(name)
        if adapter is not None:
            adapter = replace(adapter, factors={path: on_host(leaf) for path, leaf in adapter.factors.items()})
        directory = out / named(name)
        if jax.process_index() == 0:
            _write(plan, directory, result, leaves, adapter, facts)
        written.append(directory)
    return tuple(written)


def best_name(result: str) -> str:
    """The directory of the best of a result: best, best-ema, best-decoder."""
    return BEST if result in ("model", "tokenizer") else f"{BEST}-{result.removeprefix('model-')}"


def best_kept(out: Path) -> Mapping[str, Any]:
    """What the best model of a run says of itself: `best.Best.as_dict`. Empty if there is none that says so.

    Raises:
        BeitJaxError: it cannot be read.
    """
    directory = out / BEST
    if not is_native(directory):
        return {}
    try:
        provenance = json.loads(read_metadata(directory / WEIGHTS)["provenance"])
    except BeitJaxError as error:
        raise BeitJaxError(f"{error}; the run's best model is damaged: move {directory} away to go on") from None
    found = provenance.get(BEST)
    return found if isinstance(found, Mapping) else {}


def _write(
    plan: "Plan",
    directory: Path,
    result: "Result",
    leaves: dict[str, np.ndarray],
    adapter: AdapterRecord | None,
    facts: Mapping[str, Any],
) -> None:
    provenance = {
        "source": f"beit-jax train {plan.recipe.name}",
        "recipe": plan.recipe.as_dict(),
        "data": plan.training.contract(),
        **facts,
    }
    # What a person has put there is kept, because it is too late to refuse it.
    with new_directory(directory, overwrite=True, contents=NATIVE, keep_others=True) as partial:
        if isinstance(result.config, BeitConfig):
            save(partial, NativeCheckpoint(result.config, plan.processor, leaves, provenance))
            if adapter is not None:
                save_adapter(partial, adapter)
        else:
            save_tokenizer(partial, TokenizerCheckpoint(result.config, leaves, provenance))
