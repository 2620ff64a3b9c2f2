"""Commands on recipes: `train`, `tokenize` and `aot`.

`beit_jax.cli.main` imports this module when one of these commands is named: recipes import their objectives, and
objectives import JAX.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from beit_jax.cli.arguments import Json, Switch
from beit_jax.errors import BeitJaxError, needs_extra, printable
from beit_jax.terminal import image_progress, print_json, print_lines

if TYPE_CHECKING:
    from beit_jax.train.distributed.peers import Peers
    from beit_jax.train.forecast.preview import Preview
    from beit_jax.train.loop.run import Outcome

with needs_extra("train"):
    from beit_jax.train.objectives import objective_of
    from beit_jax.train.recipe import MOST, HostOptions, Recipe, Resume, spelled
    from beit_jax.train.recipes import RECIPES, recipe_named


def _read(metavar: str) -> object:
    return arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Reads:
    """What a run reads besides its data: native directories, runs that made them, or what `beit-jax convert` takes."""

    init: Annotated[str | None, _read("CHECKPOINT")] = None
    """Model to start from, of any size: native, a run, or a source of beit-jax convert. By default drawn at random."""
    tokenizer: Annotated[str | None, _read("TOKENIZER")] = None
    """Tokenizer whose tokens are predicted: native, a run that trained it, or a source of beit-jax convert."""
    decoder: Annotated[str | None, _read("DECODER")] = None
    """Decoder of its tokens, for pictures in TensorBoard."""
    stored_tokens: Annotated[Path | None, _read("DIR")] = None
    """The tokens themselves, from beit-jax tokenize with the same recipe, data and tokenizer."""
    teacher: Annotated[str | None, _read("CHECKPOINT")] = None
    """Model whose features a tokenizer learns from; as --init."""

    def loaded(self, recipe: Recipe) -> "dict[str, Any]":
        """Everything as `make_plan` takes it.

        Raises:
            BeitJaxError: the recipe's objective does not read it; or nothing can be read there.
        """
        from beit_jax.cli import sources

        given = {name: name_or_path for name, name_or_path in vars(self).items() if name_or_path is not None}
        for name in given.keys() - objective_of(recipe).reads:
            raise BeitJaxError(f"--{spelled(name)}: {recipe.objective} does not use it, leave it out")
        return {
            name: path if name == "stored_tokens" else sources.READERS[name](name, path) for name, path in given.items()
        }


Options = Any
"""A dataclass of the groups of options of one kind of recipe, which `_options` makes."""
_DATA = "batches"  # field of the group that is called data on the command line, where --data names a directory


def _options(recipe: Recipe) -> tuple[type[Options], Options]:
    """The options of a recipe for the command line: their type, and their values as defaults."""
    entries = [
        (_DATA, Annotated[kind, arg(name="data")]) if name == "data" else (name, kind)
        for name, kind in recipe.group_types().items()
    ]
    kind = make_dataclass("RecipeOptions", entries, frozen=True)
    return kind, kind(**{_DATA if name == "data" else name: options for name, options in recipe.groups().items()})


def _changed(recipe: Recipe, name: str, options: Options) -> Recipe:
    """The recipe with other options, checked.

    Raises:
        BeitJaxError: an option out of its range.
    """
    values = {"data" if field == _DATA else field: value for field, value in vars(options).items()}
    changed = replace(recipe, name=name, **values)
    changed.check()
    return changed


def _refuse_unread(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Refuses an option of another objective in one line.

    Raises:
        BeitJaxError: the recipe's objective does not read an option that another objective reads.
    """
    read = _names(type(recipe))
    elsewhere = set().union(*(_names(type(build())) for build in RECIPES.values())) - read
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
        if argument.startswith("--") and name in elsewhere:
            raise BeitJaxError(f"--{spelled(name)}: {recipe.objective} does not use it, leave it out")


def _names(kind: type[Recipe]) -> set[str]:
    """Every option of a kind of recipe, as "group.option"."""
    return {f"{group}.{entry.name}" for group, options in kind.group_types().items() for entry in fields(options)}


