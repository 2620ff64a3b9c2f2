"""Finds the weights among the entries of a training checkpoint, and keeps the other settings as plain data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from beit_jax.errors import BeitJaxError, printable

from .module import module_tensors
from .names import Module, PickledTensor, UnsupportedTensor
from .settings import kind_of, settings_of
from .wrappers import SETS, WRAPPERS

# Programs that exchange the two when they save: what is called the state dict is the average. By the entry of the raw
# weights, mmengine's EMAHook and the callbacks WeightAveraging of Lightning 2.6.
_EXCHANGED = {"ema_state_dict": "mmengine", "current_model_state": "Lightning"}

_FEW = 8  # tensors of no encoder

Tensor = PickledTensor | UnsupportedTensor


@dataclass(frozen=True)
class State:
    """The weights by name, and plain data of the other entries.

    Attributes:
        notes: lines for the user that say what was taken and what was left out.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, object]
    notes: tuple[str, ...]


def select_state(top: object, prefer: str | None, label: str) -> State:
    """Returns the one state dict in the object that a pickle held.

    Args:
        top: a state dict, or a dict that has one under one of `WRAPPERS`, nested or not, or a module
            (see `module_tensors`).
        prefer: the entry to take if several hold tensors: the name of a wrapper, or one of `SETS`; or what stands
            before the names of one of several models in the state dict.
        label: the file, for messages.

    Raises:
        BeitJaxError: there is no state dict; there are several, and `prefer` names none of them; an entry of the state
            dict is no tensor.
    """
    if isinstance(top, Module) and prefer in (None, "model"):
        return State(module_tensors(top, label), {}, (f"weights taken from a pickled {top.kind}; nothing was run",))
    if not isinstance(top, dict):
        raise BeitJaxError(f"{label} holds a {kind_of(top)}; expected a state dict of tensors")
    content: dict[Any, Any] = top
    if (raw := _exchanged(content)) is not None:
        content, prefer = _in_order(content, raw, prefer, label)
    wrappers = _wrappers(content, prefer, label)
    notes: list[str] = []
    if wrappers:
        inside = [key for key in wrappers if prefer is not None and names_part(prefer, content[key])]
        named = prefer not in (*wrappers, *SETS) and len(inside) == 1
        wrapper = inside[0] if named else _choose(wrappers, prefer, label)
        notes.append(f"weights taken from {wrapper!r}")
        others = {key: value for key, value in content.items() if key != wrapper}
        mapping = content[wrapper]
        while not _holds_tensors(mapping):  # BEiT v2 files: "module" within "model"
            wrapper = _choose([key for key in WRAPPERS if _wraps_tensors(mapping.get(key))], None, label)
            notes.append(f"and from {wrapper!r} in it")
            mapping = mapping[wrapper]
    else:
        if prefer is not None and prefer != "model" and not names_part(prefer, content):
            raise BeitJaxError(f"{label} holds one state dict, and no {printable(prefer)}; leave --weights out")
        others = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
        mapping = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        _refuse_nested(others, bool(mapping), label)
    tensors = _named_tensors(mapping, label)
    metadata, noted = settings_of(others)
    return State(tensors, metadata, (*notes, *noted))


def _exchanged(top: dict[object, object]) -> str | None:
    """The entry of the raw weights in a checkpoint whose state dict is their average; None in any other."""
    meta = top.get("meta")
    mmengine = "message_hub" in top or (isinstance(meta, dict) and "mmengine_version" in meta)
    written = {"ema_state_dict": mmengine, "current_model_state": "averaging_state" in top}
    entries = (key for key in _EXCHANGED if written[key] and _holds_tensors(top.get(key)))
    return next(entries, None) if _holds_tensors(top.get("state_dict")) else None


def _in_order(
    top: dict[object, object], entry: str, prefer: str | None, label: str
) -> tuple[dict[object, object], str]:
    """Returns such a checkpoint with the wanted weights alone, by their names in the model, and their entry."""
    others = {key: value for key, value in top.items() if key not in (entry, "state_dict")}
    if prefer in ("ema", "state_dict"):
        return others | {"state_dict": top["state_dict"]}, "state_dict"
    raw, program = top[entry], _EXCHANGED[entry]
    if prefer in ("raw", "model", entry) and isinstance(raw, dict):
        before = "module." * (program == "mmengine")
        named = {str(key).removeprefix(before): value for key, value in raw.items() if key != "steps"}
        return others | {"state_dict": named}, "state_dict"
    raise BeitJaxError(
        f"{label} holds weights twice, the moving average under 'state_dict' and the weights as trained under "
        f"{entry!r} ({program} exchanges them when it saves): choose one of them, --weights ema or raw"
    )


