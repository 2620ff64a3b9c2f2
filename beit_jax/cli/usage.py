"""How a command line is read: tyro makes the options from a function's signature; a mistake is one line.

tyro answers a mistake with a box of up to forty lines, and its "perhaps you meant" looks at all commands. Its hook for
mistakes, `tyro._errors`, is not part of its interface: where it is missing, tyro's boxes remain.
"""

import ast
import difflib
import inspect
import io
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from dataclasses import is_dataclass, replace
from functools import partial
from types import NoneType
from typing import Annotated, Any, NoReturn, Union, get_args

import tyro
from tyro.conf import FlagCreatePairsOff, arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from beit_jax.errors import BeitJaxError, printable

try:
    from tyro import _errors as mistakes
except ImportError:  # another release of tyro
    mistakes = None  # type: ignore[assignment]

Function = Callable[..., int]


def run(function: Function, prog: str, arguments: Sequence[str], *, of_recipe: bool) -> int:
    """Calls a command's function with the arguments of a command line, and returns its exit code.

    Args:
        prog: the words before the arguments: "beit-jax convert".
        of_recipe: the first argument names a recipe, which decides what the options are. Each of its switches may be on
            by default, and therefore has a form with "no-", too. Elsewhere switches are off by default.

    Raises:
        BeitJaxError: the arguments are not those of the function; names the nearest option.
        SystemExit: ``--help`` was given, and printed.
    """
    with _one_line(function, prog, arguments, of_recipe=of_recipe):
        switches = () if of_recipe else (FlagCreatePairsOff,)
        return tyro.cli(
            function,
            prog=prog,
            description=_description(function),
            args=list(arguments),
            config=switches,
            registry=_registry(),
        )


COMPLETION = {"--tyro-print-completion": "SHELL", "--tyro-write-completion": "SHELL FILE"}
"""tyro's options for completion scripts, and their values."""
SHELLS = ("bash", "zsh", "tcsh", "fish")


def completion(functions: dict[str, Function], prog: str, arguments: Sequence[str]) -> NoReturn:
    """Prints or writes tyro's completion script for a shell, with the options of all commands.

    Raises:
        BeitJaxError: another number of values than `COMPLETION` says, or another shell than `SHELLS`.
        SystemExit: the script was printed or written.
    """
    option, *values = arguments
    if len(values) != len(COMPLETION[option].split()) or values[0] not in SHELLS:
        found = " ".join(map(printable, values)) or "nothing"
        raise BeitJaxError(f"{option}: expected {COMPLETION[option]}, of {_listed(SHELLS, 'or')}; found {found}")
    tyro.extras.subcommand_cli_from_dict(functions, prog=prog, args=list(arguments), config=(FlagCreatePairsOff,))
    raise AssertionError("tyro ends the process")