_Switch = FlagCreatePairsOff[Switch]
_RecipeName = Annotated[str, arg(metavar="RECIPE", help=f"One of: {', '.join(RECIPES)}.")]
_Start = Annotated[
    str | None,
    arg(
        metavar="CHECKPOINT",
        help_behavior_hint="",
        help="Model that training will start from, as --init of beit-jax train: it says what the architecture is.",
    ),
]
_Data = Annotated[Path, arg(metavar="DIR", help="Prepared data: beit-jax prepare --help.")]


def train_command(arguments: Sequence[str]) -> Callable[..., int]:
    """The function behind `beit-jax train`; its defaults, and so its help, are those of the recipe that is named.

    Raises:
        BeitJaxError: no such recipe; names the nearest.
    """
    given = _named(arguments, "train")
    kind, defaults = _options(given)

    def train(
        recipe: Positional[_RecipeName],
        *,
        data: _Data,
        out: Annotated[Path, arg(metavar="DIR", help="Where the run is kept; an earlier one there is continued.")],
        reads: Annotated[Reads, arg(name="")] = Reads(),
        resume: Annotated[
            Resume,
            arg(help="Continue where DIR stands if it holds a run; only so; or only if it holds none."),
        ] = "auto",
        dry_run: Annotated[
            _Switch, arg(help="Print the recipe, parameters, memory and operations, trace a step, and stop.")
        ] = False,
        json: Json = False,
        hosts: FlagCreatePairsOff[HostOptions] = HostOptions(),
        options: Annotated[kind, arg(name="")] = defaults,  # type: ignore[valid-type]
    ) -> int:
        resolved = _changed(given, recipe, options)
        return _train(resolved, data, out, reads, resume, hosts, dry_run=dry_run, json=json)

    train.__doc__ = inspect.cleandoc(_HELP).format(about=_about(given))
    return train


_LIST = "Name a recipe before --help to see its numbers."
_HELP = """Train: pre-train, fine-tune, segment or probe by a recipe, sharded over all devices, resumable to the bit.

    {about}

    Exit code 75: stopped by a signal after saving; the same command goes on.

    Try:
      beit-jax prepare digits ./digits && beit-jax train digits_finetune --data ./digits --out ./run
      beit-jax train beit_base_ft1k --data ./imagenet --out ./run --init ./beit-base-pt22k --model.drop-path 0.2
      beit-jax train beit_large_ft1k --data ./imagenet --out ./run --dry-run
      beit-jax train beit_base_ade20k_640 --data ./ade20k --out ./run --init ./beit-base-ft22k
      beit-jax train beit_base_pt1k --data ./imagenet --out ./run --tokenizer ./dvae-encoder
      beit-jax train beit_base_ft1k --data ./mine --out ./run --model.hidden-size 192 --model.heads 3 --model.mlp 768

    On a TPU pod, on GKE and under SLURM the same command on every host is one run; docs/pods.md.
    """


def _train(
    recipe: Recipe,
    data: Path,
    out: Path,
    reads: Reads,
    resume: Resume,
    hosts: HostOptions,
    *,
    dry_run: bool,
    json: bool,
) -> int:
    with needs_extra("train"):
        from beit_jax.inference.saving import save_adapters
        from beit_jax.train.distributed import cluster
        from beit_jax.train.forecast.preview import preview
        from beit_jax.train.loop import contract
        from beit_jax.train.loop import run as loop
        from beit_jax.train.loop.plan import Plan, make_plan

    with cluster.joined(hosts) as peers:
        if not dry_run:
            contract.check_out(out)  # before data and models are read

        def planned() -> Plan:  # a new one, which nothing keeps: see `Program.begun`
            return make_plan(recipe, data, **reads.loaded(recipe))

        if dry_run:
            _print_once(preview(planned()), peers, json=json)
            return 0
        outcome = loop.train(planned(), out, resume=resume, peers=peers)
        if peers.index == 0:
            adapters = save_adapters(outcome.models, lambda line: print(line, file=sys.stderr))
            outcome = replace(outcome, models=(*outcome.models, *adapters))
        _print_once(outcome, peers, json=json)
        return outcome.exit_code