def _wrappers(content: dict[Any, Any], prefer: str | None, label: str) -> list[str]:
    """The entries that hold weights: `WRAPPERS`, else the one that was named, or the only one that holds tensors.

    Raises:
        BeitJaxError: another entry holds about as many tensors as a known one does, or there are several unknown ones;
            and `prefer` names none of them.
    """
    known = [key for key in WRAPPERS if _wraps_tensors(content.get(key))]
    others = [key for key, value in content.items() if key not in known and isinstance(key, str)]
    others = [key for key in others if _wraps_tensors(content[key])]
    if prefer in others:
        return [prefer]
    if known:
        size = max((len(content[key]) for key in known if _holds_tensors(content[key])), default=0)
        held = [key for key in others if _holds_tensors(content[key]) and not key.startswith("optim")]
        alike = [key for key in held if size >= _FEW and 2 * len(content[key]) >= size]
        if prefer is None and alike:
            found, ways = (
                " and ".join(repr(key) for key in (*known, *alike)),
                " or ".join((*known, *map(printable, alike))),
            )
            raise BeitJaxError(f"{label} holds weights under {found}: choose one of them, --weights {ways}")
        return known
    if any(isinstance(value, Tensor) and not _is_number(value) for value in content.values()):
        return []  # a state dict itself
    inside = [key for key in others if prefer is not None and names_part(prefer, content[key])]
    if len(others) > 1 and len(inside) != 1:
        found = " and ".join(printable(key) for key in others[:5])
        ways = " or ".join(printable(key) for key in others[:5])
        raise BeitJaxError(f"{label} holds weights under {found}: choose one of them, --weights {ways}")
    return inside or others


def _is_number(value: object) -> bool:
    """True for a tensor of one number, as training programs keep the loss."""
    return isinstance(value, PickledTensor) and all(size == 1 for size in value.shape)


def names_part(prefix: str, names: Iterable[object]) -> bool:
    """True if `prefix` is what stands before the names of one of several models among `names`."""
    return any(isinstance(name, str) and name.startswith(f"{prefix}.") for name in names)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(entry, Tensor) for entry in value.values())


def _wraps_tensors(value: object, depth: int = 4) -> bool:
    if _holds_tensors(value):
        return True
    return isinstance(value, dict) and depth > 0 and any(_wraps_tensors(value.get(key), depth - 1) for key in WRAPPERS)


def _choose(wrappers: list[str], prefer: str | None, label: str) -> str:
    """The entry with the wanted name, or the only one of the wanted set."""
    if prefer in wrappers:
        return str(prefer)
    fitting = [key for key in wrappers if prefer is None or key in SETS.get(prefer, ())]
    if prefer in ("model", "raw") and not any(key in WRAPPERS for key in wrappers):
        fitting = wrappers  # the only weights there are
    if len(fitting) == 1:
        return fitting[0]
    found = " and ".join(repr(key) for key in wrappers)
    if not fitting:
        raise BeitJaxError(f"{label} holds weights under {found}: expected {printable(prefer)}; leave --weights out")
    raise BeitJaxError(f"{label} holds weights under {found}: choose one of them, --weights {' or '.join(fitting)}")


def _refuse_nested(others: Mapping[object, object], flat: bool, label: str) -> None:
    keys = ", ".join(printable(key) for key in list(others)[:10]) or "nothing"
    nested = [printable(key) for key, value in others.items() if _holds_tensors(value)]
    if nested or not flat:
        inside = f", tensors only under {', '.join(nested[:10])}" if nested else ""
        raise BeitJaxError(
            f"{label} holds no state dict: found {keys}{inside}; "
            f"expected tensors at the top or under one of {', '.join(WRAPPERS)}"
        )


def _named_tensors(mapping: Mapping[object, object], label: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise BeitJaxError(f"{label} names a tensor {printable(name)}, a {kind_of(name)}; expected text")
        if not isinstance(value, Tensor):
            raise BeitJaxError(
                f"{printable(name)} in the state dict of {label} is a {kind_of(value)}; expected a tensor"
            )
        tensors[name] = value
    return tensors