def _description(function: Function) -> str:
    """A function's docstring without its arguments, for this terminal.

    tyro prints a paragraph as one line of any length, but keeps a line that begins with no letter: hence the indent.
    """
    text = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    wrap = partial(
        textwrap.fill,
        width=max(shutil.get_terminal_size().columns, 20),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n\n".join(block if "\n  " in block else wrap(block) for block in text.split("\n\n"))


def _registry() -> ConstructorRegistry:
    """tyro's reading of a group of options, a dataclass, except for how an option that may be None is shown.

    tyro shows it as "--clip {None}|FLOAT  (default: None)", which tells nobody what happens by default: its text does.
    """
    registry = ConstructorRegistry()
    asked: list[Any] = []  # the groups that tyro's own rule is being asked about

    @registry.struct_rule
    def group(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not is_dataclass(info.type) or info.type in asked:
            return None
        asked.append(info.type)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asked.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        return replace(spec, fields=tuple(map(_in_words, spec.fields)))

    return registry


def _in_words(option: StructFieldSpec) -> StructFieldSpec:
    """The option without "None", unless None is what somebody has to say to take the default back.

    A switch that is off by default says what it does when given, and nothing else.
    """
    kind, *notes = get_args(option.type) if hasattr(option.type, "__metadata__") else (option.type,)
    if kind is bool and option.default is False:
        quiet: Any = Annotated[(kind, arg(help_behavior_hint=""), *notes)]
        return replace(option, type=quiet)
    kinds = tuple(each for each in get_args(kind) if each is not NoneType)
    if NoneType not in get_args(kind) or is_dataclass(kinds[0]):
        return option
    either: Any = Union[kinds]  # noqa: UP007
    values = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(either, set()))
    if not isinstance(values, PrimitiveConstructorSpec):
        return option
    if option.default is None:
        shown = arg(metavar=values.metavar, help_behavior_hint="")
    else:
        shown = arg(metavar=f"{values.metavar}|None")
    noted: Any = Annotated[(kind, shown, *notes)]  # what stands in `notes` goes first
    return replace(option, type=noted)


def nearest(word: str, words: Sequence[str]) -> str:
    """ "; the nearest is WORD" for messages, or nothing where none is near."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}" if near else ""


def _one_line(
    function: Function, prog: str, arguments: Sequence[str], *, of_recipe: bool
) -> AbstractContextManager[None]:
    """Makes tyro raise a BeitJaxError for a mistake, instead of printing a box and ending the process."""
    if not hasattr(mistakes, "on_parse_error"):
        return nullcontext()
    name = prog.rpartition(" ")[2]

    def said(event: Any) -> str | None:
        path, known = _level(function, arguments)
        match event:
            case mistakes.UnrecognizedArgs(tokens=tokens):
                text = _unknown(tokens, name, known)
            case mistakes.MissingArgs(unrecognized_tokens=[_, *_] as tokens) if any(map(_is_option, tokens)):
                text = _unknown(tokens, name, known)  # a misspelt option is missing, too
            case mistakes.MissingArgs(missing_arguments=missing):
                named = _listed([_spelled(entry.arg) for entry in missing], "and")
                text = f"{name}: {named} {'is' if len(missing) == 1 else 'are'} missing"
            case mistakes.MissingSubcommand(subcommand_spec=choices):
                text = f"{name}: expected {_listed(list(choices.parser_from_name), 'or')} after it"
            case mistakes.InvalidChoice(argument=argument, value=value, choices=choices):
                words = sorted({*choices} - {"None"}, key=_metavar(argument).find)
                expected = _listed(words, "or")
                text = f"{_flag(argument)}: expected {expected}, found {printable(value)}{nearest(value, words)}"
            case mistakes.BadValue(argument=argument) | mistakes.InstantiationFailure(argument=argument) if argument:
                found = " ".join(map(printable, _values(argument, arguments))) or "nothing"
                text = f"{_flag(argument)}: expected {_metavar(argument)}, found {found}"
            case _:  # a kind that this module does not know
                return None
        recipe = [word for word in arguments[:1] if of_recipe and not word.startswith("-")]
        return f"{text}; see {' '.join([prog, *recipe, *path])} --help"

    def refuse(event: Any) -> None:
        try:
            line = said(event)
        except (
            AttributeError,
            StopIteration,
        ):  # another release of tyro, with other names: its box remains
            return
        if line is not None:
            raise BeitJaxError(line)

    hook: AbstractContextManager[None] = mistakes.on_parse_error(refuse)
    return hook


def _unknown(tokens: Sequence[str], name: str, known: Sequence[str]) -> str:
    token = next(filter(_is_option, tokens), tokens[0]).partition("=")[0]
    if _is_option(token):
        flags = [flag for flag in known if flag.startswith("-")]
        return f"{printable(token)}: {name} has no such option{nearest(token.replace('_', '-'), flags)}"
    words = [word for word in known if not word.startswith("-")]
    expected = f", expected {_listed(words, 'or')}" if words else ""
    return f"{printable(token)}: {name} takes no such argument{expected}{nearest(token, words)}"


def _level(function: Function, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Where the arguments lead: the kinds that they name (as of `plot`); and the flags and kinds that may be there."""
    with redirect_stdout(io.StringIO()) as script, suppress(SystemExit):
        tyro.cli(function, args=["--tyro-print-completion", "bash"])
    line = next(line for line in script.getvalue().splitlines() if line.startswith("COMPLETION_SPEC = "))
    level, path = ast.literal_eval(line.partition(" = ")[2]), []
    for argument in arguments:
        if argument in level["subcommands"]:
            level = level["subcommands"][argument]
            path.append(argument)
    return path, [*(flag for option in level["options"] for flag in option["flags"]), *level["subcommands"]]


def _is_option(token: str) -> bool:
    return token.startswith("-") and token not in ("-", "--")


def _flag(argument: Any) -> str:
    """The name of an argument in messages: its last flag, which is the long one, or how help calls its place."""
    if not argument.is_positional():
        return str(argument.lowered.name_or_flags[-1])
    metavar = str(argument.lowered.metavar)
    return str(argument.field.intern_name).upper() if metavar.startswith("{") else metavar


def _spelled(argument: Any) -> str:
    return _flag(argument) if argument.is_positional() else f"{_flag(argument)} {_metavar(argument)}"


def _metavar(argument: Any) -> str:
    return str(argument.lowered.metavar).replace("{None}|", "").replace("{None,", "{")


def _values(argument: Any, arguments: Sequence[str]) -> Iterator[str]:
    """The values that were given to an argument, as far as they can be told: those after its last flag."""
    for place in reversed(range(len(arguments))):
        flag, sign, value = arguments[place].partition("=")
        if flag.replace("_", "-") in argument.lowered.name_or_flags:
            if sign:
                yield value
            for word in arguments[place + 1 :]:
                if _is_option(word) and not word[1:2].isdigit():
                    return
                yield word
            return


def _listed(words: Sequence[str], last: str) -> str:
    """ "a, b or c"."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