def _print_once(found: "Outcome | Preview", peers: "Peers", *, json: bool) -> None:
    """Prints the result, in the first process only."""
    if peers.index == 0:
        print_json(found.as_dict()) if json else print_lines(found.lines())


def tokenize_command(arguments: Sequence[str]) -> Callable[..., int]:
    """The function behind `beit-jax tokenize`, as `train_command`'s."""
    given = _named(arguments, "tokenize")
    kind, defaults = _options(given)

    def tokenize(
        recipe: Positional[_RecipeName],
        *,
        data: _Data,
        tokenizer: Annotated[
            str, arg(metavar="TOKENIZER", help="Native, a run that trained it, or a source of beit-jax convert.")
        ],
        out: Annotated[Path, arg(metavar="DIR", help="Directory to create: the tokens.")],
        init: _Start = None,
        epochs: Annotated[
            float | None,
            arg(metavar="FLOAT", help_behavior_hint="", help="Epochs to store; by default all of the recipe's."),
        ] = None,
        overwrite: Annotated[
            _Switch, arg(help="Replace DIR if it exists; it stays whole until the new one is.")
        ] = False,
        json: Json = False,
        options: Annotated[kind, arg(name="")] = defaults,  # type: ignore[valid-type]
    ) -> int:
        resolved = _changed(given, recipe, options)
        if "stored_tokens" not in objective_of(resolved).reads:
            raise BeitJaxError(f"{given.name}: {resolved.objective} predicts no tokens; choose another recipe")
        if epochs is not None:
            if not 0.0 < epochs <= MOST:
                raise BeitJaxError(f"--epochs: expected a positive number, found {epochs:g}; the most is {MOST}")
            resolved = replace(resolved, optim=replace(resolved.optim, epochs=epochs, warmup_epochs=0.0))
        return _tokenize(resolved, data, Reads(init=init, tokenizer=tokenizer), out, overwrite=overwrite, json=json)

    tokenize.__doc__ = inspect.cleandoc(_TOKENIZE_HELP).format(about=_about(given))
    return tokenize


_TOKENIZE_HELP = """Compute the visual tokens of pre-training once, for runs that see the same images in the same views.

    {about}

    Tokens follow from the recipe's seed and augmentation, the data and the tokenizer: they are those that training with
    --tokenizer computes on its way. They take two bytes a patch: half a GB for an epoch of ImageNet.

    Try:
      beit-jax tokenize beit_base_pt1k --data ./imagenet --tokenizer ./dvae-encoder --out ./tokens --epochs 10
      beit-jax train beit_base_pt1k --data ./imagenet --tokenizer ./dvae-encoder --stored-tokens ./tokens --out ./run \\
        --optim.epochs 10
    """


def _tokenize(recipe: Recipe, data: Path, reads: Reads, out: Path, *, overwrite: bool, json: bool) -> int:
    with needs_extra("train"):
        from beit_jax.atomic import check_destination
        from beit_jax.train.data.stored_tokens import CONTENTS
        from beit_jax.train.loop.plan import make_plan

    check_destination(out, overwrite=overwrite, contents=CONTENTS)  # before data and models are read
    plan = make_plan(recipe, data, **reads.loaded(recipe))
    progress = partial(image_progress, description="tokenizing")
    positions = plan.objective.store_tokens(plan.training, out, progress, overwrite=overwrite)
    if json:
        print_json({"directory": str(out), "images": positions, "epochs": recipe.optim.epochs})
    else:
        print_lines([f"written      {out}: tokens of {positions:,} images, {recipe.optim.epochs:g} epochs"])
    return 0


