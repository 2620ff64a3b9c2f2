"""The record of a run: the recipe, data, sources and versions it was begun with, compared when it goes on."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from beit_jax.atomic import check_place, new_file
from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import Fields, changes, read_json
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint
from beit_jax.version import source_digest
from beit_jax.weights.native import NativeCheckpoint

from ..distributed.collectives import from_first
from ..distributed.peers import Peers
from ..recipe import Recipe, Resume

if TYPE_CHECKING:
    from .plan import Plan

RUN = "run.json"

# What may change from one start to the next: nothing here changes what is computed, but for rounding.
FREE = {
    "recipe.topology",
    "recipe.run.mesh",
    "recipe.run.log_every",
    "recipe.run.save_every",
    "recipe.run.keep",
    "recipe.run.eval_every_epochs",
    "recipe.run.hang_minutes",
    "recipe.run.best",  # what is kept beside the run, and when it ends, change no step of it
    "recipe.run.best_is",
    "recipe.run.patience",
    "recipe.run.profile_steps",
    "recipe.data.workers",
    "recipe.data.eval_batch_size",
    "recipe.data.max_bad",
    "recipe.model.remat",
}
_ELSEWHERE = {
    "recipe.optim.epochs": "let it end and go on from its model, by a schedule of its own: another --out, --init {out}",
}
"""Ways out, other than another place, of a change that is refused."""
PATIENCE = 600.0
"""Seconds that process 0 waits for the others to have read their checkpoints."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")


def begin(plan: "Plan", out: Path, resume: Resume, peers: Peers) -> list[str]:
    """Makes the directory of a new run, or checks that of an earlier one, once all processes agree on what they do.

    Returns:
        Notes for people: what differs from the earlier run without being refused.

    Raises:
        BeitJaxError: `resume` does not fit what is there; the directory holds something else; another recipe, other
            data, another start; a process with other facts than process 0, which is named.
    """
    if resume not in get_args(Resume):
        raise BeitJaxError(f"--resume: expected auto, must or never, found {printable(resume)}")
    record = _record(plan)
    devices = [device.device_kind for device in plan.mesh.local_devices]
    here = {
        "code": source_digest(),
        "python": platform.python_version(),
        "devices": devices,
        "out": str(out.absolute()),
    }
    peers.compare(here | {"mesh": dict(plan.mesh.shape)} | record, patience=PATIENCE)
    notes: list[str] = from_first(lambda: _begin(out, resume, record, plan.recipe))
    return notes


def check_out(out: Path) -> None:
    """Refuses a place where no run can be kept, before data and models are read.

    Raises:
        BeitJaxError: it is a file or a broken link, or it cannot be made.
    """
    if os.path.isdir(out):
        return
    if os.path.lexists(out):
        raise BeitJaxError(f"{printable(out)}: expected a directory for the run, found a file or a broken link")
    check_place(out)


def _begin(out: Path, resume: Resume, record: Mapping[str, Any], recipe: Recipe) -> list[str]:
    check_out(out)
    path = out / RUN
    if path.exists():
        if resume == "never":
            raise BeitJaxError(f"{out}: holds a run already; choose another --out, or continue it with --resume auto")
        return _compare(path, read_json(path), record, recipe)
    if resume == "must":
        raise BeitJaxError(f"{out}: holds no run to continue ({RUN} is missing); check --out, or use --resume auto")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BeitJaxError(f"{out}: holds something else than a run; choose another --out")
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise BeitJaxError(f"{printable(out)}: cannot be made ({error.strerror}); choose another --out") from None
    with new_file(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return []


def _as_read(earlier: Mapping[str, Any], recipe: Recipe, path: Path) -> dict[str, Any]:
    """The options of an earlier recipe that the objective of `recipe` reads.

    An option that is absent, because an older version wrote the file, counts as its default. An option that the
    objective does not read decides nothing, and is left out.
    """
    fields = Fields(earlier, f"{path}: recipe")
    found = {name: value for name, value in earlier.items() if not isinstance(value, Mapping)}
    found.setdefault("published", recipe.published)
    for name, group in recipe.group_types().items():
        defaults = _as_json(asdict(group()))
        given = fields.typed(name, dict, {})
        found[name] = defaults | {option: given[option] for option in defaults.keys() & given.keys()}
    return found


def _with_variant(recipe: Mapping[str, Any], fallback: str) -> dict[str, Any]:
    """A recorded recipe with the variant that decides, whether it was named or is the recipe's own.

    Earlier versions recorded it as if it had always been named.
    """
    model = dict(recipe["model"])
    model["variant"] = model["variant"] or recipe["published"] or fallback
    return {**recipe, "model": model}


def _as_json(content: Any) -> Any:
    """The content as it comes back from JSON: tuples are lists there."""
    return json.loads(json.dumps(content))


def _record(plan: "Plan") -> dict[str, Any]:
    model = asdict(plan.config)
    del model["labels"]  # which are the data's
    return {
        "recipe": plan.recipe.as_dict(),
        "model": model,
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


def _compare(path: Path, earlier: Mapping[str, Any], now: Mapping[str, Any], recipe: Recipe) -> list[str]:
    now, fields = _as_json(now), Fields(earlier, str(path))
    then = {**earlier, "recipe": _as_read(fields.typed("recipe", dict, {}), recipe, path)}
    # Earlier versions kept no architecture, or one of fewer fields.
    then["model"] = {name: fields.typed("model", dict, {}).get(name, value) for name, value in now["model"].items()}
    was, given = ({**each, "recipe": _with_variant(each["recipe"], recipe.fallback)} for each in (then, now))
    found = list(changes(was, given))
    fatal = [change for change in found if change[0] not in FREE and change[0].split(".")[0] != "versions"]
    fatal.sort(key=lambda change: change[0].startswith("model."))  # which follows from the recipe and the start
    fatal.sort(key=lambda change: change[0] not in ("recipe.objective", "recipe.name"))  # the rest follows from them
    if fatal:
        name, old, new = fatal[0]
        more = f" (and {len(fatal) - 1} more changes)" if len(fatal) > 1 else ""
        way = _ELSEWHERE.get(name, "choose another --out").format(out=printable(path.parent))
        raise BeitJaxError(
            f"{path}: the run was begun with {printable(name)} {printable(old)}, now it is {printable(new)}{more}; "
            f"give what it was, or {way}"
        )
    return [f"{name} was {old}, is {new}: results may differ by rounding" for name, old, new in found
            if name == "recipe.run.mesh" or name.startswith("versions.")]  # fmt: skip
