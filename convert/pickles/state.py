"""Finds the weights among the entries of a training checkpoint, and keeps the other settings as plain data."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beit_jax.errors import BeitJaxError, printable

from .module import module_tensors
from .names import Forbidden, Global, Module, Namespace, NumpyDtype, PickledTensor, Storage, UnsupportedTensor

# Programs that save whole objects of their own beside the weights, by an entry that only their files have.
_TRAINERS = {"pytorch-lightning_version": "Lightning", "message_hub": "mmengine"}

WRAPPERS = ("state_dict", "model", "module", "model_ema", "state_dict_ema", "student", "teacher")
_TRAINED = ("state_dict", "model", "module")
SETS = {"model": _TRAINED, "raw": _TRAINED, "ema": ("model_ema", "state_dict_ema", "teacher")}
"""The names that training loops give to the trained weights and to their moving average (DINO, iBOT: the teacher)."""

# Programs that exchange the two when they save: what is called the state dict is the average. By the entry of the raw
# weights, mmengine's EMAHook and the callbacks WeightAveraging of Lightning 2.6.
_EXCHANGED = {"ema_state_dict": "mmengine", "current_model_state": "Lightning"}

_FEW = 8  # tensors of no encoder

_MAX_VALUES = 10_000  # settings kept of one entry
_MAX_DEPTH = 32
_MAX_ENTRIES = 100

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


class _TooLarge(ValueError):
    """An entry is no settings: it holds tensors, or too many values."""


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
        raise BeitJaxError(f"{label} holds a {_kind(top)}; expected a state dict of tensors")
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
    metadata, noted = _settings(others)
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


def passed_over(top: object, forbidden: Sequence[str], label: str) -> tuple[str, ...]:
    """Says which entries beside the weights hold objects of classes that no checkpoint needs, and are left unread.

    Training programs whose files are known (`_TRAINERS`) keep such objects, as histories and settings. In any other
    file, and among the weights, they are refused.

    Raises:
        BeitJaxError: names what the file asks for.
    """
    if not forbidden:
        return ()
    trainer = next((name for key, name in _TRAINERS.items() if isinstance(top, dict) and key in top), None)
    if trainer is None or not isinstance(top, dict) or any(_is_forbidden(top.get(key)) for key in WRAPPERS):
        raise refused(label, forbidden)
    entries = [printable(key, 60) for key, value in top.items() if _is_forbidden(value)]
    asked = ", ".join(printable(name, 100) for name in forbidden[:8])
    more = f" and {len(forbidden) - 8} more" if len(forbidden) > 8 else ""
    return (f"{' and '.join(entries) or 'objects'} of {trainer} passed over unread: they ask for {asked}{more}",)


def _is_forbidden(value: object) -> bool:
    """True if a value is, or holds anywhere, what a forbidden name would have made."""
    waiting, seen = [value], set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, Forbidden):
            return True
        if isinstance(found, Namespace | Module):
            found = found.values if isinstance(found, Namespace) else found.attributes
        if isinstance(found, dict | list | tuple) and id(found) not in seen:
            seen.add(id(found))
            waiting.extend(found.values() if isinstance(found, dict) else found)
    return False


_QUANTISERS = {
    "torchao.": "torchao",
    "optimum.quanto.": "quanto",
    "bitsandbytes.": "bitsandbytes",
    "torch.qint": "PyTorch (torch.ao.quantization)",
    "torch.quint": "PyTorch (torch.ao.quantization)",
    "torch._utils._rebuild_qtensor": "PyTorch (torch.ao.quantization)",
}
"""Who wrote a pickle of quantised weights, by names that it asks for."""


def refused(label: str, forbidden: Sequence[str]) -> BeitJaxError:
    """Returns the error of a file whose pickle asks for names that no checkpoint needs."""
    names = sorted(forbidden, key=lambda name: name.startswith("torch."))  # torch's own say less about the file
    listed = ", ".join(printable(name) for name in names[:8]) + (
        f" and {len(names) - 8} more" if len(names) > 8 else ""
    )
    if any(name.startswith("torch.nn.") for name in names):
        return BeitJaxError(
            f"refused: {label} is a whole-module pickle (it asks for {listed}); expected a state dict: "
            "where its code is at hand and trusted, save module.state_dict() instead"
        )
    if any(name.startswith("torch.distributed.") for name in names):
        return BeitJaxError(
            f"refused: {label} holds tensors that are split among processes (it asks to run {listed}): save there "
            "{n: t.full_tensor() if hasattr(t, 'full_tensor') else t for n, t in model.state_dict().items()} instead, "
            "or write them by torch.distributed.checkpoint.save. Nothing was run"
        )
    library = next((library for name in names for mark, library in _QUANTISERS.items() if name.startswith(mark)), None)
    if library is not None:
        way = "save {n: t.dequantize() for n, t in model.state_dict().items()}, or " * (library == "torchao")
        return BeitJaxError(
            f"refused: {label} holds weights quantised by {library} (it asks to run {listed}); {way}convert the "
            "checkpoint from before. Nothing was run"
        )
    return BeitJaxError(
        f"refused: {label} asks to run {listed}; expected tensors and plain settings only. Nothing was run"
    )


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
            raise BeitJaxError(f"{label} names a tensor {printable(name)}, a {_kind(name)}; expected text")
        if not isinstance(value, Tensor):
            raise BeitJaxError(f"{printable(name)} in the state dict of {label} is a {_kind(value)}; expected a tensor")
        tensors[name] = value
    return tensors


def _settings(others: Mapping[object, object]) -> tuple[dict[str, object], list[str]]:
    """Returns the plain data of the entries beside the weights, and a note for each entry."""
    metadata: dict[str, object] = {}
    notes: list[str] = []
    for key, value in list(others.items())[:_MAX_ENTRIES]:
        name = str(key)
        try:
            if name.startswith("optimizer"):
                raise _TooLarge
            metadata[name] = _Plain().convert(value)
            notes.append(f"{printable(name)} ({_kind(value)}) kept as metadata")
        except _TooLarge:
            notes.append(f"{printable(name)} ({_kind(value)}) ignored")
    if len(others) > _MAX_ENTRIES:
        notes.append(f"{len(others) - _MAX_ENTRIES} further entries ignored")
    return metadata, notes


class _Plain:
    """Copies one entry into dicts, lists and scalars. It counts values, because a pickle can be a graph."""

    def __init__(self) -> None:
        self._left = _MAX_VALUES

    def convert(self, value: object, depth: int = 0) -> object:
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH:
            raise _TooLarge
        match value:
            case None | bool() | int() | float() | str():
                return value
            case bytes():
                return f"<{len(value)} bytes>"
            case Namespace(values=values):
                return self.convert(values, depth + 1)
            case dict():
                return {str(key): self.convert(entry, depth + 1) for key, entry in value.items()}
            case list() | tuple():
                return [self.convert(entry, depth + 1) for entry in value]
            case Global(name=name):
                return name
            case NumpyDtype(code=code):
                return code
            case datetime.datetime() | datetime.date() | datetime.time() | datetime.timedelta() | datetime.timezone():
                return str(value)
        raise _TooLarge


def _kind(value: object) -> str:
    match value:
        case Namespace():
            return "argparse.Namespace"
        case PickledTensor():
            return "tensor"
        case UnsupportedTensor(kind=kind):
            return f"{printable(kind)} tensor"
        case Storage():
            return "storage without a tensor"
        case Global(name=name) | Forbidden(name=name) | Module(kind=name):
            return printable(name)
    return type(value).__name__
