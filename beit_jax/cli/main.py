"""The `beit-jax` command: the table of its commands, and `main`.

A command's module is imported when that command is named, so that ``beit-jax --help`` loads neither JAX nor Pillow.
"""

import atexit
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from beit_jax.errors import BeitJaxError
from beit_jax.memory import keep_freed_memory, leave_objects
from beit_jax.terminal import reader_left


@dataclass(frozen=True)
class Command:
    """Where a command is defined.

    Attributes:
        module: its module in `beit_jax.cli`.
        function: its function there, from whose signature and docstring tyro makes the options and their help.
        summary: the line of ``beit-jax --help``, which is the first line of the command's docstring.
    """

    module: str
    function: str
    summary: str

    def load(self) -> Callable[..., Any]:
        """Imports the module and returns the function."""
        function: Callable[..., Any] = getattr(import_module(f"beit_jax.cli.{self.module}"), self.function)
        return function


COMMANDS: Mapping[str, Command] = {
    "demo": Command(
        "conversion",
        "demo",
        "Convert the embedded digits classifier, compare it with PyTorch, classify images. Needs no network and no "
        "torch.",
    ),
    "list": Command(
        "listing", "list_published", "List the published checkpoints: name, size, accuracy and where they are."
    ),
    "inspect": Command(
        "conversion",
        "inspect",
        "Say what a checkpoint is and whether it can be converted, without reading its tensors.",
    ),
    "convert": Command(
        "conversion",
        "convert",
        "Convert a PyTorch checkpoint into a native one: config.json, preprocessor_config.json, "
        "flax_model.safetensors.",
    ),
    "parity": Command(
        "conversion",
        "parity",
        "Run transformers and the converted model on the same input and compare stage by stage.",
    ),
    "classify": Command("inference", "classify", "Print the most probable classes of images."),
    "features": Command("inference", "features", "Write the features of images to a NumPy .npz file."),
    "segment": Command(
        "inference",
        "segment",
        "Name the class of every pixel of an image: a picture with a legend, a label map, or both.",
    ),
    "evaluate": Command(
        "evaluating",
        "evaluate",
        "Score a checkpoint on labelled images: top-1 and top-5 of a classifier, or mIoU, mAcc and aAcc of "
        "segmentation.",
    ),
    "export": Command(
        "conversion",
        "export",
        "Give a model back to PyTorch: the inverse of convert, through the same tables, bit for bit.",
    ),
    "reconstruct": Command(
        "inference",
        "reconstruct",
        "Hide patches of images from a pre-trained model and show what it predicts there, decoded to pixels.",
    ),
    "plot": Command(
        "plot",
        "plot",
        "Draw what a model attends to, its position bias, how training went, or how far parity is. Needs matplotlib.",
    ),
    "prepare": Command(
        "preparing",
        "prepare",
        "Write a data set as `beit-jax train` and `evaluate` read it: TFDS in ArrayRecord files, without TensorFlow.",
    ),
}

RECIPE_COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "training",
        "train_command",
        "Train: pre-train, fine-tune, segment or probe by a recipe, sharded over all devices, resumable to the bit.",
    ),
    "tokenize": Command(
        "training",
        "tokenize_command",
        "Compute the visual tokens of pre-training once, for runs that see the same images in the same views.",
    ),
    "aot": Command(
        "training",
        "aot_command",
        "Compile the step of a recipe for TPUs that are not here: does it fit, and how fast could it be?",
    ),
}
"""Commands whose options and help depend on the recipe that the arguments name: `Command.function` takes the arguments
and returns the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: the command's own; 1 too if the reader of standard output has left; 2 for a mistake of the user.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` blocks clean up
    if arguments is None:  # this process is the command's own
        arguments = sys.argv[1:]
        keep_freed_memory()
        atexit.register(leave_objects)
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            commands(arguments),
            prog="beit-jax",
            description="BEiT and Data2Vec-Vision in JAX: convert PyTorch checkpoints, prove them equal, use them. "
            "Begin with: beit-jax demo",
            args=arguments,
            config=(FlagCreatePairsOff,),
        )
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not reader_left():
            raise
        return 1
    except BeitJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 130


def commands(arguments: Sequence[str]) -> dict[str, Callable[..., int]]:
    """Name to function of all commands. Only the named command is imported; the others are there for ``--help``."""
    first = arguments[0] if arguments else ""
    every = first.startswith("--tyro-")  # tyro's completion scripts hold the options of all commands
    found: dict[str, Callable[..., int]] = {}
    for name, command in {**COMMANDS, **RECIPE_COMMANDS}.items():
        if not every and name != first:
            found[name] = _placeholder(command.summary)
        else:
            found[name] = command.load() if name in COMMANDS else command.load()(arguments)
    return found


def _placeholder(summary: str) -> Callable[[], int]:
    """Stands for a command that the arguments do not name."""

    def placeholder() -> int:
        raise AssertionError("the command was not loaded")

    placeholder.__doc__ = summary
    return placeholder


if __name__ == "__main__":
    sys.exit(main())
