"""The output directory of transformers' Trainer: its checkpoints, and the one of them that is meant.

The Trainer writes ``checkpoint-N`` after step N, each with `trainer_state.json`, and the weights alone at the end.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePath

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import Source
from beit_jax.json_file import Fields, read_json

from .options import Options

STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d{1,12})")


def located(source: Source, options: Options, holds_weights: Callable[[Path], bool]) -> tuple[Source, tuple[str, ...]]:
    """Returns the checkpoint that is meant where a source is a Trainer's directory, else the source, and notes.

    Args:
        holds_weights: says whether weights lie in a directory itself, `.files.checkpoint.holds_weights`.

    Raises:
        BeitJaxError: the checkpoint that the user asks for is not there, or the source has none; nothing says which was
            best.
    """
    wanted, found = options.checkpoint, _checkpoints(source.path)
    if wanted is None and (not found or holds_weights(source.path)):
        return source, ()
    label = printable(source.path, 1024)
    if not found:
        raise BeitJaxError(
            f"--checkpoint {wanted}: {label} holds no checkpoint-N of transformers' Trainer; leave it out"
        )
    listed = ", ".join(str(step) for step in sorted(found)[-10:])
    if wanted == "best":
        step = _best(source.path, found, listed)
    else:
        step = max(found) if wanted in (None, "latest") else int(wanted)
    if step not in found:
        raise BeitJaxError(f"--checkpoint {wanted}: {label} holds the checkpoints {listed}; choose one of them")
    which = {None: "the latest", "latest": "the latest", "best": "the best"}.get(wanted, "as asked")
    note = f"{found[step].name} taken, {which} of {listed} (--checkpoint latest, best or N)"
    return replace(source, path=found[step]), (note,)


def holds_checkpoints(path: Path) -> bool:
    """True for a Trainer's directory with a checkpoint of some step in it."""
    return bool(_checkpoints(path))


def _checkpoints(directory: Path) -> Mapping[int, Path]:
    """The directories of checkpoints by their step; nothing where `directory` is a file or cannot be read."""
    try:
        names = os.listdir(directory)
    except OSError:  # whoever opens it says what is wrong with it
        return {}
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return {int(match[1]): directory / match[0] for match in matches if (directory / match[0]).is_dir()}


def _best(directory: Path, found: Mapping[int, Path], listed: str) -> int:
    """The step that the Trainer's own record calls the best. Raises `BeitJaxError` if it calls none so."""
    file = next((path for path in (found[max(found)] / STATE, directory / STATE) if path.exists()), None)
    if file is None:
        raise BeitJaxError(
            f"--checkpoint best: {printable(found[max(found)] / STATE, 1024)}: no such file, which would say it; "
            f"choose one of {listed}"
        )
    known = {key: value for key, value in read_json(file).items() if value is not None}
    path = Fields(known, str(file)).typed("best_model_checkpoint", str, "")
    match = _NAME.fullmatch(PurePath(path.replace("\\", "/")).name)  # the directory may have been moved since
    if match is None:
        raise BeitJaxError(
            f"--checkpoint best: {printable(file, 1024)} names none (its training compared no score): choose one of "
            f"{listed}"
        )
    return int(match[1])
