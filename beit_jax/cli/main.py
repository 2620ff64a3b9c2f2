"""The `beit-jax` command: the table of its commands, and `main`.

A command's module is imported when that command is named, so that ``beit-jax --help`` loads neither JAX nor Pillow.
"""

import atexit
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from beit_jax.cli.stopping import Stoppable
from beit_jax.errors import BeitJaxError, notes_of, printable
from beit_jax.memory import keep_freed_memory, leave_objects
from beit_jax.terminal import print_error, reader_left, standard_output
from beit_jax.version import __version__


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
    "features": Command("inference", "features", "Write the features of any number of images to a table."),
    "neighbours": Command(
        "searching",
        "neighbours",
        "Find the images of a table of features that are nearest to given images, or to the rows of another table.",
    ),
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
    "bench": Command(
        "evaluating",
        "bench",
        "Say how fast a forward pass is on this machine, beside the PyTorch libraries and engines that are installed.",
    ),
    "export": Command(
        "conversion",
        "export",
        "Give a model back to PyTorch: the inverse of convert, through the same tables, bit for bit. Or write a "
        "program.",
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
        "Compile the step of a recipe for TPUs or GPUs that are not here: does it fit, and how fast could it be?",
    ),
}
"""Commands whose options and help depend on the recipe that the arguments name: `Command.function` takes the arguments
and returns the command."""

EVERY: Mapping[str, Command] = {**COMMANDS, **RECIPE_COMMANDS}
PROG = "beit-jax"
DESCRIPTION = """BEiT and Data2Vec-Vision in JAX: convert PyTorch checkpoints, prove them equal, use them.

Begin with: beit-jax demo"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: the command's own; 1 too if the reader of standard output has left; 2 for a mistake of the user;
        130 and 143 after SIGINT and SIGTERM.
    """
    alone = arguments is None
    if arguments is None:  # this process is the command's own
        arguments = sys.argv[1:]
        keep_freed_memory()
        atexit.register(leave_objects)
    with Stoppable(alone=alone) as stoppable:
        try:
            with standard_output(alone=alone):
                code = _run(arguments)
        except BrokenPipeError:
            if not reader_left():
                raise
            return 1
        except BeitJaxError as error:
            print_error("; ".join([f"error: {error}", *notes_of(error)]))
            return error.exit_code
        except (RuntimeError, AssertionError):
            reason = _why_no_device()
            if reason is None:
                raise
            print_error(f"error: {reason}")
            return BeitJaxError.exit_code
        except KeyboardInterrupt as stopped:
            print_error("; ".join(["interrupted", *(notes_of(stopped) or ["nothing was kept"])]))
            return getattr(stopped, "exit_code", 130)
        return stoppable.exit_code or code


def _why_no_device() -> str | None:
    """A line that says why JAX has no device at all, as with a misspelt JAX_PLATFORMS; None if it has one.

    JAX raises nothing of its own for it: a RuntimeError, or an AssertionError for a platform that is not installed.
    """
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        if asked:
            return f"JAX_PLATFORMS={printable(asked)}: JAX has no such device here; unset it, or set it to cpu"
        return f"JAX has no device: {printable(error, 240)}"
    return None


def _run(arguments: Sequence[str]) -> int:
    """Carries out the command that the arguments name.

    Raises:
        BeitJaxError: no such command; names the nearest. Or as the command.
        SystemExit: help or a completion script was printed.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if name in ("-h", "--help"):
        print(overview(shutil.get_terminal_size().columns))
        sys.exit(0)
    if name == "--version":
        print(f"{PROG} {__version__}")
        return 0
    from beit_jax.cli import usage  # after the answers that need no tyro

    if name in usage.COMPLETION:
        functions = {command: _function(command, [command]) for command in EVERY}
        usage.completion(functions, PROG, arguments)
    if name not in EVERY:
        found = f"{printable(name)}: no such command{usage.nearest(name, list(EVERY))}"
        if not name or name.startswith("-"):
            found = f"expected a command, found {printable(name) if name else 'nothing'}"
        raise BeitJaxError(f"{found}; see {PROG} --help")
    return usage.run(_function(name, arguments), f"{PROG} {name}", rest, of_recipe=name in RECIPE_COMMANDS)


def overview(width: int) -> str:
    """The text of ``beit-jax --help``, for a terminal of that many columns."""
    indent = max(map(len, EVERY)) + 4
    wrap = partial(textwrap.fill, width=max(width, 2 * indent), break_long_words=False, break_on_hyphens=False)
    rows = [
        wrap(command.summary, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
        for name, command in EVERY.items()
    ]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND ...",
            "",
            *map(wrap, DESCRIPTION.splitlines()),
            "",
            "Commands:",
            *rows,
            "",
            wrap(f"{PROG} COMMAND --help shows the options of a command; {PROG} --version the version."),
        ]
    )


def _function(name: str, arguments: Sequence[str]) -> Callable[..., int]:
    """The function of a command, imported when it is asked for."""
    command = EVERY[name]
    return command.load() if name in COMMANDS else command.load()(arguments)


if __name__ == "__main__":
    sys.exit(main())
