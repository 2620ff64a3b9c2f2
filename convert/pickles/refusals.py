"""What a pickle asks for and does not get: entries that are left unread, and files that are refused."""

from collections.abc import Sequence

from beit_jax.errors import BeitJaxError, printable

from .names import Forbidden, Module, Namespace
from .wrappers import WRAPPERS

# Programs that save whole objects of their own beside the weights, by an entry that only their files have.
_TRAINERS = {"pytorch-lightning_version": "Lightning", "message_hub": "mmengine"}


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
