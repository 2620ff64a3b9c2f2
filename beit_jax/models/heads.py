"""Another head for a checkpoint: its classes chosen, ordered or replaced, or a classifier on an encoder without one.

What a checkpoint has learned of a class is kept by that class's name or number. A head of classes that it does not know
starts new as a whole, and `HeadChange.notes` says so.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from beit_jax.choices import ProblemType
from beit_jax.config import BeitConfig
from beit_jax.config_file import MOST_LABELS, label_numbers
from beit_jax.errors import BeitJaxError, printable
from beit_jax.models.adapt import Adaptation, Leaves
from beit_jax.weights.leaves import shapes

Labels = Iterable[str] | Iterable[int]
"""Names of classes; or numbers of a checkpoint's classes, counted from 0 in the order of its outputs."""

_CLASSES = re.compile(r"(classifier|(decode|auxiliary)_head/classifier)/(kernel|bias)")
_SHOWN = 3


@dataclass(frozen=True)
class HeadChange:
    """A model with another head, and where its leaves come from.

    Attributes:
        config: the model with its new head, otherwise as before.
        moved: leaves of the new model that are leaves of the old one, most under the same name: new to old.
        made: leaves that are made: the old leaves that they are made of, and the function that makes them.
        notes: lines for the user: what became of the head.
        drawn: True if the head starts new.
    """

    config: BeitConfig
    moved: Mapping[str, str]
    made: Mapping[str, tuple[tuple[str, ...], Adaptation]]
    notes: tuple[str, ...]
    drawn: bool


def change_head(
    config: BeitConfig, labels: Labels | int | None = None, problem_type: ProblemType | None = None, *, seed: int = 0
) -> HeadChange:
    """Plans another head for the model of a configuration.

    Args:
        labels: the classes. Names that are all the checkpoint's, or numbers, choose classes: their weights are kept in
            this order. Any other names start a new head, and so does a count of classes without names, unless they are
            those that the checkpoint has. None: the classes stay.
        problem_type: what the outputs are from now on; by default, what they were for chosen classes, and nobody's
            guess for a new head.
        seed: draws what starts new: kernels normal with ``initializer_range``, as transformers does; biases 0, norms 1.

    Raises:
        BeitJaxError: classes that stand twice or do not exist, a backbone, or a kind of outputs without a classifier.
    """
    if labels is None and problem_type is None:
        return HeadChange(config, {name: name for name in shapes(config)}, {}, (), False)
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise BeitJaxError(f"seed: expected an integer of at least 0, found {printable(seed)}")
    if config.task == "backbone":
        raise BeitJaxError("a backbone gives feature maps and has no classes; a head for them is a model of its own")
    if labels is None and config.task != "image_classification":
        raise BeitJaxError(
            f"problem_type: of a classifier, and this model's task is {config.task}; give labels as well, or leave it "
            "out"
        )
    old = config if config.task in ("image_classification", "semantic_segmentation") else _classifier(config)
    chosen = _chosen(config.labels, labels)
    names = chosen.labels if chosen.labels is not None else config.labels
    kind = problem_type if problem_type is not None or chosen.new else config.problem_type
    _check_problem(config, kind if problem_type is not None else None, len(names))
    target = replace(old, labels=names, problem_type=kind)
    moved, made = _leaves(config, target, chosen, seed)
    notes = [note for note in (chosen.note,) if note]
    if old is not config:
        new = sorted(name for name in made if not _CLASSES.fullmatch(name))
        notes.append(f"a classifier on the encoder of a model for {config.task}{', ' * bool(new)}{', '.join(new)}")
    if kind != config.problem_type:
        notes.append(f"problem_type is now {kind or 'not stated'}, it was {config.problem_type or 'not stated'}")
    if chosen.new:
        notes.append(f"the new head is drawn with seed {seed}: train it before its outputs mean anything")
    return HeadChange(target, moved, made, tuple(notes), chosen.new)


@dataclass(frozen=True)
class _Chosen:
    """Classes: their names (None: as they are), the old outputs that they are, and whether their head starts new."""

    labels: tuple[str, ...] | None
    rows: tuple[int, ...] | None
    new: bool
    note: str | None


def _chosen(have: Sequence[str], asked: Labels | int | None) -> _Chosen:
    if asked is None:
        return _Chosen(None, None, False, None)
    if isinstance(asked, int) and not isinstance(asked, bool):
        if not 1 <= asked <= MOST_LABELS:
            raise BeitJaxError(f"number of labels: expected 1 to {MOST_LABELS}, found {asked}")
        names = tuple(f"LABEL_{i}" for i in range(asked))
        return _same(have, names) if names == tuple(have) else _new(have, names)
    several = isinstance(asked, Iterable) and not isinstance(asked, str | bytes | Mapping)
    items: list[object] = list(asked) if several and isinstance(asked, Iterable) else []
    if not items:
        raise BeitJaxError(f"labels: expected names of classes, or numbers of them, found {printable(asked, 60)}")
    if all(isinstance(item, str) for item in items):
        return _named(have, tuple(map(str, items)))
    numbers = tuple(int(item) for item in items if isinstance(item, int | np.integer) and not isinstance(item, bool))
    if len(numbers) == len(items):
        return _numbered(have, numbers)
    odd = next(item for item in items if type(item) is not type(items[0]) or not isinstance(item, str | int))
    raise BeitJaxError(f"labels: expected names only, or numbers only, found {printable(odd, 60)} among them")


