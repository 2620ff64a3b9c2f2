"""Adapters (LoRA and its relatives, saved by peft): refused, because nothing here applies them to the weights.

transformers applies an adapter that lies beside a model's weights; without it the same directory is another model.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MERGE = "load it with its adapter in peft, and convert what model.merge_and_unload().save_pretrained(DIRECTORY) writes"

_NAMES = re.compile(
    r"^base_model\.model\.|(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|ia3_\w+|oft_\w+|hada_\w+)(\.|$)"
)


def refuse_adapter(directory: Path) -> None:
    """Refuses a directory that holds an adapter, beside the weights of a model or alone.

    Raises:
        BeitJaxError: names the file, the model that the adapter changes, and how to merge both.
    """
    present = [name for name in (CONFIG, *WEIGHTS) if os.path.lexists(directory / name)]
    if not present:
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
