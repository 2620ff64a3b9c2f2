"""What a run's directory promises: recipe, data, start and versions it was begun with; checked when it goes on."""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import jax

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import read_json
from beit_jax.output import new_file
from beit_jax.tokenizer import TokenizerCheckpoint
from beit_jax.weights import NativeCheckpoint

from .plan import Plan
from .recipe import Resume

RUN = "run.json"

# What may change from one start to the next: nothing here changes what is computed, but for rounding.
FREE = {
    "recipe.run.mesh",
    "recipe.run.log_every",
    "recipe.run.save_every",
    "recipe.run.keep",
    "recipe.run.eval_every_epochs",
    "recipe.run.hang_minutes",
    "recipe.run.profile_steps",
    "recipe.data.workers",
    "recipe.data.eval_batch_size",
    "recipe.data.max_bad",
    "recipe.model.remat",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")


def begin(plan: Plan, out: Path, resume: Resume) -> list[str]:
    """Makes the directory of a new run, or checks that of an earlier one.

    Returns:
        Notes for people: what differs from the earlier run without being refused.

    Raises:
        BeitJaxError: `resume` does not fit what is there; the directory holds something else; another recipe, other
            data, another start.
    """
    if resume not in get_args(Resume):
        raise BeitJaxError(f"--resume: expected auto, must or never, found {printable(resume)}")
    path = out / RUN
    if path.exists():
        if resume == "never":
            raise BeitJaxError(f"{out}: holds a run already; choose another --out, or continue it with --resume auto")
        return _compare(path, read_json(path), _record(plan))
    if resume == "must":
        raise BeitJaxError(f"{out}: holds no run to continue ({RUN} is missing); check --out, or use --resume auto")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BeitJaxError(f"{out}: holds something else than a run; choose another --out")
    if jax.process_index() == 0:
        if not out.parent.is_dir():
            raise BeitJaxError(f"{out.parent}: no such directory; make it first")
        out.mkdir(exist_ok=True)
        with new_file(path) as partial:
            partial.write_text(json.dumps(_record(plan), indent=2) + "\n", encoding="utf-8")
    return []


def _record(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": plan.recipe.as_dict(),
        "data": {
            "train": plan.training.contract(),
            "validation": None if plan.validation is None else plan.validation.contract(),
        },
        "start": _origin(plan.sources.start),
        "tokenizer": _origin(plan.sources.tokenizer),
        "teacher": _origin(plan.sources.teacher),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _origin(checkpoint: NativeCheckpoint | TokenizerCheckpoint | None) -> dict[str, Any] | None:
    return None if checkpoint is None else checkpoint.provenance


def _compare(path: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    # Through JSON, as the earlier one came: tuples are lists there.
    changes = list(_changes(earlier, json.loads(json.dumps(now))))
    fatal = [change for change in changes if change[0] not in FREE and not change[0].startswith("versions.")]
    if fatal:
        name, old, new = fatal[0]
        more = f" (and {len(fatal) - 1} more changes)" if len(fatal) > 1 else ""
        raise BeitJaxError(
            f"{path}: the run was begun with {printable(name)} {printable(old)}, now it is {printable(new)}{more}; "
            "give what it was, or choose another --out"
        )
    return [f"{name} was {old}, is {new}: results may differ by rounding" for name, old, new in changes
            if name == "recipe.run.mesh" or name.startswith("versions.")]  # fmt: skip


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