def _named(have: Sequence[str], names: tuple[str, ...]) -> _Chosen:
    if names == tuple(have):
        return _same(have, names)
    if "" in names:
        raise BeitJaxError("labels: expected names, found an empty one")
    twice = _twice(names)
    if twice is not None:
        raise BeitJaxError(f"labels: {printable(twice, 60)} stands twice; name every class once")
    known = set(have)
    if not set(names) <= known:
        return _new(have, names)
    wanted = set(names)
    several = _twice([name for name in have if name in wanted])
    if several is not None:
        raise BeitJaxError(
            f"labels: several of the checkpoint's classes are called {printable(several, 60)}; choose by their numbers"
        )
    where = {name: row for row, name in enumerate(have)}
    return _subset(have, tuple(where[name] for name in names), "name")


def _numbered(have: Sequence[str], rows: tuple[int, ...]) -> _Chosen:
    if not have:
        raise BeitJaxError(
            "labels: numbers choose among a checkpoint's classes, and this one has none; give names, or a count"
        )
    beyond = next((row for row in rows if not 0 <= row < len(have)), None)
    if beyond is not None:
        raise BeitJaxError(
            f"labels: class {beyond}, expected 0 to {len(have) - 1}, the numbers of the checkpoint's classes; names "
            "made of digits are text"
        )
    twice = _twice(rows)
    if twice is not None:
        raise BeitJaxError(f"labels: class {twice} stands twice; name every class once")
    return _subset(have, rows, "number")


def _same(have: Sequence[str], names: tuple[str, ...]) -> _Chosen:
    renumbered = "" if list(label_numbers(have)) == list(range(len(have))) else ", now numbered from 0"
    return _Chosen(names, None, False, f"head kept: its {len(names)} classes are these already{renumbered}")


def _subset(have: Sequence[str], rows: tuple[int, ...], rule: str) -> _Chosen:
    what = "all" if len(rows) == len(have) else str(len(rows))
    note = f"head cut to {what} of its {len(have)} classes, chosen by {rule}: {_listed([have[row] for row in rows])}"
    return _Chosen(tuple(have[row] for row in rows), rows, False, note)


def _new(have: Sequence[str], names: tuple[str, ...]) -> _Chosen:
    common = sorted(set(have) & set(names))
    note = f"new head of {len(names)} classes: {_listed(names)}"
    if have:
        note += f"; the checkpoint's, of {len(have)} classes, is left out"
    if common:
        note += f", although {len(common)} of these are its classes too ({_listed(common)})"
    return _Chosen(names, None, True, note)


def _twice(items: Sequence[str] | Sequence[int]) -> str | int | None:
    seen: set[str | int] = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(printable(name, 30) for name in names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)


def _check_problem(config: BeitConfig, kind: ProblemType | None, classes: int) -> None:
    if kind is None:
        return
    if config.task == "semantic_segmentation":
        raise BeitJaxError(f"problem_type {kind}: of a classifier, and this model segments; leave it out")
    if kind == "single_label_classification" and classes < 2:
        raise BeitJaxError(f"problem_type {kind}: expected at least two classes, found {classes}; or regression")


def _classifier(config: BeitConfig) -> BeitConfig:
    """A classifier on the encoder of a model without one."""
    encoder = config.without_aggregation()
    return replace(encoder, task="image_classification", add_pooling_layer=True, problem_type=None, embedding_size=0)


def _leaves(
    source: BeitConfig, target: BeitConfig, chosen: _Chosen, seed: int
) -> tuple[dict[str, str], dict[str, tuple[tuple[str, ...], Adaptation]]]:
    """What is moved and what is made, see `HeadChange`."""
    have, moved = shapes(source), {}
    made: dict[str, tuple[tuple[str, ...], Adaptation]] = {}
    draws = np.random.default_rng(seed)
    for name, shape in sorted(shapes(target).items()):
        if _CLASSES.fullmatch(name) and chosen.rows is not None:
            made[name] = (name,), partial(_rows, name=name, rows=chosen.rows)
        elif _CLASSES.fullmatch(name) and chosen.new:
            # Drawn here, in the order of the names, so that one seed means one head whoever asks for which leaf first.
            spread = target.initializer_range if name.endswith("kernel") else 0.0
            made[name] = (), partial(_given, leaf=(draws.standard_normal(shape) * spread).astype(np.float32))
        else:
            origin = next((old for old in _old_names(name, source) if old in have), None)
            if origin is None:
                made[name] = (), partial(_given, leaf=np.full(shape, name.endswith("scale"), np.float32))
            else:
                moved[name] = origin
    return moved, made


def _old_names(name: str, source: BeitConfig) -> tuple[str, ...]:
    """What a leaf may be called in the old model. Where an encoder has no norm of its own, that of the head is it."""
    if source.task == "features":
        return (name.removeprefix("beit/"),)
    return name, name.replace("beit/norm/", "norm/")


def _rows(old: Leaves, *, name: str, rows: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(old[name][..., list(rows)])


def _given(old: Leaves, *, leaf: np.ndarray) -> np.ndarray:
    return leaf
