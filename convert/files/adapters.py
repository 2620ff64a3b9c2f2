"""Adapters (LoRA and its relatives, saved by peft) where a model is read: refused, because both make another model.

transformers applies an adapter that lies beside a model's weights. Here ``--base`` does, by `..adapters`.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import ADAPTER, PEFT_WEIGHTS
from beit_jax.json_file import read_json

CONFIG, WEIGHTS = ADAPTER, PEFT_WEIGHTS
MERGE = (
    "beit-jax convert ADAPTER DEST --base MODEL merges LoRA and DoRA; or merge it in peft, and convert what "
    "model.merge_and_unload().save_pretrained(DIRECTORY) writes"
)

_NAMES = re.compile(
    r"^base_model\.model\.|(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|ia3_\w+|oft_\w+|hada_\w+)(\.|$)"
)


def refuse_adapter(directory: Path, known: Path | None = None) -> None:
    """Refuses a directory that holds an adapter, beside the weights of a model or alone, unless it is the `known` one.

    Raises:
        BeitJaxError: names the file, the model that the adapter changes, and how to merge both.
    """
    present = [name for name in (CONFIG, *WEIGHTS) if os.path.lexists(directory / name)]
    if not present or (known is not None and os.path.realpath(directory) == os.path.realpath(known)):
        return
    of = f" of {printable(json.dumps(base))}" if (base := _base(directory / CONFIG)) else ""
    raise BeitJaxError(
        f"{printable(directory / present[0], 1024)}: an adapter{of}, which would not be applied: {MERGE}; to convert "
        "the model without it, move the adapter's files elsewhere"
    )


def _base(config: Path) -> str | None:
    """The model that an adapter says it changes; None where it does not say it readably."""
    try:
        base = read_json(config).get("base_model_name_or_path")
    except BeitJaxError:  # the adapter is refused in any case, and the message is about that
        return None
    return base if isinstance(base, str) else None


def are_adapted(names: Iterable[str]) -> bool:
    """Returns True if tensors have names that peft gives to adapters and to the weights they change."""
    return any(_NAMES.search(name) for name in names)