def aot_command(arguments: Sequence[str]) -> Callable[..., int]:
    """The function behind `beit-jax aot`, as `train_command`'s."""
    given = _named(arguments, "aot")
    kind, defaults = _options(given)

    def aot(
        recipe: Positional[_RecipeName],
        *,
        topology: Annotated[
            str,
            arg(
                metavar="CHIP:SHAPE",
                help="v5e:2x4, v5p:2x2x2, or as Google Cloud says v5litepod-8, tpu7x-8; 2xv5e:4x4: two slices. h100:8, "
                "a100-80gb:1, b200:8; 2xh100:8: two machines.",
            ),
        ] = given.topology,
        init: _Start = None,
        classes: Annotated[
            int | None,
            arg(
                metavar="INT",
                help_behavior_hint="",
                help="Of the data; by default as the checkpoint has, or as the variant was published with.",
            ),
        ] = None,
        quick: Annotated[_Switch, arg(help="Compile once: do not look for the largest batch that fits.")] = False,
        json: Json = False,
        options: Annotated[kind, arg(name="")] = defaults,  # type: ignore[valid-type]
    ) -> int:
        if classes is not None and not 1 <= classes <= 10**6:
            raise BeitJaxError(f"--classes: expected 1 to 1,000,000, found {classes}")
        return _aot(_changed(given, recipe, options), topology, init, classes, quick=quick, json=json)

    aot.__doc__ = inspect.cleandoc(_AOT_HELP).format(about=_about(given))
    return aot


_AOT_HELP = """Compile the step of a recipe for TPUs or GPUs that are not here: does it fit, and how fast could it be?

    {about}

    Prints memory of a chip against what the chip has, operations, memory traffic and collectives with their bytes,
    bounds of the step time and of utilisation by the chip's data sheet, and the largest batch that fits. Needs the
    compiler (pip install 'jax[tpu]', or 'beit-jax[aot-gpu]'), and minutes, but no TPU, no GPU and no data. Of a
    checkpoint it reads the architecture; without one, options describe that. Exit code 1: it does not fit.

    Try:
      beit-jax aot beit_base_pt1k --topology v5e:2x4 --optim.accumulate 2 --model.remat block
      beit-jax aot beit_large_ft22k_ft1k_512 --topology 2xv5e:4x4 --run.mesh 2 -1 1 --model.remat block --quick
      beit-jax aot beit_base_ft1k --topology v5e:2x2 --model.hidden-size 192 --model.heads 3 --model.mlp 768 --quick
      beit-jax aot beit_base_pt1k --topology h100:8 --optim.accumulate 1 --model.remat dots
    """


def _aot(recipe: Recipe, topology: str, init: str | None, classes: int | None, *, quick: bool, json: bool) -> int:
    with needs_extra("train"):
        import jax

        jax.config.update("jax_platforms", "cpu")  # a TPU of this machine, if there is one, stays free
        from beit_jax.train.distributed.topology import parse_topology
        from beit_jax.train.forecast import aot

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    chips, start = parse_topology(topology), Reads(init=init).loaded(recipe).get("init")
    found = aot.report(recipe, chips, start=start, classes=classes, largest=not quick, say=say)
    print_json(found.as_dict()) if json else print_lines(found.lines())
    return 0 if found.fits else 1


def _named(arguments: Sequence[str], command: str) -> Recipe:
    """The recipe that the command line names; a recipe of defaults where it names none.

    Raises:
        BeitJaxError: no such recipe; an option that its objective does not read; options before the recipe.
    """
    name = arguments[1] if len(arguments) > 1 and arguments[0] == command else ""
    if not name or (name.startswith("-") and {"-h", "--help"}.intersection(arguments)):
        return Recipe()
    if name.startswith("-"):
        example = f"beit-jax {command} digits_finetune {printable(name)} ..."
        raise BeitJaxError(f"{printable(name)}: name the recipe before all options: {example}")
    recipe = recipe_named(name)
    _refuse_unread(recipe, arguments)
    return recipe


def _about(given: Recipe) -> str | None:
    """What a recipe is, and the model that it trains by default."""
    if given.name not in RECIPES:
        return _LIST
    about = inspect.getdoc(RECIPES[given.name]) or ""
    if not given.published:
        return about
    return f"{about}\n\nIts model is {given.published}, unless --init or an option of the model says otherwise."
